"""`CircuitBreaker`: states, permits, policies, `async with`, and what it tells others."""

import asyncio
import contextlib
import copy
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from cano import (
    CanoError,
    CircuitBreaker,
    CircuitOpenError,
    CircuitPolicy,
    CircuitSnapshot,
    CircuitState,
    ConfigurationError,
    Permit,
    Res,
    Resources,
    Workflow,
    _core,
    testing,
)

CLOSED, OPEN, HALF_OPEN = CircuitState.Closed, CircuitState.Open, CircuitState.HalfOpen
MOMENT = 0.001


class Clock:
    """The clock of the breakers of this thread."""

    def __init__(self):
        self.now = 1000.0
        _core.set_virtual_time(self.now)

    def advance(self, seconds):
        self.now += seconds
        _core.set_virtual_time(self.now)


@pytest.fixture
def clock():
    yield Clock()
    _core.set_virtual_time(None)


def succeed(breaker, calls=1):
    for _ in range(calls):
        breaker.record_success(breaker.try_acquire())


def fail(breaker, calls=1):
    for _ in range(calls):
        breaker.record_failure(breaker.try_acquire())


def refused(breaker):
    with pytest.raises(CircuitOpenError) as caught:
        breaker.try_acquire()
    return caught.value


def half_open(clock, **options):
    """A breaker that the next call which asks makes half-open."""
    breaker = CircuitBreaker(1, 30, **options)
    fail(breaker)
    clock.advance(30)
    return breaker


# States


def test_defaults():
    """Five failures in a row open a breaker for 30 s, after which one probe closes it; a probe has 60 s."""
    policy = CircuitBreaker().policy

    # CB-001
    assert (policy.failure_threshold, policy.reset_timeout, policy.half_open_max_calls) == (5, 30.0, 1)
    assert policy.probe_timeout == 60.0
    assert policy == CircuitPolicy()


@pytest.mark.parametrize("threshold", [1, 2, 5, 100])
def test_opens_at_the_threshold(threshold):
    """A breaker starts closed, opens after exactly so many failures in a row, and then refuses."""
    breaker = CircuitBreaker(threshold)

    # CB-002, CB-004
    fail(breaker, threshold - 1)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN
    assert refused(breaker).category == "circuit"


def test_success_between_failures():
    """A success begins the count of failures anew."""
    breaker = CircuitBreaker(3)

    # CB-003
    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)

    assert breaker.state is CLOSED
    assert breaker.snapshot().failures == 2


def test_open_until_a_call_asks(clock):
    """An open breaker becomes half-open when a call asks after the reset time, not before and not by being looked at."""
    breaker = CircuitBreaker(1, 30)
    fail(breaker)

    # CB-005
    clock.advance(29.999)
    assert refused(breaker).retry_after == pytest.approx(0.001)
    clock.advance(0.001)
    assert (breaker.state, breaker.snapshot().state, repr(breaker)) == (
        OPEN,
        OPEN,
        "<CircuitBreaker is open; it lets the next call through>",
    )
    breaker.try_acquire()
    assert breaker.state is HALF_OPEN


@pytest.mark.parametrize("probes", [1, 2, 7])
def test_half_open_admits_so_many_at_once(clock, probes):
    """A half-open breaker lets so many calls through at once, and refuses the next."""
    breaker = half_open(clock, half_open_max_calls=probes)

    # CB-006
    permits = [breaker.try_acquire() for _ in range(probes)]
    assert breaker.snapshot().probes == len(permits)
    refused(breaker)


@pytest.mark.parametrize("probes", [1, 2, 7])
def test_probes_close_it(clock, probes):
    """So many successful probes close the breaker, with no failure counted."""
    breaker = half_open(clock, half_open_max_calls=probes)

    # CB-007
    succeed(breaker, probes - 1)
    assert breaker.state is (OPEN if probes == 1 else HALF_OPEN)
    succeed(breaker)
    assert breaker.snapshot() == CircuitSnapshot(
        state=CLOSED, is_forced=False, calls=0, failures=0, slow_calls=0, probes=0, successes=0, retry_after=0.0
    )


def test_failed_probe_opens_it_again(clock):
    """One probe that fails opens the breaker again, for the whole reset time."""
    breaker = half_open(clock, half_open_max_calls=3)
    succeed(breaker, 2)

    # CB-008
    fail(breaker)

    assert breaker.state is OPEN
    assert refused(breaker).retry_after == 30.0


