"""All SQL about models."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from app.database import database_now
from app.jobs.spec import Adapter
from app.jobs.tables import Checkpoint, Job
from app.models.tables import Model

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Found:
    """What a model name stands for: `prefix` is its folder in the object store, None for a base model."""

    name: str
    kind: str
    base_model: str
    prefix: str | None
    revision: str | None
    adapter: Adapter | None


def readable(project: str) -> Select[Model]:
    """The models that `project` may use."""
    return select(Model).where(or_(Model.project.is_(None), Model.project == project))


def get(session: Session, project: str, name: str) -> Model | None:
    return session.scalar(readable(project).where(Model.name == name, Model.kind != "hub"))


def listed(session: Session, project: str) -> list[Model]:
    return list(session.scalars(readable(project).where(Model.kind != "hub").order_by(Model.created_at.desc())))


def find(session: Session, project: str, name: str) -> Found | None:
    """Resolve the name of a base model, a made model, a checkpoint or a hub id that workers may download."""
    model = get(session, project, name)
    if model is not None:
        adapter = model.details.get("adapter")
        return Found(
            name,
            model.kind,
            model.base_model,
            model.prefix,
            model.revision,
            Adapter(**adapter) if isinstance(adapter, dict) else None,
        )
    checkpoint = session.execute(
        select(Checkpoint, Job)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.model_name == name, Job.project == project)
    ).one_or_none()
    if checkpoint is not None:
        saved, job = checkpoint
        trained = job.spec["adapter"]
        return Found(
            name,
            "full" if trained == "none" else "adapter",
            job.base_model,
            f"{saved.prefix}/model",
            None,
            None if trained == "none" else Adapter(**trained),
        )
    if HUB_NAME.fullmatch(name):
        patterns = session.scalars(select(Model.name).where(Model.kind == "hub"))
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return Found(name, "base", name, None, None, None)
    return None


def register(session: Session, name: str, kind: str, revision: str | None, details: dict[str, Any]) -> None:
    """Make or refresh the row of a base model that a worker can serve."""
    row = session.get(Model, name)
    if row is None:
        row = Model(name=name, kind=kind, project=None, created_at=database_now(), base_model=name)
        session.add(row)
    row.kind, row.revision, row.details = kind, revision, details
