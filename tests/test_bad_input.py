"""What is refused, when, and with what: a table of bad inputs, and a walk over every public parameter."""

import asyncio
import contextlib
import enum
import inspect
import math
import tempfile
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest

import cano
from cano import (
    After,
    BatchTask,
    Bulkhead,
    CanoError,
    CheckpointRow,
    CircuitBreaker,
    CircuitPolicy,
    CompensatableTask,
    ConfigurationError,
    Continue,
    Done,
    DuplicateResourceError,
    FromResources,
    HealthStatus,
    InMemoryCheckpointStore,
    ItemErrorPolicy,
    JoinConfig,
    JoinStrategy,
    JsonCodec,
    MemoryStore,
    More,
    MultiRateLimiter,
    NonRetryable,
    Pending,
    PollErrorPolicy,
    PollTask,
    RateLimiter,
    RateLimiterPolicy,
    Ready,
    Res,
    ResourceNotFoundError,
    Resources,
    ResourceTypeError,
    RetryAfter,
    RetryMode,
    RowKind,
    SqliteCheckpointStore,
    Stop,
    StreamWindow,
    Task,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    Until,
    WindowedRateLimiter,
    WindowPolicy,
    Workflow,
    in_thread,
    recover_all,
    testing,
)


class S(enum.Enum):
    START = 1
    DONE = 2


def start():
    return S.DONE


def simple(task=start, **options):
    return Workflow(**options).register(S.START, task).add_exit_state(S.DONE)


def durable():
    return simple().with_checkpoint_store(InMemoryCheckpointStore())


ALL = JoinConfig(JoinStrategy.All, S.DONE)


exponential = TaskConfig().with_exponential_retry


def bucket():
    return RateLimiter(RateLimiterPolicy.per_second(10))


def window():
    return WindowedRateLimiter(WindowPolicy.per_second(10))


def tiers():
    return MultiRateLimiter().with_tier("calls", bucket())


def refusal(call, *args):
    with pytest.raises(ConfigurationError) as caught:
        call(*args)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


async def started(**options):
    run = simple().start(**({"initial_state": S.START} | options))
    return await run


def orchestrated(**options):
    return testing.run(simple().orchestrate(**({"initial_state": S.START} | options)))


class Batch(BatchTask):
    name = "batch"

    def load(self):
        return []

    def process_item(self, item):
        return item

    def finish(self, outcomes):
        return S.DONE


class Configured(Task):
    def run(self):
        return S.DONE


class Polls(PollTask):
    def poll(self):
        return Ready(S.DONE)


def with_stream(name):
    """A stream with an attribute."""

    def make(value):
        stream = Items()
        setattr(stream, name, value)
        defined(Workflow().register_stream(S.START, stream))

    return make


def with_attribute(kind, name):
    """A task of this kind with an attribute."""

    def make(value):
        task = kind()
        setattr(task, name, value)
        defined(simple(task))

    return make


# Durations

SECONDS = {
    "BatchTask": ("item_timeout of batch", with_attribute(Batch, "item_timeout")),
    "Workflow.with_timeout": ("timeout", lambda value: Workflow().with_timeout(value)),
    "Workflow.orchestrate": ("timeout", lambda value: orchestrated(timeout=value)),
    "Workflow.start": ("timeout", lambda value: testing.run(started(timeout=value))),
    "JoinConfig": ("timeout", lambda value: JoinConfig(JoinStrategy.All, S.DONE, timeout=value)),
    "JoinConfig.with_timeout": ("timeout", ALL.with_timeout),
    "TaskConfig": ("attempt_timeout", lambda value: TaskConfig(attempt_timeout=value)),
    "TaskConfig.with_attempt_timeout": ("attempt_timeout", lambda value: TaskConfig().with_attempt_timeout(value)),
    "TaskConfig.with_fixed_retry": ("delay", lambda value: TaskConfig().with_fixed_retry(1, value)),
    "TaskConfig.with_exponential_retry": ("base", lambda value: exponential(1, value, max_delay=315_576_000)),
    "RetryMode.fixed": ("delay", lambda value: RetryMode.fixed(1, value)),
    "RetryMode.exponential": ("max_delay", lambda value: RetryMode.exponential(1, 0, max_delay=value)),
    "RetryAfter": ("delay", RetryAfter),
    "Pending": ("delay", Pending),
    "After": ("seconds", After),
}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(-1, id="negative"),
        pytest.param(-1e-9, id="just below zero"),
        pytest.param(math.nan, id="nan"),
        pytest.param(math.inf, id="inf"),
        pytest.param(-math.inf, id="-inf"),
        pytest.param(1e30, id="1e30"),
        pytest.param(315_576_001, id="above ten years"),
        pytest.param(2**70, id="2**70"),
        pytest.param(10**400, id="beyond a float"),
        pytest.param(timedelta.max, id="timedelta.max"),
        pytest.param(timedelta(microseconds=-1), id="negative timedelta"),
        pytest.param(True, id="bool"),
        pytest.param("5", id="text"),
        pytest.param(b"5", id="bytes"),
        pytest.param(Decimal(5), id="Decimal"),
        pytest.param(Fraction(5), id="Fraction"),
        pytest.param(5j, id="complex"),
        pytest.param([5], id="list"),
    ],
)
def test_duration_out_of_range(value):
    """A duration is seconds as a number or a timedelta, 0 to ten years; all else is refused by the parameter's name."""
    texts = {place: refusal(call, value) for place, (_, call) in SECONDS.items()}

    assert [place for place, text in texts.items() if not text.startswith(f"{SECONDS[place][0]} must be ")] == []


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0, id="zero"),
        pytest.param(-0.0, id="minus zero"),
        pytest.param(0.5, id="float"),
        pytest.param(5, id="int"),
        pytest.param(315_576_000, id="ten years"),
        pytest.param(timedelta(seconds=5), id="timedelta"),
        pytest.param(timedelta(), id="no timedelta"),
    ],
)
def test_duration_in_range(value):
    """Every duration from 0 to ten years is accepted, as int, float or timedelta."""
    for place, (_, call) in SECONDS.items():
        if place not in ("Workflow.orchestrate", "Workflow.start"):  # they would end by a timeout of 0
            call(value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        pytest.param(
            lambda: Workflow().with_timeout(-1),
            "timeout must be at least 0 and at most ten years (315576000 s), got -1",
            id="number",
        ),
        pytest.param(
            lambda: Workflow().with_timeout("5"),
            "timeout must be seconds as a number or a timedelta, got '5' (str)",
            id="text",
        ),
        pytest.param(
            lambda: Workflow().with_timeout(seconds=True),
            "timeout must be seconds as a number or a timedelta, got True (bool)",
            id="bool",
        ),
    ],
)
def test_duration_message(call, text):
    """The message has the parameter, the rule and the value."""
    assert refusal(call) == text


# Other numbers

NOT_A_NUMBER = [True, "1", b"1", Decimal(1), Fraction(1), 1j, [1], None]
NOT_A_COUNT = [*NOT_A_NUMBER, 1.0, math.nan, 2**63, 10**400]
CANNOT_LAST = [0, -1, math.nan, math.inf, 1e30, timedelta(), timedelta.max, True, "5", Decimal(5)]


def slow_calls(**options):
    return CircuitPolicy.rate(calls=9, **{"slow_call_duration": 1, "slow_call_rate": 0.5} | options)


NOT_A_COST = [*NOT_A_NUMBER, 1.0, math.nan]
NOT_A_COUNT = [*NOT_A_COST, 2**63, 10**400]
NO_WIDTH = [0, -0.0, timedelta(), -1, math.nan, math.inf, 315_576_001]