def test_probe_gives_its_place_to_the_next(clock):
    """A probe that has ended frees its place, so that more probes than places may be let through."""
    breaker = half_open(clock, half_open_max_calls=2)
    kept = breaker.try_acquire()

    # CB-009
    for _ in range(5):
        breaker.record_ignored(breaker.try_acquire())

    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 1)
    breaker.record_success(kept)


def test_successes_of_an_earlier_half_open_period(clock):
    """Successes of probes do not outlast a probe that fails."""
    breaker = half_open(clock, half_open_max_calls=2)
    succeed(breaker)
    fail(breaker)
    clock.advance(30)

    # CB-010
    succeed(breaker)
    assert (breaker.state, breaker.snapshot().successes) == (HALF_OPEN, 1)
    succeed(breaker)
    assert breaker.state is CLOSED


def test_success_of_a_call_from_before_it_opened(clock):
    """A call that was let through while the breaker was closed cannot close it when it is half-open."""
    breaker = CircuitBreaker(1, 30)
    early = breaker.try_acquire()
    fail(breaker)
    clock.advance(30)
    probe = breaker.try_acquire()

    # CB-012
    breaker.record_success(early)
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 1)
    breaker.record_success(probe)
    assert breaker.state is CLOSED


@pytest.mark.parametrize("record", ["record_success", "record_failure", "record_ignored"])
def test_late_outcomes_change_nothing(clock, record):
    """The outcome of a call from an earlier period changes nothing, whatever the state is now."""
    breaker = CircuitBreaker(2, 30, half_open_max_calls=2)
    late = [breaker.try_acquire()]
    fail(breaker, 2)
    end = getattr(breaker, record)

    # CB-013, CB-014
    end(late.pop())
    assert refused(breaker).retry_after == 30.0
    clock.advance(30)
    late = [breaker.try_acquire(), breaker.try_acquire()]
    breaker.record_failure(late.pop())
    clock.advance(10)
    end(late.pop())
    assert refused(breaker).retry_after == 20.0
    clock.advance(20)
    late = [breaker.try_acquire()]
    succeed(breaker, 2)
    fail(breaker)
    end(late.pop())
    assert (breaker.state, breaker.snapshot().failures) == (CLOSED, 1)


def test_full_cycle(clock):
    """Opened, probed in vain, opened again, probed, closed: afterwards the whole threshold counts again."""
    breaker = CircuitBreaker(2, 30)

    # CB-015
    fail(breaker, 2)
    clock.advance(30)
    fail(breaker)
    assert breaker.state is OPEN
    clock.advance(30)
    succeed(breaker)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_one_breaker_for_two_callers():
    """What one caller's failures open is open for the other, who is not called."""
    breaker = CircuitBreaker(2)
    called = []

    async def caller(name, error):
        async with breaker:
            called.append(name)
            raise error

    async def main():
        for name in ("first", "first", "second"):
            with contextlib.suppress(KeyError, CircuitOpenError):
                await caller(name, KeyError())

    testing.run(main())

    # CB-017
    assert called == ["first", "first"]
    assert breaker.state is OPEN


def test_probe_that_never_ends(clock):
    """A probe that is never given back holds its place until `probe_timeout`, and counts for nothing then."""
    breaker = CircuitBreaker(CircuitPolicy(1, 30, probe_timeout=5))
    fail(breaker)
    clock.advance(30)
    stuck = breaker.try_acquire()

    # B13
    clock.advance(4)
    assert refused(breaker).retry_after == 1.0
    clock.advance(1)
    probe = breaker.try_acquire()
    breaker.record_failure(stuck)
    assert breaker.state is HALF_OPEN
    breaker.record_success(probe)
    assert breaker.state is CLOSED


def test_longest_times(clock):
    """A reset time of ten years, at the end of the clock, breaks nothing."""
    breaker = CircuitBreaker(1, timedelta(days=3652.5))

    # B14
    fail(breaker)
    for now in (0.0, 1e9, 1.8e10, 1e300):
        _core.set_virtual_time(now)
        breaker.snapshot()
        with contextlib.suppress(CircuitOpenError):
            breaker.try_acquire()
    breaker.reset()

    succeed(breaker)
    assert breaker.state is CLOSED


def test_clock_of_the_loop():
    """Under a virtual clock the reset time is the loop's."""
    breaker = CircuitBreaker(1, 3600)

    async def main():
        fail(breaker)
        await asyncio.sleep(3599)
        assert refused(breaker).retry_after == pytest.approx(1)
        await asyncio.sleep(1)
        succeed(breaker)

    testing.run(main())

    assert breaker.state is CLOSED


def test_clock_of_the_system():
    """Elsewhere it is the system's."""
    breaker = CircuitBreaker(1, 1e-9)

    fail(breaker)

    assert breaker.try_acquire()


