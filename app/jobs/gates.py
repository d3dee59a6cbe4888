"""Gates: what metrics must be at the end of a job."""

from typing import Any

from app.jobs.spec import JobSpec


def judge(spec: JobSpec, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """The gates with their verdicts. A metric that was not measured meets nothing."""
    verdicts = []
    for gate in spec.gates or []:
        value = metrics.get(gate.metric)
        met = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
        verdicts.append(gate.model_dump() | {"value": value, "met": met})
    return verdicts


def summary(verdicts: list[dict[str, Any]]) -> str:
    """A sentence for people."""
    missed = [verdict for verdict in verdicts if not verdict["met"]]
    if not missed:
        return "The gate is met." if len(verdicts) == 1 else f"All {len(verdicts)} gates are met."
    told = []
    for gate in missed:
        value = "was not measured" if gate["value"] is None else f"is {gate['value']:.6g}"
        bounds = [
            f"{word} {gate[end]:g}" for word, end in (("at least", "min"), ("at most", "max")) if gate[end] is not None
        ]
        told.append(f"{gate['metric']} {value}, should be {' and '.join(bounds)}")
    return f"{len(missed)} of {len(verdicts)} gates not met: {'; '.join(told)}."
