"""How many requests a key may send a minute. Counted in Redis where the broker is one, else in this process."""

import math
import time

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter

from app.errors import TooMany
from app.keys.service import Caller

log = structlog.get_logger(__name__)


class Rates:
    """A moving window of a minute for each key. `per_minute` 0 is no limit."""

    def __init__(self, per_minute: int, broker_url: str) -> None:
        self.item = RateLimitItemPerMinute(per_minute) if per_minute else None
        shared = broker_url.startswith(("redis:", "rediss:"))
        options = {"socket_timeout": 2, "socket_connect_timeout": 2} if shared else {}
        self.limiter = MovingWindowRateLimiter(storage_from_string(broker_url if shared else "memory://", **options))

    def check(self, caller: Caller) -> None:
        """Count a request of `caller`. Raises `TooMany` for one too many."""
        if self.item is None:
            return
        try:
            if self.limiter.hit(self.item, caller.key_id):
                return
            reset = self.limiter.get_window_stats(self.item, caller.key_id).reset_time
        except Exception as error:  # whatever Redis raises: a counter that is away must not take the service along
            log.warning("requests not counted", reason=type(error).__name__)
            return
        seconds = max(1, math.ceil(reset - time.time()))
        raise TooMany(
            f"This key may send {self.item.amount} requests a minute. Try again in {seconds} s.",
            seconds,
            code="rate_limit_exceeded",
        )
