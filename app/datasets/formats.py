"""The formats people have: how each is recognised, and how a record of it becomes an example."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from app.datasets.conversations import Dropped, Record, answer, empty, messages, prompt, text, tools, transcript
from app.datasets.example import Example, Kind, Message, Prompt, Response
from app.datasets.reader import DatasetError

_LABELS = ("kto_tag", "label")
_OLD_SIDES = ("preferred_completion", "non_preferred_completion")
"""What OpenAI called the two sides at first."""


@dataclass(frozen=True)
class Format:
    """A format: `needs` are the fields that a record of it has."""

    name: str
    kind: Kind
    needs: frozenset[str]
    read: Callable[[Record, int], Example]

    def applies(self, record: Record) -> bool:
        """Answers are labelled good or bad by true or false; a label of another kind is some other column.

        A row with other fields than a prompt is not taken for one without an answer: its names are only not known.
        """
        if self.kind == Kind.PROMPTS:
            return record.keys() <= {"prompt", "system"}
        return self.kind != Kind.LABELLED or any(_truth(record.get(name)) is not None for name in _LABELS)


def detect(record: Record, line: int) -> Format:
    """The format of a file whose first record is `record`. Raises `DatasetError` where none fits."""
    for candidate in FORMATS:
        if candidate.needs <= record.keys() and candidate.applies(record):
            return candidate
    known = "; ".join(dict.fromkeys(" + ".join(sorted(format.needs)) for format in FORMATS))
    have = ", ".join(sorted(map(repr, record)))[:300] or "none"
    raise DatasetError(
        line, None, f"no known format has these fields: {have}. A row has one of: {known}. Or a 'mapping' says it"
    )


def _truth(value: object) -> bool | None:
    """A label as a truth value, also as CSV writes it; None for another kind of label."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None


def _pair(line: int, before: Prompt, chosen: Response, rejected: Response) -> Example:
    if empty(chosen):
        raise Dropped("empty_chosen", "chosen")
    if empty(rejected):
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    return Example(line, before, (chosen, rejected))


def _with_tools(example: Example, record: Record, field: str = "tools") -> Example:
    found = tools(record.get("tools"), field, example.line)
    return replace(example, tools=found) if found else example


def _openai_preference(record: Record, line: int) -> Example:
    given = record.get("input")
    if not isinstance(given, dict):
        raise DatasetError(line, "input", "must be an object with 'messages'")
    before = messages(given.get("messages"), "input.messages", line)
    if before[-1]["role"] == "assistant":
        raise DatasetError(line, "input.messages", "must end with the user's message")
    names = _OLD_SIDES if _OLD_SIDES[0] in record else ("preferred_output", "non_preferred_output")
    chosen, rejected = (answer(record.get(name), name, line, before) for name in names)
    return _with_tools(_pair(line, before, chosen, rejected), given, "input.tools")


def _conversation(record: Record, field: str, line: int) -> Example:
    """A conversation whose last answer is learned, and with `weight`, those that have 1."""
    turns = messages(record[field], field, line)
    weights = [item.get("weight") if isinstance(item, dict) else None for item in record[field]]  # type: ignore[attr-defined]
    learned: tuple[int, ...] = ()
    if any(weight is not None for weight in weights):
        for index, weight in enumerate(weights):
            if weight not in (None, 0, 1) or isinstance(weight, bool):
                raise DatasetError(line, f"{field}[{index}].weight", "must be 0 or 1")
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and weights[index] != 0]
        if not answers:
            raise Dropped("no_answer_to_train_on", field)
        turns, learned = turns[: answers[-1] + 1], tuple(answers[:-1])  # what follows the last one is not needed
    *history, last = turns
    if last["role"] != "assistant":
        raise Dropped("ends_without_an_answer", field)
    response: Response = last if "tool_calls" in last else last["content"]
    if empty(response):
        raise Dropped("no_answer_to_train_on", field)
    return _with_tools(Example(line, _system(record, history), (response,), turns=learned), record)


