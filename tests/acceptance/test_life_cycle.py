"""What happens to a running job when it is cancelled, when its worker dies, and when the service stops."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from app.migrate import migrate
from app.services import Services
from app.settings import Settings
from tests.helpers.preferences import pairs, write
from tests.helpers.servers import wait_until
from tests.helpers.service import Running, half_upload, lanes, running, stack, trainers


def start_long_job(service: Running, folder: Path, **extensions: Any) -> str:
    """A job that is in its training loop, with hundreds of steps to go and a checkpoint every few."""
    client = service.openai()
    file = client.files.create(file=write(folder / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=3,
        method={"type": "dpo"},
        extra_body={
            "method": {
                "type": "dpo",
                "dpo": {"hyperparameters": {"batch_size": 8, "max_steps": 400, "checkpoint_every": 5}},
            },
            **extensions,
        },
    )
    service.wait_for(job.id, lambda seen: bool(seen["progress"]) and seen["progress"]["step"] >= 7)
    return job.id


def test_cancel_stops_the_trainer_and_keeps_the_checkpoints(service: Running, tmp_path: Path) -> None:
    job_id = start_long_job(service, tmp_path)
    assert len(trainers(service.home)) == 1
    assert service.openai().fine_tuning.jobs.cancel(job_id).status == "cancelled"
    service.until(lambda: not trainers(service.home), "the trainer's end")
    assert service.openai().fine_tuning.jobs.checkpoints.list(job_id).data
    assert service.job(job_id)["status"] == "cancelled"
    service.until(lambda: not list((service.home / "work").iterdir()), "an empty work folder")


def test_a_damaged_checkpoint_is_gone_back_behind(service: Running, tmp_path: Path) -> None:
    """Two can be resumed from; older ones hold only a model, and there are no more of them than the job wants."""
    job_id = start_long_job(service, tmp_path, keep_checkpoints=3)
    checkpoints = service.openai().fine_tuning.jobs.checkpoints
    service.until(lambda: "Checkpoint created at step 25" in str(told(service, job_id)), "the fifth checkpoint")
    with service.http() as client:
        client.post(f"/fine_tuning/jobs/{job_id}/pause").raise_for_status()
        service.wait_for(job_id, lambda seen: seen["status"] == "queued")
        saved = service.home / "objects" / "jobs" / job_id
        kept = [found.step_number for found in checkpoints.list(job_id)]
        assert len(kept) == 3
        states = sorted(int(path.parent.name.rpartition("-")[2]) for path in saved.glob("*/*/*/state"))
        assert states == sorted(kept)[-2:]
        (latest,) = saved.glob(f"*/*/*{kept[0]}/state/optimizer.safetensors")
        content = bytearray(latest.read_bytes())
        content[-1] ^= 1
        latest.write_bytes(content)
        client.post(f"/fine_tuning/jobs/{job_id}/resume").raise_for_status()
    damaged = f"The checkpoint at step {kept[0]} is skipped: state/optimizer.safetensors is damaged."
    service.until(
        lambda: f"Resumed stage dpo after step {kept[1]}" in str(told(service, job_id)), "the resumed training"
    )
    assert damaged in str(told(service, job_id))
    service.openai().fine_tuning.jobs.cancel(job_id)
    service.until(lambda: not list(saved.glob("*/*/*/state")), "the end of what only a resume would have read")
    assert checkpoints.list(job_id).data


def test_the_log_of_a_training_names_the_request_that_made_its_job(service: Running, tmp_path: Path) -> None:
    file = service.openai().files.create(file=write(tmp_path / "train.jsonl", pairs(8, seed=1)), purpose="fine-tune")
    with service.http() as client:
        body = {"model": "tiny", "training_file": file.id, "hyperparameters": {"max_steps": 1}}
        made = client.post("/fine_tuning/jobs", json=body).raise_for_status()
        job_id, request = made.json()["id"], made.headers["x-request-id"]
        service.wait_for(job_id, lambda seen: seen["status"] == "succeeded")
        began = json.loads(client.get(f"/fine_tuning/jobs/{job_id}/logs").text.splitlines()[0])
    assert (began["job"], began["attempt"], began["request"]) == (job_id, 2, request)
    lines = [json.loads(line) for line in (service.home / "serve.log").read_text().splitlines() if job_id in line]
    accepted, started = (next(x for x in lines if x["event"] == e) for e in ("job accepted", "trainer started"))
    assert accepted["request"] == started["request"] == request


def test_no_secret_is_written_down(service: Running, tmp_path: Path) -> None:
    """Not in the log, the database, messages, objects or work folders; the two key files are where secrets are."""
    with service.http() as client:
        key = client.post("/keys", json={"name": "secret"}).raise_for_status().json()["key"]
        hook = {"url": "http://localhost:9/hook"}
        webhook = client.post("/webhooks", json=hook).raise_for_status().json()
        with httpx2.Client(base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as other:
            file = write(tmp_path / "train.jsonl", pairs(8, seed=2)).read_bytes()
            uploaded = other.post("/files", files={"file": ("p", file)}, data={"purpose": "fine-tune"})
            body = {"model": "tiny", "training_file": uploaded.json()["id"], "hyperparameters": {"max_steps": 1}}
            job_id = other.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
            token = other.post(f"/fine_tuning/jobs/{job_id}/stream_token").raise_for_status().json()["token"]
            other.get(f"/fine_tuning/jobs/{job_id}/stream?token={token}")
            other.get("/files", headers={"Authorization": "Bearer " + "sk-wrong-" + key[-8:] * 3})
            service.wait_for(job_id, lambda seen: seen["status"] == "succeeded")
        secrets = {"admin": service.key, "key": key, "webhook": webhook["secret"], "token": token}
        secrets |= {"hash key": (service.home / "secret.key").read_text().strip(), "wrong": "sk-wrong-" + key[-8:]}
        client.delete(f"/webhooks/{webhook['id']}").raise_for_status()
    for path in service.home.rglob("*"):
        if path.is_file() and path.name not in ("admin.key", "secret.key"):
            content = path.read_bytes()
            assert [name for name, secret in secrets.items() if secret.encode() in content] == [], path


def told(service: Running, job_id: str) -> list[str]:
    return [event.message for event in service.openai().fine_tuning.jobs.list_events(job_id, limit=100).data]


def test_a_killed_trainer_costs_an_attempt_and_no_more(service: Running, tmp_path: Path) -> None:
    job_id = start_long_job(service, tmp_path)
    attempt = service.job(job_id)["attempt"]
    os.kill(trainers(service.home)[0], signal.SIGKILL)
    resumes(service, job_id, attempt)
    service.openai().fine_tuning.jobs.cancel(job_id)


def test_a_killed_worker_costs_an_attempt_and_no_more(home: Path, tmp_path: Path) -> None:
    """kill -9: the trainer does not outlive its runner, and the job resumes from its checkpoint."""
    with running(home) as service:
        job_id = start_long_job(service, tmp_path)
        attempt = service.job(job_id)["attempt"]
        (gpu,) = lanes(service, "gpu")
        os.kill(gpu, signal.SIGKILL)
        wait_until(lambda: not trainers(home), "the orphan's end")
        wait_until(lambda: service.process.poll() is not None, "the service's end")
    with running(home) as service:  # `dpo serve` ends where a part of it died; whoever runs it starts it again
        resumes(service, job_id, attempt)
        service.openai().fine_tuning.jobs.cancel(job_id)


BROKEN = """
from app.broker import FolderChannel, Lane
from worker.celery_app import run

