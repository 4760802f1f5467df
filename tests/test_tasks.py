"""Tasks: their forms, names and configuration, what is injected, what they may return, `RunContext`, `in_thread`."""

import asyncio
import contextvars
import enum
import functools
import gc
import importlib.util
import inspect
import itertools
import threading
import weakref
from collections.abc import Awaitable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    CanoError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    MemoryStore,
    Res,
    ResourceNotFoundError,
    Resources,
    ResourceTypeError,
    RetryExhaustedError,
    RunContext,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowError,
    _tasks,
    in_thread,
    testing,
)


class S(enum.Enum):
    START = 1
    MIDDLE = 2
    DONE = 3
    FAILED = 4


def simple(task, resources=None, **options):
    """START runs the task; DONE and FAILED end."""
    return Workflow(resources).register(S.START, task, **options).add_exit_states([S.DONE, S.FAILED])


def name_in_errors(task):
    """What the errors of a run call the task."""
    with pytest.raises(InvalidTransitionError) as caught:
        testing.run(simple(task).orchestrate(S.START))
    return caught.value.task


# Forms of a task


async def asynchronous():
    return S.DONE


def plain():
    return S.DONE


def to(state):
    return state


async def to_later(state):
    await asyncio.sleep(0)
    return state


class Forms:
    """A task in every form that a class can give it."""

    async def method(self):
        return S.DONE

    def plain_method(self):
        return S.DONE

    @classmethod
    async def class_method(cls):
        return S.DONE

    @staticmethod
    def static_method():
        return S.DONE


class WithRun:
    async def run(self):
        return S.DONE


class WithPlainRun:
    def run(self):
        return S.DONE


class WithStaticRun:
    @staticmethod
    async def run():
        return S.DONE


class WithRunBare:
    async def run_bare(self):
        return S.DONE


class WithSlots:
    __slots__ = ()

    def run(self):
        return S.DONE


class Callable:
    def __call__(self):
        return S.DONE


class AsyncCallable:
    async def __call__(self, ctx: RunContext):
        return S.DONE


class OwnTask(Task[S]):
    async def run(self, res: Resources):
        return S.DONE


class RunAttribute:
    """An object whose `run` is a function it was given."""

    def __init__(self):
        self.run = plain


def wrapped(function):
    """A decorator that keeps the signature."""

    @functools.wraps(function)
    async def call(*args, **kwargs):
        return await function(*args, **kwargs)

    return call


@wrapped
async def decorated(ctx: RunContext):
    return S.DONE


@wrapped
@wrapped
async def decorated_twice(ctx: RunContext):
    return S.DONE


class Later:
    """An awaitable that is no coroutine."""

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return S.DONE


FORMS = [
    pytest.param(asynchronous, id="async function"),
    pytest.param(plain, id="plain function"),
    pytest.param(lambda: S.DONE, id="lambda"),
    pytest.param(lambda: asynchronous(), id="function that returns a coroutine"),  # noqa: PLW0108 - the call is the case
    pytest.param(lambda: Later(), id="function that returns an awaitable"),  # noqa: PLW0108
    pytest.param(Forms().method, id="bound method"),
    pytest.param(Forms().plain_method, id="bound plain method"),
    pytest.param(Forms.class_method, id="class method"),
    pytest.param(Forms().static_method, id="static method"),
    pytest.param(functools.partial(to, S.DONE), id="partial"),
    pytest.param(functools.partial(to_later, state=S.DONE), id="async partial by keyword"),
    pytest.param(functools.partial(functools.partial(to_later), S.DONE), id="partial of a partial"),
    pytest.param(functools.cache(plain), id="cached function"),
    pytest.param(decorated, id="decorated function"),
    pytest.param(decorated_twice, id="function decorated twice"),
    pytest.param(WithRun(), id="object with run"),
    pytest.param(WithPlainRun(), id="object with plain run"),
    pytest.param(WithStaticRun(), id="object with static run"),
    pytest.param(WithRunBare(), id="object with run_bare"),
    pytest.param(WithSlots(), id="object with slots"),
    pytest.param(RunAttribute(), id="object with a function as run"),
    pytest.param(Callable(), id="callable object"),
    pytest.param(AsyncCallable(), id="async callable object"),
    pytest.param(OwnTask(), id="Task"),
    pytest.param(in_thread(plain), id="in_thread"),
    pytest.param(wrapped(in_thread(plain)), id="decorated in_thread"),
]


@pytest.mark.parametrize("task", FORMS)
async def test_form_of_a_task(task):
    """A task is a function, a callable, or an object with `run` or `run_bare`, async or plain."""
    assert await simple(task).orchestrate(S.START) is S.DONE


@pytest.mark.parametrize("task", FORMS)
async def test_form_of_a_branch(task):
    """A branch of a split is written like any task."""
    seen = []

    def joined(result: SplitResult):
        seen.append(result.values())
        return S.DONE

    workflow = Workflow().register_split(S.START, [task, task], JoinConfig(JoinStrategy.All, S.MIDDLE))

    await workflow.register(S.MIDDLE, joined).add_exit_state(S.DONE).orchestrate(S.START)

    assert seen == [[S.DONE, S.DONE]]


@pytest.mark.parametrize("task", FORMS)
async def test_form_of_a_task_with_a_policy(task):
    """Retries and time limits take nothing from the forms a task may have."""
    config = TaskConfig().with_fixed_retry(1, 0).with_attempt_timeout(60)

    assert await simple(task, config=config).orchestrate(S.START) is S.DONE


def test_run_wins_over_run_bare():
    """Where an object has both methods, `run` is called and `run_bare` never."""

    class Both:
        def run(self, res):
            return S.DONE

        def run_bare(self):
            return S.FAILED

    # WF-031
    assert testing.run(simple(Both()).orchestrate(S.START)) is S.DONE


def test_run_wins_over_call():
    """Where an object has `run` and can be called as well, `run` is called."""

    class Both:
        def run(self):
            return S.DONE

        def __call__(self):
            return S.FAILED

    assert testing.run(simple(Both()).orchestrate(S.START)) is S.DONE


def test_run_bare_takes_nothing_from_a_run_that_is_no_method():
    """A `run` that cannot be called is passed over."""

    class Odd:
        run = 5

        def run_bare(self):
            return S.DONE

    assert testing.run(simple(Odd()).orchestrate(S.START)) is S.DONE


def test_object_without_a_run_method():
    """An object with neither method is refused when it is registered, naming its type."""
    # WF-030
    with pytest.raises(
        ConfigurationError, match=r"a task must be .* or an object with a method run or run_bare, got .*\(Task\)"
    ):
        simple(Task())


