"""Figures of evaluations, from what the engine (and a judge) said of each pair or completion. Pure functions.

`report` gives all of them, for people; `flat` those that have one number, for gates, lists and dashboards.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy

from app.spec.evaluation import EvaluationSpec, Price
from app.spec.metrics import EVALUATION
from worker import confidence
from worker.confidence import Floats, IntervalEstimate

Item = dict[str, Any]
Report = dict[str, Any]
LENGTH_GROUPS = 5


def report(spec: EvaluationSpec, items: Sequence[Item]) -> Report:
    """The figures of an evaluation. `items` must not be empty."""
    of = {"preference": preference, "reward_kl": reward_kl, "win_rate": win_rate, "agreement": agreement}[spec.type]
    bounds = {
        name: {"n": side.best_of.n, "kl_bound": side.best_of.kl_bound}
        for name in ("candidate", "baseline")
        if (side := getattr(spec, name)) is not None and side.best_of is not None
    }
    named = {name: side.model for name in ("candidate", "baseline") if (side := getattr(spec, name)) and side.model}
    return {"type": spec.type, "models": named} | ({"best_of": bounds} if bounds else {}) | of(items)


def preference(items: Sequence[Item]) -> Report:
    """Of implicit reward margins: how often right, how large, how well calibrated, and whether length explains it."""
    margins = numpy.array([item["margin"] for item in items])
    longer = [float(item["tokens"][0] - item["tokens"][1]) for item in items]
    prompts = [item["prompt_number"] for item in items]
    longer_preferred = confidence.accuracy_points(margins * numpy.array(longer))
    right = confidence.accuracy_points(margins)
    error, bins = confidence.calibration(margins)
    logps = numpy.array([item["logps"] for item in items])
    before = numpy.array([item["reference_logps"] for item in items])
    return {
        "pairs": len(items),
        "accuracy": _shown(confidence.rate(right, prompts)),
        "margin": _shown(confidence.mean(margins, prompts)),
        "chosen_logratio": _shown(confidence.mean(logps[:, 0] - before[:, 0], prompts)),
        "rejected_logratio": _shown(confidence.mean(logps[:, 1] - before[:, 1], prompts)),
        "calibration": {"error": error, "bins": [asdict(one) for one in bins]},
        "by_length": by_length(longer, right.tolist(), prompts),
        "longer_answer_preferred": _shown(confidence.rate(longer_preferred, prompts)),
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
            "rate": _shown(confidence.rate([points[k] for k in group], [prompts[k] for k in group])),
        }
        for group in groups
    ]


def reward_kl(items: Sequence[Item]) -> Report:
    """Mean reward and KL(π‖π_ref) at each temperature, over prompts.

    The KL of sequences is estimated by its definition, E_{y∼π}[log π(y|x) − log π_ref(y|x)], where π is the
    distribution that was sampled from, tempered and cut as it was. For best of N the bound stands in its place, since
    nobody can sample the KL.
    """
    found, judged = [], "reward" in items[0]
    for temperature in sorted({item["temperature"] for item in items}):
        of = [item for item in items if item["temperature"] == temperature]
        prompts = [item["prompt_number"] for item in of]
        found.append(
            {
                "temperature": temperature,
                "completions": len(of),
                **({"reward": _shown(confidence.mean([item["reward"] for item in of], prompts))} if judged else {}),
                "kl": _shown(confidence.mean([_kl(item) for item in of], prompts)),
                "tokens": _shown(confidence.mean([item["tokens"] for item in of], prompts)),
                "ended": sum(item["ended"] for item in of) / len(of),
            }
        )
    return {"temperatures": found}


def _kl(item: Item) -> float:
    bound: float = item["kl_bound"] if "kl_bound" in item else item["logp"] - item["reference_logp"]
    return bound


def win_rate(items: Sequence[Item]) -> Report:
    """How often the candidate's answer is the better one, at each temperature; and whether length explains it."""
    found, temperatures = [], {item["temperature"] for item in items}
    for temperature in sorted(temperatures, key=lambda value: -1.0 if value is None else value):
        of = [item for item in items if item["temperature"] == temperature]
        judged = [(item, point) for item in of if (point := preferred(item, ("candidate", "baseline"))) is not None]
        found.append(
            {
                "temperature": temperature,
                "comparisons": len(of),
                **{f"{side}_characters": _shown(_characters(of, side)) for side in ("candidate", "baseline")},
                **(_won(*map(list, zip(*judged, strict=True))) if judged else {}),
                **_asked_in_both_orders(of),
            }
        )
    return {"temperatures": found}


def _won(items: list[Item], points: list[float]) -> Report:
    prompts, given = [item["prompt_number"] for item in items], numpy.array(points)
    longer = [float(item["candidate_characters"] - item["baseline_characters"]) for item in items]
    longer_wins = confidence.accuracy_points((given - 0.5) * numpy.array(longer))
    return {
        "win_rate": _shown(confidence.win_rate(given, prompts)),
        "wins": int((given == 1).sum()),
        "ties": int((given == 0.5).sum()),
        "losses": int((given == 0).sum()),
        "longer_answer_wins": _shown(confidence.rate(longer_wins, prompts)),
        "by_length": by_length(longer, points, prompts),
    }


def _characters(items: Sequence[Item], side: str) -> IntervalEstimate:
    return confidence.mean([item[f"{side}_characters"] for item in items], [item["prompt_number"] for item in items])


