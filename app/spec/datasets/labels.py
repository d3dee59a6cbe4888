"""The meaning of the values in a column of verdicts or labels, decided on all values of the column.

A verdict says which of two answers is better: `first`, `second` or `tie`. A label says whether one answer is
`desirable` or `undesirable`. Values are normalised before they are compared: the text "4" equals the number 4, and
"Yes " equals "yes". Ambiguous values are never guessed: `AmbiguousValues` proposes the `label` of a mapping.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from app.spec.json_types import JsonObject

Meaning = Literal["first", "second", "tie", "desirable", "undesirable", "neither"]
Value = float | str
"""A normalised value, see `value_of`."""

MAX_DISTINCT_VALUES = 50
"""Maximum number of distinct values of a column that are examined and counted."""
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


class AmbiguousValues(Exception):
    """Values with more than one possible meaning. `label` is a proposal for a mapping's `label`."""

    def __init__(self, reason: str, label: JsonObject) -> None:
        super().__init__(reason)
        self.reason, self.label = reason, label


def value_of(raw: object) -> Value | None:
    """Normalise a value. A number, or a text that is one, becomes a float. Other text loses case and separators.

    None for an empty value: null, NaN or empty text.
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
class LabelScheme:
    """The meaning of each value of the column `column`.

    Values that are not in `meanings` mean `others`, unless they are numbers of a column in which the sign is the label.
    """

    column: str
    meanings: dict[Value, Meaning]
    others: Meaning = "neither"
    by_sign: bool = False
    """Whether a number's sign is its label: above zero desirable, below zero undesirable, zero neither."""
    counts: Counter[tuple[str, Meaning | None]] = field(default_factory=Counter)
    """Number of rows by (value as written, its meaning). The meaning of an empty value is None."""
    _cache: dict[Hashable, tuple[str, Meaning | None]] = field(default_factory=dict)

    def meaning_of(self, raw: object) -> Meaning | None:
        """Look up the meaning of a row's value, and count it. None for an empty value."""
        key = (type(raw), raw) if isinstance(raw, Hashable) else (str, repr(raw))
        entry = self._cache.get(key)
        if entry is None:
            value = value_of(raw)
            meaning = None if value is None else self._meaning(value)
            entry = (shown_value(raw), meaning)
            if len(self._cache) < MAX_DISTINCT_VALUES:
                self._cache[key] = entry
        if len(self.counts) < MAX_DISTINCT_VALUES or entry in self.counts:
            self.counts[entry] += 1
        return entry[1]

    def _meaning(self, value: Value) -> Meaning:
        if self.by_sign and not isinstance(value, str):
            return "desirable" if value > 0 else "undesirable" if value < 0 else "neither"
        return self.meanings.get(value, self.others)


def shown_value(raw: object) -> str:
    """A value as the report shows it: at most 60 characters."""
    if isinstance(raw, float) and raw.is_integer() and abs(raw) < 1e15:
        raw = int(raw)
    return (raw if isinstance(raw, str) else json.dumps(raw, default=str, ensure_ascii=False))[:60]


def answer_suffixes(first: str, second: str) -> tuple[str, str] | None:
    """The suffixes that tell two columns of answers apart: ("a", "b"), ("0", "1") or ("1", "2"); else None."""
    matches = _SUFFIX.fullmatch(first.lower()), _SUFFIX.fullmatch(second.lower())
    if matches[0] is None or matches[1] is None or matches[0]["stem"] != matches[1]["stem"]:
        return None
    suffixes = matches[0]["suffix"], matches[1]["suffix"]
    return suffixes if suffixes in (("a", "b"), ("0", "1"), ("1", "2")) else None


def _names_of_answer(column: str, suffix: str | None) -> set[Value]:
    """The values by which a verdict may name the answer in `column`."""
    names: set[Value] = {value for name in [column] if (value := value_of(name)) is not None}
    if suffix is not None:
        names |= {value for stem in _STEMS if (value := value_of(stem + suffix)) is not None}
    return names


