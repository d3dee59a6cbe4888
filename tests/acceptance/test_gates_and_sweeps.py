"""Trainings with evaluations, gates on their metrics, and sweeps, through the command line and the API."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.judge_server import running_judge
from tests.helpers.preferences import pairs, write
from tests.helpers.service import YES_NO_CLASSIFIER, Running, ended_evaluation, upload

HYPERPARAMETERS = {"max_steps": 30, "batch_size": 8, "learning_rate": 5e-3, "beta": 0.3}


@pytest.fixture(scope="module")
def files(service: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "classifier.json").write_text(json.dumps(YES_NO_CLASSIFIER))
    return {
        "train": upload(service, write(folder / "train.jsonl", pairs(40, seed=1)), "fine-tune"),
        "held": upload(service, write(folder / "held.jsonl", pairs(30, seed=2)), "evals"),
        "classifier": upload(service, folder / "classifier.json", "evals"),
    }


def job_body(files: dict[str, str], **fields: Any) -> dict[str, Any]:
    """The body of a short DPO job, changed by `fields`."""
    return {
        "model": "tiny", "training_file": files["train"], "seed": 3, "quantization": "none",
        "method": {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS}}, **fields,
    }  # fmt: skip


def create_and_watch(
    service: Running, tmp_path: Path, body: dict[str, Any], *options: str
) -> tuple[int, dict[str, Any]]:
    """(exit status, printed job) of `dpo jobs create --watch`, as CI runs it."""
    (tmp_path / "job.json").write_text(json.dumps(body))
    command = service.dpo("jobs", "create", "--spec", str(tmp_path / "job.json"), "--watch", "--json", *options)
    assert command.stdout, command.stderr
    job: dict[str, Any] = json.loads(command.stdout)
    return command.returncode, job


def test_gates_on_evaluations_set_the_exit_status(service: Running, files: dict[str, str], tmp_path: Path) -> None:
    held_out = {"name": "held-out", "type": "preference", "data": files["held"]}
    gate = "evaluations/held-out/accuracy/low>=0.5"
    body = job_body(files, evaluations=[held_out])
    status, job = create_and_watch(service, tmp_path, body, "--gate", gate, "--gate", "loss<=9")
    assert status == 0 and [judged["met"] for judged in job["gates"]] == [True, True]
    evaluation = ended_evaluation(service, job["evaluations"][0]["id"])
    assert evaluation["candidate"] == {"model": job["fine_tuned_model"]} and evaluation["baseline"] == {"model": "tiny"}
    assert evaluation["fine_tuning_job_id"] == job["id"] and evaluation["beta"] == 0.3
    assert job["gates"][0]["value"] == evaluation["metrics"]["accuracy/low"]
    events = service.openai().fine_tuning.jobs.list_events(job["id"]).data
    assert events[0].message == "2 of 2 gates are met."


def test_the_reference_baseline_of_a_two_stage_job_is_its_sft_checkpoint(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    """A second evaluation names the checkpoint. The job could not, because the checkpoint did not exist yet."""
    held_out = {"name": "held-out", "type": "preference", "data": files["held"], "baseline": "reference"}
    sft_stage = {"hyperparameters": {"max_steps": 6, "batch_size": 8, "learning_rate": 5e-3}}
    body = job_body(files, sft=sft_stage, evaluations=[held_out], keep_checkpoints=2)
    status, job = create_and_watch(service, tmp_path, body)
    assert status == 0
    evaluation = ended_evaluation(service, job["evaluations"][0]["id"])
    with service.http() as http:
        checkpoints = http.get(f"/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
        (sft,) = (checkpoint for checkpoint in checkpoints if checkpoint["step_number"] == 6)
        body = {
            "type": "preference", "data": files["held"], "candidate": {"model": job["fine_tuned_model"]},
            "baseline": {"model": sft["fine_tuned_model_checkpoint"]},
        }  # fmt: skip
        second_id = http.post("/evaluations", json=body).raise_for_status().json()["id"]
    second = ended_evaluation(service, second_id)
    assert evaluation["metrics"]["margin"] == second["metrics"]["margin"] != 0


def test_a_win_rate_is_gated_by_its_lower_bound_and_webhooks_report_it(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    """The judge is an endpoint. The job does not show its key."""
    with running_judge(key="sk-of-ci") as judge:
        endpoint_judge = {"type": "endpoint", "endpoint": {"base_url": judge.url, "model": "m", "api_key": "sk-of-ci"}}
        body = job_body(
            files,
            evaluations=[
                {
                    "name": "wins", "type": "win_rate", "data": files["held"], "baseline": {"answers": "chosen"},
                    "sampling": {"max_tokens": 4, "temperatures": [0.0]}, "judge": endpoint_judge,
                },
                {
                    "name": "drift", "type": "reward_kl", "data": files["held"], "sampling": {"max_tokens": 4},
                    "judge": {"type": "classifier", "classifier": {"file": files["classifier"]}},
                },
            ],
            gates=[
                {"metric": "evaluations/wins/win_rate/low", "min": 0.999},
                {"metric": "evaluations/drift/kl", "max": 1000},
                {"metric": "eval/logratios/chosen", "min": -1000},
            ],
        )  # fmt: skip
        with service.http() as http:
            events = ["fine_tuning.job.judged", "fine_tuning.job.succeeded"]
            webhook = {"url": f"{judge.url}/hooks", "events": events}
            webhook_id = http.post("/webhooks", json=webhook).raise_for_status().json()["id"]
        status, job = create_and_watch(service, tmp_path, body)
        with service.http() as http:
            path = f"/webhooks/{webhook_id}/deliveries"
            service.until(lambda: len(http.get(path).json()["data"]) == 2, "both deliveries")
            delivered = {delivery["type"]: delivery["body"]["data"] for delivery in http.get(path).json()["data"]}
            http.delete(f"/webhooks/{webhook_id}").raise_for_status()
    assert status == 4 and [gate["met"] for gate in job["gates"]] == [False, True, True]
    assert job["status"] == "succeeded" and job["fine_tuned_model"]
    event = service.openai().fine_tuning.jobs.list_events(job["id"]).data[0]
    assert event.level == "warn" and event.message.startswith("1 of 3 gates not met: evaluations/wins/win_rate/low is")
    assert delivered["fine_tuning.job.judged"] == {"id": job["id"], "gates": job["gates"]}
    assert [gate["met"] for gate in delivered["fine_tuning.job.succeeded"]["gates"]][2] is True
    assert "sk-of-ci" not in json.dumps(job)


def test_the_evaluation_of_a_cancelled_training_is_cancelled(service: Running, files: dict[str, str]) -> None:
    held_out = {"name": "held", "type": "preference", "data": files["held"]}
    body = job_body(files, evaluations=[held_out], gates=[{"metric": "evaluations/held/accuracy", "min": 0.5}])
    body["method"] = {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS | {"max_steps": 100_000}}}
    with service.http() as http:
        job = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()
        (evaluation,) = job["evaluations"]
        service.until(lambda: http.get(f"/evaluations/{evaluation['id']}").json()["status"] == "queued", "the check")
        service.wait_for(job["id"], lambda state: state["status"] == "running")
        assert http.get(f"/evaluations/{evaluation['id']}").json()["queue_position"] is None
        http.post(f"/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()
    cancelled = ended_evaluation(service, evaluation["id"], "cancelled")
    assert cancelled["fine_tuning_job_id"] == job["id"]


def test_an_evaluation_without_a_training_can_have_gates(service: Running, files: dict[str, str]) -> None:
    models = ("--candidate", "tiny", "--baseline", "tiny")
    gates = ("--gate", "accuracy>=0.5", "--gate", "accuracy>=0.6")
    command = service.dpo("evaluate", "preference", *models, "--data", files["held"], "--watch", *gates)
    assert command.returncode == 4 and "gate accuracy at least 0.6: 0.5, NOT MET" in command.stdout
    assert "gate accuracy at least 0.5: 0.5, met" in command.stdout


def test_jobs_of_a_sweep_share_reference_logps_and_are_compared(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    judge = {"type": "classifier", "classifier": {"file": files["classifier"]}}
    sampling = {"max_tokens": 4, "temperatures": [0.5, 1.0], "samples": 2}
    body = job_body(
        files,
        evaluations=[{"name": "e", "type": "reward_kl", "data": files["held"], "sampling": sampling, "judge": judge}],
    )
    # New rows and a random seed: an earlier test may have cached the reference log-probs of the same split.
    body["training_file"] = upload(service, write(tmp_path / "own.jsonl", pairs(40, seed=7)), "fine-tune")
    del body["seed"]
    (tmp_path / "job.json").write_text(json.dumps(body))
    arguments = ("--spec", str(tmp_path / "job.json"), "--grid", "beta=0.1", "--grid", 'loss=["sigmoid", "ipo"]')
    command = service.dpo("sweeps", "create", *arguments, "--name", "grid", "--watch", "--json")
    assert command.returncode == 0, command.stderr + command.stdout
    sweep = json.loads(command.stdout)
    assert sweep["status"] == "succeeded" and sweep["counts"] == {"succeeded": 2}
    assert [job["settings"] for job in sweep["jobs"]] == [
        {"beta": 0.1, "loss": "sigmoid"},
        {"beta": 0.1, "loss": "ipo"},
    ]
    client = service.openai()
    cached = []
    for job in sweep["jobs"]:
        events = client.fine_tuning.jobs.list_events(job["id"], limit=100).data
        cached.append(any("Reference log-probs found in the cache" in event.message for event in events))
    assert cached == [False, True]
    assert len({job["metrics"]["eval/rewards/margins"] for job in sweep["jobs"]}) == 2
    points = sweep["frontier"]["points"]
    assert len(points) == 4 and {point["temperature"] for point in points} == {0.5, 1.0}
    evaluated = {job["id"]: job["evaluations"]["e"]["metrics"] for job in sweep["jobs"]}
    for point in points:
        metrics, suffix = evaluated[point["job_id"]], f"@{point['temperature']:g}"
        assert (point["x"], point["y"]) == (metrics[f"kl{suffix}"], metrics[f"reward{suffix}"])
        dominated = any(
            other["x"] <= point["x"]
            and other["y"] >= point["y"]
            and (other["x"], other["y"]) != (point["x"], point["y"])
            for other in points
        )
        assert point["pareto"] is not dominated
    printed = service.dpo("sweeps", "show", sweep["id"])
    assert "Pareto set of evaluations/e/reward against evaluations/e/kl" in printed.stdout
    assert "sigmoid" in printed.stdout
    for name, beginning in (("frontier.svg", "<svg"), ("frontier.csv", "label,series,x")):
        assert service.dpo("sweeps", "frontier", sweep["id"], "--output", str(tmp_path / name)).returncode == 0
        assert (tmp_path / name).read_text().startswith(beginning)
    with service.http() as http:
        assert http.get("/sweeps").json()["data"][0]["id"] == sweep["id"]
        assert http.post(f"/sweeps/{sweep['id']}/cancel").status_code == 409


def test_a_sweep_is_created_completely_or_not_at_all(service: Running, files: dict[str, str]) -> None:
    with service.http() as http:
        jobs_before = [job["id"] for job in http.get("/fine_tuning/jobs").json()["data"]]
        for grid, param in (
            ({"beta": [0.1, -1]}, "job.method.dpo.hyperparameters.beta"),
            ({"model": ["tiny", "no"]}, "job.model"),
        ):
            refused = http.post("/sweeps", json={"job": job_body(files), "grid": grid})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
        assert [job["id"] for job in http.get("/fine_tuning/jobs").json()["data"]] == jobs_before
        long_job = job_body(files) | {"method": {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 100_000}}}}
        sweep = http.post("/sweeps", json={"job": long_job, "grid": {"beta": [0.1, 0.2]}}).raise_for_status().json()
        assert http.get(f"/sweeps/{sweep['id']}/frontier").status_code == 404
        cancelled = http.post(f"/sweeps/{sweep['id']}/cancel").raise_for_status().json()
        assert cancelled["status"] == "cancelled" and cancelled["counts"] == {"cancelled": 2}
