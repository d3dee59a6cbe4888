"""Refusals of the command line itself: one sentence, exit status 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.output import upload_files
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from tests.helpers.servers import free_port


def dpo(*arguments: str, home: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    full_environment = (
        os.environ | {"DPO_HOME": str(home), "DPO_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"} | environment
    )
    command = [sys.executable, "-m", "app.cli.main", *arguments]
    return subprocess.run(command, env=full_environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "environment", "phrase"),
    [
        (["models", "list"], {}, "No API key"),
        (["models", "list"], {"DPO_API_KEY": "x" * 20}, "cannot be reached"),
        (["jobs", "create", "--spec", "none.json"], {"DPO_API_KEY": "x" * 20}, "No such file"),
        (["jobs", "create", "--spec", "list.json"], {"DPO_API_KEY": "x" * 20}, "must hold a JSON object"),
        (["jobs", "create", "--spec", "sft.json", "--beta", "0.1"], {"DPO_API_KEY": "x" * 20}, "goes with the method"),
        (["jobs", "create", "--spec", "sft.json", "--loss", "ipo"], {"DPO_API_KEY": "x" * 20}, "goes with the method"),
        (["models", "download", "m", "--output", "."], {"DPO_API_KEY": "x" * 20}, "is not empty"),
        (["files", "upload", "none.jsonl"], {"DPO_API_KEY": "x" * 20}, "does not exist"),
        (["worker", "--lane", "tpu"], {}, "must be gpu or cpu"),
        (["migrate"], {"DPO_PORT": "abc"}, "DPO_PORT"),
        (["migrate"], {"DPO_ADMIN_KEY": "short"}, "16 characters"),
        (["nonsense"], {}, "No such command"),
    ],
)
def test_a_refusal_is_one_sentence_without_a_traceback(
    arguments: list[str],
    environment: dict[str, str],
    phrase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "sft.json").write_text('{"method": {"type": "supervised"}}')
    process = dpo(*arguments, home=tmp_path / "home", **environment)
    assert process.returncode == 2, process.stdout + process.stderr
    assert phrase in process.stderr.replace("\n", " ")
    assert "Traceback" not in process.stderr


def test_every_file_that_a_job_names_by_path_is_uploaded(tmp_path: Path) -> None:
    """The spec says which files a job and its evaluations read. Metadata names no file, whatever its keys are."""

    def path(name: str) -> str:
        (tmp_path / name).touch()
        return str(tmp_path / name)

    def upload(path: Path, form: JsonObject) -> JsonObject:
        return {"id": f"{path.name} as {form['purpose']}"}

    def files(body: JsonObject) -> list[str]:
        job = JobSpec.model_validate(body)
        evaluations = [file for evaluation in job.evaluations or [] for file in evaluation.files()]
        return [name for _, name in [*job.files(), *evaluations]]

    judge = {"type": "classifier", "classifier": {"file": path("words")}}
    evaluation = {"type": "win_rate", "data": path("held-out"), "judge": judge}
    best_of = {"model": "tiny", "best_of": {"n": 2, "by": judge}}
    body = {
        "model": "tiny",
        "method": {"type": "dpo"},
        "training_file": path("pairs"),
        "more_training_files": [path("more-pairs"), "file-1"],
        "validation_file": path("held-out-pairs"),
        "sft": {"training_file": path("chats"), "validation_file": path("held-out-chats")},
        "evaluations": [
            evaluation | {"name": "ready", "baseline": {"file": path("answers")}},
            evaluation | {"name": "best", "baseline": best_of},
        ],
        "metadata": {"data": path("notes")},
    }
    upload_files(upload, body)
    training = ["pairs as fine-tune", "more-pairs as fine-tune", "file-1", "held-out-pairs as fine-tune"]
    sft = ["chats as fine-tune", "held-out-chats as fine-tune"]
    ready, best = ("held-out", "answers", "words"), ("held-out", "words", "words")
    assert files(body) == [*training, *sft, *(f"{name} as evals" for name in ready + best)]
    assert body["metadata"] == {"data": str(tmp_path / "notes")}


def test_a_new_key_is_printed_and_not_stored(tmp_path: Path) -> None:
    process = dpo("keys", "create", "--name", "ci", home=tmp_path)
    assert process.returncode == 0 and process.stdout.startswith("dpo_")
    key = process.stdout.strip().encode()
    assert all(key not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
