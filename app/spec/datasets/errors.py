"""What is wrong with a file, or with one row of it."""

from typing import Any


class DatasetError(Exception):
    """A file that cannot be trained on: where (`line` counts from 1, `field`) and why.

    `mapping` is the nearest mapping that would read the file, where one can be proposed.
    """

    def __init__(self, line: int, field: str | None, reason: str, mapping: dict[str, Any] | None = None) -> None:
        self.line, self.field, self.reason, self.mapping = line, field, reason, mapping
        super().__init__(f"Line {line}: " + (f"field '{field}': " if field else "") + reason)


class Dropped(Exception):
    """A row that is well-formed but teaches nothing; it is counted under `reason` and left out."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.field = reason, field
