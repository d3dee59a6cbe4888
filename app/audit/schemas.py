"""The audit log on the wire."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from app.spec.json_types import JsonObject

if TYPE_CHECKING:
    from app.audit.tables import AuditEvent


class AuditObject(BaseModel):
    """A change that somebody made."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "audit-17",
                "object": "audit_event",
                "created_at": 1730000000,
                "project": "search-team",
                "actor": "key-abc123",
                "action": "DELETE /v1/models/{name}",
                "subject": "/v1/models/ft:tiny:search-team::abc123",
                "request_id": "req_abc123",
                "details": None,
            }
        }
    )

    id: str
    object: Literal["audit_event"] = "audit_event"
    created_at: int
    project: str | None
    """The project of the key; null for a command on the service's machine."""
    actor: str
    """The id of the key, `admin` for the operator's key, or `cli:USER` for a command on the service's machine."""
    action: str
    """The method and the route, or the command."""
    subject: str
    """The path that was called, or the whole command."""
    request_id: str | None
    details: JsonObject | None
    """The body of a change to the installation, such as a project's limits."""

    @classmethod
    def of(cls, event: "AuditEvent") -> "AuditObject":
        return cls(
            id=f"audit-{event.sequence}",
            created_at=int(event.created_at),
            project=event.project,
            actor=event.actor,
            action=event.action,
            subject=event.subject,
            request_id=event.request_id,
            details=event.details,
        )
