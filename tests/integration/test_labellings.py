"""Labellings over HTTP, without a worker: refused fields, defaults, estimates, and what is hidden."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.database import database_now
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models.tables import Model
from app.services import Services
from app.spec.labelling import LabellingSpec
from tests.helpers.api import error_of, upload
from tests.helpers.derived_artifacts import work
from tests.helpers.jobs import check_files, make_job

REWARD = "ft:tiny:default::reward"
GRADER = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "reference": "b", "operation": "eq"}
WRITER = {
    "endpoint": {
        "base_url": "https://1.1.1.1/v1",
        "model": "m",
        "api_key": "sk-writer",
        "price": {"input": 1, "output": 2},
    }
}
JUDGE = {"type": "endpoint", "endpoint": {"base_url": "https://1.1.1.1/v1", "model": "j", "api_key": "sk-judge"}}
SCORED = {"judge": {"type": "reward_model", "model": REWARD}}


@pytest.fixture
def trained_model(services: Services) -> str:
    """A model that was trained here from `tiny`, and a reward model."""
    job_id = make_job(services, status=Status.SUCCEEDED)
    with services.database.write() as session:
        for name, kind in (("ft:tiny:default::made", "adapter"), (REWARD, "reward")):
            session.add(
                Model(
                    name=name, kind=kind, project="default", created_at=database_now(), base_model="tiny", bytes=2,
                    job_id=job_id, prefix=f"jobs/{job_id}/attempt-1/model", details={"adapter": None, "foundation": None},
                )
            )  # fmt: skip
    return "ft:tiny:default::made"


def body(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The body of a labelling, changed by `fields`. A field that is None is left out."""
    values = {
        "data": upload(client), "writers": [{"model": "tiny"}], "sampling": {"samples": 2},
        "labellers": [{"grader": GRADER}], **fields,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"data": "file-none"}, "data"),
        ({"data": None}, "data"),
        ({"writers": []}, "writers"),
        ({"writers": [], "sampling": None, "own_answers": None}, "writers"),
        ({"writers": [], "own_answers": True}, "sampling"),
        ({"writers": [{"model": "none"}]}, "writers.0.model"),
        ({"writers": [{"model": REWARD}]}, "writers.0.model"),
        ({"writers": [{}]}, "writers.0.model"),
        ({"writers": [{"model": "tiny", **WRITER}]}, "writers.0.endpoint"),
        ({"writers": [{"model": "tiny"}] * 9}, "writers"),
        ({"sampling": {"samples": 1}}, "sampling.samples"),
        ({"sampling": {"temperatures": [0]}}, "sampling.samples"),
        ({"sampling": {"samples": 65}}, "sampling.samples"),
        ({"labellers": []}, "labellers"),
        ({"labellers": None}, "labellers"),
        ({"labellers": [{}]}, "labellers.0.judge"),
        ({"labellers": [{"grader": GRADER, "judge": JUDGE}]}, "labellers.0.grader"),
        ({"labellers": [{"grader": GRADER}, {"grader": GRADER}]}, "labellers.1.name"),
        ({"labellers": [{"grader": GRADER, "name": "a b"}]}, "labellers.0.name"),
        ({"labellers": [{"grader": GRADER | {"type": "python"}}]}, "labellers.0.grader.type"),
        ({"labellers": [{"grader": {"type": "reward_model", "name": "r", "model": "tiny"}}]}, "labellers.0.grader.model"),
        ({"labellers": [{"judge": {"type": "reward_model", "model": "tiny"}}]}, "labellers.0.judge.model"),
        ({"labellers": [{"judge": {"type": "model", "model": REWARD}}]}, "labellers.0.judge.model"),
        ({"labellers": [{"judge": JUDGE}], "sampling": {"samples": 17}}, "labellers.0.judge"),
        (
            {"labellers": [{"judge": {"type": "classifier", "classifier": {"file": "file-none"}}}]},
            "labellers.0.judge.classifier.file",
        ),
        ({"writers": [{"endpoint": WRITER["endpoint"] | {"base_url": "https://127.0.0.1/v1"}}]}, "writers.0.endpoint.base_url"),
        ({"writers": [{"endpoint": WRITER["endpoint"] | {"base_url": "http://other.example/v1"}}]}, "writers.0.endpoint.base_url"),
        ({"writers": [{"endpoint": WRITER["endpoint"] | {"parameters": {"n": 2}}}]}, "writers.0.endpoint.parameters.n"),
        ({"gates": [{"metric": "kappa@second", "min": 0}]}, "gates.0.metric"),
        ({"gates": [{"metric": "endpoints/cost", "max": 1}]}, "gates.0.metric"),
        ({"gates": [{"metric": "unparseable", "max": 1}]}, "gates.0.metric"),
        ({"max_rows": 0}, "max_rows"),
        ({"people": 3}, "people"),
    ],
)  # fmt: skip
def test_a_bad_labelling_is_refused_with_the_parameter(
    fields: dict[str, object], param: str, client: TestClient, trained_model: str
) -> None:
    for path in ("/v1/labellings", "/v1/labellings/estimate"):
        if path.endswith("estimate") and param.endswith("base_url"):
            continue  # an estimate asks nobody
        error = error_of(client.post(path, json=body(client, **fields)), 400)
        assert error["param"] == param and error["message"], path


