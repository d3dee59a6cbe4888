"""/v1/webhooks"""

from typing import Annotated

from fastapi import APIRouter, Query

from app.dependencies import ServicesDependency
from app.keys.middleware import CallerDependency
from app.pagination import After, Page, page
from app.webhooks.schemas import (
    DeliveryObject,
    EndpointChange,
    EndpointDeleted,
    EndpointObject,
    EndpointSpec,
    NewEndpointObject,
)

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


@router.post("")
def create_webhook(spec: EndpointSpec, caller: CallerDependency, services: ServicesDependency) -> NewEndpointObject:
    """Send events of this project's jobs and evaluations to a URL. Only this answer shows the signing secret."""
    return services.webhooks.create(caller.project, spec)


@router.get("")
def list_webhooks(caller: CallerDependency, services: ServicesDependency) -> Page[EndpointObject]:
    """The endpoints of the caller's project, newest first."""
    endpoints = services.webhooks.endpoints(caller.project)
    return page(endpoints, len(endpoints))


@router.get("/{endpoint_id}")
def get_webhook(endpoint_id: str, caller: CallerDependency, services: ServicesDependency) -> EndpointObject:
    """One endpoint."""
    return services.webhooks.get(caller.project, endpoint_id)


@router.post("/{endpoint_id}")
def change_webhook(
    endpoint_id: str, change: EndpointChange, caller: CallerDependency, services: ServicesDependency
) -> EndpointObject:
    """Change the events of an endpoint, or enable or disable it."""
    return services.webhooks.change(caller.project, endpoint_id, change)


@router.delete("/{endpoint_id}")
def delete_webhook(endpoint_id: str, caller: CallerDependency, services: ServicesDependency) -> EndpointDeleted:
    """Delete an endpoint and its deliveries."""
    services.webhooks.delete(caller.project, endpoint_id)
    return EndpointDeleted(id=endpoint_id)


@router.get("/{endpoint_id}/deliveries")
def list_deliveries(
    endpoint_id: str,
    caller: CallerDependency,
    services: ServicesDependency,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[DeliveryObject]:
    """The deliveries to an endpoint, newest first, with every attempt."""
    return page(services.webhooks.deliveries(caller.project, endpoint_id, after=after, limit=limit), limit)


@router.post("/{endpoint_id}/deliveries/{delivery_id}/resend")
def resend_delivery(
    endpoint_id: str, delivery_id: str, caller: CallerDependency, services: ServicesDependency
) -> DeliveryObject:
    """Send an event again, with the same id."""
    return services.webhooks.resend(caller.project, endpoint_id, delivery_id)
