"""Errors that the service reports to its users. `app.exception_handlers` turns them into HTTP answers.

ServiceError            400, and the base of all
├── Unauthenticated     401
├── Forbidden           403
├── NotFound            404
├── Conflict            409, never retried by the client
├── Gone                410
├── TooLarge            413
├── UnknownEncoding     415
├── OutsideOfFile       416
├── TooMany             429, worth a retry after a while
└── Unavailable         503, worth a retry
"""

from typing import ClassVar

from pydantic_core import ErrorDetails

from app.spec.error_codes import JOBS, REQUESTS


class ServiceError(Exception):
    """A request that cannot be served: `message` says what was wrong and what to do about it.

    `code` is one of `app.spec.error_codes`.
    """

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    headers: dict[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        assert code is None or code in REQUESTS or code in JOBS, code
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class Unauthenticated(ServiceError):
    """The key is missing or not valid."""

    status = 401
    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """The key is valid but lacks the scope, or its project is at a limit."""

    status = 403


class NotFound(ServiceError):
    """The object does not exist, or the caller may not see it."""

    status = 404


def no_such(noun: str, name: str, *, code: str, param: str | None = "id") -> NotFound:
    """The error for an object that does not exist or that belongs to another project."""
    return NotFound(f"No such {noun}: {name}", param=param, code=f"{code}_not_found")


class Conflict(ServiceError):
    """The object is in a state that does not allow this. The official client would resend a bare 409."""

    status = 409
    headers = {"x-should-retry": "false"}


class Gone(ServiceError):
    """The object exists, but the service has lost its content."""

    status = 410


class TooLarge(ServiceError):
    """A body over the limit."""

    status = 413


class UnknownEncoding(ServiceError):
    """The body is compressed in a way that the service does not read."""

    status = 415


class OutsideOfFile(ServiceError):
    """The range that is asked for begins after the end of the file, which has `size` bytes."""

    status = 416

    def __init__(self, size: int) -> None:
        super().__init__(f"The file has {size} bytes. The range begins after its end.", code="range_not_satisfiable")
        self.headers = {"Content-Range": f"bytes */{size}"}


class TooMany(ServiceError):
    """The caller sends requests faster than allowed. It may send the next one after `seconds`."""

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


def describe_validation_error(error: ErrorDetails) -> tuple[str, str | None, str]:
    """One pydantic error as (message, param, code)."""
    # A union adds the name of its branch ("list[str]", "function-after[...]") to the path. No user knows that name.
    path = [str(name) for name in error["loc"][1:] if "[" not in str(name)]
    param = ".".join(path) or None
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
        param = ".".join([*path, error["ctx"]["field"]])
        return error["msg"], param, "invalid_value" if kind == "inconsistent" else kind
    if param is None:
        return (
            "The body of the request must be a JSON object (Content-Type: application/json).",
            None,
            "invalid_json",
        )
    message = error["msg"].removeprefix("Value error, ")
    return f"Invalid value for '{param}': {message}.".replace("..", "."), param, "invalid_value"
