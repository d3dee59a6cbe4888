"""/v1/models. Names may contain `/`, which the official client sends as %2F."""

from typing import Literal
from urllib.parse import quote

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.dependencies import ServicesDependency
from app.errors import ServiceError
from app.keys.middleware import CallerDependency
from app.models.schemas import ModelDeleted, ModelObject

router = APIRouter(prefix="/models", tags=["models"])


class ModelList(BaseModel):
    """All models; the contract has no pages here."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("")
def list_models(caller: CallerDependency, services: ServicesDependency) -> ModelList:
    """Base models that workers serve, and models made here."""
    return ModelList(data=[ModelObject.of(model) for model in services.models.list(caller.project)])


@router.get(
    "/{name:path}/download",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {}}}},
)
def download_model(
    name: str,
    caller: CallerDependency,
    services: ServicesDependency,
    format: Literal["adapter", "merged"] = "adapter",
) -> StreamingResponse:
    """The model's folder as a tar file: an adapter, or all weights of a fully trained model."""
    if format == "merged":
        raise ServiceError(
            "The format 'merged' is part of the contract but not available yet.",
            param="format",
            code="unsupported_parameter",
        )
    filename = quote(name.replace("/", "_").replace(":", "_"), safe="") + ".tar"
    return StreamingResponse(
        services.models.download(caller.project, name),
        media_type="application/x-tar",
        headers={"Content-Disposition": f'attachment; filename="{filename}"'},
    )


@router.get("/{name:path}")
def get_model(name: str, caller: CallerDependency, services: ServicesDependency) -> ModelObject:
    """One model."""
    return ModelObject.of(services.models.get(caller.project, name))


@router.delete("/{name:path}")
def delete_model(name: str, caller: CallerDependency, services: ServicesDependency) -> ModelDeleted:
    """Delete a model made here."""
    services.models.delete(caller.project, name)
    return ModelDeleted(id=name)