def cases(*groups):
    """One case per value of each group: (name, call, values)."""
    return [
        pytest.param(name, call, value, id=f"{name}-{type(value).__name__}-{str(value)[:12]}")
        for name, call, values in groups
        for value in values
    ]


@pytest.mark.parametrize(
    ("name", "call", "value"),
    cases(
        ("retries", lambda value: RetryMode.fixed(value, 0), [-1, 1_000_001, *NOT_A_COUNT]),
        ("retries", lambda value: TaskConfig().with_fixed_retry(value, 0), [-1, 1_000_001, True, 1.0]),
        ("retries", RetryMode.exponential, [-1, 1_000_001, True, 1.0, "3"]),
        ("retries", exponential, [-1, 1_000_001, True, 1.0, "3"]),
        ("n", JoinStrategy.Quorum, [0, -1, *NOT_A_COUNT]),
        ("n", JoinStrategy.PartialResults, [0, -1, *NOT_A_COUNT]),
        ("p", JoinStrategy.Percentage, [0, -0.1, 1.000001, math.nan, math.inf, *NOT_A_NUMBER]),
        ("factor", lambda value: RetryMode.exponential(factor=value), [0.5, 0, -1, math.nan, math.inf, True, "2"]),
        ("jitter", lambda value: RetryMode.exponential(jitter=value), [-0.1, 1.5, math.nan, math.inf, True, "0"]),
        ("factor", lambda value: exponential(factor=value), [0.5, math.nan, True]),
        ("jitter", lambda value: exponential(jitter=value), [-0.1, 1.5, True]),
        ("base", lambda value: RetryMode.exponential(1, value, max_delay=1), [1.5, timedelta(seconds=2)]),
        ("bulkhead", ALL.with_bulkhead, [0, -1, True, 1.0, "2", [1]]),
        ("failure_threshold", CircuitPolicy, [0, -1, 1_000_001, True, 1.0, "5", 2**70]),  # CB-016
        ("failure_threshold", CircuitBreaker, [0, -1, 1_000_001, True, 1.0, "5", 2**70]),
        ("half_open_max_calls", lambda value: CircuitPolicy(5, 30, value), [0, -1, 10_001, 2**31, True, 1.0]),  # CB-016
        ("half_open_max_calls", lambda value: CircuitBreaker(5, 30, value), [0, -1, 10_001, 2**31, True, 1.0]),
        ("reset_timeout", lambda value: CircuitPolicy(5, value), CANNOT_LAST),
        ("reset_timeout", lambda value: CircuitBreaker(5, value), CANNOT_LAST),
        ("probe_timeout", lambda value: CircuitPolicy(probe_timeout=value), CANNOT_LAST),
        ("failure_rate", lambda value: CircuitPolicy.rate(value, calls=9), [0, -0.1, 1.001, math.nan, True, "1"]),
        ("calls", lambda value: CircuitPolicy.rate(0.5, calls=value), [0, -1, 10_001, True, 1.0]),
        ("seconds", lambda value: CircuitPolicy.rate(0.5, seconds=value), CANNOT_LAST),
        ("minimum_calls", lambda value: CircuitPolicy.rate(0.5, calls=9, minimum_calls=value), [0, -1, 10, True, 1.0]),
        ("minimum_calls", lambda value: CircuitPolicy.rate(0.5, seconds=9, minimum_calls=value), [0, 1_000_001, True]),
        ("slow_call_duration", lambda value: slow_calls(slow_call_duration=value), CANNOT_LAST),
        ("slow_call_rate", lambda value: slow_calls(slow_call_rate=value), [0, -0.1, 1.001, math.nan, True, "1"]),
        ("bulkhead", lambda value: JoinConfig(JoinStrategy.All, S.DONE, bulkhead=value), [0, -1, True, 1.0, "2"]),
        ("concurrency", with_attribute(Batch, "concurrency"), [0, -1, *NOT_A_COUNT[:-2]]),
        ("limit", Bulkhead, [0, -1, 1_000_000_001, *NOT_A_COUNT]),
        ("n", StreamWindow.Count, [0, -1, 1_000_000_001, *NOT_A_COUNT]),
        ("seconds", StreamWindow.Duration, [0, -1, math.nan, 315_576_001, *NOT_A_NUMBER[:-1]]),
        ("retries", PollErrorPolicy.RetryOnError, [-1, 1_000_001, *NOT_A_COUNT]),
        ("retries", ItemErrorPolicy.Retry, [-1, 1_000_001, *NOT_A_COUNT]),
        ("fail_fast", lambda value: JoinConfig(JoinStrategy.All, S.DONE, fail_fast=value), [0, 1, None, "yes"]),
        # RL-010, WN-007
        ("tokens", RateLimiterPolicy.per_second, [0, -1, 1_000_000_001, *NOT_A_COUNT]),
        ("period", lambda value: RateLimiterPolicy(1, value), [*NO_WIDTH, *NOT_A_NUMBER]),
        ("max_tokens", lambda value: RateLimiterPolicy(1, 1, max_tokens=value), [0, -1, 1_000_000_001, True, 1.0, "1"]),
        ("burst", lambda value: RateLimiterPolicy.per_hour(1, burst=value), [-1, 1_000_000_001, True, 1.0, "1"]),
        ("limit", WindowPolicy.per_day, [0, -1, 1_000_000_001, *NOT_A_COUNT]),
        ("seconds", lambda value: WindowPolicy(1, value), [*NO_WIDTH, *NOT_A_NUMBER]),
        ("cost", lambda value: bucket().try_acquire(value), [-1, -(2**70), *NOT_A_COST]),
        ("cost", lambda value: window().acquire(value), [-1, -(2**70), *NOT_A_COST]),
        ("cost", lambda value: bucket().time_until(value), [-1, -(2**70), *NOT_A_COST]),
        ("cost", lambda value: tiers().with_tier("x", bucket(), value), [-1, -(2**70), *NOT_A_COST]),
    ),
)
def test_number_out_of_range(name, call, value):
    """A number of the wrong type or out of its range is refused by the parameter's name."""
    assert refusal(call, value).startswith(f"{name} ")


@pytest.mark.parametrize(
    ("call", "value"),
    [
        pytest.param(lambda value: RetryMode.fixed(value, 0), 1_000_000, id="retries"),
        pytest.param(lambda value: RetryMode.fixed(value, 0), 0, id="no retries"),
        pytest.param(JoinStrategy.Percentage, 1, id="p of 1"),
        pytest.param(JoinStrategy.Percentage, 5e-324, id="the smallest p"),
        pytest.param(lambda value: RetryMode.exponential(factor=value), 1, id="factor of 1"),
        pytest.param(lambda value: RetryMode.exponential(jitter=value), 1, id="full jitter"),
        pytest.param(lambda value: RetryMode.exponential(1, value, max_delay=value), 0, id="base of nothing"),
        pytest.param(ALL.with_bulkhead, 10**30, id="bulkhead beyond any split"),
        pytest.param(Bulkhead, 1_000_000_000, id="shared bulkhead"),
        pytest.param(CircuitPolicy, 1_000_000, id="failure threshold"),
        pytest.param(lambda value: CircuitPolicy(1, 1, value), 10_000, id="probes"),
        pytest.param(lambda value: CircuitPolicy(1, value), 315_576_000, id="reset after ten years"),  # B14
        pytest.param(lambda value: CircuitPolicy(1, value), 1e-12, id="reset at once"),
        pytest.param(lambda value: CircuitPolicy.rate(0.5, calls=value), 10_000, id="window of calls"),
        pytest.param(lambda value: CircuitPolicy.rate(value, calls=1), 1, id="failure rate of 1"),
        pytest.param(lambda value: CircuitPolicy.rate(0.5, calls=9, minimum_calls=value), 9, id="a full window"),
        pytest.param(RateLimiterPolicy.per_second, 1_000_000_000, id="tokens"),
        pytest.param(lambda value: RateLimiterPolicy(1, value), 1e-9, id="the shortest period"),
        pytest.param(lambda value: WindowPolicy(1, value), 315_576_000, id="the longest window"),
        pytest.param(lambda value: tiers().with_tier("x", bucket(), value), 10**30, id="cost beyond any capacity"),
        pytest.param(with_attribute(Batch, "concurrency"), 10**30, id="concurrency beyond any batch"),
    ],
)
def test_number_at_its_limit(call, value):
    """The limits themselves are accepted."""
    call(value)


