"""Errors in OpenAI's JSON shape: `{"error": {"message", "type", "param", "code"}}`, always with all four keys.

Services raise `ServiceError`. `install_handlers` turns it, and every other failure of a request, into an answer.
"""

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError
from pydantic import BaseModel
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from starlette.exceptions import HTTPException

from app.errors import ServiceError, Unavailable, describe_validation_error
from app.monitoring.middleware import REQUEST_ID
from app.paths import own_path

log = structlog.get_logger(__name__)

UNSTORABLE_TEXT = {None, "22021", "22P05"}
"""PostgreSQL's codes (SQLSTATE) for text that it cannot store. None: its driver has refused U+0000.

Only a request can cause these.
"""


class ErrorBody(BaseModel):
    """An error: a sentence, its class, the field that it is about, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorBody


def error_response(
    status: int,
    message: str,
    type: str = "invalid_request_error",
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An HTTP answer in OpenAI's error shape."""
    body = ErrorResponse(error=ErrorBody(message=message, type=type, param=param, code=code))
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def error_answer(error: ServiceError) -> JSONResponse:
    """The HTTP answer to a request that raised `error`."""
    return error_response(
        error.status, error.message, error.type, param=error.param, code=error.code, headers=error.headers
    )


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure in OpenAI's shape, without a stack trace."""
    _install_request_handlers(app)
    _install_storage_handlers(app)
    app.add_exception_handler(Exception, unexpected)


def unexpected(request: Request, error: Exception) -> JSONResponse:
    """Log an error that is the service's own fault, and answer 500."""
    request_id = request.state.request_id
    log.error("unexpected error", path=request.url.path, request=request_id, exc_info=error)
    message = f"The service failed to answer this request; its log says why, under {request_id}."
    headers = {REQUEST_ID: request_id}
    return error_response(500, message, "server_error", code="internal_error", headers=headers)


def _install_request_handlers(app: FastAPI) -> None:
    """Answer requests that are wrong or refused."""

    @app.exception_handler(ServiceError)
    def service_error(_request: Request, error: ServiceError) -> JSONResponse:
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    def validation_error(_request: Request, error: RequestValidationError) -> JSONResponse:
        message, param, code = describe_validation_error(error.errors()[0])
        return error_response(400, message, param=param, code=code)

    @app.exception_handler(HTTPException)
    def http_exception(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ServiceError):  # FastAPI wraps an error raised while it reads the body
            return error_answer(error.__cause__)
        headers = dict(error.headers or {})
        route = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return error_response(404, f"Unknown request URL: {route}.", code="unknown_url")
        if error.status_code == 405:
            headers["Allow"] = ", ".join(request.app.state.routes.methods(own_path(request.scope)))
            message = f"Not allowed: {route}. This URL takes {headers['Allow']}."
            return error_response(405, message, code="method_not_allowed", headers=headers)
        type = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return error_response(error.status_code, str(error.detail), type, headers=headers)


def _install_storage_handlers(app: FastAPI) -> None:
    """Answer requests that the database or the object store fails."""

    @app.exception_handler(OperationalError)
    def database_error(request: Request, error: OperationalError) -> JSONResponse:
        log.error("database out of reach", path=request.url.path, reason=str(error.orig))
        return error_answer(Unavailable("The database is out of reach. Try again.", code="database_unavailable"))

    @app.exception_handler(IntegrityError)
    def collision(_request: Request, _error: IntegrityError) -> JSONResponse:
        return error_answer(
            Unavailable("Another request made the same object at the same moment. Try again.", code="collision")
        )

    @app.exception_handler(DataError)
    def unstorable(request: Request, error: DataError) -> JSONResponse:
        if getattr(error.orig, "sqlstate", None) not in UNSTORABLE_TEXT:
            return unexpected(request, error)
        return error_response(400, "The request holds a value that cannot be stored.", code="invalid_value")

    @app.exception_handler(BaseError)
    def storage_error(request: Request, error: BaseError) -> JSONResponse:
        log.error("object store out of reach", path=request.url.path, reason=str(error))
        return error_answer(Unavailable("The object store is out of reach. Try again.", code="storage_unavailable"))
