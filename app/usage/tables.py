"""The table of usage."""

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Usage(Table):
    """The usage of a project in a month."""

    __tablename__ = "usage"

    project: Mapped[str] = mapped_column(primary_key=True)
    month: Mapped[str] = mapped_column(primary_key=True)
    """`YYYY-MM`, in UTC."""
    gpu_seconds: Mapped[float] = mapped_column(default=0.0)
    """Seconds in which GPU workers ran jobs of the project."""
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    """Tokens of trainings that succeeded."""
    storage_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes stored when they were last measured."""
    storage_byte_hours: Mapped[float] = mapped_column(default=0.0)
    """Bytes stored, times the hours that they were."""
