"""The HTTP operations on webhooks."""

import base64
import secrets

from app.broker import Broker, Lane
from app.database import Database, database_now, new_id
from app.encryption import SecretBox
from app.errors import Forbidden, ServiceError, no_such
from app.outbound_http import HostRefused, resolve
from app.projects import repository as projects
from app.webhooks import repository
from app.webhooks.schemas import DeliveryObject, EndpointChange, EndpointObject, EndpointSpec, NewEndpointObject
from app.webhooks.tables import WebhookEndpoint

MAX_ENDPOINTS = 50
"""Maximum number of endpoints of a project: each of its events makes a delivery for each of them."""
PRIVATE_WEBHOOKS_SETTING = "DPO_PRIVATE_WEBHOOKS"
"""The setting that allows endpoints in the operator's network, for error messages."""


class Webhooks:
    """Create, change and delete endpoints, list their deliveries, and resend one."""

    def __init__(
        self, database: Database, broker: Broker, secret_box: SecretBox, private_hosts: tuple[str, ...]
    ) -> None:
        self.database, self.broker, self.secret_box, self.private_hosts = database, broker, secret_box, private_hosts

    def create(self, project: str, spec: EndpointSpec) -> NewEndpointObject:
        """Make an endpoint and the secret that signs its events. Raises `ServiceError` for a bad URL."""
        try:
            resolve(spec.url, self.private_hosts, PRIVATE_WEBHOOKS_SETTING)
        except HostRefused as refused:
            raise ServiceError(f"This URL is not accepted: {refused}.", param="url", code="invalid_url") from None
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        with self.database.write() as session:
            projects.lock(session, project)  # two requests at once would both find a place
            if repository.count(session, project) >= MAX_ENDPOINTS:
                message = f"A project may have {MAX_ENDPOINTS} webhook endpoints. Delete one that is not needed."
                raise Forbidden(message, code="too_many_webhook_endpoints")
            endpoint = WebhookEndpoint(
                id=new_id("whe"),
                project=project,
                url=spec.url,
                events=sorted(set(spec.events)),
                sealed_secret=self.secret_box.seal(secret),
                created_at=database_now(),
            )
            session.add(endpoint)
            session.flush()
            session.refresh(endpoint)
        return NewEndpointObject(**EndpointObject.of(endpoint).model_dump(), secret=secret)

    def endpoints(self, project: str) -> list[EndpointObject]:
        with self.database.read() as session:
            return [EndpointObject.of(endpoint) for endpoint in repository.listed(session, project)]

    def get(self, project: str, endpoint_id: str) -> EndpointObject:
        with self.database.read() as session:
            endpoint = repository.get(session, project, endpoint_id)
        if endpoint is None:
            raise no_such("webhook endpoint", endpoint_id, code="webhook_endpoint")
        return EndpointObject.of(endpoint)

    def change(self, project: str, endpoint_id: str, change: EndpointChange) -> EndpointObject:
        """Change the events of an endpoint, or enable or disable it."""
        with self.database.write() as session:
            endpoint = repository.get(session, project, endpoint_id)
            if endpoint is None:
                raise no_such("webhook endpoint", endpoint_id, code="webhook_endpoint")
            if change.events is not None:
                endpoint.events = sorted(set(change.events))
            if change.enabled:
                endpoint.disabled_at = endpoint.disabled_reason = None
            elif change.enabled is False:
                repository.disable(session, endpoint_id, "switched off")
        return self.get(project, endpoint_id)

    def delete(self, project: str, endpoint_id: str) -> None:
        """Delete an endpoint and its deliveries."""
        with self.database.write() as session:
            endpoint = repository.get(session, project, endpoint_id)
            if endpoint is None:
                raise no_such("webhook endpoint", endpoint_id, code="webhook_endpoint")
            session.delete(endpoint)

    def deliveries(self, project: str, endpoint_id: str, *, after: str | None, limit: int) -> list[DeliveryObject]:
        """Up to `limit` + 1 deliveries, newest first."""
        self.get(project, endpoint_id)
        with self.database.read() as session:
            previous = None
            if after is not None and (previous := repository.get_delivery(session, endpoint_id, after)) is None:
                raise no_such("delivery", after, code="webhook_delivery", param="after")
            deliveries = repository.deliveries(session, endpoint_id, after=previous, limit=limit)
        return [DeliveryObject.of(delivery) for delivery in deliveries]

    def resend(self, project: str, endpoint_id: str, delivery_id: str) -> DeliveryObject:
        """Send an event again. It keeps its id, so its receiver can recognise it."""
        if not self.get(project, endpoint_id).enabled:
            message = "The endpoint is disabled. Enable it first: POST {'enabled': true} to it."
            raise ServiceError(message, param="id", code="webhook_endpoint_disabled")
        with self.database.write() as session:
            delivery = repository.get_delivery(session, endpoint_id, delivery_id)
            if delivery is None:
                raise no_such("delivery", delivery_id, code="webhook_delivery")
            repository.resend(session, delivery)
            session.flush()
            session.refresh(delivery)
        self.broker.wake(Lane.CPU)
        return DeliveryObject.of(delivery)
