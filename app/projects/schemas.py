"""Projects on the wire."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.spec.schema_base import Strict

if TYPE_CHECKING:  # the command line imports these schemas without SQLAlchemy
    from app.projects.tables import Project

ProjectId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Limits(Strict):
    """The limits of a project. Null means no limit."""

    max_storage_bytes: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Bytes of files, pending uploads (at their full size) and trained models."""
    max_running_jobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Jobs that run at a time, evaluations included. The others wait in the queue. 0 lets none start."""


class ProjectSpec(Limits):
    """The body of `POST /v1/projects`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"id": "search-team", "max_storage_bytes": 10**11, "max_running_jobs": 2}}
    )

    id: ProjectId


class ProjectObject(BaseModel):
    """A project."""

    id: str
    object: Literal["project"] = "project"
    created_at: int
    max_storage_bytes: int | None
    max_running_jobs: int | None
    storage_bytes: int
    """Bytes that it uses now."""

    @classmethod
    def of(cls, project: "Project", storage_bytes: int) -> "ProjectObject":
        return cls(
            id=project.id,
            created_at=int(project.created_at),
            max_storage_bytes=project.max_storage_bytes,
            max_running_jobs=project.max_running_jobs,
            storage_bytes=storage_bytes,
        )
