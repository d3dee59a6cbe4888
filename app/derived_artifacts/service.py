"""What a task came to."""

from typing import Any

from app.derived_artifacts.tables import DerivedArtifact
from app.errors import ServiceError


def result(task: DerivedArtifact, param: str | None = None) -> dict[str, Any] | None:
    """What a task made; None while it is to be made.

    Raises `ServiceError` where it failed, about `param` if its error names no field itself.
    """
    if task.status == "pending":
        return None
    if task.error is not None:
        raise ServiceError(task.error["message"], param=task.error.get("param") or param, code=task.error["code"])
    return task.result or {}
