"""Objects that the store has lost: whoever reads them says so, and nothing is taken for "none"."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.database import database_now
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.models.tables import Model
from app.services import Services
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.stored_content import FolderContent, store_folder
from tests.helpers.api import ROW, error_of, upload
from tests.helpers.derived_artifacts import work
from tests.helpers.jobs import check_files, claim, get, make_job
from tests.helpers.tiny_model import make_tiny_model
from worker.base_models import BaseModels
from worker.device_health import DeviceHealth
from worker.evaluation_run import Evaluation
from worker.processes import ForkServer
from worker.training_run import Training

NAME, CHECKPOINT = "ft:tiny:default::lost", "ft:tiny:default::lost:ckpt-step-3"
PREFIX = "jobs/ftjob-made/attempt-2/model"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 1000, "tokenizer.json": b"{}"}
WEIGHTS = f"{PREFIX}/adapter_model.safetensors"
STEP = "jobs/ftjob-made/attempt-2/step-3"


def base_of(services: Services) -> None:
    make_tiny_model(services.settings.models_dir / "tiny")


def add_model(services: Services, folder: Path, kind: str = "adapter") -> None:
    """A trained model and a checkpoint of its job, with the same files."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_bytes(text)
    job_id = make_job(services, name="made", status=Status.SUCCEEDED, fine_tuned_model=NAME)
    content = store_folder(services.storage, PREFIX, folder)
    assert store_folder(services.storage, "jobs/ftjob-made/attempt-2/step-3/model", folder) == content
    with services.database.write() as session:
        session.add(
            Model(
                name=NAME, kind=kind, project="default", created_at=database_now(), base_model="tiny", job_id=job_id,
                prefix=PREFIX, details={"adapter": None, "foundation": None}, **content.as_columns(),
            )
        )  # fmt: skip
        session.add(
            Checkpoint(
                id="ftckpt-3", job_id=job_id, created_at=database_now(), stage="dpo", step_number=3, metrics={},
                model_name=CHECKPOINT, prefix=STEP, content_of=STEP, **content.as_columns(),
            )
        )  # fmt: skip


LOSSES: dict[str, tuple[Callable[[Services, str], None], str]] = {
    "all": (lambda services, prefix: services.storage.delete_folder(prefix), "0 of its 3 files are there"),
    "one": (
        lambda services, prefix: services.storage.delete(f"{prefix}/adapter_model.safetensors"),
        "2 of its 3 files are there",
    ),
    "a part": (
        lambda services, prefix: services.storage.put_bytes(f"{prefix}/adapter_model.safetensors", b"w" * 999),
        "its files have 1003 bytes and should have 1004",
    ),
}
"""Ways in which a folder loses objects, and what a reader says."""
CHANGED = (
    lambda services, prefix: services.storage.put_bytes(f"{prefix}/adapter_model.safetensors", b"v" * 1000),
    "its files are not those that were stored",
)


def attempt_of(services: Services, job: Job, kind: type[Training | Evaluation]) -> Training | Evaluation:
    """An attempt at a claimed job. Its trainer is not started, because its folder cannot be prepared."""
    base_models = BaseModels(services.settings)
    return kind(services, base_models, job, threading.Event(), ForkServer(), DeviceHealth("cpu"))


def run_job(services: Services, body: dict[str, object], file_id: str) -> Job:
    """Run a training on a file of the service."""
    spec = JobSpec.model_validate({"model": "tiny", "training_file": file_id, "method": {"type": "dpo"}} | body)
    stored = spec.resolved().model_dump(mode="json")
    job_id = make_job(services, name="reader", model=spec.model, training_file=file_id, spec=stored)
    job = claim(services)
    assert job is not None
    attempt_of(services, job, Training).run()
    return get(services, job_id)


