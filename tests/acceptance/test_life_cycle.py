"""Running jobs when they are cancelled, when a process dies, and when the service stops."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2

from app.migrate import migrate
from app.services import Services
from app.settings import Settings
from tests.helpers.preferences import pairs, write
from tests.helpers.servers import wait_until
from tests.helpers.service import Running, half_upload, running, server_stack, trainer_pids, worker_pids


def start_long_job(service: Running, folder: Path, **extensions: object) -> str:
    """A job in its training loop, with hundreds of steps to go and a checkpoint every five."""
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
    service.wait_for(job.id, lambda state: bool(state["progress"]) and state["progress"]["step"] >= 7)
    return job.id


def test_cancel_stops_the_trainer_and_keeps_the_checkpoints(service: Running, tmp_path: Path) -> None:
    job_id = start_long_job(service, tmp_path)
    assert len(trainer_pids(service.home)) == 1
    assert service.openai().fine_tuning.jobs.cancel(job_id).status == "cancelled"
    service.until(lambda: not trainer_pids(service.home), "the trainer's end")
    assert service.openai().fine_tuning.jobs.checkpoints.list(job_id).data
    assert service.job(job_id)["status"] == "cancelled"
    service.until(lambda: not list((service.home / "work").iterdir()), "an empty work folder")


def test_a_resume_skips_a_damaged_checkpoint(service: Running, tmp_path: Path) -> None:
    """The last two checkpoints can be resumed from. An older one holds only a model."""
    job_id = start_long_job(service, tmp_path, keep_checkpoints=3)
    checkpoints = service.openai().fine_tuning.jobs.checkpoints
    service.until(lambda: "Checkpoint created at step 25" in str(messages(service, job_id)), "the fifth checkpoint")
    with service.http() as client:
        client.post(f"/fine_tuning/jobs/{job_id}/pause").raise_for_status()
        service.wait_for(job_id, lambda state: state["status"] == "queued")
        job_folder = service.home / "objects" / "jobs" / job_id
        steps = [checkpoint.step_number for checkpoint in checkpoints.list(job_id)]
        assert len(steps) == 3
        resumable_steps = sorted(int(path.parent.name.rpartition("-")[2]) for path in job_folder.glob("*/*/*/state"))
        assert resumable_steps == sorted(steps)[-2:]
        (optimizer_state,) = job_folder.glob(f"*/*/*{steps[0]}/state/optimizer.safetensors")
        content = bytearray(optimizer_state.read_bytes())
        content[-1] ^= 1
        optimizer_state.write_bytes(content)
        client.post(f"/fine_tuning/jobs/{job_id}/resume").raise_for_status()
    damaged = f"The checkpoint at step {steps[0]} is skipped: state/optimizer.safetensors is damaged."
    service.until(
        lambda: f"Resumed stage dpo after step {steps[1]}" in str(messages(service, job_id)), "the resumed training"
    )
    assert damaged in str(messages(service, job_id))
    service.openai().fine_tuning.jobs.cancel(job_id)
    service.until(lambda: not list(job_folder.glob("*/*/*/state")), "the removal of the optimizer states")
    assert checkpoints.list(job_id).data


def test_the_log_of_a_training_names_the_request_that_created_its_job(service: Running, tmp_path: Path) -> None:
    file = service.openai().files.create(file=write(tmp_path / "train.jsonl", pairs(8, seed=1)), purpose="fine-tune")
    with service.http() as client:
        body = {"model": "tiny", "training_file": file.id, "hyperparameters": {"max_steps": 1}}
        created = client.post("/fine_tuning/jobs", json=body).raise_for_status()
        job_id, request_id = created.json()["id"], created.headers["x-request-id"]
        service.wait_for(job_id, lambda state: state["status"] == "succeeded")
        first_line = json.loads(client.get(f"/fine_tuning/jobs/{job_id}/logs").text.splitlines()[0])
    assert (first_line["job"], first_line["attempt"], first_line["request"]) == (job_id, 2, request_id)
    lines = [json.loads(line) for line in (service.home / "serve.log").read_text().splitlines() if job_id in line]
    accepted = next(line for line in lines if line["event"] == "job accepted")
    started = next(line for line in lines if line["event"] == "trainer started")
    assert accepted["request"] == started["request"] == request_id


def test_no_secret_is_written_down(service: Running, tmp_path: Path) -> None:
    """No secret is in the log, the database, messages, objects or work folders. Only the two key files hold secrets."""
    with service.http() as client:
        key = client.post("/keys", json={"name": "secret"}).raise_for_status().json()["key"]
        webhook_body = {"url": "http://localhost:9/hook"}
        webhook = client.post("/webhooks", json=webhook_body).raise_for_status().json()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=service.url, headers=headers, timeout=60) as key_client:
            content = write(tmp_path / "train.jsonl", pairs(8, seed=2)).read_bytes()
            uploaded = key_client.post("/files", files={"file": ("p", content)}, data={"purpose": "fine-tune"})
            body = {"model": "tiny", "training_file": uploaded.json()["id"], "hyperparameters": {"max_steps": 1}}
            job_id = key_client.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
            token = key_client.post(f"/fine_tuning/jobs/{job_id}/stream_token").raise_for_status().json()["token"]
            key_client.get(f"/fine_tuning/jobs/{job_id}/stream?token={token}")
            key_client.get("/files", headers={"Authorization": "Bearer " + "sk-wrong-" + key[-8:] * 3})
            service.wait_for(job_id, lambda state: state["status"] == "succeeded")
        secrets = {"admin": service.key, "key": key, "webhook": webhook["secret"], "token": token}
        secrets |= {"hash key": (service.home / "secret.key").read_text().strip(), "wrong": "sk-wrong-" + key[-8:]}
        client.delete(f"/webhooks/{webhook['id']}").raise_for_status()
    for path in service.home.rglob("*"):
        if path.is_file() and path.name not in ("admin.key", "secret.key"):
            content = path.read_bytes()
            assert [name for name, secret in secrets.items() if secret.encode() in content] == [], path


def messages(service: Running, job_id: str) -> list[str]:
    """The messages of the job's newest 100 events, newest first."""
    with service.http() as client:
        events = client.get(f"/fine_tuning/jobs/{job_id}/events?limit=100").raise_for_status().json()["data"]
    return [event["message"] for event in events]


