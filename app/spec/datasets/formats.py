"""The formats people have: how each is recognised, and how a record of it becomes an example.

A format is recognised by the columns of a file's first rows, and reads one row at a time. What a column of verdicts
or of labels means is decided on all of the file (`labels`) and given to the reading.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from app.spec.datasets import labels, limits
from app.spec.datasets.columns import ALIASES, plain_name
from app.spec.datasets.conversations import (
    TRANSCRIPT,
    Turns,
    any_system,
    empty,
    learned,
    response_of,
    same_turn,
    same_turns,
    spoken,
    system_of,
    tools,
)  # fmt: skip
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind, Message, Prompt, Response
from app.spec.datasets.labels import Scheme

Record = dict[str, object]
_LABELS = ("kto_tag", "label")
_OLD_SIDES = ("preferred_completion", "non_preferred_completion")
"""What OpenAI called the two sides at first."""
_SIDES = ("chosen", "rejected")


@dataclass
class Reading:
    """How the records of one file are read: its messages, and what its verdicts or labels mean."""

    format: "Format"
    turns: Turns = field(default_factory=Turns)
    scheme: Scheme | None = None
    answers: tuple[str, str] = ("output_1", "output_2")
    """The columns of two answers that a verdict compares."""

    def example(self, record: Record, line: int) -> Example:
        """The example of a record. Raises `Dropped` or `DatasetError`."""
        return self.format.read(Row(record, line, self))


@dataclass(slots=True)
class Row:
    """A record with its line, and how it is read."""

    record: Record
    line: int
    reading: Reading

    def text(self, name: str) -> str:
        """The string in the column `name`; empty where it is null, as tables write what is missing."""
        value = self.record.get(name)
        if isinstance(value, str):
            return value
        if value is None and name in self.record:
            return ""
        raise DatasetError(self.line, name, "must be a string" if name in self.record else "is missing")

    def messages(self, name: str) -> list[Message]:
        """The messages in the column `name`."""
        value = self.record.get(name)
        if value is None and name in self.record:
            raise Dropped(f"empty_{name}", name)
        return self.reading.turns.messages(value, name, self.line)

    @property
    def system(self) -> str:
        """The system prompt in a column of its own; empty where there is none."""
        for name in ("system", "system_prompt"):
            value = self.record.get(name)
            if value is None:
                continue
            if isinstance(value, str) and value.strip():
                return value
            if isinstance(value, list | dict) and value:
                listed = value if isinstance(value, list) else [value]
                turns = self.reading.turns.messages(listed, name, self.line)
                if len(system_of(turns)) and not spoken(turns):
                    return system_of(turns)
                raise DatasetError(self.line, name, "must be text, or messages of the role 'system'")
            if not isinstance(value, str | list | dict):
                raise DatasetError(self.line, name, "must be text, or messages of the role 'system'")
        return ""

    def asked(self, name: str) -> Example:
        """An example without answers: the prompt in the column `name`, the system prompt, and tools."""
        value = self.record.get(name)
        if isinstance(value, str):
            return self.example(value)
        if isinstance(value, dict) and not self.reading.turns.is_message(value):
            inside = next((f"{name}.{key}" for key, text in value.items() if isinstance(text, str)), name)
            reason = f"is an object; a mapping can name the text in it, as '{inside}'"
            raise DatasetError(self.line, name, reason)
        return self.example(self.text(name) if value is None else self.messages(name))

    def example(self, prompt: Prompt) -> Example:
        """An example of `prompt` without answers. The row's own system prompt stands before it, unless it has one."""
        called = self.record.get("tools")
        found = tools(called, "tools", self.line) if called else ()
        system = self.system
        if isinstance(prompt, str):
            return Example(self.line, prompt, (), tools=found, system=system)
        if system and not any_system(prompt):
            prompt = [{"role": "system", "content": system}, *prompt]
        return Example(self.line, prompt, (), tools=found)

    def side(self, name: str) -> str | list[Message]:
        """What the column `name` gives as an answer."""
        value = self.record.get(name)
        if isinstance(value, str):
            return value
        return self.text(name) if value is None else self.reading.turns.side(value, name, self.line)


@dataclass(frozen=True)
class Format:
    """A format: `needs` are the fields that a file of it has, `optional` what it reads besides.

    `labelled` names the column whose values say what is good, where the format has one.
    """

    name: str
    kind: Kind
    needs: frozenset[str]
    read: Callable[[Row], Example]
    optional: frozenset[str] = frozenset()
    label: str | None = None
    fits: Callable[[list[Record]], bool] = lambda _: True

    @property
    def reads(self) -> frozenset[str]:
        return self.needs | self.optional


