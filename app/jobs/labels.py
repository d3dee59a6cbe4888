"""Labels: the pairs of a job's metadata as rows, by which lists find jobs.

Jobs of a version before 0021 have none until a worker has labelled them. Lists read their metadata meanwhile.
"""

import hashlib

from sqlalchemy import ColumnElement, Select, Text, cast, exists, false, func, select
from sqlalchemy.orm import Session, aliased

from app.jobs.tables import Job, JobLabel
from app.pagination import keyset

WITHOUT = ""
"""The pair of jobs without metadata."""


def pair_of(key: str, value: str) -> str:
    """The key of a pair in the index, whose entries must be short: 32 hex digits of its SHA-256."""
    return hashlib.sha256(f"{len(key)} {key}{value}".encode()).hexdigest()[:32]


def label(session: Session, job: Job) -> None:
    """Write the labels of a job."""
    pairs = [pair_of(key, value) for key, value in (job.job_metadata or {}).items()] or [WITHOUT]
    session.add_all(
        JobLabel(job_id=job.id, pair=pair, project=job.project, kind=job.kind, created_at=job.created_at)
        for pair in pairs
    )
    job.labelled = True


def label_some(session: Session, limit: int) -> int:
    """Label up to `limit` jobs of an earlier version; returns their number."""
    unlabelled = select(Job).where(Job.labelled == false()).limit(limit).with_for_update(skip_locked=True)
    jobs = session.scalars(unlabelled).all()
    for job in jobs:
        label(session, job)
    return len(jobs)


def page(
    session: Session, project: str, kind: str, metadata: dict[str, str] | None, after: Job | None, limit: int
) -> list[Job]:
    """Up to `limit` + 1 jobs, newest first: those older than `after` whose metadata has all pairs of `metadata`.

    None asks for the jobs without metadata.
    """
    labelled = session.scalars(_labelled(project, kind, metadata, after, limit)).all()
    unlabelled = session.scalars(_unlabelled(session, project, kind, metadata, after, limit)).all()
    newest_first = sorted([*labelled, *unlabelled], key=lambda job: (job.created_at, job.id), reverse=True)
    return newest_first[: limit + 1]


def _labelled(project: str, kind: str, metadata: dict[str, str] | None, after: Job | None, limit: int) -> Select[Job]:
    """The page of the jobs that have labels, in the order of the index of the first pair."""
    first, *others = [WITHOUT] if metadata is None else [pair_of(key, value) for key, value in metadata.items()]
    statement = select(Job).join(JobLabel, JobLabel.job_id == Job.id)
    statement = statement.where(JobLabel.project == project, JobLabel.kind == kind, JobLabel.pair == first)
    for pair in others:
        other = aliased(JobLabel)
        statement = statement.where(exists().where(other.job_id == JobLabel.job_id, other.pair == pair))
    last = None if after is None else JobLabel(created_at=after.created_at, job_id=after.id)
    return keyset(statement, (JobLabel.created_at, JobLabel.job_id), last, limit)


def _unlabelled(
    session: Session, project: str, kind: str, metadata: dict[str, str] | None, after: Job | None, limit: int
) -> Select[Job]:
    """The page of the jobs that have no labels yet, by their metadata itself."""
    statement = select(Job).where(Job.project == project, Job.kind == kind, Job.labelled == false())
    if metadata is None:
        statement = statement.where(func.coalesce(cast(Job.job_metadata, Text), "null").in_(("null", "{}")))
    for key, value in (metadata or {}).items():
        statement = statement.where(_has_pair(session, key, value))
    return keyset(statement, (Job.created_at, Job.id), after, limit)


def _has_pair(session: Session, key: str, value: str) -> ColumnElement[bool]:
    """Whether a job's metadata has the pair."""
    if session.get_bind().dialect.name != "sqlite":
        has_pair: ColumnElement[bool] = Job.job_metadata[key].as_string() == value
        return has_pair
    # A path of SQLite's JSON functions cannot name every key.
    pairs = func.json_each(Job.job_metadata).table_valued("key", "value")
    return exists(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))
