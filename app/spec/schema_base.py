"""The base of all request bodies: values are not coerced, and an unknown field is refused by name."""

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from app.spec.json_types import JsonObject

STORED = "stored"
"""Validation context for specs from the database. During an upgrade, the next version may have written them: fields
that this version does not know are ignored, not refused."""


NO_NUL = r"^[^\x00]*$"
FileName = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=NO_NUL)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]
Quantization = Literal["nf4", "int8", "none"]
Metadata = dict[
    Annotated[str, StringConstraints(max_length=64, pattern=NO_NUL)],
    Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)],
]


def unix_seconds(time: float | None) -> int | None:
    """A time as the API writes it: in whole seconds."""
    return None if time is None else int(time)


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """A question to append to an error about `name`, if a name in `known` is similar. Else an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def inconsistent(field: str, message: str) -> PydanticCustomError:
    """The error for a value that is valid by itself but conflicts with other fields."""
    sentence = "{message}" if message.endswith("?") else "{message}."
    return PydanticCustomError("inconsistent", sentence, {"field": field, "message": message})


class Strict(BaseModel):
    """A model without coercion and without unknown fields.

    `NOT_BUILT` names fields of OpenAI's contract that this version does not support yet.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    NOT_BUILT: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: object, info: ValidationInfo) -> object:
        if not isinstance(data, dict):
            return data
        if info.context == STORED:
            return {field: value for field, value in data.items() if field in cls.model_fields}
        for field, value in data.items():
            if field in cls.model_fields:
                continue
            if field in cls.NOT_BUILT:
                if value is None or value == []:
                    continue
                raise PydanticCustomError(
                    "unsupported_parameter",
                    "'{field}' is part of the contract but not available yet.",
                    {"field": field},
                )
            field = str(field).encode("utf-8", "replace").decode()  # the answer cannot hold a lone surrogate
            hint = did_you_mean(field, list(cls.model_fields), cutoff=0.8)
            raise PydanticCustomError(
                "unknown_parameter",
                "Unknown parameter: '{field}'.{hint}",
                {"field": field, "hint": hint},
            )
        return {field: value for field, value in data.items() if field not in cls.NOT_BUILT}


class Defaulted(Strict):
    """A model in which null means the default, in every field that has one: as if the field was left out."""

    UNSET: ClassVar[tuple[object, ...]] = (None,)
    """The values that mean the default."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if name not in optional or value not in cls.UNSET}


class Automatic(Defaulted):
    """A model in which "auto" means the default too, as in OpenAI's hyperparameters."""

    UNSET = (None, "auto")


def without_nulls(fields: JsonObject | None) -> JsonObject | None:
    """`fields` without those that are null, at all depths of objects. Those of `parameters` mean something."""
    return fields and {
        name: without_nulls(value) if isinstance(value, dict) and name != "parameters" else value
        for name, value in fields.items()
        if value is not None
    }


def with_files(body: JsonObject, places: dict[str, str]) -> JsonObject:
    """`body` with other file names, in place. `places` maps the dotted paths of fields to the new names."""
    for field, place in places.items():
        *path, last = [int(name) if name.isdecimal() else name for name in field.split(".")]
        target: Any = body
        for name in path:
            target = target[name]
        target[last] = place
    return body


MAX_DEPTH = 32


def plain_json(value: object, field: str, max_bytes: int) -> None:
    """Refuse free-form JSON that cannot be stored or returned: nested too deep, too large, or not valid JSON."""
    if _depth(value) > MAX_DEPTH:
        raise inconsistent(field, f"'{field}' is nested more than {MAX_DEPTH} deep")
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except ValueError:  # NaN, Infinity, half a surrogate pair
        raise inconsistent(field, f"'{field}' holds a value that JSON cannot represent") from None
    try:
        orjson.dumps(value)
    except TypeError:
        raise inconsistent(field, f"'{field}' holds a whole number of more than 64 bits") from None
    if size > max_bytes:
        raise inconsistent(field, f"'{field}' has {size} bytes; at most {max_bytes} are taken")


def _depth(value: object) -> int:
    """The nesting depth of `value`. Counting stops at `MAX_DEPTH` + 1."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        level = [
            child for node in level if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]  # fmt: skip
        depth += 1
    return depth