# -- pairs ------------------------------------------------------------------------------------------------------


def _with_sides(asked: Example, sides: list[str | list[Message]], names: tuple[str, ...]) -> Example:
    """`asked` with answers. A side may repeat what it answers, and say a system prompt that nothing else says."""
    if all(type(side) is str for side in sides):
        return asked.answered(tuple(sides))
    asked = _with_system(asked, sides)
    asked, sides = _with_shared_history(asked, sides)
    history = spoken(asked.conversation)
    responses = []
    for side, name in zip(sides, names, strict=True):
        if isinstance(side, str):
            responses.append(side)
            continue
        turns = spoken(side)
        if len(turns) > len(history) and same_turns(turns[: len(history)], history):
            turns = turns[len(history) :]
        responses.append(response_of(turns, name))  # type: ignore[arg-type]
    return asked.answered(tuple(responses))


def _with_system(asked: Example, sides: list[str | list[Message]]) -> Example:
    """`asked` with the system prompt that the sides say. Two that differ are two histories."""
    said = {system_of(side) for side in sides if not isinstance(side, str) and any_system(side)}
    own = asked.system if isinstance(asked.prompt, str) else system_of(asked.prompt)
    said |= {own} if own else set()
    said.discard("")
    if len(said) > 1 and len({" ".join(one.split()) for one in said}) > 1:
        raise Dropped("histories_differ")
    if own or not said:
        return asked
    system = said.pop()
    if isinstance(asked.prompt, str):
        return replace(asked, system=system)
    return replace(asked, prompt=[{"role": "system", "content": system}, *asked.prompt])


def _with_shared_history(asked: Example, sides: list[str | list[Message]]) -> tuple[Example, list[str | list[Message]]]:
    """Where the sides are whole conversations, of which the prompt is one question: what they share is the prompt."""
    turns = [spoken(side) for side in sides if not isinstance(side, str)]
    if len(turns) < len(sides) or any(side[0]["role"] != "user" for side in turns if side) or not all(turns):
        return asked, sides
    history = spoken(asked.conversation)
    if all(len(side) > len(history) and same_turns(side[: len(history)], history) for side in turns):
        return asked, sides
    shared = _shared(turns)
    if not shared or not (isinstance(asked.prompt, str) and any(same_turn(turn, history[0]) for turn in shared)):
        return asked, sides  # they answer something else
    whole: list[Message] = [{"role": "system", "content": asked.system}, *shared] if asked.system else shared
    return replace(asked, prompt=whole, system=""), list(turns)


def _shared(sides: list[list[Message]]) -> list[Message]:
    """The turns that all of `sides` begin with, up to the last that is not the assistant's."""
    count = 0
    for turns in zip(*sides, strict=False):
        if not all(same_turn(turns[0], turn) for turn in turns[1:]):
            break
        count += 1
    count = min(count, *(len(side) - 1 for side in sides))
    while count and sides[0][count - 1]["role"] == "assistant":
        count -= 1
    return sides[0][:count]


def _pair(example: Example) -> Example:
    chosen, rejected = example.responses
    if empty(chosen):
        raise Dropped("empty_chosen", "chosen")
    if empty(rejected):
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    return example


def _preference(prompt: str) -> Callable[[Row], Example]:
    """Two answers to what stands in the column `prompt`."""

    def read(row: Row) -> Example:
        asked = row.asked(prompt)
        return _pair(_with_sides(asked, [row.side(name) for name in _SIDES], _SIDES))

    return read


def _openai_preference(row: Row) -> Example:
    given = row.record.get("input")
    if not isinstance(given, dict):
        raise DatasetError(row.line, "input", "must be an object with 'messages'")
    before = row.reading.turns.messages(given.get("messages"), "input.messages", row.line)
    if before[-1]["role"] == "assistant":
        raise DatasetError(row.line, "input.messages", "must end with the user's message")
    names = _OLD_SIDES if _OLD_SIDES[0] in row.record else ("preferred_output", "non_preferred_output")
    asked = Example(row.line, before, (), tools=tools(given.get("tools"), "input.tools", row.line))
    return _pair(_with_sides(asked, [row.side(name) for name in names], names))


