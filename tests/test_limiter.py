"""Rate limiters: buckets, windows and tiers by hand and in workflows, the line of those who wait, threads and loops.

The state machine at the end compares them with a model of a few lines that counts exactly.
"""

import asyncio
import gc
import math
import os
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import combinations
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cano import (
    ConfigurationError,
    JoinConfig,
    JoinStrategy,
    MultiRateLimiter,
    RateLimitedError,
    RateLimiter,
    RateLimiterPolicy,
    Res,
    UnknownTierError,
    WindowedRateLimiter,
    WindowPolicy,
    Workflow,
)
from cano.testing import VirtualClockLoop, run

AnyLimiter = RateLimiter | WindowedRateLimiter | MultiRateLimiter

DEBUG = bool(os.environ.get("PYTHONASYNCIODEBUG"))  # where asyncio writes down a stack for each task


def bucket(tokens: int = 10, capacity: int = 10, name: str | None = None) -> RateLimiter:
    """So many tokens per second."""
    return RateLimiter(RateLimiterPolicy.per_second(tokens, max_tokens=capacity), name=name)


def window(limit: int = 10, seconds: float = 1, name: str | None = None) -> WindowedRateLimiter:
    return WindowedRateLimiter(WindowPolicy(limit, seconds), name=name)


def drained(limiter: Any) -> Any:
    """The same limiter with nothing left."""
    limiter.try_acquire(limiter.snapshot().available)
    return limiter


def refusal(limiter: Any, *charge: Any) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        limiter.try_acquire(*charge)
    return caught.value


def now() -> float:
    return asyncio.get_running_loop().time()


def in_line(limiter: RateLimiter | WindowedRateLimiter) -> int:
    return limiter.snapshot().waiting


async def ticks(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Log:
    """Who was granted, and when."""

    def __init__(self) -> None:
        self.grants: list[tuple[Any, float]] = []

    async def acquire(self, who: Any, limiter: AnyLimiter, *charge: Any) -> None:
        await limiter.acquire(*charge)
        self.grants.append((who, round(now(), 9)))

    async def start(self, who: Any, limiter: AnyLimiter, *charge: Any) -> asyncio.Task[None]:
        """A task that has taken its place in the line."""
        task = asyncio.create_task(self.acquire(who, limiter, *charge), name=str(who))
        await asyncio.sleep(0)
        return task


BOTH = pytest.mark.parametrize("make", [bucket, window], ids=["bucket", "window"])


# Policies


def test_policy_of_a_bucket():
    """A bucket's policy has what it was made from, and the capacity that follows."""
    policy = RateLimiterPolicy(10, 2, max_tokens=3, burst=4)

    assert (policy.tokens, policy.period, policy.max_tokens, policy.burst, policy.capacity) == (10, 2.0, 3, 4, 7)
    assert RateLimiterPolicy(10, 2).capacity == 10
    assert RateLimiter(policy).policy == policy


def test_policies_for_common_times():
    """The short forms scale to their time."""
    # WN-007
    periods = [make(5).period for make in (RateLimiterPolicy.per_second, RateLimiterPolicy.per_minute)]
    widths = [make(5).seconds for make in (WindowPolicy.per_second, WindowPolicy.per_minute)]

    assert (periods, RateLimiterPolicy.per_hour(5).period) == ([1.0, 60.0], 3600.0)
    assert (widths, WindowPolicy.per_hour(5).seconds, WindowPolicy.per_day(5).seconds) == ([1.0, 60.0], 3600.0, 86400.0)
    assert RateLimiterPolicy.per_minute(5, max_tokens=2, burst=1) == RateLimiterPolicy(5, 60, max_tokens=2, burst=1)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        pytest.param(
            RateLimiterPolicy.per_minute(10, burst=5),
            "RateLimiterPolicy(10, 60.0, max_tokens=10, burst=5)",
            id="bucket",
        ),
        pytest.param(WindowPolicy(5, 0.5), "WindowPolicy(5, 0.5)", id="window"),
    ],
)
def test_policy_is_a_value(policy, text):
    """A policy's repr makes an equal one, as does a pickle; nothing of it can be changed."""
    assert repr(policy) == text
    for other in (eval(text), pickle.loads(pickle.dumps(policy))):  # noqa: S301, S307 - our own
        assert other == policy
        assert hash(other) == hash(policy)
    assert policy not in (RateLimiterPolicy(10, 60), WindowPolicy(5, 1))
    with pytest.raises(AttributeError):
        policy.burst = 1


# One bucket


async def test_bucket_starts_full():
    """A bucket grants its capacity at once, then nothing; the refusal says when there is something again."""
    # RL-001, RL-002, RL-005
    limiter = RateLimiter(RateLimiterPolicy.per_second(10, max_tokens=2, burst=5))

    for left in reversed(range(7)):
        assert limiter.try_acquire() is None
        assert limiter.snapshot().available == left
    error = refusal(limiter)

    assert 0.09 < error.retry_after <= 0.1
    assert error.tier is None


@pytest.mark.virtual
async def test_tokens_come_back():
    """Tokens come back evenly, up to the capacity."""
    # RL-003
    limiter = drained(bucket(50, 2))

    await asyncio.sleep(0.019)
    assert refusal(limiter).retry_after == 0.001
    await asyncio.sleep(0.001)
    limiter.try_acquire()
    assert str(refusal(limiter)) == "rate limited: retry after 0.02 s"
    await asyncio.sleep(1e6)
    assert limiter.snapshot().available == 2


