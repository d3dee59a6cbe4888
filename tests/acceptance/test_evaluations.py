"""Evaluations on a real service: their results, judges, pauses and recovery."""

import csv
import gzip
import html
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.judge_server import prefer_first, running_judge
from tests.helpers.preferences import pairs, write
from tests.helpers.service import (
    YES_NO_CLASSIFIER,
    Running,
    busy_trainer_pid,
    ended_evaluation,
    running,
    upload,
    worker_pids,
)


@pytest.fixture(scope="module")
def files(service: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "classifier.json").write_text(json.dumps(YES_NO_CLASSIFIER))
    return {
        "train": upload(service, write(folder / "train.jsonl", pairs(40, seed=1)), "fine-tune"),
        "held": upload(service, write(folder / "held.jsonl", pairs(30, seed=2)), "evals"),
        "classifier": upload(service, folder / "classifier.json", "evals"),
    }


@pytest.fixture(scope="module")
def model(service: Running, files: dict[str, str]) -> str:
    """A model that was trained on the pairs for a few steps."""
    hyperparameters = {"max_steps": 30, "batch_size": 8, "learning_rate": 5e-3, "beta": 0.3}
    body = {
        "model": "tiny", "training_file": files["train"], "seed": 3, "quantization": "none",
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    }  # fmt: skip
    with service.http() as http:
        job_id = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    return str(service.wait_for(job_id, lambda job: job["status"] == "succeeded")["fine_tuned_model"])


def evaluate(service: Running, body: dict[str, Any], status: str = "succeeded") -> dict[str, Any]:
    """Create an evaluation, and wait until it has ended with `status`."""
    with service.http() as http:
        created = http.post("/evaluations", json=body)
        assert created.status_code == 200, created.text
        return ended_evaluation(service, created.json()["id"], status)


