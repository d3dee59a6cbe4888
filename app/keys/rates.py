"""Limits the requests per minute of a key. Redis counts them if it is the broker, else this process does.

Requests without a valid key are slowed down by their address.
"""

import asyncio
import math
import time

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter

from app.errors import TooMany
from app.keys.service import Caller

log = structlog.get_logger(__name__)

FAILURES_PER_MINUTE, SLOW_SECONDS = 30, 2.0
"""An address may send this many wrong keys a minute. Each further one is answered after `SLOW_SECONDS`.

Several clients may share an address, so none is refused because of it.
"""
PAUSE_SECONDS = 15.0
"""How long requests are not counted after Redis did not answer. Otherwise each of them would wait for it."""


class RateLimiter:
    """A moving window of a minute for each key. `per_minute` 0 means no limit."""

    def __init__(self, per_minute: int, broker_url: str) -> None:
        self.item = RateLimitItemPerMinute(per_minute) if per_minute else None
        shared = broker_url.startswith(("redis:", "rediss:"))
        options = {"socket_timeout": 2, "socket_connect_timeout": 2} if shared else {}
        self.limiter = MovingWindowRateLimiter(storage_from_string(broker_url if shared else "memory://", **options))
        self._counts_from = 0.0
        """Requests before this time (monotonic) are not counted: Redis did not answer a moment ago."""

    def check(self, caller: Caller) -> None:
        """Count a request of `caller`. Raises `TooMany` if it is over the limit."""
        if self.item is None or time.monotonic() < self._counts_from:
            return
        try:
            if self.limiter.hit(self.item, caller.key_id):
                return
            reset = self.limiter.get_window_stats(self.item, caller.key_id).reset_time
        except Exception as error:  # any error of Redis: the service goes on without counting
            log.warning("requests not counted", reason=type(error).__name__, seconds=PAUSE_SECONDS)
            self._counts_from = time.monotonic() + PAUSE_SECONDS
            return
        seconds = max(1, math.ceil(reset - time.time()))
        raise TooMany(
            f"This key may send {self.item.amount} requests a minute. Try again in {seconds} s.",
            seconds,
            code="rate_limit_exceeded",
        )


class WrongKeys:
    """Counts the wrong keys of each address, and slows down those who try many. `per_minute` 0 means no limit."""

    def __init__(self, per_minute: int) -> None:
        self.item = RateLimitItemPerMinute(FAILURES_PER_MINUTE) if per_minute else None
        self.limiter = MovingWindowRateLimiter(storage_from_string("memory://"))

    async def note(self, address: str) -> None:
        """Count a wrong key. Takes `SLOW_SECONDS` if the address has sent too many. No thread waits meanwhile."""
        if self.item is not None and not self.limiter.hit(self.item, address):
            await asyncio.sleep(SLOW_SECONDS)
