"""A rate limiter in a task's configuration: charged before each attempt, which waits for its turn."""

import asyncio

import pytest

from cano import (
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    JoinConfig,
    JoinStrategy,
    MultiRateLimiter,
    RateLimitedError,
    RateLimiter,
    RateLimiterPolicy,
    TaskConfig,
    WindowedRateLimiter,
    WindowPolicy,
    Workflow,
    WorkflowTimeoutError,
)


class Oops(Exception):
    """What a task raises."""


def now() -> float:
    return asyncio.get_running_loop().time()


def bucket(tokens: int = 1) -> RateLimiter:
    return RateLimiter(RateLimiterPolicy(tokens, 1.0))


def limited(limiter: object, *, fails: int = 0, **options: object) -> tuple[Workflow[str], list[float]]:
    """A workflow of one limited task, and the moments of its attempts since now."""
    moments: list[float] = []
    began = now()

    async def task() -> str:
        moments.append(round(now() - began, 6))
        if len(moments) <= fails:
            raise Oops
        return "end"

    config = TaskConfig(rate_limiter=limiter, **options)  # type: ignore[arg-type]
    return Workflow[str]().register("start", task, config=config).add_exit_state("end"), moments


@pytest.mark.virtual
@pytest.mark.parametrize(
    "limiter",
    [
        bucket,
        lambda: WindowedRateLimiter(WindowPolicy(1, 1.0)),
        lambda: MultiRateLimiter().with_tier("a", bucket()).with_tier("b", bucket(5), 2),
    ],
    ids=["bucket", "window", "multi"],
)
async def test_attempts_wait_for_their_turn(limiter) -> None:
    """Three runs at once take a second each after the first, whichever kind of limiter it is."""
    # RL-004
    workflow, moments = limited(limiter())

    await asyncio.gather(*(workflow.orchestrate("start") for _ in range(3)))

    assert moments == pytest.approx([0, 1, 2], abs=1e-3)


@pytest.mark.virtual
async def test_each_attempt_is_charged() -> None:
    """A retry waits for the limiter as well, after its pause."""
    config = TaskConfig().with_fixed_retry(2, 0.25)
    workflow, moments = limited(bucket(), fails=2, retry=config.retry)

    await workflow.orchestrate("start")

    assert moments == pytest.approx([0, 1, 2], abs=1e-3)


@pytest.mark.virtual
async def test_wait_is_no_part_of_the_attempt() -> None:
    """The time limit of an attempt begins when the limiter has let it through."""
    limiter = bucket()
    limiter.try_acquire()
    workflow, moments = limited(limiter, attempt_timeout=0.5)

    assert await workflow.orchestrate("start") == "end"
    assert moments == pytest.approx([1], abs=1e-3)


@pytest.mark.virtual
async def test_wait_counts_for_the_run() -> None:
    """A run whose budget ends while it waits is over, and nothing was taken."""
    limiter = bucket()
    limiter.try_acquire()
    workflow, moments = limited(limiter)

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate("start", timeout=0.5)

    assert moments == []
    assert limiter.snapshot().waiting == 0
    await asyncio.sleep(0.5)
    limiter.try_acquire()


@pytest.mark.virtual
async def test_cancelled_wait_hands_the_turn_on() -> None:
    """B55: the next in line comes at the moment that the cancelled one would have had."""
    limiter = bucket()
    limiter.try_acquire()
    workflow, moments = limited(limiter)
    first = asyncio.create_task(workflow.orchestrate("start"))
    second = asyncio.create_task(workflow.orchestrate("start"))
    await asyncio.sleep(0.25)
    first.cancel()

    assert await second == "end"
    assert moments == pytest.approx([1], abs=1e-3)


async def test_impossible_cost_ends_the_state() -> None:
    """B44: a tier that can never grant its cost is an error, not a wait."""
    limiter = MultiRateLimiter().with_tier("small", bucket(), 2)
    workflow, moments = limited(limiter)

    with pytest.raises(RateLimitedError) as caught:
        await workflow.orchestrate("start")

    assert (caught.value.tier, caught.value.state, moments) == ("small", "start", [])


@pytest.mark.virtual
async def test_nobody_waits_for_an_open_breaker() -> None:
    """An open circuit breaker is asked first: no wait, and nothing taken."""
    limiter, breaker = bucket(), CircuitBreaker()
    limiter.try_acquire()
    breaker.force_open()
    workflow, moments = limited(limiter, circuit_breaker=breaker)
    began = now()

    with pytest.raises(CircuitOpenError):
        await workflow.orchestrate("start")

    assert (now() - began, moments, limiter.snapshot().waiting) == (0, [], 0)


@pytest.mark.virtual
async def test_breaker_that_opens_during_the_wait_is_heeded() -> None:
    """The breaker is asked again when the limiter has let the attempt through."""
    limiter, breaker = bucket(), CircuitBreaker()
    limiter.try_acquire()
    workflow, moments = limited(limiter, circuit_breaker=breaker)
    run = asyncio.create_task(workflow.orchestrate("start"))
    await asyncio.sleep(0.5)
    breaker.force_open()

    with pytest.raises(CircuitOpenError):
        await run
    assert moments == []


@pytest.mark.virtual
async def test_branches_share_a_limit() -> None:
    """Branches of one split, and of several, stand in one line."""
    limiter = bucket(2)
    moments: list[float] = []
    began = now()

    class Branch:
        config = TaskConfig(rate_limiter=limiter)

        async def run(self) -> None:
            moments.append(round(now() - began, 6))

    workflow = (
        Workflow[str]()
        .register_split("start", [Branch() for _ in range(3)], JoinConfig(JoinStrategy.All, "end"))
        .add_exit_state("end")
    )
    await asyncio.gather(workflow.orchestrate("start"), workflow.orchestrate("start"))

    assert moments == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0], abs=1e-3)


async def test_config_keeps_its_limiter() -> None:
    """Copies share it; anything else is refused."""
    limiter = bucket()
    config = TaskConfig().with_rate_limiter(limiter)

    assert config.with_fixed_retry(1, 0).rate_limiter is limiter
    assert config.with_rate_limiter(None) == TaskConfig()
    with pytest.raises(ConfigurationError, match="rate_limiter must be a RateLimiter"):
        TaskConfig(rate_limiter=5)  # type: ignore[arg-type]
