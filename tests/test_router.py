"""Routers: tasks that only choose the next state, and the doors that other models are turned away from."""

import asyncio
import enum
from functools import partial
from typing import Annotated, Literal

import pytest

from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    PollTask,
    Res,
    Resources,
    RouterTask,
    RunContext,
    SplitResult,
    SteppedTask,
    StreamTask,
    Task,
    TaskConfig,
    TaskResult,
    TimerTask,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
)


class S(enum.Enum):
    START = 1
    LEFT = 2
    RIGHT = 3
    DONE = 4


async def go():
    return S.DONE


def routed(router, resources=None, **options):
    """START is the router's; LEFT and RIGHT lead to DONE."""
    workflow = Workflow(resources).register_router(S.START, router, **options)
    return workflow.register(S.LEFT, go).register(S.RIGHT, go).add_exit_state(S.DONE)


def refusal(call, *args, **options):
    with pytest.raises(ConfigurationError) as caught:
        call(*args, **options)
    return str(caught.value)


class ByAmount(RouterTask[S]):
    async def route(self, amount: Annotated[int, Res("amount")]):
        return S.LEFT if amount < 100 else S.RIGHT


class Plain:
    def route(self):
        return S.LEFT


class Callable:
    async def __call__(self, res: Resources):
        assert isinstance(res, Resources)
        return S.LEFT


# What a router is


@pytest.mark.parametrize(("amount", "state"), [(5, S.LEFT), (500, S.RIGHT)])
async def test_router_chooses_the_next_state(amount, state):
    """A router reads, and returns one next state; it appears in the path like every state."""
    run = routed(ByAmount(), {"amount": amount}).start(S.START)

    # RO-001, FSM-009
    assert await run is S.DONE
    assert run.path == [S.START, state, S.DONE]


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(lambda: S.LEFT, id="function"),
        pytest.param(go, id="async function"),
        pytest.param(Callable(), id="callable object"),
        pytest.param(partial(lambda state: state, S.LEFT), id="partial"),
        pytest.param(Plain(), id="object with route"),
        pytest.param(Plain().route, id="bound method"),
        pytest.param(lambda: TaskResult.Single(S.LEFT), id="single"),
    ],
)
async def test_form_of_a_router(router):
    """A router is a function, a callable or an object with `route`, async or plain."""
    assert await routed(router).orchestrate(S.START) is S.DONE


async def test_router_asks_for_its_arguments():
    """The parameters of a router are filled in like a task's."""
    seen = []

    class Router:
        def route(self, res: Resources, ctx: RunContext, *, n: Annotated[int, Res("n")]):
            seen.append((res.get("n"), ctx.state, ctx.attempt, n))
            return S.DONE

    await routed(Router(), {"n": 7}).orchestrate(S.START)

    assert seen == [(7, S.START, 1, 7)]


async def test_router_after_a_split():
    """A state that a split joins into may route by what the branches gave."""

    class Router:
        def route(self, result: SplitResult):
            return S.LEFT if sum(result.values()) == 3 else S.RIGHT

    split = [lambda: 1, lambda: 2]
    workflow = routed(Router()).register_split("split", split, JoinConfig(JoinStrategy.All, S.START))
    run = workflow.start("split")

    await run

    assert run.path[-2] is S.LEFT


async def test_router_without_a_configuration_runs_once():
    """A router is named after its class, and nothing of it is repeated unasked."""
    calls = []

    class Failing(RouterTask[S]):
        def route(self):
            calls.append(1)
            raise KeyError

    with pytest.raises(KeyError) as caught:
        await routed(Failing()).orchestrate(S.START)

    # RO-002: retries only where they are configured
    assert len(calls) == 1
    assert caught.value.__cano__.task == Failing.__qualname__


@pytest.mark.parametrize("place", ["attribute", "registration"])
async def test_router_with_a_configuration(place):
    """A router has the retries and limits of its configuration."""
    calls = []
    config = TaskConfig().with_fixed_retry(2, 0).with_attempt_timeout(5)

    class Failing(RouterTask[S]):
        name = "sorter"

        async def route(self):
            calls.append(1)
            if len(calls) < 3:
                raise KeyError
            return S.DONE

    router = Failing()
    router.config = config if place == "attribute" else TaskConfig()

    await routed(router, config=None if place == "attribute" else config).orchestrate(S.START)

    # RO-002
    assert len(calls) == 3


