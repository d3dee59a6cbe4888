"""Put a model into the folder of a trainer: find what its name stands for, then fetch its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy.orm import Session

from app.models import repository as models
from app.storage import Storage
from app.stored_content import ContentDamaged, fetch_folder
from worker.base_models import BaseModels
from worker.model_files import point_to
from worker.waiting import Check


class ModelGone(Exception):
    """A model was deleted after a job that uses it was created, or the object store has lost its files (`is_lost`)."""

    def __init__(self, message: str, *, is_lost: bool) -> None:
        super().__init__(message)
        self.is_lost = is_lost

    @classmethod
    def deleted(cls, name: str) -> Self:
        return cls(f"The model '{name}' was deleted.", is_lost=False)

    @classmethod
    def damaged(cls, name: str, damage: ContentDamaged) -> Self:
        message = f"The files of the model '{name}' cannot be used: {damage}. The service has lost them."
        return cls(message, is_lost=True)


@dataclass(frozen=True)
class ModelStack:
    """A model, the fully trained model below it, and the version of its base model."""

    model: models.ResolvedModel
    foundation: models.ResolvedModel | None
    """None if the model sits on its base model directly."""
    version: str | None
    """None if no worker has registered the base model."""

    @property
    def placed(self) -> list[str]:
        """The names that `fetch_model` makes in a folder."""
        has_adapter = self.model.kind == "adapter" and self.model.prefix is not None
        return ["base", "start"] if has_adapter else ["base"]


def find_model(session: Session, project: str, name: str) -> ModelStack:
    """Find a model and its foundation by name. Raises `ModelGone`."""
    model = models.find(session, project, name)
    if model is None:
        raise ModelGone.deleted(name)
    foundation = None
    if model.foundation is not None:
        foundation = models.find(session, project, model.foundation)
        if foundation is None:
            raise ModelGone.deleted(model.foundation)
    return ModelStack(model, foundation, models.version(session, model.base_model))


def fetch_model(storage: Storage, base_models: BaseModels, stack: ModelStack, folder: Path, check: Check) -> str | None:
    """Put the weights into `folder`: full weights as `base`, an adapter as `start`.

    Returns the hub revision of the base model, if it has one. Raises `ModelGone` if the object store has lost files of
    the model, `ModelUnavailable` if this worker cannot serve the base model, and what `check` raises while it is
    downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, foundation = stack.model, stack.foundation
    if model.kind == "reward" and model.prefix is not None:  # its weights include the base model's
        _fetch(storage, model, model.prefix, folder / "base")
        return None
    base, revision = base_models.locate(model.base_model, check)
    if foundation is not None and foundation.prefix is not None:
        _fetch(storage, foundation, foundation.prefix, folder / "base")
    else:
        point_to(folder / "base", base)
    if model.kind == "adapter" and model.prefix is not None:
        _fetch(storage, model, model.prefix, folder / "start")
    return revision


def _fetch(storage: Storage, model: models.ResolvedModel, prefix: str, folder: Path) -> None:
    try:
        fetch_folder(storage, prefix, model.content, folder)
    except ContentDamaged as damage:
        raise ModelGone.damaged(model.name, damage) from damage