@pytest.mark.virtual
async def test_shortest_time_to_retry():
    """A refusal never asks to come back sooner than in a millisecond."""
    # ML-011
    limiter = drained(bucket(1_000_000, 1))

    assert refusal(limiter).retry_after == 0.001
    assert limiter.time_until() == 1e-6


@BOTH
async def test_cost(make):
    """A cost is taken whole or not at all."""
    # RL-006, RL-015
    limiter = make()

    limiter.try_acquire(3)
    assert limiter.snapshot().available == 7
    for cost in (8, 11, 10**9, 2**64, 10**400):
        refusal(limiter, cost)
    assert limiter.snapshot().available == 7
    limiter.try_acquire(cost=7)
    assert limiter.snapshot().used == 10


@BOTH
async def test_cost_of_nothing(make):
    """A cost of 0 is always granted, also to those who wait, and leaves no trace."""
    # RL-007, RL-012
    fresh, empty = make(), drained(make())

    fresh.try_acquire(0)
    empty.try_acquire(0)
    await empty.acquire(0)

    assert fresh.snapshot() == make().snapshot()
    assert empty.time_until(0) == 0


@BOTH
async def test_impossible_cost(make):
    """A cost above the capacity is refused at once by every form, and says that waiting does not help."""
    # RL-008, RL-012, WN-002; B44
    limiter = make(name="api")

    error = refusal(limiter, 11)
    with pytest.raises(RateLimitedError) as caught:
        await limiter.acquire(11)

    for raised in (error, caught.value):
        assert str(raised) == "rate limited by 'api': a cost is granted up to 10, never one of 11"
        assert (raised.tier, raised.retry_after) == ("api", math.inf)
    assert limiter.time_until(11) == math.inf
    assert limiter.time_until(10**400) == math.inf
    assert limiter.snapshot() == make().snapshot()


@pytest.mark.virtual
async def test_slowest_refill():
    """However long a refill takes, it can be waited for: ten years are the longest wait that is told."""
    # RL-009
    years = 315_576_000
    limiter = RateLimiter(RateLimiterPolicy(1, years, max_tokens=3))
    limiter.try_acquire(3)

    assert limiter.time_until(3) == years
    began = now()
    await limiter.acquire(3)
    assert now() - began == pytest.approx(3 * years)


@pytest.mark.virtual
async def test_acquire_waits_for_its_cost():
    """The waiting form takes exactly its cost, at the moment at which it is there."""
    # RL-004
    limiter = drained(bucket(10, 5))

    await limiter.acquire(3)

    assert now() == 0.3
    assert limiter.snapshot().available == 0
    assert limiter.time_until(1) == 0.1


@BOTH
def test_acquire_of_what_is_there(make):
    """What can be had at once is taken without a suspension, and without a running loop."""
    # RL-005
    limiter = make(5, 5)

    with pytest.raises(StopIteration):
        limiter.acquire().send(None)

    assert limiter.snapshot().available == 4


@BOTH
def test_acquire_is_a_coroutine(make):
    """Nothing is taken before the waiting form is awaited; one that never is says so."""
    limiter = make()

    coroutine = limiter.acquire()

    assert asyncio.iscoroutine(coroutine)
    assert coroutine.__qualname__ == "acquire"
    with pytest.warns(RuntimeWarning, match="was never awaited"):
        del coroutine
    assert limiter.snapshot().available == 10


async def test_waiting_in_real_time():
    """On any loop, those who wait are spread by the rate and served in order."""
    limiter, log, began = bucket(100, 1), Log(), now()

    await asyncio.gather(*(log.acquire(who, limiter) for who in range(6)))

    assert [who for who, _ in log.grants] == list(range(6))
    assert now() - began >= 0.0499  # uvloop's clock counts milliseconds


# One window


@pytest.mark.virtual
async def test_window():
    """A window grants up to its limit; all of it is back when it has passed."""
    # WN-001, WN-002, WN-003, WN-004
    limiter = window(1000, 60)

    limiter.try_acquire(600)
    assert (limiter.snapshot().used, limiter.snapshot().available) == (600, 400)
    await asyncio.sleep(45)
    assert refusal(limiter, 600).retry_after == 15
    limiter.try_acquire(400)
    assert limiter.time_until() == 15
    assert refusal(limiter).retry_after == 15
    await asyncio.sleep(15)
    assert limiter.snapshot().used == 0
    limiter.try_acquire(1000)


@pytest.mark.virtual
async def test_acquire_waits_for_the_reset():
    """The waiting form goes on when the window ends."""
    # WN-005
    limiter = drained(window(3, 2))
    await asyncio.sleep(0.5)

    await limiter.acquire(2)

    assert now() == 2
    assert limiter.snapshot().used == 2


@pytest.mark.virtual
async def test_windows_begin_with_the_first_grant():
    """Windows lie end to end from the first grant on, whoever looks meanwhile."""
    # WN-009, B47
    limiter = window(1, 10)
    await asyncio.sleep(3)
    assert limiter.snapshot().resets_in is None
    limiter.try_acquire(0)
    assert limiter.snapshot().resets_in is None

    limiter.try_acquire()
    await asyncio.sleep(24)

    assert limiter.time_until() == 0
    assert limiter.snapshot().resets_in == 6
    limiter.try_acquire()
    assert limiter.time_until() == 6


# Seen from outside


