"""The same circuit breaker in plain Python, for failures in a row."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self


class CircuitOpenError(Exception):
    def __init__(self, retry_after: float) -> None:
        super().__init__(f"circuit breaker is open; it lets a call through again in {retry_after:.3f} s")
        self.retry_after = retry_after


class Permit:
    __slots__ = ("epoch", "started")

    def __init__(self, epoch: int, started: float | None) -> None:
        self.epoch = epoch
        self.started = started


class CircuitBreaker:
    """Closed, open until a moment, or half-open; each period has a number, and an outcome counts only in that of its permit.

    For one thread. `probes` holds the permits of the probes in flight, oldest first.
    """

    def __init__(
        self,
        failure_threshold: int = 5,
        reset_timeout: float = 30.0,
        half_open_max_calls: int = 1,
        *,
        probe_timeout: float = 60.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.failure_threshold = failure_threshold
        self.reset_timeout = reset_timeout
        self.half_open_max_calls = half_open_max_calls
        self.probe_timeout = probe_timeout
        self.clock = clock
        self.epoch = 0
        self._begin("closed")

    def try_acquire(self) -> Permit:
        if self.state == "closed":
            return Permit(self.epoch, None)
        now = self.clock()
        if self.state == "open":
            if now < self.until:
                raise CircuitOpenError(self.until - now)
            self._begin("half-open")
        self._expire(now)
        if len(self.probes) >= self.half_open_max_calls:
            raise CircuitOpenError(self.probes[0].started + self.probe_timeout - now)
        permit = Permit(self.epoch, now)
        self.probes.append(permit)
        return permit

    def record_success(self, permit: Permit) -> None:
        if self._takes_back(permit):
            if self.state == "closed":
                self.failures = 0
            else:
                self.successes += 1
                if self.successes >= self.half_open_max_calls:
                    self._begin("closed")

    def record_failure(self, permit: Permit) -> None:
        if self._takes_back(permit):
            self.failures += 1
            if self.state == "half-open" or self.failures >= self.failure_threshold:
                self._begin("open", self.clock() + self.reset_timeout)

    def record_ignored(self, permit: Permit) -> None:
        self._takes_back(permit)

    def guard(self) -> Guard:
        return Guard(self)

    def _takes_back(self, permit: Permit) -> bool:
        if permit.epoch != self.epoch:
            return False
        if self.state == "closed":
            return True
        self._expire(self.clock())
        if permit not in self.probes:
            return False
        self.probes.remove(permit)
        return True

    def _expire(self, now: float) -> None:
        while self.probes and now >= self.probes[0].started + self.probe_timeout:
            del self.probes[0]

    def _begin(self, state: str, until: float = 0.0) -> None:
        self.state = state
        self.until = until
        self.epoch += 1
        self.failures = self.successes = 0
        self.probes: list[Permit] = []


class Guard:
    """``async with breaker.guard():``, one for each block."""

    __slots__ = ("breaker", "permit")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.breaker = breaker

    async def __aenter__(self) -> Self:
        self.permit = self.breaker.try_acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.breaker.record_success(self.permit)
        elif issubclass(kind, Exception):
            self.breaker.record_failure(self.permit)
        else:
            self.breaker.record_ignored(self.permit)