# Rates


def test_failure_rate_of_the_last_calls():
    """A share of failures among the last calls opens the breaker, once there are enough of them."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, calls=10, minimum_calls=4))

    fail(breaker, 3)
    assert breaker.state is CLOSED
    breaker.reset()
    succeed(breaker, 4)
    fail(breaker, 3)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_window_of_calls_forgets():
    """Only the last so many calls count."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, calls=4))

    fail(breaker)
    succeed(breaker, 4)
    fail(breaker)
    assert (breaker.snapshot().calls, breaker.snapshot().failures) == (4, 1)
    fail(breaker)
    assert breaker.state is OPEN


def test_success_can_open_it():
    """The rate is looked at after every outcome, so that a success may be the call that completes the minimum."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, calls=10, minimum_calls=4))

    fail(breaker, 3)
    succeed(breaker)

    assert breaker.state is OPEN


def test_window_of_time_forgets(clock):
    """Only the calls of the last so many seconds count."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, seconds=60, minimum_calls=4))

    fail(breaker, 3)
    clock.advance(60)
    assert breaker.snapshot().calls == 0
    fail(breaker, 3)
    clock.advance(30)
    assert breaker.snapshot().calls == 3
    succeed(breaker)
    assert breaker.state is OPEN


@pytest.mark.parametrize("record", ["record_success", "record_failure"])
def test_slow_calls(clock, record):
    """A share of slow calls opens the breaker, however they end; a call is slow from its duration on."""
    breaker = CircuitBreaker(CircuitPolicy.rate(calls=4, slow_call_duration=2, slow_call_rate=0.5))

    def call(seconds):
        permit = breaker.try_acquire()
        clock.advance(seconds)
        getattr(breaker, record)(permit)

    call(1.999)
    call(1.999)
    call(2)
    assert (breaker.state, breaker.snapshot().slow_calls) == (CLOSED, 1)
    call(2)
    assert breaker.state is OPEN


