"""Exceptions that end a run early."""

from app.spec.error_codes import JOBS

STOPPED = 75
"""The exit status of a trainer that stopped after SIGTERM and can resume."""


class UserError(Exception):
    """An error that the user can correct. It fails the job with this message.

    `code` is one of `app.spec.error_codes`, and `param` names the field.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        assert code in JOBS, code
        super().__init__(code, message, param)  # all arguments, so that the exception can be pickled between processes
        self.code, self.message, self.param = code, message, param

    def __str__(self) -> str:
        return self.message


class Stopped(Exception):
    """The run was asked to stop. It saved its state if it could."""


class PeerLost(Exception):
    """Another rank has ended, so this one cannot go on. That rank, or what killed it, says why."""


def first_line(error: Exception) -> str:
    """The class of a library's error and the first line of its message, shortened, for people."""
    error = getattr(error, "inner_exception", error)  # torch.compile puts its reason there
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200].rstrip('. ')}"


def is_compiler_error(error: BaseException) -> bool:
    """Whether `error` comes from torch.compile. To name its classes would load the compiler."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
