"""Gates: what metrics must be at the end. One that is not met takes nothing away: it is said, for CI to act on."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from app.spec.schema_base import NO_NUL, Strict, did_you_mean, inconsistent


class Gate(Strict):
    """What a metric must be at the end. A gate that is not met leaves the job succeeded and keeps the model."""

    metric: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _can_be_judged(self) -> Self:
        if self.min is None and self.max is None:
            raise inconsistent("min", "A gate needs a 'min', a 'max', or both")
        return self


def require_metric(metric: str, known: Sequence[str], field: str) -> None:
    """Refuse a gate on what will not be measured."""
    if metric not in known:
        message = f"There is no metric '{metric}'.{did_you_mean(metric, known)}"
        raise inconsistent(field, message.removesuffix("."))


Gates = Annotated[list[Gate], Field(max_length=32)]
Verdict = dict[str, Any]
"""A gate with its `value` and whether it is `met`: null where that is not known yet."""


def judge(gates: Sequence[Gate], metrics: dict[str, float], pending: Sequence[str] = ()) -> list[Verdict]:
    """The gates with their verdicts. A metric that was not measured meets nothing.

    `pending` are the beginnings of metrics that are still to be measured.
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
    """Of the event that tells them."""
    return "warn" if any(verdict["met"] is False for verdict in verdicts) else "info"


def summary(verdicts: Sequence[Verdict]) -> str:
    """A sentence or two for people."""
    missed = [verdict for verdict in verdicts if verdict["met"] is False]
    waiting, count = sum(verdict["met"] is None for verdict in verdicts), len(verdicts)
    told = []
    if missed:
        told.append(f"{len(missed)} of {count} gates not met: {'; '.join(map(_missed, missed))}.")
    elif count > waiting:
        told.append("The gate is met." if count == 1 else f"{count - waiting} of {count} gates are met.")
    if waiting:
        told.append(f"{waiting} of {count} gates wait for evaluations.")
    return " ".join(told)


def _missed(verdict: Verdict) -> str:
    value = "was not measured" if verdict["value"] is None else f"is {verdict['value']:.6g}"
    words = (("at least", "min"), ("at most", "max"))
    bounds = [f"{word} {verdict[end]:g}" for word, end in words if verdict[end] is not None]
    return f"{verdict['metric']} {value}, should be {' and '.join(bounds)}"