def test_slow_probe(clock):
    """A probe that is a slow call opens the breaker again, although it succeeded."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, calls=1, slow_call_duration=2, slow_call_rate=1))
    fail(breaker)
    clock.advance(30)
    probe = breaker.try_acquire()
    clock.advance(2)

    breaker.record_success(probe)

    assert breaker.state is OPEN


def test_ignored_calls_are_not_in_the_window():
    """An ignored outcome is none of the calls of a rate."""
    breaker = CircuitBreaker(CircuitPolicy.rate(0.5, calls=4))

    for _ in range(10):
        breaker.record_ignored(breaker.try_acquire())

    assert breaker.snapshot().calls == 0


# Policies

POLICIES = [
    pytest.param(CircuitPolicy(3, 1.5, 2, probe_timeout=7), id="failures in a row"),
    pytest.param(CircuitPolicy.rate(0.25, calls=20), id="of calls"),
    pytest.param(CircuitPolicy.rate(0.25, seconds=timedelta(minutes=1), minimum_calls=3), id="of seconds"),
    pytest.param(CircuitPolicy.rate(calls=5, slow_call_duration=2, slow_call_rate=0.1, reset_timeout=1), id="slow"),
    pytest.param(
        CircuitPolicy.rate(
            1, seconds=5, slow_call_duration=2, slow_call_rate=1, half_open_max_calls=3, probe_timeout=0.1
        ),
        id="either",
    ),
]


def test_attributes_of_a_policy():
    """A policy tells what it was made of; what it does not have is None."""
    row = CircuitPolicy(3, 1.5, 2, probe_timeout=7)
    rate = CircuitPolicy.rate(0.25, seconds=60, slow_call_duration=2, slow_call_rate=0.1)

    # CB-019
    assert (row.failure_threshold, row.reset_timeout, row.half_open_max_calls, row.probe_timeout) == (3, 1.5, 2, 7.0)
    assert (row.failure_rate, row.calls, row.seconds, row.minimum_calls) == (None,) * 4
    assert (row.slow_call_duration, row.slow_call_rate) == (None, None)
    assert (rate.failure_threshold, rate.failure_rate, rate.calls, rate.seconds) == (None, 0.25, None, 60.0)
    assert (rate.minimum_calls, rate.slow_call_duration, rate.slow_call_rate) == (10, 2.0, 0.1)


@pytest.mark.parametrize(("calls", "minimum"), [(1, 1), (9, 9), (10, 10), (100, 10)])
def test_minimum_of_a_small_window(calls, minimum):
    """By default a rate needs ten calls, or as many as the window holds."""
    assert CircuitPolicy.rate(0.5, calls=calls).minimum_calls == minimum


@pytest.mark.parametrize("policy", POLICIES)
def test_repr_of_a_policy(policy):
    """The repr of a policy makes an equal one."""
    assert eval(repr(policy), {"CircuitPolicy": CircuitPolicy}) == policy  # noqa: S307 - the test itself


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_of_a_policy(policy):
    """Copies and pickles are equal, and hash alike."""
    copies = [copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]  # noqa: S301 - our own

    assert copies == [policy] * 3
    assert {hash(one) for one in copies} == {hash(policy)}


def test_different_policies():
    """Policies that differ in anything are not equal."""
    policies = [
        CircuitPolicy(),
        CircuitPolicy(4),
        CircuitPolicy(probe_timeout=1),
        *(case.values[0] for case in POLICIES),
    ]

    assert [one == other for one in policies for other in policies].count(True) == len(policies)
    assert CircuitPolicy() != 5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        pytest.param(
            lambda: CircuitPolicy.rate(0.5), "a rate needs a window: calls or seconds, got neither", id="none"
        ),
        pytest.param(
            lambda: CircuitPolicy.rate(0.5, calls=1, seconds=1),
            "a rate has one window: calls or seconds, got both",
            id="both",
        ),
        pytest.param(
            lambda: CircuitPolicy.rate(calls=1),
            "a rate needs failure_rate or slow_call_rate, got neither",
            id="no rate",
        ),
        pytest.param(
            lambda: CircuitPolicy.rate(0.5, calls=1, slow_call_rate=1),
            "slow_call_rate needs slow_call_duration, got None",
            id="no duration",
        ),
        pytest.param(
            lambda: CircuitPolicy.rate(calls=1, slow_call_duration=1),
            "slow_call_duration needs slow_call_rate, got None",
            id="no slow rate",
        ),
        pytest.param(
            lambda: CircuitPolicy.rate(0.5, calls=3, minimum_calls=4),
            "minimum_calls must be at most the calls of the window (3), got 4",
            id="minimum",
        ),
        pytest.param(
            lambda: CircuitBreaker(CircuitPolicy(), 30),
            "reset_timeout and half_open_max_calls are the policy's: CircuitBreaker(CircuitPolicy(...))",
            id="policy and time",
        ),
        pytest.param(
            lambda: CircuitPolicy(0), "failure_threshold must be at least 1 and at most 1000000, got 0", id="0"
        ),
        pytest.param(lambda: CircuitPolicy(1, 0), "reset_timeout must be above 0, got 0", id="no time"),
    ],
)
def test_what_does_not_fit_together(call, text):
    """The message says what is wrong, the value, and what would be right."""
    with pytest.raises(ConfigurationError) as caught:
        call()

    assert str(caught.value) == text


def test_async_callback_is_refused():
    """An async function cannot be called back, which is said when the breaker is made."""

    async def on_change(breaker, old, new):
        pass

    with pytest.raises(ConfigurationError, match=r"on_change must be a function of .* that is not async"):
        CircuitBreaker(on_change=on_change)


# Permits


def test_permit_is_used_once():
    """A permit that has been used is refused, whatever the outcome, and counts no second time."""
    breaker = CircuitBreaker(2)
    permit = breaker.try_acquire()
    breaker.record_failure(permit)

    for record in (breaker.record_success, breaker.record_failure, breaker.record_ignored):
        with pytest.raises(ConfigurationError, match="the permit has been used; it is good for one call"):
            record(permit)
    assert breaker.snapshot().failures == 1
    assert repr(permit) == "<Permit, used>"


def test_permit_of_another_breaker():
    """A permit is taken back by its own breaker only; being refused elsewhere does not use it up."""
    breaker, other = CircuitBreaker(1), CircuitBreaker(1)
    permit = breaker.try_acquire()

    # B13
    for record in (other.record_success, other.record_failure, other.record_ignored):
        with pytest.raises(ConfigurationError, match="the permit is of another circuit breaker") as caught:
            record(permit)
        assert isinstance(caught.value, ValueError)
    assert (other.state, repr(permit)) == (CLOSED, "<Permit, unused>")
    breaker.record_failure(permit)
    assert breaker.state is OPEN


def test_dropped_permit_counts_for_nothing(clock):
    """A permit that is dropped is given back as ignored: in closed nothing happens, in half-open its place is free."""
    breaker = CircuitBreaker(1, 30)

    # CB-011, B12
    breaker.try_acquire()
    assert (breaker.state, breaker.snapshot().calls) == (CLOSED, 0)
    fail(breaker)
    clock.advance(30)
    permit = breaker.try_acquire()
    refused(breaker)
    del permit
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 0)
    succeed(breaker)
    assert breaker.state is CLOSED


def test_permit_outlives_its_breaker():
    """A permit may be dropped after its breaker."""
    permit = CircuitBreaker().try_acquire()

    gc.collect()

    assert repr(permit) == "<Permit, unused>"


def test_permit_cannot_be_made_or_copied():
    """Only a breaker makes permits, and there is one of each."""
    permit = CircuitBreaker().try_acquire()

    for make in (Permit, lambda: copy.copy(permit), lambda: copy.deepcopy(permit), lambda: pickle.dumps(permit)):
        with pytest.raises(TypeError):
            make()


def test_permit_taken_back_in_another_thread():
    """A permit may be given back by any thread."""
    breaker = CircuitBreaker(1)
    permit = breaker.try_acquire()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(breaker.record_failure, permit).result()

    assert breaker.state is OPEN


def test_failing_threads():
    """Six threads of 30 failing calls each leave an open breaker, none of them stuck."""
    breaker = CircuitBreaker(5)

    def work():
        for _ in range(30):
            with contextlib.suppress(CircuitOpenError):
                fail(breaker)

    # CB-018
    with ThreadPoolExecutor(6) as pool:
        for job in [pool.submit(work) for _ in range(6)]:
            job.result()

    assert breaker.state is OPEN


def test_breaker_as_a_resource():
    """A breaker is a resource like any other, used by hand."""
    breaker = CircuitBreaker(1)

    async def call(res: Resources):
        same = res.get("breaker", CircuitBreaker)
        permit = same.try_acquire()
        same.record_failure(permit)
        return "done"

    workflow = Workflow({"breaker": breaker}).register("call", call).add_exit_state("done")

    # CB-026
    assert testing.run(workflow.orchestrate("call")) == "done"
    assert breaker.state is OPEN


# async with


async def guarded(breaker, error=None):
    async with breaker:
        if error:
            raise error
        return "value"


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        pytest.param(None, 0, id="nothing"),
        pytest.param(KeyError("no"), 2, id="Exception"),
        pytest.param(TimeoutError(), 2, id="TimeoutError"),
        pytest.param(ExceptionGroup("two", [KeyError()]), 2, id="group"),
        pytest.param(asyncio.CancelledError("enough"), 1, id="CancelledError"),
        pytest.param(BaseExceptionGroup("two", [asyncio.CancelledError()]), 1, id="group of cancels"),
        pytest.param(Odd(), 1, id="BaseException"),
    ],
)
async def test_outcome_of_a_block(error, failures):
    """The end of a block is a success, an Exception a failure, any other way out neither; the exception goes on."""
    breaker = CircuitBreaker(5)
    fail(breaker)

    raised = None
    try:
        assert await guarded(breaker, error) == "value"
    except BaseException as came:
        raised = came

    assert raised is error
    assert breaker.snapshot().failures == failures


async def test_block_of_an_open_breaker():
    """The block of an open breaker is not entered."""
    breaker = CircuitBreaker(1, name="payments")
    breaker.force_open()
    entered = []

    with pytest.raises(CircuitOpenError, match="circuit breaker payments is forced open"):
        async with breaker:
            entered.append(1)

    assert entered == []


@pytest.mark.virtual
async def test_cancelled_probe_frees_its_place():
    """A block that is cancelled counts as neither; the next call is the probe."""
    breaker = CircuitBreaker(1, 30)
    fail(breaker)
    await asyncio.sleep(30)

    async def call():
        async with breaker:
            await asyncio.sleep(3600)

    # B12
    task = asyncio.create_task(call())
    await asyncio.sleep(1)
    refused(breaker)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 0)
    assert await guarded(breaker) == "value"
    assert breaker.state is CLOSED


@pytest.mark.virtual
async def test_timeouts_around_and_inside_a_block():
    """A timeout inside the block is a failure; one around it cancels the block, which is ignored."""
    breaker = CircuitBreaker(5)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), breaker:
            await asyncio.sleep(60)
    assert breaker.snapshot().calls == 0
    with pytest.raises(TimeoutError):
        async with breaker, asyncio.timeout(1):
            await asyncio.sleep(60)
    assert breaker.snapshot().failures == 1


async def test_blocks_of_many_tasks_do_not_mix():
    """Each block has its own permit: one from before the breaker opened ends late, and is not taken for the probe."""
    breaker = CircuitBreaker(1)
    late, probe = asyncio.Event(), asyncio.Event()

    async def call(end, error=None):
        async with breaker:
            await end.wait()
            if error:
                raise error

    early = [asyncio.create_task(call(late)), asyncio.create_task(call(late, KeyError()))]
    await asyncio.sleep(0)
    breaker.force_open()
    breaker.reset()
    fail(breaker)
    breaker.reset()
    current = asyncio.create_task(call(probe))
    await asyncio.sleep(0)

    late.set()
    await asyncio.wait(early)
    assert (breaker.state, breaker.snapshot().failures) == (CLOSED, 0)
    probe.set()
    await current
    with pytest.raises(KeyError):
        await early[1]


def reopened(clock, **options):
    """A half-open breaker, and a block that was opened while it was closed."""
    breaker = CircuitBreaker(1, 30, **options)
    early = stepped(breaker)
    fail(breaker)
    clock.advance(30)
    return breaker, early


def stepped(breaker):
    """A generator that stays inside its block until it is stepped again, or closed."""

    async def stream():
        async with breaker:
            yield "inside"

    generator = stream()
    assert step(generator.__anext__()) == "inside"
    return generator


def step(awaitable):
    """What an awaitable that does not suspend returns."""
    try:
        next(awaitable.__await__())
    except StopIteration as stop:
        return stop.value
    raise AssertionError


def ended(generator):
    with pytest.raises(StopAsyncIteration):
        step(generator.__anext__())


def test_generators_interleaved_in_one_task(clock):
    """Blocks of one task that end in another order than they began keep their permits apart."""
    breaker, early = reopened(clock)
    probe = stepped(breaker)

    ended(early)
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 1)
    ended(probe)
    assert breaker.state is CLOSED


def test_generators_closed_in_the_order_they_began(clock):
    """A generator that is closed in its block gives its own permit back, as ignored."""
    breaker, early = reopened(clock)
    probe = stepped(breaker)

    step(early.aclose())
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 1)
    step(probe.aclose())
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 0)


async def test_generator_finished_by_another_task():
    """A generator that is left in its block is ended by the event loop in a task of its own: the place is free."""
    breaker = CircuitBreaker(1, MOMENT)
    fail(breaker)
    await asyncio.sleep(MOMENT)

    async def stream():
        async with breaker:
            yield 1
            yield 2

    async for _ in stream():
        break
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 0)


def test_nested_blocks(clock):
    """Blocks of one breaker may be nested; each has a permit, and a place when it is a probe."""
    breaker = half_open(clock, half_open_max_calls=2)

    async def main():
        async with breaker:
            async with breaker:
                assert breaker.snapshot().probes == 2
            assert (breaker.snapshot().probes, breaker.snapshot().successes) == (1, 1)

    testing.run(main(), start=clock.now)

    assert breaker.state is CLOSED


async def test_exit_stacks_closed_in_the_order_they_were_opened():
    """An AsyncExitStack keeps a block's permit, too, whichever stack is closed first."""
    breaker = CircuitBreaker(1, MOMENT)
    early, probe = contextlib.AsyncExitStack(), contextlib.AsyncExitStack()
    await early.enter_async_context(breaker)
    fail(breaker)
    await asyncio.sleep(MOMENT)
    await probe.enter_async_context(breaker)

    await early.aclose()
    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 1)
    await probe.aclose()
    assert breaker.state is CLOSED


