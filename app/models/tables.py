"""The table of models."""

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Model(Table):
    """A model. `kind`: `base` (a worker can serve it), `hub` (a pattern of hub ids that workers may download),
    or what a job made: `adapter`, `full`, `reward`."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    project: Mapped[str | None] = mapped_column(index=True)
    """None for base models, which everybody may use."""
    created_at: Mapped[float]
    base_model: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(index=True)
    prefix: Mapped[str | None]
    """Where a made model's folder is in the object store."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    """What a made model has in the object store; 0 for a base model."""
    revision: Mapped[str | None]
    details: Mapped[dict[str, Any]]
    """Of a base model: architecture, context_length, bytes, chat_template. Of a made one: adapter settings."""
