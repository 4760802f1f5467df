"""Random workflows leave the same trace in cano and in the plain-Python engine of benches/, and with both kinds of branches.

A workflow is drawn as data: a chain of steps, each a task with its attempts, a split, or a fork into further chains, whose
errors may lead elsewhere. Both engines get the same tasks, which write down when they start and how they end, on a virtual
clock. Compared are these entries, what every joined state and every state that takes an error got, and how the run ended:
its exit state, or its exception with everything in it.

Ties in time are kept out, since which of two things comes first in one pass of the loop is no promise: each duration has a
fraction of a millisecond that is its own, a prime number of microseconds, and a program in which two timers of the oracle
are still due at the same moment is not compared.
"""

import asyncio
import builtins
import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import anyio
import pytest
from hypothesis import HealthCheck, assume, event, given, settings, strategies as st

import cano
from benches import pure_python
from benches.pure_python.split import Split as OracleSplit
from cano.testing import VirtualClockLoop

EXAMPLES = int(os.environ.get("CANO_ORACLE_EXAMPLES", "200"))

PRIMES = [number for number in range(2, 1_000) if all(number % divisor for divisor in range(2, int(number**0.5) + 1))]
MICROSECONDS = 1_000_000


class Oops(Exception):
    """A failure that is worth a retry."""


class Other(Exception):
    """A failure that retry_on may leave out."""


ERRORS = [
    "Oops",
    "Other",
    "TypeError",
    "TimeoutError",
    "LookupError",
    "CanoError",
    "WorkflowError",
    "JoinError",
    "InvalidTransitionError",
    "AttemptTimeoutError",
    "RetryExhaustedError",
    "TaskExecutionError",
    "NonRetryable",
]
"""What on_error may name besides Exception."""


# The data


@dataclass
class Attempt:
    """What one attempt does: sleep, then end in its way; and what it does when it is cancelled meanwhile."""

    ends: str = "ok"  # ok, oops, other, mistake, after, never, cancel
    sleep: float | None = None  # None: a plain function's attempt, which does not wait
    when_cancelled: str = "leave"  # leave, clean, swallow, convert
    cleanup: float = 0.0
    retry_after: float = 0.0


@dataclass
class Step:
    """A task, with one list of attempts for each visit; more attempts than listed succeed."""

    name: str
    visits: list[list[Attempt]]
    config: dict[str, Any] | None = None
    leads: str = "on"  # on, unknown, nonsense, exit
    on_error: list[tuple[str, str]] = field(default_factory=list)  # the names of classes; on, exit, itself, handler


@dataclass
class Join:
    strategy: tuple[str, ...]
    timeout: float | None = None
    bulkhead: int | None = None
    fail_fast: bool = False
    hedge_after: float | None = None


@dataclass
class SplitStep:
    """A split into tasks, listed at registration or made on entry, after a sleep or not."""

    name: str
    branches: list[Step]
    join: Join
    made: str = "before"  # before, on entry, after a sleep
    sleep: float = 0.0
    on_error: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ForkStep:
    """A task that forks into chains, each of which ends in the joined state or in an exit."""

    step: Step
    chains: list["Chain"]
    join: Join


@dataclass
class Chain:
    steps: list[Step | SplitStep | ForkStep]
    ends_in_exit: bool = False


@dataclass
class Program:
    chain: Chain
    timeout: float | None = None
    cancel_at: float | None = None


# Drawing it


