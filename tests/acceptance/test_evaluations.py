"""Evaluations through a real service: queued, run, recovered and read as trainings are."""

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

from tests.helpers.judge_server import first, judging
from tests.helpers.preferences import pairs, write
from tests.helpers.service import CLASSIFIER, Running, ended, lanes, running, trainer_at_work, upload


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


def items(service: Running, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    with service.http() as http:
        content = http.get(f"/files/{evaluation['result_files'][1]}/content").raise_for_status().text
    return [json.loads(line) for line in content.splitlines()]


def test_a_trained_model_prefers_what_people_preferred(
    service: Running, files: dict[str, str], model: str, tmp_path: Path
) -> None:
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
    assert service.dpo("evaluations", "download", found["id"], "--output", str(tmp_path / "all")).returncode == 0
    left = {path.name: path.read_text() for path in (tmp_path / "all").iterdir()}
    assert set(left) == {"evaluation.json", "report.json", "items.jsonl"}
    assert json.loads(left["evaluation.json"])["metrics"] == found["metrics"]
    assert json.loads(left["report.json"]) == report
    assert [json.loads(line) for line in left["items.jsonl"].splitlines()] == items(service, found)
    again = service.dpo("evaluations", "download", found["id"], "--output", str(tmp_path / "all"))
    assert again.returncode == 2 and "empty" in again.stderr


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
        service.until(lambda: http.get(f"/evaluations/{started}").json()["progress"], "some completions")
        os.kill(trainer_at_work(service.home), signal.SIGKILL)
    found = ended(service, started)
    assert found["attempt"] > expected["attempt"]
    assert items(service, found) == items(service, expected) and found["metrics"] == expected["metrics"]


def test_two_models_are_compared_on_one_page(
    service: Running, files: dict[str, str], model: str, tmp_path: Path
) -> None:
    """Answers, verdicts, KL and curves, in one file that loads and runs nothing; what an answer says is only text."""
    (tmp_path / "prompts.txt").write_text("say <b>sun</b>: \n\nsay rain: \n")
    given = ("compare", model, "tiny", "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "6")
    with judging(lambda *_: "<script>alert(1)</script>\nPreferred: A") as judge:
        options = ("--judge-url", judge.url, "--judge-model", "m", "--output", str(tmp_path / "page.html"), "--json")
        done = service.dpo(*given, *options)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"page": str(tmp_path / "page.html"), "data": str(tmp_path / "page.json")}
    found = json.loads((tmp_path / "page.json").read_text())
    assert [item["prompt"] for item in found["items"]] == ["say <b>sun</b>: ", "say rain: "]
    assert found["kl"]["a_to_b"]["value"] > 0 and found["metrics"]["win_rate"] == 0.5
    assert list(found["trainings"]) == [model] and "rewards/margins" in found["trainings"][model]
    page = (tmp_path / "page.html").read_text()
    for item in found["items"]:
        assert html.escape(item["candidate"], quote=False)[:4] in page
    assert "say &lt;b&gt;sun&lt;/b&gt;:" in page and "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert page.count("<svg") >= 4 and "KL(A ‖ B)" in page and "50.0 %" in page
    assert not re.search(r"""(?:src|href)=|url\(|@import""", page), "it needs nothing else"


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
        service.until(lambda: http.get(f"/evaluations/{started}").json()["status"] == "running", "it to run")
        assert http.post(f"/evaluations/{started}/pause").json()["paused"]
        service.until(lambda: http.get(f"/evaluations/{started}").json()["status"] == "queued", "the pause")
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


def shared(name: str) -> Path:
    """A file of the shared data; without it the test is skipped."""
    found = Path(os.environ.get("DPO_SHARED", "../shared")) / "data" / name
    if not found.exists():
        pytest.skip(f"no {found}: set DPO_SHARED")
    return found


def asked(url: str, **fields: Any) -> dict[str, Any]:
    """A judge that is asked over HTTP."""
    return {"type": "endpoint", "endpoint": {"base_url": url, "model": "judge", "api_key": "sk-judge", **fields}}


def test_a_judge_is_asked_in_spite_of_what_goes_wrong_and_paid_once(
    service: Running, files: dict[str, str], model: str
) -> None:
    """Errors, rate limits and garbage first; paused in the middle; the judge only likes length, and that shows."""
    faults = ("rate limit", "not json", "hang up", "error")
    with judging(faults=faults, key="sk-judge", every=6) as judge:
        judge.delay = 0.02
        body = {
            "type": "win_rate", "candidate": {"model": model}, "baseline": {"answers": "chosen"}, "data": files["held"],
            "sampling": {"max_tokens": 8, "temperatures": [0.0, 1.0]}, "seed": 1,
            "judge": asked(judge.url, concurrency=3, price={"input": 1000, "output": 2000}),
        }  # fmt: skip
        with service.http() as http:
            started = http.post("/evaluations", json=body).raise_for_status().json()["id"]
            service.until(lambda: len(judge.answered) >= 5, "some answers")
            http.post(f"/evaluations/{started}/pause").raise_for_status()
            service.until(lambda: http.get(f"/evaluations/{started}").json()["status"] == "queued", "the pause")
            assert len(judge.answered) >= 5
            http.post(f"/evaluations/{started}/resume").raise_for_status()
        found = ended(service, started)
        assert set(judge.answered.values()) == {1}, "each question is paid once"
        assert set(judge.asked.values()) == {1, len(faults) + 1}
        assert judge.most_at_once <= 3
    made = items(service, found)
    assert len(made) == 60 and all(set(item["verdicts"]) <= {"candidate", "baseline", "tie"} for item in made)
    different = [item for item in made if item["candidate"].strip() != item["baseline"].strip()]
    for item in different:
        a, b = len(item["candidate"].strip()), len(item["baseline"].strip())
        if a != b:
            assert item["verdicts"] == ["candidate" if a > b else "baseline"] * 2, item
    metrics = found["metrics"]
    assert metrics["longer_answer_wins@1"] > 0.9 and metrics["unparseable@1"] == 0
    assert metrics["judge/answers"] == len(judge.answered)
    words = sum(len(question.split()) for question in judge.answered)
    assert metrics["judge/input_tokens"] == words
    assert metrics["judge/cost"] == pytest.approx((1000 * words + 2000 * metrics["judge/output_tokens"]) / 1e6)
    assert "sk-judge" not in json.dumps(found) and "api_key" not in found["judge"]["endpoint"]


def test_a_worker_that_is_killed_while_it_asks_pays_little_twice(home: Path, tmp_path: Path) -> None:
    more = {"DPO_PRIVATE_JUDGES": "localhost"}
    with judging(first) as judge:
        judge.delay = 0.1
        with running(home, more) as service:
            data = upload(service, write(tmp_path / "pairs.jsonl", pairs(40, seed=1)), "evals")
            body = {
                "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
                "data": data, "judge": asked(judge.url, concurrency=2),
            }  # fmt: skip
            with service.http() as http:
                started = http.post("/evaluations", json=body).raise_for_status().json()["id"]
                service.until(
                    lambda: (http.get(f"/evaluations/{started}").json()["progress"] or {}).get("answers"), "some"
                )
            answered = dict(judge.answered)
            (gpu,) = lanes(service, "gpu")
            os.kill(gpu, signal.SIGKILL)
            service.process.wait(60)
        with running(home, more) as service:
            found = ended(service, started)
    assert found["attempt"] >= 3 and found["metrics"]["win_rate"] == 0.5
    assert found["metrics"]["first_shown_preferred"] == 1.0
    assert 0 < len(answered) < len(judge.answered) < 80, "what is the same in two rows is asked once"
    twice = sum(count - 1 for count in judge.answered.values())
    assert twice < 40, "no more than came since what was kept"


def test_a_judge_that_refuses_fails_the_evaluation_by_name(service: Running, files: dict[str, str]) -> None:
    with judging(key="another") as judge:
        body = {
            "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
            "data": files["held"], "judge": asked(judge.url),
        }  # fmt: skip
        found = evaluate(service, body, "failed")
    assert found["error"]["code"] == "judge_refused" and "401" in found["error"]["message"]
    assert "sk-judge" not in json.dumps(found)


def test_what_was_paid_before_the_judge_refused_is_not_paid_again(service: Running, files: dict[str, str]) -> None:
    with judging() as judge:
        judge.credit = 20
        body = {
            "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"},
            "data": files["held"], "judge": asked(judge.url, concurrency=1),
        }  # fmt: skip
        failed = evaluate(service, body, "failed")
        assert failed["error"]["code"] == "judge_refused" and "pay first" in failed["error"]["message"]
        assert len(judge.answered) == 20
        judge.credit = None
        found = evaluate(service, body)
        assert set(judge.answered.values()) == {1} and found["metrics"]["judge/answers"] == len(judge.answered) > 20
        other = evaluate(service, body | {"judge": asked(judge.url, parameters={"temperature": 0.5})})
        assert other["metrics"]["win_rate"] == found["metrics"]["win_rate"]
        assert set(judge.answered.values()) == {2}, "asked otherwise it might say something else"


