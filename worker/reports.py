"""Figures of evaluations, from what the engine (and a judge) said of each pair or completion. Pure functions.

`report` gives all of them, for people; `flat` those that have one number, for gates, lists and dashboards.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy

from app.evaluations.spec import EvaluationSpec
from worker import statistics
from worker.statistics import Estimate

Item = dict[str, Any]
Report = dict[str, Any]
LENGTH_GROUPS = 5


def report(spec: EvaluationSpec, items: Sequence[Item]) -> Report:
    """The figures of an evaluation. `items` must not be empty."""
    of = {"preference": preference, "reward_kl": reward_kl, "win_rate": win_rate}[spec.type]
    return {"type": spec.type} | of(items)


def preference(items: Sequence[Item]) -> Report:
    """Of implicit reward margins: how often right, how large, how well calibrated, and whether length explains it."""
    margins = numpy.array([item["margin"] for item in items])
    longer = [float(item["tokens"][0] - item["tokens"][1]) for item in items]
    prompts = [item["prompt"] for item in items]
    longer_preferred = statistics.accuracy_points(margins * numpy.array(longer))
    right = statistics.accuracy_points(margins)
    error, bins = statistics.calibration(margins)
    logps = numpy.array([item["logps"] for item in items])
    before = numpy.array([item["reference_logps"] for item in items])
    return {
        "pairs": len(items),
        "accuracy": _shown(statistics.rate(right, prompts)),
        "margin": _shown(statistics.mean(margins, prompts)),
        "chosen_logratio": _shown(statistics.mean(logps[:, 0] - before[:, 0], prompts)),
        "rejected_logratio": _shown(statistics.mean(logps[:, 1] - before[:, 1], prompts)),
        "calibration": {"error": error, "bins": [asdict(one) for one in bins]},
        "by_length": by_length(longer, right.tolist(), prompts),
        "longer_answer_preferred": _shown(statistics.mean(longer_preferred, prompts)),
    }


def by_length(differences: Sequence[float], points: Sequence[float], prompts: Sequence[int]) -> list[Report]:
    """The mean of `points` in groups of equal size by how much longer the first answer is."""
    order = numpy.argsort(numpy.array(differences), kind="stable")
    groups = [group for group in numpy.array_split(order, LENGTH_GROUPS) if len(group)]
    return [
        {
            "least": float(differences[group[0]]),
            "most": float(differences[group[-1]]),
            "count": len(group),
            "rate": _shown(statistics.mean([points[k] for k in group], [prompts[k] for k in group])),
        }
        for group in groups
    ]


def reward_kl(items: Sequence[Item]) -> Report:
    """Mean reward and KL(π‖π_ref) at each temperature, over prompts.

    The KL of sequences is estimated by its definition, E_{y∼π}[log π(y|x) − log π_ref(y|x)], where π is the
    distribution that was sampled from, tempered and cut as it was.
    """
    found = []
    for temperature in sorted({item["temperature"] for item in items}):
        of = [item for item in items if item["temperature"] == temperature]
        prompts = [item["prompt"] for item in of]
        found.append(
            {
                "temperature": temperature,
                "completions": len(of),
                "reward": _shown(statistics.mean([item["reward"] for item in of], prompts)),
                "kl": _shown(statistics.mean([item["logp"] - item["reference_logp"] for item in of], prompts)),
                "tokens": _shown(statistics.mean([item["tokens"] for item in of], prompts)),
                "ended": sum(item["ended"] for item in of) / len(of),
            }
        )
    return {"temperatures": found}


def win_rate(items: Sequence[Item]) -> Report:
    """How often the candidate's answer is the better one, at each temperature; and whether length explains it."""
    found, temperatures = [], {item["temperature"] for item in items}
    for temperature in sorted(temperatures, key=lambda value: -1.0 if value is None else value):
        of = [item for item in items if item["temperature"] == temperature]
        prompts = [item["prompt"] for item in of]
        better = numpy.array([item["candidate_reward"] - item["baseline_reward"] for item in of])
        points = statistics.accuracy_points(better)
        longer = [float(item["candidate_characters"] - item["baseline_characters"]) for item in of]
        longer_wins = statistics.accuracy_points(better * numpy.array(longer))
        found.append(
            {
                "temperature": temperature,
                "comparisons": len(of),
                "win_rate": _shown(statistics.win_rate(points, prompts)),
                "wins": int((points == 1).sum()),
                "ties": int((points == 0.5).sum()),
                "losses": int((points == 0).sum()),
                "longer_answer_wins": _shown(statistics.mean(longer_wins, prompts)),
                "by_length": by_length(longer, points.tolist(), prompts),
            }
        )
    return {"temperatures": found}


def summary(found: Report) -> str:
    """The figures that matter most, in a line."""
    shown = ("accuracy", "margin", "win_rate", "reward", "kl")
    numbers = flat(found)
    return ", ".join(
        f"{name} {number:.4g}" + (f" ± {numbers[error]:.2g}" if (error := _error(name)) in numbers else "")
        for name, number in numbers.items() if name.split("@")[0] in shown
    )  # fmt: skip


def _error(name: str) -> str:
    """The name of a figure's standard error."""
    kind, mark, temperature = name.partition("@")
    return f"{kind}/error{mark}{temperature}"


def flat(found: Report, prefix: str = "") -> dict[str, float]:
    """The numbers of a report by name: `accuracy`, `accuracy/low`, …; those of several temperatures as `kl@0.7`."""
    numbers: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, bool) or name in ("by_length", "bins"):
            continue
        if isinstance(value, int | float) and name != "temperature":
            numbers[prefix + name] = float(value)
        elif isinstance(value, dict) and "value" in value:
            numbers[prefix + name] = value["value"]
            numbers |= {f"{prefix}{name}/{part}": value[part] for part in ("error", "low", "high") if part in value}
        elif isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}/")
        elif name == "temperatures":
            for one in value:
                mark = "" if len(value) == 1 else f"@{one['temperature']:g}"
                numbers |= {key + mark: number for key, number in flat(one, prefix).items()}
    return numbers


def _shown(estimate: Estimate) -> dict[str, float]:
    """Without what is not known: JSON has no NaN."""
    return {name: value for name, value in asdict(estimate).items() if not math.isnan(value)}