async def test_two_breakers_in_one_statement():
    """Blocks of several breakers in one statement have the permits of their own breakers."""
    one, other = CircuitBreaker(1), CircuitBreaker(1)

    with pytest.raises(KeyError):
        async with one, other:
            raise KeyError

    assert (one.state, other.state) == (OPEN, OPEN)


def test_block_that_is_dropped(clock):
    """A coroutine that is dropped inside its block frees the place."""
    breaker = half_open(clock)

    async def hang():
        async with breaker:
            await Hang()

    coroutine = hang()
    coroutine.send(None)
    refused(breaker)
    del coroutine

    assert (breaker.state, breaker.snapshot().probes) == (HALF_OPEN, 0)


class Hang:
    def __await__(self):
        yield


def test_end_of_a_block_that_is_dropped(clock):
    """The permit of a block is its end's: it is free as soon as nobody can end the block any more."""
    breaker = half_open(clock)
    end = breaker.__aexit__
    step(breaker.__aenter__())
    refused(breaker)

    del end

    assert breaker.snapshot().probes == 0


def test_enter_by_hand():
    """Whoever calls `__aenter__` without an end to give the permit to is told what to use, and no permit is lost."""
    breaker, other = CircuitBreaker(), CircuitBreaker()
    end = other.__aexit__

    for enter in (breaker.__aenter__, lambda: CircuitBreaker.__aenter__(breaker)):
        with pytest.raises(ConfigurationError, match=r"entered by async with; to do it by hand, use try_acquire\(\)"):
            enter()
    del end


