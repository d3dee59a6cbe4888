"""The answer 202: a worker has not made the result yet."""

from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Pending(BaseModel):
    """Not ready: ask again after `Retry-After` seconds."""

    status: Literal["pending"] = "pending"


NOT_READY: dict[int | str, dict[str, object]] = {
    202: {"model": Pending, "description": "Not ready; ask again after Retry-After seconds."}
}
"""The entry for this answer in the OpenAPI document of a route."""


def not_ready(seconds: int) -> JSONResponse:
    """The 202 answer. The client asks again after `seconds`."""
    return JSONResponse(Pending().model_dump(), status_code=202, headers={"Retry-After": str(seconds)})
