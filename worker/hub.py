"""Download base models from the hub: `python -m worker.hub MODEL` fills the cache and prints the model's folder.

The download is a process of its own, so that a cancel or a drain can end it at any point. The cache keeps the part
that has come, and the next download goes on from there.
"""

import json
import os
import sys
import tempfile
import threading
from pathlib import Path

from app.programs import command
from worker.waiting import Check, run_process

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""Patterns of the files that are downloaded."""
IGNORED = ["consolidated*", "original/*"]
"""Second copies of all weights, which some repositories hold."""


class ModelUnavailable(Exception):
    """This worker cannot serve a base model. The message says why."""


def download(name: str, home: Path, check: Check) -> Path:
    """The folder of the model `name` of the hub, in the hub's cache. `HF_HOME` moves the cache away from `home`.

    Raises `ModelUnavailable` if the hub has no such model or does not give it to this token, `OSError` if the hub or
    the disk fails, and what `check` raises.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DPO_", "AWS_"))}
    environment = {"HF_HOME": str(home / "hub")} | environment
    with tempfile.TemporaryFile() as log:
        status, printed = run_process(command("worker.hub", name), check, env=environment, stderr=log)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if status != 0:
        raise OSError(f"The model '{name}' cannot be downloaded now: {said[-1] if said else f'status {status}'}")
    answer = json.loads(printed)
    if "unavailable" in answer:
        raise ModelUnavailable(f"The model '{name}' cannot be downloaded: {answer['unavailable']}")
    return Path(answer["folder"])


def main() -> None:
    """Download the model of the command line. End at once if the worker ends: it holds standard input open."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        answer = {"folder": snapshot_download(sys.argv[1], allow_patterns=FILES, ignore_patterns=IGNORED)}
    except RepositoryNotFoundError as error:  # missing or gated; other errors may pass, and the queue retries
        answer = {"unavailable": " ".join(str(error).split())}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
