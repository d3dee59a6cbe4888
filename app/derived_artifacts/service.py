"""The result of a derived artifact."""

from app.derived_artifacts.tables import DerivedArtifact
from app.errors import Gone, ServiceError
from app.spec.json_types import JsonObject
from app.stored_content import GONE


def result(artifact: DerivedArtifact, param: str | None = None) -> JsonObject | None:
    """The result of an artifact; None while it is pending.

    Raises `ServiceError` if it failed. The error is about `param` unless it names a field itself.
    """
    if artifact.status == "pending":
        return None
    error = artifact.error
    if error is not None:
        error_class = Gone if error["code"] == GONE else ServiceError
        raise error_class(error["message"], param=error.get("param") or param, code=error["code"])
    return artifact.result or {}
