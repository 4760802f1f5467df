"""What a rate limiter adds to a call that it grants at once."""

from collections.abc import Awaitable, Callable
from time import thread_time
from typing import Any

import pytest

import cano
from benches.pure_python import limiter as pure_python

pytestmark = pytest.mark.benchmark(timer=thread_time)

CALLS = 10_000
PLENTY = 1_000_000_000

Loop = Callable[[], Awaitable[None]]


async def call() -> None:
    pass


async def without() -> None:
    for _ in range(CALLS):
        await call()


def with_try(limiter: Any) -> Loop:
    async def loop() -> None:
        for _ in range(CALLS):
            limiter.try_acquire()
            await call()

    return loop


def with_acquire(limiter: Any) -> Loop:
    async def loop() -> None:
        for _ in range(CALLS):
            await limiter.acquire()
            await call()

    return loop


def bucket() -> cano.RateLimiter:
    return cano.RateLimiter(cano.RateLimiterPolicy.per_second(PLENTY))


def three_tiers() -> cano.MultiRateLimiter:
    multi = cano.MultiRateLimiter()
    return multi.with_tier("a", bucket()).with_tier("b", bucket(), 2).with_tier("c", bucket(), 3)


class ThreeBuckets:
    """The tiers one after the other, which is not yet all or none."""

    def __init__(self) -> None:
        self.tiers = [(pure_python.RateLimiter(PLENTY, PLENTY), cost) for cost in (1, 2, 3)]

    def try_acquire(self) -> None:
        for limiter, cost in self.tiers:
            limiter.try_acquire(cost)


def test_try(versus):
    pairs = {
        "cano": (with_try(bucket()), without),
        "pure Python": (with_try(pure_python.RateLimiter(PLENTY, PLENTY)), without),
    }
    versus.added("added by try_acquire", pairs, returns=None, per=CALLS)


def test_try_of_tiers(versus):
    pairs = {"cano": (with_try(three_tiers()), without), "pure Python": (with_try(ThreeBuckets()), without)}
    versus.added("added by try_acquire, three tiers", pairs, returns=None, per=CALLS)


def test_acquire(versus):
    pairs = {
        "cano": (with_acquire(bucket()), without),
        "pure Python": (with_acquire(pure_python.RateLimiter(PLENTY, PLENTY)), without),
    }
    versus.added("added by acquire", pairs, returns=None, per=CALLS)


def test_acquire_beside(versus):
    aiolimiter = pytest.importorskip("aiolimiter", reason="aiolimiter is not installed: make peers")
    pairs = {
        "cano": (with_acquire(bucket()), without),
        "aiolimiter": (with_acquire(aiolimiter.AsyncLimiter(PLENTY, 1)), without),
    }
    versus.added("added by acquire, beside aiolimiter", pairs, returns=None, per=CALLS)
