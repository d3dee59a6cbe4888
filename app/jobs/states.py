"""The states of a job as one table: source, target, actors, columns. Nothing else changes a job's status.

validating_files ──> queued ──> running ──> succeeded
      │    │           │  ▲       │  │ └──> failed
      │    └──> failed │  └───────┘  │
      └──────> cancelled <───────────┘

Paused is not a state of its own. A paused job is validated, then waits in the queue with `paused` set.
"""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """OpenAI's job states."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE = (Status.VALIDATING, Status.QUEUED, Status.RUNNING)


class Actor(StrEnum):
    """Who changes a job."""

    API = "api"
    VALIDATOR = "validator"
    RUNNER = "runner"
    HOUSEKEEPING = "housekeeping"


@dataclass(frozen=True)
class Transition:
    """An edge of the state machine. `actors` may take it, and it may write the columns `writes`.

    If it is `fenced`, only the attempt that holds the lease may take it.
    """

    source: Status
    target: Status
    actors: frozenset[Actor]
    writes: frozenset[str]
    fenced: bool


def _edge(source: Status, target: Status, actors: set[Actor], writes: set[str], fenced: bool) -> Transition:
    return Transition(source, target, frozenset(actors), frozenset(writes), fenced)


_V, _Q, _R = Status.VALIDATING, Status.QUEUED, Status.RUNNING
_END = {"finished_at", "lease_owner", "lease_expires_at", "progress"}
_LEASE = {"lease_owner", "lease_expires_at"}
_API, _VALIDATOR, _RUNNER, _KEEPER = Actor.API, Actor.VALIDATOR, Actor.RUNNER, Actor.HOUSEKEEPING

TRANSITIONS: dict[tuple[Status, Status], Transition] = {
    (edge.source, edge.target): edge
    for edge in (
        _edge(
            _V, _Q, {_VALIDATOR},
            _LEASE
            | {"estimated_seconds", "memory_bytes", "least_devices", "most_devices", "lost_attempts", "setbacks"},
            fenced=True,
        ),
        _edge(_V, Status.FAILED, {_VALIDATOR, _KEEPER}, _END | {"error"}, fenced=True),
        _edge(_V, Status.CANCELLED, {_API, _KEEPER}, _END, fenced=False),
        _edge(_Q, _R, {_RUNNER}, _LEASE | {"attempt"}, fenced=False),  # by `queue.claim`, which takes the lease
        _edge(_Q, Status.CANCELLED, {_API, _KEEPER}, _END, fenced=False),
        _edge(
            _R, _Q, {_RUNNER, _KEEPER},
            _LEASE | {"lost_attempts", "setbacks", "eligible_at", "memory_bytes", "awaits"}, fenced=True,
        ),
        _edge(
            _R, Status.SUCCEEDED, {_RUNNER},
            _END | {"fine_tuned_model", "trained_tokens", "result_files", "metrics", "gates", "pace"}, fenced=True,
        ),
        _edge(_R, Status.FAILED, {_RUNNER, _KEEPER}, _END | {"error", "lost_attempts"}, fenced=True),
        _edge(_R, Status.CANCELLED, {_API}, _END, fenced=False),
    )
}  # fmt: skip
