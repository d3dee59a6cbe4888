"""The files of a model in the folder of a trainer: find what a name stands for, then fetch what it is made of."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.models import repository as models
from app.storage import Storage
from worker.base_models import BaseModels


class ModelGone(Exception):
    """A model that was there when its job was made was deleted."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' was deleted.")


@dataclass(frozen=True)
class FoundModel:
    """A model, and what it stands on."""

    model: models.ResolvedModel
    foundation: models.ResolvedModel | None
    """The fully trained model below it, where that is not the base model itself."""
    version: str | None
    """The version of its base model."""


def find_model(session: Session, project: str, name: str) -> FoundModel:
    """What a name stands for. Raises `ModelGone`."""
    model = models.find(session, project, name)
    if model is None:
        raise ModelGone(name)
    foundation = None
    if model.foundation is not None:
        foundation = models.find(session, project, model.foundation)
        if foundation is None:
            raise ModelGone(model.foundation)
    return FoundModel(model, foundation, models.version(session, model.base_model))


def fetch_model(storage: Storage, base_models: BaseModels, found: FoundModel, folder: Path) -> str | None:
    """Put the weights into `folder`: `base`, and for an adapter `start`. Returns the hub revision of the base model.

    Raises `ModelUnavailable` where the base model is not on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, foundation = found.model, found.foundation
    if model.kind == "reward" and model.prefix is not None:  # it is whole, its base model in it
        storage.get_folder(model.prefix, folder / "base")
        return None
    base, revision = base_models.locate(model.base_model)
    if foundation is not None and foundation.prefix is not None:
        storage.get_folder(foundation.prefix, folder / "base")
    else:
        (folder / "base").symlink_to(base.resolve(), target_is_directory=True)
    if model.kind == "adapter" and model.prefix is not None:
        storage.get_folder(model.prefix, folder / "start")
    return revision
