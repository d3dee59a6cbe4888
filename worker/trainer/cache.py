"""The cache of results that one run computes and another can use: tokenised files and reference log-probs.

Keys are content hashes. The trainer knows the keys, and its runner knows the object store. The trainer requests a key
with an event and waits for the answer on its standard input. It leaves a new file in its folder and reports it with
another event. Without a runner that answers, the cache is the folder alone.
"""

import json
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from worker.trainer.events import CacheMade, CacheWanted, Events

Value = TypeVar("Value")


class Cache:
    """Files by key, in the `cache` folder of a run. A key is a path relative to that folder."""

    def __init__(self, folder: Path, events: Events, answers: "queue.Queue[str] | None" = None) -> None:
        self.folder, self._events, self._answers = folder, events, answers
        self.hits: list[str] = []
        """Keys that the cache had."""
        self.made: list[str] = []
        """Keys of the files that this run has made."""

    def get(self, key: str, load: Callable[[Path], Value]) -> Value | None:
        """The file of `key`, read by `load`. None if nobody has the file, or if it is damaged.

        Waits for the runner's answer if the folder does not have the file.
        """
        path = self.folder / key
        if not path.exists() and self._answers is not None:
            self._events.emit(CacheWanted(key))
            while json.loads(self._answers.get())["key"] != key:
                pass
        if not path.exists():
            return None
        try:
            value = load(path)
        except Exception:  # a damaged file may raise anything; its content can be computed again
            path.unlink()
            return None
        self.hits.append(key)
        return value

    @contextmanager
    def put(self, key: str) -> Iterator[Path]:
        """Yields the path to write the file of `key` to. Other runs can have the file once the block ends."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        yield partial
        partial.rename(path)
        self.made.append(key)
        self._events.emit(CacheMade(key))
