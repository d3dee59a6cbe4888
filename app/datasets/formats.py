"""The formats people have: how each is recognised, and how a record of it becomes an example."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from app.datasets.example import Example, Kind, Message, Prompt
from app.datasets.reader import DatasetError

Record = dict[str, object]
_ROLES = {"system", "user", "assistant", "developer"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_LABELS = ("label", "kto_tag")


class Dropped(Exception):
    """A row that is well-formed but teaches nothing; it is counted under `reason` and left out."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.field = reason, field


@dataclass(frozen=True)
class Format:
    """A format: `needs` are the fields that a record of it has."""

    name: str
    kind: Kind
    needs: frozenset[str]
    read: Callable[[Record, int], Example]

    def applies(self, record: Record) -> bool:
        """Answers are labelled good or bad by true or false; a label of another kind is some other column."""
        return self.kind != Kind.LABELLED or any(isinstance(record.get(name), bool) for name in _LABELS)


def detect(record: Record, line: int) -> Format:
    """The format of a file whose first record is `record`. Raises `DatasetError` where none fits."""
    for candidate in FORMATS:
        if candidate.needs <= record.keys() and candidate.applies(record):
            return candidate
    known = "; ".join(" + ".join(sorted(format.needs)) for format in FORMATS)
    have = ", ".join(sorted(map(repr, record)))[:300] or "none"
    raise DatasetError(line, None, f"no known format has these fields: {have}. A row has one of: {known}")


def _text(record: Record, field: str, line: int) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        problem = "is missing" if field not in record else "must be a string"
        raise DatasetError(line, field, problem)
    return value


def _content(value: object, field: str, line: int) -> str:
    """A message's content: a string, or OpenAI's list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(_text(part, "text", line) for part in value)
    raise DatasetError(line, field, "must be a string; images and other parts cannot be trained on")


def _messages(value: object, field: str, line: int) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DatasetError(line, field, "must be a list of messages that is not empty")
    messages: list[Message] = []
    for index, item in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise DatasetError(line, where, "must be an object with 'role' and 'content'")
        role = item.get("role")
        if role in ("tool", "function") or item.get("tool_calls") or item.get("function_call"):
            raise DatasetError(line, where, "tool calls are part of the contract but not available yet")
        if not isinstance(role, str) or role not in _ROLES:
            raise DatasetError(line, f"{where}.role", f"must be one of {', '.join(sorted(_ROLES))}")
        content = _content(item.get("content"), f"{where}.content", line)
        role = "system" if role == "developer" else role
        messages.append(cast(Message, {"role": role, "content": content}))
    return messages


def _refuse_tools(record: Record, line: int, field: str = "tools") -> None:
    if record.get("tools"):
        raise DatasetError(line, field, "tools are part of the contract but not available yet")


def _answer(value: object, field: str, line: int) -> str:
    """The answer of a side: a string, or a list whose last message is the assistant's."""
    if isinstance(value, str):
        return value
    messages = _messages(value, field, line)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DatasetError(line, field, "must be one assistant message")
    return messages[0]["content"]


def _pair(line: int, prompt: Prompt, chosen: str, rejected: str) -> Example:
    if not chosen.strip():
        raise Dropped("empty_chosen", "chosen")
    if not rejected.strip():
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    return Example(line, prompt, (chosen, rejected))


def _openai_preference(record: Record, line: int) -> Example:
    given = record.get("input")
    if not isinstance(given, dict):
        raise DatasetError(line, "input", "must be an object with 'messages'")
    _refuse_tools(given, line, "input.tools")
    prompt = _messages(given.get("messages"), "input.messages", line)
    if prompt[-1]["role"] == "assistant":
        raise DatasetError(line, "input.messages", "must end with the user's message")
    sides = [_answer(record.get(name), name, line) for name in ("preferred_output", "non_preferred_output")]
    return _pair(line, prompt, *sides)


def _openai_chat(record: Record, line: int) -> Example:
    _refuse_tools(record, line)
    messages = _messages(record.get("messages"), "messages", line)
    *history, last = messages
    raw = cast(list[dict[str, Any]], record["messages"])
    for index, item in enumerate(raw):
        weight = item.get("weight")
        if weight not in (None, 0, 1) or isinstance(weight, bool):
            raise DatasetError(line, f"messages[{index}].weight", "must be 0 or 1")
        if weight == 1 and index < len(raw) - 1:
            raise DatasetError(
                line,
                f"messages[{index}].weight",
                "training on earlier turns is part of the contract but not available yet; the last answer trains",
            )
    if last["role"] != "assistant":
        raise Dropped("ends_without_an_answer", "messages")
    if raw[-1].get("weight") == 0 or not last["content"].strip():
        raise Dropped("no_answer_to_train_on", "messages")
    return Example(line, history, (last["content"],))


def _preference(record: Record, line: int) -> Example:
    given = record["prompt"]
    prompt = given if isinstance(given, str) else _messages(given, "prompt", line)
    sides = [_answer(record.get(name), name, line) for name in ("chosen", "rejected")]
    return _pair(line, prompt, *sides)


