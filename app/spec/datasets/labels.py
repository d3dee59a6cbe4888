"""What a column of verdicts or of labels says, decided on all of its values and never on the first.

A verdict says which of two answers is better: `first`, `second` or `tie`. A label says of one answer whether it is
`desirable` or `undesirable`. Values are compared by what they say: the text "4" is the number 4, "Yes " is "yes".
Where the values alone do not tell, nothing is guessed: `Ambiguous` says what a mapping has to say.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

Meaning = Literal["first", "second", "tie", "desirable", "undesirable", "neither"]
Value = float | str
"""A value as it is compared."""

MAX_VALUES = 50
"""Of a column, that are looked at and counted: one with more is no label."""
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")
_SEPARATORS = re.compile(r"[\s_\-()]+")
_SUFFIX = re.compile(r"(?P<stem>.*?)[\s_\-]*(?P<suffix>[a-z]|\d+)")
_STEMS = ("", "response", "answer", "output", "model", "assistant", "completion", "option", "conversation", "candidate",
          "summary", "reply", "text", "system", "humanref")  # fmt: skip
_TIES = {"tie", "tied", "draw", "equal", "equallygood", "both", "bothgood", "bothbad", "tiebothbad", "tiebothgood",
         "neither", "none", "same", "nopreference", "undecided", "unsure"}  # fmt: skip
_GOOD = {"true", "yes", "y", "good", "desirable", "positive", "like", "liked", "up", "thumbsup", "upvote", "accept",
         "accepted", "correct", "pass", "passed", "chosen", "preferred", "acceptable", "helpful", "👍"}  # fmt: skip
_BAD = {"false", "no", "n", "bad", "undesirable", "negative", "dislike", "disliked", "down", "thumbsdown", "downvote",
        "reject", "rejected", "incorrect", "wrong", "fail", "failed", "unacceptable", "unhelpful", "👎"}  # fmt: skip


class Ambiguous(Exception):
    """Values that may mean several things. `mapping` is what a mapping's `label` could say of them."""

    def __init__(self, reason: str, label: dict[str, Any]) -> None:
        super().__init__(reason)
        self.reason, self.label = reason, label


def value_of(raw: object) -> Value | None:
    """`raw` as it is compared: numbers, also those that are text, by their value; text without case and separators.

    None for what says nothing: null, NaN, empty text.
    """
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, int | float | Decimal):
        return None if math.isnan(raw) else float(raw)
    if isinstance(raw, str):
        text = raw.strip()
        if _NUMBER.fullmatch(text.lower()):
            return float(text)
        return _SEPARATORS.sub("", text.casefold()) or None
    return None if raw is None else json.dumps(raw, default=str, sort_keys=True)


@dataclass
class Scheme:
    """What each value of the column `column` means. A value that is not there means `others`."""

    column: str
    meanings: dict[Value, Meaning]
    others: Meaning = "neither"
    counts: Counter[tuple[str, Meaning | None]] = field(default_factory=Counter)
    """Rows by the value as it was written and what it was taken to mean; None: nothing."""
    _seen: dict[Any, tuple[str, Meaning | None]] = field(default_factory=dict)

    def of(self, raw: object) -> Meaning | None:
        """The meaning of a row's value, which is counted; None where the row says nothing."""
        key = (type(raw), raw) if isinstance(raw, Hashable) else (str, repr(raw))
        found = self._seen.get(key)
        if found is None:
            value = value_of(raw)
            meaning = None if value is None else self.meanings.get(value, self.others)
            found = (shown_value(raw), meaning)
            if len(self._seen) < MAX_VALUES:
                self._seen[key] = found
        if len(self.counts) < MAX_VALUES or found in self.counts:
            self.counts[found] += 1
        return found[1]


def shown_value(raw: object) -> str:
    """A value for people."""
    if isinstance(raw, float) and raw.is_integer() and abs(raw) < 1e15:
        raw = int(raw)
    return (raw if isinstance(raw, str) else json.dumps(raw, default=str, ensure_ascii=False))[:60]


def suffixes(first: str, second: str) -> tuple[str, str] | None:
    """What tells the names of two answers apart: ("a", "b"), ("0", "1"), ("1", "2"); None for other names."""
    one, two = _SUFFIX.fullmatch(first.lower()), _SUFFIX.fullmatch(second.lower())
    if one is None or two is None or one["stem"] != two["stem"]:
        return None
    found = one["suffix"], two["suffix"]
    return found if found in (("a", "b"), ("0", "1"), ("1", "2")) else None


