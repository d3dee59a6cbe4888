"""What a trainer tells its runner: a line of JSON on standard output for each event."""

import json
import time
from typing import IO, Any


class UserError(Exception):
    """Something that the user can mend: it fails the job with this message. `param` names the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)  # all of them, so that it can be sent between processes
        self.code, self.message, self.param = code, message, param

    def __str__(self) -> str:
        return self.message


def first_line(error: Exception) -> str:
    """The kind of an error of somebody else's code and the beginning of its message, for people."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200].rstrip('. ')}"


class Stopped(Exception):
    """The run was asked to stop, and has kept what it could."""


class Events:
    """Writes events. Kinds: message, stage, metrics, checkpoint, part, wanted, made, done, failed, broken."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def emit(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": time.time(), **fields}, allow_nan=False)
        self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, text: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Something for people; `level` is info, warn or error. `data` says it to programs, by a `code`."""
        self.emit("message", message=text, level=level, data=data)
