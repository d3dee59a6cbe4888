"""Ask for a dataset report; a worker of the CPU lane makes it."""

from typing import Any

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

MAX_PENDING = 50


def structural(session: Session, project: str, file_id: str) -> DerivedArtifact:
    """The task of the report without a model."""
    return artifacts.ensure(
        session, artifacts.REPORT, file_id, project=project, owner=file_id, arguments={"file_id": file_id}
    )


def with_tokens(session: Session, file: File, asked: dict[str, Any], model: models.ResolvedModel) -> DerivedArtifact:
    """The task of the report in tokens of a model. `asked`: model, max_length, method, need, rendering, …

    Raises `TooMany` where the project has many that wait: each of so many ways to count a file is work for minutes.
    """
    subject = f"{file.id} " + " ".join(f"{name}={asked[name]}" for name in sorted(asked))
    if (
        artifacts.find(session, artifacts.REPORT, subject) is None
        and artifacts.pending(session, file.project, 3600.0) >= MAX_PENDING
    ):
        message = f"{MAX_PENDING} reports in tokens are being made for this project. Ask again when some are done."
        raise TooMany(message, 10, code="too_many_reports")
    return artifacts.ensure(
        session,
        artifacts.REPORT,
        subject,
        project=file.project,
        owner=file.id,
        base_model=model.base_model,
        arguments={"file_id": file.id, **asked},
    )


class Reports:
    """Reports of files."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self.database, self.broker = database, broker

    def begin(self, project: str, file: FileObject) -> None:
        """Have the report made of a file that was just uploaded."""
        if file.purpose == "fine-tune":
            with self.database.write() as session:
                structural(session, project, file.id)
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
        """The report, in tokens of `model` too where one is named; None while it is being made."""
        with self.database.write() as session:
            file = files.get(session, project, file_id)
            if file is None:
                raise no_such("File object", file_id, code="file", param="file_id")
            task = structural(session, project, file_id)
            answers = task.result is not None and task.result["valid"] and task.result["kind"] != Kind.PROMPTS
            if task.status == "done" and model is not None and answers:
                found = models.require(session, project, model, "model")
                assert task.result is not None
                pairs = task.result["kind"] != Kind.SUPERVISED
                asked = {
                    "model": model,
                    "max_length": max_length or DEFAULT_MAX_LENGTH,
                    "method": method or ("dpo" if pairs else "supervised"),
                    "rendering": (rendering or RenderingSettings()).undated,
                }
                asked |= {"need": "supervised" if asked["method"] == "supervised" else task.result["kind"]}
                task = with_tokens(session, file, asked, found)
        made = result(task)
        if made is None:
            self.broker.wake(Lane.CPU)
            return None
        return DatasetReport(file_id=file_id, **made)