def test_end_by_hand():
    """An end ends the one block that it was looked up for, once."""
    breaker = CircuitBreaker(1)
    end = breaker.__aexit__
    step(breaker.__aenter__())

    step(end(KeyError, KeyError(), None))
    assert breaker.state is OPEN
    with pytest.raises(ConfigurationError, match="the permit has been used"):
        end(None, None, None)
    with pytest.raises(ConfigurationError, match="no async with block has begun that this __aexit__ could end"):
        breaker.__aexit__(None, None, None)


def test_blocks_in_threads():
    """Threads that enter blocks of one breaker at the same time, each in its own loop, have permits of their own."""
    breaker = CircuitBreaker(CircuitPolicy.rate(1, calls=10_000, minimum_calls=10_000))
    gate = threading.Barrier(4)

    async def call(number):
        gate.wait()
        for _ in range(500):
            with contextlib.suppress(KeyError):
                await guarded(breaker, KeyError() if number == 0 else None)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(asyncio.run, call(number)) for number in range(4)]:
            job.result()

    assert (breaker.snapshot().calls, breaker.snapshot().failures) == (2000, 500)


def test_breaker_is_an_async_context_manager():
    """A breaker counts as an asynchronous context manager, and not as a plain one."""
    assert isinstance(CircuitBreaker(), contextlib.AbstractAsyncContextManager)
    assert not isinstance(CircuitBreaker(), contextlib.AbstractContextManager)


