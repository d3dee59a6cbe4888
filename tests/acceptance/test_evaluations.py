"""Evaluations through a real service: queued, run, recovered and read as trainings are."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import pairs, write
from tests.acceptance.service import Running, trainer_at_work
from tests.servers import wait_until

CLASSIFIER = {"terms": {"yes": [1.0, 1.0], "no": [1.0, -1.0]}, "intercept": 0.0, "normalise": False}


def upload(service: Running, path: Path, purpose: str) -> str:
    with service.http() as http, path.open("rb") as file:
        answer = http.post("/files", files={"file": file}, data={"purpose": purpose}).raise_for_status()
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def files(service: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "classifier.json").write_text(json.dumps(CLASSIFIER))
    return {
        "train": upload(service, write(folder / "train.jsonl", pairs(40, seed=1)), "fine-tune"),
        "held": upload(service, write(folder / "held.jsonl", pairs(30, seed=2)), "evals"),
        "classifier": upload(service, folder / "classifier.json", "evals"),
    }


@pytest.fixture(scope="module")
def model(service: Running, files: dict[str, str]) -> str:
    """A model that has learned the pairs a little."""
    hyperparameters = {"max_steps": 30, "batch_size": 8, "learning_rate": 5e-3, "beta": 0.3}
    body = {
        "model": "tiny", "training_file": files["train"], "seed": 3, "quantization": "none",
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    }  # fmt: skip
    with service.http() as http:
        job = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    return str(service.wait_for(job, lambda seen: seen["status"] == "succeeded")["fine_tuned_model"])


def evaluate(service: Running, body: dict[str, Any], status: str = "succeeded") -> dict[str, Any]:
    with service.http() as http:
        made = http.post("/evaluations", json=body)
        assert made.status_code == 200, made.text
        return ended(service, made.json()["id"], status)


def ended(service: Running, evaluation: str, status: str = "succeeded") -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def look() -> bool:
        with service.http() as http:
            seen.update(http.get(f"/evaluations/{evaluation}").raise_for_status().json())
        return seen["status"] in ("succeeded", "failed", "cancelled")

    wait_until(look, evaluation, 120)
    assert seen["status"] == status, seen["error"]
    return seen


def items(service: Running, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    with service.http() as http:
        content = http.get(f"/files/{evaluation['result_files'][1]}/content").raise_for_status().text
    return [json.loads(line) for line in content.splitlines()]


def test_a_trained_model_prefers_what_people_preferred(service: Running, files: dict[str, str], model: str) -> None:
    found = evaluate(service, {"type": "preference", "candidate": {"model": model}, "data": files["held"]})
    assert found["baseline"] == {"model": "tiny"} and found["beta"] == 0.3, "as it was trained"
    assert found["quantization"] == "none"
    assert found["metrics"]["accuracy"] > 0.8 and found["metrics"]["pairs"] == 30
    assert 0.5 < found["metrics"]["accuracy/low"] < found["metrics"]["accuracy"] <= found["metrics"]["accuracy/high"]
    with service.http() as http:
        report = http.get(f"/evaluations/{found['id']}/report").raise_for_status().json()
        assert report["accuracy"]["value"] == found["metrics"]["accuracy"] and len(report["by_length"]) == 5
        told = http.get(f"/evaluations/{found['id']}/events").json()["data"]
        assert told[0]["message"].startswith("The evaluation has succeeded: accuracy")
        assert http.get("/evaluations").json()["data"][0]["id"] == found["id"]
        assert found["id"] not in http.get("/fine_tuning/jobs").text
        assert http.get(f"/fine_tuning/jobs/{found['id']}").status_code == 404
        assert "trainer began" in http.get(f"/evaluations/{found['id']}/logs").text
        with http.stream("GET", f"/evaluations/{found['id']}/stream") as stream:
            text = "".join(stream.iter_text())
        assert "event: evaluation" in text and "event: message" in text
    same = evaluate(
        service,
        {"type": "preference", "candidate": {"model": "tiny"}, "baseline": {"model": "tiny"}, "data": files["held"]},
    )
    assert same["metrics"]["accuracy"] == 0.5


def test_an_evaluation_whose_trainer_is_killed_goes_on_to_the_same_bytes(
    service: Running, files: dict[str, str], model: str
) -> None:
    body = {
        "type": "reward_kl", "candidate": {"model": model}, "data": files["held"], "seed": 5,
        "sampling": {"temperatures": [0.0, 0.7, 1.0], "max_tokens": 60, "samples": 20},
        "judge": {"type": "classifier", "classifier": {"file": files["classifier"]}},
    }  # fmt: skip
    expected = evaluate(service, body)
    assert len(items(service, expected)) == 30 * (1 + 20 + 20)
    assert expected["metrics"]["kl@1"] > 2 * expected["metrics"]["kl/error@1"] > 0
    with service.http() as http:
        started = http.post("/evaluations", json=body).raise_for_status().json()["id"]
        wait_until(lambda: http.get(f"/evaluations/{started}").json()["progress"], "some completions")
        os.kill(trainer_at_work(service.home), signal.SIGKILL)
    found = ended(service, started)
    assert found["attempt"] > expected["attempt"]
    assert items(service, found) == items(service, expected) and found["metrics"] == expected["metrics"]


def test_what_an_evaluation_needs_stays(service: Running, files: dict[str, str], model: str) -> None:
    with service.http() as http:
        body = {
            "type": "reward_kl", "candidate": {"model": model}, "data": files["held"],
            "sampling": {"max_tokens": 500, "samples": 200},
            "judge": {"type": "classifier", "classifier": {"file": files["classifier"]}},
        }  # fmt: skip
        started = http.post("/evaluations", json=body).raise_for_status().json()["id"]
        refused = http.delete(f"/models/{model}")
        assert refused.status_code == 409 and started in refused.json()["error"]["message"]
        wait_until(lambda: http.get(f"/evaluations/{started}").json()["status"] == "running", "it to run")
        assert http.post(f"/evaluations/{started}/pause").json()["paused"]
        wait_until(lambda: http.get(f"/evaluations/{started}").json()["status"] == "queued", "the pause")
        assert http.post(f"/evaluations/{started}/cancel").json()["status"] == "cancelled"
        assert http.post(f"/evaluations/{started}/cancel").status_code == 409


def test_a_file_that_cannot_be_evaluated_fails_by_name(service: Running, files: dict[str, str], model: str) -> None:
    wrong = {"type": "classifier", "classifier": {"file": files["held"]}}
    found = evaluate(
        service,
        {
            "type": "win_rate",
            "candidate": {"model": model},
            "baseline": {"answers": "chosen"},
            "data": files["held"],
            "judge": wrong,
        },
        "failed",
    )
    assert found["error"]["code"] == "invalid_file" and found["error"]["param"] == "judge.classifier.file"