def test_a_judge_agrees_with_people_as_it_says(service: Running, tmp_path: Path) -> None:
    """Real verdicts of people, where they are at hand; the judge likes length, and agrees as often as people do."""
    rows = json.loads(shared("preference/human-judged/mtbench_human.json").read_text())
    data = upload(service, write(tmp_path / "judged.jsonl", rows), "evals")
    with judging() as judge:
        found = evaluate(service, {"type": "agreement", "data": data, "judge": asked(judge.url)})
    lengths = [(len(row["output_1"].strip()), len(row["output_2"].strip())) for row in rows]
    right = sum((a > b) == (str(row["label"]) == "1") for (a, b), row in zip(lengths, rows, strict=True) if a != b)
    metrics, ties = found["metrics"], sum(a == b for a, b in lengths)
    assert metrics["votes"] == 200 and metrics["people_people/cases"] == 5
    assert metrics["judge_people/agreement"] == pytest.approx(right / 200), (
        "one that prefers neither agrees with nobody"
    )
    assert metrics["judge_people/without_ties/agreement"] == pytest.approx(right / (200 - ties))
    assert metrics["inconsistent"] == ties > 0 and metrics["judge_prefers_longer"] == 1.0 - ties / 400


def test_dialogue_is_judged_against_the_chosen_answers_as_in_the_paper(service: Running) -> None:
    """Prompts of Anthropic HH, whole transcripts; the judge likes length."""
    file = shared("preference/hh-rlhf/helpful-base.test.jsonl.gz")
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    with judging() as judge:
        body = {
            "type": "win_rate", "candidate": {"model": "tiny"}, "baseline": {"answers": "chosen"}, "seed": 1,
            "data": upload(service, file, "evals"), "max_rows": 12, "judge": asked(judge.url),
            "sampling": {"max_tokens": 8, "temperatures": [0.0]},
        }  # fmt: skip
        found = evaluate(service, body)
    made = items(service, found)
    assert found["metrics"]["comparisons"] == len(made) == 12
    for item in made:
        transcript = rows[item["line"] - 1]["chosen"]
        assert transcript.endswith(f"\n\nAssistant: {item['baseline']}")
        last = transcript.rpartition("\n\nAssistant:")[0].rpartition("\n\nHuman:")[2]
        shown = [question for question in judge.answered if item["baseline"].strip() in question]
        assert len(shown) == 2 and all(last.strip() in question for question in shown)
    longer = sum(len(item["candidate"].strip()) > len(item["baseline"].strip()) for item in made)
    assert found["metrics"]["wins"] == longer


