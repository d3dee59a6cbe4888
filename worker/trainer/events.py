"""Events: all that a trainer tells the process that started it, a line of JSON on standard output for each.

`Events` writes them, `read` makes the same objects of the lines again: for the service's runner, for `dpo train`, and
for benchmarks.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import IO, Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """The fields that all events have. `KIND` is their name on the wire."""

    KIND: ClassVar[str]
    time: float = field(default_factory=time.time)
    """When it was written, in seconds since 1970."""


@dataclass(frozen=True)
class Notice(Event):
    """A sentence for people. `data` says the same to programs, by a `code`."""

    KIND = "message"
    message: str
    level: str = "info"
    """info, warn or error."""
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage begins on so many rows."""

    KIND = "stage"
    stage: str
    rows: int
    validation_rows: int


@dataclass(frozen=True)
class Metrics(Event):
    """The metrics of a step or of a validation. `seconds_remaining` is None where no step was measured yet."""

    KIND = "metrics"
    stage: str
    step: int
    total_steps: int
    seconds_remaining: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint is in the folder `path`, which is relative to the work folder."""

    KIND = "checkpoint"
    stage: str
    step: int
    path: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class CompletionsWritten(Event):
    """Some completions of an evaluation are in the file `path`; `total` is how many it needs."""

    KIND = "part"
    path: str
    completions: int
    total: int


@dataclass(frozen=True)
class CacheWanted(Event):
    """The trainer waits for the answer whether the cache has `key`."""

    KIND = "wanted"
    key: str


@dataclass(frozen=True)
class CacheMade(Event):
    """The file of the cache's `key` is in the work folder, for others to use."""

    KIND = "made"
    key: str


@dataclass(frozen=True)
class TrainingDone(Event):
    """The artifact is in `output/`."""

    KIND = "done"
    trained_tokens: int
    metrics: dict[str, float]
    pace: dict[str, float]
    """`tokens` of this attempt, the `seconds` that they took, and `overhead_seconds` before the first step."""


@dataclass(frozen=True)
class EvaluationDone(Event):
    """The items are in `output/items.jsonl`."""

    KIND = "evaluated"
    items: int


@dataclass(frozen=True)
class Failed(Event):
    """The run ends for a reason that the user can mend. `param` names the field."""

    KIND = "failed"
    code: str
    message: str
    param: str | None


@dataclass(frozen=True)
class Broken(Event):
    """The run ends for a reason that lies in the machine: another attempt may do better."""

    KIND = "broken"
    reason: str


KINDS: dict[str, type[Event]] = {kind.KIND: kind for kind in Event.__subclasses__()}


def read(line: str | bytes) -> Event:
    """The event of a line. Raises `ValueError` for a line that no trainer of this version writes."""
    fields = json.loads(line)
    try:
        return KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event of this version: {line[:200]!r}") from error


class Events:
    """Writes events to a stream."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        """Write `event` at once. Raises `ValueError` for numbers that JSON does not have."""
        self._stream.write(json.dumps({"kind": event.KIND, **asdict(event)}, allow_nan=False) + "\n")
        self._stream.flush()

    def message(self, text: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Say `text` to people, and `data` to programs."""
        self.emit(Notice(text, level, data))