def items(service: Running, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result file with one row for each item."""
    with service.http() as http:
        content = http.get(f"/files/{evaluation['result_files'][1]}/content").raise_for_status().text
    return [json.loads(line) for line in content.splitlines()]


def test_a_trained_model_prefers_the_chosen_answers_of_held_out_pairs(
    service: Running, files: dict[str, str], model: str, tmp_path: Path
) -> None:
    evaluation = evaluate(service, {"type": "preference", "candidate": {"model": model}, "data": files["held"]})
    assert evaluation["baseline"] == {"model": "tiny"} and evaluation["beta"] == 0.3, "the beta of its training"
    assert evaluation["quantization"] == "none"
    metrics = evaluation["metrics"]
    assert metrics["accuracy"] > 0.8 and metrics["pairs"] == 30
    assert 0.5 < metrics["accuracy/low"] < metrics["accuracy"] <= metrics["accuracy/high"]
    with service.http() as http:
        report = http.get(f"/evaluations/{evaluation['id']}/report").raise_for_status().json()
        assert report["accuracy"]["value"] == metrics["accuracy"] and len(report["by_length"]) == 5
        events = http.get(f"/evaluations/{evaluation['id']}/events").json()["data"]
        assert events[0]["message"].startswith("The evaluation has succeeded: accuracy")
        assert http.get("/evaluations").json()["data"][0]["id"] == evaluation["id"]
        assert evaluation["id"] not in http.get("/fine_tuning/jobs").text
        assert http.get(f"/fine_tuning/jobs/{evaluation['id']}").status_code == 404
        assert "trainer began" in http.get(f"/evaluations/{evaluation['id']}/logs").text
        with http.stream("GET", f"/evaluations/{evaluation['id']}/stream") as stream:
            text = "".join(stream.iter_text())
        assert "event: evaluation" in text and "event: message" in text
    assert service.dpo("evaluations", "download", evaluation["id"], "--output", str(tmp_path / "all")).returncode == 0
    downloaded = {path.name: path.read_text() for path in (tmp_path / "all").iterdir()}
    assert set(downloaded) == {"evaluation.json", "report.json", "items.jsonl"}
    assert json.loads(downloaded["evaluation.json"])["metrics"] == metrics
    assert json.loads(downloaded["report.json"]) == report
    assert [json.loads(line) for line in downloaded["items.jsonl"].splitlines()] == items(service, evaluation)
    second_download = service.dpo("evaluations", "download", evaluation["id"], "--output", str(tmp_path / "all"))
    assert second_download.returncode == 2 and "empty" in second_download.stderr


def test_an_evaluation_whose_trainer_is_killed_ends_with_the_same_bytes(
    service: Running, files: dict[str, str], model: str
) -> None:
    body = {
        "type": "reward_kl", "candidate": {"model": model}, "data": files["held"], "seed": 5,
        "sampling": {"temperatures": [0.0, 0.7, 1.0], "max_tokens": 60, "samples": 20},
        "judge": {"type": "classifier", "classifier": {"file": files["classifier"]}},
    }  # fmt: skip
    undisturbed = evaluate(service, body)
    assert len(items(service, undisturbed)) == 30 * (1 + 20 + 20)
    assert undisturbed["metrics"]["kl@1"] > 2 * undisturbed["metrics"]["kl/error@1"] > 0
    with service.http() as http:
        evaluation_id = http.post("/evaluations", json=body).raise_for_status().json()["id"]
        service.until(lambda: http.get(f"/evaluations/{evaluation_id}").json()["progress"], "some completions")
        os.kill(busy_trainer_pid(service.home), signal.SIGKILL)
    recovered = ended_evaluation(service, evaluation_id)
    assert recovered["attempt"] > undisturbed["attempt"]
    assert items(service, recovered) == items(service, undisturbed) and recovered["metrics"] == undisturbed["metrics"]


def test_two_models_are_compared_on_one_page(
    service: Running, files: dict[str, str], model: str, tmp_path: Path
) -> None:
    """One HTML file shows answers, verdicts, KL and curves. It loads no file and runs no script."""
    (tmp_path / "prompts.txt").write_text("say <b>sun</b>: \n\nsay rain: \n")
    arguments = ("compare", model, "tiny", "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "6")
    with running_judge(lambda *_: "<script>alert(1)</script>\nPreferred: A") as judge:
        options = ("--judge-url", judge.url, "--judge-model", "m", "--output", str(tmp_path / "page.html"), "--json")
        comparison = service.dpo(*arguments, *options)
        assert comparison.returncode == 0, comparison.stderr
    assert json.loads(comparison.stdout) == {"page": str(tmp_path / "page.html"), "data": str(tmp_path / "page.json")}
    data = json.loads((tmp_path / "page.json").read_text())
    assert [item["prompt"] for item in data["items"]] == ["say <b>sun</b>: ", "say rain: "]
    assert data["kl"]["a_to_b"]["value"] > 0 and data["metrics"]["win_rate"] == 0.5
    assert list(data["trainings"]) == [model] and "rewards/margins" in data["trainings"][model]
    page = (tmp_path / "page.html").read_text()
    for item in data["items"]:
        assert html.escape(item["candidate"], quote=False)[:4] in page
    assert "say &lt;b&gt;sun&lt;/b&gt;:" in page and "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert page.count("<svg") >= 4 and "KL(A ‖ B)" in page and "50.0 %" in page
    assert not re.search(r"""(?:src|href)=|url\(|@import""", page), "the page refers to no other file"


def test_an_evaluation_keeps_its_model_and_can_be_paused_and_cancelled(
    service: Running, files: dict[str, str], model: str
) -> None:
    with service.http() as http:
        body = {
            "type": "reward_kl", "candidate": {"model": model}, "data": files["held"],
            "sampling": {"max_tokens": 500, "samples": 200},
            "judge": {"type": "classifier", "classifier": {"file": files["classifier"]}},
        }  # fmt: skip
        evaluation_id = http.post("/evaluations", json=body).raise_for_status().json()["id"]
        refused = http.delete(f"/models/{model}")
        assert refused.status_code == 409 and evaluation_id in refused.json()["error"]["message"]
        service.until(lambda: http.get(f"/evaluations/{evaluation_id}").json()["status"] == "running", "the start")
        assert http.post(f"/evaluations/{evaluation_id}/pause").json()["paused"]
        service.until(lambda: http.get(f"/evaluations/{evaluation_id}").json()["status"] == "queued", "the pause")
        assert http.post(f"/evaluations/{evaluation_id}/cancel").json()["status"] == "cancelled"
        assert http.post(f"/evaluations/{evaluation_id}/cancel").status_code == 409


def test_an_evaluation_with_an_invalid_classifier_file_fails_and_names_the_field(
    service: Running, files: dict[str, str], model: str
) -> None:
    invalid_judge = {"type": "classifier", "classifier": {"file": files["held"]}}
    evaluation = evaluate(
        service,
        {
            "type": "win_rate",
            "candidate": {"model": model},
            "baseline": {"answers": "chosen"},
            "data": files["held"],
            "judge": invalid_judge,
        },
        "failed",
    )
    assert evaluation["error"]["code"] == "invalid_file" and evaluation["error"]["param"] == "judge.classifier.file"


def shared_file(name: str) -> Path:
    """A file of the shared data. Skips the test if it is missing."""
    path = Path(os.environ.get("DPO_SHARED", "../shared")) / "data" / name
    if not path.exists():
        pytest.skip(f"no {path}: set DPO_SHARED")
    return path


def endpoint_judge(url: str, **fields: Any) -> dict[str, Any]:
    """A judge behind an HTTP endpoint."""
    return {"type": "endpoint", "endpoint": {"base_url": url, "model": "judge", "api_key": "sk-judge", **fields}}


def test_each_question_to_a_faulty_judge_is_answered_and_paid_once(
    service: Running, files: dict[str, str], model: str
) -> None:
    """The judge prefers longer answers. It fails at first, and the evaluation is paused in the middle."""
    faults = ("rate limit", "not json", "hang up", "error")
    with running_judge(faults=faults, key="sk-judge", every=6) as judge:
        judge.delay = 0.02
        body = {
            "type": "win_rate", "candidate": {"model": model}, "baseline": {"answers": "chosen"}, "data": files["held"],
            "sampling": {"max_tokens": 8, "temperatures": [0.0, 1.0]}, "seed": 1,
            "judge": endpoint_judge(judge.url, concurrency=3, price={"input": 1000, "output": 2000}),
        }  # fmt: skip
        with service.http() as http:
            evaluation_id = http.post("/evaluations", json=body).raise_for_status().json()["id"]
            service.until(lambda: len(judge.answered) >= 5, "some answers")
            http.post(f"/evaluations/{evaluation_id}/pause").raise_for_status()
            service.until(lambda: http.get(f"/evaluations/{evaluation_id}").json()["status"] == "queued", "the pause")
            assert len(judge.answered) >= 5
            http.post(f"/evaluations/{evaluation_id}/resume").raise_for_status()
        evaluation = ended_evaluation(service, evaluation_id)
        assert set(judge.answered.values()) == {1}, "each question is paid once"
        assert set(judge.requests.values()) == {1, len(faults) + 1}
        assert judge.max_in_flight <= 3
    rows = items(service, evaluation)
    assert len(rows) == 60 and all(set(item["verdicts"]) <= {"candidate", "baseline", "tie"} for item in rows)
    different = [item for item in rows if item["candidate"].strip() != item["baseline"].strip()]
    for item in different:
        candidate, baseline = len(item["candidate"].strip()), len(item["baseline"].strip())
        if candidate != baseline:
            assert item["verdicts"] == ["candidate" if candidate > baseline else "baseline"] * 2, item
    metrics = evaluation["metrics"]
    assert metrics["longer_answer_wins@1"] > 0.9 and metrics["unparseable@1"] == 0
    assert metrics["judge/answers"] == len(judge.answered)
    words = sum(len(question.split()) for question in judge.answered)
    assert metrics["judge/input_tokens"] == words
    assert metrics["judge/cost"] == pytest.approx((1000 * words + 2000 * metrics["judge/output_tokens"]) / 1e6)
    assert "sk-judge" not in json.dumps(evaluation) and "api_key" not in evaluation["judge"]["endpoint"]


def test_a_worker_killed_while_it_asks_a_judge_repeats_few_questions(home: Path, tmp_path: Path) -> None:
    environment = {"DPO_PRIVATE_JUDGES": "localhost:*"}
    with running_judge(prefer_first) as judge:
        judge.delay = 0.1
        with running(home, environment) as service:
            data = upload(service, write(tmp_path / "pairs.jsonl", pairs(40, seed=1)), "evals")
            body = {
                "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
                "data": data, "judge": endpoint_judge(judge.url, concurrency=2),
            }  # fmt: skip
            with service.http() as http:
                evaluation_id = http.post("/evaluations", json=body).raise_for_status().json()["id"]
                service.until(
                    lambda: (http.get(f"/evaluations/{evaluation_id}").json()["progress"] or {}).get("answers"),
                    "some answers",
                )
            answered_before_kill = dict(judge.answered)
            (gpu_worker,) = worker_pids(service, "gpu")
            os.kill(gpu_worker, signal.SIGKILL)
            service.process.wait(60)
        with running(home, environment) as service:
            evaluation = ended_evaluation(service, evaluation_id)
    assert evaluation["attempt"] >= 3 and evaluation["metrics"]["win_rate"] == 0.5
    assert evaluation["metrics"]["first_shown_preferred"] == 1.0
    assert 0 < len(answered_before_kill) < len(judge.answered) < 80, "a question that two rows share is asked once"
    repeated = sum(count - 1 for count in judge.answered.values())
    assert repeated < 40, "only answers since the last save are asked for again"


def test_a_judge_that_refuses_the_key_fails_the_evaluation(service: Running, files: dict[str, str]) -> None:
    with running_judge(key="another") as judge:
        body = {
            "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
            "data": files["held"], "judge": endpoint_judge(judge.url),
        }  # fmt: skip
        evaluation = evaluate(service, body, "failed")
    assert evaluation["error"]["code"] == "judge_refused" and "401" in evaluation["error"]["message"]
    assert "sk-judge" not in json.dumps(evaluation)


def test_answers_paid_before_the_judge_refused_are_not_paid_again(service: Running, files: dict[str, str]) -> None:
    with running_judge() as judge:
        judge.credit = 20
        body = {
            "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
            "data": files["held"], "judge": endpoint_judge(judge.url, concurrency=1),
        }  # fmt: skip
        failed = evaluate(service, body, "failed")
        assert failed["error"]["code"] == "judge_refused" and "pay first" in failed["error"]["message"]
        assert len(judge.answered) == 20
        judge.credit = None
        completed = evaluate(service, body)
        assert set(judge.answered.values()) == {1}
        assert completed["metrics"]["judge/answers"] == len(judge.answered) > 20
        other_judge = endpoint_judge(judge.url, parameters={"temperature": 0.5})
        other_parameters = evaluate(service, body | {"judge": other_judge})
        assert other_parameters["metrics"]["win_rate"] == completed["metrics"]["win_rate"]
        assert set(judge.answered.values()) == {2}, (
            "with other parameters the judge may answer differently, so it is asked again"
        )


def test_the_agreement_of_a_judge_with_people_is_computed_from_their_votes(service: Running, tmp_path: Path) -> None:
    """The votes of people in MT-Bench. The judge prefers longer answers, so its agreement follows from the lengths."""
    rows = json.loads(shared_file("preference/human-judged/mtbench_human.json").read_text())
    data = upload(service, write(tmp_path / "judged.jsonl", rows), "evals")
    with running_judge() as judge:
        evaluation = evaluate(service, {"type": "agreement", "data": data, "judge": endpoint_judge(judge.url)})
    lengths = [(len(row["output_1"].strip()), len(row["output_2"].strip())) for row in rows]
    agreed = sum(
        (first > second) == (str(row["label"]) == "1")
        for (first, second), row in zip(lengths, rows, strict=True)
        if first != second
    )
    metrics, ties = evaluation["metrics"], sum(first == second for first, second in lengths)
    assert metrics["votes"] == 200 and metrics["people_people/cases"] == 5
    assert metrics["judge_people/agreement"] == pytest.approx(agreed / 200), "a tie agrees with nobody"
    assert metrics["judge_people/without_ties/agreement"] == pytest.approx(agreed / (200 - ties))
    assert metrics["inconsistent"] == ties > 0 and metrics["judge_prefers_longer"] == 1.0 - ties / 400


def test_dialogue_is_judged_against_the_chosen_answers_as_in_the_paper(service: Running) -> None:
    """Prompts of Anthropic HH, which are whole transcripts. The judge prefers longer answers."""
    file = shared_file("preference/hh-rlhf/helpful-base.test.jsonl.gz")
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    with running_judge() as judge:
        body = {
            "type": "win_rate", "candidate": {"model": "tiny"}, "baseline": {"answers": "chosen"}, "seed": 1,
            "data": upload(service, file, "evals"), "max_rows": 12, "judge": endpoint_judge(judge.url),
            "sampling": {"max_tokens": 8, "temperatures": [0.0]},
        }  # fmt: skip
        evaluation = evaluate(service, body)
    comparisons = items(service, evaluation)
    assert evaluation["metrics"]["comparisons"] == len(comparisons) == 12
    for item in comparisons:
        transcript = rows[item["line"] - 1]["chosen"]
        assert transcript.endswith(f"\n\nAssistant: {item['baseline']}")
        last_turn = transcript.rpartition("\n\nAssistant:")[0].rpartition("\n\nHuman:")[2]
        questions = [question for question in judge.answered if item["baseline"].strip() in question]
        assert len(questions) == 2 and all(last_turn.strip() in question for question in questions)
    longer = sum(len(item["candidate"].strip()) > len(item["baseline"].strip()) for item in comparisons)
    assert evaluation["metrics"]["wins"] == longer


def test_summaries_are_judged_against_the_reference_summaries_as_in_the_paper(service: Running) -> None:
    """TL;DR: summaries of several models in a file, against those of the posts' authors."""
    file = shared_file("sft/tldr_samples.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with running_judge() as judge:
        data = upload(service, file, "evals")
        body = {
            "type": "win_rate", "data": data, "mapping": {"prompt": "context", "completion": "ref_text"},
            "candidate": {"file": data, "mapping": {"prompt": "context", "completion": "sample"}},
            "baseline": {"answers": "chosen"}, "judge": endpoint_judge(judge.url) | {"question": "concise_summary"},
        }  # fmt: skip
        evaluation = evaluate(service, body)
        questions = list(judge.answered)
    comparisons = items(service, evaluation)
    assert all("without including unimportant or irrelevant details" in question for question in questions)
    file_rows = {(row["context"].strip(), row["ref_text"].strip(), row["sample"].strip()) for row in rows}
    assert {
        (item["prompt"].strip(), item["baseline"].strip(), item["candidate"].strip()) for item in comparisons
    } <= file_rows
    assert evaluation["metrics"]["comparisons"] == len(comparisons) > 1100
    length_differences = [len(item["candidate"].strip()) - len(item["baseline"].strip()) for item in comparisons]
    wins = sum(difference > 0 for difference in length_differences)
    losses = sum(difference < 0 for difference in length_differences)
    assert (evaluation["metrics"]["wins"], evaluation["metrics"]["losses"]) == (wins, losses)
    ties = len(comparisons) - wins - losses
    assert evaluation["metrics"]["longer_answer_wins"] == pytest.approx(1 - ties / 2 / len(comparisons))
