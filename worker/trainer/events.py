"""Events: the messages of a trainer to the process that started it, each a line of JSON on standard output.

`Events` writes the lines, and `read` turns them back into the same objects. The service's runner, `dpo train` and the
benchmarks read them.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import IO, ClassVar

from app.spec.activities import Activity
from app.spec.json_types import JsonObject
from worker.trainer.progress import progress

WORKING_SECONDS = 1.0
"""Seconds between two reports of the same activity."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """The fields of all events. `KIND` is the event's name in the JSON line."""

    KIND: ClassVar[str]
    time: float = field(default_factory=time.time)
    """When the event was created, in seconds since 1970 (Unix time)."""


@dataclass(frozen=True)
class Notice(Event):
    """A sentence for people. `data` says the same for programs, with a `code`."""

    KIND = "message"
    message: str
    level: str = "info"
    """info, warn or error."""
    data: JsonObject | None = None


@dataclass(frozen=True)
class Working(Event):
    """The run works on something else than optimizer steps. `done` of `total` rows are ready; None if not counted."""

    KIND = "working"
    activity: Activity
    done: int | None
    total: int | None


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage begins. `rows` and `validation_rows` are its numbers of rows."""

    KIND = "stage"
    stage: str
    rows: int
    validation_rows: int


@dataclass(frozen=True)
class Metrics(Event):
    """The metrics of a step or of a validation. `seconds_remaining` is None until a step was timed."""

    KIND = "metrics"
    stage: str
    step: int
    total_steps: int
    seconds_remaining: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint is complete in the folder `path`, relative to the work folder."""

    KIND = "checkpoint"
    stage: str
    step: int
    path: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class CompletionsWritten(Event):
    """Some completions of a job are in the file `path`. `total` is the number that it needs."""

    KIND = "part"
    path: str
    completions: int
    total: int


@dataclass(frozen=True)
class CacheWanted(Event):
    """The trainer asks for the cache's file of `key` and waits for the answer."""

    KIND = "wanted"
    key: str


@dataclass(frozen=True)
class CacheMade(Event):
    """The trainer put the cache's file of `key` into the work folder. Other runs can use it."""

    KIND = "made"
    key: str


@dataclass(frozen=True)
class TrainingDone(Event):
    """Training is done. The artifact is in `output/`."""

    KIND = "done"
    trained_tokens: int
    metrics: dict[str, float]
    pace: dict[str, float | bool]
    """`tokens` trained in this attempt, the `seconds` they took, and `overhead_seconds` before the first step."""


@dataclass(frozen=True)
class EvaluationDone(Event):
    """The evaluation is done. Its items are in `output/items.jsonl`."""

    KIND = "evaluated"
    items: int


@dataclass(frozen=True)
class LabellingDone(Event):
    """The trainer's part of a labelling is done. Its items are in `output/items.jsonl`."""

    KIND = "labelled"
    items: int


@dataclass(frozen=True)
class Failed(Event):
    """The run ends because of an error that the user can correct. `param` names the field."""

    KIND = "failed"
    code: str
    message: str
    param: str | None


@dataclass(frozen=True)
class Broken(Event):
    """The run ends because of the machine. Another attempt may succeed.

    `is_lost`: whether the attempt counts as lost. One that a full disk or a lack of room has ended does not.
    """

    KIND = "broken"
    reason: str
    is_lost: bool = True


@dataclass(frozen=True)
class DeviceFailed(Event):
    """The run ends because of an error that looks like the device's fault. The worker checks its device."""

    KIND = "device_failed"
    reason: str


EVENT_CLASSES: dict[str, type[Event]] = {event_class.KIND: event_class for event_class in Event.__subclasses__()}
"""The class of each event, by its name in the JSON line."""


def read(text: str | bytes) -> Event:
    """The event in a line. Raises `ValueError` for a line that is not an event of this version."""
    fields = json.loads(text)
    try:
        return EVENT_CLASSES[fields.pop("kind")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event of this version: {text[:200]!r}") from error


def line(event: Event) -> str:
    """`event` as a line. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    return json.dumps({"kind": event.KIND, **asdict(event)}, allow_nan=False)


class Events:
    """Writes events to a stream."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._activity, self._shown_at = "", 0.0

    def emit(self, event: Event) -> None:
        """Write `event` and flush. Raises `ValueError` for NaN and infinity."""
        self._stream.write(line(event) + "\n")
        self._stream.flush()

    def working(self, activity: Activity, done: int | None = None, total: int | None = None) -> None:
        """Report what the run does now: at once if it is new, else at most every `WORKING_SECONDS`."""
        progress.mark()
        now = time.monotonic()
        if activity != self._activity or now - self._shown_at >= WORKING_SECONDS:
            self._activity, self._shown_at = activity, now
            self.emit(Working(activity, done, total))

    def message(self, text: str, level: str = "info", data: JsonObject | None = None) -> None:
        """Write a notice: `text` for people, `data` for programs."""
        self.emit(Notice(text, level, data))