# Forced open, reset


def test_forced_open(clock):
    """A breaker that is forced open stays open until it is reset; nobody is told a time."""
    breaker = CircuitBreaker(1, 30, name="payments")

    breaker.force_open()
    clock.advance(1_000_000)

    error = refused(breaker)
    assert (error.breaker, error.retry_after) == ("payments", None)
    assert str(error) == "circuit breaker payments is forced open; only reset() closes it"
    assert (breaker.state, breaker.snapshot().is_forced, breaker.snapshot().retry_after) == (OPEN, True, None)
    breaker.reset()
    assert (breaker.state, breaker.snapshot().is_forced, breaker.snapshot().retry_after) == (CLOSED, False, 0.0)


def test_forced_while_open(clock):
    """Forcing an open breaker keeps it open beyond its reset time."""
    breaker = CircuitBreaker(1, 30)
    fail(breaker)

    breaker.force_open()
    clock.advance(30)

    assert refused(breaker).retry_after is None


def test_reset_forgets():
    """A reset begins anew: no failures, and none of those to come from calls in flight."""
    breaker = CircuitBreaker(2)
    late = breaker.try_acquire()
    fail(breaker)

    breaker.reset()
    breaker.record_failure(late)

    assert breaker.snapshot().failures == 0


# What it tells


def test_text_of_a_breaker(clock):
    """The text of a breaker says what it does with the next call, and until when."""
    breaker = CircuitBreaker(1, 30, name="payments")
    texts = [repr(breaker)]
    fail(breaker)
    clock.advance(17.7)
    texts.append(repr(breaker))
    clock.advance(12.3)
    probe = breaker.try_acquire()
    texts.append(repr(breaker))
    breaker.record_ignored(probe)
    texts.append(repr(breaker))

    # CB-019
    assert texts == [
        "<CircuitBreaker payments is closed>",
        "<CircuitBreaker payments is open; it lets a call through again in 12.300 s>",
        "<CircuitBreaker payments is half-open, with all its probes in flight; it lets a call through in at most 60.000 s>",
        "<CircuitBreaker payments is half-open; it lets the next call through>",
    ]


def test_error_of_an_open_breaker(clock):
    """The error has the breaker's name and the time until it lets a call through, in its text and as attributes."""
    breaker = CircuitBreaker(1, 30, name="payments")
    fail(breaker)
    clock.advance(17.7)

    error = refused(breaker)
    assert isinstance(error, CanoError)
    assert (error.breaker, error.retry_after) == ("payments", pytest.approx(12.3))
    assert str(error) == "circuit breaker payments is open; it lets a call through again in 12.300 s"
    assert str(refused_by_nameless()) == "circuit breaker is forced open; only reset() closes it"


def refused_by_nameless():
    breaker = CircuitBreaker()
    breaker.force_open()
    return refused(breaker)


