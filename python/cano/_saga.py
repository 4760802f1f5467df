"""Sagas: steps that can be undone, and the roll-back that undoes them when their run fails.

forward: each compensatable step that is done goes on the stack of its run, with its output
back:    the run is about to end with an error -> newest step first, each compensated with its output -> the error goes on

The roll-back is a task of its own, which no cancel of the run reaches; the run waits for it. A failure of one compensation
is collected and the others still run. What ends it early is its own time limit, and what is left then is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from . import _core
from ._codec import Codec, JsonCodec, decoded
from ._errors import (
    AttemptTimeoutError,
    CompensationFailedError,
    CompensationTimeoutError,
    Orphan,
    OrphanedStepError,
    TaskExecutionError,
    WorkflowCancelledError,
    label,
    show,
)
from ._log import written
from ._methods import outcome
from ._tasks import Task

S = TypeVar("S", bound=Hashable)
T = TypeVar("T")

_log = logging.getLogger("cano")


class CompensatableTask(Task[S], Generic[S, T]):
    """Optional base of a task that can be undone; it is registered with `Workflow.register_with_compensation`.

    Write ``run()``, which returns the next state and an output, and ``compensate(output)``, which undoes what ``run`` did;
    both async or plain, and both may take parameters that are filled in as those of any task (``compensate`` gets neither a
    SplitResult nor a Caught error). If the run fails later, times out or is cancelled, the outputs of the steps that it has
    done are handed to ``compensate``, newest first.

    No cancel of the run interrupts ``run``, nor does the run's timeout: they wait until it is done, and then it is undone.
    What cuts it short is its own ``attempt_timeout``.

    ``compensate`` runs at least once, so it should not mind to run again. Its ``RunContext`` is that of the step: the same
    state, visit and ``idempotency_key``. It is bounded by the task's ``attempt_timeout``, and neither repeated nor held up by
    a circuit breaker or a rate limiter.

    The annotation of ``run``, ``tuple[S, T]``, says which states may follow, as for any task, and as which type a stored
    output is read; without it the annotation of the first parameter of ``compensate`` does.

    Example:
        >>> class Reserve(CompensatableTask[str, int]):
        ...     def run(self) -> tuple[str, int]:
        ...         return "charge", 7
        ...
        ...     def compensate(self, output: int) -> None:
        ...         print("released", output)
        >>> workflow = (
        ...     Workflow[str]().register_with_compensation("reserve", Reserve()).register("charge", lambda: 1 / 0)
        ... )
        >>> asyncio.run(workflow.add_exit_state("done").orchestrate("reserve"))
        Traceback (most recent call last):
        ...
        ZeroDivisionError: division by zero
        state=charge task=<lambda> attempt=1/1 path=reserve>charge
    """


class _Journal:
    """Writes down how the roll-back of a durable run goes on."""

    def __init__(self, log: _core.Log) -> None:
        self._log = log

    async def started(self, error: BaseException) -> None:
        """The first compensation is about to begin; if this raises, none does."""
        await written(self._log, self._log.roll_back(_reason(error)))

    async def compensated(self, step: _core.Completion) -> None:
        """One step, which has a row, is undone."""
        row = self._log.compensated(step.sequence or 0, label(step.state), step.task, step.visit)
        await written(self._log, row)

    async def finished(self) -> None:
        """All of them are."""
        await written(self._log, self._log.finished())

    async def needs_attention(self, error: CompensationFailedError) -> None:
        """Some could not be undone."""
        places = ", ".join(f"{orphan.task} in state {label(orphan.state)}" for orphan in error.orphans)
        await written(self._log, self._log.needs_attention(_cut(f"not undone: {places}")))


_REASON_LIMIT = 4096


def _reason(error: BaseException) -> bytes:
    """Why a run failed, for its log: type and text."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - it is the user's, and must not hold the roll-back up
        text = "its text cannot be had"
    return _cut(f"{type(error).__qualname__}: {text}")


def _cut(text: str) -> bytes:
    return text.encode(errors="replace")[:_REASON_LIMIT]


async def uninterrupted(work: Awaitable[Any], limit: float | None) -> Any:
    """What a compensatable step comes to, in a task of its own: nobody could say what one that was cut short has done.

    Args:
        work: What the task's ``run`` returned.
        limit: The task's ``attempt_timeout``, the only thing that ends it.

    Cancellation: it is waited for all the same; the drive keeps the cancel, which goes on then.
    """
    task = asyncio.get_running_loop().create_task(_attempt(work, limit), name="compensatable step")
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    try:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        return task.result()
    except BaseException:
        task.cancel()  # for a run that was closed
        if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
            work.close()
        raise
    finally:
        del task  # an exception's traceback holds this frame, which must not hold the exception


