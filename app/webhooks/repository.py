"""All SQL about webhooks. What a caller reads starts from its project."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from app.database import database_now, new_id, now
from app.pagination import keyset
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from app.work_queue import WorkQueue

SCHEDULE = (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
"""Seconds before each attempt, as Standard Webhooks recommends."""
DELIVERIES = WorkQueue(
    WebhookDelivery,
    noun="delivery",
    active=WebhookDelivery.eligible_at.is_not(None),
    order=(WebhookDelivery.eligible_at,),
    lease_seconds=120.0,  # longer than any sending takes: nobody renews it
    longest_pause=SCHEDULE[-1],
)


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
    created_at = now(session)
    event_id = new_id("evt").replace("-", "_")
    body = {"id": event_id, "object": "event", "type": type, "created_at": int(created_at), "data": data}
    for endpoint in wanted:
        session.add(
            WebhookDelivery(
                id=new_id("whd"),
                endpoint_id=endpoint.id,
                event_id=event_id,
                type=type,
                body=body,
                created_at=created_at,
                attempt=0,
                eligible_at=created_at,
                lost_attempts=0,
                log=[],
            )
        )
    return True


def deliveries(
    session: Session, endpoint_id: str, *, after: WebhookDelivery | None, limit: int
) -> Sequence[WebhookDelivery]:
    """Up to `limit` + 1 deliveries to an endpoint, newest first."""
    statement = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    return session.scalars(keyset(statement, (WebhookDelivery.created_at, WebhookDelivery.id), after, limit)).all()


def get_delivery(session: Session, endpoint_id: str, delivery_id: str) -> WebhookDelivery | None:
    found = session.get(WebhookDelivery, delivery_id)
    return found if found is not None and found.endpoint_id == endpoint_id else None


def resend(session: Session, delivery: WebhookDelivery) -> None:
    """Begin the schedule of a delivery anew."""
    delivery.attempt, delivery.delivered_at, delivery.eligible_at = 0, None, database_now()


def claim(session: Session, owner: str, busy: Sequence[str] = ()) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """Take the lease of the delivery that is due for longest, but to no endpoint of `busy`."""
    enabled = select(WebhookEndpoint.id).where(WebhookEndpoint.disabled_at.is_(None))
    to = WebhookDelivery.endpoint_id
    delivery = DELIVERIES.claim(session, owner, DELIVERIES.active, to.in_(enabled), to.not_in(busy))
    return None if delivery is None else (delivery, session.get_one(WebhookEndpoint, delivery.endpoint_id))


def record(session: Session, delivery: WebhookDelivery, entry: dict[str, Any], *, delivered: bool, gone: bool) -> None:
    """Write how an attempt went, and when the next one is. `gone`: the endpoint wants no more."""
    endpoint = session.get(WebhookEndpoint, delivery.endpoint_id)
    if endpoint is None:
        return  # deleted, and its deliveries with it
    began = int(now(session) - entry["seconds"])
    values: dict[str, Any] = {"log": [*delivery.log, entry | {"at": began}]}
    if delivered:
        values |= {"delivered_at": database_now()}
    over = delivered or gone or delivery.attempt >= len(SCHEDULE) or endpoint.disabled_at is not None
    pause = None if over else SCHEDULE[delivery.attempt]
    DELIVERIES.release(session, delivery.id, delivery.attempt, pause=pause, lost_attempts=0, **values)
    if gone:
        disable(session, delivery.endpoint_id, "it answered 410 Gone")


def recover(session: Session, delivery: WebhookDelivery) -> None:
    """Let another sender try a delivery whose sender was lost; give it up where that was its last attempt."""
    pause = None if delivery.attempt >= len(SCHEDULE) else 0.0
    lost = delivery.lost_attempts + 1
    DELIVERIES.release(session, delivery.id, delivery.attempt, pause=pause, lost_attempts=lost)


def forget(session: Session, seconds: float, limit: int) -> int:
    """Remove up to `limit` deliveries that are over and were made more than `seconds` ago; returns how many."""
    over = (WebhookDelivery.eligible_at.is_(None), WebhookDelivery.created_at < database_now() - seconds)
    old = select(WebhookDelivery.id).where(*over).limit(limit)
    gone = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).returning(WebhookDelivery.id)
    return len(session.scalars(gone).all())


def disable(session: Session, endpoint_id: str, reason: str) -> None:
    """Send an endpoint nothing more, what is on its way neither."""
    statement = update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    session.execute(statement.values(disabled_at=database_now(), disabled_reason=reason))
    waiting = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    session.execute(waiting.values(eligible_at=None))
