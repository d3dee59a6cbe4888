"""Jobs on a number of devices, and the weights that they make."""

from pathlib import Path
from typing import Any

from tests.helpers.service import Running, create_job, job_body


def job_on(service: Running, file_id: str, gpus: Any, steps: int, nodes: int = 1, **fields: Any) -> str:
    hyperparameters = {"batch_size": 60, "max_steps": steps, "checkpoint_every": 2, "eval_every": 1000}
    method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    with service.http() as client:
        settings = {"sft": None, "method": method, "resources": {"gpus": gpus, "nodes": nodes}, **fields}
        return create_job(client, **job_body(file_id) | settings)


def weights(service: Running, job_id: str, folder: Path) -> bytes:
    name = service.job(job_id)["fine_tuned_model"]
    downloaded = service.dpo("models", "download", name, "--output", str(folder))
    assert downloaded.returncode == 0, downloaded.stderr
    return (folder / "adapter_model.safetensors").read_bytes()


def succeeded(job: dict[str, Any]) -> bool:
    return bool(job["status"] == "succeeded")
