"""Write and read the audit log."""

import structlog

from app.audit import repository
from app.audit.schemas import AuditObject
from app.audit.tables import AuditEvent
from app.database import Database
from app.errors import no_such
from app.spec.json_types import JsonObject

log = structlog.get_logger(__name__)


class AuditLog:
    """Who changed what, and when."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def record(
        self,
        *,
        actor: str,
        action: str,
        subject: str,
        project: str | None = None,
        request_id: str | None = None,
        details: JsonObject | None = None,
    ) -> None:
        """Write a change that has been made. If that fails, the log of the process has it instead."""
        values = {"actor": actor, "action": action, "subject": subject, "project": project, "details": details}
        try:
            with self.database.write() as session:
                session.add(AuditEvent(**values, request_id=request_id))
        except Exception as error:  # the change is made: its answer must still reach the caller
            log.error("change not in the audit log", reason=type(error).__name__, **values)

    def page(
        self, *, project: str | None, actor: str | None, action: str | None, after: str | None, limit: int
    ) -> list[AuditObject]:
        """Up to `limit` + 1 changes, newest first. Raises `NotFound` if there is none with the id `after`."""
        number = None if after is None else after.removeprefix("audit-")
        if number is not None and not (number.isdecimal() and len(number) < 19):
            raise no_such("audit event", after or "", code="audit_event", param="after")
        with self.database.read() as session:
            events = repository.page(
                session, project=project, actor=actor, action=action, limit=limit,
                after=None if number is None else int(number),
            )  # fmt: skip
        if events is None:
            raise no_such("audit event", after or "", code="audit_event", param="after")
        return [AuditObject.of(event) for event in events]