def test_function_and_method_of_the_same_code():
    """A function that is also a method is called rightly in both roles, whichever was registered first."""

    async def step(res):
        return S.DONE

    class Holder:
        run = step

    for task in (step, Holder(), step):
        assert testing.run(simple(task).orchestrate(S.START)) is S.DONE


def test_unbound_method_takes_its_self_from_the_resources():
    """A method taken from its class is a plain function of one parameter, also after it was used as a bound method."""
    bound = simple(WithRun())
    seen = []

    class Seeing:
        def run(self):
            seen.append(self)
            return S.DONE

    testing.run(simple(Seeing()).orchestrate(S.START))
    testing.run(simple(Seeing.run).orchestrate(S.START))

    assert [type(one) for one in seen] == [Seeing, Resources]
    assert testing.run(bound.orchestrate(S.START)) is S.DONE


def test_signature_is_read_at_registration_only(monkeypatch):
    """No signature is looked at while a workflow runs."""
    workflow = simple(decorated).register(S.MIDDLE, OwnTask())

    monkeypatch.setattr(inspect, "signature", None)

    assert testing.run(workflow.orchestrate(S.START)) is S.DONE


def test_reading_a_signature_keeps_nothing_alive():
    """What was read of a function goes with the function."""

    def task(ctx: RunContext):
        return S.DONE

    reference = weakref.ref(task)
    testing.run(simple(task).orchestrate(S.START))

    del task
    gc.collect()

    assert reference() is None


def stops():
    return next(iter([]))


class Stops:
    def __call__(self):
        return next(iter([]))


class StopsLater:
    """An awaitable that fails to make its iterator."""

    def __await__(self):
        return next(iter([]))


STOPPING = [
    pytest.param(stops, id="function"),
    pytest.param(Stops(), id="callable object"),
    pytest.param(lambda: StopsLater(), id="awaitable"),  # noqa: PLW0108
    pytest.param(in_thread(stops), id="in_thread"),
]


@pytest.mark.parametrize("task", STOPPING)
def test_stop_iteration_is_a_failure(task):
    """A StopIteration out of a plain function fails the run, as it fails a coroutine, instead of ending it."""
    with pytest.raises(RuntimeError) as caught:
        testing.run(simple(task).orchestrate(S.START))

    assert isinstance(caught.value.__cause__, StopIteration)
    assert caught.value.__cano__.state is S.START


@pytest.mark.parametrize("task", STOPPING)
def test_stop_iteration_fails_a_branch(task):
    """A StopIteration out of a branch is a failure of that branch."""
    seen = []

    def joined(result: SplitResult):
        seen.append((len(result.successes), [type(outcome.error) for outcome in result.errors]))
        return S.DONE

    join = JoinConfig(JoinStrategy.PartialResults(2), S.MIDDLE)
    workflow = Workflow().register_split(S.START, [task, plain], join).register(S.MIDDLE, joined).add_exit_state(S.DONE)

    testing.run(workflow.orchestrate(S.START))

    assert seen == [(1, [RuntimeError])]


# Names


class Named:
    name = "charge"

    def run(self):
        return None


class NamedByProperty(Named):
    @property
    def name(self):
        return "by property"


class NamedByNumber(Named):
    name = 5


def function():
    return None


@pytest.mark.parametrize(
    ("task", "name"),
    [
        pytest.param(function, "function", id="function"),
        pytest.param(lambda: None, "<lambda>", id="lambda"),
        pytest.param(functools.partial(function), "function", id="partial"),
        pytest.param(functools.partial(functools.partial(function)), "function", id="partial of a partial"),
        pytest.param(wrapped(in_thread(function)), "function", id="decorated"),
        pytest.param(Named().run, "Named.run", id="bound method"),
        pytest.param(Named(), "charge", id="name"),
        pytest.param(NamedByProperty(), "by property", id="property"),
        pytest.param(NamedByNumber(), "NamedByNumber", id="name that is no text"),
        pytest.param(in_thread(function), "function", id="in_thread"),
        pytest.param(in_thread(functools.partial(function)), "function", id="in_thread of a partial"),
        pytest.param(in_thread(Named().run), "Named.run", id="in_thread of a method"),
    ],
)
def test_name_of_a_task(task, name):
    """Errors call a task by its `name`, else by the qualified name of its function or class."""
    # WF-036
    assert name_in_errors(task) == name


def test_name_of_an_instance():
    """A name may be set on the object that is registered."""
    task = Named()
    task.name = "refund"

    assert name_in_errors(task) == "refund"


def test_long_names_of_functions_are_cut():
    """Of a qualified name, the last 128 characters are kept."""

    def task():
        return None

    task.__qualname__ = "x" * 200 + ".task"

    assert name_in_errors(task) == "x" * 123 + ".task"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("", "must have 1 to 128 bytes, got 0", id="empty"),
        pytest.param("x" * 129, "must have 1 to 128 bytes, got 129", id="129 bytes"),
        pytest.param("é" * 65, "must have 1 to 128 bytes, got 130", id="130 bytes in 65 characters"),
        pytest.param("\ud800", r"must be printable, got '\\ud800'", id="lone surrogate"),
        pytest.param("a\nb", r"must be printable, got 'a\\nb'", id="newline"),
    ],
)
def test_name_out_of_range(name, message):
    """A name that was chosen has 1 to 128 bytes of printable text."""
    task = Named()
    task.name = name

    with pytest.raises(ConfigurationError, match=f"the name of a task {message}"):
        simple(task)


def test_name_that_raises():
    """What the property behind a name raises comes out as it is."""

    class Task:
        @property
        def name(self):
            raise RuntimeError("no name")

        def run(self):
            return S.DONE

    with pytest.raises(RuntimeError, match="no name"):
        simple(Task())


# Configuration


