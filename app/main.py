"""`create_app()`: the HTTP service."""

import gc
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import cast

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, ProcessCollector
from sqlalchemy.exc import SQLAlchemyError
from starlette.routing import Route
from uvicorn.config import STARTUP_FAILURE

from app import __version__
from app.api_page.endpoints import router as api_page_router
from app.api_page.endpoints import static as api_page_files
from app.audit.endpoints import router as audit_router
from app.audit.middleware import AuditMiddleware
from app.compression import DecompressionMiddleware
from app.connections import BoundedConnection, most_connections
from app.dashboard.endpoints import router as dashboard_router
from app.dashboard.labels import refuse
from app.dashboard.labels import router as label_router
from app.dashboard.pages import FOLDER as DASHBOARD
from app.dashboard.session import MayNotLabel, NotSignedIn, ask_for_a_key
from app.dataset_reports.endpoints import router as reports_router
from app.estimates.endpoints import router as estimates_router
from app.evaluations.endpoints import router as evaluations_router
from app.exception_handlers import ErrorResponse, install_handlers
from app.files.endpoints import router as files_router
from app.graders.endpoints import router as graders_router
from app.jobs.endpoints import router as jobs_router
from app.keys.access import AccessTable, access
from app.keys.endpoints import router as keys_router
from app.keys.middleware import AccessMiddleware
from app.labellings.endpoints import router as labellings_router
from app.logging import configure_logging
from app.models.endpoints import router as models_router
from app.monitoring.collector import ProjectCollector, ServiceCollector
from app.monitoring.endpoints import router as monitoring_router
from app.monitoring.health import router as health_router
from app.monitoring.middleware import RequestMetricsMiddleware
from app.monitoring.readiness import Readiness
from app.monitoring.repository import EndedJobs
from app.operations.endpoints import router as operations_router
from app.paths import PathMiddleware
from app.pipelines.endpoints import router as pipelines_router
from app.projects.endpoints import router as projects_router
from app.query_parameters import refuse_unknown
from app.secret_rotation import require_known_key
from app.services import Services
from app.settings import Settings
from app.spec.json_types import JsonObject
from app.sweeps.endpoints import router as sweeps_router
from app.uploads.endpoints import router as uploads_router
from app.usage.endpoints import router as usage_router
from app.webhooks.endpoints import router as webhooks_router
from app.workers.endpoints import router as workers_router

ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 409, 413, 429, 500, 503)
}
ROUTERS = (
    files_router,
    reports_router,
    uploads_router,
    jobs_router,
    estimates_router,
    graders_router,
    evaluations_router,
    labellings_router,
    pipelines_router,
    sweeps_router,
    models_router,
    webhooks_router,
    projects_router,
    usage_router,
    keys_router,
    workers_router,
    operations_router,
    audit_router,
)


def _openapi_document(app: FastAPI, routes: AccessTable) -> JsonObject:
    """The OpenAPI document, with the scope that each route needs.

    FastAPI describes errors of streaming routes as streams; here they are JSON.
    """
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                rules = routes.find(method.upper(), path)
                operation["security"] = [] if rules.public else [{"key": [rules.required(method.upper())]}]
                for status, response in operation["responses"].items():
                    if int(status) in ERRORS:
                        response["content"] = error
                operation["responses"].pop("422", None)  # FastAPI's own answer, which this service never sends
        app.openapi_schema = document
    return app.openapi_schema


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. It creates missing key files and folders in `DPO_HOME`."""
    settings = settings or Settings()
    configure_logging(settings.log_level)
    services = Services.of(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        services.database.close()

    app = FastAPI(
        title="dpo-service",
        version=__version__,
        summary="Upload preferences, post a job, get a LoRA adapter.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.readiness = Readiness(services.database, services.storage, services.secret_box)
    app.state.registry = registry = CollectorRegistry()
    app.state.project_registry = project_registry = CollectorRegistry()
    ended = EndedJobs()
    registry.register(ServiceCollector(services.database, ended))
    project_registry.register(ProjectCollector(services.database, ended))
    ProcessCollector(registry=registry)
    install_handlers(app)
    app.add_exception_handler(NotSignedIn, ask_for_a_key)
    app.add_exception_handler(MayNotLabel, refuse)
    app.state.routes = routes = _add_routes(app)
    _add_middleware(app, services, registry, routes)
    app.openapi = lambda: _openapi_document(app, routes)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> AccessTable:
    """Add the routes of every feature. Returns the access rules of all routes."""
    routes = AccessTable()
    for route in app.routes:  # FastAPI's own route: the OpenAPI document
        access(public=True)(cast(Route, route).endpoint)
    routes.add(app.routes)
    for router in ROUTERS:
        app.include_router(router, prefix="/v1", responses=ERRORS, dependencies=[Depends(refuse_unknown)])
        routes.add(router.routes, "/v1")
    for pages in (dashboard_router, label_router):
        app.include_router(pages)
        routes.add(pages.routes)
    app.include_router(monitoring_router, responses=ERRORS)
    routes.add(monitoring_router.routes)
    app.include_router(health_router)
    routes.add(health_router.routes)
    app.include_router(api_page_router)
    routes.add(api_page_router.routes)
    dashboard_files = access(public=True)(StaticFiles(directory=DASHBOARD / "static"))
    for path, files in {"/dashboard/static": dashboard_files, **api_page_files}.items():
        app.mount(path, files)
        routes.add(app.routes[-1:])
    return routes


def _add_middleware(app: FastAPI, services: Services, registry: CollectorRegistry, routes: AccessTable) -> None:
    """Add the middleware. A request passes the last one first."""
    app.add_middleware(AuditMiddleware, audit=services.audit)
    app.add_middleware(
        AccessMiddleware,
        keys=services.keys,
        limiter=services.rate_limiter,
        wrong_keys=services.wrong_keys,
        allowed_hosts=services.settings.allowed_hosts,
        routes=routes,
    )
    app.add_middleware(DecompressionMiddleware)
    if services.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(RequestMetricsMiddleware, registry=registry)
    app.add_middleware(PathMiddleware, root_path=services.settings.root_path)


class Server(uvicorn.Server):
    """A server whose event streams end as soon as it stops. Other requests get `DPO_SHUTDOWN_SECONDS` to end."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        BoundedConnection.limit = most_connections()
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedConnection,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=settings.shutdown_seconds,
            )
        )
        self._services: Services = app.state.services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and wait for the open requests. Those that are still open then are cut."""
        await self._services.jobs.feed.close()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # a client that reads slowly must see that its answer is not whole


def serve(app: FastAPI, settings: Settings) -> None:
    """Answer requests until SIGTERM or Ctrl-C."""
    gc.collect()
    gc.freeze()  # imported modules stay alive: the collector need not walk them during a request
    services: Services = app.state.services
    with suppress(SQLAlchemyError):  # out of reach, or not migrated: /readyz says so, and asks again
        require_known_key(services.database, services.secret_box)
    server = Server(app, settings)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)