class Drawer:
    """Draws the parts of one program; every duration and every name is new."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.durations = 0
        self.names = 0

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def choice(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self) -> bool:
        return self.draw(st.integers(0, 4)) == 4

    def seconds(self, most: int = 100) -> float:
        """Whole milliseconds and a prime number of microseconds."""
        prime = PRIMES[self.durations % len(PRIMES)]
        self.durations += 1
        return (self.draw(st.integers(1, most)) * 1_000 + prime) / MICROSECONDS

    def optional_seconds(self, most: int = 100) -> float | None:
        return self.seconds(most) if self.rarely() else None

    def attempt(self, *, waits: bool) -> Attempt:
        bad = self.choice("oops", "oops", "other", "mistake", "after", "never", "cancel")
        ends = self.choice("ok", "ok", bad)
        if not waits and self.rarely():
            return Attempt("ok" if ends == "cancel" else ends, retry_after=self.seconds())
        when_cancelled = self.choice("leave", "leave", "clean", "swallow", "convert")
        cleanup = self.seconds(30) if when_cancelled in ("clean", "swallow") else 0.0
        return Attempt(ends, self.seconds(), when_cancelled, cleanup, self.seconds() if ends == "after" else 0.0)

    def retry(self) -> tuple[Any, ...]:
        retries = self.draw(st.integers(0, 3))
        if self.draw(st.booleans()):
            return "fixed", retries, self.seconds() if self.draw(st.booleans()) else 0.0
        base = self.seconds(40)
        return "exponential", retries, base, self.choice(1.0, 2.0, 3.0), base + self.seconds(60)

    def config(self) -> dict[str, Any] | None:
        if self.draw(st.booleans()):
            return None
        return {
            "retry": self.retry(),
            "retry_on": self.choice("everything", "everything", "oops", "tuple", "predicate", "mistakes"),
            "attempt_timeout": self.seconds() if self.rarely() else None,
        }

    def on_error(self, *targets: str) -> list[tuple[str, str]]:
        if self.draw(st.booleans()):
            return []
        classes = self.draw(st.lists(st.sampled_from(ERRORS), max_size=3, unique=True))
        if not classes or self.draw(st.booleans()):
            classes.append("Exception")
        return [(name, self.choice(*targets)) for name in classes]

    def step(self, *, is_branch: bool = False, waits: bool = False, is_fork: bool = False) -> Step:
        attempts = st.integers(1, 3)
        visits = 1 if is_branch or not self.rarely() else 2
        leads = "on" if is_branch or not self.rarely() else self.choice("unknown", "nonsense", "exit")
        config = self.config()
        # What fails again and again must not lead to itself.
        fails_for_ever = leads != "on" or is_fork or (config is not None and config["attempt_timeout"] is not None)
        back = () if fails_for_ever else ("itself",)
        return Step(
            self.name("task"),
            [[self.attempt(waits=waits) for _ in range(self.draw(attempts))] for _ in range(visits)],
            config,
            leads,
            [] if is_branch else self.on_error("on", "exit", "handler", "handler", *back),
        )

    def join(self, total: int) -> Join:
        some = self.draw(st.integers(1, total))
        strategy = self.choice(
            ("All",),
            ("All",),
            ("Any",),
            ("Quorum", some),
            ("Percentage", some / total),
            ("PartialResults", some),
            ("PartialTimeout",),
        )
        timeout = self.seconds(150) if strategy == ("PartialTimeout",) else self.optional_seconds(150)
        hedge_after = self.seconds(60) if strategy == ("Any",) and self.draw(st.booleans()) else None
        return Join(strategy, timeout, self.draw(st.none() | st.integers(1, 3)), self.rarely(), hedge_after)

    def split(self) -> SplitStep:
        branches = [self.step(is_branch=True, waits=True) for _ in range(self.draw(st.integers(1, 4)))]
        made = self.choice("before", "before", "on entry", "after a sleep")
        on_error = self.on_error("on", "exit", "handler", "handler")
        return SplitStep(self.name("split"), branches, self.join(len(branches)), made, self.seconds(30), on_error)

    def fork(self, depth: int) -> ForkStep:
        step = self.step(is_fork=True)
        chains = [self.chain(depth + 1) for _ in range(self.draw(st.integers(1, 3)))]
        return ForkStep(step, chains, self.join(len(chains)))

    def chain(self, depth: int = 0) -> Chain:
        kinds = ["task", "split", "fork"] if depth < 2 else ["task", "split"]
        steps: list[Step | SplitStep | ForkStep] = [self.step(waits=True)] if depth else []
        for kind in self.draw(st.lists(st.sampled_from(kinds), min_size=1 - len(steps), max_size=3 - depth)):
            if kind == "task":
                steps.append(self.step())
            elif kind == "split":
                steps.append(self.split())
            else:
                steps.append(self.fork(depth))
        return Chain(steps, bool(depth) and self.rarely())


@st.composite
def programs(draw: st.DrawFn) -> Program:
    drawer = Drawer(draw)
    chain = drawer.chain()
    return Program(chain, drawer.optional_seconds(400), drawer.optional_seconds(400))


# Running it


class Script:
    """A step as a task object; what it returns in its last visit is `following`."""

    def __init__(self, machine: "Machine", step: Step, following: Any) -> None:
        self.machine = machine
        self.step = step
        self.following = following
        self.name = step.name
        self.config = machine.config(step.config)
        self.done = 0
        self.attempts = 0
        waits = any(attempt.sleep is not None for visit in step.visits for attempt in visit)
        self.run = self.wait if waits else self.call

    def begin(self) -> Attempt:
        visit = self.step.visits[min(self.done, len(self.step.visits) - 1)]
        attempt = visit[self.attempts] if self.attempts < len(visit) else Attempt(sleep=visit[-1].sleep)
        self.attempts += 1
        self.machine.note(self.name, f"starts attempt {self.attempts} of visit {self.done + 1}")
        return attempt

    def end(self, attempt: Attempt) -> Any:
        self.machine.note(self.name, attempt.ends)
        if attempt.ends != "ok":
            raise {
                "oops": Oops(self.name),
                "other": Other(self.name),
                "mistake": TypeError(self.name),
                "after": self.machine.engine.RetryAfter(attempt.retry_after),
                "never": self.machine.engine.NonRetryable(self.name),
                "cancel": asyncio.CancelledError(),
            }[attempt.ends]
        self.done += 1
        self.attempts = 0
        return self.name if self.done < len(self.step.visits) else self.following

    def call(self) -> Any:
        return self.end(self.begin())

    async def wait(self) -> Any:
        attempt = self.begin()
        if attempt.sleep is not None:
            try:
                await asyncio.sleep(attempt.sleep)
            except asyncio.CancelledError as error:
                self.machine.note(self.name, f"cancelled {error.args}")
                await self.cancelled(attempt)
        return self.end(attempt)

    async def cancelled(self, attempt: Attempt) -> None:
        """Leave, clean up and leave, clean up and go on, or fail."""
        if attempt.when_cancelled == "convert":
            raise Oops(self.name)
        if attempt.when_cancelled == "leave":
            raise  # noqa: PLE0704 - called where the cancellation is caught
        try:
            await asyncio.sleep(attempt.cleanup)
        except asyncio.CancelledError:
            self.machine.note(self.name, "cancelled again")
            raise
        self.machine.note(self.name, "cleaned up")
        if attempt.when_cancelled == "clean":
            raise asyncio.CancelledError


class Machine:
    """One engine with a program: builds the workflow, runs it, and keeps the trace."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.log: list[tuple[str, int, str]] = []
        self.workflow = engine.Workflow()

    def note(self, name: str, what: str) -> None:
        self.log.append((name, self.now(), what))

    def now(self) -> int:
        return round(asyncio.get_running_loop().time() * MICROSECONDS)

    def config(self, given: dict[str, Any] | None) -> Any:
        if given is None:
            return None
        kind, retries, *numbers = given["retry"]
        if kind == "fixed":
            retry = self.engine.RetryMode.fixed(retries, *numbers)
        else:
            base, factor, max_delay = numbers
            retry = self.engine.RetryMode.exponential(retries, base, factor=factor, max_delay=max_delay, jitter=0)
        retry_on = {
            "everything": Exception,
            "oops": Oops,
            "tuple": (Oops, TimeoutError),
            "predicate": lambda error: isinstance(error, Oops | TimeoutError),
            "mistakes": (TypeError, Oops),
        }[given["retry_on"]]
        return self.engine.TaskConfig(retry=retry, retry_on=retry_on, attempt_timeout=given["attempt_timeout"])

    def join(self, given: Join, following: str) -> Any:
        kind, *number = given.strategy
        strategy = getattr(self.engine.JoinStrategy, kind)
        if number:
            strategy = strategy(*number)
        return self.engine.JoinConfig(
            strategy,
            following,
            timeout=given.timeout,
            bulkhead=given.bulkhead,
            fail_fast=given.fail_fast,
            hedge_after=given.hedge_after,
        )

    def joined(self, name: str, following: str) -> Any:
        """The task of a joined state."""

        def run(result: Any) -> str:
            self.note(name, str(self.described_result(result)))
            return following

        run.__annotations__["result"] = self.engine.SplitResult
        return type("Joined", (), {"name": name, "run": staticmethod(run)})()

    def handler(self, name: str, following: str) -> Any:
        """The task of a state that errors lead to, or that a split may lead to as well."""

        def run(error: Exception | None) -> str:
            self.note(name, str(error and self.described(error)))
            return following

        run.__annotations__["error"] = self.engine.Caught[Exception] | None
        return type("Handler", (), {"name": name, "run": staticmethod(run)})()

    def on_error(self, step: Step | SplitStep, following: str) -> Any:
        """The keys of a step; a handler of its own is registered, if it has one."""
        if not step.on_error:
            return None
        handler = f"{step.name} failed"
        if any(target == "handler" for _, target in step.on_error):
            self.workflow.register(handler, self.handler(handler, following))
        states = {"on": following, "exit": "stop", "itself": step.name, "handler": handler}
        known = {"Oops": Oops, "Other": Other} | vars(builtins)
        return {known.get(name) or getattr(self.engine, name): states[target] for name, target in step.on_error}

    def chain(self, chain: Chain, following: str) -> str:
        """Registers the steps of a chain, last first, and gives the state it begins with."""
        for step in reversed(chain.steps):
            following = self.registered(step, following)
        return following

    def registered(self, step: Step | SplitStep | ForkStep, following: str) -> str:
        if isinstance(step, Step):
            leads = {"on": following, "unknown": "nowhere", "nonsense": 42, "exit": "stop"}[step.leads]
            self.workflow.register(step.name, Script(self, step, leads), on_error=self.on_error(step, following))
            return step.name
        if isinstance(step, SplitStep):
            joined = f"{step.name} joined"
            self.workflow.register(joined, self.joined(joined, following))
            on_error = self.on_error(step, following)
            self.workflow.register_split(
                step.name, self.branches(step), self.join(step.join, joined), on_error=on_error
            )
            return step.name
        joined = f"{step.step.name} joined"
        self.workflow.register(joined, self.joined(joined, following))
        states = [self.chain(chain, "stop" if chain.ends_in_exit else joined) for chain in step.chains]
        task = Script(self, step.step, self.engine.TaskResult.Split(states))
        on_error = self.on_error(step.step, following)
        self.workflow.register(step.step.name, task, join=self.join(step.join, joined), on_error=on_error)
        return step.step.name

    def branches(self, step: SplitStep) -> Any:
        tasks = [Script(self, branch, f"value of {branch.name}") for branch in step.branches]

        async def after_a_sleep() -> list[Any]:
            await asyncio.sleep(step.sleep)
            return tasks

        return {"before": tasks, "on entry": lambda: tasks, "after a sleep": after_a_sleep}[step.made]

    async def run(self, program: Program) -> str:
        first = self.chain(program.chain, "end")
        self.workflow.add_exit_states(["end", "stop"])
        run = asyncio.create_task(self.workflow.orchestrate(first, timeout=program.timeout))
        cancel = None
        if program.cancel_at is not None:
            cancel = asyncio.get_running_loop().call_later(program.cancel_at, run.cancel, "by the user")
        await asyncio.wait([run])
        if cancel is not None:
            cancel.cancel()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        if run.cancelled():
            with contextlib.suppress(asyncio.CancelledError):
                await run
            ended = "cancelled"
        elif run.exception() is not None:
            ended = str(self.described(run.exception()))
        else:
            ended = str(run.result())
        return f"{ended} at {self.now()}, cancelling {run.cancelling()}"

    def described(self, error: Any) -> list[Any]:
        """Everything about an exception that both engines promise."""
        facts: list[Any] = [type(error).__name__]
        if isinstance(error, Oops | Other | TypeError):
            facts.append(error.args)
        facts += [(name, getattr(error, name)) for name in ("attempts", "limit", "delay") if hasattr(error, name)]
        if hasattr(error, "elapsed"):
            facts.append(("elapsed", round(error.elapsed * MICROSECONDS)))
        if isinstance(error, ExceptionGroup):
            facts.append([self.described(one) for one in error.exceptions])
            facts.append(self.described_result(error.result))  # type: ignore[attr-defined]
        if type(error).__name__ == "RetryExhaustedError":
            facts.append(self.described(error.__cause__))
        context = getattr(error, "__cano__", None)
        if context is not None:
            facts.append((context.state, context.path, context.entered, context.branch))
            if not isinstance(
                error, self.engine.WorkflowError
            ):  # of those the oracle does not say which task, or attempt
                facts.append((context.task, context.attempt, context.max_attempts))
        return facts

    def described_result(self, result: Any) -> list[Any]:
        def elapsed(outcome: Any) -> int:
            seconds: float = outcome.elapsed
            return round(seconds * MICROSECONDS)

        return [
            [(one.index, one.name, one.value, elapsed(one)) for one in result.successes],
            [(one.index, one.name, self.described(one.error), elapsed(one)) for one in result.errors],
            result.cancelled,
            (result.completed_count, result.total_count, result.values()),
        ]


