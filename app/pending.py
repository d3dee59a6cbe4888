"""The answer 202: a worker has yet to make what is asked for."""

from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Pending(BaseModel):
    """Not ready: ask again after `Retry-After` seconds."""

    status: Literal["pending"] = "pending"


NOT_READY: dict[int | str, dict[str, Any]] = {
    202: {"model": Pending, "description": "Not ready; ask again after Retry-After seconds."}
}
"""The answer in the document of a route that may give it."""


def not_ready(seconds: int) -> JSONResponse:
    """The answer itself."""
    return JSONResponse(Pending().model_dump(), status_code=202, headers={"Retry-After": str(seconds)})
