"""Pipelines without a worker: the ends of their jobs are written by hand, and each look takes them further."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.database import database_now, new_id
from app.files.tables import File
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models.tables import Model
from app.pipelines.tables import Pipeline, PipelineStage
from app.services import Services
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from tests.helpers.api import error_of, upload
from tests.helpers.pipelines import CHECK, DPO, LABEL, POLICY, changed


def body(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The body of a pipeline of three stages: label, train, check."""
    data = upload(client)
    stages = [changed(LABEL, "labelling", data=data), DPO, changed(CHECK, "evaluation", data=data)]
    return {"stages": stages, "variables": POLICY, "rounds": 2, **fields}


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    created = client.post("/v1/pipelines", json=body(client, **fields))
    assert created.status_code == 200, created.text
    pipeline: dict[str, Any] = created.json()
    return pipeline


def shown(client: TestClient, pipeline: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/pipelines/{pipeline['id']}").raise_for_status().json()
    return found


def stage(pipeline: dict[str, Any], name: str, number: int | None = None) -> dict[str, Any]:
    (found,) = [one for one in pipeline["history"][(number or pipeline["round"]) - 1]["stages"] if one["name"] == name]
    return dict(found)


def succeed(services: Services, job_id: str, **metrics: float) -> str:
    """Let a job succeed. Returns its model, its file, or nothing."""
    with services.database.write() as session:
        job = session.get_one(Job, job_id)
        job.status, job.finished_at, job.metrics = Status.SUCCEEDED, database_now(), metrics
        gates = job.spec.get("gates") or []
        job.gates = [
            gate | {"value": metrics.get(gate["metric"]), "met": metrics[gate["metric"]] >= gate["min"]}
            for gate in gates
        ] or None
        made = ""
        if job.kind == "training":
            made = job.fine_tuned_model = job.makes
            session.add(
                Model(
                    name=made, kind="adapter", project="default", created_at=database_now(), base_model="tiny", bytes=2,
                    job_id=job.id, prefix=f"jobs/{job.id}/model", details={"adapter": None, "foundation": None},
                )
            )  # fmt: skip
        if job.kind == "labelling":
            made = new_id("file")
            job.result_files = [made]
            session.add(
                File(
                    id=made, project="default", filename="f", purpose="fine-tune", bytes=1, sha256="", created_at=database_now(),
                )
            )  # fmt: skip
    return made


def run_round(client: TestClient, services: Services, pipeline: dict[str, Any], accuracy: float) -> str:
    """Let all stages of a round succeed. Returns the model."""
    succeed(services, stage(shown(client, pipeline), "label")["id"])
    services.pipelines.look()
    model = succeed(services, stage(shown(client, pipeline), "dpo")["id"])
    services.pipelines.look()
    succeed(services, stage(shown(client, pipeline), "check")["id"], accuracy=accuracy)
    services.pipelines.look()
    return model


def test_each_stage_begins_when_its_inputs_are_there(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    assert [one["status"] for one in pipeline["history"][0]["stages"]] == ["validating_files", "waiting", "waiting"]
    services.pipelines.look()
    assert shown(client, pipeline)["history"] == pipeline["history"], "nothing has ended"
    file = succeed(services, stage(pipeline, "label")["id"])
    services.pipelines.look()
    dpo = stage(shown(client, pipeline), "dpo")["id"]
    job = client.get(f"/v1/fine_tuning/jobs/{dpo}").json()
    assert (job["model"], job["training_file"]) == ("tiny", file)
    model = succeed(services, dpo)
    services.pipelines.look()
    check = stage(shown(client, pipeline), "check")["id"]
    assert client.get(f"/v1/evaluations/{check}").json()["candidate"] == {"model": model}
    succeed(services, check, accuracy=0.6)
    services.pipelines.look()
    second = shown(client, pipeline)
    assert (second["round"], second["status"]) == (2, "running")
    assert second["history"][1]["variables"] == {"policy": model}
    label = stage(second, "label")["id"]
    assert client.get(f"/v1/labellings/{label}").json()["writers"] == [{"model": model}], "the new model writes"
    last = run_round(client, services, pipeline, 0.7)
    ended = shown(client, pipeline)
    assert (ended["status"], ended["model"], ended["stopped_by"]) == ("succeeded", last, None)
    assert ended["finished_at"] is not None and [one["model"] for one in ended["history"]] == [model, last]


def test_the_best_round_gives_the_result(client: TestClient, services: Services) -> None:
    for goal, best in (("max", 0), ("min", 1)):
        pipeline = create(client, best={"metric": "check/accuracy", "goal": goal})
        models = [run_round(client, services, pipeline, accuracy) for accuracy in (0.8, 0.6)]
        ended = shown(client, pipeline)
        assert ended["model"] == models[best] and [one["value"] for one in ended["history"]] == [0.8, 0.6]


def test_a_gate_that_is_not_met_stops_after_its_round(client: TestClient, services: Services) -> None:
    gated = body(client)
    gated["stages"][2] = changed(gated["stages"][2], "evaluation", gates=[{"metric": "accuracy", "min": 0.5}])
    pipeline = client.post("/v1/pipelines", json=gated | {"rounds": 5}).json()
    good = run_round(client, services, pipeline, 0.6)
    run_round(client, services, pipeline, 0.4)
    ended = shown(client, pipeline)
    assert (ended["status"], ended["stopped_by"], ended["round"], ended["model"]) == ("succeeded", "gate", 2, good)
    going = client.post("/v1/pipelines", json=gated | {"stop_at_missed_gate": False}).json()
    for accuracy in (0.4, 0.3):
        run_round(client, services, going, accuracy)
    ended = shown(client, going)
    assert (ended["stopped_by"], ended["round"], ended["model"]) == (None, 2, None), "no round met its gates"


def test_a_stage_that_fails_fails_the_pipeline_with_its_reason(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    error = {"code": "invalid_file", "message": "Line 3 is broken.", "param": "data"}
    with services.database.write() as session:
        session.execute(
            update(Job).where(Job.id == stage(pipeline, "label")["id"]).values(status=Status.FAILED, error=error)
        )
    services.pipelines.look()
    ended = shown(client, pipeline)
    assert ended["status"] == "failed" and ended["error"]["code"] == "stage_failed"
    assert ended["error"]["message"] == "The stage 'label' of round 1 has failed: Line 3 is broken."


def test_a_stage_that_cannot_begin_fails_the_pipeline_with_its_field(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    file = succeed(services, stage(pipeline, "label")["id"])
    with services.database.write() as session:
        session.delete(session.get_one(File, file))
    services.pipelines.look()
    ended = shown(client, pipeline)
    assert ended["status"] == "failed"
    assert (ended["error"]["code"], ended["error"]["param"]) == ("file_not_found", "stages.1.job.training_file")
    services.pipelines.look()


def test_a_first_stage_that_cannot_begin_is_refused_at_once(client: TestClient, services: Services) -> None:
    request = body(client, variables={"policy": {"first": "none", "then": "${dpo.model}"}})
    error = error_of(client.post("/v1/pipelines", json=request), 400)
    assert error["param"] == "stages.0.labelling.writers.0.model" and error["code"] == "model_not_found"
    with services.database.read() as session:
        assert session.scalars(select(Pipeline.id)).all() == session.scalars(select(Job.id)).all() == []


def test_cancelling_pausing_and_resuming_reach_the_jobs(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    label = stage(pipeline, "label")["id"]
    assert client.post(f"/v1/pipelines/{pipeline['id']}/pause").json()["paused"]
    assert client.get(f"/v1/labellings/{label}").json()["paused"]
    succeed(services, label)
    services.pipelines.look()
    assert stage(shown(client, pipeline), "dpo")["status"] == "waiting", "a paused pipeline begins nothing"
    client.post(f"/v1/pipelines/{pipeline['id']}/resume").raise_for_status()
    services.pipelines.look()
    dpo = stage(shown(client, pipeline), "dpo")["id"]
    assert client.post(f"/v1/pipelines/{pipeline['id']}/cancel").json()["status"] == "cancelled"
    assert client.get(f"/v1/fine_tuning/jobs/{dpo}").json()["status"] == "cancelled"
    for action in ("cancel", "pause", "resume"):
        error_of(client.post(f"/v1/pipelines/{pipeline['id']}/{action}"), 409)
    other = create(client)
    client.post(f"/v1/labellings/{stage(other, 'label')['id']}/cancel").raise_for_status()
    services.pipelines.look()
    assert shown(client, other)["status"] == "cancelled", "its stage was cancelled by hand"


def test_looks_at_once_begin_each_stage_once(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    succeed(services, stage(pipeline, "label")["id"])
    barrier = threading.Barrier(4)

    def look(_: int) -> None:
        barrier.wait()
        services.pipelines.look()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(4)))
    with services.database.read() as session:
        begun = session.execute(select(PipelineStage.name, Job.kind).join(Job, Job.id == PipelineStage.job_id)).all()
        jobs = session.scalars(select(Job.id)).all()
    assert sorted(map(tuple, begun)) == [("dpo", "training"), ("label", "labelling")] and len(jobs) == 2


def test_the_keys_of_endpoints_are_sealed_and_forgotten_at_the_end(client: TestClient, services: Services) -> None:
    request = body(client)
    endpoint = {"base_url": "https://1.1.1.1/v1", "model": "m", "api_key": "sk-writer"}
    request["stages"][0] = changed(request["stages"][0], "labelling", writers=[{"endpoint": endpoint}])
    pipeline = client.post("/v1/pipelines", json=request).raise_for_status().json()
    assert "sk-writer" not in client.get("/v1/pipelines").text and "api_key" not in str(pipeline["spec"])
    with services.database.read() as session:
        row = session.get_one(Pipeline, pipeline["id"])
        assert "sk-writer" not in str(row.spec) + str(row.sealed_spec)
        job = session.get_one(Job, stage(pipeline, "label")["id"])
        sealed = job.spec["writers"][0]["endpoint"]["api_key"]
    assert services.secret_box.open(sealed) == "sk-writer"
    client.post(f"/v1/pipelines/{pipeline['id']}/cancel")
    with services.database.read() as session:
        assert session.get_one(Pipeline, pipeline["id"]).sealed_spec is None
    request["stages"][0] = changed(
        request["stages"][0], "labelling", writers=[{"endpoint": endpoint | {"base_url": "https://127.0.0.1/v1"}}]
    )
    error = error_of(client.post("/v1/pipelines", json=request), 400)
    assert error["param"] == "stages.0.labelling.writers.0.endpoint.base_url"


def test_a_resent_pipeline_is_created_once_and_its_end_is_told(client: TestClient, services: Services) -> None:
    headers, request = {"Idempotency-Key": "once"}, body(client, rounds=1)
    first, second = (client.post("/v1/pipelines", json=request, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    with services.database.write() as session:
        session.add(
            WebhookEndpoint(
                id="whe-1", project="default", url="https://1.1.1.1/", events=["pipeline.succeeded"],
                sealed_secret=services.secret_box.seal("whsec_x"), created_at=database_now(),
            )
        )  # fmt: skip
    model = run_round(client, services, first, 0.5)
    with services.database.read() as session:
        delivery = session.scalars(select(WebhookDelivery)).one()
    assert model in str(vars(delivery))


@pytest.mark.parametrize("fields", [{"stages": []}, {"rounds": 0}, {"unknown": 1}, {"stages": [{"name": "x"}]}])
def test_a_bad_pipeline_is_refused(fields: dict[str, Any], client: TestClient) -> None:
    error = error_of(client.post("/v1/pipelines", json=body(client) | fields), 400)
    assert error["param"] and error["message"]


def test_a_limit_of_the_project_delays_a_stage_and_does_not_fail_it(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    succeed(services, stage(pipeline, "label")["id"])
    client.post("/v1/projects/default", json={"max_queued_jobs": 0}).raise_for_status()
    services.pipelines.look()
    waiting = shown(client, pipeline)
    assert waiting["status"] == "running" and stage(waiting, "dpo")["status"] == "waiting"
    client.post("/v1/projects/default", json={"max_queued_jobs": 5}).raise_for_status()
    services.pipelines.look()
    assert stage(shown(client, pipeline), "dpo")["status"] == "validating_files"


def test_pausing_and_cancelling_reach_evaluations_that_a_training_asked_for(
    client: TestClient, services: Services
) -> None:
    request = body(client)
    held = {"name": "held", "type": "preference", "data": request["stages"][0]["labelling"]["data"]}
    request["stages"][1] = changed(request["stages"][1], "job", evaluations=[held])
    pipeline = client.post("/v1/pipelines", json=request).raise_for_status().json()
    succeed(services, stage(pipeline, "label")["id"])
    services.pipelines.look()
    job = client.get(f"/v1/fine_tuning/jobs/{stage(shown(client, pipeline), 'dpo')['id']}").json()
    evaluation = f"/v1/evaluations/{job['evaluations'][0]['id']}"
    client.post(f"/v1/pipelines/{pipeline['id']}/pause").raise_for_status()
    assert client.get(evaluation).json()["paused"]
    client.post(f"/v1/pipelines/{pipeline['id']}/cancel").raise_for_status()
    assert client.get(evaluation).json()["status"] == "cancelled"
    again = {"x-stainless-retry-count": "1"}
    assert client.post(f"/v1/pipelines/{pipeline['id']}/cancel", headers=again).json()["status"] == "cancelled"


def test_a_list_has_the_round_under_way_and_one_pipeline_has_all(client: TestClient, services: Services) -> None:
    pipeline = create(client)
    run_round(client, services, pipeline, 0.5)
    assert [entry["round"] for entry in shown(client, pipeline)["history"]] == [1, 2]
    (listed,) = client.get("/v1/pipelines").json()["data"]
    assert [entry["round"] for entry in listed["history"]] == [2] and listed["history"][0]["stages"][0]["id"]