def _system(record: Record, turns: list[Message]) -> list[Message]:
    """The turns, behind the record's own system prompt where there is one and they have none."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _openai_chat(record: Record, line: int) -> Example:
    return _conversation(record, "messages", line)


def _sharegpt(record: Record, line: int) -> Example:
    return _conversation(record, "conversations", line)


def _sharegpt_preference(record: Record, line: int) -> Example:
    before = _system(record, messages(record["conversations"], "conversations", line))
    sides = [answer(record.get(name), name, line, before) for name in ("chosen", "rejected")]
    return _with_tools(_pair(line, before, *sides), record)


def _preference(record: Record, line: int) -> Example:
    before = prompt(record, "prompt", line)
    sides = [answer(record.get(name), name, line, before) for name in ("chosen", "rejected")]
    return _with_tools(_pair(line, before, *sides), record)


def _question_preference(record: Record, line: int) -> Example:
    return _preference(record | {"prompt": text(record, "question", line)}, line)


def _common_history(record: Record, line: int) -> Example:
    chosen, rejected = (transcript(record.get(name), name, line) for name in ("chosen", "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Dropped("ends_without_an_answer")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("histories_differ")
    if not chosen[:-1]:
        raise DatasetError(line, "chosen", "the two sides share no prompt; add a 'prompt'")
    sides = [turns[-1] if "tool_calls" in turns[-1] else turns[-1]["content"] for turns in (chosen, rejected)]
    return _with_tools(_pair(line, _system(record, chosen[:-1]), *sides), record)


def _stack_exchange(record: Record, line: int) -> Example:
    before = "Question: " + text(record, "question", line) + "\n\nAnswer: "
    return _pair(line, before, text(record, "response_j", line), text(record, "response_k", line))


def _judged(record: Record, line: int) -> Example:
    """A person's verdict on two answers: `label` 1 or 2 is the better one."""
    outputs = text(record, "output_1", line), text(record, "output_2", line)
    label = str(record.get("label"))
    if label in ("0", "3", "tie", "None"):
        raise Dropped("tie", "label")
    if label not in ("1", "2"):
        raise DatasetError(line, "label", "must be 1 or 2, the number of the better output")
    return _pair(line, prompt(record, "input", line), *(outputs if label == "1" else outputs[::-1]))


def _alpaca_prompt(record: Record, line: int) -> Prompt:
    asked, given = text(record, "instruction", line), record.get("input")
    if given is not None and not isinstance(given, str):
        raise DatasetError(line, "input", "must be a string")
    before = f"{asked}\n{given}" if given else asked
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DatasetError(line, "history", "must be a list of [question, answer]")
    turns: list[Message] = []
    for number, (question, reply) in enumerate(history):
        if not isinstance(question, str) or not isinstance(reply, str):
            raise DatasetError(line, f"history[{number}]", "must be two strings")
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    system = {"system": record["system"]} if isinstance(record.get("system"), str) else {}
    if not turns:
        return prompt({"prompt": before, **system}, "prompt", line)
    return _system(system, [*turns, {"role": "user", "content": before}])


def _alpaca(record: Record, line: int) -> Example:
    output = text(record, "output", line)
    if empty(output):
        raise Dropped("empty_completion", "output")
    return Example(line, _alpaca_prompt(record, line), (output,))


def _alpaca_preference(record: Record, line: int) -> Example:
    return _pair(line, _alpaca_prompt(record, line), text(record, "chosen", line), text(record, "rejected", line))


def _prompt_completion(record: Record, line: int) -> Example:
    before = prompt(record, "prompt", line)
    completion = answer(record.get("completion"), "completion", line, before)
    if empty(completion):
        raise Dropped("empty_completion", "completion")
    return _with_tools(Example(line, before, (completion,)), record)


def _labelled(read: Callable[[Record, int], Example]) -> Callable[[Record, int], Example]:
    """`read`, with the label of the answer."""

    def labelled(record: Record, line: int) -> Example:
        name = next(name for name in _LABELS if name in record)
        label = _truth(record[name])
        if label is None:
            raise DatasetError(line, name, "must be true (a good answer) or false")
        return replace(read(record, line), desirable=label)

    return labelled


def _ranked(record: Record, line: int) -> Example:
    listed = record["responses"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise DatasetError(line, "responses", "must be a list of at least two answers")
    before = prompt(record, "prompt", line)
    answers = [answer(item, f"responses[{k}]", line, before) for k, item in enumerate(listed)]
    if "ranks" in record and "scores" in record:
        raise DatasetError(line, "ranks", "goes without 'scores': one of them says the order")
    if "ranks" in record:
        worth = [-value for value in _numbers(record["ranks"], "ranks", len(answers), line)]
    elif "scores" in record:
        worth = _numbers(record["scores"], "scores", len(answers), line)
    else:
        worth = [-float(place) for place in range(len(answers))]
    return _best_first(line, before, answers, worth)


def _ultrafeedback(record: Record, line: int) -> Example:
    """UltraFeedback's own form: `completions`, each with `response` and `overall_score`."""
    listed = record["completions"]
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(item, dict) for item in listed):
        raise DatasetError(line, "completions", "must be a list of at least two objects")
    answers: list[Response] = [text(item, "response", line) for item in listed]
    name = "overall_score" if "overall_score" in listed[0] else "score"
    scores = [item.get(name) for item in listed]
    before = text(record, "instruction", line)
    return _best_first(line, before, answers, _numbers(scores, f"completions[].{name}", len(answers), line))


