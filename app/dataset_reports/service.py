"""Request dataset reports. CPU workers make them."""

from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database
from app.dataset_reports.schemas import DatasetReport
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.service import result
from app.derived_artifacts.tables import DerivedArtifact
from app.errors import TooMany, no_such
from app.files import repository as files
from app.files.schemas import FileObject
from app.files.tables import File
from app.models import repository as models
from app.spec.datasets.example import Kind
from app.spec.datasets.rendering import RenderingSettings
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.json_types import JsonObject

MAX_PENDING = 50
"""Maximum token reports that a project may wait for."""


def structural_report(session: Session, project: str, file_id: str) -> DerivedArtifact:
    """The artifact of the report that needs no model. It is requested if it does not exist."""
    return artifacts.ensure(
        session, artifacts.REPORT, file_id, project=project, owner=file_id, arguments={"file_id": file_id}
    )


def token_report(session: Session, file: File, arguments: JsonObject, model: models.ResolvedModel) -> DerivedArtifact:
    """The artifact of the report in tokens of `model`. It is requested if it does not exist.

    `arguments`: model, max_length, method, need, rendering, and optionally loss_on, mapping and truncation. Raises
    `TooMany` if the project already waits for many reports, because each may take minutes of a worker.
    """
    subject = f"{file.id} " + " ".join(f"{name}={arguments[name]}" for name in sorted(arguments))
    if (
        artifacts.find(session, artifacts.REPORT, subject) is None
        and artifacts.pending_token_reports(session, file.project, 3600.0) >= MAX_PENDING
    ):
        message = f"{MAX_PENDING} token reports are pending for this project. Ask again when some are done."
        raise TooMany(message, 10, code="too_many_reports")
    return artifacts.ensure(
        session,
        artifacts.REPORT,
        subject,
        project=file.project,
        owner=file.id,
        base_model=model.base_model,
        arguments={"file_id": file.id, **arguments},
    )


class Reports:
    """Reports on files."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self.database, self.broker = database, broker

    def begin(self, project: str, file: FileObject) -> None:
        """Request the report on a new file, if it is for training."""
        if file.purpose == "fine-tune":
            with self.database.write() as session:
                structural_report(session, project, file.id)
            self.broker.wake(Lane.CPU)

    def get(
        self,
        project: str,
        file_id: str,
        *,
        model: str | None,
        max_length: int | None = None,
        method: str | None = None,
        rendering: RenderingSettings | None = None,
    ) -> DatasetReport | None:
        """The report on a file; None while it is being made. With `model`, it has lengths in tokens too.

        A file that is not valid or has no answers gets no token lengths.
        """
        with self.database.write() as session:
            file = files.get(session, project, file_id)
            if file is None:
                raise no_such("File object", file_id, code="file", param="file_id")
            artifact = structural_report(session, project, file_id)
            summary = artifact.result
            has_answers = summary is not None and summary["valid"] and summary["kind"] != Kind.PROMPTS
            if artifact.status == "done" and model is not None and has_answers:
                resolved = models.require(session, project, model, "model")
                assert summary is not None
                pairs = summary["kind"] != Kind.SUPERVISED
                arguments = {
                    "model": model,
                    "max_length": max_length or DEFAULT_MAX_LENGTH,
                    "method": method or ("dpo" if pairs else "supervised"),
                    "rendering": (rendering or RenderingSettings()).undated,
                }
                arguments |= {"need": "supervised" if arguments["method"] == "supervised" else summary["kind"]}
                artifact = token_report(session, file, arguments, resolved)
            report = result(session, artifact)
        if report is None:
            self.broker.wake(Lane.CPU)
            return None
        return DatasetReport(file_id=file_id, **report)