# Texts

IDS = [
    lambda value: Workflow().with_workflow_id(value),
    lambda value: orchestrated(workflow_id=value),
    lambda value: testing.run(started(workflow_id=value)),
]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param(" \t", id="blank"),
        pytest.param("x" * 257, id="257 bytes"),
        pytest.param("é" * 129, id="258 bytes in 129 characters"),
        pytest.param("a\nb", id="newline"),
        pytest.param("a\x00b", id="NUL"),
        pytest.param("a\x1b[31m", id="escape"),
        pytest.param("a\x7f", id="DEL"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param("a\u202eb", id="direction override"),
        pytest.param("\u2028", id="line separator"),
        pytest.param(5, id="number"),
        pytest.param(b"x", id="bytes"),
        pytest.param(["x"], id="list"),
        pytest.param(S.START, id="Enum member"),
    ],
)
def test_workflow_id_out_of_range(value):
    """A workflow id is a printable text of 1 to 256 bytes that is not blank."""
    for call in IDS:
        assert refusal(call, value).startswith("workflow_id must ")


@pytest.mark.parametrize(
    "value", ["x", "x" * 256, "é" * 128, "order 1/ü", "日本", None], ids=lambda value: str(value)[:9]
)
def test_workflow_id_in_range(value):
    """Every such text is accepted, and None for none."""
    assert orchestrated(workflow_id=value) is S.DONE


@pytest.mark.parametrize("value", ["", 5, b"x", ["x"], True], ids=repr)
def test_workflow_name(value):
    """A workflow's name is a text that is not empty."""
    assert refusal(lambda: Workflow(name=value)).startswith("name must ")
    assert refusal(lambda: Workflow.bare(name=value)).startswith("name must ")


@pytest.mark.parametrize("value", ["", 5, b"x", ["x"], True, "a\nb", "\ud800", "x" * 129], ids=repr)
def test_limiter_name(value):
    """The name of a limiter or a tier is a printable text of 1 to 128 bytes."""
    policy, width = RateLimiterPolicy.per_second(1), WindowPolicy.per_second(1)

    assert refusal(lambda: RateLimiter(policy, name=value)).startswith("name must ")
    assert refusal(lambda: WindowedRateLimiter(width, name=value)).startswith("name must ")
    assert refusal(lambda: tiers().with_tier(value, bucket())).startswith("name must ")


@pytest.mark.parametrize("value", [None, 5, "Healthy", "", S.START], ids=repr)
def test_health_level(value):
    """A health level is one of three words."""
    assert refusal(HealthStatus, value).startswith("level must be 'healthy', 'degraded' or 'unhealthy', got ")


@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb", "\ud800", 5, b"x", ["x"], True], ids=repr)
def test_breaker_name(value):
    """A breaker's name is a printable text of 1 to 128 bytes."""
    assert refusal(lambda: CircuitBreaker(name=value)).startswith("name must ")


# Definitions


class Steps:
    """A stepped task that returns its results in turn, the last one for ever."""

    def __init__(self, *results):
        self.results = list(results)

    def step(self, _cursor):
        return self.results.pop(0) if len(self.results) > 1 else self.results[0]


class Items:
    """A stream of one item, whose window has the given verdicts in turn, or else goes on to the end."""

    def __init__(self, *verdicts):
        self.verdicts = list(verdicts)

    async def open(self, _cursor):
        yield 1

    def process_item(self, item):
        return item, item

    def flush_window(self, _outputs):
        return self.verdicts.pop(0) if self.verdicts else Continue

    def on_close(self, _reason):
        return S.DONE


STATES = {
    "register": lambda state: Workflow().register(state, start),
    "register_split": lambda state: Workflow().register_split(state, [], ALL),
    "register_router": lambda state: Workflow().register_router(state, start),
    "register_stepped": lambda state: Workflow().register_stepped(state, Steps(Done(S.DONE))),
    "register_stream": lambda state: Workflow().register_stream(state, Items()),
    "task": lambda state: Workflow().task(state)(start),
    "on_error": lambda state: Workflow().register(S.START, start, on_error={ValueError: state}),
    "add_exit_state": Workflow().add_exit_state,
    "add_exit_states": lambda state: Workflow().add_exit_states([state]),
}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param([], "a state must be hashable, got", id="list"),
        pytest.param({}, "a state must be hashable, got", id="dict"),
        pytest.param((1, []), "a state must be hashable, got", id="tuple with a list"),
        pytest.param(S, "S is the Enum class; a state is one of its members", id="Enum class"),
    ],
)
@pytest.mark.parametrize("place", STATES)
def test_value_that_cannot_be_a_state(place, state, message):
    """What cannot be hashed is no state, nor is an Enum class, wherever it is given."""
    assert refusal(STATES[place], state).startswith(message)


@pytest.mark.parametrize("state", [[], (1, [])], ids=["list", "tuple with a list"])
def test_join_state_that_cannot_be_one(state):
    """A join's next state is hashable."""
    assert refusal(JoinConfig, JoinStrategy.All, state).startswith("next_state must be hashable, got ")
    assert refusal(ALL.with_next_state, state).startswith("next_state must be hashable, got ")


@pytest.mark.parametrize("states", [None, 5, "ab", b"ab"], ids=repr)
def test_exit_states_that_are_none(states):
    """Exit states are given as an iterable, which a text is not: its characters are no states."""
    assert refusal(Workflow().add_exit_states, states).startswith("states must be ")


class NoTask:
    """An object that is no task."""

    run = None


async def coroutine():
    return S.DONE


TASKS = {
    "register": lambda task: Workflow().register(S.START, task),
    "task": Workflow().task(S.START),
    "register_split": lambda task: Workflow().register_split(S.START, [task], ALL),
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: None, r"a task must be a function, .* got None \(NoneType\)", id="None"),
        pytest.param(lambda: 5, r"a task must be a function, .* got 5 \(int\)", id="number"),
        pytest.param(lambda: "start", r"a task must be a function, .* got 'start' \(str\)", id="text"),
        pytest.param(lambda: [start], r"a task must be a function, .* \(list\)", id="list"),
        pytest.param(NoTask, r"a task must be a function, .* \(NoTask\)", id="object without a method"),
        pytest.param(lambda: NoTask, r"NoTask is a class; register an instance: NoTask\(\)", id="class"),
        pytest.param(
            coroutine, r"coroutine\(\) is a coroutine; register the function, without calling it", id="coroutine"
        ),
    ],
)
@pytest.mark.parametrize("place", TASKS)
def test_object_that_is_no_task(place, make, message):
    """What cannot be called is refused where it is registered, and told what was meant."""
    with pytest.raises(ConfigurationError, match=message):
        TASKS[place](make())


