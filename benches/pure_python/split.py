"""Branches side by side, and the join that ends them.

A branch is an asyncio task around one small coroutine that reports its own end: the books of the join are then exact
at every step of the loop, and no done callback has to be scheduled per branch. The parent waits on one future, set when
no branch is alive. What closes the split (a decision, the timeout, a cancellation) cancels the branches there and then.

A task that is cancelled before its first step never runs its coroutine, so it cannot report. Whoever closes the split
books those ends itself; they are the tasks without a start time.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from typing import Any, ClassVar, NamedTuple, cast

from .config import BranchOutcome, JoinConfig, JoinError, JoinTimeoutError, SplitResult, TaskExecutionError


class Branch(NamedTuple):
    """A task of a split: ``call()`` starts it, and what that returns is awaited if it has to be."""

    name: str
    call: Callable[[], Any]
    is_async: bool


class Verdict(Enum):
    PROCEED = auto()
    FAIL = auto()
    TIMED_OUT = auto()


class Split:
    """One split in progress. Invariant: ``alive`` branches have been started, and their end is not booked.

    Attributes:
        is_deferred: Whether an end is booked one pass of the loop later, at the very place where a done callback would
            run. Slower, and different only for branches that end in the same pass: the later ones still count.
    """

    is_deferred: ClassVar[bool] = False

    def __init__(
        self, branches: Sequence[Branch], join: JoinConfig[Any], note: Callable[[Exception, str, int], object]
    ) -> None:
        self.branches, self.join, self.note = branches, join, note
        self.loop = asyncio.get_running_loop()
        self.total = total = len(branches)
        self.need = join.strategy.need(total)
        self.counts_failures, self.is_patient = join.strategy.counts_failures, join.strategy.is_patient
        self.tasks: list[asyncio.Task[None] | None] = [None] * total
        self.began: list[float | None] = [None] * total
        self.outcomes: list[BranchOutcome | None] = [None] * total
        self.started = self.alive = self.ended = self.reached = 0
        self.width = total if join.bulkhead is None else min(join.bulkhead, total)
        self.due = total if join.hedge_after is None else 1
        self.hedge: asyncio.TimerHandle | None = None
        self.is_closed = False
        self.verdict: Verdict | None = None
        self.fatal: BaseException | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.context: contextvars.Context | None = None

    async def run(self) -> SplitResult:
        """Start the branches, wait for the decision and for the end of every branch.

        Raises:
            JoinError: The strategy was not met, or (`JoinTimeoutError`) not in time.
            asyncio.CancelledError: The first one that reached the parent, after every branch has ended.
            BaseException: What a branch raised that is no `Exception`, after every branch has ended.
        """
        cancelled: asyncio.CancelledError | None = None
        timer = None
        if not self.total:
            self._judge()
        elif self.join.timeout is not None:
            timer = self.loop.call_later(cast("float", self.join.timeout), self._time_out)
        if self.width < self.total or self.due < self.total:
            self.context = contextvars.copy_context()
        self._start_what_is_due()
        while self.alive:
            self.waiter = self.loop.create_future()
            try:
                await self.waiter
            except asyncio.CancelledError as error:
                cancelled = error if cancelled is None else cancelled
                self._close(error.args[0] if error.args else None)
        if timer is not None:
            timer.cancel()
        try:
            if self.fatal is not None:
                raise self.fatal
            if cancelled is not None:
                raise cancelled
            return self._result()
        finally:  # the traceback of what was raised holds this frame
            self.fatal = cancelled = None

    def _start_what_is_due(self) -> None:
        while self.started < min(self.due, self.total) and self.alive < self.width and not self.is_closed:
            self._start()
        if self.join.hedge_after is None:
            return
        if self.hedge is not None:
            self.hedge.cancel()
        if self.due <= self.started < self.total and not self.is_closed:  # it waits for the newest to be slow
            self.hedge = self.loop.call_later(cast("float", self.join.hedge_after), self._newest_is_slow)

    def _newest_is_slow(self) -> None:
        self.due = self.started + 1
        self._start_what_is_due()

    def _start(self) -> None:
        index = self.started
        self.started += 1
        self.alive += 1
        name = self.branches[index].name
        # A branch that is started by the end of another must not inherit the context of that one.
        context = None if self.context is None else self.context.copy()
        task = self.loop.create_task(self._branch(index), name=name, context=context)
        if not task.done():  # an eager task factory may have run it to its end
            self.tasks[index] = task

    async def _branch(self, index: int) -> None:
        name, call, is_async = self.branches[index]
        self.began[index] = began = self.loop.time()
        try:
            value = call()
            if is_async or isinstance(value, Awaitable):
                value = await value
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - it is the outcome
            self.note(error, name, index)
            self.outcomes[index] = BranchOutcome(index, name, None, error, self.loop.time() - began)
        except GeneratorExit:  # the loop is gone, and nobody waits
            raise
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            self.fatal = error if self.fatal is None else self.fatal
        else:
            self.outcomes[index] = BranchOutcome(index, name, value, None, self.loop.time() - began)
        if self.is_deferred:
            self.loop.call_soon(self._book, index)
        else:
            self._book(index)

    def _book(self, index: int) -> None:
        outcome = self.outcomes[index]
        self.tasks[index] = None
        self.alive -= 1
        self.ended += 1
        if outcome is not None and (outcome.error is None or self.counts_failures):
            self.reached += 1
        if outcome is None or outcome.error is not None:
            self.due += 1
        if not self.is_closed:
            self._judge()
        if not self.is_closed and self.context is not None and self.started < self.total:
            self._start_what_is_due()
        self._wake()

    def _judge(self) -> None:
        left = self.total - self.ended
        if self.fatal is not None:
            self._close()
        elif self.reached >= self.need and not (self.is_patient and left):
            self._decide(Verdict.PROCEED)
        elif not left or (self.join.fail_fast and self.reached + left < self.need):
            self._decide(Verdict.FAIL)

    def _time_out(self) -> None:
        if not self.is_closed:
            is_enough = self.is_patient and self.reached >= self.need
            self._decide(Verdict.PROCEED if is_enough else Verdict.TIMED_OUT)
            self._wake()

    def _decide(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._close()

    def _close(self, message: object = None) -> None:
        """Start no further branch, and cancel those alive; closing again cancels them again."""
        self.is_closed = True
        if self.hedge is not None:
            self.hedge.cancel()
        for index, task in enumerate(self.tasks if self.alive else ()):
            if task is not None:
                task.cancel(message)
                if self.began[index] is None:
                    self.tasks[index] = None
                    self.alive -= 1

    def _wake(self) -> None:
        if not self.alive and self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def _result(self) -> SplitResult:
        outcomes, self.outcomes = self.outcomes, []
        ends = [outcome for outcome in outcomes if outcome is not None]
        result = SplitResult(
            successes=[end for end in ends if end.error is None],
            errors=[end for end in ends if end.error is not None],
            cancelled=[index for index, outcome in enumerate(outcomes) if outcome is None],
        )
        if self.verdict is Verdict.PROCEED:
            return result
        errors = [end.error for end in ends if end.error is not None]
        counts = f"{len(result.successes)} of {self.total} branches succeeded, {len(errors)} failed"
        if self.verdict is Verdict.TIMED_OUT:
            text = f"{self.join.strategy} was not decided within {self.join.timeout} s: {counts}"
            raise JoinTimeoutError(text, [TimeoutError(text), *errors], result)
        text = f"{self.join.strategy} was not met: {counts}"
        raise JoinError(text, errors or [TaskExecutionError(f"{text}, every other one was cancelled")], result)
