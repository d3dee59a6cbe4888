"""All SQL about webhooks. What a caller reads starts from its project."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, select, tuple_, update
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint

SCHEDULE = (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
"""Seconds before each attempt, as Standard Webhooks recommends."""
LEASE_SECONDS = 120.0
"""A delivery whose sender was lost is tried again after this."""


def readable(project: str) -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(WebhookEndpoint.project == project)


def get(session: Session, project: str, endpoint_id: str) -> WebhookEndpoint | None:
    return session.scalar(readable(project).where(WebhookEndpoint.id == endpoint_id))


def listed(session: Session, project: str) -> Sequence[WebhookEndpoint]:
    order = (WebhookEndpoint.created_at.desc(), WebhookEndpoint.id)
    return session.scalars(readable(project).order_by(*order)).all()


def enqueue(session: Session, project: str, type: str, data: dict[str, Any]) -> bool:
    """Have an event sent to the endpoints of `project` that ask for it, in the transaction that it tells of."""
    wanted = [
        endpoint
        for endpoint in session.scalars(readable(project).where(WebhookEndpoint.disabled_at.is_(None)))
        if type in endpoint.events
    ]
    if not wanted:
        return False
    now = session.scalars(select(database_now())).one()
    event_id = new_id("evt").replace("-", "_")
    body = {"id": event_id, "object": "event", "type": type, "created_at": int(now), "data": data}
    for endpoint in wanted:
        session.add(
            WebhookDelivery(
                id=new_id("whd"),
                endpoint_id=endpoint.id,
                event_id=event_id,
                type=type,
                body=body,
                created_at=now,
                attempts=0,
                next_attempt_at=now,
                log=[],
            )
        )
    return True


def deliveries(
    session: Session, endpoint_id: str, *, after: WebhookDelivery | None, limit: int
) -> Sequence[WebhookDelivery]:
    """Up to `limit` + 1 deliveries to an endpoint, newest first."""
    statement = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    if after is not None:
        place = tuple_(WebhookDelivery.created_at, WebhookDelivery.id)
        statement = statement.where(place < tuple_(after.created_at, after.id))
    order = (WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc())
    return session.scalars(statement.order_by(*order).limit(limit + 1)).all()


def get_delivery(session: Session, endpoint_id: str, delivery_id: str) -> WebhookDelivery | None:
    found = session.get(WebhookDelivery, delivery_id)
    return found if found is not None and found.endpoint_id == endpoint_id else None


def resend(session: Session, delivery: WebhookDelivery) -> None:
    """Begin the schedule of a delivery anew."""
    delivery.attempts, delivery.delivered_at, delivery.next_attempt_at = 0, None, database_now()


def claim(session: Session, busy: Sequence[str] = ()) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """Take the delivery that is due for longest, but to those of `busy`.

    It is another's again when its sender does not say how it went.
    """
    enabled = select(WebhookEndpoint.id).where(WebhookEndpoint.disabled_at.is_(None))
    due = (
        WebhookDelivery.next_attempt_at <= database_now(),
        WebhookDelivery.endpoint_id.in_(enabled),
        WebhookDelivery.endpoint_id.not_in(busy),
    )
    first = select(WebhookDelivery.id).where(*due).order_by(WebhookDelivery.next_attempt_at).limit(1)
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == first.with_for_update(skip_locked=True).scalar_subquery(), *due)
        .values(attempts=WebhookDelivery.attempts + 1, next_attempt_at=database_now() + LEASE_SECONDS)
        .returning(WebhookDelivery)
        .execution_options(populate_existing=True)
    )
    delivery = session.scalar(statement)
    return None if delivery is None else (delivery, session.get_one(WebhookEndpoint, delivery.endpoint_id))


def record(session: Session, delivery: WebhookDelivery, entry: dict[str, Any], *, delivered: bool, gone: bool) -> None:
    """Write how an attempt went, and when the next one is. `gone`: the endpoint wants no more."""
    row = session.get(WebhookDelivery, delivery.id, with_for_update=True)
    if row is None or row.attempts != delivery.attempts:
        return  # deleted, or another's by now
    began = int(session.scalars(select(database_now())).one() - entry["seconds"])
    row.log = [*row.log, entry | {"at": began}]
    if delivered:
        row.delivered_at, row.next_attempt_at = database_now(), None
    elif gone or row.attempts >= len(SCHEDULE) or session.get_one(WebhookEndpoint, row.endpoint_id).disabled_at:
        row.next_attempt_at = None
    else:
        row.next_attempt_at = database_now() + SCHEDULE[row.attempts]
    if gone:
        disable(session, row.endpoint_id, "it answered 410 Gone")


def forget(session: Session, seconds: float, limit: int) -> int:
    """Remove up to `limit` deliveries that are over and were made more than `seconds` ago; returns how many."""
    over = (WebhookDelivery.next_attempt_at.is_(None), WebhookDelivery.created_at < database_now() - seconds)
    old = select(WebhookDelivery.id).where(*over).limit(limit)
    gone = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).returning(WebhookDelivery.id)
    return len(session.scalars(gone).all())


def disable(session: Session, endpoint_id: str, reason: str) -> None:
    """Send an endpoint nothing more, what is on its way neither."""
    statement = update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    session.execute(statement.values(disabled_at=database_now(), disabled_reason=reason))
    waiting = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    session.execute(waiting.values(next_attempt_at=None))
