"""`CircuitBreaker` against a model that is too simple to be wrong, and under threads that hammer it."""

import asyncio
import contextlib
import itertools
import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from benches.pure_python import breaker as pure_python
from cano import CircuitBreaker, CircuitOpenError, CircuitPolicy, ConfigurationError, _core

pytestmark = pytest.mark.model

SUCCESS, FAILURE, IGNORED, DROPPED = "success", "failure", "ignored", "dropped"
RESET, PROBE, SLOW = 5, 7, 2  # seconds; the model counts in whole ones


class Model:
    """The rules, in whole seconds.

    `counted` says which of the ends of a closed period count, each (has failed, is slow); `trips`, whether they open it.
    """

    def __init__(self, counted, trips, places, *, has_slow):
        self.counted, self.trips, self.places, self.has_slow = counted, trips, places, has_slow
        self.state, self.epoch, self.numbers, self.changes = "closed", 0, itertools.count(), []
        self.begin("closed")

    def begin(self, state, until=0):
        if state != self.state:
            self.changes.append((self.state, state))
        self.state, self.until, self.epoch = state, until, self.epoch + 1
        self.ends, self.probes, self.successes = [], {}, 0

    def in_flight(self, now):
        return {number: start for number, start in self.probes.items() if now < start + PROBE}

    def acquire(self, now):
        if self.state == "open" and now >= self.until:
            self.begin("half-open")
        if self.retry_after(now) != 0:
            return None
        number = next(self.numbers)
        if self.state == "half-open":
            self.probes[number] = now
        return self.epoch, number, now

    def record(self, permit, outcome, now):
        epoch, number, start = permit
        has_failed, is_slow = outcome == FAILURE, self.has_slow and now >= start + SLOW
        if epoch != self.epoch or outcome in (IGNORED, DROPPED):
            self.probes.pop(number, None)
        elif self.state == "closed":
            self.ends = self.counted([*self.ends, (has_failed, is_slow)])
            if self.trips(self.ends):
                self.begin("open", now + RESET)
        elif number in self.in_flight(now):
            del self.probes[number]
            self.successes += 1
            if has_failed or is_slow:
                self.begin("open", now + RESET)
            elif self.successes == self.places:
                self.begin("closed")

    def retry_after(self, now):
        if self.state == "open":
            return None if self.until == math.inf else max(self.until - now, 0)
        starts = self.in_flight(now).values()
        return min(starts) + PROBE - now if len(starts) == self.places else 0

    def counts(self):
        return len(self.ends), sum(failed for failed, _ in self.ends), sum(slow for _, slow in self.ends)


def in_a_row(ends):
    return ends if ends[-1][0] else []


def last(calls):
    return lambda ends: ends[-calls:]


def reaches(minimum, *rates):
    def trips(ends):
        shares = [sum(flags) / len(ends) for flags in zip(*ends, strict=True)]
        return len(ends) >= minimum and any(share >= rate for share, rate in zip(shares, rates, strict=False))

    return trips


COMMON = {"reset_timeout": RESET, "probe_timeout": PROBE}
SLOW_CALLS = {"slow_call_duration": SLOW, "slow_call_rate": 0.6}
POLICIES = [
    # a policy; what counts, and what of it opens the breaker; whether there are slow calls
    (lambda places: CircuitPolicy(1, RESET, places, probe_timeout=PROBE), in_a_row, lambda ends: len(ends) >= 1, False),
    (lambda places: CircuitPolicy(3, RESET, places, probe_timeout=PROBE), in_a_row, lambda ends: len(ends) >= 3, False),
    (
        lambda places: CircuitPolicy.rate(0.5, calls=4, minimum_calls=2, half_open_max_calls=places, **COMMON),
        last(4),
        reaches(2, 0.5),
        False,
    ),
    (
        lambda places: CircuitPolicy.rate(1, calls=3, half_open_max_calls=places, **SLOW_CALLS, **COMMON),
        last(3),
        reaches(3, 1, 0.6),
        True,
    ),
]


class ByHand:
    """A call whose permit is given back by hand, or dropped."""

    def __init__(self, breaker):
        self.breaker, self.permit = breaker, breaker.try_acquire()

    def end(self, how):
        if how != DROPPED:
            record = getattr(self.breaker, f"record_{how}")
            record(self.permit)
            with pytest.raises(ConfigurationError):
                record(self.permit)
        del self.permit