@pytest.mark.virtual
async def test_snapshot():
    """A snapshot shows the budget, when something comes back, and who waits; it stays as it was."""
    # WN-008
    slow, fixed = drained(bucket(10, 2)), drained(window(3, 2))
    waiting = [asyncio.create_task(slow.acquire()) for _ in range(2)]
    await asyncio.sleep(0.05)

    of_bucket, of_window = slow.snapshot(), fixed.snapshot()
    await asyncio.gather(*waiting)

    assert (of_bucket.capacity, of_bucket.available, of_bucket.used) == (2, 0, 2)
    assert (of_bucket.available_in, of_bucket.resets_in, of_bucket.waiting) == (0.05, None, 2)
    assert (of_window.capacity, of_window.available, of_window.used) == (3, 0, 3)
    assert (of_window.available_in, of_window.resets_in, of_window.waiting) == (1.95, 1.95, 0)
    assert of_bucket != of_window
    assert in_line(slow) == 0
    with pytest.raises(AttributeError):
        of_bucket.used = 1  # type: ignore[misc]


def test_repr():
    """The repr of a limiter says what there is and who waits."""
    limiter, plain = bucket(name="api"), window(3)
    limiter.try_acquire(3)

    assert repr(plain) == "<WindowedRateLimiter: 3 of 3 available, 0 waiting>"
    assert repr(limiter).startswith("<RateLimiter 'api': ")
    assert repr(MultiRateLimiter()) == "<MultiRateLimiter with no tiers>"
    assert repr(tiers(a=limiter, b=plain)) == "<MultiRateLimiter with the tiers 'a', 'b'>"
    assert repr(plain.snapshot()) == "<LimiterSnapshot: 3 of 3 available, 0 waiting>"
    assert (limiter.name, plain.name) == ("api", None)


@BOTH
def test_racers(make):
    """Of many who try, exactly as many succeed as there is room for."""
    # RL-014
    limiter, granted = make(), []

    async def race(who: int) -> None:
        await asyncio.sleep(0)
        try:
            limiter.try_acquire()
        except RateLimitedError:
            return
        granted.append(who)

    async def main() -> None:
        await asyncio.gather(*map(race, range(40)))

    run(main())

    assert granted == list(range(10))


def test_everybody_who_holds_a_limiter_shares_it():
    """A limiter is shared by handing it on: by hand, as a resource, as a tier."""
    # RL-013
    limiter = bucket(10, 3)

    def take(resource: Annotated[RateLimiter, Res("limiter")]) -> str:
        resource.try_acquire()
        return "done"

    limiter.try_acquire()
    run(Workflow({"limiter": limiter}).register("take", take).add_exit_state("done").orchestrate("take"))
    tiers(a=limiter).try_acquire()

    assert refusal(limiter).tier is None
    with pytest.raises(TypeError):
        pickle.dumps(limiter)


@pytest.mark.virtual
async def test_branches_share_a_limiter():
    """The branches of a split wait for a limiter like any task, in branch order."""
    limiter, log = bucket(10, 2), Log()
    workflow = Workflow().register_split(
        "work", [lambda who=who: log.acquire(who, limiter) for who in range(5)], JoinConfig(JoinStrategy.All, "done")
    )

    await workflow.add_exit_state("done").orchestrate("work")

    assert log.grants == [(0, 0.0), (1, 0.0), (2, 0.1), (3, 0.2), (4, 0.3)]


# Several tiers


def tiers(**limiters: RateLimiter | WindowedRateLimiter) -> MultiRateLimiter:
    """A tier of cost 1 for each."""
    multi = MultiRateLimiter()
    for name, limiter in limiters.items():
        multi.with_tier(name, limiter)
    return multi


@pytest.mark.virtual
async def test_all_tiers_grant_or_none():
    """A call is granted if every tier has room; a refusal names the first that has not, and takes nothing."""
    # ML-001, ML-002, ML-003, ML-004, B52
    calls, quota = bucket(10, 10), drained(window(5, 60))
    multi, other_order = tiers(calls=calls, quota=quota), tiers(quota=quota, calls=calls)

    for limiter in (multi, other_order) * 5:
        error = refusal(limiter)
        assert (error.tier, error.retry_after) == ("quota", 60)
        assert str(error) == "rate limited by 'quota': retry after 60 s"
    assert calls.snapshot().available == 10
    await asyncio.sleep(60)
    for _ in range(5):
        assert multi.try_acquire() is None
    assert multi.snapshot() == {"calls": calls.snapshot(), "quota": quota.snapshot()}
    assert (calls.snapshot().used, quota.snapshot().used) == (5, 5)


async def test_no_tiers():
    """Without tiers everything is granted, at once."""
    # ML-001
    multi = MultiRateLimiter()

    multi.try_acquire()
    await multi.acquire()

    assert (multi.time_until(), multi.snapshot()) == (0, {})


async def test_tiers_have_their_own_cost():
    """Each tier takes its own cost, buckets and windows alike; one of cost 0 never holds a call up."""
    # ML-005
    calls, tokens, inert = bucket(), window(1000, 60), drained(bucket(1, 1))
    multi = tiers(calls=calls).with_tier("tokens", tokens, 300).with_tier("inert", inert, cost=0)

    for _ in range(3):
        multi.try_acquire()

    assert refusal(multi).tier == "tokens"
    assert (calls.snapshot().used, tokens.snapshot().used) == (3, 900)


