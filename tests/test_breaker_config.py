"""A circuit breaker in a task's configuration: asked before each attempt, told how it ended."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from cano import (
    AttemptTimeoutError,
    CircuitBreaker,
    CircuitOpenError,
    CircuitPolicy,
    CircuitState,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    NonRetryable,
    RetryExhaustedError,
    RetryMode,
    TaskConfig,
    TaskResult,
    Workflow,
    WorkflowTimeoutError,
)

FOREVER = 3600.0


class Oops(Exception):
    """What a task raises."""


class Service:
    """A task that does what it is told, and counts."""

    name = "service"

    def __init__(self, *ends: Any) -> None:
        self.ends = list(ends)
        self.calls = 0

    async def run(self) -> str:
        self.calls += 1
        end = self.ends.pop(0) if self.ends else "end"
        if isinstance(end, float):
            await asyncio.sleep(end)
            return "end"
        if isinstance(end, BaseException):
            raise end
        return str(end)


def guarded(task: object, breaker: CircuitBreaker, **options: Any) -> Workflow[str]:
    config = TaskConfig(circuit_breaker=breaker, **options)
    return Workflow[str]().register("start", task, config=config).add_exit_state("end")


def failures(count: int) -> list[Oops]:
    return [Oops(number) for number in range(count)]


async def test_success_and_failure_are_told() -> None:
    """An attempt's outcome is recorded before its result is returned; a success starts the count anew."""
    # CB-003, CB-025
    breaker = CircuitBreaker(2)
    workflow = guarded(Service(Oops(), "end", Oops(), Oops()), breaker)

    for raises in (True, False, True):
        if raises:
            with pytest.raises(Oops):
                await workflow.orchestrate("start")
        else:
            assert await workflow.orchestrate("start") == "end"
        assert breaker.state is CircuitState.Closed
    with pytest.raises(Oops):
        await workflow.orchestrate("start")
    assert breaker.state is CircuitState.Open


async def test_open_breaker_spares_the_task() -> None:
    """The task is not called, the error is bare, and no attempt is used."""
    # CB-020
    breaker = CircuitBreaker(1, name="payments")
    breaker.force_open()
    service = Service()

    with pytest.raises(CircuitOpenError) as caught:
        await guarded(service, breaker, retry=RetryMode.fixed(5, 0.1)).orchestrate("start")

    assert service.calls == 0
    assert caught.value.breaker == "payments"
    assert (caught.value.state, caught.value.task, caught.value.attempt) == ("start", "service", 0)


async def test_tripping_in_mid_loop_stops_the_loop() -> None:
    """A threshold of 2 and 5 retries make 2 calls and a bare CircuitOpenError."""
    # CB-021
    service = Service(*failures(6))

    with pytest.raises(CircuitOpenError) as caught:
        await guarded(service, CircuitBreaker(2), retry=RetryMode.fixed(5, 0.1)).orchestrate("start")

    assert service.calls == 2
    assert caught.value.attempt == 2


async def test_timed_out_attempt_is_a_failure() -> None:
    """An attempt that takes too long is counted like one that raised."""
    # CB-022
    breaker = CircuitBreaker(1)

    with pytest.raises(AttemptTimeoutError):
        await guarded(Service(FOREVER), breaker, attempt_timeout=1).orchestrate("start")

    assert breaker.state is CircuitState.Open


@pytest.mark.virtual
async def test_fresh_call_after_the_reset_time_closes_it() -> None:
    """Once the reset time has passed a success closes it, also within the retry loop."""
    # CB-023
    breaker = CircuitBreaker(1, reset_timeout=10.0)
    service = Service(Oops())

    assert await guarded(service, breaker, retry=RetryMode.fixed(1, 11.0)).orchestrate("start") == "end"

    assert service.calls == 2
    assert breaker.state is CircuitState.Closed


async def test_one_breaker_is_shared() -> None:
    """The failures of one task open it for another, whose body is not called."""
    # CB-017
    breaker = CircuitBreaker(1)
    other = Service()
    with pytest.raises(Oops):
        await guarded(Service(Oops()), breaker).orchestrate("start")

    with pytest.raises(CircuitOpenError):
        await guarded(other, breaker).orchestrate("start")

    assert other.calls == 0


@pytest.mark.parametrize("ends", ["cancel", "run timeout", "KeyboardInterrupt"])
@pytest.mark.parametrize("state", ["closed", "half-open"])
async def test_attempt_that_is_cut_counts_as_neither(ends: str, state: str) -> None:
    """B12: a cancel, the end of the run's budget and a BaseException free the place and change nothing else."""
    breaker = CircuitBreaker(1, reset_timeout=0.001)
    if state == "half-open":
        with pytest.raises(Oops):
            await guarded(Service(Oops()), breaker).orchestrate("start")
        await asyncio.sleep(0.01)
    task = Service(KeyboardInterrupt() if ends == "KeyboardInterrupt" else FOREVER)
    workflow = guarded(task, breaker)
    if ends == "KeyboardInterrupt":
        coroutine = workflow.orchestrate("start")
        with pytest.raises(KeyboardInterrupt):
            coroutine.send(None)
    elif ends == "run timeout":
        with pytest.raises(WorkflowTimeoutError):
            await workflow.orchestrate("start", timeout=1)
    else:
        run = asyncio.create_task(workflow.orchestrate("start"))
        await asyncio.sleep(0.01)
        assert breaker.snapshot().probes == (state == "half-open")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    assert breaker.snapshot().probes == 0
    assert breaker.state is (CircuitState.HalfOpen if state == "half-open" else CircuitState.Closed)
    assert await guarded(Service(), breaker).orchestrate("start") == "end"
    assert breaker.state is CircuitState.Closed