@pytest.mark.virtual
async def test_router_with_an_attempt_timeout():
    """A router that takes longer than its limit fails."""
    with pytest.raises(AttemptTimeoutError):
        await routed(partial(asyncio.sleep, 60), config=TaskConfig(attempt_timeout=1)).orchestrate(S.START)


async def test_router_that_waits_is_cancelled():
    """A cancel reaches a router where it waits, and ends the run."""
    waits = partial(asyncio.sleep, 3600)
    run = routed(waits).start(S.START)
    await asyncio.sleep(0)

    run.cancel()

    with pytest.raises(WorkflowCancelledError):
        await run
    assert run.path == [S.START]  # CN-017


# What it returns


@pytest.mark.parametrize(
    "router", [lambda: TaskResult.Split([S.LEFT, S.RIGHT]), ByAmount()], ids=["function", "object"]
)
async def test_router_cannot_split(router, monkeypatch):
    """A split out of a router is refused when it is returned, with the reason."""
    monkeypatch.setattr(ByAmount, "route", lambda _: TaskResult.Split([S.LEFT, S.RIGHT]))

    with pytest.raises(WorkflowError, match=r"returned TaskResult.Split; a router cannot split") as caught:
        await routed(router).orchestrate(S.START)

    assert caught.value.state is S.START  # RO-003, D05


@pytest.mark.parametrize("value", [None, 5, "LEFT"], ids=repr)
async def test_router_that_returns_no_state(value):
    """What is no state is refused, naming the type."""
    with pytest.raises(InvalidTransitionError, match=type(value).__name__):
        await routed(lambda: value).orchestrate(S.START)


def test_router_declares_its_states():
    """A `Literal` annotation of `route` is known to `validate()`."""

    class Router(RouterTask[S]):
        def route(self) -> Literal[S.LEFT, S.RIGHT]:
            return S.LEFT

    workflow = Workflow().register_router(S.START, Router()).register(S.LEFT, go).add_exit_state(S.DONE)

    assert "state START leads to RIGHT, which is neither registered nor an exit state" in refusal(workflow.validate)


# The doors


class Poll(PollTask[S]):
    def poll(self):
        raise NotImplementedError


class Timer(TimerTask[S]):
    def wait(self):
        raise NotImplementedError

    def after_wait(self):
        raise NotImplementedError


class Steps(SteppedTask[S]):
    def step(self, cursor):
        raise NotImplementedError


class Items(StreamTask[S]):
    def open(self, cursor):
        raise NotImplementedError

    def process_item(self, item):
        raise NotImplementedError

    def flush_window(self, outputs):
        raise NotImplementedError

    def on_close(self, reason):
        raise NotImplementedError


class Ran(Task[S]):
    def run(self):
        raise NotImplementedError


def without_base(cls):
    """The same methods, on a class that has no base."""
    return type(cls.__name__, (), {name: value for name, value in vars(cls).items() if callable(value)})()


def decorated(task):
    return Workflow().task(S.START)(task)


DOORS = {
    "register": lambda task: Workflow().register(S.START, task),
    "task": decorated,
    "branch": lambda task: Workflow().register_split(S.START, [task], JoinConfig(JoinStrategy.All, S.DONE)),
    "register_router": lambda task: Workflow().register_router(S.START, task),
    "register_stepped": lambda task: Workflow().register_stepped(S.START, task),
    "register_stream": lambda task: Workflow().register_stream(S.START, task),
}
MODELS = {
    "router": (ByAmount, "register_router"),
    "poll task": (Poll, "register"),
    "timer": (Timer, "register"),
    "stepped task": (Steps, "register_stepped"),
    "stream": (Items, "register_stream"),
}


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "methods"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("model", MODELS)
def test_door_of_a_model(model, door, has_base):
    """Each model has one door (that of tasks is also that of branches); every other one names it."""
    # B56
    cls, right = MODELS[model]
    task = cls() if has_base else without_base(cls)

    if right == door or (right == "register" and door in ("task", "branch")):
        DOORS[door](task)
    else:
        assert (
            refusal(DOORS[door], task) == f"task {task.__class__.__qualname__} is a {model}; register it with {right}()"
        )