async def test_subset_of_tiers():
    """A call may name the tiers that count for it; the others are not looked at."""
    # ML-006
    calls, quota = bucket(), drained(window(5, 60))
    multi = tiers(calls=calls, quota=quota)

    multi.try_acquire(["calls"])
    multi.try_acquire(iter(["calls", "calls"]))
    multi.try_acquire(())
    await multi.acquire({"calls"})

    assert calls.snapshot().used == 3
    assert multi.time_until(["calls"]) == 0
    assert refusal(multi, ["quota"]).tier == "quota"


@pytest.mark.parametrize("names", [["nobody"], ["calls", "nobody"], [None], [1], [[]], [b"calls"]], ids=repr)
async def test_tier_that_does_not_exist(names):
    """A name that no tier has is an error of its own, a KeyError; nothing is taken."""
    # ML-006, B43
    limiter = bucket()
    multi = tiers(calls=limiter)

    for ask in (multi.try_acquire, multi.time_until):
        with pytest.raises(UnknownTierError, match=r"^no tier .* among the tiers 'calls'$") as caught:
            ask(names)
    with pytest.raises(UnknownTierError):
        await multi.acquire(names)

    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ConfigurationError)
    assert limiter.snapshot().used == 0


@pytest.mark.virtual
async def test_acquire_waits_for_all_tiers():
    """The waiting form goes on when the last tier has room, and takes from none before."""
    # ML-007
    calls, quota = drained(bucket(10, 1)), drained(window(1, 2))

    task = asyncio.create_task(tiers(calls=calls, quota=quota).acquire())
    await asyncio.sleep(1.9)

    assert calls.snapshot().available == 1
    await task
    assert now() == 2
    assert (calls.snapshot().used, quota.snapshot().used) == (1, 1)


def test_racers_through_tiers():
    """Of many who try, exactly as many pass as the scarce tier has, and no other tier is charged for the rest."""
    # ML-008
    wide, scarce = bucket(10, 100), window(5, 60)
    multi, passed = tiers(wide=wide, scarce=scarce), []

    async def race() -> None:
        await asyncio.sleep(0)
        try:
            multi.try_acquire()
        except RateLimitedError as error:
            assert error.tier == "scarce"  # noqa: PT017 - the others pass
        else:
            passed.append(None)

    async def main() -> None:
        await asyncio.gather(*(race() for _ in range(24)))
        assert len(passed) == scarce.snapshot().used == 5  # in here: outside, another clock goes

    run(main())


async def test_limiter_under_two_tiers():
    """The same limiter under two names is charged twice by each call."""
    # ML-009
    limiter = window(5)
    multi = MultiRateLimiter().with_tier("a", limiter, 2).with_tier("b", limiter, 1)

    multi.try_acquire()

    assert limiter.snapshot().used == 3
    assert refusal(multi).tier == "b"
    assert refusal(multi.with_tier("c", limiter, 3)).retry_after == math.inf


async def test_impossible_tier():
    """A tier whose cost its limiter can never grant is named before one that is only short, and refused at once."""
    # ML-010, B44
    short = drained(bucket())
    multi = tiers(short=short).with_tier("small", window(3), 4)

    with pytest.raises(RateLimitedError) as caught:
        await multi.acquire()

    for error in (refusal(multi), caught.value):
        assert (error.tier, error.retry_after) == ("small", math.inf)
        assert str(error) == "rate limited by 'small': a cost is granted up to 3, never one of 4"
    assert multi.time_until() == math.inf
    assert in_line(short) == 0


def test_tier_twice():
    """A name is that of one tier."""
    multi = tiers(a=bucket())

    with pytest.raises(ConfigurationError, match=r"^name must be one that no tier has yet, got 'a'$"):
        multi.with_tier("a", bucket())


def test_tier_of_a_multi_limiter():
    """A multi limiter is no tier."""
    with pytest.raises(ConfigurationError, match="limiter must be a RateLimiter or a WindowedRateLimiter"):
        MultiRateLimiter().with_tier("a", MultiRateLimiter())  # type: ignore[arg-type]


@pytest.mark.virtual
async def test_tier_that_is_added_later():
    """A tier counts for the calls that come after it; those that wait stay as they are."""
    slow, log = drained(bucket(10, 1)), Log()
    multi = tiers(a=slow)

    before = await log.start("before", multi)
    assert multi.with_tier("b", drained(window(1, 9))) is multi
    after = await log.start("after", multi)
    await asyncio.gather(before, after)

    assert log.grants == [("before", 0.1), ("after", 9.0)]


# The line


@pytest.mark.virtual
@BOTH
async def test_line_is_served_in_order(make):
    """Those who wait are served in the order in which they came, whatever they cost."""
    # RL-016, B55
    limiter, log = drained(make(10, 10) if make is bucket else make(10, 1)), Log()

    tasks = [await log.start(who, limiter, cost) for who, cost in enumerate([1, 9, 1, 10])]
    await asyncio.gather(*tasks)

    assert [who for who, _ in log.grants] == [0, 1, 2, 3]
    assert [at for _, at in log.grants] == ([0.1, 1.0, 1.1, 2.1] if make is bucket else [1.0, 1.0, 2.0, 3.0])


@pytest.mark.virtual
async def test_nobody_overtakes_the_line():
    """While somebody waits for much, little is refused too, and told how long the whole line takes at least."""
    limiter, log = bucket(10, 10), Log()
    limiter.try_acquire(6)
    large = await log.start("large", limiter, 10)

    assert limiter.snapshot().available == 4
    assert refusal(limiter).retry_after == limiter.time_until() == pytest.approx(0.7)
    small = await log.start("small", limiter)
    await asyncio.gather(large, small)
    assert log.grants == [("large", 0.6), ("small", 0.7)]