async def _attempt(work: Awaitable[Any], limit: float | None) -> Any:
    scope = asyncio.timeout(limit)
    try:
        async with scope:
            return await work
    except TimeoutError as error:
        if not scope.expired():
            raise
        text = f"the attempt took longer than its attempt_timeout of {limit} s"
        raise AttemptTimeoutError(text, limit or 0.0) from error.__cause__


async def roll_back(
    run: _core.Run,
    steps: Sequence[_core.Completion],
    error: BaseException,
    limit: float,
) -> BaseException:
    """Undo the steps of a run, newest first, and give the exception with which the run ends.

    Args:
        run: The run that fails.
        steps: What it has done, oldest first; those that come from a store have the bytes of their outputs.
        error: Why it fails.
        limit: Seconds for all of it.

    Returns:
        `error` itself if everything is undone, else a `CompensationFailedError`. A cancel leaves the run as it is, with that
        error as its cause; one that came meanwhile takes the place of `error`, with `error` as its context. If the log of a
        durable run does not take the row with which a roll-back begins, nothing is undone, and `error` says so in a note.
    """
    work = _RollBack(run, steps, error, limit)
    leaving = error
    try:
        while not work.is_over:
            try:
                await asyncio.wait((work.task(),))
            except asyncio.CancelledError as cancelled:
                cancelled.__context__, leaving = error, cancelled  # not those between: an anyio scope makes many
        failed = work.failed
        if failed is None or isinstance(leaving, Exception):
            return failed or leaving
        _log.error("a roll-back failed while its run was being cancelled", exc_info=failed)
        leaving.__cause__ = failed
        return leaving
    finally:
        del leaving  # an exception's traceback holds this frame, which must not hold the exception


def abandon(steps: Sequence[_core.Completion]) -> None:
    """Tell of steps that nobody undoes, since their run was closed and cannot wait for anything."""
    _log.error("a run was closed before its end; not undone: %s", ", ".join(map(_place, steps)))


# asyncio itself keeps only weak references to tasks.
_tasks: set[asyncio.Task[Any]] = set()