def test_summaries_are_judged_against_the_reference_summaries_as_in_the_paper(service: Running) -> None:
    """TL;DR: what several models wrote, as ready answers, beside what the posts' authors wrote; the concise question."""
    file = shared("sft/tldr_samples.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with judging() as judge:
        data = upload(service, file, "evals")
        body = {
            "type": "win_rate", "data": data, "mapping": {"prompt": "context", "completion": "ref_text"},
            "candidate": {"file": data, "mapping": {"prompt": "context", "completion": "sample"}},
            "baseline": {"answers": "chosen"}, "judge": asked(judge.url) | {"question": "concise_summary"},
        }  # fmt: skip
        found = evaluate(service, body)
        questions = list(judge.answered)
    made = items(service, found)
    assert all("without including unimportant or irrelevant details" in question for question in questions)
    written = {(row["context"].strip(), row["ref_text"].strip(), row["sample"].strip()) for row in rows}
    assert {(item["prompt"].strip(), item["baseline"].strip(), item["candidate"].strip()) for item in made} <= written
    assert found["metrics"]["comparisons"] == len(made) > 1100
    outcome = [len(item["candidate"].strip()) - len(item["baseline"].strip()) for item in made]
    wins, losses = sum(value > 0 for value in outcome), sum(value < 0 for value in outcome)
    assert (found["metrics"]["wins"], found["metrics"]["losses"]) == (wins, losses)
    ties = len(made) - wins - losses
    assert found["metrics"]["longer_answer_wins"] == pytest.approx(1 - ties / 2 / len(made))
