"""Pipelines on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.schemas import GateVerdict, JobError, shown_gates
from app.jobs.states import Status
from app.jobs.tables import Job
from app.pipelines.tables import Pipeline
from app.spec.json_types import JsonObject
from app.spec.pipeline import OUTPUTS, StageKind
from app.spec.schema_base import unix_seconds


class StageObject(BaseModel):
    """A stage in a round. Its job is under `/v1/fine_tuning/jobs`, `/v1/evaluations` or `/v1/labellings`."""

    name: str
    kind: StageKind
    id: str | None
    """The id of its job; null until it begins."""
    status: Status | Literal["waiting"]
    metrics: dict[str, float] | None
    gates: list[GateVerdict]


class RoundObject(BaseModel):
    """A round of a pipeline."""

    round: int
    variables: dict[str, str]
    stages: list[StageObject]
    model: str | None
    """The model that the round has made."""
    value: float | None
    """Its value of the metric of `best`."""


class PipelineObject(BaseModel):
    """A pipeline: its stages in each round, and its result."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "pipeline-abc123",
                "object": "pipeline",
                "created_at": 1730000000,
                "name": "iterated DPO",
                "status": "succeeded",
                "round": 3,
                "rounds": 3,
                "model": "ft:Llama-3.1-8B:default::1a2b3c4d",
            }
        }
    )

    id: str
    object: Literal["pipeline"] = "pipeline"
    created_at: int
    finished_at: int | None
    name: str | None
    status: Literal["running", "succeeded", "failed", "cancelled"]
    paused: bool
    stopped_by: Literal["gate"] | None
    """`gate` if a gate that was not met has ended it before its last round."""
    round: int
    """The round that is under way, or was last."""
    rounds: int
    history: list[RoundObject]
    """All rounds so far. In a list of pipelines, only the last one."""
    model: str | None
    """The result: the model of the best or last round that met its gates. Null if none did."""
    error: JobError | None
    spec: JsonObject
    """The body of the request, without the keys of endpoints."""
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, pipeline: Pipeline, jobs: dict[tuple[int, str], Job], only_current: bool = False) -> "PipelineObject":
        """The API object of `pipeline`. `jobs` are those of its stages, by round and name.

        `only_current`: its history has only the round under way.
        """
        results = {result["round"]: result for result in pipeline.results}
        history = []
        for number in range(pipeline.round if only_current else 1, pipeline.round + 1):
            result = results.get(number, {})
            variables = result.get("variables", pipeline.variables if number == pipeline.round else {})
            stages = [_stage(stage, jobs.get((number, stage["name"]))) for stage in pipeline.spec["stages"]]
            model, value = result.get("model"), result.get("value")
            history.append(RoundObject(round=number, variables=variables, stages=stages, model=model, value=value))
        return cls(
            id=pipeline.id,
            created_at=int(pipeline.created_at),
            finished_at=unix_seconds(pipeline.finished_at),
            name=pipeline.name,
            status=pipeline.status,
            paused=pipeline.paused,
            stopped_by=pipeline.stopped_by,
            round=pipeline.round,
            rounds=pipeline.spec["rounds"],
            history=history,
            model=pipeline.model,
            error=JobError(**pipeline.error) if pipeline.error else None,
            spec=pipeline.spec,
            metadata=pipeline.pipeline_metadata,
        )


def _stage(stage: JsonObject, job: Job | None) -> StageObject:
    kind = next(kind for kind in OUTPUTS if stage.get(kind) is not None)
    return StageObject(
        name=stage["name"],
        kind=kind,
        id=job.id if job is not None else None,
        status=Status(job.status) if job is not None else "waiting",
        metrics=job.metrics if job is not None else None,
        gates=shown_gates(job) if job is not None else [],
    )
