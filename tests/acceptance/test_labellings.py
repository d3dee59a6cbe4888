"""Labellings on a real service: their answers, labels and files, and what a training learns from them."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz import fuzz

from tests.helpers.judge_server import JudgeServer, prefer_first, prefer_longer, running_judge
from tests.helpers.labellings import by_likeness
from tests.helpers.preferences import pairs, write
from tests.helpers.service import (
    YES_NO_CLASSIFIER,
    Running,
    busy_trainer_pid,
    ended_labelling,
    running,
    upload,
    worker_pids,
)


@pytest.fixture(scope="module")
def files(service: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return prepared(service, folder)


def prepared(service: Running, folder: Path) -> dict[str, str]:
    """Files of the service: prompts, pairs, and a classifier."""
    (folder / "classifier.json").write_text(json.dumps(YES_NO_CLASSIFIER))
    prompts = [{"prompt": f"say {word}"} for word in ("sun", "moon", "star", "rain", "sun")]
    return {
        "prompts": upload(service, write(folder / "prompts.jsonl", prompts), "fine-tune"),
        "pairs": upload(service, write(folder / "pairs.jsonl", pairs(20, seed=1)), "fine-tune"),
        "classifier": upload(service, folder / "classifier.json", "evals"),
    }


def label(service: Running, body: dict[str, Any], status: str = "succeeded") -> dict[str, Any]:
    """Create a labelling, and wait until it has ended with `status`."""
    with service.http() as http:
        created = http.post("/labellings", json=body)
        assert created.status_code == 200, created.text
    return ended_labelling(service, created.json()["id"], status)


def content(service: Running, labelling: dict[str, Any], number: int = 0) -> bytes:
    """A result file: 0 for the ranked answers, 2 for the items."""
    with service.http() as http:
        answer: bytes = http.get(f"/files/{labelling['result_files'][number]}/content").raise_for_status().content
    return answer


def lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


SAMPLED: dict[str, Any] = {
    "writers": [{"model": "tiny"}],
    "sampling": {"samples": 6, "max_tokens": 24, "temperatures": [1.0]},
    "seed": 5,
}


def test_the_file_of_a_labelling_trains_a_model(service: Running, files: dict[str, str], tmp_path: Path) -> None:
    labelling = label(service, SAMPLED | {"data": files["prompts"], "labellers": [by_likeness()]})
    rows, items = lines(content(service, labelling)), lines(content(service, labelling, 2))
    assert labelling["file"] == labelling["result_files"][0]
    assert len(items) == 4, "the prompt that is there twice is answered once"
    assert {row["prompt"] for row in rows} <= {"say sun", "say moon", "say star", "say rain"}
    for row in rows:
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(set(row["responses"])) >= 2
        for text, value in zip(row["responses"], row["scores"], strict=True):
            assert value == pytest.approx(fuzz.ratio(text, row["prompt"]) / 100)
        assert row["writers"] == ["tiny"] * len(row["responses"]) and row["labels"] == {"grader": row["scores"]}
    metrics = labelling["metrics"]
    assert metrics["rows"] == len(rows) >= 3 and metrics["prompts"] == 4
    assert metrics["answers"] + metrics["repeated"] + metrics["missing"] == 4 * 6
    assert metrics["margin"] == pytest.approx(sum(row["scores"][0] - row["scores"][-1] for row in rows) / len(rows))
    with service.http() as http:
        file = http.get(f"/files/{labelling['file']}").raise_for_status().json()
        assert file["purpose"] == "fine-tune" and file["filename"] == f"{labelling['id']}.jsonl"
        report = http.get(f"/labellings/{labelling['id']}/report").raise_for_status().json()
        assert report["rows"] == len(rows) and report["writers"][0]["name"] == "tiny"
        events = http.get(f"/labellings/{labelling['id']}/events").json()["data"]
        assert events[0]["message"].startswith(f"The labelling has succeeded: rows {len(rows)}")
        assert http.get("/labellings").json()["data"][0]["id"] == labelling["id"]
        assert labelling["id"] not in http.get("/evaluations").text + http.get("/fine_tuning/jobs").text
        body = {
            "model": "tiny", "training_file": labelling["file"], "validation_split": 0.0,
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"pairs": "best_worst", "max_steps": 2}}},
        }  # fmt: skip
        job_id = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        listwise = body | {
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"loss": "plackett_luce", "max_steps": 2}}}
        }
        list_id = http.post("/fine_tuning/jobs", json=listwise).raise_for_status().json()["id"]
        service.wait_for(job_id, lambda job: job["status"] == "succeeded")
        service.wait_for(list_id, lambda job: job["status"] == "succeeded")
        messages = [
            event["message"] for event in http.get(f"/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
        ]
    assert any(f"{len(rows)} rows" in message for message in messages), "one pair of each row"


def test_a_labelling_whose_trainer_is_killed_ends_with_the_same_bytes(service: Running, files: dict[str, str]) -> None:
    body = SAMPLED | {
        "data": files["pairs"], "labellers": [by_likeness()],
        "writers": [{"model": "tiny"}, {"model": "tiny"}], "sampling": {"samples": 25, "max_tokens": 60},
    }  # fmt: skip
    undisturbed = label(service, body)
    with service.http() as http:
        labelling_id = http.post("/labellings", json=body).raise_for_status().json()["id"]
        service.until(lambda: http.get(f"/labellings/{labelling_id}").json()["progress"], "some completions")
        os.kill(busy_trainer_pid(service.home), signal.SIGKILL)
    recovered = ended_labelling(service, labelling_id)
    assert recovered["attempt"] > undisturbed["attempt"]
    assert content(service, recovered) == content(service, undisturbed)
    assert content(service, recovered, 2) == content(service, undisturbed, 2)
    assert recovered["metrics"] == undisturbed["metrics"]
    texts = [answer["text"] for item in lines(content(service, recovered, 2)) for answer in item["answers"]]
    assert len(set(texts)) > 0.9 * len(texts), "two writers with the same model have random numbers of their own"


LONGER = prefer_longer("", "longer", "short")


def numbered(served: Iterator[int]) -> Any:
    """The reply of a writer that never says the same twice."""

    def reply(_question: str, _a: str, _b: str) -> str:
        number = next(served)
        return f"{number} {'word ' * (number % 7)}."

    return reply


def endpoint(server: JudgeServer, **fields: Any) -> dict[str, Any]:
    return {"base_url": server.url, "model": "other", "api_key": "sk-secret", **fields}


def test_each_question_to_a_faulty_writer_and_a_faulty_judge_is_answered_and_paid_once(
    service: Running, files: dict[str, str]
) -> None:
    """Models and an endpoint write. A judge prefers longer answers, and a grader gives a second opinion."""
    faults = ("rate limit", "not json", "hang up", "error")
    with (
        running_judge(numbered(itertools.count()), key="sk-secret") as writer,
        running_judge(faults=faults, key="sk-secret", every=6) as judge,
    ):
        writer.delay = judge.delay = 0.02
        asked = {"type": "endpoint", "endpoint": endpoint(judge, concurrency=3, price={"input": 1, "output": 2})}
        body = {
            "data": files["prompts"], "seed": 1, "sampling": {"samples": 3, "max_tokens": 12, "temperatures": [0.7]},
            "writers": [{"model": "tiny"}, {"endpoint": endpoint(writer, parameters={"stop": "!", "max_tokens": None})}],
            "labellers": [{"judge": asked, "name": "length"}, by_likeness()],
        }  # fmt: skip
        with service.http() as http:
            estimated = http.post("/labellings/estimate", json=body)
            labelling_id = http.post("/labellings", json=body).raise_for_status().json()["id"]
            service.until(lambda: len(judge.answered) >= 5, "some verdicts")
            http.post(f"/labellings/{labelling_id}/pause").raise_for_status()
            service.until(lambda: http.get(f"/labellings/{labelling_id}").json()["status"] == "queued", "the pause")
            http.post(f"/labellings/{labelling_id}/resume").raise_for_status()
        labelling = ended_labelling(service, labelling_id)
        assert sum(writer.answered.values()) == 4 * 3 and len(writer.answered) == 4
        assert set(judge.answered.values()) == {1}, "each question is paid once"
        assert {tuple(sorted(body)) for body in writer.bodies} == {("messages", "model", "stop", "temperature")}
        assert {body["temperature"] for body in writer.bodies} == {0.7}
    assert estimated.status_code in (200, 202)
    assert "sk-secret" not in json.dumps(labelling)
    items = lines(content(service, labelling, 2))
    for item in items:
        texts = [answer["text"] for answer in item["answers"]]
        assert {answer["writer"] for answer in item["answers"]} == {0, 1}
        lengths = [len(text.strip()) for text in texts]
        for own, value in zip(lengths, item["labels"]["length"]["scores"], strict=True):
            wins = sum(0.5 + 0.5 * ((own > other) - (own < other)) for other in lengths) - 0.5
            # Two texts of one length: the judge names the second in both orders, which is a tie.
            assert value == pytest.approx(wins / (len(lengths) - 1))
    metrics = labelling["metrics"]
    asked_about = sum(len(item["answers"]) * (len(item["answers"]) - 1) for item in items)
    assert metrics["endpoints/answers"] == asked_about + 4 * 3
    assert metrics["unparseable"] == 0 and metrics["longer_preferred"] == 1.0 - ties(items) / 2
    assert metrics["kappa@grader"] == pytest.approx(kappa(items, "length", "grader"))
    read = sum(len(question.split()) for question in judge.answered)
    written = len(LONGER.split()) * len(judge.answered)
    assert metrics["endpoints/cost"] == pytest.approx((read + 2 * written) / 1e6)


def classes(item: dict[str, Any], labeller: str) -> list[int]:
    """How a labeller orders every two answers of an item, in both orders: 1, −1, or 0 for a tie."""
    scores = item["labels"][labeller]["scores"]
    return [(a > b) - (a < b) for a, b in itertools.permutations(scores, 2)]


def ties(items: list[dict[str, Any]]) -> float:
    """The share of pairs of answers that have the same length."""
    found = [value for item in items for value in classes(item, "length")]
    return found.count(0) / len(found)


def kappa(items: list[dict[str, Any]], one: str, other: str) -> float:
    """Cohen's κ by its definition."""
    cases = [case for item in items for case in zip(classes(item, one), classes(item, other), strict=True)]
    observed = sum(a == b for a, b in cases) / len(cases)
    chance = sum(
        sum(a == k for a, _ in cases) * sum(b == k for _, b in cases) for k in (-1, 0, 1)
    ) / len(cases) ** 2  # fmt: skip
    return (observed - chance) / (1 - chance)


