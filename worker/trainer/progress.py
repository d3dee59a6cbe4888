"""Whether this process gets on with its work, for the watch over the ranks of a training (see `rank_processes`).

A rank that computes for ever, or waits for a device that never answers, still gives signs of life. So the engine marks
each piece of work that it begins. A rank without a mark for `HUNG_SECONDS` counts as hung, unless it waits for others.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

HUNG_SECONDS = 1800.0
"""The longest piece of work, such as to load a model of 140 GB from a slow disk, or to save it."""


@dataclass
class Progress:
    """When this process began its last piece of work, and how many of its threads wait for other ranks."""

    marked_at: float = field(default_factory=time.monotonic)
    waiting: int = 0

    def mark(self) -> None:
        """Begin a piece of work."""
        self.marked_at = time.monotonic()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Within this context this process waits for other ranks: whatever is wrong is wrong with them."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self.mark()

    @property
    def is_hung(self) -> bool:
        """Whether the last piece of work takes too long."""
        return not self.waiting and time.monotonic() - self.marked_at > HUNG_SECONDS


progress = Progress()
"""That of this process."""