class Configured:
    """Fails until it has failed often enough."""

    config = TaskConfig().with_fixed_retry(2, 0)

    def __init__(self, failures=2):
        self.failures = failures
        self.calls = 0

    def run(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise ValueError("not yet")
        return S.DONE


def test_config_of_the_class():
    """A task's class says how it is run."""
    task = Configured()

    testing.run(simple(task).orchestrate(S.START))

    assert task.calls == 3


def test_config_of_the_instance():
    """An attribute of the object takes the place of that of its class."""
    task = Configured()
    task.config = TaskConfig.minimal()

    with pytest.raises(ValueError, match="not yet"):
        testing.run(simple(task).orchestrate(S.START))


def test_config_of_the_registration():
    """What is given at registration takes the place of the task's own."""
    task = Configured()

    with pytest.raises(ValueError, match="not yet"):
        testing.run(simple(task, config=TaskConfig()).orchestrate(S.START))


def test_config_of_none():
    """A config of None on the task is the default: one attempt."""
    task = Configured()
    task.config = None

    with pytest.raises(ValueError, match="not yet"):
        testing.run(simple(task).orchestrate(S.START))


def test_config_is_read_at_registration():
    """A later change of the attribute is not seen."""
    task = Configured()
    workflow = simple(task)

    # WF-035
    task.config = None
    testing.run(workflow.orchestrate(S.START))

    assert task.calls == 3


def test_config_of_a_branch():
    """A branch has its own configuration."""
    task = Configured()
    workflow = Workflow().register_split(S.START, [task], JoinConfig(JoinStrategy.All, S.DONE)).add_exit_state(S.DONE)

    testing.run(workflow.orchestrate(S.START))

    assert task.calls == 3


def test_config_in_the_decorator():
    """`task` takes the same options as `register`."""
    task = Configured()
    workflow = Workflow().add_exit_state(S.DONE)

    @workflow.task(S.START, config=TaskConfig().with_fixed_retry(2, 0))
    def start():
        return task.run()

    assert testing.run(workflow.orchestrate(S.START)) is S.DONE


@pytest.mark.parametrize("config", [5, "x", {}, TaskConfig], ids=["number", "text", "dict", "class"])
def test_config_of_another_type(config):
    """A config that is no TaskConfig is refused, on the task or at registration."""
    task = Named()
    task.config = config

    for options in ({}, {"config": config}):
        with pytest.raises(ConfigurationError, match="config of task charge must be a TaskConfig, got "):
            simple(task, **options)


# Injection


def injected(task, resources=None, **options):
    """What the task got: it must return it as a list, before which it is run in START."""
    seen = []

    @functools.wraps(task)
    async def start(*args, **kwargs):
        seen.extend(await task(*args, **kwargs))
        return S.DONE

    start.__annotations__ = {name: kind for name, kind in task.__annotations__.items() if name != "return"}
    testing.run(simple(start, resources, **options).orchestrate(S.START))
    return seen


async def test_single_parameter_without_annotation():
    """A task's only parameter may go without annotation: it gets the resources."""
    seen = []
    resources = Resources()

    await simple(lambda anything: seen.append(anything) or S.DONE, resources).orchestrate(S.START)

    assert seen == [resources]


class OwnResources(Resources):
    pass


def test_injected_resources():
    """Resources, or a subclass of it, is the run's resources."""
    resources = OwnResources({"n": 1})

    async def task(a: Resources, b: OwnResources):
        return [a, b]

    assert injected(task, resources) == [resources, resources]


@runtime_checkable
class Store(Protocol):
    def put(self, key, value): ...


class Unchecked(Protocol):
    def nothing(self): ...


def takes(annotation):
    async def task(value):
        return [value]

    task.__annotations__ = {"value": annotation}
    return task


STORE = MemoryStore()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        pytest.param(Annotated[MemoryStore, Res("key")], STORE, id="class"),
        pytest.param(Annotated[object, Res("key")], STORE, id="object"),
        pytest.param(Annotated[Any, Res("key")], STORE, id="Any"),
        pytest.param(Annotated[MemoryStore | None, Res("key")], None, id="optional"),
        pytest.param(Annotated[list[int], Res("key")], [1], id="generic"),
        pytest.param(Annotated[list[int] | dict[str, int], Res("key")], {}, id="union of generics"),
        pytest.param(Annotated[Store, Res("key")], STORE, id="runtime protocol"),
        pytest.param(Annotated[MemoryStore, "other", Res("key"), "more"], STORE, id="other metadata"),
        pytest.param(Annotated[Annotated[MemoryStore, Res("key")], "outer"], STORE, id="nested"),
    ],
)
def test_injected_resource(annotation, value):
    """`Annotated[T, Res(key)]` is the resource under that key, checked as far as isinstance can."""
    resources = Resources({"key": value})

    assert injected(takes(annotation), resources)[0] is value


def test_resource_whose_type_cannot_be_checked():
    """A protocol that isinstance cannot check is refused with the way out, instead of going unchecked."""

    def task(value: Annotated[Unchecked, Res("key")]):
        raise AssertionError("called")

    with pytest.raises(ConfigurationError, match="use a class or a runtime_checkable Protocol"):
        testing.run(simple(task, {"key": STORE}).orchestrate(S.START))


class Key(enum.Enum):
    STORE = 1


@pytest.mark.parametrize("key", ["key", Key.STORE, ("a", 1), 5, None], ids=repr)
def test_injected_resource_by_any_key(key):
    """A resource's key may be any hashable value."""
    assert injected(takes(Annotated[int, Res(key)]), {key: 7}) == [7]


def test_resource_that_is_missing():
    """A missing resource fails the run at the task, and is never retried."""
    # B49
    calls = itertools.count()

    def task(value: Annotated[int, Res("key")]):
        next(calls)

    with pytest.raises(ResourceNotFoundError, match="no resource 'key'") as caught:
        testing.run(simple(task, config=TaskConfig().with_fixed_retry(5, 0)).orchestrate(S.START))

    assert (caught.value.state, caught.value.attempt, next(calls)) == (S.START, 1, 0)


def test_resource_of_another_type():
    """A resource of another type than annotated fails the run before the task is called."""

    def task(value: Annotated[int, Res("key")]):
        raise AssertionError("called")

    with pytest.raises(ResourceTypeError, match="resource 'key' is of type str, wanted int"):
        testing.run(simple(task, {"key": "text"}).orchestrate(S.START))


def test_resource_is_looked_up_once_per_run():
    """However often a state is entered, its resources are looked up and checked once in a run."""
    looked_up = []

    class Counting(Resources):
        def get(self, key, type_=None):
            looked_up.append(key)
            return super().get(key, type_)

    calls = itertools.count(1)

    def task(value: Annotated[int, Res("key")], other: Annotated[int, Res("other")]):
        return S.START if next(calls) % 10 else S.DONE

    workflow = simple(task, Counting({"key": 1, "other": 2}))
    for _ in range(2):
        testing.run(workflow.orchestrate(S.START))

    assert looked_up == ["key", "other"] * 2