def test_retry_after_is_when_a_call_is_let_through(clock):
    """A call that asks again after `retry_after` is let through, and none before."""
    breaker = CircuitBreaker(CircuitPolicy(1, 30.7, probe_timeout=0.3))
    fail(breaker)
    clock.advance(1.3)

    for _ in range(2):  # open, then half-open
        wait = refused(breaker).retry_after
        clock.advance(wait - 1e-6)
        refused(breaker)
        clock.advance(2e-6)
        kept = breaker.try_acquire()
    del kept


def test_states():
    """A state is a member of an Enum whose text is its name in messages."""
    assert [str(state) for state in CircuitState] == ["closed", "open", "half-open"]
    assert pickle.loads(pickle.dumps(CircuitState.HalfOpen)) is CircuitState.HalfOpen  # noqa: S301 - our own
    assert {CircuitBreaker().state: 1}[CircuitState.Closed] == 1


def test_snapshot_is_a_record():
    """A snapshot does not change, compares by value, and pickles."""
    breaker = CircuitBreaker(3)
    fail(breaker, 2)

    before = breaker.snapshot()
    fail(breaker)

    assert (before.state, before.failures, before.calls) == (CLOSED, 2, 2)
    assert pickle.loads(pickle.dumps(before)) == before != breaker.snapshot()  # noqa: S301 - our own
    with pytest.raises(AttributeError):
        before.failures = 5


def test_breaker_cannot_be_copied():
    """A breaker is shared as the object it is."""
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            make(CircuitBreaker())


# on_change


class Changes:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def __call__(self, breaker, old, new):
        assert breaker.state is new
        self.told.append((str(old), str(new)))


def test_every_change_is_told_once(clock):
    """`on_change` is told each change of state, and nothing that is none."""
    changes = Changes()
    breaker = CircuitBreaker(1, 30, on_change=changes)

    fail(breaker)
    refused(breaker)
    clock.advance(30)
    breaker.try_acquire()
    fail(breaker)
    clock.advance(30)
    succeed(breaker)
    succeed(breaker)
    breaker.reset()
    breaker.force_open()
    breaker.force_open()
    breaker.reset()

    assert changes.told == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
        ("closed", "open"),
        ("open", "closed"),
    ]


async def test_change_by_a_block():
    """`on_change` is told what the blocks change, too, by the time they are entered or left."""
    changes = Changes()
    breaker = CircuitBreaker(1, MOMENT, on_change=changes)

    with pytest.raises(KeyError):
        await guarded(breaker, KeyError())
    await asyncio.sleep(MOMENT)
    async with breaker:
        assert changes.told == [("closed", "open"), ("open", "half-open")]
    assert changes.told[2:] == [("half-open", "closed")]


@pytest.mark.parametrize("error", [KeyError("no"), asyncio.CancelledError(), KeyboardInterrupt()], ids=repr)
def test_callback_that_raises(monkeypatch, error):
    """What `on_change` raises is reported as unraisable, and the call that made the change knows nothing of it."""
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)

    def on_change(breaker, old, new):
        raise error

    breaker = CircuitBreaker(1, 1e-9, on_change=on_change)
    fail(breaker)
    succeed(breaker)

    assert breaker.state is CLOSED
    assert [(report.exc_value, report.object) for report in reports] == [(error, on_change)] * 3


def test_callback_that_uses_the_breaker():
    """`on_change` may call anything of the breaker, since no lock is held: here it closes it at once."""
    told = []

    def on_change(breaker, old, new):
        told.append(new)
        breaker.snapshot()
        if new is OPEN:
            breaker.reset()
            fail(breaker) if len(told) < 10 else None

    breaker = CircuitBreaker(1, on_change=on_change)
    fail(breaker)

    assert breaker.state is CLOSED
    assert told[:2] == [OPEN, CLOSED]


def test_cycles_are_collected():
    """A breaker whose callback, permit and open block belong to the same object goes with it."""

    class Owner:
        def __init__(self):
            self.breaker = CircuitBreaker(on_change=self.on_change)
            self.permit = self.breaker.try_acquire()
            self.generator = stepped(self.breaker)

        def on_change(self, breaker, old, new):
            pass

    owner = Owner()
    gone = [weakref.ref(owner), weakref.ref(owner.breaker)]

    del owner
    gc.collect()

    assert [ref() for ref in gone] == [None, None]


def test_injected_by_annotation():
    """A task may ask for a breaker by annotating a parameter."""
    from typing import Annotated  # noqa: PLC0415

    async def call(breaker: Annotated[CircuitBreaker, Res("breaker")]):
        async with breaker:
            return "done"

    workflow = Workflow({"breaker": CircuitBreaker()}).register("call", call).add_exit_state("done")

    assert testing.run(workflow.orchestrate("call")) == "done"
