"""Errors in a file or in one of its rows."""

from app.spec.json_types import JsonObject


class DatasetError(Exception):
    """A file that cannot be trained on: the place (`line`, from 1, and `field`) and the reason.

    `mapping` is a proposed mapping that would read the file, if there is one.
    """

    def __init__(self, line: int, field: str | None, reason: str, mapping: JsonObject | None = None) -> None:
        self.line, self.field, self.reason, self.mapping = line, field, reason, mapping
        super().__init__(f"Line {line}: " + (f"field '{field}': " if field else "") + reason)

    def __reduce__(self) -> tuple[object, ...]:
        """It comes from processes that tokenise a file."""
        return type(self), (self.line, self.field, self.reason, self.mapping)


class Dropped(Exception):
    """A row that is well-formed but useless for training. It is left out and counted under `reason`."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.field = reason, field