@pytest.mark.parametrize("tasks", [None, 5, "ab", b"ab"], ids=repr)
def test_branches_that_are_none(tasks):
    """Branches are given as an iterable of tasks, or as a function that makes one."""
    assert refusal(lambda: Workflow().register_split(S.START, tasks, ALL)).startswith(
        "the branches of a split must be "
    )


@pytest.mark.parametrize("made", [None, 5, "ab", [5], [None]], ids=repr)
def test_branches_made_at_run_time_that_are_none(made):
    """What a split function returns is checked like branches given at once; the run fails in that state."""
    workflow = Workflow().register_split(S.START, lambda: made, ALL).add_exit_state(S.DONE)

    with pytest.raises(ConfigurationError, match="must be") as caught:
        testing.run(workflow.orchestrate(S.START))

    assert caught.value.state is S.START


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda value: simple().copy().register("x", start, join=value), "join of state x must be", id="join"
        ),
        pytest.param(
            lambda value: Workflow().register_split("x", [], value), "join of state x must be", id="split join"
        ),
        pytest.param(lambda value: Workflow().task("x", join=value)(start), "join of state x must be", id="task join"),
        pytest.param(
            lambda value: Workflow().register("x", start, config=value), "config of task start must", id="config"
        ),
        pytest.param(
            lambda value: Workflow().task("x", config=value)(start), "config of task start must", id="task config"
        ),
        pytest.param(lambda value: JoinConfig(value, S.DONE), "strategy must be a JoinStrategy", id="strategy"),
        pytest.param(lambda value: TaskConfig(retry=value), "retry must be a RetryMode", id="retry"),
        pytest.param(
            lambda value: TaskConfig(retry_on=value), "retry_on must be a subclass of Exception", id="retry_on"
        ),
        pytest.param(Workflow, "resources must be Resources or a mapping", id="resources"),
        pytest.param(lambda value: orchestrated(resources=value), "resources must be", id="resources of a run"),
        pytest.param(Resources, "resources must be a mapping", id="Resources"),
        pytest.param(lambda value: Resources().manage("x", value), "factory of 'x' must be callable", id="factory"),
        pytest.param(
            lambda value: CircuitBreaker(on_change=value), "on_change must be a function of (breaker", id="on_change"
        ),
        pytest.param(CircuitBreaker().record_success, "permit must be a Permit that try_acquire()", id="success"),
        pytest.param(CircuitBreaker().record_failure, "permit must be a Permit that try_acquire()", id="failure"),
        pytest.param(CircuitBreaker().record_ignored, "permit must be a Permit that try_acquire()", id="ignored"),
        pytest.param(RateLimiter, "policy must be a RateLimiterPolicy, got", id="bucket policy"),
        pytest.param(WindowedRateLimiter, "policy must be a WindowPolicy, got", id="window policy"),
        pytest.param(
            lambda value: MultiRateLimiter().with_tier("x", value),
            "limiter must be a RateLimiter or a WindowedRateLimiter, got",
            id="limiter of a tier",
        ),
    ],
)
@pytest.mark.parametrize("value", [5, "x", True, [5]], ids=repr)
def test_object_of_another_type(call, message, value):
    """An object of another type than a parameter takes is refused by the parameter's name."""
    assert refusal(call, value).startswith(message)


@pytest.mark.parametrize(
    "retry_on",
    [
        pytest.param(int, id="no exception"),
        pytest.param(BaseException, id="BaseException"),
        pytest.param(asyncio.CancelledError, id="CancelledError"),
        pytest.param((ValueError, 5), id="tuple with a number"),
        pytest.param([ValueError], id="list"),
        pytest.param(ValueError("x"), id="instance"),
        pytest.param(None, id="None"),
    ],
)
def test_retry_on_something_else(retry_on):
    """What is retried is told by subclasses of Exception or by a predicate."""
    assert refusal(lambda: TaskConfig(retry_on=retry_on)).startswith("retry_on must be a subclass of Exception")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param(lambda res: res.insert("n", 2), DuplicateResourceError, id="twice"),
        pytest.param(lambda res: res.get("m"), ResourceNotFoundError, id="missing"),
        pytest.param(lambda res: res.get("n", str), ResourceTypeError, id="of another type"),
    ],
)
def test_resources_that_do_not_fit(call, error):
    """A resource that is missing, there already or of another type has an error of its own, which names the key."""
    with pytest.raises(error, match=r"'[nm]'"):
        call(Resources({"n": 1}))


@pytest.mark.parametrize("states", [None, 5, "ab", b"ab"], ids=repr)
def test_split_into_states_that_are_none(states):
    """A split is an iterable of states, which a text is not."""
    assert refusal(TaskResult.Split, states).startswith("states must be ")


# Every parameter


class RudeError(Exception):
    pass


class Rude:
    """A value of which nothing works."""

    def rude(self, *_):
        raise RudeError

    __repr__ = __str__ = __hash__ = __eq__ = __bool__ = __len__ = __iter__ = __float__ = __index__ = rude


def with_parameters(a, b, /, *c, d, **e):
    return S.DONE


class OwnText(str):
    __slots__ = ()


class OwnNumber(int):
    pass


HOSTILE = [
    None,
    True,
    0,
    -1,
    2**70,
    10**400,
    1.5,
    math.nan,
    math.inf,
    5j,
    Decimal("0.5"),
    timedelta.max,
    timedelta(days=-1),
    "",
    "x",
    "a\nb\x00",
    "\ud800",
    "x" * 10_000,
    b"\xff",
    [],
    {},
    (1, []),
    int,
    S,
    S.START,
    ValueError("x"),
    object(),
    lambda: 1,
    with_parameters,
    OwnText("x"),
    OwnNumber(5),
    Rude(),
]


class Deps(FromResources):
    n: Annotated[int, Res("n")]


def with_store(use):
    store = MemoryStore()
    store.put("key", [1])
    return use(store)


def defined(workflow):
    """Whatever a definition takes it also validates, or refuses by name."""
    workflow.add_exit_states(["done", S.DONE]).validate()


def decorated(state):
    workflow = Workflow()
    workflow.task(state)(start)
    return workflow


def loading(value):
    """A batch that loads a value."""
    batch = Batch()
    batch.load = lambda: value
    testing.run(simple(batch).orchestrate(S.START))


def returning_single(value):
    """Whatever a result takes, a task can return."""
    results = iter([TaskResult.Single(value), S.DONE])
    testing.run(simple(lambda: next(results)).orchestrate(S.START))


def ended(workflow):
    """Whatever the result of a model takes, the model can return."""
    testing.run(workflow.add_exit_state(S.DONE).orchestrate(S.START))


def polling(result):
    class Poll:
        def __init__(self):
            self.results = iter([result, Ready(S.DONE)])

        def poll(self):
            return next(self.results)

    ended(Workflow().register(S.START, Poll()))


def timed(due):
    class Timer:
        def wait(self):
            return due

        def after_wait(self):
            return S.DONE

    ended(Workflow().register(S.START, Timer()))


def stepping(*results):
    ended(Workflow().register_stepped(S.START, Steps(*results)))


def streaming(items):
    ended(Workflow().register_stream(S.START, items))


def raised(error):
    """Whatever an error takes it can also be raised with."""

    def task():
        raise error

    async def main():  # asyncio.Runner itself breaks when its task ends in an exception that has no repr
        with contextlib.suppress(type(error)):
            await simple(task).orchestrate(S.START)

    testing.run(main())


