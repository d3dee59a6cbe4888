"""The files that the command line uploads for a request, at a real server."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner, Result

from app.cli.client import Client, ClientError
from app.cli.main import cli
from app.cli.uploads import Uploads
from app.services import Services
from app.settings import Settings
from tests.helpers.api import ROW, rows, served
from tests.helpers.servers import CEILING

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Command = Callable[..., Result]


@pytest.fixture
def client(settings: Settings, services: Services) -> Iterator[httpx2.Client]:
    with served(settings) as (_, _, client):
        yield client


@pytest.fixture
def dpo(client: httpx2.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs a command in this process."""
    monkeypatch.setenv("DPO_BASE_URL", f"{client.base_url}/v1")
    monkeypatch.setenv("DPO_API_KEY", str(settings.admin_key))
    open_client = Client.__init__
    with ExitStack() as opened:  # a command ends with its process, which closes its connections

        def open_and_close_later(client: Client) -> None:
            open_client(client)
            opened.callback(client.close)

        monkeypatch.setattr(Client, "__init__", open_and_close_later)
        yield lambda *arguments: CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A job on two files that it names by path."""
    for name in ("pairs", "held-out"):
        (tmp_path / f"{name}.jsonl").write_bytes(ROW.replace(b"a", name.encode()))
    body = {"model": "tiny", "method": {"type": "dpo"}, "training_file": str(tmp_path / "pairs.jsonl")}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(body | {"validation_file": str(tmp_path / "held-out.jsonl")}))
    return path


def files(client: httpx2.Client, **params: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = client.get("/v1/files", params=params).raise_for_status().json()["data"]
    return answer


def refusal(result: Result) -> str:
    """Why the service has refused the request of a command."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, ClientError), result.exception
        return str(result.exception)
    assert result.exit_code == 1
    return result.stdout


JOB = ("--spec", "SPEC")
REFUSED = [
    (("jobs", "create", *JOB, "--gate", "nothing>=1"), "There is no metric 'nothing'"),
    (("jobs", "create", *JOB, "--estimate", "--model", "unknown"), "The model 'unknown' does not exist"),
    (("jobs", "create", *JOB, "--validation-file", "file-unknown"), "No such File object: file-unknown"),
    (("sweeps", "create", *JOB, "--grid", "beta=-1,1"), "greater than 0"),
    (("evaluate", "preference", "--candidate", "unknown", "--data", "DATA"), "The model 'unknown' does not exist"),
    (("compare", "unknown", "tiny", "--prompts", "DATA", "--output", "/nowhere.html"), "'unknown' does not exist"),
]


@pytest.mark.parametrize(("command", "reason"), REFUSED)
def test_a_refused_request_leaves_no_file_behind(
    dpo: Command, spec: Path, client: httpx2.Client, command: tuple[str, ...], reason: str
) -> None:
    paths = {"SPEC": spec, "DATA": spec.parent / "held-out.jsonl"}
    assert reason in refusal(dpo(*(paths.get(word, word) for word in command)))
    assert not files(client)


def test_a_file_with_the_same_content_is_uploaded_once(dpo: Command, spec: Path, client: httpx2.Client) -> None:
    """Whatever command and name brought it here."""
    uploaded = dpo("files", "upload", spec.parent / "pairs.jsonl").stdout.strip()
    first, second = (json.loads(dpo("jobs", "create", "--spec", spec, "--json").stdout) for _ in range(2))
    assert first["training_file"] == second["training_file"] == uploaded
    assert first["validation_file"] == second["validation_file"]
    assert first["id"] != second["id"] and len(files(client)) == 2


def test_a_file_of_another_kind_is_not_used_again(dpo: Command, spec: Path, client: httpx2.Client) -> None:
    """One that expires, that is read with a mapping or has another purpose."""
    path = spec.parent / "pairs.jsonl"
    dpo("files", "upload", path, "--expires-in", 3600)
    dpo("files", "upload", path, "--mapping", '{"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}')
    client.post("/v1/files", files={"file": ("p.jsonl", path.read_bytes())}, data={"purpose": "evals"})
    before = {file["id"] for file in files(client)}
    job = json.loads(dpo("jobs", "create", "--spec", spec, "--json").stdout)
    assert len(before) == 3 and job["training_file"] not in before


def test_files_that_were_there_before_stay_when_a_request_is_refused(
    dpo: Command, spec: Path, client: httpx2.Client
) -> None:
    uploaded = dpo("files", "upload", spec.parent / "pairs.jsonl").stdout.strip()
    assert "'unknown'" in refusal(dpo("jobs", "create", "--spec", spec, "--model", "unknown"))
    assert [file["id"] for file in files(client)] == [uploaded]


@pytest.mark.parametrize("command", [("jobs", "create"), ("sweeps", "create", "--grid", "beta=0.1,0.2")], ids=str)
def test_commands_with_one_idempotency_key_start_one_job(
    dpo: Command, spec: Path, services: Services, command: tuple[str, ...]
) -> None:
    first, second = (dpo(*command, "--spec", spec, "--idempotency-key", "run-7", "--json") for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert json.loads(first.stdout)["id"] == json.loads(second.stdout)["id"]
    other = dpo(*command, "--spec", spec, "--idempotency-key", "run-8", "--json")
    assert json.loads(other.stdout)["id"] != json.loads(first.stdout)["id"]
    assert rows(services)[0] == 2


def test_two_commands_with_one_idempotency_key_at_the_same_time_upload_a_file_once(
    dpo: Command, spec: Path, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look for the file before either has uploaded it."""
    both_looked, find = threading.Barrier(2), Uploads._find

    def find_together(uploads: Uploads, digest: str, purpose: str) -> str | None:
        known = find(uploads, digest, purpose)
        both_looked.wait(CEILING)
        return known

    monkeypatch.setattr(Uploads, "_find", find_together)
    with ThreadPoolExecutor(2) as pool:
        commands = [Uploads(Client(), "run-7") for _ in range(2)]
        ids = list(pool.map(lambda uploads: uploads.add(spec.parent / "pairs.jsonl", "fine-tune"), commands))
    assert ids[0] == ids[1] and len(files(client)) == 1
