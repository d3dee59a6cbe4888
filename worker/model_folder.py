"""Put a model into the folder of a trainer: find what its name stands for, then fetch its files."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.models import repository as models
from app.storage import Storage
from worker.base_models import BaseModels
from worker.model_files import point_to
from worker.waiting import Check


class ModelGone(Exception):
    """A model was deleted after a job that uses it was created."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' was deleted.")


@dataclass(frozen=True)
class ModelStack:
    """A model, the fully trained model below it, and the version of its base model."""

    model: models.ResolvedModel
    foundation: models.ResolvedModel | None
    """None if the model sits on its base model directly."""
    version: str | None
    """None if no worker has registered the base model."""


def find_model(session: Session, project: str, name: str) -> ModelStack:
    """Find a model and its foundation by name. Raises `ModelGone`."""
    model = models.find(session, project, name)
    if model is None:
        raise ModelGone(name)
    foundation = None
    if model.foundation is not None:
        foundation = models.find(session, project, model.foundation)
        if foundation is None:
            raise ModelGone(model.foundation)
    return ModelStack(model, foundation, models.version(session, model.base_model))


def fetch_model(storage: Storage, base_models: BaseModels, stack: ModelStack, folder: Path, check: Check) -> str | None:
    """Put the weights into `folder`: full weights as `base`, an adapter as `start`.

    Returns the hub revision of the base model, if it has one. Raises `ModelUnavailable` if this worker cannot serve
    the base model, and what `check` raises while it is downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, foundation = stack.model, stack.foundation
    if model.kind == "reward" and model.prefix is not None:  # its weights include the base model's
        storage.get_folder(model.prefix, folder / "base")
        return None
    base, revision = base_models.locate(model.base_model, check)
    if foundation is not None and foundation.prefix is not None:
        storage.get_folder(foundation.prefix, folder / "base")
    else:
        point_to(folder / "base", base)
    if model.kind == "adapter" and model.prefix is not None:
        storage.get_folder(model.prefix, folder / "start")
    return revision