def test_a_killed_trainer_costs_only_one_attempt(service: Running, tmp_path: Path) -> None:
    job_id = start_long_job(service, tmp_path)
    attempt = service.job(job_id)["attempt"]
    os.kill(trainer_pids(service.home)[0], signal.SIGKILL)
    check_that_the_job_resumes(service, job_id, attempt)
    service.openai().fine_tuning.jobs.cancel(job_id)


def test_a_killed_worker_costs_one_attempt_and_a_killed_service_leaves_no_process(home: Path, tmp_path: Path) -> None:
    """After kill -9 of a worker its trainer ends, and the job resumes from its checkpoint.

    After kill -9 of `dpo serve` no process keeps the port or the GPU.
    """
    with running(home) as service:
        job_id = start_long_job(service, tmp_path)
        attempt = service.job(job_id)["attempt"]
        (gpu_worker,) = worker_pids(service, "gpu")
        os.kill(gpu_worker, signal.SIGKILL)
        wait_until(lambda: not trainer_pids(home), "the orphan's end")
        wait_until(lambda: service.process.poll() is not None, "the service's end")
    # `dpo serve` ended because one of its processes died. A supervisor would start it again.
    with running(home) as service:
        check_that_the_job_resumes(service, job_id, attempt)
        pids = [*worker_pids(service, "gpu"), *worker_pids(service, "cpu"), *trainer_pids(home)]
        assert len(pids) == 3
        service.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of all processes")


WORKER_WITH_BROKEN_TRANSPORT = """
from app.broker import FolderChannel, Lane
from worker.celery_app import run

def broken(self, queue):
    raise RuntimeError("an error that nobody foresaw")

FolderChannel._get = broken
run(Lane.CPU)
"""


def test_a_worker_does_not_outlive_its_celery(home: Path) -> None:
    """Celery ends at an error of its transport. A worker without Celery would not react to SIGTERM."""
    environment = os.environ | {"DPO_HOME": str(home)}
    migrate(Services.of(Settings(home=home)).database)
    command = [sys.executable, "-c", WORKER_WITH_BROKEN_TRANSPORT]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert worker.returncode == 1 and "an error that nobody foresaw" in worker.stderr


def check_that_the_job_resumes(service: Running, job_id: str, attempt: int) -> None:
    """The attempt after `attempt` resumes from a checkpoint and makes a step."""
    list_events = service.openai().fine_tuning.jobs.list_events

    def resumed() -> bool:
        newest_first = list_events(job_id, limit=100).data
        texts = [event.message for event in newest_first]
        resumes = [i for i, text in enumerate(texts) if text.startswith("Resumed stage dpo after step")]
        return bool(resumes) and any(event.type == "metrics" for event in newest_first[: resumes[0]])

    service.until(resumed, "the resumed training")
    assert service.job(job_id)["attempt"] == attempt + 1


def test_a_stopped_service_returns_its_job_to_the_queue(home: Path, tmp_path: Path) -> None:
    """SIGTERM saves a checkpoint and queues the job again. No attempt counts as lost, and the next service resumes."""
    with server_stack() as environment:
        with running(home, environment) as service:
            job_id = start_long_job(service, tmp_path)
            attempt = service.job(job_id)["attempt"]
        assert not trainer_pids(home)
        with running(home, environment) as service:
            check_that_the_job_resumes(service, job_id, attempt)
            assert "The worker stops; the job will resume." in messages(service, job_id)
            service.openai().fine_tuning.jobs.cancel(job_id)


def test_an_upload_whose_connection_is_cut_leaves_nothing(service: Running) -> None:
    """The client sends half of the promised bytes over a real socket, and closes it."""
    service = service.in_project("cut")
    url = httpx2.URL(service.url)
    objects = service.home / "objects" / "files"
    objects_before, files_before = set(objects.glob("*")), service.openai().files.list().data
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(half_upload(service.key, 20_000_000))
        service.until(lambda: set(objects.glob("*")) > objects_before, "the upload's first bytes in the object store")
    service.until(lambda: set(objects.glob("*")) == objects_before, "the removal of these bytes")
    assert service.openai().files.list().data == files_before