def verdict_scheme(column: str, raw: Iterable[object], answers: tuple[str, str]) -> LabelScheme:
    """The meanings of the verdicts `raw` in the column `column`. The two answers are in the columns `answers`.

    A value means an answer if it names the answer's column or its suffix: 0 means `response_0`, and "model_a" means
    `response_a`. Raises `AmbiguousValues` for other values: beside `output_1`, a 0 may mean a tie or the first answer.
    """
    suffixes = answer_suffixes(*answers) or (None, None)
    meanings: dict[Value, Meaning] = dict.fromkeys(_TIES, "tie")
    meanings |= {"first": "first", "left": "first", "second": "second", "right": "second"}
    for name, suffix, meaning in zip(answers, suffixes, ("first", "second"), strict=True):
        meanings |= dict.fromkeys(_names_of_answer(name, suffix), meaning)  # type: ignore[arg-type]
    values = _distinct(raw)
    unknown = [value for value in values if value not in meanings]
    if not unknown:
        return LabelScheme(column, {value: meanings[value] for value in values})
    listed = ", ".join(map(_as_text, sorted(values, key=_sort_key)[:12]))
    reason = (
        f"has the values {listed}: which mean that '{answers[0]}' is better, and which '{answers[1]}'? "
        "Give the answer in a mapping such as this one; exchange 'first' and 'second' if they are the wrong way round"
    )
    ordered = sorted(values, key=_sort_key)
    half = (len(ordered) + 1) // 2
    first, second = ordered[:half], ordered[half:]
    tie = first.pop() if len(ordered) % 2 and len(ordered) > 1 else None
    label = {"column": column, "first": list(map(_as_json, first)), "second": list(map(_as_json, second))}
    raise AmbiguousValues(reason, label if tie is None else label | {"tie": [_as_json(tie)]})


def label_scheme(column: str, raw: Iterable[object]) -> LabelScheme:
    """The meanings of the labels `raw` in the column `column`.

    The values may be words for true and false, 0 and 1 together, or a scale around zero. On a scale the sign is the
    label, and zero means neither. Raises `AmbiguousValues` for other values: 1 alone, 1 and 2, stars, names of topics.
    """
    values = _distinct(raw)
    words = {value for value in values if isinstance(value, str)}
    numbers = {value for value in values if not isinstance(value, str)}
    meanings: dict[Value, Meaning] = {word: "desirable" if word in _GOOD else "undesirable" for word in words}
    if words <= _GOOD | _BAD:
        if numbers == {0.0, 1.0} or (words and numbers and numbers < {0.0, 1.0}) or not numbers:
            return LabelScheme(column, meanings | {0.0: "undesirable", 1.0: "desirable"} if numbers else meanings)
        if not words and min(numbers) < 0 < max(numbers):
            return LabelScheme(column, {}, by_sign=True)
    ordered = sorted(values, key=_sort_key)
    listed = ", ".join(map(_as_text, ordered[:12])) + (", …" if len(ordered) > 12 else "")
    reason = (
        f"has the values {listed}: which mean a good answer, and which a bad one? Give the answer in a "
        "mapping such as this one, or leave out its 'label' to ignore the column and train on all answers"
    )
    half = (len(ordered) + 1) // 2
    good, bad = ordered[half:] or ordered, ordered[:half] if len(ordered) > 1 else []
    label = {"column": column, "desirable": list(map(_as_json, good[:12]))}
    raise AmbiguousValues(reason, label | {"undesirable": list(map(_as_json, bad[:12]))} if bad else label)


def _distinct(raw: Iterable[object]) -> set[Value]:
    """The distinct values of a column; only the first ones if they are more than `MAX_DISTINCT_VALUES`."""
    values: set[Value] = set()
    last: object = None
    for item in raw:
        if item is last or (item == last and type(item) is type(last)):
            continue  # fast path for runs of equal values
        last, value = item, value_of(item)
        if value is not None:
            values.add(value)
            if len(values) > MAX_DISTINCT_VALUES:
                break
    return values


def scheme_from_values(column: str, meanings: dict[Meaning, Collection[object]], others: Meaning) -> LabelScheme:
    """The scheme of a mapping, which lists the values of each meaning."""
    meaning_by_value: dict[Value, Meaning] = {}
    for meaning, values in meanings.items():
        for raw in values:
            value = value_of(raw)
            if value is not None:
                meaning_by_value[value] = meaning
    return LabelScheme(column, meaning_by_value, others)


def _sort_key(value: Value) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def _as_json(value: Value) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_text(value: Value) -> str:
    return json.dumps(_as_json(value), ensure_ascii=False)
