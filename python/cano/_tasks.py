"""Tasks: how a function, a callable or an object with `run` becomes a prepared call.

Signatures are read once, when a task is registered, and remembered per function; at run time the driver only fills in a
fixed list of arguments.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import inspect
import os
import threading
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, ParamSpec, Self, TypeVar, get_args, get_origin
from weakref import WeakKeyDictionary

from . import _core
from ._config import TaskConfig
from ._core import RunContext, SplitResult
from ._errors import ConfigurationError, check_text, show
from ._on_error import caught_by
from ._resources import Resources, is_a, resource_of

S = TypeVar("S", bound=Hashable)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NAME_LIMIT = 128


class Task(Generic[S]):
    """Optional base of tasks that are written as classes.

    A task is anything with a method ``run`` (or ``run_bare``, which takes nothing), async or plain; this base only tells
    the type checker about the two attributes.

    Attributes:
        name: What errors call the task, at most 128 bytes; by default the qualified name of the class.
        config: How it is run; None is ``TaskConfig()``. Read once, when the task is registered.
    """

    name: str
    config: TaskConfig | None = None


def states_of(given: Iterable[S]) -> Iterable[S]:
    """The states, unless it is no iterable, or a text: that is one state, not several."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigurationError(f"states must be an iterable of states, got {show(given)}")
    return given


class TaskResult(Generic[S]):
    """What a task may return instead of a bare state."""

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        if cls is TaskResult:
            raise ConfigurationError("a TaskResult is made by TaskResult.Single(state) or TaskResult.Split(states)")
        return super().__new__(cls)

    @staticmethod
    def Single(state: T) -> TaskResult[T]:
        """The next state; the same as returning it bare."""
        return SingleResult(state)

    @staticmethod
    def Split(states: Iterable[T]) -> TaskResult[T]:
        """One branch for each listed state, in that order; it needs a ``join=`` where the task is registered.

        Raises:
            ConfigurationError: `states` is no iterable, or a text.
        """
        return SplitRequest(states)


class SingleResult(TaskResult[S]):
    """What `TaskResult.Single` makes."""

    __slots__ = ("state",)

    def __init__(self, state: S) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"TaskResult.Single({self.state!r})"


class SplitRequest(TaskResult[S]):
    """What `TaskResult.Split` makes."""

    __slots__ = ("states",)

    def __init__(self, states: Iterable[S]) -> None:
        self.states = tuple(states_of(states))

    def __repr__(self) -> str:
        return f"TaskResult.Split({list(self.states)!r})"


# --- reading a signature ---------------------------------------------------------------------------------------------

