"""/v1/files/{id}/report"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from app.dataset_reports.schemas import DatasetReport
from app.dependencies import ServicesDependency
from app.keys.middleware import CallerDependency
from app.pending import NOT_READY, Pending, not_ready
from app.spec.datasets.rendering import RenderingSettings

router = APIRouter(prefix="/files", tags=["files"])


@router.get("/{file_id}/report", response_model=DatasetReport | Pending, responses=NOT_READY)
def get_file_report(
    file_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    model: Annotated[str | None, Query(max_length=512, description="Count tokens as this model does.")] = None,
    max_length: Annotated[int | None, Query(ge=16, le=10**7, description="Tokens of a prompt and one answer.")] = None,
    method: Annotated[Literal["supervised", "dpo"] | None, Query(description="What the rows are for.")] = None,
    chat_template: Annotated[bool | None, Query(description="As in the job: whether the template is used.")] = None,
    fold_system: Annotated[
        bool | None, Query(description="As in the job: the system prompt in the first turn.")
    ] = None,
) -> DatasetReport | JSONResponse:
    """What the dataset check found in a file. It is made when the file is uploaded, before any job."""
    rendering = RenderingSettings(chat_template=chat_template, fold_system=fold_system)
    found = services.reports.get(
        caller.project, file_id, model=model, max_length=max_length, method=method, rendering=rendering
    )
    return not_ready(seconds=1) if found is None else found
