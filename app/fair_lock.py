"""A lock that threads get in the order in which they ask for it."""

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A lock for `with`. Whoever waits longest is next. A thread must not take it twice."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._turns: deque[threading.Lock] = deque()
        """A closed lock for each thread that waits, which is opened when its turn has come."""

    def __enter__(self) -> None:
        with self._mutex:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._turns.append(turn)
        turn.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._mutex:
            if self._turns:
                self._turns.popleft().release()
            else:
                self._is_held = False
