"""Find the object that an earlier sending of the same request made.

A client that sends an `Idempotency-Key` gets the object which that key made, for a day. The official client sends no
such key. It resends a create after a lost connection or a 5xx, and counts the sendings in `x-stainless-retry-count`.
A resent request therefore gets the object that the same API key made with the same content in the last half hour. The
official client stops resending within that time. Sendings that overlap wait for each other.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.database import database_now, wait_for_others
from app.errors import ServiceError
from app.idempotency.tables import SentRequest
from app.keys.middleware import CallerDependency

KEPT_SECONDS = 24 * 3600
RESENT_SECONDS = 1800


@dataclass(frozen=True)
class RequestIdentity:
    """How a request was sent: its API key, its idempotency key, whether it was sent before, and its id."""

    key_id: str
    idempotency_key: str | None = None
    resent: bool = False
    request_id: str | None = None

    def earlier(self, session: Session, operation: str, content: object) -> str | None:
        """The id of the object that an earlier sending made; None if this is the first.

        Call it in a write transaction. `content` is what the request asks for, as JSON. Raises `ServiceError` if the
        idempotency key came with other content before.
        """
        fingerprint = self._fingerprint(operation, content)
        wait_for_others(session, self._lock(operation, fingerprint))
        requests = select(SentRequest).where(SentRequest.key_id == self.key_id, SentRequest.operation == operation)
        if self.idempotency_key is not None:
            sent = session.scalar(requests.where(SentRequest.idempotency_key == self.idempotency_key))
            if sent is not None and sent.fingerprint != fingerprint:
                raise ServiceError(
                    "This Idempotency-Key came with another request before. Use a new key for a new request.",
                    param="Idempotency-Key",
                    code="idempotency_key_reused",
                )
            return None if sent is None else sent.resource_id
        if not self.resent:
            return None
        recent = requests.where(
            SentRequest.fingerprint == fingerprint, SentRequest.created_at > database_now() - RESENT_SECONDS
        )
        sent = session.scalar(recent.order_by(SentRequest.sequence.desc()).limit(1))
        return None if sent is None else sent.resource_id

    def record(self, session: Session, operation: str, content: object, resource_id: str) -> None:
        """Record the object that this request makes, in the transaction that makes it."""
        if self.idempotency_key is not None:  # its earlier object, if any, no longer exists
            session.execute(
                delete(SentRequest).where(
                    SentRequest.key_id == self.key_id,
                    SentRequest.operation == operation,
                    SentRequest.idempotency_key == self.idempotency_key,
                )
            )
        session.add(
            SentRequest(
                key_id=self.key_id,
                operation=operation,
                idempotency_key=self.idempotency_key,
                fingerprint=self._fingerprint(operation, content),
                resource_id=resource_id,
                created_at=database_now(),
            )
        )

    def _fingerprint(self, operation: str, content: object) -> str:
        body = json.dumps([self.key_id, operation, content], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()

    def _lock(self, operation: str, fingerprint: str) -> int:
        name = fingerprint if self.idempotency_key is None else f"{self.key_id} {operation} {self.idempotency_key}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def forget_old(session: Session) -> None:
    """Delete the records that are older than a day."""
    session.execute(delete(SentRequest).where(SentRequest.created_at < database_now() - KEPT_SECONDS))


def _request_identity(
    request: Request,
    caller: CallerDependency,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Requests with the same key and body make one object, however often they are sent.",
        ),
    ] = None,
    x_stainless_retry_count: Annotated[int, Header(ge=0, description="Sent by the official client.")] = 0,
) -> RequestIdentity:
    return RequestIdentity(caller.key_id, idempotency_key, x_stainless_retry_count > 0, request.state.request_id)


RequestIdentityDependency = Annotated[RequestIdentity, Depends(_request_identity)]
