"""What one run computes and another may use: tokenised files and reference log-probs, by content hash.

The trainer knows the keys, its runner the object store. The trainer asks for a key by an event and waits for the
answer on its standard input; what it makes it leaves in its folder, and says so by another event. Without a runner
that answers, the folder is all there is.
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
    """Files by key, in the folder `cache` of a run. A key is a relative path."""

    def __init__(self, folder: Path, events: Events, answers: "queue.Queue[str] | None" = None) -> None:
        self.folder, self._events, self._answers = folder, events, answers
        self.hits: list[str] = []
        """The keys that were there."""

    def get(self, key: str, load: Callable[[Path], Value]) -> Value | None:
        """What `load` makes of the file of `key`; None where nobody has it, or where it is damaged."""
        path = self.folder / key
        if not path.exists() and self._answers is not None:
            self._events.emit(CacheWanted(key))
            while json.loads(self._answers.get())["key"] != key:
                pass
        if not path.exists():
            return None
        try:
            value = load(path)
        except Exception:  # whatever a damaged file makes of itself: what it held can be computed
            path.unlink()
            return None
        self.hits.append(key)
        return value

    @contextmanager
    def put(self, key: str) -> Iterator[Path]:
        """Write the file of `key` at the place given; it is offered to others when the block ends."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        yield partial
        partial.rename(path)
        self._events.emit(CacheMade(key))