def test_omitted_fields_come_from_the_first_writers_training(
    client: TestClient, services: Services, trained_model: str
) -> None:
    request = body(client, writers=[WRITER, {"model": trained_model}], labellers=[SCORED])
    labelling = client.post("/v1/labellings", json=request).json()
    assert labelling["quantization"] == "nf4" and labelling["seed"] >= 0
    assert labelling["object"] == "labelling" and labelling["status"] == "validating_files"
    assert labelling["sampling"] == {"samples": 2, "temperatures": [1.0], "top_p": 1.0, "max_tokens": 256}
    assert labelling["file"] is None and labelling["result_files"] == []
    with services.database.read() as session:
        job = session.get_one(Job, labelling["id"])
        assert (job.model, job.base_model) == (trained_model, "tiny")


def test_a_gate_may_name_each_metric_of_a_labelling(client: TestClient, trained_model: str) -> None:
    labellers = [{"judge": JUDGE}, SCORED | {"name": "second"}]
    metrics = ["rows", "kappa/low@second", "agreement@second", "first_shown_preferred", "margin/high", "endpoints/cost"]
    gates = [{"metric": metric, "min": 0} for metric in metrics]
    request = body(client, writers=[WRITER], labellers=labellers, gates=gates)
    labelling = client.post("/v1/labellings", json=request).raise_for_status().json()
    assert [gate["metric"] for gate in labelling["gates"]] == metrics


def test_labellings_have_a_list_of_their_own_and_the_same_queue(client: TestClient, services: Services) -> None:
    labelling = client.post("/v1/labellings", json=body(client, metadata={"team": "a"})).json()["id"]
    assert [item["id"] for item in client.get("/v1/labellings").json()["data"]] == [labelling]
    assert client.get("/v1/labellings", params={"metadata[team]": "b"}).json()["data"] == []
    error_of(client.get(f"/v1/evaluations/{labelling}"), 404)
    error_of(client.get(f"/v1/labellings/{labelling}/report"), 404)
    check_files(services)
    with services.database.write() as session:
        job = job_queue.claim(session, Status.QUEUED, "test", ["tiny"])
    assert job is not None and job.id == labelling
    events = client.get(f"/v1/labellings/{labelling}/events").json()["data"]
    assert events[0]["message"] == "Labelling started."
    assert client.post(f"/v1/labellings/{labelling}/cancel").json()["status"] == "cancelled"


def test_a_model_that_a_labelling_needs_cannot_be_deleted(
    client: TestClient, services: Services, trained_model: str
) -> None:
    request = body(client, writers=[{"model": trained_model}], labellers=[SCORED])
    labelling = client.post("/v1/labellings", json=request).json()["id"]
    for name in (trained_model, REWARD):
        error = error_of(client.delete(f"/v1/models/{name}"), 409)
        assert labelling in error["message"], name