@pytest.mark.virtual
@pytest.mark.parametrize("leaver", range(4))
@pytest.mark.parametrize("at", [0.05, 0.1, 0.15])
async def test_cancelled_waiter_costs_nothing(leaver, at):
    """Whoever is cancelled leaves the line and takes nothing with it; those behind move up, those in front do not notice."""
    limiter, log = drained(bucket(10, 1)), Log()
    tasks = [await log.start(who, limiter) for who in range(4)]

    await asyncio.sleep(at)
    served = [who for who, _ in log.grants]
    tasks[leaver].cancel("enough")
    await asyncio.gather(*tasks, return_exceptions=True)

    if leaver in served:
        assert [who for who, _ in log.grants] == [0, 1, 2, 3]
    else:
        with pytest.raises(asyncio.CancelledError, match="enough"):
            tasks[leaver].result()
        assert log.grants == [
            (who, round(0.1 * turn, 9)) for turn, who in enumerate(sorted({0, 1, 2, 3} - {leaver}), start=1)
        ]
    assert in_line(limiter) == 0


@pytest.mark.virtual
async def test_cancel_in_the_turn_in_which_there_is_room():
    """A cancel that comes after the sleep of the first and before its step takes nothing: the next goes on in its place."""
    limiter, log = drained(bucket(10, 1)), Log()
    first = await log.start("first", limiter)
    second = await log.start("second", limiter)

    asyncio.get_running_loop().call_at(0.1, first.cancel)
    await asyncio.gather(first, second, return_exceptions=True)

    assert first.cancelled()
    assert log.grants == [("second", 0.1)]
    assert limiter.snapshot().available == 0


@pytest.mark.virtual
async def test_cancel_in_the_turn_in_which_it_was_told():
    """A waiter that is cancelled after it was told that it is first, and before it went on, passes the word on."""
    limiter, log = drained(bucket(10, 1)), Log()
    tasks = [await log.start(who, limiter) for who in range(4)]

    for task in tasks[:3]:  # each runs, leaves, and tells the next, which is cancelled before its step
        task.cancel()
        await asyncio.sleep(0)
    await tasks[3]

    assert all(task.cancelled() for task in tasks[:3])
    assert log.grants == [(3, 0.1)]


@pytest.mark.virtual
async def test_everybody_is_cancelled():
    """When all who wait are cancelled at once, nothing was taken, and the line is empty."""
    limiter, log = drained(bucket(10, 1)), Log()
    tasks = [await log.start(who, limiter) for who in range(50)]

    await asyncio.sleep(0.1)
    random.Random(1).shuffle(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert [who for who, _ in log.grants] == [0]
    assert in_line(limiter) == 0
    await asyncio.sleep(0.1)
    limiter.try_acquire()


@pytest.mark.virtual
async def test_timeout_around_a_wait():
    """A timeout around the wait ends it, and costs those behind nothing."""
    limiter, log = drained(bucket(1, 2)), Log()

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await limiter.acquire(2)

    task = asyncio.create_task(impatient())
    behind = await log.start("behind", limiter)
    await asyncio.gather(task, behind)

    assert log.grants == [("behind", 1.0)]


@pytest.mark.virtual
async def test_coroutine_that_is_closed():
    """A coroutine that is closed while it waits leaves the line, as if it had been cancelled."""
    limiter, log = drained(bucket(10, 1)), Log()
    coroutine = limiter.acquire()
    coroutine.send(None)
    behind = await log.start("behind", limiter)
    assert in_line(limiter) == 2

    coroutine.close()
    await behind

    assert log.grants == [("behind", 0.1)]


@pytest.mark.virtual
async def test_cancelled_waiter_leaves_every_line():
    """A call through several tiers that is cancelled leaves the lines of all, and each line goes on."""
    a, b, log = drained(bucket(10, 1)), drained(window(1, 3)), Log()
    both = await log.start("both", tiers(a=a, b=b))
    behind_a, behind_b = await log.start("a", a), await log.start("b", b)
    await asyncio.sleep(2)
    assert (in_line(a), in_line(b)) == (2, 2)

    both.cancel()
    await asyncio.gather(behind_a, behind_b)

    assert log.grants == [("a", 2.0), ("b", 3.0)]
    assert (in_line(a), in_line(b)) == (0, 0)


@pytest.mark.virtual
async def test_calls_in_a_circle_of_tiers():
    """Calls whose tiers form a circle do not block each other: who came first goes first."""
    a, b, c, log = drained(bucket(10, 1)), drained(bucket(10, 1)), drained(bucket(10, 1)), Log()

    pairs = [tiers(x=a, y=b), tiers(x=b, y=c), tiers(x=c, y=a)]
    tasks = [await log.start(who, pair) for who, pair in enumerate(pairs * 2)]
    await asyncio.gather(*tasks)

    assert log.grants == [(0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4), (4, 0.5), (5, 0.6)]


@pytest.mark.virtual
async def test_only_the_first_has_a_timer():
    """However long the line, one timer is armed for it."""
    limiter, log = drained(bucket(10, 1)), Log()
    tasks = [await log.start(who, limiter) for who in range(20)]

    scheduled = asyncio.get_running_loop()._scheduled
    assert len([timer for timer in scheduled if not timer.cancelled()]) == 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [timer for timer in scheduled if not timer.cancelled()] == []


# Loops that are gone


@contextmanager
def closed_loop_with(*limiters: AnyLimiter) -> Iterator[Callable[[], None]]:
    """A loop on which a task waits for each limiter; what is given closes it, and the tasks are never cancelled."""
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(limiter.acquire()) for limiter in limiters]  # type: ignore[func-returns-value]
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.run_until_complete(asyncio.sleep(0))
    yield loop.close
    loop.close()


