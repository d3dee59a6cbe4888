"""/v1/files/{id}/report"""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from app.dataset_reports.schemas import DatasetReport
from app.dependencies import ServicesDependency
from app.keys.middleware import CallerDependency
from app.pending import NOT_READY, Pending, not_ready
from app.spec.datasets.rendering import RenderingSettings
from app.spec.job import MethodType

router = APIRouter(prefix="/files", tags=["files"])


@router.get("/{file_id}/report", response_model=DatasetReport | Pending, responses=NOT_READY)
def get_file_report(
    file_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    model: Annotated[str | None, Query(max_length=512, description="Count tokens with this model's tokenizer.")] = None,
    max_length: Annotated[int | None, Query(ge=16, le=10**7, description="Token limit of prompt and answer.")] = None,
    method: Annotated[MethodType | None, Query(description="The method to train.")] = None,
    chat_template: Annotated[bool | None, Query(description="As in the job: whether to use the chat template.")] = None,
    fold_system: Annotated[
        bool | None, Query(description="As in the job: put the system prompt into the first turn.")
    ] = None,
) -> DatasetReport | JSONResponse:
    """The dataset check's report on a file. It is made when the file is uploaded, before any job."""
    rendering = RenderingSettings(chat_template=chat_template, fold_system=fold_system)
    report = services.reports.get(
        caller.project, file_id, model=model, max_length=max_length, method=method, rendering=rendering
    )
    return not_ready(seconds=1) if report is None else report