def cancelling(reason):
    """`Run.cancel`, on a run that waits."""

    async def main():
        run = simple(lambda: asyncio.sleep(60)).start(S.START)
        await asyncio.sleep(0)
        try:
            run.cancel(reason)
        finally:
            run._task.cancel()
            await asyncio.wait([run._task])

    testing.run(main())


def starting(**options):
    return testing.run(started(**options))


# For each parameter: the words by which a refusal may name it, and a call that gives it a value.
class Reserve(CompensatableTask):
    name = "reserve"

    def run(self):
        return S.DONE, None

    def compensate(self, output):
        pass


def compensatable(state=S.START, task=None, **options):
    return Workflow().register_with_compensation(state, task or Reserve(), **options)


def parameters_of(function):
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def checkpoint(**field):
    CheckpointRow(**{"sequence": 3, "kind": RowKind.StateEntry, "state": "START"} | field)


def checkpoints(use):
    """What a checkpoint store in memory does."""

    async def main():
        await use(InMemoryCheckpointStore())

    testing.run(main())


def file_checkpoints(use=None, path="runs.db", **options):
    """The same of one in a file, in a folder of its own."""

    async def main():
        async with SqliteCheckpointStore(path, **options) as store:
            if use:
                await use(store)

    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder, contextlib.chdir(folder):
        testing.run(main())


MEMORY = Path("/dev/shm")  # noqa: S108 - where a disk costs nothing
ENTRY = CheckpointRow(0, RowKind.StateEntry, "START")


def walk_of_store(name, checkpoints):
    """What both checkpoint stores have in common; that there is no such run also names it."""

    def walk(use):
        return lambda value: checkpoints(lambda store: use(store, value))

    return {
        f"{name}.start_run.workflow_id": ("workflow_id", walk(lambda s, v: s.start_run(v, workflow="w", version=1))),
        f"{name}.start_run.workflow": ("workflow", walk(lambda s, v: s.start_run("x", workflow=v, version=1))),
        f"{name}.start_run.version": ("version", walk(lambda s, v: s.start_run("x", workflow="w", version=v))),
        f"{name}.claim.workflow_id": ("workflow_id|run", walk(lambda s, v: s.claim(v))),
        f"{name}.append.workflow_id": ("workflow_id", walk(lambda s, v: s.append(v, ENTRY))),
        f"{name}.append.row": ("row", walk(lambda s, v: s.append("x", v))),
        f"{name}.append.fence": ("fence|run", walk(lambda s, v: s.append("x", ENTRY, fence=v))),
        f"{name}.load_run.workflow_id": ("workflow_id", walk(lambda s, v: s.load_run(v))),
        f"{name}.clear.workflow_id": ("workflow_id", walk(lambda s, v: s.clear(v))),
        f"{name}.clear.fence": ("fence", walk(lambda s, v: s.clear("x", fence=v))),
        f"{name}.release.workflow_id": ("workflow_id|run", walk(lambda s, v: s.release(v, 1))),
        f"{name}.release.fence": ("fence|run", walk(lambda s, v: s.release("x", v))),
        f"{name}.release.stopped": ("stopped|run", walk(lambda s, v: s.release("x", 1, stopped=v))),
        f"{name}.list_runs.status": ("status", walk(lambda s, v: s.list_runs(status=v))),
        f"{name}.list_runs.older_than": ("older_than", walk(lambda s, v: s.list_runs(older_than=v))),
        f"{name}.list_runs.limit": ("limit", walk(lambda s, v: s.list_runs(limit=v))),
    }


