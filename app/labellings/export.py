"""The verdicts of people in the forms of other labelling tools. Pure functions."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

from app.labellings.queue import PersonsVerdict
from app.spec.json_types import JsonObject

ExportFormat = Literal["label_studio", "argilla"]
Labelled = tuple[int, JsonObject, Sequence[PersonsVerdict]]
"""The number of an item, its content, and the verdicts on it."""


def label_studio(items: Iterator[Labelled]) -> Iterator[JsonObject]:
    """Tasks for the tag `Pairwise`: one for every two answers. The tag has no tie, so a tie is a choice beside it."""
    for number, content, verdicts in items:
        ranked = [(verdict.annotator, verdict.ranking) for verdict in verdicts if verdict.ranking is not None]
        for first, second in combinations(range(len(content["answers"])), 2):
            data = {
                "prompt": content["prompt"],
                "answer1": content["answers"][first],
                "answer2": content["answers"][second],
                "item": number,
                "annotators": [annotator for annotator, _ in ranked],
            }
            annotations = [{"result": [_comparison(ranking, first, second)]} for _, ranking in ranked]
            yield {"data": data, "annotations": annotations}


def _comparison(ranking: list[list[int]], first: int, second: int) -> JsonObject:
    places = {answer: place for place, group in enumerate(ranking) for answer in group}
    shown = {"to_name": ["answer1", "answer2"]}
    if places[first] == places[second]:
        return {"type": "choices", "from_name": "tie", "value": {"choices": ["tie"]}, **shown}
    selected = "left" if places[first] < places[second] else "right"
    return {"type": "pairwise", "from_name": "comparison", "value": {"selected": selected}, **shown}


def argilla(items: Iterator[Labelled]) -> Iterator[JsonObject]:
    """Flattened records with a question `ranking`, one for each item. Argilla has no ties: the first one goes first."""
    for number, content, verdicts in items:
        names = {place: f"response_{place + 1}" for place in range(len(content["answers"]))}
        ranked = [(verdict.annotator, verdict.ranking) for verdict in verdicts if verdict.ranking is not None]
        yield {
            "id": str(number),
            "prompt": content["prompt"],
            **{names[place]: answer for place, answer in enumerate(content["answers"])},
            "ranking.responses": [[names[place] for group in ranking for place in group] for _, ranking in ranked],
            "ranking.responses.users": [annotator for annotator, _ in ranked],
            "ranking.responses.status": ["submitted"] * len(ranked),
        }


FORMS = {"label_studio": label_studio, "argilla": argilla}
