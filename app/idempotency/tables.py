"""The table that records which object a request made."""

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.database import RowNumber, Table


class SentRequest(Table):
    """A request that made something. Rows are kept for a day."""

    __tablename__ = "sent_requests"
    __table_args__ = (
        UniqueConstraint("key_id", "operation", "idempotency_key"),
        Index("ix_sent_requests_fingerprint", "fingerprint", "created_at"),
        Index("ix_sent_requests_created_at", "created_at"),
    )

    sequence: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    key_id: Mapped[str]
    operation: Mapped[str]
    idempotency_key: Mapped[str | None]
    fingerprint: Mapped[str]
    resource_id: Mapped[str]
    created_at: Mapped[float]
