"""The result of a derived artifact."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.broker import Lane
from app.database import database_now
from app.derived_artifacts.tables import DerivedArtifact
from app.errors import Gone, ServiceError
from app.spec.json_types import JsonObject
from app.stored_content import GONE
from app.workers import repository as workers

UNSERVED_SECONDS = 120.0
"""How long an artifact may wait for a worker with its base model, while the workers that are there do not have it."""


def result(session: Session, artifact: DerivedArtifact, param: str | None = None) -> JsonObject | None:
    """The result of an artifact; None while it is pending.

    Raises `ServiceError` if it failed, or if no worker that is there can make it. The error is about `param` unless it
    names a field itself.
    """
    if artifact.status == "pending":
        if _is_unserved(session, artifact):
            message = (
                f"No worker of the CPU lane has the base model '{artifact.base_model}': it is not in their models "
                "folders, and they may not download it. Ask the operator for DPO_MODELS_DIR or DPO_HUB_MODELS there."
            )
            raise ServiceError(message, param=param or "model", code="model_unavailable")
        return None
    error = artifact.error
    if error is not None:
        error_class = Gone if error["code"] == GONE else ServiceError
        raise error_class(error["message"], param=error.get("param") or param, code=error["code"])
    return artifact.result or {}


def _is_unserved(session: Session, artifact: DerivedArtifact) -> bool:
    """Whether an artifact has waited for long, and none of the workers that are there has its base model."""
    if artifact.base_model is None:
        return False
    age = select(database_now() - DerivedArtifact.created_at).where(DerivedArtifact.id == artifact.id)
    if session.scalars(age).one() <= UNSERVED_SECONDS:
        return False
    present = workers.present(session, Lane.CPU)
    return bool(present) and not any(workers.serves(worker, artifact.base_model) for worker in present)
