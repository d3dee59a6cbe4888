"""The HTTP operations on labellings."""

from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database
from app.dataset_reports import service as reports
from app.encryption import SecretBox
from app.errors import ServiceError
from app.estimates import fit
from app.files import repository as files
from app.idempotency.service import RequestIdentity
from app.jobs.event_feed import Feed
from app.jobs.kinds import LABELLING_JOB
from app.jobs.queue_forecast import QueuePlace
from app.jobs.result_files import ResultFiles
from app.jobs.sides import require_model, require_reachable
from app.jobs.tables import Job
from app.keys.service import Keys
from app.labellings.estimate import estimate
from app.labellings.schemas import LabellingEstimate, LabellingObject
from app.models import repository as models
from app.spec.datasets.mapping import Mapping
from app.spec.labelling import LabellingSpec
from app.storage import Storage

PURPOSES = ("evals", "fine-tune")


class Labellings(ResultFiles[LabellingObject]):
    """Create, estimate, find, follow and cancel labellings, and read their results."""

    KIND = LABELLING_JOB

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broker: Broker,
        keys: Keys,
        feed: Feed,
        secret_box: SecretBox,
        private_hosts: tuple[str, ...],
    ) -> None:
        super().__init__(database, storage, broker, keys, feed)
        self.secret_box, self.private_hosts = secret_box, private_hosts

    def show(self, job: Job, place: QueuePlace | None = None) -> LabellingObject:
        return LabellingObject.of(job, place)

    def create(self, project: str, spec: LabellingSpec, identity: RequestIdentity) -> LabellingObject:
        """Check the models and files of the spec, store the labelling, and wake a CPU worker to check the files."""
        require_reachable(spec.endpoints(), self.private_hosts)
        return self._create(
            project, spec, identity, lambda session: self.add(session, project, spec, identity.request_id)
        )

    def estimate(self, project: str, spec: LabellingSpec) -> LabellingEstimate | None:
        """The answers and questions of a labelling; None while its file is being read. Nothing is stored or run."""
        with self.database.write() as session:
            _, resolved = self._prepare(session, project, spec)
            file = files.require(session, project, resolved.data, "data", PURPOSES)
            mapping = resolved.mapping.model_dump(mode="json") if resolved.mapping is not None else None
            if mapping != file.mapping:
                message = "An estimate reads the file as it was uploaded: upload it with this 'mapping'."
                raise ServiceError(message, param="mapping", code="invalid_value")
            artifact = reports.structural_report(session, project, resolved.data)
            summary = artifact.result if artifact.status == "done" else None
        if summary is None:
            self.broker.wake(Lane.CPU)
            return None
        if not summary["valid"]:
            reason = summary["error"]["message"] if summary.get("error") else "no row of it is left"
            raise ServiceError(f"The file cannot be labelled: {reason}", param="data", code="invalid_value")
        return estimate(resolved, summary)

    @staticmethod
    def _prepare(
        session: Session, project: str, spec: LabellingSpec
    ) -> tuple[list[models.ResolvedModel], LabellingSpec]:
        """(the models of the labelling, the spec as it would run). Raises `ServiceError` if it cannot run."""
        used = [
            require_model(session, project, field, name, scores=spec.scores(field)) for field, name in spec.models()
        ]
        for field, file_id in spec.files():
            file = files.require(session, project, file_id, field, PURPOSES)
            if file.mapping is not None:
                spec = spec.reading(field, Mapping.model_validate(file.mapping))
        writer = next((writer.model for writer in spec.writers if writer.model is not None), None)
        training = models.job_of(session, project, writer) if writer is not None else None
        quantization = spec.quantization or (training.spec["quantization"] if training is not None else "none")
        resolved = spec.model_copy(update={"quantization": quantization})
        return used, resolved.inheriting(training.spec if training is not None else {}).resolved()

    def add(self, session: Session, project: str, spec: LabellingSpec, request_id: str | None) -> Job:
        """Check the models and files of the spec and store the labelling. Raises `ServiceError`."""
        used, resolved = self._prepare(session, project, spec)
        main = used[0] if used else None
        # A reward model has whole weights: it needs no base model.
        bases = [model.base_model for model in used if model.kind != "reward"]
        fit.require_devices(session, spec.resources, *bases)
        return self._add(
            session,
            project,
            spec,
            request_id,
            bases,
            model=main.name if main is not None else "",
            base_model=bases[0] if bases else "",
            foundation=main.foundation if main is not None else None,
            training_file=spec.data,
            validation_file=None,
            spec=resolved.sealed(self.secret_box.seal).to_store(),
            least_devices=spec.resources.least,
            most_devices=spec.resources.most,
            nodes=spec.resources.nodes,
        )