@pytest.mark.parametrize(
    ("task", "text"),
    [
        pytest.param(lambda: None, "got None", id="None"),
        pytest.param(lambda: 5, r"got 5 \(int\)", id="number"),
        pytest.param(Ran, r"register\(\) takes any other task", id="task"),
        pytest.param(lambda: Steps, r"Steps is a class; register an instance: Steps\(\)", id="class"),
    ],
)
@pytest.mark.parametrize("door", ["register_router", "register_stepped", "register_stream"])
def test_door_of_one_model_for_something_else(door, task, text):
    """What follows no model is refused by the doors of the models."""
    with pytest.raises(ConfigurationError, match=text):
        DOORS[door](task())


@pytest.mark.parametrize("door", ["register_stepped", "register_stream"])
def test_function_is_neither_stepped_nor_a_stream(door):
    """A function has no methods: only a router may be one."""
    assert "must be an object with" in refusal(DOORS[door], go)


@pytest.mark.parametrize(
    ("base", "door", "missing"),
    [
        (RouterTask, "register_router", "route"),
        (PollTask, "register", "poll"),
        (TimerTask, "register", "wait and after_wait"),
        (SteppedTask, "register_stepped", "step"),
        (StreamTask, "register_stream", "open and process_item and flush_window and on_close"),
    ],
)
def test_model_without_its_methods(base, door, missing):
    """A model whose methods are missing is refused, naming them."""
    task = type("Empty", (base,), {"run": lambda _: S.DONE})()

    assert refusal(DOORS[door], task).endswith(f"without a method {missing}")


async def test_run_wins_where_there_is_no_base():
    """An object with `run`, or one that can be called, is a task, whatever else it has."""

    class Process:
        def poll(self):
            raise NotImplementedError

        def run(self):
            return S.DONE

    class Called(Process):
        run = None

        def __call__(self):
            return S.DONE

    for task in (Process(), Called()):
        assert await Workflow().register(S.START, task).add_exit_state(S.DONE).orchestrate(S.START) is S.DONE


@pytest.mark.parametrize("task", [Poll(), Timer()], ids=["poll", "timer"])
def test_model_takes_no_join(task):
    """A model cannot split, so a join for it is refused when it is registered."""
    text = refusal(Workflow().register, S.START, task, join=JoinConfig(JoinStrategy.All, S.DONE))

    assert text.endswith("which cannot split: it takes no join")


async def test_branches_made_at_run_time_are_checked():
    """A stream among branches that are made at run time is refused then."""
    workflow = Workflow().register_split(S.START, lambda: [Items()], JoinConfig(JoinStrategy.All, S.DONE))

    with pytest.raises(ConfigurationError, match=r"register it with register_stream\(\)"):
        await workflow.add_exit_state(S.DONE).orchestrate(S.START)


# Reading the methods


def stepping(function):
    return type("Task", (), {"step": function})()


def takes_no_cursor(self):
    raise NotImplementedError


def takes_the_context_first(self, ctx: RunContext):
    raise NotImplementedError


def takes_its_cursor_by_name(self, *, cursor):
    raise NotImplementedError


def takes_anything(self, *args):
    raise NotImplementedError


def takes_something_unknown(self, cursor, path: str):
    raise NotImplementedError


def takes_two_without_annotation(self, cursor, a, b):
    raise NotImplementedError


def yields(self, cursor):
    yield


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (takes_no_cursor, "task Task.step must take cursor first, got"),
        (takes_the_context_first, "task Task.step must take cursor first, got"),
        (takes_its_cursor_by_name, "task Task.step must take cursor first, got"),
        (takes_anything, "task Task.step must take cursor first, got"),
        (takes_something_unknown, "parameter path of task Task.step is annotated"),
        (takes_two_without_annotation, "parameter a of task Task.step has no annotation"),
        (yields, "task Task.step is a generator function"),
    ],
)
def test_method_that_cannot_be_called(step, text):
    """A method whose arguments cannot be filled in is refused, naming task and method."""
    assert refusal(Workflow().register_stepped, S.START, stepping(step)).startswith(text)