def slow() -> RateLimiter:
    """A token every 20 ms."""
    return drained(bucket(50, 1))


def test_first_of_the_line_is_on_a_closed_loop():
    """Who waits on a loop that was closed stands in nobody's way: it leaves when the next call would have to wait."""
    limiter = slow()

    with closed_loop_with(limiter) as close:
        close()
        assert in_line(limiter) == 1
        asyncio.run(limiter.acquire())
        assert in_line(limiter) == 0


def test_closed_loop_behind_a_call_that_costs_nothing_here():
    """A call that waits for another tier, and costs this limiter nothing, hides nobody whose loop is closed."""
    limiter, log = slow(), Log()
    elsewhere = MultiRateLimiter().with_tier("free", limiter, 0).with_tier("quota", drained(window(1, 3600)))

    async def end(task: asyncio.Task[None]) -> None:
        await limiter.acquire()
        task.cancel()

    with asyncio.Runner() as runner:
        task = runner.run(log.start("elsewhere", elsewhere))
        with closed_loop_with(limiter) as close:
            close()
            runner.run(end(task))

    assert in_line(limiter) == 0


def test_try_behind_a_closed_loop():
    """A try is not refused because somebody waits on a closed loop."""
    limiter, quota = slow(), window()

    with closed_loop_with(limiter, tiers(a=limiter, b=quota), limiter) as close:
        close()
        time.sleep(0.03)
        tiers(b=quota, a=limiter).try_acquire()

    assert (in_line(limiter), in_line(quota)) == (0, 0)
    assert quota.snapshot().used == 1


def test_next_of_the_line_is_on_a_closed_loop():
    """Who is told on a closed loop is passed over: the one behind goes on."""
    limiter, log = slow(), Log()

    async def leave(first: asyncio.Task[None], behind: asyncio.Task[None]) -> None:
        first.cancel()
        await behind

    with asyncio.Runner() as runner:
        first = runner.run(log.start("first", limiter))
        with closed_loop_with(limiter, limiter) as close:
            behind = runner.run(log.start("behind", limiter))
            close()
            assert in_line(limiter) == 4
            runner.run(leave(first, behind))

    assert [who for who, _ in log.grants] == ["behind"]
    assert in_line(limiter) == 0


def test_garbage():
    """A limiter, those who wait for it and their loop go together when nobody holds them any more."""

    def abandoned() -> list[weakref.ref[Any]]:
        limiter = slow()
        multi = tiers(a=limiter, b=window())
        with closed_loop_with(limiter, multi, multi):
            return [weakref.ref(limiter), weakref.ref(multi)]

    gone = abandoned()
    gc.collect()

    assert [ref() for ref in gone] == [None, None]


# Threads and loops


def in_threads(count: int, function: Callable[[], Any]) -> list[Any]:
    """What the function returns in so many threads that begin together."""
    results, begin = [], threading.Barrier(count)

    def work() -> None:
        begin.wait()
        results.append(function())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def granted(limiter: RateLimiter | WindowedRateLimiter | MultiRateLimiter, calls: int) -> int:
    """How many of so many tries are granted."""
    count = 0
    for _ in range(calls):
        try:
            limiter.try_acquire()
        except RateLimitedError:
            pass
        else:
            count += 1
    return count


@pytest.mark.timeout(60)
@pytest.mark.model
def test_a_million_tries_in_threads():
    """8 threads that try a million times are granted what there was, not one more and not one less."""
    limiter = RateLimiter(RateLimiterPolicy(1, 315_576_000, max_tokens=900_000))

    counts = in_threads(8, lambda: granted(limiter, 125_000))

    assert sum(counts) == 900_000
    assert limiter.snapshot().available == 0


@pytest.mark.timeout(60)
def test_rate_in_threads():
    """However many threads try, a bucket never grants more than its capacity and what came back, and wastes nothing."""
    limiter, began = bucket(100_000, 1_000), time.monotonic()

    counts = in_threads(8, lambda: granted(limiter, 25_000))
    elapsed = time.monotonic() - began

    assert sum(counts) <= 1_000 + 100_000 * elapsed
    assert sum(counts) >= 1_000


def test_tiers_in_threads():
    """Threads that pass through the same limiters in another order do not block each other, and all tiers count alike."""
    a, b, c = window(10_000, 3600), window(8_000, 3600), window(10_000, 3600)
    orders = iter([tiers(a=a, b=b, c=c), tiers(c=c, b=b, a=a), tiers(b=b, a=a, c=c), tiers(c=c, a=a, b=b)])

    counts = in_threads(4, lambda: granted(next(orders), 2_500))

    assert sum(counts) == 8_000
    assert [limiter.snapshot().used for limiter in (a, b, c)] == [8_000] * 3


