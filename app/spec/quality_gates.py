"""Gates: bounds on the final metrics. A missed gate changes no outcome: it is reported, so that CI can act on it."""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from app.spec.json_types import JsonObject
from app.spec.schema_base import NO_NUL, Strict, did_you_mean, inconsistent


class Gate(Strict):
    """Bounds on a final metric. If the metric misses them, the job still succeeds and the model is kept."""

    metric: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise inconsistent("min", "A gate needs a 'min', a 'max', or both")
        return self


def require_metric(metric: str, known: Sequence[str], field: str) -> None:
    """Refuse a metric that will not be measured: `known` names all that will be."""
    if metric not in known:
        message = f"There is no metric '{metric}'.{did_you_mean(metric, known)}"
        raise inconsistent(field, message.removesuffix("."))


Gates = Annotated[list[Gate], Field(max_length=32)]
Verdict = JsonObject
"""A gate with the metric's `value` and whether it is `met`. Both are null while the metric is still to be measured."""


def judge(gates: Sequence[Gate], metrics: dict[str, float], pending: Sequence[str] = ()) -> list[Verdict]:
    """The verdict of each gate. A metric that was not measured meets no gate.

    `pending`: name prefixes of the metrics that are still to be measured.
    """
    verdicts = []
    for gate in gates:
        if gate.metric.startswith(tuple(pending)):
            verdicts.append(gate.model_dump() | {"value": None, "met": None})
            continue
        value = metrics.get(gate.metric)
        met = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        verdicts.append(gate.model_dump() | {"value": value, "met": met})
    return verdicts


def level(verdicts: Sequence[Verdict]) -> str:
    """The level of the event that reports the verdicts: `warn` if a gate is missed."""
    return "warn" if any(verdict["met"] is False for verdict in verdicts) else "info"


def summary(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in one or two sentences."""
    missed = [verdict for verdict in verdicts if verdict["met"] is False]
    waiting, count = sum(verdict["met"] is None for verdict in verdicts), len(verdicts)
    sentences = []
    if missed:
        sentences.append(f"{len(missed)} of {count} gates not met: {'; '.join(map(_describe_miss, missed))}.")
    elif count > waiting:
        sentences.append("The gate is met." if count == 1 else f"{count - waiting} of {count} gates are met.")
    if waiting:
        sentences.append(f"{waiting} of {count} gates wait for evaluations.")
    return " ".join(sentences)


def _describe_miss(verdict: Verdict) -> str:
    value = "was not measured" if verdict["value"] is None else f"is {verdict['value']:.6g}"
    phrases = (("at least", "min"), ("at most", "max"))
    bounds = [f"{phrase} {verdict[bound]:g}" for phrase, bound in phrases if verdict[bound] is not None]
    return f"{verdict['metric']} {value}, should be {' and '.join(bounds)}"