def test_parameters_of_every_kind():
    """Positional-only, plain and keyword-only parameters are filled in alike, in any order of their sources."""

    async def task(
        one: Annotated[int, Res(1)],
        /,
        ctx: RunContext,
        two: Annotated[int, Res(2)],
        *,
        res: Resources,
        three: Annotated[int, Res(3)],
    ):
        return [one, type(ctx), two, type(res), three]

    assert injected(task, {1: "one", 2: "two", 3: "three"} | {n: n for n in (1, 2, 3)}) == [
        1,
        RunContext,
        2,
        Resources,
        3,
    ]


def test_parameters_with_defaults():
    """A default stays unless the annotation asks for something of ours; what follows is passed by keyword."""

    async def task(
        number: int = 3, ctx: RunContext = None, anything=None, store: Annotated[int, Res(1)] = 9, *, more="x"
    ):
        return [number, type(ctx), anything, store, more]

    assert injected(task, {1: 1}) == [3, RunContext, None, 1, "x"]


def test_parameters_beside_those_of_a_partial():
    """What a partial gives is left alone, the rest is filled in."""
    seen = []

    def task(name, ctx: RunContext, *, store: Annotated[int, Res(1)], level):
        seen.append((name, ctx.state, store, level))
        return S.DONE

    partial = functools.partial(task, "a", level=5)

    testing.run(simple(partial, {1: 1}).orchestrate(S.START))

    assert seen == [("a", S.START, 1, 5)]


def test_parameters_of_a_bound_method():
    """The `self` of a method is not filled in."""
    seen = []

    class Holder:
        def step(self, res, /):
            seen.append((type(self), type(res)))
            return S.DONE

    testing.run(simple(Holder().step).orchestrate(S.START))

    assert seen == [(Holder, Resources)]


JOIN = JoinConfig(JoinStrategy.All, S.MIDDLE)


def joining(task):
    """START splits into two branches and joins into MIDDLE, which runs the task."""
    return (
        Workflow().register_split(S.START, [lambda: 1, lambda: 2], JOIN).register(S.MIDDLE, task).add_exit_state(S.DONE)
    )


@pytest.mark.parametrize("annotation", [SplitResult, SplitResult | None], ids=["required", "optional"])
def test_injected_split_result(annotation):
    """The state that a split joins into gets its result."""
    seen = []

    def joined(result):
        seen.append(result.values())
        return S.DONE

    joined.__annotations__ = {"result": annotation}
    testing.run(joining(joined).orchestrate(S.START))

    assert seen == [[1, 2]]


def test_split_result_is_kept_for_one_visit():
    """The result is gone when the state is entered again another way."""
    seen = []

    def joined(result: SplitResult | None):
        seen.append(result and result.values())
        return S.MIDDLE if result else S.DONE

    testing.run(joining(joined).orchestrate(S.START))

    assert seen == [[1, 2], None]


def test_split_result_in_every_attempt():
    """Each attempt of the joined state's task gets the result."""
    seen = []

    def joined(result: SplitResult):
        seen.append(result.values())
        if len(seen) < 3:
            raise ValueError("not yet")
        return S.DONE

    workflow = Workflow().register_split(S.START, [lambda: 1, lambda: 2], JOIN).add_exit_state(S.DONE)
    workflow.register(S.MIDDLE, joined, config=TaskConfig().with_fixed_retry(5, 0.1))
    testing.run(workflow.orchestrate(S.START))

    assert seen == [[1, 2]] * 3


def test_split_result_without_a_split():
    """A task that needs the result fails where its state was entered another way, and is told what to write."""

    def joined(result: SplitResult):
        return S.DONE

    with pytest.raises(WorkflowError, match=r"annotate the parameter SplitResult \| None") as caught:
        testing.run(joining(joined).orchestrate(S.MIDDLE))

    assert caught.value.state is S.MIDDLE


def generator():
    yield S.DONE


async def async_generator():
    yield S.DONE


def two_without_annotation(a, b):
    return S.DONE


def one_without_annotation(ctx: RunContext, b):
    return S.DONE


def of_another_type(value: int):
    return S.DONE


def of_a_union(ctx: RunContext | None):
    return S.DONE


def annotated_without_res(value: Annotated[int, "key"]):
    return S.DONE


def not_resolved(value: "Missing"):  # noqa: F821
    return S.DONE


def not_parsed(value: "not an annotation"):  # noqa: F722
    return S.DONE


def positional_after_default(number=1, ctx: RunContext = None, /):
    return S.DONE


def with_keywords(**kwargs):
    return S.DONE


def unwrapped(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param(two_without_annotation, "parameter a of task .* has no annotation", id="two without annotation"),
        pytest.param(one_without_annotation, "parameter b of task .* has no annotation", id="one of two without"),
        pytest.param(of_another_type, "parameter value of task of_another_type is annotated .*int", id="other type"),
        pytest.param(of_a_union, "parameter ctx of task of_a_union is annotated", id="union"),
        pytest.param(annotated_without_res, "parameter value of task annotated_without_res is", id="Annotated"),
        pytest.param(
            not_resolved, "the annotation 'Missing' of parameter value .* cannot be resolved", id="unresolved"
        ),
        pytest.param(not_parsed, "the annotation 'not an annotation' .* cannot be resolved", id="not parsed"),
        pytest.param(unwrapped(plain), r"parameter \*args of task .* cannot be filled in", id="args"),
        pytest.param(with_keywords, r"parameter \*\*kwargs of task .* cannot be filled in", id="kwargs"),
        pytest.param(unwrapped(plain), r"decorators need functools\.wraps", id="decorator without wraps"),
        pytest.param(positional_after_default, "parameter ctx .* must not follow one with a default", id="positional"),
        pytest.param(min, "the signature of task min cannot be read", id="builtin"),
    ],
)
def test_signature_that_cannot_be_filled(task, message):
    """What a parameter asks for is checked at registration, of tasks, branches and split functions alike."""
    for register in (
        lambda: simple(task),
        lambda: Workflow().register_split(S.START, [task], JOIN),
        lambda: Workflow().register_split(S.START, task, JOIN),
        lambda: Workflow().task(S.START)(task),
    ):
        with pytest.raises(ConfigurationError, match=message):
            register()


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(generator, id="generator"),
        pytest.param(async_generator, id="async generator"),
        pytest.param(functools.partial(generator), id="partial"),
    ],
)
def test_generator_is_no_task(task):
    """A generator function is refused: a task returns its next state once."""
    for register in (lambda: simple(task), lambda: Workflow().register_split(S.START, [task], JOIN)):
        with pytest.raises(ConfigurationError, match=r"task \w+ is a generator function"):
            register()


MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cano import MemoryStore, Res, Resources, RunContext, SplitResult, Task

if TYPE_CHECKING:
    from cano import Nothing

seen = []


async def start(res: Resources, store: Annotated[MemoryStore, Res("store")], *, ctx: RunContext) -> Literal["later"]:
    seen.append([type(res), type(store), type(ctx)])
    return "later"


class Later_(Task[str]):
    async def run(self, later: Annotated[Later, Res("later")], local: int = 5) -> Literal["done"]:
        seen.append([type(later), local])
        return "done"


class Later:
    pass


async def under_type_checking(value: Nothing) -> str:
    return "done"


async def returns_nothing_known() -> Nothing:
    return "done"


def in_a_function():
    class Local:
        pass

    async def task(value: Annotated[Local, Res("local")]) -> Literal["done"]:
        seen.append([type(value) is Local])
        return "done"

    async def not_captured(value: Annotated[Hidden, Res("local")]):
        return "done"

    class Hidden:
        pass

    return Local, task, not_captured
"""


@pytest.fixture
def future_annotations(tmp_path):
    """A module in which all annotations are texts."""
    path = tmp_path / "tasks_with_future_annotations.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("tasks_with_future_annotations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_future_annotations(future_annotations):
    """Annotations that are texts are resolved where the function was written, also names that came later."""
    module = future_annotations
    resources = {"store": MemoryStore(), "later": module.Later()}
    workflow = Workflow(resources).register("start", module.start).register("later", module.Later_())

    testing.run(workflow.add_exit_state("done").orchestrate("start"))

    assert module.seen == [[Resources, MemoryStore, RunContext], [module.Later, 5]]


def test_future_annotations_declare_targets(future_annotations):
    """A return annotation that is a text declares targets like any other."""
    workflow = Workflow().register("start", future_annotations.start).add_exit_state("done")

    with pytest.raises(ConfigurationError, match="state start leads to later, which is neither registered"):
        workflow.validate()


def test_future_annotations_inside_a_function(future_annotations):
    """Names of an enclosing function are found where the task's own code uses them."""
    local, task, _ = future_annotations.in_a_function()
    workflow = Workflow({"local": local()}).register("start", task).add_exit_state("done")

    testing.run(workflow.orchestrate("start"))

    assert future_annotations.seen == [[True]]


def test_future_annotations_that_were_not_captured(future_annotations):
    """A name of an enclosing function that only the annotation uses is gone at run time, and refused."""
    *_, task = future_annotations.in_a_function()

    with pytest.raises(ConfigurationError, match=r"the annotation .*Hidden.* cannot be resolved"):
        simple(task)


def test_future_annotations_that_do_not_exist(future_annotations):
    """A name that exists only for the type checker is refused in a parameter, with the reason."""
    with pytest.raises(ConfigurationError, match=r"its names must exist at run time \(not only under TYPE_CHECKING\)"):
        simple(future_annotations.under_type_checking)


def test_future_annotations_of_the_return(future_annotations):
    """A return annotation that cannot be resolved declares nothing."""
    workflow = Workflow().register("start", future_annotations.returns_nothing_known).add_exit_state("done")

    assert testing.run(workflow.orchestrate("start")) == "done"


# What a task declares and returns


def returning(state, annotation):
    def task():
        return state

    task.__annotations__ = {"return": annotation}
    return task


@pytest.mark.parametrize(
    "annotation",
    [
        pytest.param(Literal[S.DONE, S.START], id="Literal"),
        pytest.param(Literal[S.DONE] | Literal[S.START], id="union"),  # noqa: PYI030
        pytest.param(Annotated[Literal[S.DONE, S.START], "why"], id="Annotated"),
        pytest.param(TaskResult[Literal[S.DONE, S.START]], id="TaskResult"),
        pytest.param(Literal[S.START] | TaskResult[Literal[S.DONE]], id="union with TaskResult"),
        pytest.param(Awaitable[Literal[S.DONE, S.START]], id="Awaitable"),
        pytest.param(Coroutine[Any, Any, Literal[S.DONE, S.START]], id="Coroutine"),
        pytest.param("Literal[S.DONE, S.START]", id="text"),
    ],
)
def test_annotation_that_declares(annotation):
    """These return annotations list the states a task may return: any other one fails the run."""
    assert testing.run(simple(returning(S.DONE, annotation)).orchestrate(S.START)) is S.DONE

    with pytest.raises(InvalidTransitionError, match="returned FAILED, but its annotation declares only"):
        testing.run(simple(returning(S.FAILED, annotation)).orchestrate(S.START))


@pytest.mark.parametrize(
    "annotation",
    [
        pytest.param(S, id="Enum"),
        pytest.param(TaskResult[S], id="TaskResult of the Enum"),
        pytest.param(Literal[S.DONE] | S, id="union with the Enum"),
        pytest.param(object, id="object"),
        pytest.param(Any, id="Any"),
        pytest.param(None, id="None"),
        pytest.param("Missing", id="unresolved text"),
    ],
)
def test_annotation_that_declares_nothing(annotation):
    """Any other return annotation allows every state of the workflow."""
    workflow = simple(returning(S.FAILED, annotation)).register(S.MIDDLE, plain)

    assert testing.run(workflow.orchestrate(S.START)) is S.FAILED


def test_declared_single_result():
    """A declared state may be wrapped in TaskResult.Single, an undeclared one not."""
    annotation = Literal[S.DONE]

    assert testing.run(simple(returning(TaskResult.Single(S.DONE), annotation)).orchestrate(S.START)) is S.DONE
    with pytest.raises(InvalidTransitionError, match="returned FAILED"):
        testing.run(simple(returning(TaskResult.Single(S.FAILED), annotation)).orchestrate(S.START))


def test_annotation_of_a_class_task():
    """The annotation of `run` is the task's."""

    class Typed(Task[S]):
        async def run(self) -> Literal[S.MIDDLE]:
            return S.MIDDLE

    with pytest.raises(ConfigurationError, match="state START leads to MIDDLE"):
        simple(Typed()).validate()


def test_annotation_of_a_branch_is_not_a_target():
    """A branch returns a value, so its annotation declares no state."""

    def branch() -> Literal["a value"]:
        return "a value"

    Workflow().register_split(S.START, [branch], JoinConfig(JoinStrategy.All, S.DONE)).add_exit_state(S.DONE).validate()


