"""The API schemas of keys."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.projects.schemas import ProjectId
from app.spec.schema_base import Strict, unix_seconds

if TYPE_CHECKING:  # the command line needs these schemas, but not SQLAlchemy
    from app.keys.tables import ApiKey


class Scope(StrEnum):
    """The permission of a key. `write` includes `read`, and `admin` includes all others."""

    LABEL = "label"
    """Label what labellings of the project give to people, and see nothing else."""
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"
    """Manage the projects and keys of the whole installation."""


class KeySpec(Strict):
    """The body of `POST /v1/keys`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"name": "ci", "project": "search-team", "scopes": ["read", "write"], "expires_in": 7776000}
        }
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
    project: ProjectId = "default"
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=len(Scope))] = [
        Scope.READ,
        Scope.WRITE,
    ]
    expires_in: Annotated[int, Field(ge=1, le=10**10)] | None = None
    """Seconds until the key expires; null means never."""


class KeyObject(BaseModel):
    """A key, without its secret."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    project: str
    scopes: list[Scope]
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    revoked_at: int | None

    @classmethod
    def of(cls, key: "ApiKey") -> "KeyObject":
        return cls(
            id=key.id,
            name=key.name,
            project=key.project,
            scopes=[Scope(scope) for scope in key.scopes],
            created_at=int(key.created_at),
            expires_at=unix_seconds(key.expires_at),
            last_used_at=unix_seconds(key.last_used_at),
            revoked_at=unix_seconds(key.revoked_at),
        )


class NewKeyObject(KeyObject):
    """A new key. `key` is its secret, which is shown only this once."""

    key: str
