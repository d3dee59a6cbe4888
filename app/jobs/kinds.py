"""The kinds of jobs, one record each. How a job is queued, run and recovered does not depend on its kind.

Beside its record, a kind has an HTTP service (`Lifecycle`), a file check (`worker.validator`) and an attempt
(`worker.runner`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from app.spec.evaluation import EvaluationSpec
from app.spec.job import CLASSIFIER, MORE, JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec

AnySpec = JobSpec | EvaluationSpec | LabellingSpec
StoredSpec = JsonObject
"""The spec of a job as its row stores it."""


@dataclass(frozen=True)
class JobKind:
    """The names of a kind of job, its path over HTTP, and the files and models that it needs."""

    name: str
    """The value of the column `kind` in the rows of its jobs."""
    noun: str
    """Its name in a sentence: `The job was cancelled`."""
    title: str
    """Its full name: `No such fine-tuning job`."""
    code: str
    """The start of its error codes: `fine_tuning_job_not_found`."""
    id_prefix: str
    path: str
    """The path of its jobs over HTTP."""
    webhook: str
    """The start of the names of its webhook events: `fine_tuning.job.succeeded`."""
    started: str
    """The message of the event that reports its start."""
    used: str
    """The verb that an error message uses for its files: `training_file cannot be trained on`."""
    file_code: Callable[[str], str]
    """The error code of a bad file, from the field that names the file."""
    read: Callable[[StoredSpec], AnySpec]
    models: Callable[[StoredSpec], list[str | None]]
    """Names of the models that a job loads beside the one in the column `model`."""

    def files(self, spec: StoredSpec) -> list[str]:
        """Ids of the files that a job reads."""
        return [file_id for _, file_id in self.read(spec).files()]


def _training_models(spec: StoredSpec) -> list[str | None]:
    reference = ((spec["method"].get("dpo") or {}).get("hyperparameters") or {}).get("reference_model")
    graders = JobSpec.stored(spec).grader_models if spec["method"].get("reinforcement") else []
    return [reference, *(name for _, name in graders)]


def _training_file_code(field: str) -> str:
    name = field.removeprefix("sft.")
    if field.endswith(CLASSIFIER):
        return "invalid_file"
    return f"invalid_{'training_file' if name.startswith(MORE) else name}"


TRAINING_JOB = JobKind(
    name="training",
    noun="job",
    title="fine-tuning job",
    code="fine_tuning_job",
    id_prefix="ftjob",
    path="/v1/fine_tuning/jobs",
    webhook="fine_tuning.job",
    started="Fine-tuning job started.",
    used="trained on",
    file_code=_training_file_code,
    read=JobSpec.stored,
    models=_training_models,
)
EVALUATION_JOB = JobKind(
    name="evaluation",
    noun="evaluation",
    title="evaluation",
    code="evaluation",
    id_prefix="eval",
    path="/v1/evaluations",
    webhook="evaluation",
    started="Evaluation started.",
    used="evaluated",
    file_code=lambda field: "invalid_file",
    read=EvaluationSpec.stored,
    models=lambda spec: [name for _, name in EvaluationSpec.stored(spec).models()],
)
LABELLING_JOB = JobKind(
    name="labelling",
    noun="labelling",
    title="labelling",
    code="labelling",
    id_prefix="labelling",
    path="/v1/labellings",
    webhook="labelling",
    started="Labelling started.",
    used="labelled",
    file_code=lambda field: "invalid_file",
    read=LabellingSpec.stored,
    models=lambda spec: [name for _, name in LabellingSpec.stored(spec).models()],
)
KINDS = {kind.name: kind for kind in (TRAINING_JOB, EVALUATION_JOB, LABELLING_JOB)}
