"""Webhooks on the wire."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.spec.json_types import JsonObject
from app.spec.schema_base import Strict, unix_seconds
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "fine_tuning.job.judged",
    "evaluation.succeeded",
    "evaluation.failed",
    "evaluation.cancelled",
    "labelling.succeeded",
    "labelling.failed",
    "labelling.cancelled",
    "pipeline.succeeded",
    "pipeline.failed",
    "pipeline.cancelled",
]
EVENTS: tuple[EventType, ...] = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
)
"""The default events of an endpoint."""


class EndpointSpec(Strict):
    """The body of `POST /v1/webhooks`."""

    model_config = ConfigDict(json_schema_extra={"example": {"url": "https://ci.example.com/hooks/dpo"}})

    url: Annotated[str, StringConstraints(max_length=2048, pattern=r"^[\x21-\x7e]+$")]
    """In ASCII. Write an international host name in punycode."""
    events: Annotated[list[EventType], Field(min_length=1, max_length=len(get_args(EventType)))] = list(EVENTS)


class EndpointChange(Strict):
    """The body of `POST /v1/webhooks/{id}`. Fields that it leaves out stay as they are."""

    events: Annotated[list[EventType], Field(min_length=1, max_length=len(get_args(EventType)))] | None = None
    enabled: bool | None = None


class EndpointObject(BaseModel):
    """A webhook endpoint."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    events: list[EventType]
    created_at: int
    enabled: bool
    disabled_reason: str | None

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> "EndpointObject":
        return cls(
            id=endpoint.id,
            url=endpoint.url,
            events=endpoint.events,
            created_at=int(endpoint.created_at),
            enabled=endpoint.disabled_at is None,
            disabled_reason=endpoint.disabled_reason,
        )


class NewEndpointObject(EndpointObject):
    """A new endpoint with its signing secret, which only this answer shows. `OpenAI(webhook_secret=…)` accepts it."""

    secret: str


class EndpointDeleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    deleted: bool = True


class Attempt(BaseModel):
    """One attempt to deliver an event."""

    at: int
    status: int | None
    error: str | None
    seconds: float


class DeliveryObject(BaseModel):
    """An event for an endpoint: pending, delivered, or failed after the last attempt."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    endpoint_id: str
    event_id: str
    type: EventType
    created_at: int
    status: Literal["pending", "delivered", "failed"]
    next_attempt_at: int | None
    delivered_at: int | None
    attempts: list[Attempt]
    body: JsonObject

    @classmethod
    def of(cls, delivery: WebhookDelivery) -> "DeliveryObject":
        due, arrived = delivery.eligible_at, delivery.delivered_at
        return cls(
            id=delivery.id,
            endpoint_id=delivery.endpoint_id,
            event_id=delivery.event_id,
            type=delivery.type,
            created_at=int(delivery.created_at),
            status="pending" if due is not None else "delivered" if arrived is not None else "failed",
            next_attempt_at=unix_seconds(due),
            delivered_at=unix_seconds(arrived),
            attempts=[Attempt(**entry) for entry in delivery.log],
            body=delivery.body,
        )
