"""The FastAPI dependency that gives endpoints the services."""

from typing import Annotated

from fastapi import Depends, Request

from app.services import Services


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDependency = Annotated[Services, Depends(_services)]