def _whole_conversations(row: Row) -> Example:
    """Two whole conversations: the prompt is their common history."""
    sides = []
    for name in _SIDES:
        value = row.record.get(name)
        if value is None and name in row.record:
            raise Dropped(f"empty_{name}", name)
        sides.append(row.reading.turns.transcript(value, name, row.line))
    if any(turns[-1]["role"] != "assistant" for turns in sides):
        raise Dropped("ends_without_an_answer")
    asked = _with_system(row.example([]), list(sides))
    turns = [spoken(side) for side in sides]
    shared = _shared(turns)
    rest = [side[len(shared) :] for side in turns]
    written = any(isinstance(row.record[name], str) for name in _SIDES)  # as transcripts, which know no tools
    if written and any(len(side) > 1 for side in rest):
        raise Dropped("histories_differ")
    if any(turn["role"] in ("user", "system") for side in rest for turn in side):
        raise Dropped("histories_differ")
    if not shared:
        raise DatasetError(row.line, "chosen", "the two sides share no prompt; add a 'prompt'")
    assert not isinstance(asked.prompt, str)
    asked = replace(asked, prompt=[*asked.prompt, *shared])
    responses = tuple(response_of(side, name) for side, name in zip(rest, _SIDES, strict=True))
    return _pair(asked.answered(responses))


def _transcripts(records: list[Record]) -> bool:
    """Whether the sides are conversations, and not two texts that begin alike."""
    sides = [record.get(name) for record in records for name in _SIDES]
    return any(isinstance(side, list | dict) or (isinstance(side, str) and TRANSCRIPT.match(side)) for side in sides)


def _no_prompt(records: list[Record]) -> bool:
    """Whether no other column could be the prompt: else a person has to say that it is not."""
    return all(plain_name(name) not in ALIASES["prompt"] for record in records for name in record)


def _implicit_prompt(row: Row) -> Example:
    """Two texts that begin with their prompt: it ends where they differ, before the space there, as in TRL."""
    chosen, rejected = (row.text(name) for name in _SIDES)
    if not chosen.strip():
        raise Dropped("empty_chosen", "chosen")
    if not rejected.strip():
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise Dropped("no_shared_prompt")
    asked = row.example(chosen[:shared])
    return _pair(asked.answered((chosen[shared:], rejected[shared:])))


def _stack_exchange(row: Row) -> Example:
    before = "Question: " + row.text("question") + "\n\nAnswer: "
    return _pair(Example(row.line, before, (row.text("response_j"), row.text("response_k"))))


# -- verdicts ---------------------------------------------------------------------------------------------------

VERDICTS = ("label", "labels", "winner", "better_response_id", "preference", "preferred", "better", "choice", "verdict",
            "human_label", "overall_preference", "judgment", "judgement", "vote", "human_preference")  # fmt: skip
"""Columns that say which of two answers is better."""
_ANSWER = re.compile(r"(response|output|answer|completion|candidate|conversation|summary|human_ref|option|reply)s?"
                     r"[\s_-]*(0|1|2|a|b)", re.IGNORECASE)  # fmt: skip
_WORTH = re.compile(r"(score|rating|reward|winner|votes?|preferred)[\s_-]*(?:(?:model|response|answer|output)[\s_-]*)?"
                    r"(0|1|2|a|b)", re.IGNORECASE)  # fmt: skip