def test_the_keys_of_endpoints_are_sealed_and_not_shown(client: TestClient, services: Services) -> None:
    labelling = client.post("/v1/labellings", json=body(client, writers=[WRITER], labellers=[{"judge": JUDGE}])).json()
    assert "api_key" not in json.dumps(labelling) and labelling["writers"][0]["endpoint"]["model"] == "m"
    with services.database.read() as session:
        stored = LabellingSpec.stored(session.get_one(Job, labelling["id"]).spec)
        events = session.execute(text("select message, data from job_events")).all()
    keys = [endpoint.api_key or "" for _, endpoint in stored.endpoints()]
    assert [services.secret_box.open(key) for key in keys] == ["sk-writer", "sk-judge"]
    assert not any(
        secret in client.get("/v1/labellings").text + str(events) for secret in ("sk-writer", "sk-judge", *keys)
    )


def test_a_resent_labelling_is_created_once(client: TestClient) -> None:
    headers, request = {"Idempotency-Key": "once"}, body(client)
    ids = {client.post("/v1/labellings", json=request, headers=headers).json()["id"] for _ in range(2)}
    assert len(ids) == 1


def test_an_estimate_counts_answers_questions_and_money(client: TestClient, services: Services) -> None:
    rows = b"".join(
        json.dumps({"prompt": "x" * 400, "chosen": "b" * 40, "rejected": "c" * 80}).encode() + b"\n" for _ in "12345"
    )
    request = body(
        client, data=upload(client, rows), writers=[{"model": "tiny"}, WRITER], own_answers=True, max_rows=4,
        sampling={"samples": 2, "max_tokens": 100}, labellers=[{"judge": JUDGE}],
    )  # fmt: skip
    assert client.post("/v1/labellings/estimate", json=request).status_code == 202
    work(services)
    estimate = client.post("/v1/labellings/estimate", json=request).raise_for_status().json()
    # 4 prompts of 100 tokens, each with 2 · 2 written answers and its own two.
    assert (estimate["prompts"], estimate["answers"], estimate["sampled_tokens"]) == (4, 24, 4 * 2 * 100)
    writer, judge = estimate["endpoints"]
    assert (writer["questions"], writer["input_tokens"], writer["output_tokens"]) == (8, 800, 800)
    assert writer["cost"] == pytest.approx((800 + 2 * 800) / 1e6) == estimate["cost"]
    assert (judge["field"], judge["questions"], judge["cost"]) == ("labellers.0.judge.endpoint", 4 * 6 * 5, None)
    assert judge["output_tokens"] == 4 * 6 * 5 * 512
    with services.database.read() as session:
        assert session.query(Job).count() == 0, "nothing is run"


def test_an_estimate_refuses_a_file_that_cannot_be_read(client: TestClient, services: Services) -> None:
    request = body(client, data=upload(client, b'{"unknown": "column"}\n'))
    client.post("/v1/labellings/estimate", json=request)
    work(services)
    error = error_of(client.post("/v1/labellings/estimate", json=request), 400)
    assert error["param"] == "data"


def test_an_estimate_takes_the_limit_of_an_endpoint_that_has_its_own(client: TestClient, services: Services) -> None:
    rows = b'{"prompt": "x"}\n' * 2 + b'{"prompt": "y"}\n'
    endpoint = WRITER["endpoint"] | {"parameters": {"max_tokens": None, "max_completion_tokens": 1000}}
    request = body(client, data=upload(client, rows), writers=[{"endpoint": endpoint}])
    client.post("/v1/labellings/estimate", json=request)
    work(services)
    (writer,) = client.post("/v1/labellings/estimate", json=request).raise_for_status().json()["endpoints"]
    assert writer["output_tokens"] == writer["questions"] * 1000
    created = client.post("/v1/labellings", json=request).json()
    shown = created["writers"][0]["endpoint"]["parameters"]
    assert shown == {"max_tokens": None, "max_completion_tokens": 1000}, "null means something there"


def test_an_estimate_asks_for_an_upload_with_the_mapping(client: TestClient, services: Services) -> None:
    mapping = {"prompt": "q"}
    rows = b'{"q": "x", "z": "y"}\n'
    error = error_of(
        client.post("/v1/labellings/estimate", json=body(client, data=upload(client, rows), mapping=mapping)), 400
    )
    assert error["param"] == "mapping"
    mapped = body(client, data=upload(client, rows, mapping=json.dumps(mapping)))
    assert client.post("/v1/labellings/estimate", json=mapped | {"mapping": mapping}).status_code == 202
