"""Labellings on the wire."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.errors import ServiceError
from app.evaluations.schemas import EvaluationProgress
from app.jobs.queue_forecast import QueuePlace
from app.jobs.schemas import GateVerdict, JobError, shown_devices, shown_gates
from app.jobs.states import Status
from app.jobs.tables import Job
from app.labellings.tables import LabelVerdict
from app.spec.json_types import JsonObject
from app.spec.labelling import MAX_SHOWN, LabellingSpec
from app.spec.schema_base import NO_NUL, Defaulted, inconsistent, unix_seconds, without_nulls


class LabellingObject(BaseModel):
    """A labelling. It has a `file` and `metrics` once it has succeeded."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "labelling-abc123",
                "object": "labelling",
                "created_at": 1730000000,
                "status": "succeeded",
                "data": "file-abc123",
                "writers": [{"model": "ft:Llama-3.1-8B:default:support:1a2b3c4d"}],
                "labellers": [{"judge": {"type": "reward_model", "model": "ft:Llama-3.1-8B:default:reward:5e6f7a8b"}}],
                "metrics": {"rows": 994, "answers": 3912, "margin": 1.71},
                "file": "file-def456",
                "result_files": ["file-def456", "file-report", "file-items"],
            }
        }
    )

    id: str
    object: Literal["labelling"] = "labelling"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_start: int | None
    estimated_finish: int | None
    organization_id: str
    status: Status
    error: JobError | None
    name: str | None
    data: str
    mapping: JsonObject | None
    max_rows: int | None
    writers: list[JsonObject]
    own_answers: bool
    sampling: JsonObject | None
    labellers: list[JsonObject]
    quantization: str
    max_length: int | None
    seed: int
    metadata: dict[str, str] | None
    resources: JsonObject
    devices: int | None
    """The devices of the last attempt. While a labelling waits for its first one, the fewest that it takes."""
    priority: int
    timeout_seconds: int | None
    running_seconds: float
    progress: EvaluationProgress | None
    queue_position: int | None
    waiting_for: str | None
    """The need that keeps a queued job waiting, apart from the jobs before it."""
    awaits: Literal["people"] | None
    """`people` while they label."""
    attempt: int
    metrics: dict[str, float] | None
    gates: list[GateVerdict]
    file: str | None
    """The ranked answers: a file that a training takes."""
    result_files: list[str]
    """This file, the report as JSON, and the items behind it: one line for each prompt."""
    paused: bool

    @classmethod
    def of(cls, job: Job, place: QueuePlace | None = None) -> "LabellingObject":
        """The API object of the row `job`. `place` is its place in the queue or on a worker."""
        place, spec = place or QueuePlace(), LabellingSpec.stored(job.spec).sealed(lambda _: None).to_store()
        copied = (
            "name",
            "data",
            "mapping",
            "max_rows",
            "own_answers",
            "quantization",
            "max_length",
            "seed",
            "resources",
        )
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            started_at=unix_seconds(job.started_at),
            finished_at=unix_seconds(job.finished_at),
            estimated_start=unix_seconds(place.start),
            estimated_finish=unix_seconds(place.finish),
            organization_id=f"org-{job.project}",
            devices=shown_devices(job),
            status=Status(job.status),
            error=JobError(**job.error) if job.error else None,
            writers=[without_nulls(writer) or {} for writer in spec["writers"]],
            sampling=spec["sampling"],
            labellers=[without_nulls(labeller) or {} for labeller in spec["labellers"]],
            metadata=job.job_metadata,
            priority=job.priority,
            timeout_seconds=job.timeout_seconds,
            running_seconds=job.ran_seconds,
            progress=EvaluationProgress(**job.progress) if job.progress else None,
            queue_position=place.position,
            waiting_for=place.waiting_for,
            awaits=job.awaits if job.status == Status.QUEUED else None,
            attempt=job.attempt,
            metrics=job.metrics,
            gates=shown_gates(job),
            file=job.result_files[0] if job.result_files else None,
            result_files=job.result_files,
            paused=job.paused,
            **{name: spec[name] for name in copied},
        )


class EndpointEstimate(BaseModel):
    """The questions to an endpoint, at most."""

    field: str
    role: Literal["writer", "judge"]
    model: str
    questions: int
    input_tokens: int
    """Roughly, at four characters a token."""
    output_tokens: int
    cost: float | None
    """In the currency of its `price`; null without one."""


