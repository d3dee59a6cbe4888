"""For a file that no format fits: the mapping that comes nearest, to be looked at and used."""

import json
from collections.abc import Iterable
from typing import Any

from app.spec.datasets import labels
from app.spec.datasets.columns import ALIASES, plain_name

_FORMS = (("prompt", "chosen", "rejected"), ("prompt", "responses"), ("prompt", "completion"), ("messages",), ("text",))
"""What can be trained on, the forms that need more columns first."""


def nearest(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """A mapping for rows like `records`, by what people call their columns; None where nothing comes near."""
    columns: dict[str, object] = {}
    for record in records:
        for name, value in record.items():
            if columns.get(name) is None:
                columns[name] = value
    compared = _two_answers(columns)
    if compared is not None:
        return compared
    for form in _FORMS:
        found = _columns(form, columns)
        if found is not None:
            label = _named("label", columns, set(found.values()), str | int | float | bool)
            if form == ("prompt", "completion") and label is not None:
                found |= {"label": label}
            system = next((name for name in columns if plain_name(name) in ("system", "system_prompt")), None)
            return found if system is None or form in (("messages",), ("text",)) else found | {"system": system}
    return None


def _columns(form: tuple[str, ...], columns: dict[str, object]) -> dict[str, Any] | None:
    """Columns for the fields of `form`; a last field that has no name of its own gets the one text column left."""
    found: dict[str, Any] = {}
    for field in form:
        kind = list if field in ("responses", "messages") else str if field != "prompt" else str | list
        name = _named(field, columns, set(found.values()), kind)
        if name is None:
            left = [name for name, value in columns.items() if isinstance(value, str) and name not in found.values()]
            if kind is list or len(left) != 1 or field == "text" or not found:
                return None
            name = left[0]
        found[field] = name
    return found


def _named(field: str, columns: dict[str, object], taken: set[Any], kind: Any) -> str | None:
    """The column that people would call `field`; by a part of its name where none is called so."""
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


def _two_answers(columns: dict[str, object]) -> dict[str, Any] | None:
    """A mapping for two answers that only their names' ends tell apart; which is better, a person has to say."""
    names = [name for name, value in columns.items() if isinstance(value, str | list)]
    pairs = [(one, two) for one in names for two in names if labels.suffixes(one, two)]
    if len(pairs) != 1:
        return None
    taken: set[Any] = set(pairs[0])
    prompt = _named("prompt", columns, taken, str | list)
    if prompt is None:
        return None
    taken.add(prompt)
    label = next((name for name in columns if name not in taken), None)
    if label is None:
        return None
    first, second = pairs[0]
    verdict = {"column": label, "first": [first], "second": [second]}
    return {"input": prompt, "output_1": first, "output_2": second, "label": verdict}


def command(mapping: dict[str, Any]) -> str:
    """What to paste into a terminal to try `mapping`; FILE stands for the file."""
    written = json.dumps(mapping, ensure_ascii=False).replace("'", "'\\''")
    return f"dpo files check FILE --mapping '{written}'"
