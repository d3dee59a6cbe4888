"""The table of models."""

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table
from app.spec.json_types import JsonObject
from app.stored_content import FolderContent


class Model(Table):
    """A model. `kind` is `base` (a worker serves it) or `hub` (a pattern of hub ids that workers may download).

    The kinds of trained models are `adapter`, `full` and `reward`.
    """

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    project: Mapped[str | None] = mapped_column(index=True)
    """None for base models, which every project may use."""
    created_at: Mapped[float]
    base_model: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(index=True)
    prefix: Mapped[str | None]
    """The folder of a trained model in the object store."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Size of a trained model in the object store; 0 for a base model."""
    objects: Mapped[int | None]
    """Number of objects of a trained model."""
    sha256: Mapped[str | None]
    """Hash of the names and contents of a trained model's objects."""
    revision: Mapped[str | None]
    details: Mapped[JsonObject]
    """Base model: architecture, context_length, bytes, chat_template and more. Trained model: adapter, foundation."""

    @property
    def content(self) -> FolderContent:
        """The content of a trained model's folder."""
        return FolderContent(self.objects, self.bytes, self.sha256)