class LabellingEstimate(BaseModel):
    """The answers and questions of a labelling, at most. Equal answers are asked about once, so it may be less."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "labelling.estimate",
                "prompts": 1000,
                "answers": 4000,
                "sampled_tokens": 1024000,
                "endpoints": [],
                "cost": None,
                "warnings": [],
            }
        }
    )

    object: Literal["labelling.estimate"] = "labelling.estimate"
    prompts: int
    answers: int
    sampled_tokens: int
    """Tokens that models of the service write."""
    endpoints: list[EndpointEstimate]
    cost: float | None
    """The sum over all endpoints; null if none has a price."""
    warnings: list[str]


class LabelTask(BaseModel):
    """An item to label. The answers are in an order that is drawn for each annotator."""

    item: int
    prompt: str
    answers: list[str]
    reserved_until: int
    """Until then nobody else gets it."""


class Given(BaseModel):
    """The next item for an annotator. `task` is null if there is none: all are done, or others have them."""

    object: Literal["labelling.given"] = "labelling.given"
    name: str | None
    guideline: str | None
    open: bool
    """Whether people may label at present."""
    task: LabelTask | None
    done: int
    """Items that the annotator has labelled, skipped or flagged."""
    items: int


Group = Annotated[list[int], Field(min_length=1, max_length=MAX_SHOWN)]


class VerdictSpec(Defaulted):
    """The body of `POST /v1/labellings/{id}/verdicts`: a ranking, or that the item is skipped or flagged."""

    model_config = ConfigDict(json_schema_extra={"example": {"item": 3, "ranking": [[1], [0, 2]]}})

    item: Annotated[int, Field(ge=0, le=2**31 - 1)]
    ranking: Annotated[list[Group], Field(min_length=1, max_length=MAX_SHOWN)] | None = None
    """Groups of answers, the best first. An answer is its place in the order that was shown, from 0. The answers of a
    group are equally good."""
    skip: Literal[True] | None = None
    flag: Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=NO_NUL)] | None = None
    """The reason for a flag. Nobody else gets the item, and it is left out of the file."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(value is not None for value in (self.ranking, self.skip, self.flag)) != 1:
            raise inconsistent("ranking", "A verdict is a 'ranking', a 'skip' or a 'flag': one of them")
        return self

    def placed(self, order: Sequence[int]) -> list[list[int]] | None:
        """The ranking by the places of the answers in the item. `order` is that in which they were shown.

        Raises `ServiceError` unless it has each answer once.
        """
        if self.ranking is None:
            return None
        if sorted(place for group in self.ranking for place in group) != list(range(len(order))):
            message = f"A ranking has each of the {len(order)} answers once: 0 to {len(order) - 1}."
            raise ServiceError(message, param="ranking", code="invalid_value")
        return [sorted(order[place] for place in group) for group in self.ranking]


class VerdictObject(BaseModel):
    """A verdict, for those who own the labelling. A ranking has the places of the answers in the item."""

    id: str
    object: Literal["labelling.verdict"] = "labelling.verdict"
    created_at: int
    annotator: str
    item: int
    ranking: list[list[int]] | None
    flag: str | None
    skipped: bool
    withdrawn_at: int | None

    @classmethod
    def of(cls, verdict: LabelVerdict, annotator: str) -> "VerdictObject":
        return cls(
            id=verdict.id,
            created_at=int(verdict.created_at),
            annotator=annotator,
            item=verdict.number,
            ranking=verdict.ranking,
            flag=verdict.flag,
            skipped=verdict.ranking is None and verdict.flag is None,
            withdrawn_at=unix_seconds(verdict.withdrawn_at),
        )


class Annotator(BaseModel):
    """A person, and the number of verdicts of each kind."""

    name: str
    verdicts: int
    skips: int
    flags: int


class PeopleState(BaseModel):
    """How far the people of a labelling are."""

    object: Literal["labelling.people"] = "labelling.people"
    open: bool
    """Whether people may label at present."""
    items: int
    flagged: int
    wanted: int
    """Verdicts that are wanted in all."""
    verdicts: int
    annotators: list[Annotator]


class Verdicts(BaseModel):
    """All verdicts of a labelling, oldest first."""

    object: Literal["list"] = "list"
    data: list[VerdictObject]