@pytest.mark.realtime
def test_line_through_several_loops():
    """Those who wait on loops in several threads are served by the rate, each in its own loop, and none is forgotten."""
    limiter, began = bucket(400, 1), time.monotonic()
    multi = tiers(a=limiter, b=window(1_000))

    async def wait(limiter: AnyLimiter, patience: float) -> int:
        loop, thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            async with asyncio.timeout(patience):
                await limiter.acquire()
        except TimeoutError:
            return 0
        assert (asyncio.get_running_loop(), threading.get_ident()) == (loop, thread)
        return 1

    async def main() -> int:
        calls = [(limiter, 60.0), (multi, 60.0), (limiter, 0.01), (multi, 0.02)] * 5
        return sum(await asyncio.gather(*(wait(*call) for call in calls)))

    counts = in_threads(4, lambda: asyncio.run(main()))
    elapsed = time.monotonic() - began

    assert all(10 <= count <= 20 for count in counts)
    assert sum(counts) <= 1 + 400 * elapsed
    assert in_line(limiter) == 0


@pytest.mark.realtime
def test_order_of_a_line_through_two_loops():
    """A line goes by who came first, whichever loop they wait on."""
    limiter, log = drained(bucket(10, 1)), Log()

    with asyncio.Runner() as one, asyncio.Runner() as other:
        tasks = [runner.run(log.start(who, limiter)) for who, runner in enumerate([one, other, other, one, other])]

        async def rest(mine: list[asyncio.Task[None]]) -> None:
            await asyncio.gather(*mine)

        thread = threading.Thread(target=lambda: one.run(rest([tasks[0], tasks[3]])))
        thread.start()
        other.run(rest([tasks[1], tasks[2], tasks[4]]))
        thread.join()

    assert [who for who, _ in log.grants] == [0, 1, 2, 3, 4]


# Against a model


class BucketModel:
    """A bucket whose tokens are counted in fractions, at integer nanoseconds."""

    def __init__(self, policy: RateLimiterPolicy) -> None:
        self.capacity, self.rate = policy.capacity, Fraction(policy.tokens, round(policy.period * 1e9))
        self.level, self.at = Fraction(policy.capacity), 0

    def free_at(self, now: int, cost: int) -> int:
        level = min(self.capacity, self.level + (now - self.at) * self.rate)
        return now + math.ceil(max(Fraction(0), cost - level) / self.rate)

    def take(self, now: int, cost: int) -> None:
        self.level, self.at = min(self.capacity, self.level + (now - self.at) * self.rate) - cost, now


