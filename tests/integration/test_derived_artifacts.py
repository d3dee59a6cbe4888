"""Reports and merged models over HTTP, made by a worker's own code. Tasks whose worker is lost."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.counted_objects import CountedObject
from app.database import database_now
from app.dataset_reports.service import MAX_PENDING
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.service import UNSERVED_SECONDS
from app.derived_artifacts.tables import DerivedArtifact
from app.fsck import Finding, repair
from app.models import repository as models
from app.models.tables import Model
from app.services import Services
from app.settings import Settings
from app.work_queue import MAX_LOST_ATTEMPTS
from app.workers import repository as workers
from tests.helpers.adapters import make_adapter
from tests.helpers.api import error_of, objects, upload
from tests.helpers.derived_artifacts import work
from tests.helpers.jobs import make_job
from tests.helpers.tiny_model import CHATML, make_tiny_model
from worker.housekeeping import keep_house
from worker.reaper import reap

PAIRS = b"".join(
    json.dumps({"prompt": f"say {k}", "chosen": "yes " * (k % 5 + 1), "rejected": "no"}).encode() + b"\n"
    for k in range(30)
)


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    make_tiny_model(tmp_path / "models" / "tiny", chat_template=CHATML)
    return Settings(home=tmp_path, database_url=database_url)


def test_a_report_is_made_at_upload(client: TestClient, services: Services) -> None:
    file_id = upload(client, PAIRS + b'{"prompt": "x", "chosen": "a", "rejected": "a"}\n')
    waiting = client.get(f"/v1/files/{file_id}/report")
    assert (waiting.status_code, waiting.headers["Retry-After"]) == (202, "1")
    assert work(services) == 1
    report = client.get(f"/v1/files/{file_id}/report").json()
    assert (report["format"], report["rows"], report["kept"]) == ("preference", 31, 30)
    assert report["dropped"] == {"identical_responses": 1}
    assert report["issues"] == [{"line": 31, "field": None, "reason": "identical_responses"}]
    assert report["tokens"] is None
    assert work(services) == 0, "the report is stored"
    error_of(client.get("/v1/files/file-none/report"), 404)


def test_a_report_in_tokens_shows_what_the_model_will_see(client: TestClient, services: Services) -> None:
    from transformers import AutoTokenizer

    file_id = upload(client, PAIRS)
    work(services)
    params: dict[str, str | int] = {"model": "tiny", "max_length": 4096}
    assert client.get(f"/v1/files/{file_id}/report", params=params).status_code == 202
    assert work(services) == 1
    report = client.get(f"/v1/files/{file_id}/report", params=params).json()["tokens"]
    tokenizer: Any = AutoTokenizer.from_pretrained(services.settings.models_dir / "tiny")
    rows = [json.loads(line) for line in PAIRS.splitlines()]
    chosen_texts, rejected_texts = (
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}],
                tokenize=False,
            )
            for row in rows
        ]
        for side in ("chosen", "rejected")
    )
    chosen_lengths, rejected_lengths = (
        [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        for texts in (chosen_texts, rejected_texts)
    )
    first = report["samples"][0]
    assert first["prompt"] + first["responses"][0] == chosen_texts[0]
    assert first["scored"][0].startswith("yes")
    prompts, chosen = report["lengths"]["prompt"], report["lengths"]["chosen"]
    assert prompts["mean"] + chosen["mean"] == pytest.approx(sum(chosen_lengths) / len(chosen_lengths), abs=0.11)
    assert (report["rows"], report["sampled_rows"], report["truncated_share"]) == (30, 30, 0.0)
    limit = int(sum(chosen_lengths) / len(chosen_lengths))
    truncated_share = sum(max(pair) > limit for pair in zip(chosen_lengths, rejected_lengths, strict=True)) / len(rows)
    assert 0.0 < truncated_share < 1.0
    short_params: dict[str, str | int] = {"model": "tiny", "max_length": limit}
    client.get(f"/v1/files/{file_id}/report", params=short_params)
    work(services)
    assert (
        client.get(f"/v1/files/{file_id}/report", params=short_params).json()["tokens"]["truncated_share"]
        == truncated_share
    )
    assert error_of(client.get(f"/v1/files/{file_id}/report", params={"model": "none"}), 400)["param"] == "model"


def test_a_mapping_given_at_upload_is_used(client: TestClient, services: Services) -> None:
    content = b"question,good,bad\nq1,a,b\nq2,c,d\n"
    mapping = {"prompt": "Q: {question}\n", "chosen": "good", "rejected": "bad"}
    file_id = upload(client, content, mapping=json.dumps(mapping))
    unmapped = upload(client, content)
    work(services)
    assert client.get(f"/v1/files/{file_id}/report").json()["kept"] == 2
    report = client.get(f"/v1/files/{unmapped}/report").json()
    assert not report["valid"] and "mapping" in report["error"]["message"]
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()
    assert job["mapping"]["prompt"] == "Q: {question}\n"
    body = {"model": "tiny", "training_file": file_id, "validation_file": unmapped}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)["param"] == "mapping"


def test_the_reports_that_wait_are_limited_for_each_project(client: TestClient, services: Services) -> None:
    """Each report takes minutes of a worker, and a read-only key can request it."""
    file_id = upload(client, PAIRS)
    work(services)
    url = f"/v1/files/{file_id}/report?model=tiny&max_length="
    answers = [client.get(f"{url}{length}") for length in range(100, 100 + MAX_PENDING + 1)]
    assert [answer.status_code for answer in answers] == [202] * MAX_PENDING + [429]
    assert error_of(answers[-1], 429)["code"] == "too_many_reports" and int(answers[-1].headers["Retry-After"]) > 0
    assert client.get(f"{url}100").status_code == 202, "a pending report can be requested again"


def test_the_report_of_a_deleted_file_is_deleted(client: TestClient, services: Services) -> None:
    file_id = upload(client, PAIRS)
    client.delete(f"/v1/files/{file_id}")
    work(services)
    keep_house(services)
    with services.database.read() as session:
        assert session.scalars(select(DerivedArtifact)).all() == []
    assert objects(services) == 0


def test_a_lost_worker_costs_an_attempt_and_a_stale_worker_writes_nothing(
    client: TestClient, services: Services
) -> None:
    upload(client, PAIRS)
    for lost_attempts in range(MAX_LOST_ATTEMPTS):
        with services.database.write() as session:
            session.execute(update(DerivedArtifact).values(eligible_at=0.0))
            task = artifacts.claim(session, f"worker {lost_attempts}", [])
        assert task is not None and task.attempt == lost_attempts + 1
        with services.database.write() as session:
            assert artifacts.claim(session, "another", []) is None
            session.execute(update(DerivedArtifact).values(lease_expires_at=database_now() - 1))
        reap(services.database)
        with services.database.write() as session:
            assert not artifacts.ARTIFACTS.heartbeat(session, task.id, task.attempt)
            assert not artifacts.finish(session, task.id, task.attempt, result={})
    with services.database.read() as session:
        (artifact,) = session.scalars(select(DerivedArtifact))
    assert (artifact.status, artifact.error and artifact.error["code"]) == ("failed", "worker_lost")


# -- models of jobs -------------------------------------------------------------------------------------------

NAME = "ft:tiny:default::abc"


@pytest.fixture
def finished_job(services: Services, tmp_path: Path) -> str:
    """The id of a job that left an adapter on `tiny`."""
    make_adapter(services.settings.models_dir / "tiny", tmp_path / "adapter")
    services.storage.put_folder("jobs/ftjob-1/attempt-2/model", tmp_path / "adapter")
    job_id = make_job(
        services, status="succeeded", fine_tuned_model=NAME, metrics={"loss": 0.5}, training_file="file-1"
    )
    with services.database.write() as session:
        session.add(
            Model(
                name=NAME, kind="adapter", project="default", created_at=database_now(), base_model="tiny", bytes=100,
                job_id=job_id, prefix="jobs/ftjob-1/attempt-2/model", details={"adapter": None, "foundation": None},
            )
        )  # fmt: skip
    return job_id


def test_a_merged_model_is_made_once_and_streamed(
    client: TestClient, services: Services, finished_job: str, tmp_path: Path
) -> None:
    url = f"/v1/models/{NAME}/download?format=merged&dtype=fp16"
    assert client.get(url).status_code == 202
    assert client.get(url).headers["Retry-After"] == "2"
    assert work(services) == 1
    answer = client.get(url)
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(archive.getnames())
    with services.database.write() as session:
        session.execute(update(DerivedArtifact).values(finished_at=database_now() - 2 * 24 * 3600))
    keep_house(services)
    assert services.storage.list("merged") == [], "an old merged model is deleted, and made again on request"
    assert counted(services) == []
    assert client.get(url).status_code == 202
    work(services)
    assert client.delete(f"/v1/models/{NAME}").status_code == 200
    assert services.storage.list("merged") == services.storage.list("jobs") == []
    assert counted(services) == []


def counted(services: Services) -> list[str]:
    """The folders of merged models that count as stored."""
    with services.database.read() as session:
        return list(session.scalars(select(CountedObject.key)))


def test_a_merged_model_counts_from_its_result_until_it_is_forgotten(
    client: TestClient, services: Services, finished_job: str
) -> None:
    """A merge that its worker was too late to report counts for nothing. Pruning removes its objects."""
    assert client.get(f"/v1/models/{NAME}/download?format=merged").status_code == 202
    result = {"prefix": "merged/task-1/attempt-1", "bytes": 100}
    with services.database.write() as session:
        lost = artifacts.claim(session, "lost", ["tiny"])
        assert lost is not None
        artifacts.recover(session, lost, "The worker was lost.")
        assert not artifacts.finish(session, lost.id, lost.attempt, result=result)
        session.execute(update(DerivedArtifact).values(eligible_at=0.0))
    assert counted(services) == []
    assert work(services) == 1
    assert counted(services) == [f"merged/{lost.id}/attempt-2"]
    repair(services, Finding("model", NAME, "its objects are gone"))
    assert counted(services) == []


def test_a_model_in_use_is_not_deleted(client: TestClient, services: Services, finished_job: str) -> None:
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {})
    job = client.post("/v1/fine_tuning/jobs", json={"model": NAME, "training_file": upload(client, PAIRS)}).json()
    error = error_of(client.delete(f"/v1/models/{NAME}"), 409)
    assert error["code"] == "model_in_use" and job["id"] in error["message"]
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/models/{NAME}").json()["deleted"]


def test_the_lineage_of_a_model_names_its_base_steps_and_files(client: TestClient, finished_job: str) -> None:
    lineage = client.get(f"/v1/models/{NAME}/lineage").json()
    assert (lineage["base_model"], lineage["base_revision"]) == ("tiny", "r1")
    (step,) = lineage["steps"]
    assert (step["job"], step["started_from"], step["metrics"]) == (finished_job, "tiny", {"loss": 0.5})
    assert step["files"] == {"file-1": None}
    assert client.get("/v1/models/tiny/lineage").json()["steps"] == []
    error_of(client.get("/v1/models/none/lineage"), 404)


def test_counts_for_a_model_that_no_cpu_worker_may_get_end_with_the_reason(
    client: TestClient, services: Services
) -> None:
    """Without a bound, the report and the estimate would answer 202 for ever."""
    with services.database.write() as session:
        models.register(session, "org/elsewhere", "r1", {})
        workers.report(session, "cpu-1", "cpu", ["tiny"], {})
    file_id = upload(client, PAIRS)
    work(services)
    ask = partial(client.get, f"/v1/files/{file_id}/report", params={"model": "org/elsewhere"})
    body = {"model": "org/elsewhere", "training_file": file_id, "method": {"type": "dpo"}}
    estimate = partial(client.post, "/v1/fine_tuning/estimate", json=body)
    assert ask().status_code == 202 and estimate().status_code == 202
    assert work(services) == 0
    with services.database.write() as session:
        session.execute(update(DerivedArtifact).values(created_at=DerivedArtifact.created_at - UNSERVED_SECONDS - 1))
    error = error_of(ask(), 400)
    assert error["code"] == "model_unavailable" and "'org/elsewhere'" in error["message"]
    (refused,) = estimate().json()["refused"]
    assert refused["code"] == "model_unavailable" and refused["param"] == "training_file"
    with services.database.write() as session:
        workers.report(session, "cpu-1", "cpu", ["tiny", "org/*"], {})
    assert ask().status_code == 202, "a worker that may download it has come"