def broken(self, queue):
    raise RuntimeError("an error that nobody foresaw")

FolderChannel._get = broken
run(Lane.CPU)
"""


def test_a_worker_does_not_outlive_its_celery(home: Path) -> None:
    """Celery ends at an error of its transport: a lane that went on without it would be deaf to SIGTERM."""
    environment = os.environ | {"DPO_HOME": str(home)}
    migrate(Services.of(Settings(home=home)).database)
    done = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "an error that nobody foresaw" in done.stderr


def resumes(service: Running, job_id: str, attempt: int) -> None:
    """The next attempt goes on from a checkpoint, and makes steps of its own."""
    listed = service.openai().fine_tuning.jobs.list_events

    def resumed() -> bool:
        newest = listed(job_id, limit=100).data
        at = [n for n, event in enumerate(newest) if event.message.startswith("Resumed stage dpo after step")]
        return bool(at) and any(event.type == "metrics" for event in newest[: at[0]])

    service.until(resumed, "the resumed training")
    assert service.job(job_id)["attempt"] == attempt + 1


def test_a_stopped_service_hands_its_job_back(home: Path, tmp_path: Path) -> None:
    """SIGTERM: checkpoint, back to the queue, no attempt counted as lost; the next service resumes."""
    with stack("servers") as environment:
        with running(home, environment) as service:
            job_id = start_long_job(service, tmp_path)
            attempt = service.job(job_id)["attempt"]
        assert not trainers(home)
        with running(home, environment) as service:
            resumes(service, job_id, attempt)
            messages = [e.message for e in service.openai().fine_tuning.jobs.list_events(job_id, limit=100).data]
            assert "The worker stops; the job will resume." in messages
            service.openai().fine_tuning.jobs.cancel(job_id)


def test_the_parts_end_when_their_supervisor_is_killed(home: Path, tmp_path: Path) -> None:
    """kill -9 of `dpo serve` itself: nothing stays behind that keeps the port or the GPU."""
    with running(home) as service:
        start_long_job(service, tmp_path)
        parts = [*lanes(service, "gpu"), *lanes(service, "cpu"), *trainers(home)]
        assert len(parts) == 3
        service.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in parts), "the end of all parts")


def test_an_upload_whose_connection_is_cut_leaves_nothing(service: Running) -> None:
    """Over a real socket: half of the promised bytes, then nothing more."""
    url = httpx2.URL(service.url)
    objects = service.home / "objects" / "files"
    before, listed = set(objects.glob("*")), service.openai().files.list().data
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(half_upload(service.key, 20_000_000))
        service.until(lambda: set(objects.glob("*")) > before, "the upload's first bytes in the object store")
    service.until(lambda: set(objects.glob("*")) == before, "the end of what came")
    assert service.openai().files.list().data == listed
