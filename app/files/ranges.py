"""The part of a file that a request asks for (RFC 9110, section 14)."""

import re
from dataclasses import dataclass

from app.errors import OutsideOfFile

_ONE_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """The bytes `start` to `end` of a file, without the last."""

    start: int
    end: int


def requested(header: str | None, size: int) -> Part | None:
    """The part that a `Range` header asks for; None for the whole file. Raises `OutsideOfFile`.

    A header that is malformed, or that asks for several ranges, counts as absent, as the standard allows.
    """
    match = _ONE_RANGE.fullmatch(header or "")
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":  # the last bytes
        part = Part(max(size - int(match[2]), 0), size)
    else:
        part = Part(int(match[1]), min(int(match[2] or size) + 1, size))
        if match[2] and int(match[2]) < int(match[1]):
            return None
    if part.start >= part.end:
        raise OutsideOfFile(size)
    return part