async def test_half_open_lets_one_of_many_runs_through() -> None:
    """Of runs that start together, one is the probe."""
    # CB-006
    breaker = CircuitBreaker(1, reset_timeout=0.001)
    with pytest.raises(Oops):
        await guarded(Service(Oops()), breaker).orchestrate("start")
    await asyncio.sleep(0.01)

    workflow = guarded(Service(0.01), breaker)
    ended = await asyncio.gather(*(workflow.orchestrate("start") for _ in range(3)), return_exceptions=True)

    assert [type(end) for end in ended] == [str, CircuitOpenError, CircuitOpenError]


async def test_what_a_task_returns_is_not_the_breakers_affair() -> None:
    """A task that returned has succeeded, whether its value is a state or not."""
    breaker = CircuitBreaker(1)

    with pytest.raises(Exception, match="neither registered"):
        await guarded(Service("nowhere"), breaker).orchestrate("start")

    assert breaker.state is CircuitState.Closed


async def test_non_retryable_error_is_a_failure() -> None:
    """Whether an error is worth a retry is not the breaker's question."""
    breaker = CircuitBreaker(1)

    with pytest.raises(NonRetryable):
        await guarded(Service(NonRetryable("no")), breaker, retry=RetryMode.fixed(3, 0.1)).orchestrate("start")

    assert breaker.state is CircuitState.Open


async def test_exhausted_retries_with_a_patient_breaker() -> None:
    """A breaker that stays closed changes nothing about retries."""
    breaker = CircuitBreaker(10)

    with pytest.raises(RetryExhaustedError):
        await guarded(Service(*failures(3)), breaker, retry=RetryMode.fixed(2, 0.1)).orchestrate("start")

    assert breaker.snapshot().failures == 3


async def test_branches_are_guarded() -> None:
    """Each branch of a split asks; losers that are cancelled count as neither."""
    breaker = CircuitBreaker(2)

    class Branch(Service):
        config = TaskConfig(circuit_breaker=breaker)

    join = JoinConfig(JoinStrategy.Any, "end")
    losers = [Branch(FOREVER) for _ in range(5)]
    workflow = Workflow[str]().register_split("start", [*losers, Branch(0.01)], join).add_exit_state("end")
    assert await workflow.orchestrate("start") == "end"
    assert (breaker.state, breaker.snapshot().failures) == (CircuitState.Closed, 0)

    failing = [Branch(Oops()) for _ in range(4)]
    split = Workflow[str]().register_split("start", failing, JoinConfig(JoinStrategy.All, "end")).add_exit_state("end")
    with pytest.raises(JoinError) as caught:
        await split.orchestrate("start")
    assert [type(error) for error in caught.value.exceptions] == [Oops, Oops, CircuitOpenError, CircuitOpenError]
    assert [branch.calls for branch in failing] == [1, 1, 0, 0]


async def test_fork_is_guarded() -> None:
    """States that a branch runs through ask as well."""
    breaker = CircuitBreaker(1)
    breaker.force_open()
    workflow = (
        Workflow[str]()
        .register("fork", lambda: TaskResult.Split(["start"]), join=JoinConfig(JoinStrategy.All, "end"))
        .register("start", Service(), config=TaskConfig(circuit_breaker=breaker))
        .add_exit_state("end")
    )

    with pytest.raises(JoinError) as caught:
        await workflow.orchestrate("fork")

    assert isinstance(caught.value.exceptions[0], CircuitOpenError)


@pytest.mark.virtual
async def test_slow_calls_open_it() -> None:
    """A policy that counts slow calls sees how long an attempt took."""
    breaker = CircuitBreaker(CircuitPolicy.rate(calls=2, minimum_calls=2, slow_call_duration=1.0, slow_call_rate=1.0))
    workflow = guarded(Service(2.0, 2.0), breaker)

    await workflow.orchestrate("start")
    assert breaker.state is CircuitState.Closed
    await workflow.orchestrate("start")
    assert breaker.state is CircuitState.Open


async def test_loop_of_many_guarded_states() -> None:
    """Plain functions, coroutines that do not suspend, and those that do, are all guarded."""
    breaker = CircuitBreaker(1)
    config = TaskConfig(circuit_breaker=breaker)
    left = iter(range(3_000))

    async def suspends() -> str:
        await asyncio.sleep(0)
        return "plain"

    async def turns() -> str:
        return "suspends" if next(left, None) is not None else "fails"

    def fails() -> str:
        raise Oops

    workflow = (
        Workflow[str]()
        .register("plain", lambda: "turns", config=config)
        .register("turns", turns, config=config)
        .register("suspends", suspends, config=config)
        .register("fails", fails, config=config)
        .add_exit_state("end")
    )
    with pytest.raises(Oops):
        await workflow.orchestrate("plain")

    assert breaker.state is CircuitState.Open


async def test_config_keeps_its_breaker() -> None:
    """Copies share it; anything else is refused."""
    breaker = CircuitBreaker()
    config = TaskConfig().with_circuit_breaker(breaker)

    assert config.with_fixed_retry(1, 0).circuit_breaker is breaker
    assert config.with_circuit_breaker(None) == TaskConfig()
    with pytest.raises(ConfigurationError, match="circuit_breaker must be a CircuitBreaker"):
        TaskConfig(circuit_breaker=5)  # type: ignore[arg-type]


async def test_breaker_is_freed_with_its_workflow() -> None:
    """Nothing keeps a breaker that was in flight, nor the run that it let through."""
    breaker = CircuitBreaker()
    gone = weakref.ref(breaker)
    run = asyncio.create_task(guarded(Service(FOREVER), breaker).orchestrate("start"))
    del breaker
    await asyncio.sleep(0.01)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    del run
    await asyncio.sleep(0)  # the loop's handle that is under way refers to it
    gc.collect()

    assert gone() is None