def run_evaluation(services: Services, body: dict[str, object], file_id: str) -> Job:
    fields = {"type": "preference", "data": file_id, "candidate": {"model": "tiny"}, "baseline": {"model": "tiny"}}
    spec = EvaluationSpec.model_validate(fields | body).resolved()
    stored = spec.model_dump(mode="json")
    job_id = make_job(services, name="reader", kind="evaluation", training_file=file_id, spec=stored)
    job = claim(services)
    assert job is not None
    attempt_of(services, job, Evaluation).run()
    return get(services, job_id)


JUDGE = {"type": "reward_model", "model": NAME}
REFERENCE: dict[str, object] = {"method": {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": NAME}}}}
READERS: dict[str, Callable[[Services, str], Job]] = {
    "a training from it": lambda services, file: run_job(services, {"model": NAME}, file),
    "a training from its checkpoint": lambda services, file: run_job(services, {"model": CHECKPOINT}, file),
    "a training with it as the reference": lambda services, file: run_job(services, REFERENCE, file),
    "an evaluation of it": lambda services, file: run_evaluation(services, {"candidate": {"model": NAME}}, file),
    "an evaluation against it": lambda services, file: run_evaluation(services, {"baseline": {"model": NAME}}, file),
}
GRADED = {
    "type": "reinforcement",
    "reinforcement": {"grader": {"type": "reward_model", "name": "learned", "model": NAME}},
}
OTHER_KINDS: dict[str, tuple[str, Callable[[Services, str], Job]]] = {
    "a training from a full model": ("full", lambda services, file: run_job(services, {"model": NAME}, file)),
    "a training with a reward model as its grader": (
        "reward",
        lambda services, file: run_job(services, {"method": GRADED}, file),
    ),
    "an evaluation with a reward model as its judge": (
        "reward",
        lambda services, file: run_evaluation(services, {"type": "win_rate", "judge": JUDGE}, file),
    ),
}
"""All that reads the whole files of a model on a worker."""


@pytest.mark.parametrize("loss", [*LOSSES.values(), CHANGED], ids=[*LOSSES, "changed"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_job_whose_model_has_lost_files_fails_and_does_not_use_its_base(
    client: TestClient, services: Services, tmp_path: Path, reader: Callable[[Services, str], Job],
    loss: tuple[Callable[[Services, str], None], str],
) -> None:  # fmt: skip
    base_of(services)
    add_model(services, tmp_path / "adapter")
    lose, reason = loss
    for prefix in (PREFIX, "jobs/ftjob-made/attempt-2/step-3/model"):
        lose(services, prefix)
    job = reader(services, upload(client, ROW))
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "model_not_found" and reason in job.error["message"]


@pytest.mark.parametrize(("kind", "reader"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_lost_model_with_whole_weights_fails_the_job_too(
    client: TestClient, services: Services, tmp_path: Path, kind: str, reader: Callable[[Services, str], Job]
) -> None:
    base_of(services)
    add_model(services, tmp_path / "model", kind)
    services.storage.delete_folder(PREFIX)
    job = reader(services, upload(client, ROW))
    assert job.error is not None and job.error["code"] == "model_not_found"
    assert "0 of its 3 files are there" in job.error["message"]


def test_a_checkpoint_that_an_earlier_version_has_moved_is_not_compared_with_its_old_content(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    """The earlier version changes the prefix alone."""
    add_model(services, tmp_path / "adapter")
    services.storage.put_bytes("jobs/ftjob-made/attempt-3/step-3/model/adapter_model.safetensors", b"other")
    with services.database.write() as session:
        session.execute(update(Checkpoint).values(prefix="jobs/ftjob-made/attempt-3/step-3"))
    assert client.get(f"/v1/models/{CHECKPOINT}/download").status_code == 200


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kind", ["adapter", "full", "reward"])
def test_a_download_of_a_model_that_has_lost_files_is_answered_410(
    client: TestClient, services: Services, tmp_path: Path, kind: str, loss: tuple[Callable[[Services, str], None], str]
) -> None:
    add_model(services, tmp_path / "adapter", kind)
    assert client.get(f"/v1/models/{NAME}/download").status_code == 200
    lose, reason = loss
    for prefix in (PREFIX, "jobs/ftjob-made/attempt-2/step-3/model"):
        lose(services, prefix)
    for path in (f"{NAME}/download", f"{CHECKPOINT}/download", f"{NAME}/download?format=merged"):
        url = f"/v1/models/{path}"
        error = error_of(client.get(url), 410)
        assert error["code"] == "content_gone" and reason in error["message"], url


def test_a_folder_of_an_earlier_version_has_no_number_and_must_hold_something(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    add_model(services, tmp_path / "adapter")
    with services.database.write() as session:
        session.execute(update(Model).values(objects=None, sha256=None))
    services.storage.delete(WEIGHTS)
    assert client.get(f"/v1/models/{NAME}/download").status_code == 200
    services.storage.delete_folder(PREFIX)
    assert "none of its files is there" in error_of(client.get(f"/v1/models/{NAME}/download"), 410)["message"]


@pytest.mark.parametrize("content", [None, ROW[:-9], ROW.replace(b"a", b"z")], ids=["missing", "short", "changed"])
def test_a_job_whose_file_is_lost_fails_and_trains_on_nothing_else(
    client: TestClient, services: Services, content: bytes | None
) -> None:
    base_of(services)
    file_id = upload(client, ROW)
    lose(services, file_id, content)
    job = run_job(services, {}, file_id)
    assert job.error is not None and (job.error["code"], job.error["param"]) == ("file_not_found", "training_file")
    other = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
    check_files(services)
    error = get(services, other).error
    assert error is not None and f"The file {file_id} cannot be read" in error["message"]


def lose(services: Services, file_id: str, content: bytes | None) -> None:
    key = f"files/{file_id}"
    services.storage.delete(key) if content is None else services.storage.put_bytes(key, content)


@pytest.mark.parametrize("content", [None, ROW[:-9]], ids=["missing", "short"])
def test_the_content_of_a_lost_file_is_answered_410(
    client: TestClient, services: Services, content: bytes | None
) -> None:
    file_id = upload(client, ROW)
    lose(services, file_id, content)
    for headers in ({}, {"Range": "bytes=1-5"}):
        error = error_of(client.get(f"/v1/files/{file_id}/content", headers=headers), 410)
        assert error["code"] == "content_gone" and error["param"] == "file_id"
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    error_of(client.get(f"/v1/files/{file_id}/content"), 404)


def test_a_merged_model_that_is_lost_is_merged_again(client: TestClient, services: Services, tmp_path: Path) -> None:
    base_of(services)
    add_model(services, tmp_path / "adapter")
    url = f"/v1/models/{NAME}/download?format=merged"
    assert client.get(url).status_code == 202
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"m" * 10)
    content = store_folder(services.storage, "merged/x", tmp_path / "merged")
    with services.database.write() as session:
        done = {"status": "done", "result": {"prefix": "merged/x", **content.as_columns()}}
        session.execute(update(DerivedArtifact).values(**done))
    assert client.get(url).status_code == 200
    services.storage.delete_folder("merged/x")
    assert client.get(url).status_code == 202


def test_a_report_in_tokens_needs_the_files_of_its_model(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    base_of(services)
    add_model(services, tmp_path / "adapter")
    services.storage.delete_folder(PREFIX)
    url = f"/v1/files/{upload(client, ROW)}/report"
    for _ in range(2):  # the report of the file, then its tokens
        assert client.get(url, params={"model": NAME}).status_code == 202
        work(services)
    assert error_of(client.get(url, params={"model": NAME}), 410)["code"] == "content_gone"


def test_the_content_of_a_folder_is_its_number_of_files_their_size_and_their_hash(tmp_path: Path) -> None:
    """Each part of it tells two folders apart that the others do not."""

    def content(**files: str) -> FolderContent:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return FolderContent.of(folder)

    assert content(a="xy", b="z") == content(b="z", a="xy")
    different = [content(a="xy"), content(a="x", b="y"), content(a="xz"), content(b="xy"), content(a="xy", b="")]
    assert len({each.sha256 for each in different}) == len(different)
    assert (different[1].objects, different[1].bytes) == (2, 2)
