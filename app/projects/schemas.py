"""Projects on the wire."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.spec.schema_base import Strict

if TYPE_CHECKING:  # the command line imports these schemas without SQLAlchemy
    from app.projects.tables import Project

ProjectId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Limits(Strict):
    """The limits of a project and its weight. Null means no limit."""

    max_storage_bytes: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Bytes of files, pending uploads (at their full size), models, checkpoints and cached objects."""
    max_running_jobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Jobs that run at a time, evaluations included. The others wait in the queue. 0 lets none start."""
    max_queued_jobs: Annotated[int, Field(ge=0, lt=2**31)] | None = 2000
    """Jobs that wait at a time, for the check of their files or for a GPU. No more are accepted."""
    max_priority: Annotated[int, Field(ge=-100, le=100)] | None = 10
    """The highest priority that a job may ask for. It orders the jobs of the project among themselves."""
    weight: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    """A project of weight 2 gets twice the GPU time of one of weight 1, as long as jobs of both wait."""


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
    max_queued_jobs: int | None
    max_priority: int | None
    weight: float
    storage_bytes: int
    """Bytes that it uses now."""

    @classmethod
    def of(cls, project: "Project", storage_bytes: int) -> "ProjectObject":
        return cls(
            id=project.id,
            created_at=int(project.created_at),
            max_storage_bytes=project.max_storage_bytes,
            max_running_jobs=project.max_running_jobs,
            max_queued_jobs=project.max_queued_jobs,
            max_priority=project.max_priority,
            weight=project.weight,
            storage_bytes=storage_bytes,
        )
