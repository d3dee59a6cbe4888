"""/v1/files/{id}/report"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from app.dataset_reports.schemas import DatasetReport, Pending
from app.dependencies import ServicesDependency
from app.keys.middleware import CallerDependency
from app.spec.datasets.rendering import RenderingSettings

router = APIRouter(prefix="/files", tags=["files"])

PENDING = {202: {"model": Pending, "description": "Not ready; ask again after Retry-After seconds."}}


@router.get("/{file_id}/report", responses=PENDING)  # type: ignore[arg-type]
def get_file_report(
    file_id: str,
    response: Response,
    caller: CallerDependency,
    services: ServicesDependency,
    model: Annotated[str | None, Query(max_length=512, description="Count tokens as this model does.")] = None,
    max_length: Annotated[int | None, Query(ge=16, le=10**7, description="Tokens of a prompt and one answer.")] = None,
    method: Annotated[Literal["supervised", "dpo"] | None, Query(description="What the rows are for.")] = None,
    chat_template: Annotated[bool | None, Query(description="As in the job: whether the template is used.")] = None,
    fold_system: Annotated[
        bool | None, Query(description="As in the job: the system prompt in the first turn.")
    ] = None,
) -> DatasetReport | Pending:
    """What the dataset check found in a file. It is made when the file is uploaded, before any job."""
    rendering = RenderingSettings(chat_template=chat_template, fold_system=fold_system)
    found = services.reports.get(
        caller.project, file_id, model=model, max_length=max_length, method=method, rendering=rendering
    )
    if found is None:
        response.status_code, response.headers["Retry-After"] = 202, "1"
        return Pending()
    return found
