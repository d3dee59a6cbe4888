"""The table of models."""

from sqlalchemy import BigInteger, Index, String
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.database import Table
from app.spec.json_types import JsonObject
from app.stored_content import FolderContent


class foundation_in_details(FunctionElement[str]):  # noqa: N801 - reads as the SQL expression that it is
    """The name of the fully trained model below a trained model, from the `details` of a row of `models`.

    An expression of the index `ix_models_foundation`, so databases must get the same text in each query.
    """

    type = String()
    inherit_cache = True


@compiles(foundation_in_details, "sqlite")
def _on_sqlite(_element: foundation_in_details, _compiler: SQLCompiler, **_: object) -> str:
    return "json_extract(details, '$.foundation')"


@compiles(foundation_in_details, "postgresql")
def _on_postgresql(_element: foundation_in_details, _compiler: SQLCompiler, **_: object) -> str:
    return "(details ->> 'foundation')"


class Model(Table):
    """A model. `kind` is `base` (a worker serves it) or `hub` (a pattern of hub ids that workers may download).

    The kinds of trained models are `adapter`, `full` and `reward`.
    """

    __tablename__ = "models"
    __table_args__ = (
        Index("ix_models_project_created_at", "project", "created_at", "name"),
        Index("ix_models_foundation", foundation_in_details()),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    project: Mapped[str | None]
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
