"""Runs over a work folder: the folder, the events, and the wish to stop."""

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from app.spec.job import JobSpec
from worker.trainer.cache import Cache
from worker.trainer.errors import Stopped
from worker.trainer.events import Events
from worker.trainer.model import Base


@dataclass(frozen=True)
class Run:
    """A run reads its work folder, tells events, and leaves its results in the folder.

    `cache` finds what other runs computed. A run without a runner finds what is in its own folder.
    """

    folder: Path
    events: Events
    stopping: threading.Event
    cache: Cache

    @classmethod
    def of(cls, folder: Path, events: Events, stopping: threading.Event, cache: Cache | None = None) -> Self:
        """The run over `folder`. It ends soon after `stopping` is set."""
        return cls(folder, events, stopping, cache or Cache(folder / "cache", events))

    @cached_property
    def about(self) -> dict[str, Any]:
        """`run.json`: what the runner knows of the job beside its spec, its base models for example."""
        about: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return about

    def tick(self) -> None:
        """Between two pieces of work: raises `Stopped` where the run was asked to stop."""
        if self.stopping.is_set():
            raise Stopped


class TrainingRun(Run):
    """The folder holds `spec.json`, `run.json`, `base/`, the data; maybe `start/`, `reference/`, `resume/`."""

    @cached_property
    def spec(self) -> JobSpec:
        """The job with every default filled in, its files as paths."""
        return JobSpec.model_validate_json((self.folder / "spec.json").read_text()).resolved()

    @property
    def base(self) -> Base:
        """The base model that is trained."""
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

    def _existing(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None