def _names(column: str, suffix: str | None) -> set[Value]:
    """How a verdict may name the answer of `column`."""
    said: set[Value] = {value for name in [column] if (value := value_of(name)) is not None}
    if suffix is not None:
        said |= {value for stem in _STEMS if (value := value_of(stem + suffix)) is not None}
    return said


def verdicts(column: str, raw: Iterable[object], answers: tuple[str, str]) -> Scheme:
    """What the values of `column` say of the two answers, whose columns are `answers`.

    A value that names one of them by its column, or by what tells the columns apart (the 0 of `response_0`, the
    "model_a" of `response_a`), means it. Raises `Ambiguous` for others: a 0 beside `output_1` may be a tie, or the
    first.
    """
    ends = suffixes(*answers) or (None, None)
    meanings: dict[Value, Meaning] = dict.fromkeys(_TIES, "tie")
    meanings |= {"first": "first", "left": "first", "second": "second", "right": "second"}
    for name, end, meaning in zip(answers, ends, ("first", "second"), strict=True):
        meanings |= dict.fromkeys(_names(name, end), meaning)  # type: ignore[arg-type]
    values = _distinct(raw)
    unknown = [value for value in values if value not in meanings]
    if not unknown:
        return Scheme(column, {value: meanings[value] for value in values})
    listed = ", ".join(map(_written, sorted(values, key=_order)[:12]))
    reason = (
        f"has the values {listed}: which mean that '{answers[0]}' is better, and which '{answers[1]}'? "
        "Say it in a mapping, where 'first' and 'second' may have to be exchanged"
    )
    ordered = sorted(values, key=_order)
    half = (len(ordered) + 1) // 2
    first, second = ordered[:half], ordered[half:]
    tie = first.pop() if len(ordered) % 2 and len(ordered) > 1 else None
    label = {"column": column, "first": list(map(_json, first)), "second": list(map(_json, second))}
    raise Ambiguous(reason, label if tie is None else label | {"tie": [_json(tie)]})


def labels(column: str, raw: Iterable[object]) -> Scheme:
    """What the values of `column` say of an answer: true and false in their spellings, 0 and 1 where both are there, or
    a scale around zero, where its sign says it and zero means neither.

    Raises `Ambiguous` for others: 1 alone, 1 and 2, stars, names of topics.
    """
    values = _distinct(raw)
    words = {value for value in values if isinstance(value, str)}
    numbers = {value for value in values if not isinstance(value, str)}
    meanings: dict[Value, Meaning] = {word: "desirable" if word in _GOOD else "undesirable" for word in words}
    if words <= _GOOD | _BAD:
        if numbers == {0.0, 1.0} or (words and numbers and numbers < {0.0, 1.0}) or not numbers:
            return Scheme(column, meanings | {0.0: "undesirable", 1.0: "desirable"} if numbers else meanings)
        if not words and min(numbers) < 0 < max(numbers):
            signs: dict[Value, Meaning] = {
                number: "desirable" if number > 0 else "undesirable" if number < 0 else "neither" for number in numbers
            }
            return Scheme(column, signs)
    ordered = sorted(values, key=_order)
    listed = ", ".join(map(_written, ordered[:12])) + (", …" if len(ordered) > 12 else "")
    reason = (
        f"has the values {listed}: which mean a good answer, and which a bad one? Say it in a mapping; one without "
        "'label' leaves the column aside and learns all answers"
    )
    half = (len(ordered) + 1) // 2
    good, bad = ordered[half:] or ordered, ordered[:half] if len(ordered) > 1 else []
    label = {"column": column, "desirable": list(map(_json, good[:12]))}
    raise Ambiguous(reason, label | {"undesirable": list(map(_json, bad[:12]))} if bad else label)


def _distinct(raw: Iterable[object]) -> set[Value]:
    """The values of a column; of one with very many, the first ones."""
    found: set[Value] = set()
    last: object = None
    for one in raw:
        if one is last or (one == last and type(one) is type(last)):
            continue
        last, value = one, value_of(one)
        if value is not None:
            found.add(value)
            if len(found) > MAX_VALUES:
                break
    return found


def given(column: str, meanings: dict[Meaning, Collection[object]], others: Meaning) -> Scheme:
    """What a mapping says of a column's values."""
    said: dict[Value, Meaning] = {}
    for meaning, values in meanings.items():
        for raw in values:
            value = value_of(raw)
            if value is not None:
                said[value] = meaning
    return Scheme(column, said, others)


def _order(value: Value) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def _json(value: Value) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written(value: Value) -> str:
    return json.dumps(_json(value), ensure_ascii=False)
