"""A call that returns at once, guarded by a circuit breaker that lets it through."""

from functools import partial
from time import thread_time

import pytest

import cano
from benches.compare import breakers
from benches.compare.breakers import coroutine, coroutines
from benches.pure_python.breaker import CircuitBreaker as PurePythonBreaker

pytestmark = pytest.mark.benchmark(timer=thread_time)

CALLS = 2_000
RATES = cano.CircuitPolicy.rate(0.5, seconds=60, slow_call_duration=2, slow_call_rate=0.8)
PEERS = {
    # name: the package, and what makes the loop
    "pybreaker": ("pybreaker", breakers.pybreaker),
    "aiobreaker": ("aiobreaker", breakers.aiobreaker),
    "purgatory": ("purgatory", breakers.purgatory),
    "purgatory, kept": ("purgatory", breakers.purgatory_kept),
}


def by_hand(breaker):
    async def loop():
        result = ""
        for _ in range(CALLS):
            permit = breaker.try_acquire()
            try:
                result = await coroutine()
            except Exception:
                breaker.record_failure(permit)
                raise
            except BaseException:
                breaker.record_ignored(permit)
                raise
            breaker.record_success(permit)
        return result

    return loop


def async_with(breaker):
    async def loop():
        result = ""
        for _ in range(CALLS):
            async with breaker:
                result = await coroutine()
        return result

    return loop


def async_with_guard(breaker):
    async def loop():
        result = ""
        for _ in range(CALLS):
            async with breaker.guard():
                result = await coroutine()
        return result

    return loop


def test_by_hand(versus):
    pairs = {
        "cano": (by_hand(cano.CircuitBreaker()), coroutines(CALLS)),
        "pure Python": (by_hand(PurePythonBreaker()), coroutines(CALLS)),
    }
    versus.added("added to a call, by hand", pairs, returns="done", per=CALLS)


def test_by_hand_with_rates(versus):
    pairs = {"cano": (by_hand(cano.CircuitBreaker(RATES)), coroutines(CALLS))}
    versus.added("... by rates over 60 s", pairs, returns="done", per=CALLS)


def test_async_with(versus):
    pairs = {
        "cano": (async_with(cano.CircuitBreaker()), coroutines(CALLS)),
        "pure Python": (async_with_guard(PurePythonBreaker()), coroutines(CALLS)),
    }
    versus.added("added to a call, by async with", pairs, returns="done", per=CALLS)


def looped(config):
    """A workflow of two states that lead to each other, until there were so many transitions."""
    left = CALLS // 2

    async def ping():
        return "pong"

    async def pong():
        nonlocal left
        left -= 1
        if left:
            return "ping"
        left = CALLS // 2
        return "done"

    workflow = cano.Workflow().add_exit_state("done")
    workflow.register("ping", ping, config=config).register("pong", pong, config=config)
    return partial(workflow.orchestrate, "ping")


def test_in_a_configuration(versus):
    config = cano.TaskConfig(retry=cano.RetryMode.exponential(), circuit_breaker=cano.CircuitBreaker())
    pairs = {"cano": (looped(config), looped(None))}
    versus.added("breaker + retry in a task's config, added to a transition", pairs, returns="done", per=CALLS)


@pytest.mark.parametrize("peer", PEERS)
def test_beside(versus, peer):
    package, make = PEERS[peer]
    pytest.importorskip(package, reason=f"{package} is not installed: make peers")
    pairs = {"cano": (by_hand(cano.CircuitBreaker()), coroutines(CALLS)), peer: make(CALLS)}
    versus.added(f"added to a call, beside {peer}", pairs, returns="done", per=CALLS)


@pytest.mark.parametrize("guard", [by_hand, async_with])
def test_whole_call(versus, guard):
    contenders = {"cano": guard(cano.CircuitBreaker()), "bare call": coroutines(CALLS)}
    title = f"a whole call, guarded {'by hand' if guard is by_hand else 'by async with'}"
    versus(title, contenders, returns="done", per=CALLS)
