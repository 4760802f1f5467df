"""The driver: a state table and one loop, ``state -> entry -> await call() -> state``.

A task without configuration and without arguments is *direct*: the loop calls it itself. Everything else (retries,
limits, an argument, a split) is one async function, the entry's ``step``, made when the workflow is frozen. Where a
split joins is never direct, so exactly one visit takes the result of the split; nor is a state that an error leads to or from.

A budget that is found spent between two awaits travels as `_BudgetSpent`, which no task and no retry catches by
mistake, out of the branches of a split as well.
"""

import asyncio
import contextlib
import inspect
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

from .config import (
    AttemptTimeoutError,
    ConfigurationError,
    ErrorContext,
    InvalidTransitionError,
    JoinConfig,
    OnError,
    RetryExhaustedError,
    S,
    Seconds,
    SplitResult,
    TaskConfig,
    TaskResult,
    UnknownStateError,
    WorkflowError,
    WorkflowTimeoutError,
    seconds,
)
from .split import Branch, Split

E = TypeVar("E", bound=Exception)

_PATH_KEPT = 256
_IMMEDIATE_TRANSITIONS = 1_024
_PLAIN = TaskConfig()
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_numbers = itertools.count(1)


class _BudgetSpent(BaseException):
    """The budget of a run was found spent before a state or an attempt."""


class _Budget:
    """When a run has to be over.

    Its timer cancels the task once, may do so a little early, and the task may swallow that: the deadline is then moved into
    the past, so that whoever looks at it next notices.
    """

    __slots__ = ("deadline", "started", "time", "timer")

    def __init__(self, limit: float) -> None:
        loop = asyncio.get_running_loop()
        self.time = loop.time
        self.started = loop.time()
        self.deadline = self.started + limit
        self.timer = loop.call_at(self.deadline, self.expire)

    def expire(self) -> None:
        self.deadline = -math.inf

    def is_spent(self) -> bool:
        return self.time() >= self.deadline


class _Run:
    """What one run, or one branch that is a run of states, keeps."""

    __slots__ = ("branch", "budget", "entered", "handed", "host", "number", "path")

    def __init__(self, number: int, budget: _Budget | None) -> None:
        self.number = number
        self.budget = budget
        self.path: deque[Hashable] = deque(maxlen=_PATH_KEPT)
        self.entered = 0
        self.branch: int | None = None
        self.handed: SplitResult | Exception | None = None
        self.host: asyncio.Task[Any] | None = None

    def fork(self, branch: int) -> "_Run":
        """A run for the states of a branch, with a path of its own."""
        run = _Run(self.number, self.budget)
        run.branch = branch
        return run

    def is_spent(self) -> bool:
        return self.budget is not None and self.budget.is_spent()

    def was_told_to_stop(self, host: Any, cancelling: int) -> bool:
        """Whether somebody else than the budget has cancelled the task since it had so many cancels."""
        return bool(host.cancelling() - self.is_spent() > cancelling)

    def task(self, branch: int | None) -> Any:
        """The asyncio task that drives the run, or the branch; found once, since `asyncio.current_task` is slow."""
        if branch is not None:
            return asyncio.current_task()
        if self.host is None:
            self.host = asyncio.current_task()
        return self.host

    def note(self, error: E, task: str | None, branch: int | None = None, attempt: int = 1, attempts: int = 1) -> E:
        """Write on the exception where it left a task, unless a run nested in this one has."""
        known: ErrorContext | None = getattr(error, "__cano__", None)
        if known is not None and known.run >= self.number:
            return error
        path = tuple(self.path)
        branch = self.branch if branch is None else branch
        context = ErrorContext(
            path[-1] if path else None, task, attempt, attempts, path, self.entered, branch, self.number
        )
        with contextlib.suppress(Exception):  # a class that refuses attributes keeps its exception unchanged
            error.__cano__ = context  # type: ignore[attr-defined]
        return error


Step = Callable[[_Run, int | None], Awaitable[Any]]


class _Task(NamedTuple):
    """A task as it is called; ``wants`` is None for no argument, else what the argument has to be (nothing: None)."""

    name: str
    call: Callable[..., Any]
    is_async: bool
    wants: tuple[type, ...] | None
    config: TaskConfig

    @property
    def is_direct(self) -> bool:
        return self.wants is None and not self.config.retry.retries and self.config.attempt_timeout is None


class _Stepped(NamedTuple):
    """A task of a split that is not direct."""

    name: str
    step: Step


@dataclass(slots=True)
class _Entry:
    """A row of the table; ``call`` is the function of a direct task, or else (``is_step``) a `Step`.

    A step looks at the budget itself, before each attempt.
    """

    name: str | None
    call: Callable[..., Any]
    is_async: bool = False
    is_step: bool = False
    join: JoinConfig[Any] | None = None
    inner: "Table" = field(default_factory=dict)  # with join: the table of the branches, which end at the joined state