def preferred(item: Item, sides: tuple[str, str]) -> float | None:
    """1 where the judge prefers the first of `sides`, 0 the second, ½ neither; None where it was not understood.

    One that was asked in both orders prefers a side where it says so at least once and never says the other.
    """
    if "verdicts" in item:
        if None in item["verdicts"]:
            return None
        return float(numpy.sign(sum((one == sides[0]) - (one == sides[1]) for one in item["verdicts"])) + 1) / 2
    if f"{sides[0]}_reward" not in item:
        return None
    return float(numpy.sign(item[f"{sides[0]}_reward"] - item[f"{sides[1]}_reward"]) + 1) / 2


def _asked_in_both_orders(items: Sequence[Item]) -> Report:
    """Of a judge that was asked: where it was not understood, and whether it likes what it is shown first."""
    if "verdicts" not in items[0]:
        return {}
    sides = ("first", "second") if "first_characters" in items[0] else ("candidate", "baseline")
    asked = [item for item in items if item["asked"]]
    orders = [(item, verdict, shown) for item in asked
              for verdict, shown in zip(item["verdicts"], sides, strict=True) if verdict in sides]  # fmt: skip
    found: Report = {
        "identical": len(items) - len(asked),
        "unparseable": sum(None in item["verdicts"] for item in asked),
        "inconsistent": sum(set(sides) == set(item["verdicts"]) for item in asked),
    }
    if orders:
        shown_first = [float(verdict == shown) for _, verdict, shown in orders]
        found["first_shown_preferred"] = _shown(
            confidence.mean(shown_first, [item["prompt_number"] for item, _, _ in orders])
        )
    return found


CLASSES = ("first", "second", "tie")
_Opinion = tuple[Item, float, int]
"""An item, whether its first answer is preferred (1, 0, or ½ for neither), and how often that was said."""


def agreement(items: Sequence[Item]) -> Report:
    """People against each other, and the judge against people: raw agreement and Cohen's κ (paper, Table 2).

    Each two votes on the same answers are a case, and so is each vote beside what the judge says. A judge that prefers
    neither agrees with nobody; `without_ties` leaves it out. Cases are counted, in a table [3, 3] for each prompt: who
    says what in its rows, and in its columns what the other one says.
    """
    shape = (len({item["prompt_number"] for item in items}), len(CLASSES), len(CLASSES))
    place = {number: k for k, number in enumerate(dict.fromkeys(item["prompt_number"] for item in items))}
    people, judged = numpy.zeros(shape), numpy.zeros(shape)
    votes, opinions = list[_Opinion](), list[_Opinion]()
    for item in items:
        first, second = item["votes"]
        # Nobody is the first of two people: each pair counts in both orders.
        people[place[item["prompt_number"]], :2, :2] += [
            [first * (first - 1), first * second], [first * second, second * (second - 1)]
        ]  # fmt: skip
        votes += [(item, 1.0, first), (item, 0.0, second)]
        point = preferred(item, ("first", "second"))
        if point is not None:
            judged[place[item["prompt_number"]], {1.0: 0, 0.0: 1, 0.5: 2}[point], :2] += [first, second]
            opinions.append((item, point, first + second))
    found: Report = {
        "comparisons": len(items),
        "votes": int(sum(sum(item["votes"]) for item in items)),
        "people_prefer_longer": _shown(_longer(votes)),
    }
    if people.any():
        found["people_people"] = _agreeing(people) | {"cases": int(people.sum()) // 2}
    if opinions:
        clear = judged.copy()
        clear[:, CLASSES.index("tie")] = 0
        found["judge_people"] = _agreeing(judged) | ({"without_ties": _agreeing(clear)} if clear.any() else {})
        found["judge_prefers_longer"] = _shown(_longer(opinions))
    return found | _asked_in_both_orders(items)


def _agreeing(tables: Floats) -> Report:
    tables = tables[tables.any((1, 2))]
    return {
        "cases": int(tables.sum()),
        "agreement": _shown(confidence.share(numpy.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))),
        "kappa": _shown(confidence.kappa(tables)),
    }


def _longer(opinions: Sequence[_Opinion]) -> IntervalEstimate:
    """How often the longer answer is preferred; ½ where both are as long or neither is preferred."""
    sums, counts = dict[int, float](), dict[int, float]()
    for item, point, times in opinions:
        longer = float(numpy.sign((point - 0.5) * (item["first_characters"] - item["second_characters"])) + 1) / 2
        number = item["prompt_number"]
        sums[number] = sums.get(number, 0.0) + times * longer
        counts[number] = counts.get(number, 0.0) + times
    return confidence.share(numpy.array(list(sums.values())), numpy.array(list(counts.values())))


def asked(price: Price | None, tokens: Sequence[tuple[int, int]]) -> Report:
    """What a judge's answers took: `tokens` are those of each question and its answer."""
    counts = [sum(column) for column in zip(*tokens, strict=True)] or [0, 0]
    found: Report = {"answers": len(tokens), "input_tokens": counts[0], "output_tokens": counts[1]}
    if price is not None:
        found["cost"] = (counts[0] * price.input + counts[1] * price.output) / 1e6
    return found


def summary(found: Report) -> str:
    """The figures that matter most, in a line."""
    shown = {name for name, metric in EVALUATION.items() if metric.summary}
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


def _shown(estimate: IntervalEstimate) -> dict[str, float]:
    """Without what is not known: JSON has no NaN."""
    return {name: value for name, value in asdict(estimate).items() if not math.isnan(value)}
