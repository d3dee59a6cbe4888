"""The table of workers."""

from sqlalchemy import false
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table
from app.spec.json_types import JsonObject


class Worker(Table):
    """A running worker. It reports every 30 seconds."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    lane: Mapped[str]
    seen_at: Mapped[float]
    cordoned: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether it may start no jobs, because an operator wants it so."""
    serves: Mapped[list[str]]
    """Names of base models, or patterns of hub ids."""
    details: Mapped[JsonObject]
    """`device` has `kind`, `name` and `memory_bytes`. `integrations` lists those for which the worker has a key.

    `problem` says why a worker is out of service, that is, claims no jobs; it is absent while the worker may.
    """