class Loop(VirtualClockLoop):
    """Keeps the moments for which timers were set."""

    def __init__(self) -> None:
        self.moments: list[int] = []
        super().__init__()

    def call_at(self, when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        self.moments.append(round(when * MICROSECONDS))
        return super().call_at(when, *args, **options)


def observe(engine: Any, program: Program) -> tuple[list[tuple[str, int, str]], str, list[int]]:
    """The trace, by task and then by time, how the run ended, and the moments of all timers."""
    machine = Machine(engine)
    with asyncio.Runner(loop_factory=Loop) as runner:
        ended = runner.run(machine.run(program))
        loop = runner.get_loop()
        assert isinstance(loop, Loop)
        return sorted(machine.log, key=lambda entry: entry[0]), ended, loop.moments


@pytest.fixture(autouse=True)
def _booked_like_a_done_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the oracle book the end of a branch where an asyncio done callback would."""
    monkeypatch.setattr(OracleSplit, "is_deferred", True)


@pytest.fixture(params=["native", "asyncio"])
def _branches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in which cano runs branches: as tasks of its own, and as asyncio's."""
    cano.configure(branches=request.param)
    yield
    cano.configure(branches="native")


@pytest.mark.model
@pytest.mark.timeout(600)  # a failing program is shrunk for minutes
@pytest.mark.usefixtures("_branches")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(program=programs())
def test_same_trace_as_the_plain_engine(program: Program) -> None:
    """Both engines start the same attempts at the same times and end in the same way, whatever the workflow."""
    trace, ended, moments = observe(pure_python, program)
    moments.sort()
    assume(all(later - earlier > 1 for earlier, later in pairwise(moments)))
    event(ended.split(" at ")[0].split(",")[0])
    event(f"{sum(name.endswith(' failed') for name, *_ in trace)} errors handled")

    ours, our_end, _ = observe(cano, program)

    assert (ours, our_end) == (trace, ended)


# Branches that meddle with each other


class Actor:
    """A branch that does what its script says: to itself, to its siblings, and to futures they all share."""

    def __init__(self, index: int, script: list[tuple[str, int]], stage: "Stage") -> None:
        self.index = index
        self.script = script
        self.stage = stage
        self.dice = random.Random(index)

    def duration(self) -> float:
        return self.dice.uniform(0.001, 0.05)

    def note(self, *facts: object) -> None:
        self.stage.notes[self.index].append((round(asyncio.get_running_loop().time() * MICROSECONDS), *facts))

    async def run(self) -> str:
        task = asyncio.current_task()
        assert task is not None
        self.stage.tasks[self.index] = task
        try:
            await asyncio.sleep(self.duration())  # branches of ours start at once, asyncio's in the next pass
            for action, number in self.script:
                try:
                    self.note(action, await getattr(self, action)(task, number), task.cancelling())
                except TimeoutError:
                    self.note(action, "timeout", task.cancelling())
            await asyncio.sleep(0)
        except BaseException as error:
            self.note(type(error).__name__, error.args)
            raise
        return f"value {self.index}"

    def sibling(self, number: int) -> "asyncio.Task[Any]":
        return self.stage.tasks.get(number % len(self.stage.notes), self.stage.tasks[self.index])

    def future(self, number: int) -> "asyncio.Future[int]":
        return self.stage.futures[number % len(self.stage.futures)]

    async def sleep(self, *_: object) -> None:
        await asyncio.sleep(self.duration())

    async def give_way(self, _: object, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    async def cancel(self, _: object, number: int) -> bool:
        return self.sibling(number).cancel(f"by {self.index}")

    async def uncancel(self, task: "asyncio.Task[Any]", _: int) -> int:
        return task.uncancel()

    async def swallow(self, *_: object) -> object:
        try:
            await asyncio.sleep(self.duration())
        except asyncio.CancelledError as error:
            return error.args
        return None

    async def resolve(self, _: object, number: int) -> None:
        if not self.future(number).done():
            self.future(number).set_result(self.index)

    async def wait(self, _: object, number: int) -> int:
        return await asyncio.wait_for(asyncio.shield(self.future(number)), self.duration())

    async def time_out(self, *_: object) -> None:
        async with asyncio.timeout(self.duration()):
            await asyncio.sleep(self.duration())

    async def gather(self, *_: object) -> tuple[int, int]:
        return await asyncio.gather(asyncio.sleep(self.duration(), 1), asyncio.sleep(self.duration(), 2))

    async def group(self, *_: object) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(self.duration()))
            await asyncio.sleep(self.duration())

    async def scope(self, *_: object) -> bool:
        with anyio.move_on_after(self.duration()) as scope:
            await asyncio.sleep(self.duration())
        return scope.cancelled_caught

    async def listen(self, _: object, number: int) -> None:
        self.sibling(number).add_done_callback(lambda task: self.note("heard", task.cancelled()))

    async def fail(self, *_: object) -> None:
        raise Oops(self.index)


_OTHER_METHODS = {"duration", "note", "run", "sibling", "future"}
ACTIONS = [name for name in vars(Actor) if not name.startswith("_") and name not in _OTHER_METHODS]


class Stage:
    """What the actors of one split share."""

    def __init__(self, scripts: list[list[tuple[str, int]]], *, bulkhead: int | None) -> None:
        self.notes: list[list[tuple[Any, ...]]] = [[] for _ in scripts]
        self.tasks: dict[int, asyncio.Task[Any]] = {}
        self.actors = [Actor(index, script, self) for index, script in enumerate(scripts)]
        self.bulkhead = bulkhead

    async def play(self, cancel_at: float | None) -> tuple[Any, ...]:
        self.futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
        results: list[str] = []

        def joined(result: cano.SplitResult) -> str:
            results.append(f"{result} {result.values()}")
            return "end"

        join = cano.JoinConfig(cano.JoinStrategy.All, "joined", bulkhead=self.bulkhead)
        workflow = cano.Workflow[str]().register_split("split", self.actors, join).register("joined", joined)
        run = asyncio.create_task(workflow.add_exit_state("end").orchestrate("split"))
        cancel = asyncio.get_running_loop().call_later(cancel_at or 1_000, run.cancel, "by the user")
        await asyncio.wait([run])
        cancel.cancel()
        if not run.cancelled() and (error := run.exception()) is not None:
            assert isinstance(error, cano.JoinError)
            results.append(f"{error.result} {[(type(one), one.args[:1]) for one in error.exceptions]}")
        return self.notes, results, run.cancelled(), asyncio.get_running_loop().time()


@pytest.mark.model
@pytest.mark.timeout(600)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scripts=st.lists(
        st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), max_size=6), min_size=1, max_size=4
    ),
    bulkhead=st.sampled_from([None, None, 2]),
    cancel_at=st.sampled_from([None, 0.0111, 0.0333, 0.0777]),
)
def test_native_branches_act_like_tasks_of_asyncio(
    scripts: list[list[tuple[str, int]]], bulkhead: int | None, cancel_at: float | None
) -> None:
    """Whatever branches do to each other, the same comes of it with branches of ours and with tasks of asyncio."""

    def observe(branches: Literal["native", "asyncio"]) -> tuple[Any, ...]:
        cano.configure(branches=branches)
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            return runner.run(Stage(scripts, bulkhead=bulkhead).play(cancel_at))

    try:
        theirs = observe("asyncio")
    finally:
        ours = observe("native")

    assert ours == theirs
