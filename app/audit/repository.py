"""All SQL about the audit log."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.audit.tables import AuditEvent
from app.database import database_now
from app.pagination import keyset


def page(
    session: Session, *, project: str | None, actor: str | None, action: str | None, after: int | None, limit: int
) -> Sequence[AuditEvent] | None:
    """Up to `limit` + 1 events, newest first; None if there is no event `after`.

    `action` is the beginning of an action, such as `DELETE`.
    """
    statement = select(AuditEvent)
    if project is not None:
        statement = statement.where(AuditEvent.project == project)
    if actor is not None:
        statement = statement.where(AuditEvent.actor == actor)
    if action is not None:
        statement = statement.where(AuditEvent.action.startswith(action, autoescape=True))
    last = None if after is None else session.get(AuditEvent, after)
    if after is not None and last is None:
        return None
    return session.scalars(keyset(statement, (AuditEvent.sequence,), last, limit)).all()


def forget(session: Session, seconds: float, limit: int) -> int:
    """Delete up to `limit` events that are older than `seconds`; returns their number."""
    old = select(AuditEvent.sequence).where(AuditEvent.created_at < database_now() - seconds)
    oldest = old.order_by(AuditEvent.created_at).limit(limit)
    statement = delete(AuditEvent).where(AuditEvent.sequence.in_(oldest)).returning(AuditEvent.sequence)
    return len(session.scalars(statement).all())