class WindowModel:
    """A window that knows when the first began."""

    def __init__(self, policy: WindowPolicy) -> None:
        self.capacity, self.width = policy.limit, round(policy.seconds * 1e9)
        self.began: int | None = None
        self.used = (0, 0)  # number of the window, and what was taken in it

    def window(self, now: int) -> tuple[int, int, int]:
        began = now if self.began is None else self.began
        number = (now - began) // self.width
        return began, number, self.used[1] if number == self.used[0] else 0

    def free_at(self, now: int, cost: int) -> int:
        began, number, used = self.window(now)
        more = -(-max(0, used + cost - self.capacity) // self.capacity)
        return began + (number + more) * self.width if more else now

    def take(self, now: int, cost: int) -> None:
        self.began, number, used = self.window(now)
        self.used = (number, used + cost)


Charges = list[tuple[int, int]]
"""Which limiter, and how much, for each tier."""


class Model:
    """Limiters and their line: whoever shares no limiter with somebody in front goes as soon as all is there."""

    def __init__(self, budgets: list[BucketModel | WindowModel]) -> None:
        self.budgets, self.now = budgets, 0
        self.line: list[tuple[int, Charges]] = []
        self.grants: dict[int, int] = {}

    def owed(self, charges: Charges, index: int) -> int:
        return sum(cost for of, cost in charges if of == index)

    def touched(self, charges: Charges) -> set[int]:
        return {index for index, cost in charges if cost}

    def queued(self, index: int) -> int:
        return sum(self.owed(charges, index) for _, charges in self.line)

    def wait(self, index: int, cost: int) -> float:
        """Nanoseconds until a newcomer's cost can be had, those in line first."""
        budget = self.budgets[index]
        if not 0 < cost <= budget.capacity:
            return 0 if cost == 0 else math.inf
        return budget.free_at(self.now, self.queued(index) + cost) - self.now

    def refusal(self, charges: Charges) -> tuple[int, float] | None:
        """The tier in the way of a newcomer, and how long; None if there is none."""
        sums = [self.owed(charges[: tier + 1], index) for tier, (index, _) in enumerate(charges)]
        for tier, (index, _) in enumerate(charges):
            if sums[tier] > self.budgets[index].capacity:
                return tier, math.inf
        for tier, (index, cost) in enumerate(charges):
            if cost and (self.queued(index) or self.wait(index, sums[tier])):
                return tier, max(1e6, self.wait(index, self.owed(charges, index)))
        return None

    def take(self, charges: Charges) -> None:
        for index in self.touched(charges):
            self.budgets[index].take(self.now, self.owed(charges, index))

    def heads(self) -> Iterator[tuple[int, int, Charges]]:
        """Who has nobody in front, and when all is there."""
        passed: set[int] = set()
        for key, charges in self.line:
            touched = self.touched(charges)
            if not touched & passed:
                yield max(self.budgets[i].free_at(self.now, self.owed(charges, i)) for i in touched), key, charges
            passed |= touched

    def advance(self, until: int) -> None:
        """Serve the line up to a moment."""
        while heads := [head for head in self.heads() if head[0] <= until]:
            self.now, key, charges = min(heads)
            self.take(charges)
            self.line.remove((key, charges))
            self.grants[key] = self.now
        self.now = until


HAIR = 1e-12

POLICIES = st.one_of(
    st.builds(
        RateLimiterPolicy,
        st.integers(1, 4),
        st.sampled_from([0.01, 0.3, 1]),
        max_tokens=st.integers(1, 5),
        burst=st.integers(0, 2),
    ),
    st.builds(WindowPolicy, st.integers(1, 6), st.sampled_from([0.1, 0.7])),
)
TIERS = [(0, 1), (1, 2), (2, 1), (1, 1), (0, 3)]
"""The tiers "0" to "4": their limiter and cost; two limiters have two."""

SINGLE = [(limiter, cost) for limiter in range(3) for cost in range(5)]
SEVERAL = [None, *map(set, combinations("01234", 2)), *map(set, combinations("01234", 3)), {"0"}]
CALLS = st.sampled_from([*SINGLE, *SEVERAL])
"""A limiter and a cost, or the tiers of the multi limiter."""


class LimitersAgainstModel(RuleBasedStateMachine):
    """Whatever is tried, awaited and cancelled in whatever order, the limiters do what the model does, to the nanosecond."""

    @initialize(policies=st.lists(POLICIES, min_size=3, max_size=3))
    def begin(self, policies):
        self.loop = VirtualClockLoop()
        kinds = {RateLimiterPolicy: (RateLimiter, BucketModel), WindowPolicy: (WindowedRateLimiter, WindowModel)}
        self.limiters = [kinds[type(policy)][0](policy) for policy in policies]
        self.model = Model([kinds[type(policy)][1](policy) for policy in policies])
        self.multi = MultiRateLimiter()
        for tier, (index, cost) in enumerate(TIERS):
            self.multi.with_tier(str(tier), self.limiters[index], cost)
        self.tasks, self.grants = {}, {}

    def play(self, act, seconds=0.0):
        """Act inside the loop, let time pass, and let everything go on that can."""

        async def turn():
            result = act()
            await asyncio.sleep(seconds)
            await asyncio.sleep(HAIR)  # for timers of the same nanosecond, to which a sum of floats may be a hair short
            while self.loop._ready:  # noqa: ASYNC110 - nothing tells when a loop is idle
                await asyncio.sleep(0)
            self.model.advance(self.moment())
            self.compare()
            return result

        return self.loop.run_until_complete(turn())

    def moment(self):
        return round(self.loop.time() * 1e9)

    def charged(self, call):
        """The limiter, what to give it, and the charges of the model."""
        if isinstance(call, tuple):
            return self.limiters[call[0]], call[1], [call]
        names = set("01234") if call is None else call
        return self.multi, call, [(i, cost if str(tier) in names else 0) for tier, (i, cost) in enumerate(TIERS)]

    async def acquire(self, key, limiter, charge):
        await limiter.acquire(charge)
        self.grants[key] = self.moment()

    def refuses(self, error, charges):
        tier, wait = self.model.refusal(charges)
        assert error.tier == (None if len(charges) == 1 else str(tier))
        assert error.retry_after * 1e9 == pytest.approx(wait, abs=0.5)

    @rule(call=CALLS)
    def try_now(self, call):
        limiter, charge, charges = self.charged(call)
        waits = [self.model.wait(index, self.model.owed(charges, index)) for index in range(3)]

        def act():
            assert limiter.time_until(charge) * 1e9 == pytest.approx(max(waits), abs=0.5)
            try:
                limiter.try_acquire(charge)
            except RateLimitedError as error:
                self.refuses(error, charges)
            else:
                assert self.model.refusal(charges) is None
                self.model.take(charges)

        self.play(act)

    @rule(call=CALLS)
    def wait(self, call):
        limiter, charge, charges = self.charged(call)

        def act():
            key = len(self.tasks)
            self.tasks[key] = self.loop.create_task(self.acquire(key, limiter, charge))
            refusal = self.model.refusal(charges)
            if refusal is None:
                self.model.take(charges)
                self.model.grants[key] = self.model.now
            elif refusal[1] < math.inf:
                self.model.line.append((key, charges))
            return key, refusal

        key, refusal = self.play(act)
        if refusal and refusal[1] == math.inf:
            self.refuses(self.tasks[key].exception(), charges)

    @precondition(lambda self: self.model.line)
    @rule(place=st.integers(0, 7))
    def cancel(self, place):
        waiting = self.model.line[place % len(self.model.line)]

        def act():
            self.tasks[waiting[0]].cancel()
            self.model.line.remove(waiting)

        self.play(act)
        assert self.tasks[waiting[0]].cancelled()

    @rule(milliseconds=st.sampled_from([1, 3.3, 33.4, 100, 300]))
    def pass_time(self, milliseconds):
        self.play(lambda: None, milliseconds / 1e3)

    def compare(self):
        """The same were granted at the same moments, as many wait, and as much is left."""
        assert self.grants == self.model.grants
        for index, (limiter, budget) in enumerate(zip(self.limiters, self.model.budgets, strict=True)):
            shown = limiter.snapshot()
            assert shown.waiting == sum(index in self.model.touched(charges) for _, charges in self.model.line)
            assert budget.free_at(self.model.now, shown.available) == self.model.now
            if shown.used:
                assert budget.free_at(self.model.now, shown.available + 1) > self.model.now

    def teardown(self):
        async def leave():
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)

        self.loop.run_until_complete(leave())
        self.loop.close()
        assert [in_line(limiter) for limiter in self.limiters] == [0, 0, 0]


LimitersAgainstModel.TestCase.settings = settings(
    deadline=None,
    max_examples=100 if DEBUG else 1_000,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow],
)
test_limiters_against_the_model = pytest.mark.model(pytest.mark.timeout(120)(LimitersAgainstModel.TestCase))
