"""Full disks."""

import hashlib
import io
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.scene import Scene, Strike
from tests.faults.workload import LONG


def fill_the_disk(scene: Scene) -> Strike | None:
    """The worker's disk is full until an attempt has failed."""
    with _full(scene.cluster.home / scene.runner.name / "work"):
        line = scene.line("attempt set back", "attempt lost", "the attempt failed", seconds=20)
    return scene.after_next_attempt(line, recovery=False)


def fill_the_services_disk(scene: Scene) -> Strike | None:
    """The only disk of an embedded service is full for a while: SQLite, objects, messages and work folders.

    An upload meanwhile is stored whole or refused. The accepted job still succeeds.
    """
    with scene.cluster.embedded() as service, service.http() as http:
        content = scene.cluster.services.storage.read(f"files/{scene.workload.file}")
        file = http.post("/files", files={"file": ("p.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
        job = http.post("/fine_tuning/jobs", json=LONG | {"training_file": file}).raise_for_status().json()["id"]
        service.wait_for(job, lambda state: bool(state["progress"]) and state["progress"]["step"] > 0)
        log = service.home / "serve.log"
        log_offset = log.stat().st_size
        time.sleep(scene.random.uniform(0.0, 2.0))
        with _full(service.home):
            answer = http.post("/files", files={"file": ("p.jsonl", content * 9)}, data={"purpose": "fine-tune"})
            time.sleep(scene.random.uniform(1.0, 6.0))
        if answer.status_code == 200:  # the service had just freed some room
            is_whole = http.get(f"/files/{answer.json()['id']}/content").content == content * 9
            scene.workload.problems += [] if is_whole else ["an upload beside a full disk was cut short"]
        elif answer.status_code != 503:
            scene.workload.problems.append(f"an upload to a full disk was answered {answer.status_code}")
        ended = service.wait_for(job, lambda state: state["status"] == "succeeded")
        download = http.get(f"/models/{ended['fine_tuned_model']}/download").raise_for_status().content
        with tarfile.open(fileobj=io.BytesIO(download)) as archive:
            adapter = next(name for name in archive.getnames() if name.endswith("adapter_model.safetensors"))
            weights = archive.extractfile(adapter)
            digest = hashlib.sha256(weights.read() if weights else b"").hexdigest()
        expected = scene.workload.expected["long"]
        if digest != expected.adapter:
            scene.workload.problems.append(f"{job} made other bytes beside a full disk")
        warnings = [
            line for line in log.read_bytes()[log_offset:].decode().splitlines() if job in line and "warning" in line
        ]
    return Strike(f"embedded: {warnings[0][:120]}", same_attempt=True) if warnings else None


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Keep the file system of `folder` full while the block runs."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    try:
        yield
    finally:
        filler.unlink()
