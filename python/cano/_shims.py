"""Doors: which registration takes which processing model, and the one task that each becomes.

A router's method is the task. A stepped task's method is called by the driver itself, once per cursor, so that retries and
limits hold for each step. The others are shims, async functions with a loop, which the driver runs like any task.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import logging
import math
import time
import types
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NamedTuple, cast

from . import _core
from ._batch import Batch, BatchTask
from ._config import TaskConfig
from ._core import RetryMode, StreamWindow
from ._errors import ConfigurationError, show
from ._log import written
from ._methods import OWN, Method, not_one_of, outcome, plan_of, requests
from ._models import (
    After,
    Continue,
    Done,
    ItemErrorPolicy,
    More,
    Pending,
    PollErrorPolicy,
    PollTask,
    Ready,
    RouterTask,
    SteppedTask,
    Stop,
    StreamProgress,
    StreamTask,
    TimerTask,
    Until,
)
from ._saga import CompensatableTask
from ._stream import Stream
from ._tasks import Form, config_of, name_of, output_of, prepare_task, spec_of

_log = logging.getLogger("cano")


# --- the loops -------------------------------------------------------------------------------------------------------


class _Poll:
    """``poll`` again and again, until it is ready; each round gives the event loop a turn."""

    def __init__(self, name: str, poll: Method, retries: _core.Policy | None) -> None:
        self._name = name
        self._poll = poll
        self._retries = retries

    async def run(self, *filled: Any) -> Any:
        poll = self._poll.bind(iter(filled))
        host, failures = asyncio.current_task(), 0
        while True:
            before = requests(host)
            try:
                verdict = await outcome(poll())
            except Exception as error:
                failures += 1
                pause = self._pause(error, failures) if requests(host) == before else None
                if pause is None:
                    raise
                text = "poll of task %s failed (%d in a row); polling again in %.3f s"
                _log.warning(text, self._name, failures, pause, exc_info=error)
            else:
                if type(verdict) is Ready:
                    return verdict.state
                if type(verdict) is not Pending:
                    raise not_one_of(f"poll of task {self._name}", verdict, "Ready(state) or Pending(delay)")
                failures, pause = 0, cast("float", verdict.delay)
            await asyncio.sleep(pause)

    def _pause(self, error: Exception, failures: int) -> float | None:
        return None if self._retries is None else self._retries.pause(error, failures)


class _Timer:
    """``wait``, one sleep, ``after_wait``."""

    def __init__(self, name: str, wait: Method, after_wait: Method) -> None:
        self._name = name
        self._wait = wait
        self._after_wait = after_wait

    async def run(self, run: _core.Run, *filled: Any) -> Any:
        arguments = iter(filled)
        wait, after_wait = self._wait.bind(arguments), self._after_wait.bind(arguments)
        log = run.log
        if log is not None and log.due_at is not None:  # a visit that goes on keeps its due time
            seconds = max(0.0, log.due_at / 1000 - time.time())
        else:
            seconds = self._seconds(await outcome(wait()))
            if log is not None:
                await written(log, log.timer(math.ceil((time.time() + seconds) * 1000)))
        await asyncio.sleep(seconds)
        return await outcome(after_wait())

    def _seconds(self, due: Any) -> float:
        if isinstance(due, After):
            return cast("float", due.seconds)
        if not isinstance(due, Until):
            raise not_one_of(f"wait of task {self._name}", due, "After(seconds) or Until(instant)")
        if isinstance(due.instant, datetime):
            return max(0.0, due.instant.timestamp() - time.time())
        return max(0.0, due.instant - asyncio.get_running_loop().time())


# --- the models ------------------------------------------------------------------------------------------------------


class _Model(NamedTuple):
    word: str
    """What messages call it."""
    base: type[Any]
    methods: tuple[str, ...]
    door: str
    """The method of `Workflow` that takes it."""
    make: Callable[[Any, str, TaskConfig], _core.TaskSpec]


def _router(task: Any, _name: str, config: TaskConfig) -> _core.TaskSpec:
    return spec_of(task.route, task, config, "router")


def _poll(task: Any, name: str, config: TaskConfig) -> _core.TaskSpec:
    policy = _attribute(task, name, "on_poll_error", PollErrorPolicy.FailFast)
    poll = Method.of(task, name, "poll", Form(leads=Ready, stays=(Pending,)))
    call = _Poll(name, poll, _retries(policy._retries)).run
    return _core.TaskSpec(call, name, plan_of((poll,), (poll,)), config._policy, "poll task")


def _timer(task: Any, name: str, config: TaskConfig) -> _core.TaskSpec:
    wait, after_wait = Method.of(task, name, "wait", Form()), Method.of(task, name, "after_wait", Form())
    plan = plan_of((wait, after_wait), (after_wait,), leads_with=("run",))
    return _core.TaskSpec(_Timer(name, wait, after_wait).run, name, plan, config._policy, "timer")


def _stepped(task: Any, name: str, config: TaskConfig) -> _core.TaskSpec:
    step = Method.of(task, name, "step", Form(("cursor",), leads=Done, stays=(More,)))
    sources, keywords, declared, cursor = step.reading
    is_coroutine_function = inspect.iscoroutinefunction(step.call)
    plan = _core.Plan([("cursor", None, None), *sources], keywords, declared, is_coroutine_function)
    return _core.TaskSpec(step.call, name, plan, config._policy, "stepped task", cursor)


_ASKS = ((StreamProgress, OWN),)
_OPEN = Form(("cursor",), own=_ASKS, yields=True)
_PROCESS = Form(("item",), own=_ASKS)
_FLUSH = Form(("outputs",), leads=Stop, stays=(Continue,), own=_ASKS)
_CLOSE = Form(("reason",), own=_ASKS)


def _stream(task: Any, name: str, config: TaskConfig) -> _core.TaskSpec:
    _check_config(name, config)
    window = _attribute(task, name, "window", StreamWindow.Count(1))
    policy = _attribute(task, name, "on_item_error", ItemErrorPolicy.FailFast)
    forms = {"open": _OPEN, "process_item": _PROCESS, "flush_window": _FLUSH, "on_close": _CLOSE}
    methods = tuple(Method.of(task, name, method, form) for method, form in forms.items())
    limit = cast("float | None", config.attempt_timeout)
    skips = policy == ItemErrorPolicy.Skip
    stream = Stream(name, methods, window, limit, _retries(policy._retries or 0), skips=skips)
    plan = plan_of(methods, methods[2:], leads_with=("run",))
    return _core.TaskSpec(stream.run, name, plan, None, "stream", methods[0].reading.given)


def _check_config(name: str, config: TaskConfig) -> None:
    """Refuse what means nothing to a stream."""
    bare = TaskConfig(attempt_timeout=config.attempt_timeout)
    for field in dataclasses.fields(config):
        if getattr(config, field.name) != getattr(bare, field.name):
            raise ConfigurationError(
                f"config of stream {name} must not set {field.name}, got {show(getattr(config, field.name))}: of a "
                f"configuration only attempt_timeout applies, and on_item_error says what is tried again"
            )


def _attribute(task: Any, name: str, attribute: str, default: Any) -> Any:
    value = getattr(task, attribute, default)
    if not isinstance(value, type(default)):
        raise ConfigurationError(
            f"{attribute} of task {name} must be of type {type(default).__name__}, got {show(value)}"
        )
    return value


def _retries(count: int) -> _core.Policy | None:
    return TaskConfig(retry=RetryMode.exponential(count))._policy


def _batch(task: Any, name: str, config: TaskConfig) -> _core.TaskSpec:
    return Batch(task, name, config).spec(config)


_FORWARD = Form(pairs=True)
_BACK = Form(("output",))


def _undoable(task: Any, name: str, config: TaskConfig, *, register_before: bool = False) -> _core.TaskSpec:
    run, compensate = Method.of(task, name, "run", _FORWARD), Method.of(task, name, "compensate", _BACK)
    sources, keywords, _, _ = compensate.reading
    if _takes_handed(compensate):
        raise ConfigurationError(f"task {name}.compensate takes what led into the state, which only run can get")
    if register_before and _takes_handed(run):
        # A resume does the step before again, and may not come here any more.
        raise ConfigurationError(f"task {name}.run takes what led into the state, which register_before=True rules out")
    back = _core.Plan([("cursor", None, None), *sources], keywords, None, _is_async(compensate))
    undo = _core.TaskSpec(compensate.call, f"{name}.compensate", back, None)
    plan = _core.Plan(*run.reading[:3], _is_async(run))
    type_ = output_of(run.call, compensate.call)
    compensation = _core.Compensation(undo, type_, register_before)
    return _core.TaskSpec(run.call, name, plan, config._policy, "compensatable task", None, compensation)


def _takes_handed(method: Method) -> bool:
    return any(kind.startswith(("joined", "caught")) for kind, _, _ in method.reading.sources)


def _is_async(method: Method) -> bool:
    return inspect.iscoroutinefunction(method.call)


_COMPENSATABLE = _Model(
    "compensatable task", CompensatableTask, ("run", "compensate"), "register_with_compensation", _undoable
)
_MODELS = (
    _Model("router", RouterTask, ("route",), "register_router", _router),
    _Model("poll task", PollTask, ("poll",), "register", _poll),
    _Model("timer", TimerTask, ("wait", "after_wait"), "register", _timer),
    _Model("batch task", BatchTask, ("load", "process_item", "finish"), "register", _batch),
    _Model("stepped task", SteppedTask, ("step",), "register_stepped", _stepped),
    _Model("stream", StreamTask, ("open", "process_item", "flush_window", "on_close"), "register_stream", _stream),
    _COMPENSATABLE,
)


# --- the doors -------------------------------------------------------------------------------------------------------


def prepare(task: Any, config: TaskConfig | None = None) -> _core.TaskSpec:
    """Turn what is given to `Workflow.register`, or as a branch, into what the driver runs.

    Raises:
        ConfigurationError: It is no task, or one that another registration takes, or a signature asks for something that
            cannot be filled in.
    """
    model = _model_of(task)
    return prepare_task(task, config) if model is None else _made(model, "register", task, config)


def prepare_branches(tasks: Any) -> tuple[_core.TaskSpec, ...]:
    """The branches of a split, in order."""
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Iterable):
        raise ConfigurationError(f"the branches of a split must be an iterable of tasks, got {show(tasks)}")
    return tuple(_branch(task) for task in tasks)


def _branch(task: Any) -> _core.TaskSpec:
    if _model_of(task) is _COMPENSATABLE:
        raise ConfigurationError(
            f"task {name_of(task)} is a compensatable task, which cannot be a branch of a split; "
            f"do it before the split or after the join"
        )
    return prepare(task)


def prepare_router(task: Any, config: TaskConfig | None) -> _core.TaskSpec:
    """Turn what is given to `Workflow.register_router` into what the driver runs; a function is a router as it is."""
    model = _model_of(task)
    if model is None and not _has_run(task) and callable(task) and not isinstance(task, type):
        return spec_of(task, task, config, "router")
    return _through("register_router", model, task, config)


def prepare_stepped(task: Any, config: TaskConfig | None) -> _core.TaskSpec:
    """Turn what is given to `Workflow.register_stepped` into what the driver runs."""
    return _through("register_stepped", _model_of(task), task, config)


def prepare_stream(task: Any, config: TaskConfig | None) -> _core.TaskSpec:
    """Turn what is given to `Workflow.register_stream` into what the driver runs."""
    return _through("register_stream", _model_of(task), task, config)


def prepare_compensatable(task: Any, config: TaskConfig | None, *, register_before: bool) -> _core.TaskSpec:
    """Turn what is given to `Workflow.register_with_compensation` into what the driver runs."""
    make = functools.partial(_undoable, register_before=register_before)
    model = _model_of(task)
    return _through(_COMPENSATABLE.door, model and model._replace(make=make), task, config)


def _model_of(task: Any) -> _Model | None:
    """The model that a task follows, by its base or else by its methods; None for a function, a callable or a `Task`."""
    if isinstance(task, (types.FunctionType, type)):
        return None
    if not _missing(_COMPENSATABLE, type(task)):
        return _COMPENSATABLE
    for model in _MODELS:
        if isinstance(task, model.base):
            return model
    if callable(task) or _has_run(task):
        return None
    return next((model for model in _MODELS if not _missing(model, task)), None)


def _has_run(task: Any) -> bool:
    return callable(getattr(task, "run", None)) or callable(getattr(task, "run_bare", None))


def _missing(model: _Model, task: Any) -> list[str]:
    return [name for name in model.methods if not callable(getattr(task, name, None))]


def _through(door: str, model: _Model | None, task: Any, config: TaskConfig | None) -> _core.TaskSpec:
    """What a door for one model alone makes of a task."""
    if model is not None:
        return _made(model, door, task, config)
    if isinstance(task, type):
        raise ConfigurationError(f"{task.__qualname__} is a class; register an instance: {task.__qualname__}()")
    wanted = next(model for model in _MODELS if model.door == door)
    functions = "a function, or " if door == "register_router" else ""
    raise ConfigurationError(
        f"a {wanted.word} must be {functions}an object with {' and '.join(wanted.methods)}, "
        f"got {show(task)} ({type(task).__qualname__}); register() takes any other task"
    )


def _made(model: _Model, door: str, task: Any, config: TaskConfig | None) -> _core.TaskSpec:
    name = name_of(task)
    if model.door != door:
        raise ConfigurationError(f"task {name} is a {model.word}; register it with {model.door}()")
    missing = _missing(model, task)
    if missing:
        raise ConfigurationError(f"task {name} is a {model.word} without a method {' and '.join(missing)}")
    return model.make(task, name, config_of(task, name, config))
