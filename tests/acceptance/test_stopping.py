"""Cancel, pause and drain do not wait for a download. The downloads of these tests never end by themselves."""

import signal
from pathlib import Path

import pytest

from tests.helpers.hub import Hub, hub
from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running, create_job, job_body, running, upload
from tests.helpers.tiny_model import make_tiny_model


def downloads(home: Path) -> list[int]:
    """Pids of the processes that download a model for the service under `home`."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_download = b"\0worker.hub\0" in (entry / "cmdline").read_bytes()
                if is_download and f"HF_HOME={home}/".encode() in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return pids


def environment_with(model_hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": model_hub.url, "HF_HUB_OFFLINE": "0", "DPO_HUB_MODELS": "org/*"}


def start(service: Running, model_hub: Hub, folder: Path) -> str:
    """A job whose base model is being downloaded."""
    model_hub.served.clear()
    file = upload(service, write(folder / "pairs.jsonl", pairs(24, seed=1)), "fine-tune")
    with service.http() as client:
        job_id = create_job(client, **job_body(file, hyperparameters={"max_steps": 5}) | {"model": "org/model"})
    service.until(lambda: "model.safetensors" in model_hub.served, "the download")
    return job_id


def last_event(service: Running, job_id: str) -> str:
    message: str = service.openai().fine_tuning.jobs.list_events(job_id, limit=1).data[0].message
    return message


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "hub" / "model")
    make_tiny_model(tmp_path / "home" / "models" / "tiny")
    return tmp_path / "home"


def test_a_download_of_a_base_model_ends_at_once_and_goes_on_later(home: Path, tmp_path: Path) -> None:
    """By a pause, a cancel, and the end of the service. No attempt counts as lost, and no process is left."""
    with hub(tmp_path / "hub" / "model") as model_hub:
        model_hub.flows.clear()
        with running(home, environment_with(model_hub)) as service:
            job_id = start(service, model_hub, tmp_path)
            with service.http() as client:
                client.post(f"/fine_tuning/jobs/{job_id}/pause").raise_for_status()
                service.wait_for(job_id, lambda job: job["status"] == "queued" and job["paused"])
                service.until(lambda: not downloads(home), "the end of the download")
                assert last_event(service, job_id) == "The job is paused. Its GPU is free."
                cancelled = start(service, model_hub, tmp_path)
                client.post(f"/fine_tuning/jobs/{cancelled}/cancel").raise_for_status()
                service.until(lambda: not downloads(home), "the end of the download")
                model_hub.served.clear()
                client.post(f"/fine_tuning/jobs/{job_id}/resume").raise_for_status()
            service.until(lambda: "model.safetensors" in model_hub.served, "the next download")
            service.process.send_signal(signal.SIGTERM)
            service.process.wait()
        assert not downloads(home)
        model_hub.flows.set()
        with running(home, environment_with(model_hub)) as service:
            service.wait_for(job_id, lambda job: job["status"] == "succeeded")
            texts = [event.message for event in service.openai().fine_tuning.jobs.list_events(job_id, limit=100).data]
            assert "The worker stops; the job will resume." in texts
            assert not any("was lost" in text for text in texts)
            assert list((home / "hub" / "hub").glob("models--org--model")), "the cache is under DPO_HOME"