@pytest.mark.parametrize("state", [S.DONE, "-done"[1:], 1.0], ids=["identical", "equal text", "equal number"])
async def test_single_is_the_bare_state(state):
    """`TaskResult.Single(state)` means what the bare state means."""
    workflow = Workflow().register(S.START, lambda: TaskResult.Single(state)).add_exit_states([S.DONE, "done", 1])

    assert await workflow.orchestrate(S.START) == state


def test_results_show_their_states():
    """The reprs of results name the states."""
    assert repr(TaskResult.Single("a")) == "TaskResult.Single('a')"
    assert repr(TaskResult.Split(iter(["a", "b"]))) == "TaskResult.Split(['a', 'b'])"


def test_task_result_itself_is_not_made():
    """TaskResult only holds its two kinds."""
    with pytest.raises(ConfigurationError, match=r"by TaskResult\.Single\(state\) or TaskResult\.Split\(states\)"):
        TaskResult()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param(None, "NoneType", id="None"),
        pytest.param(5, "int", id="number"),
        pytest.param([S.DONE], "list", id="unhashable"),
        pytest.param((S.DONE, []), "tuple", id="unhashable inside"),
        pytest.param({S.DONE: 1}, "dict", id="dict"),
        pytest.param(S, "EnumType", id="the Enum class"),
        pytest.param(plain, "function", id="function"),
        pytest.param(ValueError("x"), "ValueError", id="exception"),
        pytest.param(TaskResult.Single, "function", id="the way to a result"),
        pytest.param(TaskResult.Single(5), "int", id="Single of a number"),
        pytest.param(TaskResult.Single([]), "list", id="Single of an unhashable"),
        pytest.param(TaskResult.Single(TaskResult.Single(S.DONE)), "SingleResult", id="Single of a Single"),
        pytest.param(NotImplemented, "NotImplementedType", id="NotImplemented"),
    ],
)
async def test_value_that_is_no_state(value, kind):
    """Anything but a state or a result fails the run, naming task, state and the value's type, and is not retried."""
    # B49
    calls = []
    workflow = simple(lambda: calls.append(1) or value, config=TaskConfig().with_fixed_retry(5, 0))

    with pytest.raises(InvalidTransitionError) as caught:
        await workflow.orchestrate(S.START)

    text = str(caught.value)
    assert "task test_value_that_is_no_state.<locals>.<lambda> in state START returned a value of type " in text
    assert f"of type {kind};" in text
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:coroutine 'asynchronous' was never awaited")
async def test_coroutine_returned_by_an_async_function():
    """A coroutine that an async function forgot to await is no state."""

    async def forgot():
        return asynchronous()

    with pytest.raises(InvalidTransitionError, match="returned a value of type coroutine"):
        await simple(forgot).orchestrate(S.START)
    gc.collect()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param(S.MIDDLE, "MIDDLE", id="member"),
        pytest.param(TaskResult.Single(S.MIDDLE), "MIDDLE", id="Single"),
    ],
)
async def test_state_that_is_not_registered(value, shown):
    """A value of a state's type that is none is shown by its label."""
    with pytest.raises(UnknownStateError, match=f"returned {shown}, which is neither registered nor an exit state"):
        await simple(lambda: value).orchestrate(S.START)


async def test_split_returned_with_a_join():
    """With a join, a task may return a split: each listed state starts a branch."""
    seen = []

    def joined(result: SplitResult):
        seen.append((result.values(), [outcome.name for outcome in result.successes]))
        return S.DONE

    workflow = Workflow().register(
        "fork", lambda: TaskResult.Split(["a", "b", "a"]), join=JoinConfig(JoinStrategy.All, "join")
    )
    workflow.register("a", lambda: "b").register("b", lambda: "end").register("join", joined).add_exit_states(
        ["end", S.DONE]
    )

    await workflow.orchestrate("fork")

    assert seen == [(["end", "end", "end"], ["a", "b", "a"])]


# RunContext


class Contexts:
    """A task that keeps every context it is given."""

    def __init__(self, *states, failures=0):
        self.states = iter(states)
        self.failures = failures
        self.seen = []

    async def run(self, ctx: RunContext):
        self.seen.append(ctx)
        if ctx.attempt <= self.failures:
            raise ValueError("not yet")
        return next(self.states, S.DONE)

    @property
    def keys(self):
        return [ctx.idempotency_key for ctx in self.seen]


async def test_context_tells_where_the_task_is():
    """The context has the ids, the state, attempt 1, visit 1, no branch, and an unlimited budget."""
    task = Contexts()

    await simple(task).orchestrate(S.START, workflow_id="order-1")

    (ctx,) = task.seen
    assert (ctx.workflow_id, ctx.state, ctx.attempt, ctx.visit, ctx.branch) == ("order-1", S.START, 1, 1, None)
    assert len(bytes.fromhex(ctx.run_id)) == 16
    assert ctx.remaining() == float("inf")
    assert repr(ctx) == "<RunContext state=START attempt=1 visit=1>"


async def test_context_without_a_workflow_id():
    """Without a workflow id the context has none, and the run's id is that of its handle."""
    task = Contexts()
    run = simple(task).start(S.START)

    await run

    assert task.seen[0].workflow_id is None
    assert task.seen[0].run_id == run.id


async def test_context_counts_attempts():
    """Each attempt has its number; visit and idempotency key stay."""
    task = Contexts(failures=3)

    await simple(task, config=TaskConfig().with_fixed_retry(3, 0.01)).orchestrate(S.START)

    assert [ctx.attempt for ctx in task.seen] == [1, 2, 3, 4]
    assert {ctx.visit for ctx in task.seen} == {1}
    assert len(set(task.keys)) == 1


async def test_context_counts_visits_of_each_state():
    """A visit is the number of times this state was entered in this run; each visit starts at attempt 1 with a new key."""
    start, middle = Contexts(S.MIDDLE, S.START, S.MIDDLE, failures=1), Contexts(S.START, S.DONE)
    config = TaskConfig().with_fixed_retry(1, 0)

    await simple(start, config=config).register(S.MIDDLE, middle).orchestrate(S.START)

    assert [(ctx.visit, ctx.attempt) for ctx in start.seen] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert [ctx.visit for ctx in middle.seen] == [1, 2]
    assert len(set(start.keys + middle.keys)) == 5


