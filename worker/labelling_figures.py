"""The figures of labellings, computed from their items. Pure functions.

`report` returns all figures, nested, for people. `metrics` returns the numbers among them by name.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy

from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec
from app.spec.metrics import INTERVAL, LABELLING
from worker import confidence
from worker.answers import row_of, writer_names
from worker.comparisons import SIDES
from worker.confidence import Floats
from worker.evaluation_figures import shown

Figures = JsonObject
Scores = Sequence[float | None]
FIRST, SECOND, TIE = range(3)


def report(spec: LabellingSpec, items: Iterable[JsonObject]) -> Figures:
    """The figures of a labelling. The first labeller's scores decide the order of the answers."""
    titles = [labeller.title for labeller in spec.labellers]
    counts = dict.fromkeys(("prompts", "rows", "answers", "repeated", "missing", "unlabelled"), 0)
    pairs = {names: list[Floats]() for names in combinations(titles, 2)}
    margins, longer, writers = list[float](), list[tuple[float, float]](), _Writers(spec)
    asked = {title: _Asked() for title, labeller in zip(titles, spec.labellers, strict=True) if labeller.asked}
    people = _People() if spec.people is not None else None
    scores, prompts = list[float](), list[int]()
    for number, item in enumerate(items):
        labels, texts = item["labels"], [answer["text"].strip() for answer in item["answers"]]
        first: Scores = labels[titles[0]]["scores"]
        counts["prompts"] += 1
        counts["rows"] += row_of(spec, item) is not None
        counts["answers"] += len(texts)
        counts["repeated"] += item["repeated"]
        counts["missing"] += item["empty"]
        counts["unlabelled"] += first.count(None)
        known = [score for score in first if score is not None]
        scores += known
        prompts += [number] * len(known)
        if len(set(known)) > 1:
            margins.append(max(known) - min(known))
        longer.append(_longer(texts, first))
        writers.add(item["answers"], first)
        for title, entry in asked.items():
            entry.add(labels[title]["verdicts"])
        if people is not None:
            people.add(labels[next(one.title for one in spec.labellers if one.people is not None)])
        for (one, other), tables in pairs.items():
            tables.append(_table(labels[one]["scores"], labels[other]["scores"]))
    figures: Figures = dict(counts)
    if scores and spec.labellers[0].scores:
        figures["score"] = shown(confidence.mean(scores, prompts))
    if margins:
        figures["margin"] = shown(confidence.mean(margins))
    sums, cases = numpy.array(longer).reshape(-1, 2).T
    if cases.any():
        figures["longer_preferred"] = shown(confidence.share(sums[cases > 0], cases[cases > 0]))
    figures["writers"] = writers.figures()
    figures["labellers"] = [
        {"name": title, "kind": labeller.kind, **(asked[title].figures() if title in asked else {})}
        for title, labeller in zip(titles, spec.labellers, strict=True)
    ]
    figures["agreement"] = [
        {"labellers": list(names), **_agreement(numpy.array(tables))} for names, tables in pairs.items()
    ]
    if people is not None:
        figures["people"] = people.figures()
    return figures


def _longer(texts: Sequence[str], scores: Scores) -> tuple[float, float]:
    """(points, pairs): how often the longer one of two answers has the higher score. Equal lengths and ties count ½."""
    points, pairs = 0.0, 0
    for (text, score), (other, other_score) in combinations(zip(texts, scores, strict=True), 2):
        if score is not None and other_score is not None:
            points += 0.5 + 0.5 * float(numpy.sign((len(text) - len(other)) * (score - other_score)))
            pairs += 1
    return points, float(pairs)


def _table(one: Scores, other: Scores) -> Floats:
    """How two labellers order every two answers of a prompt [3, 3]: the one's class in rows, the other's in columns.

    The order of two answers says nothing, so each pair counts in both orders.
    """
    table = numpy.zeros((3, 3))
    for (a, b), (c, d) in combinations(zip(one, other, strict=True), 2):
        if None in (a, b, c, d):
            continue
        for sign in (1, -1):
            table[_class(sign * _sign(a, c)), _class(sign * _sign(b, d))] += 1
    return table


def _sign(first: float | None, second: float | None) -> int:
    assert first is not None
    assert second is not None
    return (first > second) - (first < second)


def _class(sign: int) -> int:
    return {1: FIRST, -1: SECOND, 0: TIE}[sign]


def _agreement(tables: Floats, orders: int = 2) -> Figures:
    """Raw agreement and Cohen's κ from tables [prompts, 3, 3], which have each case in so many orders."""
    tables = tables.reshape(-1, 3, 3)
    tables = tables[tables.any((1, 2))]
    if not len(tables):
        return {"pairs": 0}
    return {
        "pairs": int(tables.sum()) // orders,
        "agreement": shown(confidence.share(numpy.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))),
        "kappa": shown(confidence.kappa(tables)),
    }


