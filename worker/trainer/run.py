"""A run over a work folder, and what all of its parts need."""

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from app.spec.job import JobSpec
from worker.trainer.cache import Cache
from worker.trainer.errors import Stopped
from worker.trainer.events import Events
from worker.trainer.model import Base


@dataclass(frozen=True)
class Run:
    """The folder holds `spec.json`, `run.json`, `base/`, the data; maybe `start/`, `reference/`, `resume/`.

    `cache` finds what other runs computed; a run by itself finds what is in its folder.
    """

    folder: Path
    events: Events
    stopping: threading.Event
    cache: Cache

    @classmethod
    def of(cls, folder: Path, events: Events, stopping: threading.Event, cache: Cache | None = None) -> "Run":
        """The run over `folder`. It ends soon after `stopping` is set."""
        return cls(folder, events, stopping, cache or Cache(folder / "cache", events))

    @cached_property
    def spec(self) -> JobSpec:
        """The job with every default filled in, its files as paths."""
        return JobSpec.model_validate_json((self.folder / "spec.json").read_text()).resolved()

    @cached_property
    def about(self) -> dict[str, Any]:
        """The facts that the artifact tells of the job: its base model, and its spec as the user wrote it."""
        about: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return about

    @property
    def base(self) -> Base:
        about = self.about
        return Base(about["base_model"], about["revision"], about["version"], self.folder / "base")

    @property
    def start(self) -> Path | None:
        """The adapter that the training starts from."""
        return self._existing("start")

    @property
    def resume(self) -> Path | None:
        """The checkpoint that the training goes on from."""
        return self._existing("resume")

    @property
    def best_weights(self) -> Path:
        """Where early stopping keeps the weights of the best validation."""
        return self.folder / "best" / "weights.safetensors"

    def tick(self) -> None:
        """Between two pieces of work: raises `Stopped` where the run was asked to stop."""
        if self.stopping.is_set():
            raise Stopped

    def _existing(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None