WALK = {
    **walk_of_store("InMemoryCheckpointStore", checkpoints),
    **walk_of_store("SqliteCheckpointStore", file_checkpoints),
    "InMemoryCheckpointStore.max_blob": ("max_blob", lambda value: InMemoryCheckpointStore(max_blob=value)),
    "InMemoryCheckpointStore.max_rows": ("max_rows", lambda value: InMemoryCheckpointStore(max_rows=value)),
    "InMemoryCheckpointStore.max_bytes": ("max_bytes", lambda value: InMemoryCheckpointStore(max_bytes=value)),
    "SqliteCheckpointStore.path": ("path|the store", lambda value: file_checkpoints(path=value)),
    "SqliteCheckpointStore.lease": ("lease", lambda value: file_checkpoints(lease=value)),
    "SqliteCheckpointStore.max_blob": ("max_blob", lambda value: file_checkpoints(max_blob=value)),
    "SqliteCheckpointStore.max_rows": ("max_rows", lambda value: file_checkpoints(max_rows=value)),
    "SqliteCheckpointStore.max_bytes": ("max_bytes", lambda value: file_checkpoints(max_bytes=value)),
    "SqliteCheckpointStore.allow_insecure_path": (
        "allow_insecure_path",
        lambda value: file_checkpoints(allow_insecure_path=value),
    ),
    **{
        f"CheckpointRow.{field}": (field, lambda value, field=field: checkpoint(**{field: value}))
        for field in parameters_of(CheckpointRow)
    },
    "CheckpointRow.replace.changes": ("visit", lambda value: ENTRY.replace(visit=value)),
    "CheckpointRow.encode.workflow_id": ("workflow_id", ENTRY.encode),
    "CheckpointRow.decode.workflow_id": (
        "workflow_id|run",
        lambda value: CheckpointRow.decode(value, 0, ENTRY.encode("x")),
    ),
    "CheckpointRow.decode.sequence": (
        "sequence|row",
        lambda value: CheckpointRow.decode("x", value, ENTRY.encode("x")),
    ),
    "CheckpointRow.decode.data": ("data|row", lambda value: CheckpointRow.decode("x", 0, value)),
    "CircuitBreaker.failure_threshold": ("failure_threshold", CircuitBreaker),
    "CircuitBreaker.reset_timeout": ("reset_timeout", lambda value: CircuitBreaker(5, value)),
    "CircuitBreaker.half_open_max_calls": ("half_open_max_calls", lambda value: CircuitBreaker(5, 30, value)),
    "CircuitBreaker.name": ("name", lambda value: CircuitBreaker(name=value)),
    "CircuitBreaker.on_change": ("on_change", lambda value: CircuitBreaker(on_change=value)),
    "CircuitBreaker.record_failure.permit": ("permit", CircuitBreaker().record_failure),
    "CircuitBreaker.record_ignored.permit": ("permit", CircuitBreaker().record_ignored),
    "CircuitBreaker.record_success.permit": ("permit", CircuitBreaker().record_success),
    "CircuitPolicy.failure_threshold": ("failure_threshold", CircuitPolicy),
    "CircuitPolicy.reset_timeout": ("reset_timeout", lambda value: CircuitPolicy(5, value)),
    "CircuitPolicy.half_open_max_calls": ("half_open_max_calls", lambda value: CircuitPolicy(5, 30, value)),
    "CircuitPolicy.probe_timeout": ("probe_timeout", lambda value: CircuitPolicy(probe_timeout=value)),
    "CircuitPolicy.rate.failure_rate": ("failure_rate", lambda value: CircuitPolicy.rate(value, calls=9)),
    "CircuitPolicy.rate.calls": ("calls", lambda value: CircuitPolicy.rate(0.5, calls=value)),
    "CircuitPolicy.rate.seconds": ("seconds", lambda value: CircuitPolicy.rate(0.5, seconds=value)),
    "CircuitPolicy.rate.minimum_calls": (
        "minimum_calls",
        lambda value: CircuitPolicy.rate(0.5, seconds=9, minimum_calls=value),
    ),
    "CircuitPolicy.rate.slow_call_duration": ("slow_call_duration", lambda value: slow_calls(slow_call_duration=value)),
    "CircuitPolicy.rate.slow_call_rate": ("slow_call_rate", lambda value: slow_calls(slow_call_rate=value)),
    "CircuitPolicy.rate.reset_timeout": ("reset_timeout", lambda value: slow_calls(reset_timeout=value)),
    "CircuitPolicy.rate.half_open_max_calls": (
        "half_open_max_calls",
        lambda value: slow_calls(half_open_max_calls=value),
    ),
    "CircuitPolicy.rate.probe_timeout": ("probe_timeout", lambda value: slow_calls(probe_timeout=value)),
    "Bulkhead.limit": ("limit", Bulkhead),
    "Bulkhead.name": ("name", lambda value: Bulkhead(1, name=value)),
    "PollTask.on_poll_error": ("on_poll_error", with_attribute(Polls, "on_poll_error")),
    "StreamTask.on_item_error": ("on_item_error", with_stream("on_item_error")),
    "StreamTask.window": ("window", with_stream("window")),
    "TaskConfig.circuit_breaker": ("circuit_breaker", lambda value: TaskConfig(circuit_breaker=value)),
    "TaskConfig.rate_limiter": ("rate_limiter", lambda value: TaskConfig(rate_limiter=value)),
    "TaskConfig.with_circuit_breaker.breaker": ("circuit_breaker", TaskConfig().with_circuit_breaker),
    "TaskConfig.with_rate_limiter.limiter": ("rate_limiter", TaskConfig().with_rate_limiter),
    "Workflow.register_router.on_error": (
        "on_error",
        lambda value: Workflow().register_router(S.START, start, on_error=value),
    ),
    "Workflow.register_stepped.on_error": (
        "on_error",
        lambda value: Workflow().register_stepped(S.START, Steps(Done(S.DONE)), on_error=value),
    ),
    "Workflow.register_stream.on_error": (
        "on_error",
        lambda value: Workflow().register_stream(S.START, Items(), on_error=value),
    ),
    "BatchTask.concurrency": ("concurrency", with_attribute(Batch, "concurrency")),
    "BatchTask.item_retry": ("item_retry", with_attribute(Batch, "item_retry")),
    "BatchTask.item_timeout": ("item_timeout", with_attribute(Batch, "item_timeout")),
    "After.seconds": ("seconds", lambda value: timed(After(value))),
    "Done.state": ("state", lambda value: stepping(Done(value), Done(S.DONE))),
    "FromResources.from_resources.resources": ("resources", Deps.from_resources),
    "HealthStatus.level": ("level", HealthStatus),
    "HealthStatus.reason": ("reason", lambda value: HealthStatus("degraded", value)),
    "HealthStatus.Degraded.reason": ("reason", HealthStatus.Degraded),
    "HealthStatus.Unhealthy.reason": ("reason", HealthStatus.Unhealthy),
    "ItemErrorPolicy.Retry.retries": ("retries", ItemErrorPolicy.Retry),
    "JsonCodec.encode.value": ("value", JsonCodec().encode),
    "JsonCodec.decode.data": ("read", lambda value: JsonCodec().decode(value, int)),
    "JsonCodec.decode.type_": ("type", lambda value: JsonCodec().decode(b"1", value)),
    "JoinConfig.strategy": ("strategy", lambda value: JoinConfig(value, S.DONE)),
    "JoinConfig.next_state": ("next_state", lambda value: JoinConfig(JoinStrategy.All, value)),
    "JoinConfig.timeout": ("timeout", lambda value: JoinConfig(JoinStrategy.All, S.DONE, timeout=value)),
    "JoinConfig.bulkhead": ("bulkhead", lambda value: JoinConfig(JoinStrategy.All, S.DONE, bulkhead=value)),
    "JoinConfig.hedge_after": ("hedge_after", lambda value: JoinConfig(JoinStrategy.Any, S.DONE, hedge_after=value)),
    "JoinConfig.fail_fast": ("fail_fast", lambda value: JoinConfig(JoinStrategy.All, S.DONE, fail_fast=value)),
    "JoinConfig.with_bulkhead.limit": ("bulkhead", ALL.with_bulkhead),
    "JoinConfig.with_hedge_after.seconds": ("hedge_after", JoinConfig(JoinStrategy.Any, S.DONE).with_hedge_after),
    "JoinConfig.with_next_state.state": ("next_state", ALL.with_next_state),
    "JoinConfig.with_timeout.seconds": ("timeout", ALL.with_timeout),
    "JoinStrategy.PartialResults.n": ("n ", JoinStrategy.PartialResults),
    "JoinStrategy.Percentage.p": ("p ", JoinStrategy.Percentage),
    "JoinStrategy.Quorum.n": ("n ", JoinStrategy.Quorum),
    "MemoryStore.append.key": ("key", lambda value: with_store(lambda store: store.append(value, 1))),
    "MemoryStore.append.item": ("item", lambda value: with_store(lambda store: store.append("key", value))),
    "MemoryStore.contains_key.key": ("key", lambda value: with_store(lambda store: store.contains_key(value))),
    "MemoryStore.get.key": ("key", lambda value: with_store(lambda store: store.get(value))),
    "MemoryStore.get.type_": ("type_ |'key'", lambda value: with_store(lambda store: store.get("key", value))),
    "MemoryStore.get_or.key": ("key", lambda value: with_store(lambda store: store.get_or(value, 1))),
    "MemoryStore.get_or.default": ("default", lambda value: with_store(lambda store: store.get_or("other", value))),
    "MemoryStore.put.key": ("key", lambda value: with_store(lambda store: store.put(value, 1))),
    "MemoryStore.put.value": ("value", lambda value: with_store(lambda store: store.put("key", value))),
    "MemoryStore.remove.key": ("key", lambda value: with_store(lambda store: store.remove(value))),
    "MultiRateLimiter.acquire.tiers": ("tier", lambda value: testing.run(tiers().acquire(value))),
    "MultiRateLimiter.time_until.tiers": ("tier", lambda value: tiers().time_until(value)),
    "MultiRateLimiter.try_acquire.tiers": ("tier", lambda value: tiers().try_acquire(value)),
    "MultiRateLimiter.with_tier.name": ("name", lambda value: tiers().with_tier(value, bucket())),
    "MultiRateLimiter.with_tier.limiter": ("limiter", lambda value: tiers().with_tier("x", value)),
    "MultiRateLimiter.with_tier.cost": ("cost", lambda value: tiers().with_tier("x", bucket(), value)),
    "NonRetryable.message": ("message", lambda value: raised(NonRetryable(value))),
    "RateLimiter.policy": ("policy", RateLimiter),
    "RateLimiter.name": ("name", lambda value: RateLimiter(RateLimiterPolicy.per_second(1), name=value)),
    "RateLimiter.acquire.cost": ("cost", lambda value: testing.run(bucket().acquire(value))),
    "RateLimiter.time_until.cost": ("cost", lambda value: bucket().time_until(value)),
    "RateLimiter.try_acquire.cost": ("cost", lambda value: bucket().try_acquire(value)),
    "RateLimiterPolicy.tokens": ("tokens", lambda value: RateLimiterPolicy(value, 1)),
    "RateLimiterPolicy.period": ("period", lambda value: RateLimiterPolicy(1, value)),
    "RateLimiterPolicy.max_tokens": ("max_tokens", lambda value: RateLimiterPolicy(1, 1, max_tokens=value)),
    "RateLimiterPolicy.burst": ("burst", lambda value: RateLimiterPolicy(1, 1, burst=value)),
    **{
        f"RateLimiterPolicy.{per}.{name}": (name, partial(call, getattr(RateLimiterPolicy, per)))
        for per in ("per_second", "per_minute", "per_hour")
        for name, call in {
            "tokens": lambda make, value: make(value),
            "max_tokens": lambda make, value: make(1, max_tokens=value),
            "burst": lambda make, value: make(1, burst=value),
        }.items()
    },
    "More.cursor": ("cursor", lambda value: stepping(More(value), Done(S.DONE))),
    "Pending.delay": ("delay", lambda value: polling(Pending(value))),
    "PollErrorPolicy.RetryOnError.retries": ("retries", PollErrorPolicy.RetryOnError),
    "Ready.state": ("state", lambda value: polling(Ready(value))),
    "Res.key": ("key", Res),
    "Resources.mapping": ("mapping", Resources),
    "Resources.get.key": ("key|resource", lambda value: Resources({"key": 1}).get(value)),
    "Resources.get.type_": ("isinstance|wanted", lambda value: Resources({"key": 1}).get("key", value)),
    "Resources.insert.key": ("key", lambda value: Resources().insert(value, 1)),
    "Resources.insert.value": ("value", lambda value: Resources().insert("key", value)),
    "Resources.manage.key": ("key", lambda value: Resources().manage(value, contextlib.nullcontext)),
    "Resources.manage.factory": ("factory", lambda value: Resources().manage("key", value)),
    "Resources.try_insert.key": ("key", lambda value: Resources().try_insert(value, 1)),
    "Resources.try_insert.value": ("value", lambda value: Resources().try_insert("key", value)),
    "RetryAfter.delay": ("delay", lambda value: raised(RetryAfter(value))),
    "RetryAfter.message": ("message", lambda value: raised(RetryAfter(0, value))),
    "RetryMode.exponential.retries": ("retries", RetryMode.exponential),
    "RetryMode.exponential.base": ("base", lambda value: RetryMode.exponential(1, value)),
    "RetryMode.exponential.factor": ("factor", lambda value: RetryMode.exponential(factor=value)),
    "RetryMode.exponential.max_delay": ("max_delay", lambda value: RetryMode.exponential(max_delay=value)),
    "RetryMode.exponential.jitter": ("jitter", lambda value: RetryMode.exponential(jitter=value)),
    "RetryMode.fixed.retries": ("retries", lambda value: RetryMode.fixed(value, 0)),
    "RetryMode.fixed.delay": ("delay", lambda value: RetryMode.fixed(1, value)),
    "Run.cancel.reason": ("reason", cancelling),
    "Task.config": ("config", with_attribute(Configured, "config")),
    "Task.name": ("name", with_attribute(Configured, "name")),
    "Stop.state": ("state", lambda value: streaming(Items(Stop(value)))),
    "StreamWindow.Count.n": ("n ", StreamWindow.Count),
    "StreamWindow.Duration.seconds": ("seconds", StreamWindow.Duration),
    "TaskConfig.retry": ("retry", lambda value: TaskConfig(retry=value)),
    "TaskConfig.retry_on": ("retry_on", lambda value: TaskConfig(retry_on=value)),
    "TaskConfig.attempt_timeout": ("attempt_timeout", lambda value: TaskConfig(attempt_timeout=value)),
    "TaskConfig.with_attempt_timeout.seconds": ("attempt_timeout", TaskConfig().with_attempt_timeout),
    "TaskConfig.with_exponential_retry.retries": ("retries", exponential),
    "TaskConfig.with_exponential_retry.base": ("base", lambda value: exponential(1, value)),
    "TaskConfig.with_exponential_retry.factor": (
        "factor",
        lambda value: exponential(factor=value),
    ),
    "TaskConfig.with_exponential_retry.max_delay": (
        "max_delay",
        lambda value: exponential(max_delay=value),
    ),
    "TaskConfig.with_exponential_retry.jitter": (
        "jitter",
        lambda value: exponential(jitter=value),
    ),
    "TaskConfig.with_fixed_retry.retries": ("retries", lambda value: TaskConfig().with_fixed_retry(value, 0)),
    "TaskConfig.with_fixed_retry.delay": ("delay", lambda value: TaskConfig().with_fixed_retry(1, value)),
    "TaskExecutionError.message": ("message", lambda value: raised(TaskExecutionError(value))),
    "TaskResult.Single.state": ("state", returning_single),
    "TaskResult.Split.states": ("states", TaskResult.Split),
    "WindowPolicy.limit": ("limit", lambda value: WindowPolicy(value, 1)),
    "WindowPolicy.seconds": ("seconds", lambda value: WindowPolicy(1, value)),
    "WindowPolicy.per_second.limit": ("limit", WindowPolicy.per_second),
    "WindowPolicy.per_minute.limit": ("limit", WindowPolicy.per_minute),
    "WindowPolicy.per_hour.limit": ("limit", WindowPolicy.per_hour),
    "WindowPolicy.per_day.limit": ("limit", WindowPolicy.per_day),
    "WindowedRateLimiter.policy": ("policy", WindowedRateLimiter),
    "WindowedRateLimiter.name": ("name", lambda value: WindowedRateLimiter(WindowPolicy.per_day(1), name=value)),
    "WindowedRateLimiter.acquire.cost": ("cost", lambda value: testing.run(window().acquire(value))),
    "WindowedRateLimiter.time_until.cost": ("cost", lambda value: window().time_until(value)),
    "WindowedRateLimiter.try_acquire.cost": ("cost", lambda value: window().try_acquire(value)),
    "Until.instant": ("instant", lambda value: timed(Until(value))),
    "Workflow.resources": ("resources", Workflow),
    "Workflow.name": ("name", lambda value: Workflow(name=value)),
    "Workflow.add_exit_state.state": ("state", lambda value: defined(simple().add_exit_state(value))),
    "Workflow.add_exit_states.states": ("state", lambda value: defined(simple().add_exit_states(value))),
    "Workflow.bare.name": ("name", lambda value: Workflow.bare(name=value)),
    "Workflow.orchestrate.initial_state": ("initial state", lambda value: orchestrated(initial_state=value)),
    "Workflow.orchestrate.resources": ("resources", lambda value: orchestrated(resources=value)),
    "Workflow.orchestrate.workflow_id": ("workflow_id", lambda value: orchestrated(workflow_id=value)),
    "Workflow.orchestrate.timeout": ("timeout|the run took", lambda value: orchestrated(timeout=value)),
    "Workflow.register.state": ("state", lambda value: defined(Workflow().register(value, start))),
    "Workflow.register.task": ("task|register", lambda value: defined(Workflow().register(S.START, value))),
    "Workflow.register.config": ("config", lambda value: Workflow().register(S.START, start, config=value)),
    "Workflow.register.join": ("join", lambda value: Workflow().register(S.START, start, join=value)),
    "Workflow.register.on_error": (
        "on_error",
        lambda value: Workflow().register(S.START, start, on_error=value),
    ),
    "Workflow.register_router.state": ("state", lambda value: defined(Workflow().register_router(value, start))),
    "Workflow.register_router.task": (
        "router|task|register",
        lambda value: defined(Workflow().register_router(S.START, value)),
    ),
    "Workflow.register_router.config": (
        "config",
        lambda value: Workflow().register_router(S.START, start, config=value),
    ),
    "Workflow.register_split.state": ("state", lambda value: defined(Workflow().register_split(value, [], ALL))),
    "Workflow.register_split.tasks": (
        "branches|task|register",
        lambda value: defined(Workflow().register_split(S.START, value, ALL)),
    ),
    "Workflow.register_split.join": ("join", lambda value: Workflow().register_split(S.START, [], value)),
    "Workflow.register_split.on_error": (
        "on_error",
        lambda value: Workflow().register_split(S.START, [], ALL, on_error=value),
    ),
    "Workflow.register_stepped.state": (
        "state",
        lambda value: defined(Workflow().register_stepped(value, Steps(Done(S.DONE)))),
    ),
    "Workflow.register_stepped.task": (
        "stepped task|register",
        lambda value: defined(Workflow().register_stepped(S.START, value)),
    ),
    "Workflow.register_stepped.config": (
        "config",
        lambda value: Workflow().register_stepped(S.START, Steps(), config=value),
    ),
    "Workflow.register_stream.state": ("state", lambda value: defined(Workflow().register_stream(value, Items()))),
    "Workflow.register_stream.task": (
        "stream|register",
        lambda value: defined(Workflow().register_stream(S.START, value)),
    ),
    "Workflow.register_stream.config": (
        "config",
        lambda value: Workflow().register_stream(S.START, Items(), config=value),
    ),
    "Workflow.register_with_compensation.state": ("state", lambda value: defined(compensatable(value))),
    "Workflow.register_with_compensation.task": (
        "compensatable task|register",
        lambda value: defined(Workflow().register_with_compensation(S.START, value)),
    ),
    "Workflow.register_with_compensation.config": ("config", lambda value: compensatable(config=value)),
    "Workflow.register_with_compensation.on_error": ("on_error", lambda value: compensatable(on_error=value)),
    "Workflow.register_with_compensation.register_before": (
        "register_before",
        lambda value: compensatable(register_before=value),
    ),
    "Workflow.discard.workflow_id": ("workflow_id", lambda value: testing.run(durable().discard(value))),
    "Workflow.orchestrate.data": ("data", lambda value: orchestrated(data=value)),
    "Workflow.resume_from.workflow_id": (
        "workflow_id|not there",
        lambda value: testing.run(durable().resume_from(value)),
    ),
    "Workflow.resume_from.resources": (
        "resources|not there",
        lambda value: testing.run(durable().resume_from("1", resources=value)),
    ),
    "Workflow.resume_from.timeout": (
        "timeout|not there",
        lambda value: testing.run(durable().resume_from("1", timeout=value)),
    ),
    "Workflow.start.data": ("data", lambda value: starting(data=value)),
    "Workflow.with_checkpoint_store.store": ("store", lambda value: Workflow().with_checkpoint_store(value)),
    "Workflow.with_checkpoint_store.codec": (
        "codec",
        lambda value: Workflow().with_checkpoint_store(InMemoryCheckpointStore(), codec=value),
    ),
    "Workflow.with_data.data": ("data", lambda value: Workflow().with_data(value)),
    "Workflow.with_migration.migrate": ("migrate", lambda value: Workflow().with_migration(value)),
    "Workflow.with_recovery_limit.limit": ("limit", lambda value: Workflow().with_recovery_limit(value)),
    "Workflow.with_workflow_version.version": ("version", lambda value: Workflow().with_workflow_version(value)),
    "recover_all.workflow": ("workflow", lambda value: testing.run(recover_all(value, InMemoryCheckpointStore()))),
    "recover_all.store": ("store", lambda value: testing.run(recover_all(durable(), value))),
    "recover_all.limit": (
        "limit",
        lambda value: testing.run(recover_all(durable(), InMemoryCheckpointStore(), limit=value)),
    ),
    "Workflow.start.initial_state": ("initial state", lambda value: starting(initial_state=value)),
    "Workflow.start.resources": ("resources", lambda value: starting(resources=value)),
    "Workflow.start.workflow_id": ("workflow_id", lambda value: starting(workflow_id=value)),
    "Workflow.start.timeout": ("timeout|the run took", lambda value: starting(timeout=value)),
    "Workflow.task.state": ("state", lambda value: defined(decorated(value))),
    "Workflow.task.config": ("config", lambda value: Workflow().task(S.START, config=value)(start)),
    "Workflow.task.join": ("join", lambda value: Workflow().task(S.START, join=value)(start)),
    "Workflow.task.on_error": ("on_error", lambda value: Workflow().task(S.START, on_error=value)(start)),
    "Workflow.validate_initial_state.state": ("initial state", lambda value: simple().validate_initial_state(value)),
    "Workflow.with_compensation_timeout.seconds": (
        "compensation_timeout",
        lambda value: Workflow().with_compensation_timeout(value),
    ),
    "Workflow.with_timeout.seconds": ("timeout", lambda value: Workflow().with_timeout(value)),
    "Workflow.with_workflow_id.workflow_id": ("workflow_id", lambda value: Workflow().with_workflow_id(value)),
    "configure.branches": ("branches", lambda value: cano.configure(branches=value)),
    "in_thread.function": ("function", in_thread),
}