class Wait:
    def __await__(self):
        yield


class Block:
    """A call in an `async with` block, whose coroutine is stepped by hand."""

    def __init__(self, breaker):
        async def block():
            async with breaker:
                await Wait()

        self.coroutine = block()
        self.coroutine.send(None)

    def end(self, how):
        with contextlib.suppress(StopIteration, KeyError, asyncio.CancelledError):
            if how == SUCCESS:
                self.coroutine.send(None)
            elif how != DROPPED:
                self.coroutine.throw(KeyError() if how == FAILURE else asyncio.CancelledError())
        self.coroutine.close()


STEPS = [
    *[("ask", kind) for kind in (ByHand, Block)] * 7,
    *[("end", how, place) for how in (SUCCESS, SUCCESS, FAILURE, FAILURE, IGNORED, DROPPED) for place in (0, 0.5, 1)],
    *[("wait", seconds) for seconds in (1, 1, 2, 2, 3, 4, 5, 5, 5, 7)],
    *[("force_open",), ("reset",)],
]


class BreakerAgainstModel(RuleBasedStateMachine):
    """Calls by hand and in blocks, any number of them open at once, ended in any order and in any way."""

    @initialize(policy=st.sampled_from(POLICIES), places=st.integers(1, 3))
    def begin(self, policy, places):
        self.now = 1000
        _core.set_virtual_time(self.now)
        make, counted, trips, has_slow = policy
        self.model = Model(counted, trips, places, has_slow=has_slow)
        self.told = []
        self.breaker = CircuitBreaker(
            make(places), on_change=lambda _, old, new: self.told.append((str(old), str(new)))
        )
        self.calls = []

    def teardown(self):
        for call, _ in self.calls:
            call.end(DROPPED)
        _core.set_virtual_time(None)

    @rule(what=st.sampled_from(STEPS))
    def step(self, what):
        action, *args = what
        getattr(self, action)(*args)

    def ask(self, kind):
        wait, expected = self.model.retry_after(self.now), self.model.acquire(self.now)
        if expected is not None:
            self.calls.append((kind(self.breaker), expected))
            return
        with pytest.raises(CircuitOpenError) as caught:
            kind(self.breaker)
        assert caught.value.retry_after == wait

    def end(self, how, place):
        if self.calls:
            call, expected = self.calls.pop(round(place * (len(self.calls) - 1)))
            self.model.record(expected, how, self.now)
            call.end(how)

    def wait(self, seconds):
        self.now += seconds
        _core.set_virtual_time(self.now)

    def force_open(self):
        self.model.begin("open", math.inf)
        self.breaker.force_open()

    def reset(self):
        self.model.begin("closed")
        self.breaker.reset()

    @invariant()
    def is_as_the_model_says(self):
        model, snapshot = self.model, self.breaker.snapshot()
        assert str(self.breaker.state) == str(snapshot.state) == model.state
        assert self.told == model.changes
        assert snapshot.probes == len(model.in_flight(self.now)) <= model.places
        assert snapshot.successes == (model.successes if model.state == "half-open" else 0)
        assert snapshot.retry_after == model.retry_after(self.now)
        assert snapshot.is_forced == (model.until == math.inf)
        assert (snapshot.calls, snapshot.failures, snapshot.slow_calls) == model.counts()


class TestBreakerAgainstModel(BreakerAgainstModel.TestCase):
    """A breaker does what the model does."""

    settings = settings(deadline=None, max_examples=1000, stateful_step_count=50)
    pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("seed", range(30))
