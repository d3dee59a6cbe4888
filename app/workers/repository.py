"""All SQL about workers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, delete, false, or_, select
from sqlalchemy.orm import Session

from app.database import database_now
from app.spec.json_types import JsonObject
from app.workers.tables import Worker

GONE_SECONDS = 90.0
"""A worker that has not reported for this long counts as gone."""


def report(session: Session, name: str, lane: str, serves: list[str], details: JsonObject) -> None:
    """Record that a worker is running, and delete the rows of workers that have long been gone."""
    row = session.get(Worker, name)
    if row is None:
        row = Worker(name=name)
        session.add(row)
    row.lane, row.serves, row.details, row.seen_at = lane, serves, details, database_now()
    session.execute(delete(Worker).where(Worker.seen_at < database_now() - 10 * GONE_SECONDS))


def leave(session: Session, name: str) -> None:
    """Delete the row of a worker that ends."""
    session.execute(delete(Worker).where(Worker.name == name))


def present(session: Session, lane: str) -> Sequence[Worker]:
    """The workers of a lane that have reported lately."""
    alive = Worker.seen_at > database_now() - GONE_SECONDS
    return session.scalars(select(Worker).where(Worker.lane == lane, alive).order_by(Worker.name)).all()


def in_service(worker: Worker) -> bool:
    """Whether a worker claims jobs. It does not while it is cordoned, or while its device or the object store fails."""
    return not worker.cordoned and not worker.details.keys() & {"problem", "store_problem"}


def device_out_of_service(present: Sequence[Worker]) -> int:
    """The number of workers whose device fails."""
    return sum("problem" in worker.details for worker in present)


def without_store(present: Sequence[Worker]) -> int:
    """The number of workers that cannot reach the object store."""
    return sum("store_problem" in worker.details for worker in present)


def serves(worker: Worker, *base_models: str) -> bool:
    """Whether a worker serves all of `base_models`."""
    return all(any(fnmatchcase(name, pattern) for pattern in worker.serves) for name in base_models)


def cordoned(name: str) -> Select[bool]:
    """Selects whether an operator lets this worker start no jobs."""
    return select(Worker.cordoned).where(Worker.name == name)


def knows(worker: Worker, spec_version: int) -> bool:
    """Whether a worker knows all that a spec of this version can ask for."""
    return bool(worker.details.get("spec_version", 1) >= spec_version)


def memory_of(worker: Worker) -> int | None:
    """The memory of a worker's device in bytes; None if its device has not been found."""
    device = worker.details.get("device")
    return device and int(device["memory_bytes"])


def devices_of(worker: Worker, nodes: int = 1) -> int | None:
    """The most devices of a worker that are on `nodes` machines; None if they have not been found.

    A worker of a version before has one.
    """
    return sum(_by_machine(worker)[:nodes]) if worker.details.get("device") else None


def machines_for(worker: Worker, devices: int) -> int | None:
    """The fewest machines of a worker that have so many devices; None if it has fewer."""
    totals = accumulate(_by_machine(worker))
    return next((count for count, total in enumerate(totals, start=1) if total >= devices), None)


def _by_machine(worker: Worker) -> list[int]:
    """The number of devices of each of a worker's machines, the largest first."""
    machines: list[int] = worker.details.get("machines") or [worker.details.get("devices", 1)]
    return machines


def served_by(column: SQLColumnExpression[str | None], patterns: Sequence[str]) -> ColumnElement[bool]:
    """The condition that a worker with `patterns` serves the base model in `column`."""
    return or_(false(), *(_matches(column, pattern) for pattern in patterns))


def _matches(column: SQLColumnExpression[str | None], pattern: str) -> ColumnElement[bool]:
    """`fnmatch` in SQL, for patterns whose only wildcard is `*`."""
    if "*" not in pattern:
        return column == pattern
    for special in ("\\", "%", "_"):
        pattern = pattern.replace(special, "\\" + special)
    return column.like(pattern.replace("*", "%"), escape="\\")
