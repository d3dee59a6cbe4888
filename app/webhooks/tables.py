"""The tables of webhook endpoints and their deliveries."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table, index_where
from app.spec.json_types import JsonObject
from app.work_queue import Queued


class WebhookEndpoint(Table):
    """A URL that receives events of its project."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(index=True)
    url: Mapped[str]
    events: Mapped[list[str]]
    sealed_secret: Mapped[str]
    """The secret that signs its events, encrypted."""
    created_at: Mapped[float]
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]


class WebhookDelivery(Queued, Table):
    """An event for one endpoint."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_attempt_at"),
        Index("ix_webhook_deliveries_created_at", "created_at"),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", "created_at", "id"),
        index_where("ix_webhook_deliveries_leased", "lease_owner", where="lease_owner IS NOT NULL"),
    )

    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    event_id: Mapped[str]
    type: Mapped[str]
    body: Mapped[JsonObject]
    created_at: Mapped[float]
    # In the database, these two columns keep the names that they had first.
    attempt: Mapped[int] = mapped_column("attempts")
    eligible_at: Mapped[float | None] = mapped_column("next_attempt_at")  # type: ignore[assignment]
    """When the next attempt is due. None: it was delivered or given up."""
    delivered_at: Mapped[float | None]
    log: Mapped[list[JsonObject]]
    """One entry per attempt: `at`, `status` (null without an answer), `error`, `seconds`."""
