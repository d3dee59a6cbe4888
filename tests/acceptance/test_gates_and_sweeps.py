"""Trainings that are evaluated, gates on what the evaluations say, and grids of them: as CI and people use them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.judge_server import judging
from tests.helpers.preferences import pairs, write
from tests.helpers.service import CLASSIFIER, Running, ended, upload

HYPERPARAMETERS = {"max_steps": 30, "batch_size": 8, "learning_rate": 5e-3, "beta": 0.3}


@pytest.fixture(scope="module")
def files(service: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "classifier.json").write_text(json.dumps(CLASSIFIER))
    return {
        "train": upload(service, write(folder / "train.jsonl", pairs(40, seed=1)), "fine-tune"),
        "held": upload(service, write(folder / "held.jsonl", pairs(30, seed=2)), "evals"),
        "classifier": upload(service, folder / "classifier.json", "evals"),
    }


def job(files: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "training_file": files["train"], "seed": 3, "quantization": "none",
        "method": {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS}}, **fields,
    }  # fmt: skip


def create(service: Running, tmp_path: Path, body: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
    """(exit status, what is printed) of `dpo jobs create --watch`, as CI runs it."""
    (tmp_path / "job.json").write_text(json.dumps(body))
    done = service.dpo("jobs", "create", "--spec", str(tmp_path / "job.json"), "--watch", "--json", *options)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def test_gates_on_evaluations_are_the_exit_status(service: Running, files: dict[str, str], tmp_path: Path) -> None:
    held = {"name": "held-out", "type": "preference", "data": files["held"]}
    met = "evaluations/held-out/accuracy/low>=0.5"
    status, found = create(service, tmp_path, job(files, evaluations=[held]), "--gate", met, "--gate", "loss<=9")
    assert status == 0 and [gate["met"] for gate in found["gates"]] == [True, True]
    evaluation = ended(service, found["evaluations"][0]["id"])
    assert evaluation["candidate"] == {"model": found["fine_tuned_model"]} and evaluation["baseline"] == {
        "model": "tiny"
    }
    assert evaluation["fine_tuning_job_id"] == found["id"] and evaluation["beta"] == 0.3
    assert found["gates"][0]["value"] == evaluation["metrics"]["accuracy/low"]
    events = service.openai().fine_tuning.jobs.list_events(found["id"]).data
    assert events[0].message == "2 of 2 gates are met."


def test_an_evaluation_of_a_job_of_two_stages_is_held_to_what_its_sft_left(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    """`reference` in the job's own list, before anybody can know the name of a checkpoint; measured anew beside it."""
    held = {"name": "held-out", "type": "preference", "data": files["held"], "baseline": "reference"}
    stage = {"hyperparameters": {"max_steps": 6, "batch_size": 8, "learning_rate": 5e-3}}
    status, found = create(service, tmp_path, job(files, sft=stage, evaluations=[held], keep_checkpoints=2))
    assert status == 0
    evaluation = ended(service, found["evaluations"][0]["id"])
    with service.http() as http:
        saved = http.get(f"/fine_tuning/jobs/{found['id']}/checkpoints").json()["data"]
        (left,) = (one["fine_tuned_model_checkpoint"] for one in saved if one["step_number"] == 6)
        body = {
            "type": "preference", "data": files["held"], "candidate": {"model": found["fine_tuned_model"]},
            "baseline": {"model": left},
        }  # fmt: skip
        named = ended(service, http.post("/evaluations", json=body).raise_for_status().json()["id"])
    assert evaluation["metrics"]["margin"] == named["metrics"]["margin"] != 0


