"""Refusals of the command line itself: one sentence, exit status 2, no traceback."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.cli.jobs import next_steps
from app.cli.output import emit, emit_table
from app.cli.uploads import upload_files
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
        (["jobs", "create", "--spec", "sft.json", "--beta", "0.1"], {"DPO_API_KEY": "x" * 20}, "does not go with"),
        (["jobs", "create", "--spec", "sft.json", "--loss", "ipo"], {"DPO_API_KEY": "x" * 20}, "does not go with"),
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

    def upload(path: Path, purpose: str) -> str:
        return f"{path.name} as {purpose}"

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


def test_a_command_that_waits_outlasts_a_restart_and_the_errors_of_a_proxy(tmp_path: Path) -> None:
    """One that does not wait ends with the first error."""
    job = {"id": "ftjob-1", "status": "running", "paused": False, "stage": "dpo", "queue_position": None}
    job |= {"waiting_for": None, "metrics": {}, "progress": None, "gates": [], "fine_tuned_model": "m", "model": "tiny"}
    done = job | {"status": "succeeded", "error": None, "method": {"type": "dpo"}, "adapter": "none"}
    answers: list[object] = [502, job, "hangs up", 503, "cut", 504, done]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = {"data": [], "has_more": False} if "/events" in self.path else answers.pop(0)
            content = json.dumps(answer).encode()
            if answer != "hangs up":
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(content) + 9 * (answer == "cut")))
                self.end_headers()
                self.wfile.write(content)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"DPO_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "DPO_API_KEY": "x" * 20}
        watched = dpo("jobs", "watch", "ftjob-1", "--json", home=tmp_path, **environment)
        assert watched.returncode == 0 and not answers, watched.stderr
        assert json.loads(watched.stdout)["status"] == "succeeded"
        assert watched.stderr.count("Trying again") == 2, "it is said once for each outage"
        answers[:] = [502]
        shown = dpo("jobs", "show", "ftjob-1", home=tmp_path, **environment)
        assert shown.returncode == 2 and "502" in shown.stderr
        server.shutdown()


def test_options_add_to_the_resources_of_a_spec(tmp_path: Path) -> None:
    bodies = list[JsonObject]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "spec.json").write_text(json.dumps({"model": "m", "training_file": "file-1", "resources": {"gpus": 2}}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"DPO_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "DPO_API_KEY": "x" * 20}
        spec = ["jobs", "create", "--spec", str(tmp_path / "spec.json")]
        for options in ([], ["--nodes", "2"], ["--nodes", "2", "--gpus", "16"]):
            dpo(*spec, *options, home=tmp_path, **environment)
        server.shutdown()
    sent = [body["resources"] for body in bodies]
    assert [each for k, each in enumerate(sent) if each not in sent[:k]] == [
        {"gpus": 2},
        {"gpus": 2, "nodes": 2},
        {"gpus": 16, "nodes": 2},
    ]


LORA: dict[str, object] = {"r": 16, "use_dora": False}


@pytest.mark.parametrize(
    ("adapter", "loss", "serve"),
    [
        (LORA, "sigmoid", "vllm serve tiny --enable-lora --lora-modules tuned=model\n"),
        (LORA | {"r": 17}, "sigmoid", "--lora-modules tuned=model --max-lora-rank 32\n"),
        (LORA | {"r": 512}, "sigmoid", "--lora-modules tuned=model --max-lora-rank 512\n"),
        (LORA | {"r": 1024}, "sigmoid", "merge it first"),
        (LORA | {"use_dora": True}, "sigmoid", "merge it first"),
        (LORA | {"modules_to_save": ["lm_head"]}, "sigmoid", "merge it first"),
        (LORA, "reward_model", "vllm serve ./model --runner pooling --convert classify\n"),
        ("none", "sigmoid", "vllm serve ./model\n"),
    ],
)
def test_the_command_that_serves_a_model_fits_its_adapter(adapter: object, loss: str, serve: str) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"loss": loss}}}
    job = {"model": "tiny", "fine_tuned_model": "ft:tiny:default::1", "method": method, "adapter": adapter}
    assert serve in f"{next_steps(job)}\n"


def test_a_new_key_is_printed_and_not_stored(tmp_path: Path) -> None:
    process = dpo("keys", "create", "--name", "ci", home=tmp_path)
    assert process.returncode == 0 and process.stdout.startswith("dpo_")
    key = process.stdout.strip().encode()
    assert all(key not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


HOSTILE = "[red]x[/] \x1b]0;title\x07 \x9b31m \x08"


@pytest.mark.parametrize("as_json", [False, True])
def test_control_characters_of_users_never_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """Nor is markup obeyed. As JSON, the text is still the same."""
    emit({"name": HOSTILE}, as_json, HOSTILE)
    printed = capsys.readouterr().out
    emit_table([{"name": HOSTILE}], ["name"], as_json)
    table = capsys.readouterr().out
    for text in (printed, table):
        assert not [character for character in text if ord(character) < 32 and character != "\n"]
        assert not [character for character in text if 0x7F <= ord(character) < 0xA0]
        assert "[red]x[/]" in text
    if as_json:
        assert json.loads(printed)["name"] == json.loads(table)[0]["name"] == HOSTILE
