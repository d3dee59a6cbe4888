"""Scores of a prompt's answers from comparisons of every two of them. Pure functions.

An answer's score is the share of its comparisons that it wins, where a tie counts half. Each answer is compared with
each other one, so this order is also that of the Bradley–Terry model's maximum likelihood (Ford 1957).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice

from app.spec.evaluation import Judge
from app.spec.json_types import JsonObject
from worker.judge import Sides, questions, verdicts

SIDES: Sides = ("first", "second")
Verdicts = list[str | None]
"""The verdicts on two answers in both orders: a name of `SIDES`, `tie`, or None."""


def all_questions(judge: Judge, prompt: str, answers: Sequence[str]) -> list[str]:
    """The questions about every two of the `answers`, in both orders. No two answers are equal."""
    return [question for pair in combinations(answers, 2) for question in _questions(judge, prompt, pair)]


def label(judge: Judge, prompt: str, answers: Sequence[str], replies: Iterator[str | None]) -> JsonObject:
    """The label of `answers`, from the replies to `all_questions`: the `scores`, and the `verdicts` behind them."""
    asked = [_questions(judge, prompt, pair) for pair in combinations(answers, 2)]
    found = [verdicts(list(islice(replies, len(pair))), SIDES) for pair in asked]
    return {"scores": scores(len(answers), [points(pair) for pair in found]), "verdicts": found}


def _questions(judge: Judge, prompt: str, pair: tuple[str, str]) -> list[str]:
    item: JsonObject = {"prompt": prompt} | dict(zip(SIDES, pair, strict=True))
    return questions(judge, item, SIDES)


def points(pair: Verdicts) -> float | None:
    """1 if the first answer is preferred, 0 for the second, ½ for neither; None if a verdict is missing.

    One is preferred if the judge names it at least once and never the other.
    """
    if None in pair:
        return None
    balance = sum((verdict == SIDES[0]) - (verdict == SIDES[1]) for verdict in pair)
    return 0.5 + 0.5 * ((balance > 0) - (balance < 0))


def scores(count: int, results: Sequence[float | None]) -> list[float | None]:
    """The scores of `count` answers from the `points` of every two of them. None without any comparison."""
    won, compared = [0.0] * count, [0] * count
    for (first, second), point in zip(combinations(range(count), 2), results, strict=True):
        if point is not None:
            won[first] += point
            won[second] += 1 - point
            compared[first] += 1
            compared[second] += 1
    return [wins / number if number else None for wins, number in zip(won, compared, strict=True)]


def label_of_people(count: int, rankings: Mapping[str, Sequence[Sequence[int]]], flags: Sequence[str]) -> JsonObject:
    """The label of `count` answers by people: their mean score, and the scores of each person.

    `rankings` are groups of answers by person, the best group first. A person's score of an answer is the share of the
    other answers that it is ranked above; one beside it counts half. An item with `flags` has no scores.
    """
    people = {name: _scores_of(count, ranking) for name, ranking in rankings.items()}
    means: list[float | None] = [None] * count
    if people and not flags:
        means = [sum(values) / len(people) for values in zip(*people.values(), strict=True)]
    return {"scores": means, "people": people, "flags": list(flags)}


def _scores_of(count: int, ranking: Sequence[Sequence[int]]) -> list[float]:
    """The scores of `count` answers by one person's ranking."""
    group = {place: number for number, places in enumerate(ranking) for place in places}
    results = [
        0.5 + 0.5 * ((group[first] < group[second]) - (group[first] > group[second]))
        for first, second in combinations(range(count), 2)
    ]
    return [value for value in scores(count, results) if value is not None]