def _transcript(value: object, field: str, line: int) -> list[Message]:
    """The turns of an Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …", or of a message list."""
    if isinstance(value, list):
        return _messages(value, field, line)
    if not isinstance(value, str):
        raise DatasetError(line, field, "must be a transcript or a list of messages")
    before, *parts = _TURN.split(value)
    if not parts or before.strip():
        raise DatasetError(line, field, "must be a transcript that starts with '\\n\\nHuman:', or come with a 'prompt'")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _common_history(record: Record, line: int) -> Example:
    chosen, rejected = (_transcript(record.get(name), name, line) for name in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Dropped("ends_without_an_answer")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("histories_differ")
    if not chosen[:-1]:
        raise DatasetError(line, "chosen", "the two sides share no prompt; add a 'prompt'")
    return _pair(line, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _stack_exchange(record: Record, line: int) -> Example:
    prompt = "Question: " + _text(record, "question", line) + "\n\nAnswer: "
    return _pair(line, prompt, _text(record, "response_j", line), _text(record, "response_k", line))


def _prompt_completion(record: Record, line: int) -> Example:
    given = record["prompt"]
    prompt = given if isinstance(given, str) else _messages(given, "prompt", line)
    completion = _answer(record.get("completion"), "completion", line)
    if not completion.strip():
        raise Dropped("empty_completion", "completion")
    return Example(line, prompt, (completion,))


def _labelled(record: Record, line: int) -> Example:
    label = record["label"]
    if not isinstance(label, bool):
        raise DatasetError(line, "label", "must be true (a good answer) or false")
    return replace(_prompt_completion(record, line), desirable=label)


def _labelled_chat(record: Record, line: int) -> Example:
    label = record["kto_tag"] if "kto_tag" in record else record["label"]
    if not isinstance(label, bool):
        raise DatasetError(line, "kto_tag" if "kto_tag" in record else "label", "must be true (a good answer) or false")
    return replace(_openai_chat(record, line), desirable=label)


def _ranked(record: Record, line: int) -> Example:
    given = record["prompt"]
    prompt = given if isinstance(given, str) else _messages(given, "prompt", line)
    listed = record["responses"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise DatasetError(line, "responses", "must be a list of at least two answers")
    answers = [_answer(item, f"responses[{k}]", line) for k, item in enumerate(listed)]
    order = _order(record, len(answers), line)
    if not all(answer.strip() for answer in answers):
        raise Dropped("empty_response", "responses")
    if len(set(answers)) < len(answers):
        raise Dropped("identical_responses", "responses")
    return Example(line, prompt, tuple(answers[k] for k in order))


def _order(record: Record, count: int, line: int) -> list[int]:
    """The answers' numbers, best first: by `ranks` (1 is best), by `scores` (high is best), or as they stand."""
    if "ranks" in record and "scores" in record:
        raise DatasetError(line, "ranks", "goes without 'scores': one of them says the order")
    field = "ranks" if "ranks" in record else "scores"
    if field not in record:
        return list(range(count))
    values = record[field]
    if not isinstance(values, list) or len(values) != count:
        raise DatasetError(line, field, f"must be a list of {count} numbers, one for each answer")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise DatasetError(line, field, "must be numbers")
    if len(set(values)) < count:
        raise Dropped("tied_ranks", field)
    return sorted(range(count), key=values.__getitem__, reverse=field == "scores")


def _plain_text(record: Record, line: int) -> Example:
    text = _text(record, "text", line)
    if not text.strip():
        raise Dropped("empty_text", "text")
    return Example(line, "", (text,), raw=True)


def _format(name: str, kind: Kind, needs: str, read: Callable[[Record, int], Example]) -> Format:
    return Format(name, kind, frozenset(needs.split()), read)


FORMATS = (
    _format(
        "openai_preference",
        Kind.PREFERENCE,
        "input preferred_output non_preferred_output",
        _openai_preference,
    ),
    _format("preference", Kind.PREFERENCE, "prompt chosen rejected", _preference),
    _format("transcripts", Kind.PREFERENCE, "chosen rejected", _common_history),
    _format("stack_exchange_paired", Kind.PREFERENCE, "question response_j response_k", _stack_exchange),
    _format("ranked", Kind.RANKED, "prompt responses", _ranked),
    _format("labelled", Kind.LABELLED, "prompt completion label", _labelled),
    _format("labelled_chat", Kind.LABELLED, "messages label", _labelled_chat),
    _format("labelled_chat", Kind.LABELLED, "messages kto_tag", _labelled_chat),
    _format("openai_chat", Kind.SUPERVISED, "messages", _openai_chat),
    _format("prompt_completion", Kind.SUPERVISED, "prompt completion", _prompt_completion),
    _format("text", Kind.SUPERVISED, "text", _plain_text),
)
"""In the order in which they are tried: those that need more fields first."""