class _RollBack:
    """The progress of one roll-back, which outlives a task that is cancelled by others than its run."""

    def __init__(
        self,
        run: _core.Run,
        steps: Sequence[_core.Completion],
        error: BaseException,
        limit: float,
    ) -> None:
        self._run = run
        self._left = list(steps)
        self._error = error
        self._limit = limit
        self._journal = None if run.log is None else _Journal(run.log)
        self._codec: Codec = JsonCodec() if run.log is None else run.log.definition.codec
        self._deadline: float | None = None
        self._failures: list[Exception] = []
        self._orphans: list[Orphan] = []
        self._task: asyncio.Task[None] | None = None
        self.failed: CompensationFailedError | None = None
        self._interrupted: _core.Completion | None = None
        self._is_late = False
        self.is_over = False

    def task(self) -> asyncio.Task[None]:
        """The task that does it; another one, for what is left, if somebody has cancelled the one before."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._undo_all(), name="roll-back")
            _tasks.add(self._task)
            self._task.add_done_callback(_tasks.discard)
        return self._task

    def _fail(self) -> CompensationFailedError | None:
        """The error, if not everything is undone."""
        if not self._failures:
            return None
        original = _original(self._run, self._error)
        exceptions = list(_flat([original, *self._failures]))
        orphans = [*_orphans_of(original), *self._orphans]
        failed = CompensationFailedError(
            f"the run failed and was not rolled back completely: {len(orphans)} of its steps are not undone",
            exceptions,
            orphans,
        )
        if (context := getattr(original, "__cano__", None)) is not None:
            failed.__cano__ = context
            failed.add_note(str(context))
        return failed

    async def _undo_all(self) -> None:
        try:
            if self._deadline is None:
                if not await self._is_recorded():
                    self.is_over = True
                    return
                self._deadline = asyncio.get_running_loop().time() + self._limit
            await self._undo_each(self._deadline)
            self.failed = self._fail()
            await self._conclude(self.failed)
        except BaseException as failure:
            if _is_cancelled(failure):
                raise
            self._leave(_as_exception("the roll-back", failure))
            self.failed = self._fail()
        self.is_over = True

    async def _is_recorded(self) -> bool:
        """Whether a crash from here on would go on with the roll-back, and not with the run."""
        if self._journal is None:
            return True
        try:
            await self._journal.started(self._error)
        except Exception as failure:  # noqa: BLE001 - whatever a store raises
            name = type(failure).__qualname__
            self._error.add_note(
                f"nothing was undone, as the log did not take it ({name}: {failure}); the run can be resumed"
            )
            return False
        return True

    async def _undo_each(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while self._left and loop.time() < deadline:
            step = self._left[-1]
            try:
                output, failure = await _undo(step, self._codec, deadline, self._limit)
            except asyncio.CancelledError:
                # Somebody cancels tasks that are not his: it is done again, in another one; but not for ever.
                if self._interrupted is not step:
                    self._interrupted = step
                    raise
                output, failure = step.output, _not_undone(step, "was cancelled twice")
            self._left.pop()
            if failure is None:
                await self._tell(step)
            else:
                self._orphan(step, output, failure)
                self._is_late = loop.time() >= deadline
        if self._left or self._is_late:
            self._give_up()

    async def _tell(self, step: _core.Completion) -> None:
        if self._journal is None or step.sequence is None:
            return
        try:
            await self._journal.compensated(step)
        except Exception as failure:  # noqa: BLE001 - what it raises is reported, and the others are undone all the same
            self._failures.append(failure)

    async def _conclude(self, failed: CompensationFailedError | None) -> None:
        if self._journal is None:
            return
        if failed is None:
            await self._journal.finished()
        elif self._orphans:
            await self._journal.needs_attention(failed)

    def _orphan(self, step: _core.Completion, output: Any, failure: Exception) -> None:
        step.annotate(self._run, failure)
        self._failures.append(failure)
        self._orphans.append(Orphan(step.state, step.task, step.visit, output, failure))
        self._orphans += _orphans_of(failure)

    def _give_up(self) -> None:
        """The time is over: what is left is not undone."""
        text = f"was not begun: the compensation timeout of {self._limit} s was used up"
        self._leave(CompensationTimeoutError(f"the roll-back took longer than {self._limit} s", self._limit), text)

    def _leave(self, failure: Exception, why: str = "was not begun: the roll-back could not be recorded") -> None:
        while self._left:
            step = self._left.pop()
            self._orphan(step, step.output, _not_undone(step, why))
        self._failures.append(failure)


async def _undo(step: _core.Completion, codec: Codec, deadline: float, limit: float) -> tuple[Any, Exception | None]:
    """Compensate one step; gives its output, and why it is not undone."""
    output = step.output
    if not step.has_compensation:
        return output, OrphanedStepError(f"{_place(step)} has no compensation in this version of the workflow")
    now = asyncio.get_running_loop().time()
    due = deadline if step.limit is None else min(deadline, now + step.limit)
    scope = asyncio.timeout_at(due)
    try:
        if step.is_stored:
            output = decoded(codec, f"the output of {_place(step)}", step.output, step.output_type)
        async with scope:
            await outcome(step.undo(output))
    except BaseException as error:
        if _is_cancelled(error):
            raise
        if not (isinstance(error, TimeoutError) and scope.expired()):
            return output, _as_exception(f"the compensation of {_place(step)}", error)
        if due < deadline:
            text = f"the compensation took longer than its attempt_timeout of {step.limit} s"
            return output, AttemptTimeoutError(text, step.limit or 0.0)
        return output, _not_undone(step, f"was stopped: the compensation timeout of {limit} s was used up")
    return output, None


def _not_undone(step: _core.Completion, why: str) -> OrphanedStepError:
    return OrphanedStepError(f"the compensation of {_place(step)} {why}")


def _is_cancelled(error: BaseException) -> bool:
    """Whether the present task was asked to stop, rather than that what it awaits raised a CancelledError."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _as_exception(what: str, error: BaseException) -> Exception:
    """What can be a member of a group: an Exception is, anything else is the cause of one."""
    if isinstance(error, Exception):
        return error
    kind = type(error)
    is_panic = (kind.__module__, kind.__name__) == ("pyo3_runtime", "PanicException")
    told = TaskExecutionError(f"panic: {error}" if is_panic else f"{what} ended with {kind.__name__}")
    told.__cause__ = error
    return told


def _original(run: _core.Run, error: BaseException) -> Exception:
    """What stands for the failure of the run in a group."""
    if isinstance(error, Exception):
        return error
    told: Exception
    if isinstance(error, asyncio.CancelledError):
        reason = error.args[0] if error.args and isinstance(error.args[0], str) else None
        told = WorkflowCancelledError("the run was cancelled" + (f": {show(reason)}" if reason else ""), reason)
    else:
        told = TaskExecutionError(f"the run ended with {type(error).__name__}")
    run.annotate(told)
    return told


def _flat(errors: Iterable[Exception]) -> Iterator[Exception]:
    for error in errors:
        if isinstance(error, CompensationFailedError):
            yield from error.exceptions
        else:
            yield error


def _orphans_of(error: Exception) -> tuple[Orphan, ...]:
    return error.orphans if isinstance(error, CompensationFailedError) else ()


def _place(step: _core.Completion) -> str:
    return f"task {step.task} in state {label(step.state)}"