def outcome(words, call, value):
    """ "works", "refused" by name, "rude" as the value itself; else what is wrong."""
    try:
        call(value)
    except CanoError as error:
        named = any(word in str(error) for word in words.split("|"))
        return "refused" if named else f"not named: {error!r}"
    except RudeError:
        return "rude" if type(value) is Rude else "rude for nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited")
@pytest.mark.parametrize("parameter", WALK)
def test_hostile_values(parameter):
    """Whatever a public parameter is given, it works, or raises a CanoError that names the parameter."""
    words, call = WALK[parameter]

    outcomes = {f"{n} {type(value).__name__}": outcome(words, call, value) for n, value in enumerate(HOSTILE)}

    assert {value: text for value, text in outcomes.items() if text not in ("works", "refused", "rude")} == {}


def test_hostile_items():
    """Whatever load returns, it works, or raises a CanoError that names the method; whatever an item is, it is processed."""
    outcomes = {f"{n} {type(value).__name__}": outcome("load", loading, value) for n, value in enumerate(HOSTILE)}

    assert {value: text for value, text in outcomes.items() if text not in ("works", "refused", "rude")} == {}
    assert outcome("load", loading, HOSTILE) == "works"


# What the engine makes: errors (but for those that tasks raise), records, and handles.
MADE_BY_THE_ENGINE = {
    "BranchOutcome",
    "Caught",
    "CircuitSnapshot",
    "CircuitState",
    "ErrorContext",
    "LimiterSnapshot",
    "Orphan",
    "Permit",
    "Run",
    "RunContext",
    "RowKind",
    "RunStatus",
    "RunSummary",
    "Seconds",
    "SplitResult",
    "StreamProgress",
}
WRITTEN_BY_USERS = {"CheckpointStore", "Codec"}
RAISED_BY_TASKS = {"NonRetryable", "RetryAfter", "TaskExecutionError"}


def public_parameters():
    """Every parameter of every public function, constructor and method, "Class.method.parameter"; and a task's attributes."""
    for name in set(cano.__all__) - {"__version__", "Seconds"} - WRITTEN_BY_USERS:
        public = getattr(cano, name)
        is_error = inspect.isclass(public) and issubclass(public, BaseException)
        if name not in MADE_BY_THE_ENGINE and (not is_error or name in RAISED_BY_TASKS):
            yield from (f"{name}.{parameter}" for parameter in parameters_of(public))
        if inspect.isclass(public) and issubclass(public, Task):
            yield from (f"{name}.{attribute}" for attribute in inspect.get_annotations(public))
        if inspect.isclass(public) and not is_error:
            methods = [
                method for method in dir(public) if not method.startswith("_") and callable(getattr(public, method))
            ]
            for method in methods:
                yield from (f"{name}.{method}.{parameter}" for parameter in parameters_of(getattr(public, method)))


def test_walk_is_complete():
    """The walk knows every public parameter, and none that does not exist."""
    assert set(WALK) == set(public_parameters())
