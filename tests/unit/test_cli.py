"""The command line's own refusals: one sentence, exit status 2, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.servers import free_port


def dpo(*arguments: str, home: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    given = os.environ | {"DPO_HOME": str(home), "DPO_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"} | environment
    command = [sys.executable, "-m", "app.cli.main", *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
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
def test_refusals(
    arguments: list[str],
    environment: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "sft.json").write_text('{"method": {"type": "supervised"}}')
    done = dpo(*arguments, home=tmp_path / "home", **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_key_is_printed_once_and_not_kept(tmp_path: Path) -> None:
    done = dpo("keys", "create", "--name", "ci", home=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("dpo_")
    key = done.stdout.strip().encode()
    assert all(key not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