_Source = tuple[str, Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What is particular to a method of a processing model; without anything it is a task's function.

    Attributes:
        given: What it is called with, before what it asks for.
        leads: What it may wrap the next state in.
        stays: What it returns where there is no next state yet.
        own: What it may ask for besides: annotations, and the kinds of source they stand for.
        yields: Whether it may be an async generator function.
        iterates: Whether it may be a generator function.
        pairs: Whether it returns the next state with an output.
    """

    given: tuple[str, ...] = ()
    leads: type[Any] = TaskResult
    stays: tuple[type[Any], ...] = ()
    own: tuple[tuple[Any, str], ...] = ()
    yields: bool = False
    iterates: bool = False
    pairs: bool = False


_FUNCTION = Form()


class Reading(NamedTuple):
    """What a signature says: where the arguments come from, the names of the last ones where they go by name, the states."""

    sources: list[_Source]
    keywords: tuple[str, ...] | None
    declared: tuple[Any, ...] | None
    given: Any
    """The annotation of what it is given first; Any if it has none, or is given nothing."""


_Plans = WeakKeyDictionary[Callable[..., Any], _core.Plan]
# Remembered per function, without keeping it alive; bound to an object it has a parameter less.
_function_plans: _Plans = WeakKeyDictionary()
_method_plans: _Plans = WeakKeyDictionary()
# The same for workflows with run data, by its class.
_plans_with_data: WeakKeyDictionary[type[Any], tuple[_Plans, _Plans]] = WeakKeyDictionary()


def _plan(call: Callable[..., Any], name: str, *, makes_branches: bool) -> _core.Plan:
    """How `call` wants to be called."""
    if makes_branches:
        return _read(call, name)
    plans: MutableMapping[Callable[..., Any], _core.Plan]
    for_functions, for_methods = _function_plans, _method_plans
    if (data := run_data.get()) is not None:
        for_functions, for_methods = _plans_with_data.setdefault(data, (WeakKeyDictionary(), WeakKeyDictionary()))
    plans, function = (for_methods, call.__func__) if isinstance(call, types.MethodType) else (for_functions, call)
    try:
        known = plans.get(function)
    except TypeError:  # not hashable, or no weak references
        known = None
        plans = {}
    if known is None:
        refuse_generator(call, name)
        known = plans[function] = _read(call, name)
    return known


def refuse_generator(call: Callable[..., Any], name: str, why: str = "a task returns its next state once") -> None:
    """A function that yields, where one value is wanted, would never run."""
    inner = innermost(call)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise ConfigurationError(f"task {name} is a generator function; {why}")


def _read(call: Callable[..., Any], name: str) -> _core.Plan:
    return _core.Plan(*read(call, name)[:3], inspect.iscoroutinefunction(call))


def read(call: Callable[..., Any], name: str, form: Form = _FUNCTION) -> Reading:
    """What the signature of `call` says."""
    inner = innermost(call)
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        raise ConfigurationError(f"the signature of task {name} cannot be read; wrap it in a function") from None
    sources: list[_Source] = []
    keywords: list[str] = []
    by_keyword = False
    given, asked = _parted(signature, form)
    if len(given) < len(form.given) or any(_known(_resolve(p.annotation, inner, missing=None), form) for p in given):
        raise ConfigurationError(f"task {name} must take {', '.join(form.given)} first, got {show(str(signature))}")
    for parameter in asked:
        source = _source(parameter, inner, name, form, alone=_takes_one(asked))
        if source is None:  # it has a default and asks for nothing of ours
            by_keyword = True
            continue
        sources.append(source)
        if by_keyword or parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigurationError(
                    f"parameter {parameter.name} of task {name} must not follow one with a default"
                )
            keywords.append(parameter.name)
    returned = _resolve(signature.return_annotation, inner, missing=None)
    if form.pairs:
        returned, _ = _pair(returned) or (None, None)
    declared = _declared(returned, form)
    first = _resolve(given[0].annotation, inner, missing=Any) if given else Any
    return Reading(sources, tuple(keywords) or None, declared, first)


def innermost(call: Callable[..., Any]) -> Any:
    """The function whose annotations count: behind partials, wrappers and ``__call__``."""
    inner: Any = call
    while True:
        if isinstance(inner, functools.partial):
            inner = inner.func
        elif hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        elif inspect.ismethod(inner):
            inner = inner.__func__
        elif inspect.isfunction(inner) or inspect.isbuiltin(inner):
            return inner
        else:
            method = inspect.getattr_static(type(inner), "__call__", None)
            if not inspect.isfunction(method):
                return inner
            inner = method


def _parted(signature: inspect.Signature, form: Form) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The parameters that are given, and those that ask."""
    parameters, count = list(signature.parameters.values()), len(form.given)
    positional = [p for p in parameters[:count] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional, parameters[count:]


def _takes_one(parameters: list[inspect.Parameter]) -> bool:
    return sum(1 for p in parameters if p.default is p.empty) == 1


def _source(parameter: inspect.Parameter, inner: Any, name: str, form: Form, *, alone: bool) -> _Source | None:
    """Where the argument for this parameter comes from; None if its default is to be used."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigurationError(
            f"parameter {parameter} of task {name} cannot be filled in; decorators need functools.wraps"
        )
    annotation = parameter.annotation
    has_default = parameter.default is not parameter.empty
    if annotation is parameter.empty:
        if has_default:
            return None
        if alone:
            return ("resources", None, None)
        raise ConfigurationError(
            f"parameter {parameter.name} of task {name} has no annotation; only a task's single parameter may go without"
        )
    resolved = _resolve(annotation, inner, missing=_UNRESOLVED)
    source = _known(resolved, form)
    if source is not None or has_default:
        return source
    if resolved is _UNRESOLVED:
        raise ConfigurationError(
            f"the annotation {show(str(annotation))} of parameter {parameter.name} of task {name} cannot be resolved; "
            f"its names must exist at run time (not only under TYPE_CHECKING)"
        )
    raise ConfigurationError(
        f"parameter {parameter.name} of task {name} is annotated {show(str(annotation))}; a task takes Resources, "
        f"Annotated[T, Res(key)], RunContext, the class given to with_data() before, SplitResult in the state that a split "
        f"joins into, or Caught[E] in one that on_error leads to"
    )


_UNRESOLVED: Any = object()

run_data: ContextVar[type[Any] | None] = ContextVar("run_data", default=None)
"""The class of run data of the workflow for which a task is being prepared."""


def _known(annotation: Any, form: Form) -> _Source | None:  # noqa: PLR0911 - a table of annotations
    """The source that an annotation stands for."""
    if (source := caught_by(annotation)) is not None:
        return source
    if get_origin(annotation) is Annotated:
        marked = resource_of(annotation)
        if marked is None:
            return _known(get_args(annotation)[0], form)
        type_, key = marked
        is_a(None, type_)  # refuses now what cannot be checked at run time
        return ("resource", key, type_)
    if isinstance(annotation, type) and issubclass(annotation, Resources):
        return ("resources", None, None)
    if annotation is not None and annotation is run_data.get():
        return ("data", annotation, None)
    asked = ((RunContext, "context"), (SplitResult, "joined"), (SplitResult | None, "joined or none"))
    for wanted, kind in (*asked, *form.own):
        if annotation == wanted:
            return (kind, None, None)
    return None


def _resolve(annotation: Any, inner: Any, *, missing: Any) -> Any:
    """The annotation as an object; `missing` for a text whose names do not exist where the function was written."""
    if annotation is inspect.Signature.empty:
        return missing
    if not isinstance(annotation, str):
        return annotation
    names: Mapping[str, Any] = {}
    if closure := getattr(inner, "__closure__", None):
        cells = zip(inner.__code__.co_freevars, closure, strict=True)
        names = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    try:
        return eval(annotation, getattr(inner, "__globals__", {}), dict(names))  # noqa: S307 - the user's own annotation
    except Exception:  # noqa: BLE001 - whatever a name or an attribute raises
        return missing


def _declared(annotation: Any, form: Form) -> tuple[Any, ...] | None:
    """The states that a return annotation lists; None if it does not list any (then every state is allowed)."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if any(stay in (annotation, origin) or annotation == type[stay] for stay in form.stays):
        return ()
    if origin is Literal:
        return arguments
    if origin is Annotated or (isinstance(origin, type) and issubclass(origin, form.leads)):
        return _declared(arguments[0], form)
    if isinstance(origin, type) and issubclass(origin, (Awaitable, Coroutine)):
        return _declared(arguments[-1], form)
    if origin in (typing.Union, types.UnionType):
        parts = [_declared(part, form) for part in arguments]
        return None if None in parts else tuple(state for part in parts for state in part or ())
    return None


def _pair(annotation: Any) -> tuple[Any, ...]:
    """The two parts of ``tuple[S, T]``, also behind an Awaitable; empty for anything else."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, (Awaitable, Coroutine)):
        return _pair(arguments[-1])
    is_pair = origin is tuple and len(arguments) == 2 and arguments[1] is not Ellipsis  # noqa: PLR2004
    return arguments if is_pair else ()


def output_of(run: Callable[..., Any], compensate: Callable[..., Any]) -> Any:
    """The annotation of a compensatable task's output: in ``run``'s result, or else at ``compensate``'s first parameter."""
    inner = innermost(run)
    if pair := _pair(_resolve(inspect.signature(run).return_annotation, inner, missing=None)):
        return pair[1]
    first = next(iter(inspect.signature(compensate).parameters.values()))
    return _resolve(first.annotation, innermost(compensate), missing=Any)


# --- preparing a task ------------------------------------------------------------------------------------------------


def prepare_task(task: Any, config: TaskConfig | None = None) -> _core.TaskSpec:
    """Turn a function, a callable or an object with `run` into what the driver runs.

    Raises:
        ConfigurationError: It is no task, or its signature asks for something that cannot be filled in.
    """
    return spec_of(callable_of(task), task, config, None)


def spec_of(call: Callable[..., Any], task: Any, config: TaskConfig | None, model: str | None) -> _core.TaskSpec:
    """What the driver runs where `call` is the whole task."""
    name = name_of(task)
    policy = config_of(task, name, config)._policy
    return _core.TaskSpec(call, name, _plan(call, name, makes_branches=False), policy, model)


def config_of(task: Any, name: str, config: TaskConfig | None) -> TaskConfig:
    """The configuration given where the task is registered, else the task's own."""
    if config is None:
        config = getattr(task, "config", None)
    if config is not None and not isinstance(config, TaskConfig):
        raise ConfigurationError(f"config of task {name} must be a TaskConfig, got {show(config)}")
    return config or _MINIMAL


_MINIMAL = TaskConfig()


def prepare_factory(tasks: Callable[..., object]) -> _core.Factory:
    """A function that makes the branches of a split; a generator function does."""
    call = callable_of(tasks)
    name = name_of(tasks)
    if inspect.isasyncgenfunction(innermost(call)):
        raise ConfigurationError(f"{name} is an async generator function; the branches of a split are made all at once")
    return _core.Factory(_core.TaskSpec(call, name, _plan(call, name, makes_branches=True), None))


def callable_of(task: Any) -> Callable[..., Any]:
    if isinstance(task, types.FunctionType):
        return task
    if isinstance(task, type):
        raise ConfigurationError(f"{task.__qualname__} is a class; register an instance: {task.__qualname__}()")
    if inspect.iscoroutine(task):
        task.close()
        raise ConfigurationError(f"{task.__qualname__}() is a coroutine; register the function, without calling it")
    for method in ("run", "run_bare"):
        found = getattr(task, method, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    if callable(task):
        return task  # type: ignore[no-any-return]
    raise ConfigurationError(
        f"a task must be a function, a callable or an object with a method run or run_bare, "
        f"got {show(task)} ({type(task).__qualname__})"
    )


def name_of(task: Any) -> str:
    """What errors call the task."""
    if isinstance(task, types.FunctionType):
        return task.__qualname__[-_NAME_LIMIT:]
    name = getattr(task, "name", None)
    if isinstance(name, str):
        check_text("the name of a task", name, _NAME_LIMIT)
        return name
    if isinstance(task, functools.partial):
        return name_of(task.func)
    found = getattr(task, "__qualname__", None) or type(task).__qualname__
    return str(found)[-_NAME_LIMIT:]


# --- work that would block the loop ----------------------------------------------------------------------------------


class _Threads:
    """Our own bounded pool: asyncio's default one is shared with everything else in the process."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4), thread_name_prefix="cano-thread")
            atexit.register(self._pool.shutdown, wait=False, cancel_futures=True)
        return self._pool

    def forget(self) -> None:
        """A forked child has none of the threads."""
        self._pool = None


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.forget)


def in_thread(function: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make a task of a plain function that would block the event loop: it runs in a thread.

    The pool is cano's own, ``min(32, cpus + 4)`` threads shared by all workflows of the process; further calls wait for a
    free one. Context variables are copied, so the function sees them and its changes stay its own.

    Args:
        function: A plain function; its parameters are filled in like those of any task.

    Returns:
        An async function with the same parameters.

    Raises:
        ConfigurationError: `function` is a coroutine function, or not callable.

    Cancellation: a call that has not started is dropped. One that runs cannot be interrupted: the cancellation waits until
    it has ended, so that nothing of a run is alive after it.

    Example:
        >>> import asyncio
        >>> asyncio.run(in_thread(lambda: sum(range(10)))())
        45
    """
    given: Any = function
    if not callable(given) or isinstance(given, type) or inspect.iscoroutinefunction(innermost(given)):
        raise ConfigurationError(f"in_thread() takes a plain function, got {show(given)}")

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        context = contextvars.copy_context()
        return await _in_pool(lambda: context.run(function, *args, **kwargs))

    call.__qualname__ = name_of(function)  # a partial or a callable object has none to copy
    return call


async def _in_pool(work: Callable[[], R]) -> R:
    """Run `work` in a thread; a cancellation drops it if it has not started, else waits until it is over."""
    turn = threading.Lock()
    values: list[R] = []
    errors: list[BaseException] = []

    def take_turn() -> None:
        # Whoever takes the lock first, the thread or the cancellation, decides whether the work is done; it keeps it.
        if not turn.acquire(blocking=False):
            return
        try:
            values.append(work())
        except BaseException as error:  # noqa: BLE001 - a future would change some of them on their way
            errors.append(error)

    future = asyncio.get_running_loop().run_in_executor(_threads.pool(), take_turn)
    try:
        await _to_the_end(future, turn)
        if not errors:
            return values[0]
        if isinstance(errors[0], StopIteration):  # a coroutine cannot let one out (PEP 479)
            raise RuntimeError("the function raised StopIteration") from errors[0]  # noqa: TRY004
        raise errors[0]
    finally:
        errors.clear()  # an exception's traceback holds this frame, which must not hold the exception


async def _to_the_end(future: asyncio.Future[None], turn: threading.Lock) -> None:
    """Wait for work that cannot be interrupted; a cancellation goes on once it is over, or if it has not begun."""
    cancelled: asyncio.CancelledError | None = None
    try:
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                if cancelled is None and turn.acquire(blocking=False):
                    future.cancel()
                    raise
                error.__context__, cancelled = cancelled, error  # the newest one leaves
        if cancelled is not None:
            raise cancelled
    finally:
        del cancelled
