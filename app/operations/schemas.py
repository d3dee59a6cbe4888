"""Operations on the wire."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.spec.schema_base import NO_NUL, Strict


class OperationsChange(Strict):
    """The body of `POST /v1/operations`. A field that it does not name stays."""

    model_config = ConfigDict(json_schema_extra={"example": {"claims_paused": True}})

    claims_paused: bool = False
    """Workers start no jobs. Those that run go on."""
    read_only: Annotated[str, Field(min_length=1, max_length=500, pattern=NO_NUL)] | None = None
    """Why nothing can be changed at present. The API then answers 503 to every write with this text. Workers start no
    jobs, send no webhooks and delete nothing. Jobs that run go on. Null ends it."""


class Operations(BaseModel):
    """The present stops."""

    object: Literal["operations"] = "operations"
    claims_paused: bool
    read_only: str | None
