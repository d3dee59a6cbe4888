"""Reports and merged models over HTTP, made by a worker's own code; and what happens to a task whose worker is lost."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.database import database_now
from app.dataset_reports.service import MAX_PENDING
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.models import repository as models
from app.models.tables import Model
from app.services import Services
from app.settings import Settings
from app.work_queue import MAX_LOST_ATTEMPTS
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
    found = client.get(f"/v1/files/{file_id}/report").json()
    assert (found["format"], found["rows"], found["kept"]) == ("preference", 31, 30)
    assert found["dropped"] == {"identical_responses": 1}
    assert found["issues"] == [{"line": 31, "field": None, "reason": "identical_responses"}]
    assert found["tokens"] is None
    assert work(services) == 0, "it is kept"
    error_of(client.get("/v1/files/file-none/report"), 404)


def test_a_report_in_tokens_shows_what_the_model_will_see(client: TestClient, services: Services) -> None:
    from transformers import AutoTokenizer

    file_id = upload(client, PAIRS)
    work(services)
    asked: dict[str, Any] = {"model": "tiny", "max_length": 4096}
    assert client.get(f"/v1/files/{file_id}/report", params=asked).status_code == 202
    assert work(services) == 1
    found = client.get(f"/v1/files/{file_id}/report", params=asked).json()["tokens"]
    tokenizer: Any = AutoTokenizer.from_pretrained(services.settings.models_dir / "tiny")
    rows = [json.loads(line) for line in PAIRS.splitlines()]
    texts, others = (
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}],
                tokenize=False,
            )
            for row in rows
        ]
        for side in ("chosen", "rejected")
    )
    lengths, other_lengths = (
        [len(tokenizer(text, add_special_tokens=False).input_ids) for text in found] for found in (texts, others)
    )
    first = found["samples"][0]
    assert first["prompt"] + first["responses"][0] == texts[0]
    assert first["scored"][0].startswith("yes")
    prompts, chosen = found["lengths"]["prompt"], found["lengths"]["chosen"]
    assert prompts["mean"] + chosen["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.11)
    assert (found["rows"], found["sampled_rows"], found["truncated_share"]) == (30, 30, 0.0)
    limit = int(sum(lengths) / len(lengths))
    cut = sum(max(pair) > limit for pair in zip(lengths, other_lengths, strict=True)) / len(rows)
    assert 0.0 < cut < 1.0
    short: dict[str, Any] = {"model": "tiny", "max_length": limit}
    client.get(f"/v1/files/{file_id}/report", params=short)
    work(services)
    assert client.get(f"/v1/files/{file_id}/report", params=short).json()["tokens"]["truncated_share"] == cut
    assert error_of(client.get(f"/v1/files/{file_id}/report", params={"model": "none"}), 400)["param"] == "model"


def test_a_mapping_given_at_upload_is_used(client: TestClient, services: Services) -> None:
    content = b"question,good,bad\nq1,a,b\nq2,c,d\n"
    mapping = {"prompt": "Q: {question}\n", "chosen": "good", "rejected": "bad"}
    file_id = upload(client, content, mapping=json.dumps(mapping))
    plain = upload(client, content)
    work(services)
    assert client.get(f"/v1/files/{file_id}/report").json()["kept"] == 2
    bad = client.get(f"/v1/files/{plain}/report").json()
    assert not bad["valid"] and "mapping" in bad["error"]["message"]
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()
    assert job["mapping"]["prompt"] == "Q: {question}\n"
    both = {"model": "tiny", "training_file": file_id, "validation_file": plain}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=both), 400)["param"] == "mapping"


def test_a_file_is_not_counted_in_too_many_ways_at_once(client: TestClient, services: Services) -> None:
    """Each is minutes of a worker, and a key that may only read can ask for them."""
    file_id = upload(client, PAIRS)
    work(services)
    url = f"/v1/files/{file_id}/report?model=tiny&max_length="
    answers = [client.get(f"{url}{length}") for length in range(100, 100 + MAX_PENDING + 1)]
    assert [answer.status_code for answer in answers] == [202] * MAX_PENDING + [429]
    assert error_of(answers[-1], 429)["code"] == "too_many_reports" and int(answers[-1].headers["Retry-After"]) > 0
    assert client.get(f"{url}100").status_code == 202, "what is being made can be asked for"


def test_a_deleted_files_report_goes_with_it(client: TestClient, services: Services) -> None:
    file_id = upload(client, PAIRS)
    client.delete(f"/v1/files/{file_id}")
    work(services)
    keep_house(services)
    with services.database.read() as session:
        assert session.scalars(select(DerivedArtifact)).all() == []
    assert objects(services) == 0


def test_a_lost_worker_costs_an_attempt_and_a_stale_one_writes_nothing(client: TestClient, services: Services) -> None:
    upload(client, PAIRS)
    for lost in range(MAX_LOST_ATTEMPTS):
        with services.database.write() as session:
            session.execute(update(DerivedArtifact).values(eligible_at=0.0))
            task = artifacts.claim(session, f"worker {lost}", [])
        assert task is not None and task.attempt == lost + 1
        with services.database.write() as session:
            assert artifacts.claim(session, "another", []) is None
            session.execute(update(DerivedArtifact).values(lease_expires_at=database_now() - 1))
        reap(services.database)
        with services.database.write() as session:
            assert not artifacts.ARTIFACTS.heartbeat(session, task.id, task.attempt)
            assert not artifacts.finish(session, task.id, task.attempt, result={})
    with services.database.read() as session:
        (found,) = session.scalars(select(DerivedArtifact))
    assert (found.status, found.error and found.error["code"]) == ("failed", "worker_lost")


# -- made models ----------------------------------------------------------------------------------------------

NAME = "ft:tiny:default::abc"


@pytest.fixture
def made(services: Services, tmp_path: Path) -> str:
    """An adapter on `tiny`, as a job leaves it."""
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
    client: TestClient, services: Services, made: str, tmp_path: Path
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
    assert services.storage.list("merged") == [], "made again when asked for again"
    assert client.get(url).status_code == 202
    work(services)
    assert client.delete(f"/v1/models/{NAME}").status_code == 200
    assert services.storage.list("merged") == services.storage.list("jobs") == []


def test_a_model_in_use_is_not_deleted(client: TestClient, services: Services, made: str) -> None:
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {})
    job = client.post("/v1/fine_tuning/jobs", json={"model": NAME, "training_file": upload(client, PAIRS)}).json()
    error = error_of(client.delete(f"/v1/models/{NAME}"), 409)
    assert error["code"] == "model_in_use" and job["id"] in error["message"]
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/models/{NAME}").json()["deleted"]


def test_the_lineage_of_a_model(client: TestClient, made: str) -> None:
    found = client.get(f"/v1/models/{NAME}/lineage").json()
    assert (found["base_model"], found["base_revision"]) == ("tiny", "r1")
    (step,) = found["steps"]
    assert (step["job"], step["started_from"], step["metrics"]) == (made, "tiny", {"loss": 0.5})
    assert step["files"] == {"file-1": None}
    assert client.get("/v1/models/tiny/lineage").json()["steps"] == []
    error_of(client.get("/v1/models/none/lineage"), 404)
