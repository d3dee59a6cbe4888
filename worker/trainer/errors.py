"""How a run ends before it is done."""


class UserError(Exception):
    """Something that the user can mend: it fails the job with this message. `param` names the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)  # all of them, so that it can be sent between processes
        self.code, self.message, self.param = code, message, param

    def __str__(self) -> str:
        return self.message


class Stopped(Exception):
    """The run was asked to stop, and has kept what it could."""


def first_line(error: Exception) -> str:
    """The kind of an error of somebody else's code and the beginning of its message, for people."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200].rstrip('. ')}"
