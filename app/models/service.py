"""What can be done with models."""

from collections.abc import Iterator

from app.database import Database
from app.errors import NotFound, ServiceError
from app.models import archive, repository
from app.models.tables import Model
from app.storage import Storage


def not_found(name: str) -> NotFound:
    return NotFound(f"The model '{name}' does not exist", param="model", code="model_not_found")


class Models:
    """List, find, download and delete models."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self.database, self.storage = database, storage

    def list(self, project: str) -> list[Model]:
        with self.database.read() as session:
            return repository.listed(session, project)

    def get(self, project: str, name: str) -> Model:
        with self.database.read() as session:
            model = repository.get(session, project, name)
        if model is None:
            raise not_found(name)
        return model

    def download(self, project: str, name: str) -> Iterator[bytes]:
        """The folder of a made model or a checkpoint, as a tar stream."""
        with self.database.read() as session:
            found = repository.find(session, project, name)
        if found is None:
            raise not_found(name)
        if found.prefix is None:
            raise ServiceError(
                f"'{name}' is a base model; only models made here can be downloaded.",
                param="model",
                code="not_downloadable",
            )
        return archive.tar(self.storage, found.prefix)

    def delete(self, project: str, name: str) -> None:
        """Delete a made model: its row first, so that nobody can reach a folder that is half gone."""
        with self.database.write() as session:
            model = repository.get(session, project, name)
            if model is None:
                raise not_found(name)
            if model.prefix is None:
                raise ServiceError(
                    f"'{name}' is a base model, registered by a worker; it cannot be deleted over HTTP.",
                    param="model",
                    code="not_deletable",
                )
            session.delete(model)
        self.storage.delete_folder(model.prefix)
