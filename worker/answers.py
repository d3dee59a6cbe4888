"""The answers to a prompt of a labelling. Pure functions."""

import json

from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec

DATA = -1
"""Stands for the number of a writer for answers of the data."""


def distinct(item: JsonObject) -> JsonObject:
    """A copy of `item` whose answers are in order, without empty ones, and each text once.

    White space around a text does not count. `repeated` and `empty` count the answers that are left out.
    """
    answers: dict[str, JsonObject] = {}
    empty = 0
    for answer in sorted(item["answers"], key=lambda answer: (answer["writer"], answer["place"])):
        text = (answer["text"] or "").strip()
        if text:
            answers.setdefault(text, answer)
        empty += not text
    repeated = len(item["answers"]) - empty - len(answers)
    return item | {"answers": list(answers.values()), "repeated": repeated, "empty": empty, "labels": {}}


def messages_of(source: JsonObject) -> list[JsonObject]:
    """The prompt of an item as messages of OpenAI's API. `source` has the columns of a dataset."""
    prompt = source["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if source.get("system"):
        turns = [{"role": "system", "content": source["system"]}, *turns]
    return [_message(turn) for turn in turns]


def _message(turn: JsonObject) -> JsonObject:
    """A turn without its reasoning. The arguments of its calls are JSON text."""
    message = {name: value for name, value in turn.items() if name != "reasoning"}
    if "tool_calls" in turn:
        message["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return message


def _call(call: JsonObject) -> JsonObject:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments", ""), str):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def row_of(spec: LabellingSpec, item: JsonObject) -> JsonObject | None:
    """The row of ranked answers that an item gives: the best first, with scores, writers, and all labels.

    Answers without a score by the first labeller are left out. None if the scores set no order.
    """
    first, names = spec.labellers[0].title, writer_names(spec)
    scores = item["labels"][first]["scores"]
    places = sorted((k for k, score in enumerate(scores) if score is not None), key=lambda k: (-scores[k], k))
    if len({scores[k] for k in places}) < 2:
        return None
    answers = [item["answers"][k] for k in places]
    source: JsonObject = item["source"]
    people = {
        name: [values[k] for k in places]
        for label in item["labels"].values() for name, values in label.get("people", {}).items()
    }  # fmt: skip
    return source | {
        "responses": [answer["text"] for answer in answers],
        "scores": [scores[k] for k in places],
        "writers": [names[answer["writer"]] for answer in answers],
        "labels": {title: [label["scores"][k] for k in places] for title, label in item["labels"].items()},
        **({"people": people} if people else {}),
    }


def writer_names(spec: LabellingSpec) -> dict[int, str]:
    """The names of the writers by number, as rows show them."""
    return {DATA: "data", **{number: writer.name for number, writer in enumerate(spec.writers)}}
