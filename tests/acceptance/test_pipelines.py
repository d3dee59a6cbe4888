"""A pipeline on a real service: iterated DPO, also through a kill -9 in its middle."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.labellings import by_likeness
from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running, busy_trainer_pid, running, upload, worker_pids


def body(data: str, **fields: Any) -> dict[str, Any]:
    """Iterated DPO: the policy writes, a grader labels, DPO trains, and the pairs of the data tell how good it is."""
    stages = [
        {
            "name": "label",
            "labelling": {
                "data": data, "writers": [{"model": "${policy}"}], "labellers": [by_likeness()], "seed": 1,
                "sampling": {"samples": 4, "max_tokens": 16},
            },
        },
        {
            "name": "dpo",
            "job": {
                "model": "${policy}", "training_file": "${label.file}", "validation_split": 0.0, "seed": 1,
                "quantization": "none",
                "method": {"type": "dpo", "dpo": {"hyperparameters": {
                    "pairs": "best_worst", "max_steps": 6, "batch_size": 8, "learning_rate": 5e-3,
                }}},
            },
        },
        {
            "name": "check",
            "evaluation": {
                "type": "preference", "candidate": {"model": "${dpo.model}"}, "baseline": {"model": "tiny"}, "data": data,
            },
        },
    ]  # fmt: skip
    policy = {"policy": {"first": "tiny", "then": "${dpo.model}"}}
    best = {"metric": "check/accuracy"}
    return {"name": "iterated", "stages": stages, "variables": policy, "rounds": 2, "best": best, **fields}


def ended(service: Running, pipeline_id: str) -> dict[str, Any]:
    pipeline: dict[str, Any] = {}

    def has_ended() -> bool:
        with service.http() as http:
            pipeline.update(http.get(f"/pipelines/{pipeline_id}").raise_for_status().json())
        return bool(pipeline["status"] != "running")

    service.until(has_ended, pipeline_id)
    assert pipeline["status"] == "succeeded", pipeline["error"]
    return pipeline


def stage(service: Running, pipeline_id: str, number: int, name: str) -> dict[str, Any]:
    with service.http() as http:
        pipeline = http.get(f"/pipelines/{pipeline_id}").raise_for_status().json()
    rounds = [entry for entry in pipeline["history"] if entry["round"] == number]
    return next(
        (dict(one) for entry in rounds for one in entry["stages"] if one["name"] == name), {"status": "waiting"}
    )


def killed_trainer(service: Running, pipeline_id: str) -> bool:
    """Kill the trainer of the training of round 1. Raises `ValueError` if its worker has not given it the job yet."""
    if stage(service, pipeline_id, 1, "dpo")["status"] != "running":
        return False
    os.kill(busy_trainer_pid(service.home), signal.SIGKILL)
    return True


def test_a_pipeline_that_is_killed_in_its_middle_ends_as_one_that_is_not(home: Path, tmp_path: Path) -> None:
    with running(home) as service:
        data = upload(service, write(tmp_path / "pairs.jsonl", pairs(24, seed=1)), "fine-tune")
        with service.http() as http:
            first = http.post("/pipelines", json=body(data)).raise_for_status().json()["id"]
        undisturbed = ended(service, first)
        values = [entry["value"] for entry in undisturbed["history"]]
        models = [entry["model"] for entry in undisturbed["history"]]
        assert undisturbed["model"] == models[values.index(max(values))] and len(set(models)) == 2
        assert undisturbed["history"][1]["variables"] == {"policy": models[0]}
        with service.http() as http:
            second = http.post("/pipelines", json=body(data)).raise_for_status().json()["id"]
        service.until(lambda: killed_trainer(service, second), "the training of round 1")
        service.until(lambda: stage(service, second, 2, "label")["status"] == "running", "the labelling of round 2")
        (gpu_worker,) = worker_pids(service, "gpu")
        os.kill(gpu_worker, signal.SIGKILL)
        service.process.wait(60)
    with running(home) as service:
        disturbed = ended(service, second)
        with service.http() as http:
            jobs = http.get("/fine_tuning/jobs?limit=100").json()["data"]
            labellings = http.get("/labellings?limit=100").json()["data"]
    assert [entry["value"] for entry in disturbed["history"]] == values
    assert len(jobs) == 4 and len(labellings) == 4, "no stage has begun twice"
    for number in range(2):
        one, other = (entry["history"][number]["stages"][1]["metrics"] for entry in (undisturbed, disturbed))
        assert one["loss"] == other["loss"], "the same bytes train the same model"


def test_the_command_line_follows_a_pipeline_and_tells_of_gates(service: Running, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs(8, seed=2))
    gated = body("pairs.jsonl", rounds=3)
    gated["stages"][2]["evaluation"]["gates"] = [{"metric": "accuracy", "min": 2.0}]
    (tmp_path / "pipeline.json").write_text(json.dumps(gated))
    followed = service.dpo("pipelines", "create", "--spec", "pipeline.json", "--watch", "--json", folder=tmp_path)
    assert followed.returncode == 4, followed.stderr
    pipeline = json.loads(followed.stdout)
    assert (pipeline["status"], pipeline["stopped_by"], pipeline["round"], pipeline["model"]) == (
        "succeeded",
        "gate",
        1,
        None,
    )
    shown = service.dpo("pipelines", "show", pipeline["id"])
    assert shown.returncode == 0 and "round 1:" in shown.stdout and "label" in shown.stdout
    assert pipeline["id"] in service.dpo("pipelines", "list").stdout
    assert service.dpo("pipelines", "watch", pipeline["id"]).returncode == 4
    assert service.dpo("pipelines", "cancel", pipeline["id"]).returncode == 2


@pytest.mark.parametrize("path", ["", "/live"])
def test_the_dashboard_draws_a_pipeline(path: str, service: Running, tmp_path: Path) -> None:
    data = upload(service, write(tmp_path / "pairs.jsonl", pairs(8, seed=3)), "fine-tune")
    with service.http() as http:
        pipeline = http.post("/pipelines", json=body(data)).raise_for_status().json()
        root = service.url.removesuffix("/v1") + "/dashboard"
        http.post(f"{root}/login", data={"key": service.key})
        headers = {"hx-request": "true"} if path else {}
        page = http.get(f"{root}/pipelines/{pipeline['id']}", headers=headers).raise_for_status().text
        listed = http.get(f"{root}/pipelines").raise_for_status().text
        http.post(f"/pipelines/{pipeline['id']}/cancel").raise_for_status()
    assert all(name in page for name in ("Round 1", "label", "dpo", "check", "waiting"))
    assert ("<html" in page) == (not path) and f"/dashboard/pipelines/{pipeline['id']}" in listed