async def test_context_keeps_telling_what_it_told():
    """A context that outlives its attempt still tells that attempt's facts."""
    task = Contexts(S.START, S.DONE, failures=1)

    await simple(task, config=TaskConfig().with_fixed_retry(1, 0)).orchestrate(S.START)

    assert [(ctx.attempt, ctx.visit) for ctx in task.seen] == [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.virtual
async def test_context_remaining():
    """What remains of the budget goes down to 0, never below."""
    seen = []

    async def start(ctx: RunContext):
        for _ in range(3):
            seen.append(ctx.remaining())
            try:
                await asyncio.sleep(2)
            except asyncio.CancelledError:
                seen.append(ctx.remaining())
                raise

    with pytest.raises(CanoError):
        await simple(start).with_timeout(5).orchestrate(S.START)

    assert seen == [5, 3, 1, 0]


async def test_context_of_branches():
    """A branch's context has its index and the state of the split; the keys of branches differ."""
    task = Contexts(1, 2, 3)
    workflow = (
        Workflow().register_split(S.START, [task] * 3, JoinConfig(JoinStrategy.All, S.DONE)).add_exit_state(S.DONE)
    )

    await workflow.orchestrate(S.START)

    assert [(ctx.branch, ctx.state, ctx.visit) for ctx in task.seen] == [(n, S.START, 1) for n in range(3)]
    assert len(set(task.keys)) == 3
    assert repr(task.seen[2]) == "<RunContext state=START attempt=1 visit=1 branch=2>"


async def test_context_of_branches_with_retries():
    """Attempts of a branch share its key."""
    tasks = [Contexts(failures=2), Contexts(failures=1)]
    for task in tasks:
        task.config = TaskConfig().with_fixed_retry(2, 0)
    workflow = Workflow().register_split(S.START, tasks, JoinConfig(JoinStrategy.All, S.DONE)).add_exit_state(S.DONE)

    await workflow.orchestrate(S.START)

    assert [[ctx.attempt for ctx in task.seen] for task in tasks] == [[1, 2, 3], [1, 2]]
    assert [len(set(task.keys)) for task in tasks] == [1, 1]
    assert tasks[0].keys[0] != tasks[1].keys[0]


async def test_context_of_a_split_entered_twice():
    """Branches of the second visit of a split have visit 2 and other keys."""
    task = Contexts()
    turns = iter([S.START, S.DONE])
    workflow = Workflow().register_split(S.START, [task, task], JoinConfig(JoinStrategy.All, S.MIDDLE))

    await workflow.register(S.MIDDLE, lambda: next(turns)).add_exit_state(S.DONE).orchestrate(S.START)

    assert sorted((ctx.visit, ctx.branch) for ctx in task.seen) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(set(task.keys)) == 4


async def test_context_of_states_inside_branches():
    """States run by the branches of a returned split know their branch, and two branches in one state have two keys."""
    task, inner = Contexts(*["b"] * 4), Contexts(*["end"] * 4)
    join = JoinConfig(JoinStrategy.All, S.DONE)
    workflow = Workflow().register("fork", lambda: TaskResult.Split(["a", "a", "b"]), join=join)

    await workflow.register("a", task).register("b", inner).add_exit_states(["end", S.DONE]).orchestrate("fork")

    assert [(ctx.state, ctx.branch, ctx.visit) for ctx in task.seen] == [("a", 0, 1), ("a", 1, 1)]
    assert sorted((ctx.state, ctx.branch, ctx.visit) for ctx in inner.seen) == [("b", 0, 1), ("b", 1, 1), ("b", 2, 1)]
    assert len(set(task.keys + inner.keys)) == 5


async def test_key_is_the_same_in_another_run_of_the_same_id():
    """Two runs with one workflow id give the same keys, in the same order."""
    keys = []
    for _ in range(2):
        task = Contexts(S.START, S.START, S.DONE)
        await simple(task).orchestrate(S.START, workflow_id="order-1")
        keys.append(task.keys)

    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 3


async def test_key_is_the_same_for_branches_of_the_same_id():
    """The same holds for branches, in splits and in states."""
    keys = []
    for _ in range(2):
        task = Contexts(*["end"] * 4)
        workflow = Workflow().register(
            "fork", lambda: TaskResult.Split(["s", "s"]), join=JoinConfig(JoinStrategy.All, "split")
        )
        workflow.register("s", task).register_split("split", [task, task], JoinConfig(JoinStrategy.All, "end"))
        await workflow.add_exit_state("end").orchestrate("fork", workflow_id="order-1")
        keys.append(sorted(task.keys))

    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4


async def test_key_differs_between_runs():
    """Runs without a workflow id have keys of their own."""
    tasks = [Contexts() for _ in range(10)]

    for task in tasks:
        await simple(task).orchestrate(S.START)

    assert len({task.keys[0] for task in tasks}) == 10


async def test_key_is_a_short_text():
    """A key is 32 hexadecimal digits, whatever the names it comes from."""
    task = Contexts()

    await Workflow().register("é" * 64, task).add_exit_state(S.DONE).orchestrate("é" * 64, workflow_id="x" * 256)

    assert len(bytes.fromhex(task.keys[0])) == 16


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.text("ab1:", min_size=1, max_size=4), st.text("ab1:", min_size=1, max_size=4), st.integers(1, 12)),
        unique=True,
        min_size=2,
        max_size=8,
    )
)
def test_keys_of_different_places_differ(places):
    """No two places (workflow id, state, visit) share a key, however their texts would run together."""
    keys = {}
    for workflow_id, state, visit in places:
        task = Contexts(*[state] * (visit - 1))
        workflow = Workflow().register(state, task).add_exit_state(S.DONE)
        testing.run(workflow.orchestrate(state, workflow_id=workflow_id))
        keys[workflow_id, state, visit] = task.keys[-1]

    assert len(set(keys.values())) == len(places)


# Context variables

WHO = contextvars.ContextVar("WHO", default="nobody")


def sets(name, state=S.MIDDLE):
    async def task():
        WHO.set(name)
        await asyncio.sleep(0)
        return state

    return task


def seeing(seen, state=S.DONE):
    def task():
        seen.append(WHO.get())
        return state

    return task


async def test_context_variable_reaches_later_states():
    """What a task sets is seen by the later states of the run."""
    seen = []

    await simple(sets("ann")).register(S.MIDDLE, seeing(seen)).orchestrate(S.START)

    assert seen == ["ann"]


async def test_context_variable_reaches_the_caller_of_orchestrate():
    """`orchestrate` runs in the caller's context, as any awaited function does."""
    await simple(sets("bob", S.DONE)).orchestrate(S.START)

    assert WHO.get() == "bob"