def test_a_worker_killed_while_it_asks_endpoints_repeats_few_questions(home: Path, tmp_path: Path) -> None:
    environment = {"DPO_PRIVATE_JUDGES": "localhost:*"}
    with running_judge(numbered(itertools.count())) as writer, running_judge(prefer_first) as judge:
        writer.delay = judge.delay = 0.1
        with running(home, environment) as service:
            files = prepared(service, tmp_path)
            body = {
                "data": files["pairs"], "writers": [{"endpoint": endpoint(writer, concurrency=2)}],
                "sampling": {"samples": 4}, "own_answers": True,
                "labellers": [{"judge": {"type": "endpoint", "endpoint": endpoint(judge)}}],
            }  # fmt: skip
            with service.http() as http:
                labelling_id = http.post("/labellings", json=body).raise_for_status().json()["id"]
                service.until(
                    lambda: (http.get(f"/labellings/{labelling_id}").json()["progress"] or {}).get("answers"), "answers"
                )
            written = sum(writer.answered.values())
            (gpu_worker,) = worker_pids(service, "gpu")
            os.kill(gpu_worker, signal.SIGKILL)
            service.process.wait(60)
        with running(home, environment) as service:
            labelling = ended_labelling(service, labelling_id, "failed")
    assert labelling["error"]["code"] == "nothing_to_compare", "a judge that always says A prefers no answer"
    prompts = len(writer.answered)
    assert 0 < written < 4 * prompts
    assert sum(writer.answered.values()) - 4 * prompts < 20, "only answers since the last save are asked for again"


