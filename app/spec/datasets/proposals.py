"""Propose a mapping for a file that no format fits. The user checks it before using it."""

import json
from collections.abc import Iterable
from types import UnionType

from app.spec.datasets import labels
from app.spec.datasets.columns import ALIASES, plain_name
from app.spec.json_types import JsonObject

_FORMS = (("prompt", "chosen", "rejected"), ("prompt", "responses"), ("prompt", "completion"), ("messages",), ("text",))
"""Sets of fields that can be trained on, the larger sets first."""


def nearest(records: Iterable[JsonObject]) -> JsonObject | None:
    """The likeliest mapping for rows like `records`, by the names of their columns; None if no set of fields fits."""
    columns: dict[str, object] = {}
    for record in records:
        for name, value in record.items():
            if columns.get(name) is None:
                columns[name] = value
    verdict_mapping = _two_answers(columns)
    if verdict_mapping is not None:
        return verdict_mapping
    for fields in _FORMS:
        mapping = _columns(fields, columns)
        if mapping is not None:
            label = _best_column("label", columns, set(mapping.values()), str | int | float | bool)
            if fields == ("prompt", "completion") and label is not None:
                mapping |= {"label": label}
            system = next((name for name in columns if plain_name(name) in ("system", "system_prompt")), None)
            return mapping if system is None or fields in (("messages",), ("text",)) else mapping | {"system": system}
    return None


def _columns(fields: tuple[str, ...], columns: dict[str, object]) -> JsonObject | None:
    """A column for each of `fields`; None if one has none. If no name fits, a field gets the only free text column."""
    mapping: JsonObject = {}
    for field in fields:
        kind: type | UnionType = (
            list if field in ("responses", "messages") else str if field != "prompt" else str | list
        )
        name = _best_column(field, columns, set(mapping.values()), kind)
        if name is None:
            free = [name for name, value in columns.items() if isinstance(value, str) and name not in mapping.values()]
            if kind is list or len(free) != 1 or field == "text" or not mapping:
                return None
            name = free[0]
        mapping[field] = name
    return mapping


def _best_column(field: str, columns: dict[str, object], taken: set[str], kind: type | UnionType) -> str | None:
    """The free column of the type `kind` whose name is an alias of `field`, or else contains one; else None."""
    free = [name for name, value in columns.items() if name not in taken and isinstance(value, kind)]
    for alias in ALIASES[field]:
        for name in free:
            if plain_name(name) == alias:
                return name
    for alias in ALIASES[field]:
        for name in free:
            if len(alias) > 3 and alias in plain_name(name):
                return name
    return None


def _two_answers(columns: dict[str, object]) -> JsonObject | None:
    """A mapping for two columns of answers that differ in their suffix. The user must correct its verdict's values."""
    names = [name for name, value in columns.items() if isinstance(value, str | list)]
    pairs = [(first, second) for first in names for second in names if labels.answer_suffixes(first, second)]
    if len(pairs) != 1:
        return None
    taken: set[str] = set(pairs[0])
    prompt = _best_column("prompt", columns, taken, str | list)
    if prompt is None:
        return None
    taken.add(prompt)
    label = next((name for name in columns if name not in taken), None)
    if label is None:
        return None
    first, second = pairs[0]
    verdict = {"column": label, "first": [first], "second": [second]}
    return {"input": prompt, "output_1": first, "output_2": second, "label": verdict}


def command(mapping: JsonObject) -> str:
    """The shell command that checks a file with `mapping`. FILE stands for the file."""
    quoted = json.dumps(mapping, ensure_ascii=False).replace("'", "'\\''")
    return f"dpo files check FILE --mapping '{quoted}'"
