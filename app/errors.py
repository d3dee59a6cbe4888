"""Errors in OpenAI's wire shape.

    ServiceError            400, and the base of all
    ├── Unauthenticated     401
    ├── Forbidden           403
    ├── NotFound            404
    ├── Conflict            409, never retried by the client
    ├── TooLarge            413
    ├── TooMany             429, worth a retry after a while
    └── Unavailable         503, worth a retry

Services raise them; `install_handlers` turns them, and everything else that can go wrong while a request is
served, into `{"error": {"message", "type", "param", "code"}}`, all four keys always.
"""

from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import BaseError
from pydantic import BaseModel
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from starlette.exceptions import HTTPException

log = structlog.get_logger(__name__)


class ErrorBody(BaseModel):
    """What went wrong: a sentence, a class, the field it is about and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorBody


class ServiceError(Exception):
    """A request that cannot be served: `message` says what was wrong and what to do about it."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    headers: dict[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code

    def response(self) -> JSONResponse:
        return error_response(
            self.status, self.message, self.type, param=self.param, code=self.code, headers=self.headers
        )


class Unauthenticated(ServiceError):
    """No key, or one that is not good."""

    status = 401
    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """A key that is good, but not for this; or a limit of its project."""

    status = 403


class NotFound(ServiceError):
    """Something that is not there, or that the caller may not see."""

    status = 404


class Conflict(ServiceError):
    """The object is in a state that does not allow this. The official client would resend a bare 409."""

    status = 409
    headers = {"x-should-retry": "false"}


class TooLarge(ServiceError):
    """A body over the limit."""

    status = 413


class TooMany(ServiceError):
    """Requests faster than allowed; `seconds` is when the next one is answered."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, seconds: int, *, code: str) -> None:
        super().__init__(message, code=code)
        self.headers = {"Retry-After": str(seconds)}


class Unavailable(ServiceError):
    """A part of the service is out of reach for now."""

    status = 503
    type = "server_error"
    headers = {"Retry-After": "2"}


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


def describe_validation_error(error: dict[str, Any]) -> tuple[str, str | None, str]:
    """One pydantic error as (message, param, code)."""
    # A union adds the name of its branch ("list[str]", "function-after[...]") to the path: not a field of the user's.
    where = [str(part) for part in error["loc"][1:] if "[" not in str(part)]
    param = ".".join(where) or None
    kind = error["type"]
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it cannot be parsed")
        return f"The body of the request is not valid JSON: {reason}.", None, "invalid_json"
    if kind == "missing":
        if param is None:
            return "The request needs a JSON body (Content-Type: application/json).", None, "missing_body"
        return f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'.", param, "unknown_parameter"
    if kind in ("unknown_parameter", "unsupported_parameter", "inconsistent"):
        param = ".".join([*where, error["ctx"]["field"]])
        return error["msg"], param, "invalid_value" if kind == "inconsistent" else kind
    if param is None:
        return (
            "The body of the request must be a JSON object (Content-Type: application/json).",
            None,
            "invalid_json",
        )
    message = error["msg"].removeprefix("Value error, ")
    return f"Invalid value for '{param}': {message}.".replace("..", "."), param, "invalid_value"


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure in OpenAI's shape, without a stack trace."""

    @app.exception_handler(ServiceError)
    def service_error(_request: Request, error: ServiceError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    def validation_error(_request: Request, error: RequestValidationError) -> JSONResponse:
        message, param, code = describe_validation_error(error.errors()[0])
        return error_response(400, message, param=param, code=code)

    @app.exception_handler(HTTPException)
    def http_exception(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ServiceError):  # raised while FastAPI read the body, which it hides
            return error.__cause__.response()
        headers = dict(error.headers or {})
        route = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return error_response(404, f"Unknown request URL: {route}.", code="unknown_url")
        if error.status_code == 405:
            message = f"Not allowed: {route}. This URL takes {headers.get('Allow') or 'other methods'}."
            return error_response(405, message, code="method_not_allowed", headers=headers)
        type = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return error_response(error.status_code, str(error.detail), type, headers=headers)

    @app.exception_handler(OperationalError)
    def database_error(request: Request, error: OperationalError) -> JSONResponse:
        log.error("database out of reach", path=request.url.path, reason=str(error.orig))
        return Unavailable("The database is out of reach. Try again.", code="database_unavailable").response()

    @app.exception_handler(IntegrityError)
    def collision(_request: Request, _error: IntegrityError) -> JSONResponse:
        return Unavailable("Another request made the same at the same moment. Try again.", code="collision").response()

    @app.exception_handler(DataError)
    def unstorable(_request: Request, _error: DataError) -> JSONResponse:
        # PostgreSQL refuses U+0000 and numbers beyond its types.
        return error_response(400, "The request holds a value that cannot be stored.", code="invalid_value")

    @app.exception_handler(BaseError)
    def storage_error(request: Request, error: BaseError) -> JSONResponse:
        log.error("object store out of reach", path=request.url.path, reason=str(error))
        return Unavailable("The object store is out of reach. Try again.", code="storage_unavailable").response()

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        message = "The service failed to answer this request; its log says why."
        return error_response(500, message, "server_error", code="internal_error")
