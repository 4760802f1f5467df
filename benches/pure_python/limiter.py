"""A token bucket as one would write it by hand for one event loop, with a fair line."""

import asyncio
from collections import deque
from time import monotonic


class RateLimitedError(Exception):
    """The bucket has not so many tokens now."""


class RateLimiter:
    """Gains ``rate`` tokens per second, up to ``capacity``; those who wait are served in order."""

    def __init__(self, rate: float, capacity: int) -> None:
        self.rate, self.capacity = rate, capacity
        self.level, self.at = float(capacity), monotonic()
        self.line: deque[asyncio.Future[None]] = deque()

    def fill(self) -> None:
        now = monotonic()
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now

    def try_acquire(self, cost: int = 1) -> None:
        self.fill()
        if self.line or self.level < cost:
            raise RateLimitedError
        self.level -= cost

    async def acquire(self, cost: int = 1) -> None:
        if cost > self.capacity:
            raise RateLimitedError
        self.fill()
        if not self.line and self.level >= cost:
            self.level -= cost
            return
        turn = asyncio.get_running_loop().create_future()
        self.line.append(turn)
        try:
            if self.line[0] is not turn:
                await turn
            self.fill()
            while self.level < cost:
                await asyncio.sleep((cost - self.level) / self.rate)
                self.fill()
            self.level -= cost
        finally:
            was_first = self.line[0] is turn
            self.line.remove(turn)
            if was_first and self.line and not self.line[0].done():
                self.line[0].set_result(None)
