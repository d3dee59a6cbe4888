"""/v1/models. Model names may contain `/`, which the official client sends as %2F."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from app.archive import tar_response
from app.dependencies import ServicesDependency
from app.keys.middleware import CallerDependency
from app.keys.schemas import Scope
from app.models.schemas import Lineage, ModelDeleted, ModelObject
from app.pagination import After, Page, page
from app.pending import NOT_READY, not_ready

router = APIRouter(prefix="/models", tags=["models"])


@router.get("")
def list_models(
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Page[ModelObject]:
    """Base models that workers serve, then the models that this project trained, newest first.

    OpenAI's list has no pages. Here `has_more` says whether there is another one.
    """
    models = services.models.page(caller.project, after=after, limit=limit)
    return page([ModelObject.of(model) for model in models], limit)


@router.get("/{name:path}/lineage")
def get_lineage(name: str, caller: CallerDependency, services: ServicesDependency) -> Lineage:
    """How a model was made: its base model and revision, then each job with its spec, metrics and file hashes."""
    return services.models.lineage(caller.project, name)


@router.get(
    "/{name:path}/download",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-tar": {}}},
        **NOT_READY,
    },
)
def download_model(
    name: str,
    caller: CallerDependency,
    services: ServicesDependency,
    format: Annotated[
        Literal["adapter", "merged"],
        Query(description="The files as trained, or all weights with the adapter merged into them."),
    ] = "adapter",
    dtype: Annotated[Literal["bf16", "fp16"], Query(description="Precision of merged weights.")] = "bf16",
) -> Response:
    """The model's files as a tar file. A merged model is made on the first request: 202 until it is ready.

    It takes as many bytes as the base model, and so only a key that may write can have it made.
    """
    if format == "merged":
        chunks = services.models.download_merged(caller.project, name, dtype, may_make=caller.may(Scope.WRITE))
    else:
        chunks = services.models.download(caller.project, name)
    if chunks is None:
        return not_ready(seconds=2)
    return tar_response(chunks, name.replace("/", "_").replace(":", "_"))


@router.get("/{name:path}")
def get_model(name: str, caller: CallerDependency, services: ServicesDependency) -> ModelObject:
    """One model."""
    return ModelObject.of(services.models.get(caller.project, name))


@router.delete("/{name:path}")
def delete_model(name: str, caller: CallerDependency, services: ServicesDependency) -> ModelDeleted:
    """Delete a trained model and the checkpoints of its training, or one checkpoint.

    It is refused while an unfinished job or another model needs it.
    """
    services.models.delete(caller.project, name)
    return ModelDeleted(id=name)
