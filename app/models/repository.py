"""All SQL about models."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from app.database import database_now
from app.errors import ServiceError
from app.jobs import queries
from app.jobs.tables import Checkpoint, Job
from app.models.tables import Model, foundation_in_details
from app.pagination import keyset
from app.spec.job import Adapter, JobSpec
from app.spec.json_types import JsonObject
from app.spec.schema_base import STORED
from app.stored_content import UNKNOWN, FolderContent

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The form of an id on the Hugging Face Hub: OWNER/NAME."""


@dataclass(frozen=True)
class ResolvedModel:
    """The model that a name stands for.

    `prefix` is its folder in the object store, None for a base model, and `content` is what the folder must hold.
    `foundation` names the fully trained model whose weights it has or adapts, None if these are the base model's.
    """

    name: str
    kind: str
    base_model: str
    prefix: str | None
    revision: str | None
    adapter: Adapter | None
    foundation: str | None
    content: FolderContent = UNKNOWN


def readable(project: str) -> Select[Model]:
    """The models that `project` may use."""
    return select(Model).where(or_(Model.project.is_(None), Model.project == project))


def get(session: Session, project: str, name: str, *, lock: bool = False) -> Model | None:
    """One model. `lock` prevents its deletion until this transaction ends (SQLite has one writer anyway)."""
    statement = _named(project, name)
    return session.scalar(statement.with_for_update(read=True) if lock else statement)


def get_for_deletion(session: Session, project: str, name: str) -> Model | None:
    """One model, locked: no other transaction can start to use it until this one ends."""
    return session.scalar(_named(project, name).with_for_update())


def _named(project: str, name: str) -> Select[Model]:
    return readable(project).where(Model.name == name, Model.kind != "hub")


def page(session: Session, project: str, *, after: Model | None, limit: int) -> list[Model]:
    """Up to `limit` + 1 models: first the base models, then the project's own, both newest first."""
    order = (Model.created_at, Model.name)
    models: list[Model] = []
    if after is None or after.project is None:
        bases = select(Model).where(Model.project.is_(None), Model.kind != "hub")
        models += session.scalars(keyset(bases, order, after, limit))
        after = None
    if len(models) <= limit:
        own = select(Model).where(Model.project == project)
        models += session.scalars(keyset(own, order, after, limit - len(models)))
    return models


def find(session: Session, project: str, name: str, *, lock: bool = False) -> ResolvedModel | None:
    """Resolve the name of a base model, a trained model, a checkpoint or a hub id that workers may download.

    None if there is no such model. `lock` prevents the deletion of the result until this transaction ends.
    """
    model = get(session, project, name, lock=lock)
    if model is not None:
        adapter = model.details.get("adapter")
        return ResolvedModel(
            name,
            model.kind,
            model.base_model,
            model.prefix,
            model.revision,
            _adapter(adapter),
            name if model.kind == "full" else model.details.get("foundation"),
            model.content,
        )
    statement = (
        select(Checkpoint, Job)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.model_name == name, Job.project == project)
    )
    locked = statement.with_for_update(read=True, of=Checkpoint)
    row = session.execute(locked if lock else statement).one_or_none()
    if row is not None:
        checkpoint, job = row
        adapter = job.spec["adapter"]
        is_reward = checkpoint.stage == "dpo" and JobSpec.stored(job.spec).trains_rewards
        return ResolvedModel(
            name,
            "reward" if is_reward else "full" if adapter == "none" else "adapter",
            job.base_model,
            f"{checkpoint.prefix}/model",
            None,
            _adapter(adapter),
            name if adapter == "none" else job.foundation,
            checkpoint.content,
        )
    if HUB_NAME.fullmatch(name):
        patterns = session.scalars(select(Model.base_model).where(Model.kind == "hub"))
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return ResolvedModel(name, "base", name, None, None, None, None)
    return None


def require(session: Session, project: str, name: str, param: str, *, lock: bool = False) -> ResolvedModel:
    """The model that a request body names in `param`. Raises `ServiceError` if there is none."""
    model = find(session, project, name, lock=lock)
    if model is None:
        message = f"The model '{name}' does not exist. GET /v1/models lists all models."
        raise ServiceError(message, param=param, code="model_not_found")
    return model


def _adapter(stored: object) -> Adapter | None:
    """Read an adapter from a database row. The next version may have written it. None if there is no adapter."""
    return Adapter.model_validate(stored, context=STORED) if isinstance(stored, dict) else None


def job_of(session: Session, project: str, name: str) -> Job | None:
    """The job that made a model or a checkpoint; None for a base model, or if the job has no row any more."""
    job = session.scalar(
        select(Job).join(Model, Model.job_id == Job.id).where(Model.name == name, Job.project == project)
    )
    if job is not None:
        return job
    statement = select(Job).join(Checkpoint, Checkpoint.job_id == Job.id)
    return session.scalar(statement.where(Checkpoint.model_name == name, Job.project == project))


def users_of(session: Session, name: str, limit: int = 1) -> list[str]:
    """Some ids of unfinished jobs, or names of models and checkpoints, that need the model `name`; at most `limit`."""
    trained = select(Model.name).where(foundation_in_details() == name, Model.name != name)
    checkpoints = select(Checkpoint.model_name).join(Job, Job.id == Checkpoint.job_id).where(Job.foundation == name)
    users = queries.users_of(session, name, limit)
    for statement in (trained, checkpoints):
        if len(users) < limit:
            users += session.scalars(statement.limit(limit - len(users)))
    return users


def version(session: Session, base_model: str) -> str | None:
    """The revision of a base model, as a worker registered it."""
    return session.scalar(select(Model.revision).where(Model.name == base_model, Model.kind == "base"))


def prequantized(session: Session, base_model: str) -> str | None:
    """The quantisation of a base model's weights on disk; None if there is none or no worker has registered it."""
    details = session.scalar(select(Model.details).where(Model.name == base_model, Model.kind == "base"))
    return (details or {}).get("prequantized")


def register(session: Session, name: str, revision: str, details: JsonObject) -> None:
    """Insert or update the row of a base model that a worker serves."""
    _register(session, name, "base", name, revision, details)


def register_hub(session: Session, pattern: str) -> None:
    """Insert the row of a pattern of hub ids that a worker may download. No model can have the row's name."""
    _register(session, f"hub::{pattern}", "hub", pattern, None, {})


def _register(
    session: Session, name: str, kind: str, base_model: str, revision: str | None, details: JsonObject
) -> None:
    row = session.get(Model, name)
    if row is None:
        row = Model(name=name, kind=kind, project=None, created_at=database_now(), base_model=base_model, bytes=0)
        session.add(row)
    row.revision, row.details = revision, details