_Source = _Task | list[_Task] | Callable[[], Any]
_Keys = Mapping[type[Exception] | tuple[type[Exception], ...], S]
Table = Mapping[Any, _Entry]
_EXIT = _Entry(None, lambda: None, is_step=True)


class Workflow(Generic[S]):
    """A table of states and the tasks that lead from one to the next; frozen by its first run."""

    def __init__(self) -> None:
        self._states: dict[S, tuple[_Source, JoinConfig[S] | None, OnError[S] | None]] = {}
        self._exits: set[S] = set()
        self._limit: float | None = None
        self._table: Table | None = None

    def register(
        self,
        state: S,
        task: Any,
        *,
        config: TaskConfig | None = None,
        join: JoinConfig[S] | None = None,
        on_error: _Keys[S] | None = None,
    ) -> Self:
        """Run the task in this state; with ``join`` it may return `TaskResult.Split`, with ``on_error`` it may fail."""
        return self._add(state, _read(task, config), join, on_error)

    def register_split(
        self,
        state: S,
        tasks: Iterable[Any] | Callable[[], Any],
        join: JoinConfig[S],
        *,
        on_error: _Keys[S] | None = None,
    ) -> Self:
        """Run the tasks side by side; a callable, sync or async, gives them when the state is entered."""
        return self._add(state, tasks if callable(tasks) else [_read(task) for task in tasks], join, on_error)

    def add_exit_state(self, state: S) -> Self:
        """End a run that reaches this state."""
        return self.add_exit_states([state])

    def add_exit_states(self, states: Iterable[S]) -> Self:
        """End a run that reaches one of these states."""
        self._require_open()
        self._exits.update(states)
        return self

    def with_timeout(self, timeout: Seconds) -> Self:
        """Give every run a budget of wall-clock time."""
        self._require_open()
        self._limit = seconds("timeout", timeout)
        return self

    async def orchestrate(self, initial: S, *, timeout: Seconds | None = None) -> S:
        """Run from this state to an exit state, and return that.

        Raises:
            ConfigurationError: The definition or the initial state is refused.
            WorkflowTimeoutError: The budget (``timeout``, else that of the workflow) is spent.
            Exception: Whatever a task raised, unchanged, or what `TaskConfig` and `JoinConfig` make of it.
        """
        table = self._table or self._freeze()
        if not _is_key(table, initial):
            raise ConfigurationError(f"initial state {initial!r} is neither registered nor an exit state")
        limit = self._limit if timeout is None else seconds("timeout", timeout)
        if limit is None:
            return cast("S", await _drive(table, _Run(next(_numbers), None), initial))
        budget = _Budget(limit)
        run = _Run(next(_numbers), budget)
        scope = asyncio.timeout_at(budget.deadline)
        try:
            async with scope:
                return cast("S", await _drive(table, run, initial))
        except _BudgetSpent:
            pass
        except TimeoutError as error:
            if not _has_fired(scope, error):
                raise
        finally:
            budget.timer.cancel()
        elapsed = max(limit, budget.time() - budget.started)
        text = f"the run took {elapsed:.3f} s of its budget of {limit} s"
        raise run.note(WorkflowTimeoutError(text, elapsed, limit), None, attempt=0)

    def _add(self, state: S, source: _Source, join: JoinConfig[S] | None, on_error: _Keys[S] | None) -> Self:
        self._require_open()
        if state in self._states:
            raise ConfigurationError(f"state {state!r} is registered twice")
        self._states[state] = (source, join, None if on_error is None else OnError(on_error))
        return self

    def _require_open(self) -> None:
        if self._table is not None:
            raise ConfigurationError("the workflow is frozen by its first run and cannot be changed")

    def _freeze(self) -> Table:
        """Check the definition and make the table of it."""
        problems = self._problems()
        if problems:
            raise ConfigurationError("workflow: " + "; ".join(problems), problems)
        handed = {join.next_state for _, join, _ in self._states.values() if join is not None}
        handed.update(*(on_error.states.values() for _, _, on_error in self._states.values() if on_error is not None))
        table: dict[Any, _Entry] = {}
        for state, (source, join, on_error) in self._states.items():
            if not isinstance(source, _Task):
                table[state] = _Entry(None, _split_step(source, cast("JoinConfig[S]", join)), is_step=True)
            elif source.is_direct and state not in handed and on_error is None:
                table[state] = _Entry(source.name, source.call, source.is_async, join=join)
            else:
                table[state] = _Entry(source.name, _task_step(source), is_step=True, join=join)
            if on_error is not None:
                table[state].call = _routed_step(table, table[state], on_error)
        table.update(dict.fromkeys(self._exits, _EXIT))
        for entry in table.values():
            if entry.join is not None:
                entry.inner = {**table, entry.join.next_state: _EXIT}
        self._table = table
        return table

    def _problems(self) -> list[str]:
        problems = [] if self._states else ["no state is registered"]
        if not self._exits:
            problems.append("there is no exit state")
        for state, (source, join, on_error) in self._states.items():
            targets = () if on_error is None else on_error.states.values()
            problems += [
                f"on_error of {state!r} leads to {target!r}, neither registered nor an exit state"
                for target in targets
                if target not in self._states and target not in self._exits
            ]
            if join is None:
                continue
            if join.next_state not in self._states and join.next_state not in self._exits:
                problems.append(f"{state!r} joins into {join.next_state!r}, neither registered nor an exit state")
            problem = join.strategy.problem(len(source) if isinstance(source, list) else None, join.timeout)
            if problem is not None:
                problems.append(f"{state!r}: {problem}")
        return problems


