"""The figures of evaluations, computed from the items that the engine and a judge have left. Pure functions.

`report` returns all figures, nested, for people. `flatten` returns the numbers among them by name, for gates, lists
and dashboards.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy

from app.spec.evaluation import EvaluationSpec, Price
from app.spec.json_types import JsonObject
from app.spec.metrics import EVALUATION
from worker import confidence
from worker.confidence import Floats, IntervalEstimate

Item = JsonObject
"""One pair, completion or comparison: a line of `items.jsonl` without its texts."""
Figures = JsonObject
"""A part of a report, as JSON."""
LENGTH_GROUPS = 5


def report(spec: EvaluationSpec, items: Sequence[Item]) -> Figures:
    """The figures of an evaluation. `items` must not be empty."""
    types = {"preference": preference, "reward_kl": reward_kl, "win_rate": win_rate, "agreement": agreement}
    bounds = {
        name: {"n": side.best_of.n, "kl_bound": side.best_of.kl_bound}
        for name in ("candidate", "baseline")
        if (side := getattr(spec, name)) is not None and side.best_of is not None
    }
    models = {name: side.model for name in ("candidate", "baseline") if (side := getattr(spec, name)) and side.model}
    return {"type": spec.type, "models": models} | ({"best_of": bounds} if bounds else {}) | types[spec.type](items)


def preference(items: Sequence[Item]) -> Figures:
    """Accuracy, size and calibration of the implicit reward margins, and how they depend on the answers' lengths.

    The margin is r̂(chosen) − r̂(rejected) with r̂ = β log(π/π_ref) (Rafailov et al. 2023, eq. 5). π_ref is the baseline.
    """
    margins = numpy.array([item["margin"] for item in items])
    longer = [float(item["tokens"][0] - item["tokens"][1]) for item in items]
    prompts = [item["prompt_number"] for item in items]
    longer_preferred = confidence.accuracy_points(margins * numpy.array(longer))
    right = confidence.accuracy_points(margins)
    error, bins = confidence.calibration(margins)
    logps = numpy.array([item["logps"] for item in items])
    reference = numpy.array([item["reference_logps"] for item in items])
    return {
        "pairs": len(items),
        "accuracy": shown(confidence.rate(right, prompts)),
        "margin": shown(confidence.mean(margins, prompts)),
        "chosen_logratio": shown(confidence.mean(logps[:, 0] - reference[:, 0], prompts)),
        "rejected_logratio": shown(confidence.mean(logps[:, 1] - reference[:, 1], prompts)),
        "calibration": {"error": error, "bins": [asdict(entry) for entry in bins]},
        "by_length": by_length(longer, right.tolist(), prompts),
        "longer_answer_preferred": shown(confidence.rate(longer_preferred, prompts)),
    }


def by_length(differences: Sequence[float], points: Sequence[float], prompts: Sequence[int]) -> list[Figures]:
    """The mean of `points` in groups of equal size, ordered by how much longer the first answer is."""
    order = numpy.argsort(numpy.array(differences), kind="stable")
    groups = [group for group in numpy.array_split(order, LENGTH_GROUPS) if len(group)]
    return [
        {
            "least": float(differences[group[0]]),
            "most": float(differences[group[-1]]),
            "count": len(group),
            "rate": shown(confidence.rate([points[k] for k in group], [prompts[k] for k in group])),
        }
        for group in groups
    ]


def reward_kl(items: Sequence[Item]) -> Figures:
    """Mean reward and sequence-level KL(π‖π_ref) at each temperature, over prompts.

    The KL is estimated by its definition, E_{y∼π}[log π(y|x) − log π_ref(y|x)]. Here π is the distribution that was
    sampled from, with its temperature and truncation. For best of N it cannot be sampled, so its bound is reported.
    """
    temperatures, has_rewards = [], "reward" in items[0]
    for temperature in sorted({item["temperature"] for item in items}):
        sampled = [item for item in items if item["temperature"] == temperature]
        prompts = [item["prompt_number"] for item in sampled]
        rewards = [item["reward"] for item in sampled] if has_rewards else []
        temperatures.append(
            {
                "temperature": temperature,
                "completions": len(sampled),
                **({"reward": shown(confidence.mean(rewards, prompts))} if rewards else {}),
                "kl": shown(confidence.mean([_kl(item) for item in sampled], prompts)),
                "tokens": shown(confidence.mean([item["tokens"] for item in sampled], prompts)),
                "ended": sum(item["ended"] for item in sampled) / len(sampled),
            }
        )
    return {"temperatures": temperatures}


def _kl(item: Item) -> float:
    kl: float = item["kl_bound"] if "kl_bound" in item else item["logp"] - item["reference_logp"]
    return kl


def win_rate(items: Sequence[Item]) -> Figures:
    """The candidate's win rate at each temperature, and how it depends on the answers' lengths.

    Items without a temperature compare answers that were not sampled here.
    """
    sides = ("candidate", "baseline")
    figures, temperatures = [], {item["temperature"] for item in items}
    for temperature in sorted(temperatures, key=lambda value: -1.0 if value is None else value):
        compared = [item for item in items if item["temperature"] == temperature]
        judged = [(item, point) for item in compared if (point := preferred(item, sides)) is not None]
        figures.append(
            {
                "temperature": temperature,
                "comparisons": len(compared),
                **{f"{side}_characters": shown(_characters(compared, side)) for side in sides},
                **(_win_figures(*map(list, zip(*judged, strict=True))) if judged else {}),
                **_order_effects(compared),
            }
        )
    return {"temperatures": figures}


def _win_figures(items: list[Item], points: list[float]) -> Figures:
    """The figures of judged comparisons. `points` are those of `preferred`."""
    prompts, array = [item["prompt_number"] for item in items], numpy.array(points)
    longer = [float(item["candidate_characters"] - item["baseline_characters"]) for item in items]
    longer_wins = confidence.accuracy_points((array - 0.5) * numpy.array(longer))
    return {
        "win_rate": shown(confidence.win_rate(array, prompts)),
        "wins": int((array == 1).sum()),
        "ties": int((array == 0.5).sum()),
        "losses": int((array == 0).sum()),
        "longer_answer_wins": shown(confidence.rate(longer_wins, prompts)),
        "by_length": by_length(longer, points, prompts),
    }


def _characters(items: Sequence[Item], side: str) -> IntervalEstimate:
    return confidence.mean([item[f"{side}_characters"] for item in items], [item["prompt_number"] for item in items])


def preferred(item: Item, sides: tuple[str, str]) -> float | None:
    """1 if the judge prefers the first of `sides`, 0 for the second, ½ for neither; None if there is no verdict.

    A judge that was asked in both orders prefers a side if it names this side at least once and never the other.
    """
    if "verdicts" in item:
        if None in item["verdicts"]:
            return None
        balance = sum((verdict == sides[0]) - (verdict == sides[1]) for verdict in item["verdicts"])
        return float(numpy.sign(balance) + 1) / 2
    if f"{sides[0]}_reward" not in item:
        return None
    return float(numpy.sign(item[f"{sides[0]}_reward"] - item[f"{sides[1]}_reward"]) + 1) / 2


def _order_effects(items: Sequence[Item]) -> Figures:
    """Unreadable and inconsistent verdicts, and how often a judge prefers the answer shown first.

    Empty for a judge that scores answers and is not asked.
    """
    if "verdicts" not in items[0]:
        return {}
    sides = ("first", "second") if "first_characters" in items[0] else ("candidate", "baseline")
    asked = [item for item in items if item["asked"]]
    orders = [(item, verdict, shown) for item in asked
              for verdict, shown in zip(item["verdicts"], sides, strict=True) if verdict in sides]  # fmt: skip
    figures: Figures = {
        "identical": len(items) - len(asked),
        "unparseable": sum(None in item["verdicts"] for item in asked),
        "inconsistent": sum(set(sides) == set(item["verdicts"]) for item in asked),
    }
    if orders:
        shown_first = [float(verdict == shown) for _, verdict, shown in orders]
        figures["first_shown_preferred"] = shown(
            confidence.mean(shown_first, [item["prompt_number"] for item, _, _ in orders])
        )
    return figures


CLASSES = ("first", "second", "tie")
_Opinion = tuple[Item, float, int]
"""(item, points as `preferred` gives them, number of votes that say so)."""


def agreement(items: Sequence[Item]) -> Figures:
    """Agreement among people, and between people and the judge (Rafailov et al. 2023, Table 2).

    Both have the raw agreement and Cohen's κ. Each pair of votes on the same answers is a case, and so is each vote
    together with the judge's verdict. A judge that prefers neither agrees with nobody; `without_ties` leaves these
    cases out. Cases are counted in a table [3, 3] per prompt: rows are one rater's class, columns the other's.
    """
    shape = (len({item["prompt_number"] for item in items}), len(CLASSES), len(CLASSES))
    table_of = {number: k for k, number in enumerate(dict.fromkeys(item["prompt_number"] for item in items))}
    people, judged = numpy.zeros(shape), numpy.zeros(shape)
    votes, opinions = list[_Opinion](), list[_Opinion]()
    for item in items:
        first, second = item["votes"]
        # Two people have no order, so each pair counts in both orders.
        people[table_of[item["prompt_number"]], :2, :2] += [
            [first * (first - 1), first * second], [first * second, second * (second - 1)]
        ]  # fmt: skip
        votes += [(item, 1.0, first), (item, 0.0, second)]
        point = preferred(item, ("first", "second"))
        if point is not None:
            judged[table_of[item["prompt_number"]], {1.0: 0, 0.0: 1, 0.5: 2}[point], :2] += [first, second]
            opinions.append((item, point, first + second))
    figures: Figures = {
        "comparisons": len(items),
        "votes": int(sum(sum(item["votes"]) for item in items)),
        "people_prefer_longer": shown(_longer(votes)),
    }
    if people.any():
        figures["people_people"] = _agreement(people) | {"cases": int(people.sum()) // 2}
    if opinions:
        clear = judged.copy()
        clear[:, CLASSES.index("tie")] = 0
        figures["judge_people"] = _agreement(judged) | ({"without_ties": _agreement(clear)} if clear.any() else {})
        figures["judge_prefers_longer"] = shown(_longer(opinions))
    return figures | _order_effects(items)


def _agreement(tables: Floats) -> Figures:
    tables = tables[tables.any((1, 2))]
    return {
        "cases": int(tables.sum()),
        "agreement": shown(confidence.share(numpy.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))),
        "kappa": shown(confidence.kappa(tables)),
    }


def _longer(opinions: Sequence[_Opinion]) -> IntervalEstimate:
    """How often the longer answer is preferred. Equal lengths and ties count ½."""
    sums, counts = dict[int, float](), dict[int, float]()
    for item, point, count in opinions:
        longer = float(numpy.sign((point - 0.5) * (item["first_characters"] - item["second_characters"])) + 1) / 2
        number = item["prompt_number"]
        sums[number] = sums.get(number, 0.0) + count * longer
        counts[number] = counts.get(number, 0.0) + count
    return confidence.share(numpy.array(list(sums.values())), numpy.array(list(counts.values())))


def judge_usage(price: Price | None, tokens: Sequence[tuple[int, int]]) -> Figures:
    """Answers, tokens and cost of a judge. `tokens` are (input, output) of each answer; `price` is per million."""
    counts = [sum(column) for column in zip(*tokens, strict=True)] or [0, 0]
    usage: Figures = {"answers": len(tokens), "input_tokens": counts[0], "output_tokens": counts[1]}
    if price is not None:
        usage["cost"] = (counts[0] * price.input + counts[1] * price.output) / 1e6
    return usage


def summary(report: Figures) -> str:
    """The most important figures of a report in one line."""
    shown = {name for name, metric in EVALUATION.items() if metric.summary}
    numbers = flatten(report)
    return ", ".join(
        f"{name} {number:.4g}" + (f" ± {numbers[error]:.2g}" if (error := _error(name)) in numbers else "")
        for name, number in numbers.items() if name.split("@")[0] in shown
    )  # fmt: skip


def _error(name: str) -> str:
    """The name of a figure's standard error."""
    kind, mark, temperature = name.partition("@")
    return f"{kind}/error{mark}{temperature}"


def flatten(report: Figures, prefix: str = "") -> dict[str, float]:
    """The numbers of a report by name: `accuracy`, `accuracy/low`, …; with several temperatures also `kl@0.7`."""
    numbers: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, bool) or name in ("by_length", "bins"):
            continue
        if isinstance(value, int | float) and name != "temperature":
            numbers[prefix + name] = float(value)
        elif isinstance(value, dict) and "value" in value:
            numbers[prefix + name] = value["value"]
            numbers |= {f"{prefix}{name}/{part}": value[part] for part in ("error", "low", "high") if part in value}
        elif isinstance(value, dict):
            numbers |= flatten(value, f"{prefix}{name}/")
        elif name == "temperatures":
            for figures in value:
                mark = "" if len(value) == 1 else f"@{figures['temperature']:g}"
                numbers |= {key + mark: number for key, number in flatten(figures, prefix).items()}
    return numbers


def shown(estimate: IntervalEstimate) -> dict[str, float]:
    """An estimate as JSON, which has no NaN: unknown numbers are left out."""
    return {name: value for name, value in asdict(estimate).items() if not math.isnan(value)}