def _best_first(line: int, before: Prompt, answers: list[Response], worth: list[float]) -> Example:
    """Answers by what they are worth. Of those that are worth the same the first one stays."""
    if any(map(empty, answers)):
        raise Dropped("empty_response", "responses")
    best: dict[float, Response] = {}
    for found, value in zip(answers, worth, strict=True):
        best.setdefault(value, found)
    if len(best) < 2:
        raise Dropped("tied_ranks", "responses")
    kept = [best[value] for value in sorted(best, reverse=True)]
    if any(one in kept[:number] for number, one in enumerate(kept)):
        raise Dropped("identical_responses", "responses")
    return Example(line, before, tuple(kept))


def _numbers(values: object, field: str, count: int, line: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise DatasetError(line, field, f"must be a list of {count} numbers, one for each answer")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise DatasetError(line, field, "must be numbers")
    return [float(value) for value in values]


def _plain_text(record: Record, line: int) -> Example:
    found = text(record, "text", line)
    if not found.strip():
        raise Dropped("empty_text", "text")
    return Example(line, "", (found,), raw=True)


def _only_a_prompt(record: Record, line: int) -> Example:
    return Example(line, prompt(record, "prompt", line), ())


def _format(name: str, kind: Kind, needs: str, read: Callable[[Record, int], Example]) -> Format:
    return Format(name, kind, frozenset(needs.split()), read)


FORMATS = (
    _format("openai_preference", Kind.PREFERENCE, "input preferred_output non_preferred_output", _openai_preference),
    _format(
        "openai_preference", Kind.PREFERENCE, "input preferred_completion non_preferred_completion", _openai_preference
    ),
    _format("preference", Kind.PREFERENCE, "prompt chosen rejected", _preference),
    _format("sharegpt_preference", Kind.PREFERENCE, "conversations chosen rejected", _sharegpt_preference),
    _format("alpaca_preference", Kind.PREFERENCE, "instruction chosen rejected", _alpaca_preference),
    _format("preference", Kind.PREFERENCE, "question chosen rejected", _question_preference),
    _format("transcripts", Kind.PREFERENCE, "chosen rejected", _common_history),
    _format("stack_exchange_paired", Kind.PREFERENCE, "question response_j response_k", _stack_exchange),
    _format("judged", Kind.PREFERENCE, "input output_1 output_2 label", _judged),
    _format("ultrafeedback", Kind.RANKED, "instruction completions", _ultrafeedback),
    _format("ranked", Kind.RANKED, "prompt responses", _ranked),
    _format("labelled", Kind.LABELLED, "prompt completion label", _labelled(_prompt_completion)),
    _format("labelled_chat", Kind.LABELLED, "messages label", _labelled(_openai_chat)),
    _format("labelled_chat", Kind.LABELLED, "messages kto_tag", _labelled(_openai_chat)),
    _format("sharegpt_labelled", Kind.LABELLED, "conversations label", _labelled(_sharegpt)),
    _format("sharegpt_labelled", Kind.LABELLED, "conversations kto_tag", _labelled(_sharegpt)),
    _format("alpaca_labelled", Kind.LABELLED, "instruction output kto_tag", _labelled(_alpaca)),
    _format("alpaca_labelled", Kind.LABELLED, "instruction output label", _labelled(_alpaca)),
    _format("openai_chat", Kind.SUPERVISED, "messages", _openai_chat),
    _format("sharegpt", Kind.SUPERVISED, "conversations", _sharegpt),
    _format("alpaca", Kind.SUPERVISED, "instruction output", _alpaca),
    _format("prompt_completion", Kind.SUPERVISED, "prompt completion", _prompt_completion),
    _format("text", Kind.SUPERVISED, "text", _plain_text),
    _format("prompts", Kind.PROMPTS, "prompt", _only_a_prompt),
)
"""In the order in which they are tried: those that need more fields first."""