async def _drive(table: Table, run: _Run, state: Any) -> Any:  # noqa: C901 - no call that can be spared
    """Go from state to state until an exit.

    It yields to the loop once per 1,024 transitions, suspended or not: a suspension is not seen from here.
    """
    entry, entered = table[state], 0
    enter, budget = run.path.append, run.budget
    try:
        for first in itertools.count(1, _IMMEDIATE_TRANSITIONS):
            for entered in range(first, first + _IMMEDIATE_TRANSITIONS):
                enter(state)
                if not entry.is_step:
                    if budget is not None and budget.time() >= budget.deadline:
                        raise _BudgetSpent  # noqa: TRY301 - the handler only writes down where it was
                    value = entry.call()
                    if entry.is_async:
                        value = await value
                elif entry is _EXIT:
                    return state
                else:
                    run.entered = entered
                    value = await entry.call(run, None)
                try:
                    following = table[value]
                except (KeyError, TypeError):
                    following = None
                if following is None:
                    run.entered = entered
                    value = await _resolve(table, run, entry, value)
                    following = table[value]
                state, entry = value, following
            await asyncio.sleep(0)
    except BaseException as error:
        run.entered = entered
        if isinstance(error, Exception):
            run.note(error, entry.name)
        raise


async def _resolve(table: Table, run: _Run, entry: _Entry, value: Any) -> Any:
    """The state that an unusual return value leads to."""
    if isinstance(value, Awaitable) and not entry.is_async:
        value = await value
    if isinstance(value, TaskResult.Single):
        value = value.state
    if not isinstance(value, TaskResult.Split):
        _require_state(table, entry, value)
        return value
    if entry.join is None:
        raise WorkflowError(f"task {entry.name} returned a split: use register_split() or register(..., join=)")
    branches = []
    for index, state in enumerate(value.states):
        _require_state(table, entry, state)
        branches.append(Branch(_label(state), partial(_drive, entry.inner, run.fork(index), state), is_async=True))
    run.handed = await _join(branches, entry.join, run)
    return entry.join.next_state


def _label(state: Hashable) -> str:
    return state.name if isinstance(state, Enum) else str(state)


def _require_state(table: Table, entry: _Entry, value: Any) -> None:
    if _is_key(table, value):
        return
    text = f"task {entry.name} returned {value!r} ({type(value).__name__})"
    if getattr(value, "__hash__", None) is not None and type(value) in {type(state) for state in table}:
        raise UnknownStateError(f"{text}, which is neither registered nor an exit state")
    raise InvalidTransitionError(f"{text}, which is no state")


def _is_key(table: Table, value: Any) -> bool:
    try:
        return value in table
    except TypeError:
        return False


def _task_step(task: _Task) -> Step:
    """Call the task with its argument, within its limit, as often as its configuration says."""
    name, call, is_async, wants, config = task
    attempts = config.retry.retries + 1
    attempt_once = call if is_async else _awaited(call)
    if config.attempt_timeout is not None:
        attempt_once = _limited(attempt_once, name, cast("float", config.attempt_timeout))

    async def step(run: _Run, branch: int | None) -> Any:
        arguments = () if wants is None else (run.handed if isinstance(run.handed, wants) else None,)
        run.handed = None
        host = run.task(branch) if attempts > 1 else None
        attempt, cancelling = 1, 0
        while True:
            if run.is_spent():
                raise _BudgetSpent
            if host is not None:
                cancelling = host.cancelling()
            try:
                return await attempt_once(*arguments)
            except Exception as error:
                # An attempt that was told to stop is the last one, whatever it made of the cancellation.
                was_cancelled = host is not None and run.was_told_to_stop(host, cancelling)
                is_retryable = config.is_retryable(error) and not was_cancelled
                if not is_retryable or attempt == attempts:
                    run.note(error, name, branch, attempt, attempts)
                    if not is_retryable:
                        raise
                    text = f"task {name} failed in each of {attempts} attempts"
                    raise run.note(RetryExhaustedError(text, attempts), name, branch, attempt, attempts) from error
                delay = config.retry.delay(attempt, error)
            if run.is_spent():
                raise _BudgetSpent
            await asyncio.sleep(delay)
            attempt += 1

    return step