"""Columns with what each of two answers is worth: scores, or 1 for the better and 0 for the other."""
_ASKED = ("prompt", "instruction", "question", "input", "query", "context", "history")
_KNOWN_VERDICTS: dict[tuple[str, str, str], dict[labels.Value, labels.Meaning]] = {
    # Stanford Human Preferences: "labels is the preference label: 1 if A is preferred to B; 0 if B is preferred to A".
    ("human_ref_A", "human_ref_B", "labels"): {1.0: "first", 0.0: "second"},
    # HelpSteer3: from −3, "Response 1 is much better than Response 2", to 3, the other way round.
    ("response1", "response2", "overall_preference"): {
        **dict.fromkeys((-3.0, -2.0, -1.0), "first"), 0.0: "tie", **dict.fromkeys((1.0, 2.0, 3.0), "second"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Where a file of verdicts has the prompt, the two answers, and which of them is better: in the column
    `verdict`, or in two columns of numbers, `worth`.
    """

    prompt: str
    answers: tuple[str, str]
    verdict: str | None
    worth: tuple[str, str] | None = None

    @property
    def known(self) -> dict[labels.Value, labels.Meaning] | None:
        """What the verdicts mean, where the file is of a collection that says so."""
        return None if self.verdict is None else _KNOWN_VERDICTS.get((*self.answers, self.verdict))

    def of(self, row: Row) -> labels.Meaning | None:
        """The verdict of a row; None where it has none."""
        if self.verdict is not None:
            assert row.reading.scheme is not None
            return row.reading.scheme.of(row.record.get(self.verdict))
        first, second = (labels.value_of(row.record.get(name)) for name in self.worth or ())
        if not isinstance(first, float) or not isinstance(second, float):
            return None
        return "first" if first > second else "second" if second > first else "tie"


def compared(columns: frozenset[str]) -> Compared | None:
    """The columns of a file of verdicts; None where it is not one."""
    answers, verdict = _two(columns, _ANSWER), next((name for name in VERDICTS if name in columns), None)
    worth = _two(columns, _WORTH) if verdict is None else None
    if answers is None or (verdict is None and worth is None):
        return None
    prompt = next((name for name in _ASKED if name in columns), None)
    if prompt is None and not answers[0].lower().startswith("conversation"):
        return None
    return Compared(prompt or answers[0], answers, verdict, worth)


def _two(columns: frozenset[str], pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """The two columns of the names `pattern` that differ in their ends alone; None where there are none, or more."""
    names = sorted(name for name in columns if pattern.fullmatch(name))
    found = [(first, second) for first in names for second in names if labels.suffixes(first, second)]
    return found[0] if len(found) == 1 else None


def judged(where: Compared) -> Format:
    """The format of a file of verdicts."""
    names = where.answers

    def read(row: Row) -> Example:
        asked, sides = _compared_sides(row, where)
        meaning = where.of(row)
        if meaning is None:
            raise Dropped("no_verdict", where.verdict)
        if meaning not in ("first", "second"):
            raise Dropped("tie", where.verdict)
        example = _with_sides(asked, sides, names)
        better, worse = example.responses if meaning == "first" else example.responses[::-1]
        return _pair(example.answered((better, worse)))

    needs = frozenset((where.prompt, *names, *(where.worth or (where.verdict or "",))))
    return Format("judged", Kind.PREFERENCE, needs, read, _CONTEXT, where.verdict)


def _compared_sides(row: Row, where: Compared) -> tuple[Example, list[str | list[Message]]]:
    """The prompt, and the two answers. Two whole conversations have their prompt in them."""
    sides = [row.side(name) for name in where.answers]
    if where.prompt != where.answers[0]:
        return row.asked(where.prompt), sides
    whole = [spoken(side) for side in sides if not isinstance(side, str)]
    shared = _shared(whole) if len(whole) == len(sides) else []
    if not shared:
        raise Dropped("histories_differ", where.answers[0])
    return replace(_with_system(row.example([]), sides), prompt=shared), sides


# -- answers ----------------------------------------------------------------------------------------------------


def _conversation(row: Row, name: str) -> Example:
    """A conversation whose last answer is learned; or those that say so themselves, where any does."""
    turns = row.messages(name)
    listed = row.record[name]
    given = listed if isinstance(listed, list) else [listed]
    said = [learned(item, f"{name}[{k}]", row.line) for k, item in enumerate(given)]
    others: tuple[int, ...] = ()
    if any(one is not None for one in said):
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and said[k] is not False]
        if not answers:
            raise Dropped("no_answer_to_train_on", name)
        turns, others = turns[: answers[-1] + 1], tuple(answers[:-1])  # what follows the last one is not needed
        for turn, flag in zip(turns, said, strict=False):
            if flag and turn["role"] != "assistant":
                row.reading.turns.unread[f"{name}[].weight of the {turn['role']}"] += 1
    *history, last = turns
    response = response_of([last], name)
    if empty(response):
        raise Dropped("no_answer_to_train_on", name)
    asked = row.example(history)
    if not others:
        return asked.answered((response,))
    moved = len(asked.prompt) - len(history)  # a system prompt of its own column stands before the turns
    return replace(asked, responses=(response,), turns=tuple(k + moved for k in others))


def _openai_chat(row: Row) -> Example:
    return _conversation(row, "messages")


def _sharegpt(row: Row) -> Example:
    return _conversation(row, "conversations")


def _alpaca_asked(row: Row) -> Example:
    asked, given = row.text("instruction"), row.record.get("input")
    if given is not None and not isinstance(given, str):
        raise DatasetError(row.line, "input", "must be a string")
    before = f"{asked}\n{given}" if given else asked
    history = row.record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DatasetError(row.line, "history", "must be a list of [question, answer]")
    turns: list[Message] = []
    for number, (question, reply) in enumerate(history):
        if not isinstance(question, str) or not isinstance(reply, str):
            raise DatasetError(row.line, f"history[{number}]", "must be two strings")
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return row.example([*turns, {"role": "user", "content": before}] if turns else before)


def _alpaca(row: Row) -> Example:
    return _completed(_alpaca_asked(row), row, "output")


def _alpaca_preference(row: Row) -> Example:
    return _pair(_with_sides(_alpaca_asked(row), [row.side(name) for name in _SIDES], _SIDES))


def _prompt_completion(row: Row) -> Example:
    return _completed(row.asked("prompt"), row, "completion")


def _completed(asked: Example, row: Row, name: str) -> Example:
    example = _with_sides(asked, [row.side(name)], (name,))
    if empty(example.responses[0]):
        raise Dropped("empty_completion", name)
    return example


def _labelled(read: Callable[[Row], Example], column: str) -> Callable[[Row], Example]:
    """`read`, with the label of the answer."""

    def labelled(row: Row) -> Example:
        assert row.reading.scheme is not None
        example = read(row)
        meaning = row.reading.scheme.of(row.record.get(column))
        if meaning not in ("desirable", "undesirable"):
            raise Dropped("no_label" if meaning is None else "neutral_label", column)
        return example if meaning == "desirable" else replace(example, desirable=False)

    return labelled


# -- ranked lists -----------------------------------------------------------------------------------------------

LISTS = ("responses", "answers", "completions")
_SAID = ("response", "answer", "text", "completion", "content", "output", "generation")
_RANKS, _SCORES = ("rank", "ranking", "position"), ("overall_score", "score", "reward", "rating", "fine-grained_score")


def _ranked(asked: str, listed: str) -> Callable[[Row], Example]:
    """Answers in a list: best first, or with ranks (1 is best) or scores, in columns of their own or in themselves."""

    def read(row: Row) -> Example:
        found = row.record[listed]
        if found is None:
            raise Dropped(f"empty_{listed}", listed)
        if not isinstance(found, list) or len(found) < 2:
            raise DatasetError(row.line, listed, "must be a list of at least two answers")
        if len(found) > limits.MAX_ANSWERS:
            most = limits.MAX_ANSWERS
            reason = f"has {len(found)} answers; at most {most} are taken, which are {most * (most - 1) // 2} pairs"
            raise DatasetError(row.line, listed, reason)
        prompt = row.asked(asked)
        sides, own = [], []
        for number, item in enumerate(found):
            said = next((name for name in _SAID if name in item), None) if _is_answer(item) else None
            value = item if said is None else item[said]
            own.append({} if said is None else item)
            sides.append("" if value is None else row.reading.turns.side(value, f"{listed}[{number}]", row.line))
        example = _with_sides(prompt, sides, tuple(f"{listed}[{number}]" for number in range(len(sides))))
        return _best_first(example, listed, _worth(row, listed, own))

    return read


def _is_answer(item: object) -> bool:
    """Whether an item of a list is an object around an answer, and no message."""
    return isinstance(item, dict) and not ("role" in item or "from" in item)


def _worth(row: Row, listed: str, own: list[dict[str, Any]]) -> list[float]:
    """What each answer is worth: from a column, from the answers themselves, or from their order."""
    count = len(own)
    if row.record.get("ranks") is not None and row.record.get("scores") is not None:
        raise DatasetError(row.line, "ranks", "goes without 'scores': one of them says the order")
    if row.record.get("ranks") is not None:
        return [-value for value in _numbers(row.record["ranks"], "ranks", count, row.line)]
    if row.record.get("scores") is not None:
        return _numbers(row.record["scores"], "scores", count, row.line)
    for names, sign in ((_RANKS, -1.0), (_SCORES, 1.0)):
        name = next((name for name in names if any(name in item for item in own)), None)
        if name is not None:
            values = [item.get(name) for item in own]
            return [sign * value for value in _numbers(values, f"{listed}[].{name}", count, row.line)]
    if any(own):
        raise DatasetError(row.line, listed, "must have a 'rank' or a 'score' in each, which says the order")
    return [-float(place) for place in range(count)]


def _best_first(example: Example, listed: str, worth: list[float]) -> Example:
    """Answers by what they are worth. Of those that are worth the same the first one stays."""
    if any(map(empty, example.responses)):
        raise Dropped("empty_response", listed)
    best: dict[float, Response] = {}
    for found, value in zip(example.responses, worth, strict=True):
        best.setdefault(value, found)
    if len(best) < 2:
        raise Dropped("tied_ranks", listed)
    kept = [best[value] for value in sorted(best, reverse=True)]
    if len({one if isinstance(one, str) else repr(one) for one in kept}) < len(kept):
        raise Dropped("identical_responses", listed)
    return example.answered(tuple(kept))


def _numbers(values: object, field: str, count: int, line: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise DatasetError(line, field, f"must be a list of {count} numbers, one for each answer")
    found = [labels.value_of(value) for value in values if not isinstance(value, bool)]
    numbers = [value for value in found if isinstance(value, float)]
    if len(numbers) < count:
        raise DatasetError(line, field, "must be numbers")
    return numbers


# -- the rest ---------------------------------------------------------------------------------------------------


def _plain_text(row: Row) -> Example:
    found = row.text("text")
    if not found.strip():
        raise Dropped("empty_text", "text")
    return Example(row.line, "", (found,), raw=True)


def _only_a_prompt(row: Row) -> Example:
    return row.asked("prompt")


def _only_prompts(records: list[Record]) -> bool:
    """A row with other fields than a prompt is not taken for one without an answer: its names are only not known."""
    return all(record.keys() <= {"prompt", *_CONTEXT} for record in records)


_CONTEXT = frozenset({"system", "system_prompt", "tools"})


def _formats() -> Iterator[Format]:
    def format(name: str, kind: Kind, needs: str, read: Callable[[Row], Example], *more: str, **fields: Any) -> Format:
        return Format(name, kind, frozenset(needs.split()), read, _CONTEXT | frozenset(more), **fields)

    pairs, ranked, labelled, answers = Kind.PREFERENCE, Kind.RANKED, Kind.LABELLED, Kind.SUPERVISED
    alpaca = ("input", "history")
    yield format("openai_preference", pairs, "input preferred_output non_preferred_output", _openai_preference)
    yield format("openai_preference", pairs, "input preferred_completion non_preferred_completion", _openai_preference)
    yield format("preference", pairs, "prompt chosen rejected", _preference("prompt"))
    yield format("sharegpt_preference", pairs, "conversations chosen rejected", _preference("conversations"))
    yield format("alpaca_preference", pairs, "instruction chosen rejected", _alpaca_preference, *alpaca)
    for asked in ("question", "query", "input"):
        yield format("preference", pairs, f"{asked} chosen rejected", _preference(asked))
    yield format("transcripts", pairs, "chosen rejected", _whole_conversations, fits=_transcripts)
    yield format("implicit_prompt", pairs, "chosen rejected", _implicit_prompt, fits=_no_prompt)
    yield format("stack_exchange_paired", pairs, "question response_j response_k", _stack_exchange)
    yield format("ultrafeedback", ranked, "instruction completions", _ranked("instruction", "completions"))
    for listed in LISTS:
        read = _ranked("prompt", listed)
        yield format("ranked", ranked, f"prompt {listed}", read, "ranks", "scores", fits=_lists(listed))
    for column in _LABELS:
        marked: list[tuple[str, str, Callable[[Row], Example], tuple[str, ...]]] = [
            ("labelled", "prompt completion", _prompt_completion, ()),
            ("labelled_chat", "messages", _openai_chat, ()),
            ("sharegpt_labelled", "conversations", _sharegpt, ()),
            ("alpaca_labelled", "instruction output", _alpaca, alpaca),
        ]
        for name, needs, reads, more in marked:
            yield format(name, labelled, f"{needs} {column}", _labelled(reads, column), *more, label=column)
    yield format("openai_chat", answers, "messages", _openai_chat)
    yield format("sharegpt", answers, "conversations", _sharegpt)
    yield format("alpaca", answers, "instruction output", _alpaca, *alpaca)
    yield format("prompt_completion", answers, "prompt completion", _prompt_completion)
    yield format("text", answers, "text", _plain_text)
    yield format("prompts", Kind.PROMPTS, "prompt", _only_a_prompt, fits=_only_prompts)


def _lists(listed: str) -> Callable[[list[Record]], bool]:
    return lambda records: any(isinstance(record.get(listed), list) for record in records)


FORMATS = tuple(_formats())
"""In the order in which they are tried: those that need more fields first."""
