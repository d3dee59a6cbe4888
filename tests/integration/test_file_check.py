"""The check of a job's files, before any GPU. It renders rows with the model's tokenizer, as the training would."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.jobs.states import Status
from app.jobs.tables import Job
from app.models.tables import Model
from app.services import Services
from tests.helpers.api import upload
from tests.helpers.jobs import check_files
from tests.helpers.tiny_model import CHATML, make_tiny_model

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SYSTEM = {"role": "system", "content": "Be kind."}
ROWS = [
    {
        "messages": [SYSTEM, {"role": "user", "content": f"what is {k}?"}, {"role": "assistant", "content": "the answer."}]
    }
    for k in range(12)
]  # fmt: skip


def lines(records: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def base(services: Services) -> str:
    """A base model whose template refuses system messages, as Gemma's does."""
    folder: Path = services.settings.models_dir / "strict"
    make_tiny_model(folder, chat_template=NO_SYSTEM)
    with services.database.write() as session:
        session.add(
            Model(
                name="strict", kind="base", project=None, created_at=0.0, base_model="strict", bytes=0, revision="r1",
                details={},
            )
        )  # fmt: skip
    return "strict"


def checked(client: TestClient, services: Services, **body: object) -> dict[str, Any]:
    """The job of `body` after its file check."""
    answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["id"]
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id != job_id).values(status=Status.CANCELLED))
    assert check_files(services) == job_id
    public_job: dict[str, Any] = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    return public_job


def test_the_check_fails_a_role_that_the_template_refuses_and_names_the_option(
    client: TestClient, services: Services, base: str
) -> None:
    file = upload(client, lines(ROWS))
    refused = checked(client, services, model=base, training_file=file)
    assert refused["status"] == "failed"
    assert "System role not supported" in refused["error"]["message"] and "fold_system" in refused["error"]["message"]
    folded = checked(client, services, model=base, training_file=file, fold_system=True)
    assert folded["status"] == "queued" and folded["fold_system"] is True


def test_rows_with_and_without_a_system_message_pass_with_fold_system(
    client: TestClient, services: Services, base: str
) -> None:
    mixed = [*ROWS[:3], *({"messages": row["messages"][1:]} for row in ROWS[3:])]
    job = checked(client, services, model=base, training_file=upload(client, lines(mixed)), fold_system=True)
    assert job["status"] == "queued"


def test_later_jobs_and_evaluations_inherit_the_date_of_a_training(
    client: TestClient, services: Services, base: str
) -> None:
    file = upload(client, lines(ROWS))
    first = client.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": file, "date": "2026-02-03",
                                                      "fold_system": True}).json()  # fmt: skip
    name = "ft:strict:default::made"
    with services.database.write() as session:
        session.add(
            Model(
                name=name, kind="adapter", project="default", created_at=0.0, base_model=base, bytes=0,
                job_id=first["id"], prefix="x", details={"adapter": None, "foundation": None},
            )
        )  # fmt: skip
    second = client.post("/v1/fine_tuning/jobs", json={"model": name, "training_file": file}).json()
    assert (second["date"], second["fold_system"]) == ("2026-02-03", True)
    body = {"type": "reward_kl", "candidate": {"model": name}, "data": file}
    evaluation = client.post("/v1/evaluations", json=body)
    assert evaluation.status_code == 200, evaluation.text
    with services.database.read() as session:
        spec = session.get_one(Job, evaluation.json()["id"]).spec
    assert (spec["date"], spec["fold_system"]) == ("2026-02-03", True)
