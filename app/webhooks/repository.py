"""All SQL about webhooks. A query for a caller starts from `readable`, so it sees only the caller's project."""

from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.database import database_now, new_id, now
from app.pagination import keyset
from app.spec.json_types import JsonObject
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from app.work_queue import WorkQueue

SCHEDULE = (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
"""Seconds before each attempt, as Standard Webhooks recommends."""
DELIVERIES = WorkQueue(
    WebhookDelivery,
    noun="delivery",
    active=WebhookDelivery.eligible_at.is_not(None),
    order=(WebhookDelivery.eligible_at,),
    lease_seconds=120.0,  # longer than any attempt, because no sender renews it
    longest_pause=SCHEDULE[-1],
)


def readable(project: str) -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(WebhookEndpoint.project == project)


def get(session: Session, project: str, endpoint_id: str) -> WebhookEndpoint | None:
    return session.scalar(readable(project).where(WebhookEndpoint.id == endpoint_id))


def listed(session: Session, project: str) -> Sequence[WebhookEndpoint]:
    order = (WebhookEndpoint.created_at.desc(), WebhookEndpoint.id)
    return session.scalars(readable(project).order_by(*order)).all()


def count(session: Session, project: str) -> int:
    """The number of endpoints of a project."""
    return session.scalars(select(func.count()).where(WebhookEndpoint.project == project)).one()


def enqueue(session: Session, project: str, type: str, data: JsonObject) -> bool:
    """Store a delivery for each enabled endpoint of `project` that asks for this event; False if there is none.

    Call it in the transaction that causes the event. `data` is the `data` of the event's body.
    """
    endpoints = [
        endpoint
        for endpoint in session.scalars(readable(project).where(WebhookEndpoint.disabled_at.is_(None)))
        if type in endpoint.events
    ]
    if not endpoints:
        return False
    created_at = now(session)
    event_id = new_id("evt").replace("-", "_")
    body = {"id": event_id, "object": "event", "type": type, "created_at": int(created_at), "data": data}
    for endpoint in endpoints:
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
    delivery = session.get(WebhookDelivery, delivery_id)
    return delivery if delivery is not None and delivery.endpoint_id == endpoint_id else None


def resend(session: Session, delivery: WebhookDelivery) -> None:
    """Start the schedule of a delivery from its first attempt. A delivery that is being sent now stays as it is."""
    if delivery.lease_owner is not None:
        return
    delivery.attempt, delivery.delivered_at, delivery.eligible_at = 0, None, database_now()


def claim(
    session: Session, owner: str, endpoints: Sequence[str] = (), projects: Sequence[str] = ()
) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """Take the lease of the delivery that has been due for the longest; None if none is due.

    Deliveries to the busy `endpoints`, of the busy `projects`, and to disabled endpoints are skipped.
    """
    enabled = select(WebhookEndpoint.id).where(WebhookEndpoint.disabled_at.is_(None))
    if projects:
        enabled = enabled.where(WebhookEndpoint.project.not_in(projects))
    receiver = WebhookDelivery.endpoint_id
    delivery = DELIVERIES.claim(session, owner, DELIVERIES.active, receiver.in_(enabled), receiver.not_in(endpoints))
    return None if delivery is None else (delivery, session.get_one(WebhookEndpoint, delivery.endpoint_id))


def record(session: Session, delivery: WebhookDelivery, entry: JsonObject, *, delivered: bool, gone: bool) -> None:
    """Log an attempt and schedule the next one. `gone`: the endpoint answered 410 and is disabled.

    `entry` has the `status`, `error` and `seconds` of the attempt.
    """
    endpoint = session.get(WebhookEndpoint, delivery.endpoint_id)
    if endpoint is None:
        return  # the endpoint was deleted together with its deliveries
    began = int(now(session) - entry["seconds"])
    values: dict[str, object] = {"log": [*delivery.log, entry | {"at": began}]}
    if delivered:
        values |= {"delivered_at": database_now()}
    ended = delivered or gone or delivery.attempt >= len(SCHEDULE) or endpoint.disabled_at is not None
    pause = None if ended else SCHEDULE[delivery.attempt]
    DELIVERIES.release(session, delivery.id, delivery.attempt, pause=pause, lost_attempts=0, **values)
    if gone:
        disable(session, delivery.endpoint_id, "it answered 410 Gone")


def recover(session: Session, delivery: WebhookDelivery) -> None:
    """Release a delivery whose sender was lost. Give it up if that was its last attempt."""
    pause = None if delivery.attempt >= len(SCHEDULE) else 0.0
    lost = delivery.lost_attempts + 1
    DELIVERIES.release(session, delivery.id, delivery.attempt, pause=pause, lost_attempts=lost)


def forget(session: Session, seconds: float, limit: int) -> int:
    """Delete up to `limit` ended deliveries that were created more than `seconds` ago. Returns the number."""
    conditions = (WebhookDelivery.eligible_at.is_(None), WebhookDelivery.created_at < database_now() - seconds)
    old = select(WebhookDelivery.id).where(*conditions).limit(limit)
    statement = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).returning(WebhookDelivery.id)
    return len(session.scalars(statement).all())


def disable(session: Session, endpoint_id: str, reason: str) -> None:
    """Disable an endpoint and give up its pending deliveries."""
    statement = update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
    session.execute(statement.values(disabled_at=database_now(), disabled_reason=reason))
    waiting = update(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    session.execute(waiting.values(eligible_at=None))