def test_answers_paid_before_the_writer_refused_are_not_paid_again(service: Running, files: dict[str, str]) -> None:
    with running_judge(numbered(itertools.count())) as writer:
        writer.credit = 5
        body = {
            "data": files["prompts"], "writers": [{"endpoint": endpoint(writer, concurrency=1)}],
            "sampling": {"samples": 3}, "labellers": [by_likeness()],
        }  # fmt: skip
        failed = label(service, body, "failed")
        assert failed["error"]["code"] == "writer_refused" and failed["error"]["param"] == "writers.0.endpoint"
        assert "pay first" in failed["error"]["message"] and "sk-secret" not in json.dumps(failed)
        assert sum(writer.answered.values()) == 5
        writer.credit = None
        label(service, body)
        assert sum(writer.answered.values()) == 4 * 3


def test_a_grader_checks_the_answers_of_the_data_against_its_rows(service: Running, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{a} + {b} =", "responses": [f"{a + b}", f"{a - b}", f"about {a + b}"], "sum": str(a + b)}
        for a, b in [(5, 3), (7, 2), (9, 4)]
    ]
    data = upload(service, write(tmp_path / "sums.jsonl", rows), "fine-tune")
    check = {"type": "string_check", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.sum}}"}
    like = check | {"operation": "like", "name": "like"}
    grader = {
        "type": "multi", "name": "both", "calculate_output": "exact + like / 2",
        "graders": {"exact": check | {"name": "exact"}, "like": like},
    }  # fmt: skip
    labelling = label(service, {"data": data, "own_answers": True, "labellers": [{"grader": grader}]})
    for row, source in zip(lines(content(service, labelling)), rows, strict=True):
        right, wrong, about = source["responses"]
        assert row["responses"] == [right, about, wrong] and row["scores"] == [1.5, 0.5, 0.0]
        assert row["writers"] == ["data"] * 3