def test_opponent_of_the_benchmarks(seed):
    """The breaker in plain Python that the benchmarks compare with does the same work."""
    dice, now = random.Random(seed), 1000
    options = {"failure_threshold": dice.randint(1, 3), "reset_timeout": 5, "half_open_max_calls": dice.randint(1, 3)}
    ours = CircuitBreaker(CircuitPolicy(**options, probe_timeout=4))
    theirs = pure_python.CircuitBreaker(**options, probe_timeout=4, clock=lambda: now)
    permits, states = [], set()

    try:
        for _ in range(500):
            roll = dice.random()
            if roll < 0.4:
                _core.set_virtual_time(now)
                try:
                    permits.append((ours.try_acquire(), theirs.try_acquire()))
                except CircuitOpenError as refusal:
                    with pytest.raises(pure_python.CircuitOpenError) as caught:
                        theirs.try_acquire()
                    assert refusal.retry_after == caught.value.retry_after  # noqa: PT017 - of both
            elif roll < 0.8 and permits:
                permit, same = permits.pop(dice.randrange(len(permits)))
                outcome = dice.choice(["record_success", "record_failure", "record_ignored"])
                getattr(ours, outcome)(permit)
                getattr(theirs, outcome)(same)
            else:
                now += dice.randint(1, 3)
                _core.set_virtual_time(now)
            states.add(theirs.state)
            assert str(ours.state) == theirs.state
    finally:
        _core.set_virtual_time(None)

    assert states == {"closed", "open", "half-open"}


# Threads

THREADS = 8


def hammer(work):
    """Lets threads do their work at once, switching often."""
    gate = threading.Barrier(THREADS)
    interval = sys.getswitchinterval()

    def begin(number):
        gate.wait()
        return work(number)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return [job.result() for job in [pool.submit(begin, number) for number in range(THREADS)]]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.timeout(60)
def test_no_call_of_a_thread_is_lost():
    """Of a million calls by eight threads every one is counted, with its outcome."""
    calls = 125_000
    breaker = CircuitBreaker(CircuitPolicy.rate(1, seconds=1_000_000, minimum_calls=1_000_000))

    def work(number):
        acquire = breaker.try_acquire
        record = breaker.record_failure if number % 2 else breaker.record_success
        for _ in range(calls):
            record(acquire())

    # CB-018
    hammer(work)

    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures) == (THREADS * calls, THREADS * calls // 2)
    assert str(snapshot.state) == "closed"


def test_no_failure_in_a_row_is_lost():
    """Failures in a row of several threads add up: the last of them opens the breaker, not one before."""
    breaker = CircuitBreaker(THREADS * 10_000)

    def work(_):
        for _ in range(10_000 - 1):
            breaker.record_failure(breaker.try_acquire())

    hammer(work)
    assert breaker.snapshot().failures == THREADS * (10_000 - 1)
    for _ in range(THREADS):
        assert str(breaker.state) == "closed"
        breaker.record_failure(breaker.try_acquire())
    assert str(breaker.state) == "open"


@pytest.mark.parametrize("places", [1, 3])
def test_never_more_probes_than_places(places):
    """However many threads ask, no more probes are in flight than there are places."""
    breaker = CircuitBreaker(1, 1e-9, half_open_max_calls=places)
    breaker.record_failure(breaker.try_acquire())
    in_flight = []

    def work(_):
        most = admitted = 0
        for _ in range(10_000):
            with contextlib.suppress(CircuitOpenError):
                permit = breaker.try_acquire()
                in_flight.append(1)
                most = max(most, len(in_flight))
                admitted += 1
                in_flight.pop()
                breaker.record_ignored(permit)
        return most, admitted

    results = hammer(work)

    assert max(most for most, _ in results) <= places
    assert sum(admitted for _, admitted in results) > 0
    assert breaker.snapshot().probes == 0


def test_every_change_is_told_once_among_threads():
    """With threads that open, probe, force and reset one breaker, the changes told add up to its state."""
    told = []
    breaker = CircuitBreaker(2, 1e-9, 2, on_change=lambda _, old, new: told.append((str(old), str(new))))

    def work(number):
        dice = random.Random(number)
        for _ in range(5_000):
            roll = dice.random()
            if roll < 0.01:
                breaker.force_open()
            elif roll < 0.1:
                breaker.reset()
            else:
                with contextlib.suppress(CircuitOpenError):
                    permit = breaker.try_acquire()
                    (breaker.record_failure if roll < 0.6 else breaker.record_success)(permit)

    hammer(work)

    state = str(breaker.state)
    for name in ("closed", "open", "half-open"):
        entered, left = sum(new == name for _, new in told), sum(old == name for old, _ in told)
        assert entered - left == (name == state) - (name == "closed")
    assert all(old != new for old, new in told)
