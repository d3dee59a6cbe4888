"""`create_app()`: the HTTP service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from app import __version__
from app.dependencies import ServicesDependency
from app.errors import ErrorResponse, install_handlers
from app.files.endpoints import router as files_router
from app.jobs.endpoints import router as jobs_router
from app.keys.middleware import Gate
from app.logging import configure_logging
from app.models.endpoints import router as models_router
from app.services import Services
from app.settings import Settings

ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 409, 413, 500, 503)
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Key files and folders of `DPO_HOME` are made where they are missing."""
    configure_logging()
    services = Services.of(settings or Settings())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        services.database.close()

    app = FastAPI(
        title="dpo-service",
        version=__version__,
        summary="Upload preferences, post a job, get a LoRA adapter.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    install_handlers(app)
    for router in (files_router, jobs_router, models_router):
        app.include_router(router, prefix="/v1", responses=ERRORS)
    app.add_middleware(Gate, keys=services.keys, allowed_hosts=services.settings.allowed_hosts)
    if services.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(services.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )

    @app.get("/healthz", tags=["operations"])
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz", tags=["operations"])
    def readyz(services: ServicesDependency) -> JSONResponse:
        """The database has this version's schema and the object store answers."""
        problems = {}
        try:
            if not services.migrated():
                problems["database"] = "the schema is not this version's; run 'dpo migrate'"
        except Exception as error:  # any driver's error means the same here: not ready
            problems["database"] = type(error).__name__
        try:
            services.storage.check()
        except Exception as error:  # likewise
            problems["storage"] = type(error).__name__
        status = "ok" if not problems else "unavailable"
        return JSONResponse({"status": status, "problems": problems}, status_code=503 if problems else 200)

    return app
