"""Weights & Biases. Its own thread sends the job's metrics, so it can neither delay nor stop a training."""

import os
import queue
import threading
import time
from pathlib import Path

import structlog

from app.spec.job import Integration, JobSpec

log = structlog.get_logger(__name__)

Entries = queue.Queue[tuple[int, dict[str, float]] | None]
"""(step, metrics), and None at the end."""


def configured() -> list[str]:
    """The integrations that this worker can use: with a key, or offline into a folder for `wandb sync`."""
    offline = os.environ.get("WANDB_MODE") == "offline" and os.environ.get("WANDB_DIR")
    return ["wandb"] if os.environ.get("WANDB_API_KEY") or offline else []


class Reporter:
    """Sends the metrics of one attempt to every integration of its job."""

    def __init__(self, job_id: str, spec: JobSpec, folder: Path) -> None:
        self.job_id, self.spec, self.folder = job_id, spec, folder
        self._queues: list[Entries] = []
        self._threads = []
        for number, integration in enumerate(spec.integrations or []):
            entries: Entries = queue.Queue()
            thread = threading.Thread(target=self._send, args=(integration, number, entries), daemon=True)
            thread.start()
            self._queues.append(entries)
            self._threads.append(thread)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Queue the metrics of a step. Returns at once."""
        for entries in self._queues:
            entries.put((step, metrics))

    def close(self, seconds: float) -> None:
        """Send the remaining metrics, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        for entries in self._queues:
            entries.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _send(self, integration: Integration, number: int, entries: Entries) -> None:
        try:
            import wandb

            settings = integration.wandb
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or self.job_id,
                tags=["dpo-service", self.job_id, *settings.tags],
                id=self.job_id if number == 0 else f"{self.job_id}-{number}",
                resume="allow",  # a later attempt goes on with the same run
                dir=os.environ.get("WANDB_DIR") or self.folder,
                config=self.spec.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )
            while (entry := entries.get()) is not None:
                step, metrics = entry
                run.log(metrics, step=step)
            run.finish()
        except Exception as error:  # the training goes on without it
            log.warning("Weights & Biases is out of reach", job=self.job_id, reason=str(error))