async def test_context_variable_stays_in_a_started_run():
    """A started run sees the context of its start and keeps its changes to itself."""
    seen = []
    WHO.set("caller")

    await simple(seeing(seen, S.MIDDLE)).register(S.MIDDLE, sets("run", S.DONE)).start(S.START)

    assert (seen, WHO.get()) == (["caller"], "caller")


async def test_context_variable_stays_in_its_branch():
    """Branches see what was set before the split, and their changes reach neither each other nor the joined state."""
    seen = []

    async def branch():
        seen.append(WHO.get())
        WHO.set("branch")
        await asyncio.sleep(0)

    workflow = simple(sets("before")).register_split(S.MIDDLE, [branch, branch], JoinConfig(JoinStrategy.All, "after"))

    await workflow.register("after", seeing(seen)).orchestrate(S.START)

    assert seen == ["before"] * 3


# in_thread


async def test_in_thread_runs_elsewhere():
    """The function runs in one of cano's own threads."""
    seen = []

    def task():
        seen.append(threading.current_thread())
        return S.DONE

    await simple(in_thread(task)).orchestrate(S.START)

    assert seen[0] is not threading.current_thread()
    assert seen[0].name.startswith("cano-thread")


async def test_in_thread_fills_parameters_in():
    """The parameters of the function are filled in like those of any task."""
    seen = []

    def task(store: Annotated[int, Res("n")], *, ctx: RunContext) -> Literal[S.DONE]:
        seen.append((store, ctx.attempt))
        return S.DONE

    await simple(in_thread(task), {"n": 7}).orchestrate(S.START)

    assert seen == [(7, 1)]


async def test_in_thread_is_an_async_function():
    """Outside a workflow it is an async function with the same parameters, name and docstring."""

    def add(a, b=2):
        """Add."""
        return a + b

    wrapped = in_thread(add)

    assert inspect.iscoroutinefunction(wrapped)
    assert (wrapped.__name__, wrapped.__doc__, inspect.signature(wrapped)) == ("add", "Add.", inspect.signature(add))
    assert await wrapped(1, b=5) == 6


async def test_in_thread_context_variables():
    """The function sees the caller's context variables, and its changes stay in the thread."""
    seen = []
    WHO.set("caller")

    def task():
        seen.append(WHO.get())
        WHO.set("thread")
        return S.DONE

    await simple(in_thread(task)).orchestrate(S.START)

    assert (seen, WHO.get()) == (["caller"], "caller")


async def test_in_thread_runs_at_once():
    """Branches in threads really run at the same time."""
    met = threading.Barrier(2, timeout=10)
    workflow = Workflow().register_split(S.START, [in_thread(met.wait)] * 2, JoinConfig(JoinStrategy.All, S.DONE))

    assert await workflow.add_exit_state(S.DONE).orchestrate(S.START) is S.DONE


async def test_in_thread_leaves_the_loop_free():
    """While the function runs, the loop runs other tasks."""
    gate = threading.Event()
    run = simple(in_thread(lambda: gate.wait(10) and S.DONE)).start(S.START)
    await asyncio.sleep(0)

    gate.set()

    assert await run is S.DONE


async def test_in_thread_error():
    """What the function raises leaves the run as the same object."""
    error = ValueError("no")

    def task():
        raise error

    with pytest.raises(ValueError, match="no") as caught:
        await simple(in_thread(task)).orchestrate(S.START)

    assert caught.value is error
    assert caught.value.__cano__.state is S.START


async def test_in_thread_retries():
    """Attempts in a thread are repeated like any."""
    calls = itertools.count(1)

    def task(ctx: RunContext):
        if next(calls) < 3:
            raise ValueError("not yet")
        return S.DONE

    assert await simple(in_thread(task), config=TaskConfig().with_fixed_retry(2, 0)).orchestrate(S.START) is S.DONE


async def test_in_thread_exhausted():
    """The last failure of a thread is the cause of the exhausted retries."""
    with pytest.raises(RetryExhaustedError) as caught:
        await simple(in_thread(lambda: 1 / 0), config=TaskConfig().with_fixed_retry(1, 0)).orchestrate(S.START)

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_in_thread_cancel_waits_for_the_function():
    """A function that runs cannot be interrupted: the cancel waits until it has ended, and then goes on."""
    begun, gate, ended = threading.Event(), threading.Event(), []

    def task():
        begun.set()
        gate.wait(10)
        ended.append(1)
        return S.DONE

    running = asyncio.ensure_future(simple(in_thread(task)).orchestrate(S.START))
    await asyncio.to_thread(begun.wait, 10)
    running.cancel()
    await asyncio.sleep(0)
    still_there = not running.done()
    gate.set()
    await asyncio.wait([running])

    assert still_there
    assert running.cancelled()
    assert ended == [1]


async def test_in_thread_error_after_a_cancel():
    """The failure of a function that was cancelled gives way to the cancel."""
    begun, gate = threading.Event(), threading.Event()

    def task():
        begun.set()
        gate.wait(10)
        raise ValueError("too late")

    running = asyncio.ensure_future(simple(in_thread(task)).orchestrate(S.START))
    await asyncio.to_thread(begun.wait, 10)
    running.cancel()
    gate.set()
    await asyncio.wait([running])

    assert running.cancelled()


async def test_in_thread_not_started_is_dropped(monkeypatch):
    """A call that waits for a free thread is dropped by a cancel at once, and its function never runs."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="cano-thread")
    monkeypatch.setattr(_tasks._threads, "_pool", pool)
    gate, ran = threading.Event(), []
    blocking = simple(in_thread(lambda: gate.wait(10) and S.DONE)).start(S.START)
    waiting = simple(in_thread(lambda: ran.append(1) or S.DONE)).start(S.START)
    await asyncio.sleep(0)

    waiting.cancel()
    with pytest.raises(CanoError):
        await waiting
    was_blocked = not blocking.done()
    gate.set()
    await blocking
    pool.shutdown()

    assert was_blocked
    assert ran == []


class AsyncOnly:
    async def __call__(self):
        return S.DONE


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(asynchronous, id="async function"),
        pytest.param(functools.partial(asynchronous), id="partial of one"),
        pytest.param(Forms().method, id="async method"),
        pytest.param(AsyncOnly(), id="object with async __call__"),
        pytest.param(5, id="number"),
        pytest.param(None, id="None"),
    ],
)
def test_in_thread_of_no_plain_function(function):
    """Only plain functions can be given to a thread."""
    with pytest.raises(ConfigurationError, match=r"in_thread\(\) takes a plain function, got "):
        in_thread(function)