def _awaited(call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def awaited(*arguments: Any) -> Any:
        value = call(*arguments)
        return await value if isinstance(value, Awaitable) else value

    return awaited


def _limited(call: Callable[..., Awaitable[Any]], name: str, limit: float) -> Callable[..., Awaitable[Any]]:
    async def limited(*arguments: Any) -> Any:
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await call(*arguments)
        except TimeoutError as error:
            if not _has_fired(scope, error):
                raise
            raise AttemptTimeoutError(f"task {name} took longer than its {limit} s", limit) from error

    return limited


def _has_fired(scope: asyncio.Timeout, error: TimeoutError) -> bool:
    """Whether the error is the scope's own and not one of the code inside."""
    return scope.expired() and isinstance(error.__cause__, asyncio.CancelledError)


def _split_step(tasks: list[_Task] | Callable[[], Any], join: JoinConfig[Any]) -> Step:
    """Run the branches, leave their result to the joined state, and go there."""
    known = None if callable(tasks) else _plan(tasks)

    async def step(run: _Run, _branch: int | None) -> Any:
        if run.is_spent():
            raise _BudgetSpent
        run.handed, plan = None, known
        if callable(tasks):
            given = tasks()
            plan = _plan([_read(task) for task in (await given if isinstance(given, Awaitable) else given)])
        branches = [
            item if isinstance(item, Branch) else Branch(item.name, partial(item.step, run, index), is_async=True)
            for index, item in enumerate(plan or ())
        ]
        run.handed = await _join(branches, join, run)
        return join.next_state

    return step


def _routed_step(table: Table, entry: _Entry, on_error: OnError[Any]) -> Step:
    """Run the step; go to the state that its error leads to, unless the run was told to stop meanwhile."""
    step = entry.call

    async def routed(run: _Run, branch: int | None) -> Any:
        host = run.task(branch)
        cancelling = host.cancelling()
        try:
            value = await step(run, branch)
            return value if _is_key(table, value) else await _resolve(table, run, entry, value)
        except Exception as error:
            run.note(error, entry.name)
            found = None if run.was_told_to_stop(host, cancelling) else on_error.find(error)
            if found is None:
                raise
            run.handed, state = found
            return state
        finally:
            found = None  # the traceback of the error holds this frame

    return routed


def _plan(tasks: Iterable[_Task]) -> list[Branch | _Stepped]:
    return [
        Branch(task.name, task.call, task.is_async) if task.is_direct else _Stepped(task.name, _task_step(task))
        for task in tasks
    ]


async def _join(branches: Sequence[Branch], join: JoinConfig[Any], run: _Run) -> SplitResult:
    problem = join.strategy.problem(len(branches), join.timeout)
    if problem is not None:
        raise ConfigurationError(problem)
    return await Split(branches, join, run.note).run()


def _read(task: Any, config: TaskConfig | None = None) -> _Task:
    """Look at a task once: its name, whether it is a coroutine function, and the argument it wants.

    A function tells by its code object, which costs next to nothing; other callables by their signature.
    """
    call = task if isinstance(task, FunctionType) else getattr(task, "run", task)
    if isinstance(task, type) or not callable(call):
        raise ConfigurationError(f"a task is a function or an object with run, got {task!r}")
    config = config or getattr(task, "config", None) or _PLAIN
    name = getattr(task, "name", None) or getattr(task, "__qualname__", None) or type(task).__qualname__
    function = call.__func__ if isinstance(call, MethodType) else call
    if isinstance(function, FunctionType) and not hasattr(function, "__wrapped__"):
        code, first = function.__code__, int(function is not call)
        is_async = bool(code.co_flags & inspect.CO_COROUTINE)
        known = code.co_argcount - first
        required = (
            known - len(function.__defaults__ or ()) + code.co_kwonlyargcount - len(function.__kwdefaults__ or ())
        )
        annotation = function.__annotations__.get(code.co_varnames[first]) if known else None
    else:
        is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
        parameters = [p for p in inspect.signature(call).parameters.values() if p.kind not in _VARIADIC]
        required = sum(p.default is p.empty for p in parameters)
        annotation = parameters[0].annotation if parameters else None
    if required > 1:
        raise ConfigurationError(f"task {name} has {required} parameters, it may have one")
    wants = tuple(
        kind for word, kind in (("SplitResult", SplitResult), ("Caught", Exception)) if word in str(annotation)
    )
    return _Task(name, call, is_async, wants if required or wants else None, config)
