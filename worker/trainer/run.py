"""A run over a work folder: its folder, its events, its cache, and the request to stop."""

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from worker.model_files import folder_at
from worker.trainer.cache import Cache
from worker.trainer.errors import Stopped
from worker.trainer.events import Events
from worker.trainer.model import Base
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks


def require_placed(folder: Path, about: JsonObject) -> None:
    """Raise `OSError` if `folder` lacks something that its runner has put there. `about`: the content of `run.json`.

    A missing adapter must not be taken for none, nor a missing checkpoint for a new run.
    """
    missing = [name for name in about.get("placed", []) if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"the work folder has lost {', '.join(missing)}")


@dataclass(frozen=True)
class Run:
    """A run reads its work folder, writes events, and leaves its results in the folder.

    `stopping` is set when the run is asked to stop. `cache` holds results of other runs. Without a runner, it holds
    those in the run's own folder only. `ranks` are the processes that do the work together, each in its own `Run`.
    """

    folder: Path
    events: Events
    stopping: threading.Event
    cache: Cache
    ranks: Ranks

    @classmethod
    def of(
        cls,
        folder: Path,
        events: Events,
        stopping: threading.Event,
        cache: Cache | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """The run over `folder`. Its default cache is the folder `cache` in it. By default one rank does it alone."""
        return cls(folder, events, stopping, cache or Cache(folder / "cache", events), ranks or Ranks())

    @cached_property
    def about(self) -> JsonObject:
        """The content of `run.json`: what the runner knows about the job beside its spec, such as its base model."""
        about: JsonObject = json.loads((self.folder / "run.json").read_text())
        return about

    def must_stop(self) -> bool:
        """Whether a rank was asked to stop. All ranks must ask at the same places, between two pieces of work."""
        return self.ranks.any(self.stopping.is_set())

    def check_stop(self) -> None:
        """Raise `Stopped` if the run must stop."""
        if self.must_stop():
            raise Stopped

    def check_own_stop(self) -> None:
        """Raise `Stopped` if this rank was asked to stop. The others may not know yet."""
        progress.mark()
        if self.stopping.is_set():
            raise Stopped


class TrainingRun(Run):
    """Its folder holds `spec.json`, `run.json`, `base` and the data, and maybe `start/`, `reference/`, `resume/`.

    `base` is the folder of the base model, or a file with its path.
    """

    @cached_property
    def spec(self) -> JobSpec:
        """The job spec with its defaults filled in. Its files are paths relative to the folder."""
        return JobSpec.stored(json.loads((self.folder / "spec.json").read_text())).resolved()

    @property
    def base(self) -> Base:
        """The base model to train."""
        about = self.about
        return Base(about["base_model"], about["revision"], about["version"], folder_at(self.folder / "base"))

    @property
    def start(self) -> Path | None:
        """The adapter or model that the training starts from; None for the base model alone."""
        return self._existing("start")

    @property
    def resume(self) -> Path | None:
        """The checkpoint to resume from; None to train from the beginning."""
        return self._existing("resume")

    @property
    def best_weights(self) -> Path:
        """The file in which early stopping keeps the weights of the best validation."""
        return self.folder / "best" / "weights.safetensors"

    def _existing(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() else None
