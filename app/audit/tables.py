"""The table of the audit log."""

from sqlalchemy.orm import Mapped, mapped_column

from app.database import RowNumber, Table, database_now
from app.spec.json_types import JsonObject


class AuditEvent(Table):
    """A change that somebody made. No route changes or deletes these rows; they are kept as long as events are."""

    __tablename__ = "audit_events"
    __table_args__ = {"sqlite_autoincrement": True}

    sequence: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    created_at: Mapped[float] = mapped_column(default=database_now(), index=True)
    project: Mapped[str | None] = mapped_column(index=True)
    """The project of the key."""
    actor: Mapped[str]
    """The id of the key, `admin` for the operator's key, or `cli:USER` for a command on the service's machine."""
    action: Mapped[str]
    """The method and the route, such as `DELETE /v1/models/{name}`, or the command."""
    subject: Mapped[str]
    """The path that was called, or the whole command."""
    request_id: Mapped[str | None]
    details: Mapped[JsonObject | None]
    """The body of a change to the installation, such as a project's limits."""