def test_a_win_rate_is_gated_by_its_lower_bound_and_told_by_webhook(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    """A judge that is asked; its key is in no row of the training."""
    with judging(key="sk-of-ci") as judge:
        asked = {"type": "endpoint", "endpoint": {"base_url": judge.url, "model": "m", "api_key": "sk-of-ci"}}
        body = job(
            files,
            evaluations=[
                {
                    "name": "wins", "type": "win_rate", "data": files["held"], "baseline": {"answers": "chosen"},
                    "sampling": {"max_tokens": 4, "temperatures": [0.0]}, "judge": asked,
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
            hook = {"url": f"{judge.url}/hooks", "events": ["fine_tuning.job.judged", "fine_tuning.job.succeeded"]}
            webhook = http.post("/webhooks", json=hook).raise_for_status().json()["id"]
        status, found = create(service, tmp_path, body)
        with service.http() as http:
            service.until(
                lambda: len(http.get(f"/webhooks/{webhook}/deliveries").json()["data"]) == 2, "both deliveries"
            )
            sent = {one["type"]: one["body"]["data"] for one in
                    http.get(f"/webhooks/{webhook}/deliveries").json()["data"]}  # fmt: skip
            http.delete(f"/webhooks/{webhook}").raise_for_status()
    assert status == 4 and [gate["met"] for gate in found["gates"]] == [False, True, True]
    assert found["status"] == "succeeded" and found["fine_tuned_model"]
    event = service.openai().fine_tuning.jobs.list_events(found["id"]).data[0]
    assert event.level == "warn" and event.message.startswith("1 of 3 gates not met: evaluations/wins/win_rate/low is")
    assert sent["fine_tuning.job.judged"] == {"id": found["id"], "gates": found["gates"]}
    assert [gate["met"] for gate in sent["fine_tuning.job.succeeded"]["gates"]][2] is True
    assert "sk-of-ci" not in json.dumps(found)


def test_what_waits_for_a_model_that_is_never_made_is_cancelled(service: Running, files: dict[str, str]) -> None:
    held = {"name": "held", "type": "preference", "data": files["held"]}
    body = job(files, evaluations=[held], gates=[{"metric": "evaluations/held/accuracy", "min": 0.5}])
    body["method"] = {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS | {"max_steps": 100_000}}}
    with service.http() as http:
        made = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()
        (evaluation,) = made["evaluations"]
        service.until(lambda: http.get(f"/evaluations/{evaluation['id']}").json()["status"] == "queued", "the check")
        service.wait_for(made["id"], lambda seen: seen["status"] == "running")
        assert http.get(f"/evaluations/{evaluation['id']}").json()["queue_position"] is None
        http.post(f"/fine_tuning/jobs/{made['id']}/cancel").raise_for_status()
    found = ended(service, evaluation["id"], "cancelled")
    assert found["fine_tuning_job_id"] == made["id"]


def test_an_evaluation_alone_is_gated_too(service: Running, files: dict[str, str]) -> None:
    given = ("evaluate", "preference", "--candidate", "tiny", "--baseline", "tiny", "--data", files["held"], "--watch")
    done = service.dpo(*given, "--gate", "accuracy>=0.5", "--gate", "accuracy>=0.6")
    assert done.returncode == 4 and "gate accuracy at least 0.6: 0.5, NOT MET" in done.stdout
    assert "gate accuracy at least 0.5: 0.5, met" in done.stdout


def test_a_sweep_computes_once_what_its_jobs_share_and_compares_them(
    service: Running, files: dict[str, str], tmp_path: Path
) -> None:
    judge = {"type": "classifier", "classifier": {"file": files["classifier"]}}
    sampling = {"max_tokens": 4, "temperatures": [0.5, 1.0], "samples": 2}
    body = job(
        files,
        evaluations=[{"name": "e", "type": "reward_kl", "data": files["held"], "sampling": sampling, "judge": judge}],
    )
    # Rows of its own: by the same ones and a seed that draws the same split, an earlier test had computed them.
    body["training_file"] = upload(service, write(tmp_path / "own.jsonl", pairs(40, seed=7)), "fine-tune")
    del body["seed"]
    (tmp_path / "job.json").write_text(json.dumps(body))
    given = ("--spec", str(tmp_path / "job.json"), "--grid", "beta=0.1", "--grid", 'loss=["sigmoid", "ipo"]')
    done = service.dpo("sweeps", "create", *given, "--name", "grid", "--watch", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["status"] == "succeeded" and found["counts"] == {"succeeded": 2}
    assert [one["settings"] for one in found["jobs"]] == [
        {"beta": 0.1, "loss": "sigmoid"},
        {"beta": 0.1, "loss": "ipo"},
    ]
    client = service.openai()
    told = [[event.message for event in client.fine_tuning.jobs.list_events(one["id"], limit=100).data]
            for one in found["jobs"]]  # fmt: skip
    cached = [any("Reference log-probs found in the cache" in message for message in of) for of in told]
    assert cached == [False, True]
    assert len({one["metrics"]["eval/rewards/margins"] for one in found["jobs"]}) == 2
    points = found["frontier"]["points"]
    assert len(points) == 4 and {point["temperature"] for point in points} == {0.5, 1.0}
    evaluated = {one["id"]: one["evaluations"]["e"]["metrics"] for one in found["jobs"]}
    for point in points:
        metrics, mark = evaluated[point["job_id"]], f"@{point['temperature']:g}"
        assert (point["x"], point["y"]) == (metrics[f"kl{mark}"], metrics[f"reward{mark}"])
        beaten = any(
            other["x"] <= point["x"]
            and other["y"] >= point["y"]
            and (other["x"], other["y"]) != (point["x"], point["y"])
            for other in points
        )
        assert point["pareto"] is not beaten
    shown = service.dpo("sweeps", "show", found["id"])
    assert "Pareto set of evaluations/e/reward against evaluations/e/kl" in shown.stdout and "sigmoid" in shown.stdout
    for name, begins in (("frontier.svg", "<svg"), ("frontier.csv", "label,series,x")):
        assert service.dpo("sweeps", "frontier", found["id"], "--output", str(tmp_path / name)).returncode == 0
        assert (tmp_path / name).read_text().startswith(begins)
    with service.http() as http:
        assert http.get("/sweeps").json()["data"][0]["id"] == found["id"]
        assert http.post(f"/sweeps/{found['id']}/cancel").status_code == 409


def test_a_sweep_is_made_whole_or_not_at_all(service: Running, files: dict[str, str]) -> None:
    with service.http() as http:
        before = [one["id"] for one in http.get("/fine_tuning/jobs").json()["data"]]
        for grid, param in (
            ({"beta": [0.1, -1]}, "job.method.dpo.hyperparameters.beta"),
            ({"model": ["tiny", "no"]}, "job.model"),
        ):
            refused = http.post("/sweeps", json={"job": job(files), "grid": grid})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
        assert [one["id"] for one in http.get("/fine_tuning/jobs").json()["data"]] == before
        long = job(files) | {"method": {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 100_000}}}}
        made = http.post("/sweeps", json={"job": long, "grid": {"beta": [0.1, 0.2]}}).raise_for_status().json()
        assert http.get(f"/sweeps/{made['id']}/frontier").status_code == 404
        cancelled = http.post(f"/sweeps/{made['id']}/cancel").raise_for_status().json()
        assert cancelled["status"] == "cancelled" and cancelled["counts"] == {"cancelled": 2}