class _Asked:
    """The verdicts of a judge that is asked."""

    def __init__(self) -> None:
        self.pairs = self.unparseable = self.inconsistent = 0
        self.first: list[float] = []
        self.prompts: list[int] = []
        self._prompt = 0

    def add(self, verdicts: Sequence[Sequence[str | None]]) -> None:
        """Add the verdicts on the answers to a prompt."""
        for pair in verdicts:
            self.pairs += 1
            self.unparseable += None in pair
            self.inconsistent += set(SIDES) == set(pair)
            for verdict, shown_first in zip(pair, SIDES, strict=True):
                if verdict in SIDES:
                    self.first.append(float(verdict == shown_first))
                    self.prompts.append(self._prompt)
        self._prompt += 1

    def figures(self) -> Figures:
        figures: Figures = {
            "pairs": self.pairs, "unparseable": self.unparseable, "inconsistent": self.inconsistent
        }  # fmt: skip
        if self.first:
            figures["first_shown_preferred"] = shown(confidence.mean(self.first, self.prompts))
        return figures


class _People:
    """The verdicts of people, and how they agree."""

    def __init__(self) -> None:
        self.verdicts = Counter[str]()
        self.flagged = 0
        self._tables: list[Floats] = []

    def add(self, label: JsonObject) -> None:
        """Add the label of an item. Each two people who labelled it are compared."""
        self.verdicts.update(label["people"].keys())
        self.flagged += bool(label["flags"])
        tables = [_table(one, other) for one, other in combinations(label["people"].values(), 2)]
        # Two people have no order, so each two count in both orders.
        self._tables.append(sum((table + table.T for table in tables), numpy.zeros((3, 3))))

    def figures(self) -> Figures:
        return {
            "verdicts": self.verdicts.total(),
            "flagged": self.flagged,
            "annotators": [{"name": name, "verdicts": number} for name, number in sorted(self.verdicts.items())],
            **_agreement(numpy.array(self._tables), orders=4),
        }


class _Writers:
    """The answers of each writer, and how they were labelled."""

    def __init__(self, spec: LabellingSpec) -> None:
        self.names = writer_names(spec)
        self._scores: dict[int, list[float]] = {number: [] for number in self.names}
        self._characters: dict[int, list[int]] = {number: [] for number in self.names}
        self._best = dict.fromkeys(self.names, 0.0)
        self._ended = dict.fromkeys(self.names, 0)

    def add(self, answers: Sequence[JsonObject], scores: Scores) -> None:
        """Add the answers to a prompt. Several best answers share the point for the best."""
        best = max((score for score in scores if score is not None), default=None)
        tops = scores.count(best)
        for answer, score in zip(answers, scores, strict=True):
            writer = answer["writer"]
            self._characters[writer].append(len(answer["text"].strip()))
            self._ended[writer] += answer["ended"]
            if score is not None:
                self._scores[writer].append(score)
                self._best[writer] += (score == best) / tops

    def figures(self) -> list[Figures]:
        return [
            {
                "name": name,
                "answers": len(characters),
                "best": self._best[number],
                "characters": sum(characters) / len(characters),
                "ended": self._ended[number] / len(characters),
                **({"score": sum(scores) / len(scores)} if (scores := self._scores[number]) else {}),
            }
            for number, name in self.names.items() if (characters := self._characters[number])
        ]  # fmt: skip


def metrics(spec: LabellingSpec, report: Figures) -> dict[str, float]:
    """The numbers of a report by the names of `app.spec.metrics.LABELLING`."""
    first = spec.labellers[0].title
    (own,) = [entry for entry in report["labellers"] if entry["name"] == first]
    numbers = dict[str, float]()
    for name in LABELLING:
        if name in ("agreement", "kappa"):
            for entry in report["agreement"]:
                one, other = entry["labellers"]
                if one == first and name in entry:
                    numbers |= _numbers(name, entry[name], f"@{other}")
        elif name.startswith("people/"):
            if (value := report.get("people", {}).get(name.split("/")[1])) is not None:
                numbers |= _numbers(name, value)
        elif name.startswith("endpoints/"):
            values = [entry[part] for entry in report.get("endpoints", []) if (part := name.split("/")[1]) in entry]
            numbers |= {name: float(sum(values))} if values else {}
        elif (value := report.get(name, own.get(name))) is not None:
            numbers |= _numbers(name, value)
    return numbers


def _numbers(name: str, value: float | Figures, mark: str = "") -> dict[str, float]:
    if not isinstance(value, dict):
        return {f"{name}{mark}": float(value)}
    parts = {f"{name}/{part}{mark}": value[part] for part in INTERVAL if part in value}
    return ({f"{name}{mark}": value["value"]} if "value" in value else {}) | parts


def summary(numbers: dict[str, float]) -> str:
    """The most important metrics in one line."""
    names = {name for name, metric in LABELLING.items() if metric.summary}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name.split("@")[0] in names)