def test_equal_answers_leave_nothing_to_compare(service: Running, files: dict[str, str]) -> None:
    body = {
        "data": files["prompts"], "writers": [{"model": "tiny"}, {"model": "tiny"}],
        "sampling": {"temperatures": [0.0], "max_tokens": 8}, "labellers": [by_likeness()],
    }  # fmt: skip
    labelling = label(service, body, "failed")
    assert labelling["error"]["code"] == "nothing_to_compare"


def test_a_classifier_labels_pairs_as_people_did(service: Running, files: dict[str, str]) -> None:
    """Its score is minus the number of times that an answer says no. The rejected answers of the data say it."""
    judge = {"type": "classifier", "classifier": {"file": files["classifier"]}}
    labelling = label(service, {"data": files["pairs"], "own_answers": True, "labellers": [{"judge": judge}]})
    rows = lines(content(service, labelling))
    assert rows and all(row["responses"][1].split()[0] == "no" for row in rows)
    assert all(row["scores"][0] == 0.0 and set(row["scores"][1:]) == {-1.0} for row in rows)


def test_the_command_line_estimates_follows_and_downloads_a_labelling(service: Running, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs(6, seed=4))
    (tmp_path / "classifier.json").write_text(json.dumps(YES_NO_CLASSIFIER))
    arguments = (
        "label",
        "--data",
        "pairs.jsonl",
        "--own-answers",
        "--classifier",
        "classifier.json",
        "--max-rows",
        "4",
    )
    estimated = service.dpo(*arguments, "--estimate", folder=tmp_path)
    assert estimated.returncode == 0 and "answers: 8" in estimated.stdout, estimated.stderr
    ended = service.dpo(*arguments, "--watch", "--json", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    labelling_id, file_id = (json.loads(ended.stdout)[name] for name in ("id", "file"))
    watched = service.dpo("labellings", "watch", labelling_id)
    assert watched.returncode == 0 and file_id in watched.stdout
    listed = service.dpo("labellings", "list", "--json")
    row = next(row for row in json.loads(listed.stdout) if row["id"] == labelling_id)
    assert row["file"] == file_id and row["metrics"]["rows"] == 4
    assert labelling_id in service.dpo("labellings", "list").stdout
    report = json.loads(service.dpo("labellings", "report", labelling_id).stdout)
    assert report["rows"] == 4 and report["writers"][0]["name"] == "data"
    output = tmp_path / "all"
    assert service.dpo("labellings", "download", labelling_id, "--output", str(output)).returncode == 0
    assert {path.name for path in output.iterdir()} == {
        "labelling.json", "report.json", "items.jsonl", f"{labelling_id}.jsonl"
    }  # fmt: skip
    assert "file: " in service.dpo("labellings", "show", labelling_id).stdout
    assert service.dpo("labellings", "cancel", labelling_id).returncode != 0, "it has ended"
