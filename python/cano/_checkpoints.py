"""What durable runs are made of in Python: kinds of rows, how far a run has come, and what a store must do."""

from collections.abc import Awaitable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ._core import CheckpointRow


class RowKind(Enum):
    """What a row of a run's log tells; ``str()`` of a member is its value.

    - ``StateEntry``: an attempt of a visit to a state begins.
    - ``CompensationCompletion``: a compensatable step is done; its output, and where the run goes.
    - ``StepCursor``: how far a stepped or stream task got; with a next state, that it ended.
    - ``TimerDue``: when a timer fires.
    - ``RollbackStarted``: from here on the run goes backwards.
    - ``Compensated``: one step has been undone.
    - ``Finished``: the run has reached an exit state, or has been rolled back.
    - ``NeedsAttention``: the run cannot go on without a person.
    """

    StateEntry = "state entry"
    CompensationCompletion = "compensation completion"
    StepCursor = "step cursor"
    TimerDue = "timer due"
    RollbackStarted = "rollback started"
    Compensated = "compensated"
    Finished = "finished"
    NeedsAttention = "needs attention"

    def __str__(self) -> str:
        return self.value


class RunStatus(Enum):
    """How far a durable run has come; ``str()`` of a member is its value.

    - ``Running``: it goes forward, or would if its owner lived.
    - ``RollingBack``: it goes backwards, or would.
    - ``Stopped``: it has failed or was cancelled with nothing to undo, and can be resumed.
    - ``Finished``: it has reached an exit state.
    - ``RolledBack``: all that it did has been undone.
    - ``NeedsAttention``: it cannot go on without a person.
    """

    Running = "running"
    RollingBack = "rolling back"
    Stopped = "stopped"
    Finished = "finished"
    RolledBack = "rolled back"
    NeedsAttention = "needs attention"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A durable run as `list_runs` shows it.

    Attributes:
        id: The id under which its rows are kept.
        workflow: The workflow's name; empty if the run was begun without a claim.
        version: The workflow's version as of the last row, 0 if it has none.
        status: How far it has come.
        state: Label of the state of the last row; empty before the first.
        owner: Who has claimed it, or None. A claim whose lease has run out is shown as long as nobody else claims the run.
        created_at: When it began, in milliseconds since 1970.
        updated_at: When the last row was made, or when it was last claimed or given up, in milliseconds since 1970.
        rows: How many rows are kept.
        bytes: How many bytes these are.
    """

    id: str
    workflow: str
    version: int
    status: RunStatus
    state: str
    owner: str | None
    created_at: int
    updated_at: int
    rows: int
    bytes: int


class CheckpointStore(Protocol):
    """Where durable runs keep their rows; these three methods are enough for a store of your own.

    Each returns an awaitable. What `append` has answered must outlive whatever the store promises to outlive. The engine never
    has two appends of one run under way, and never cancels one: it waits for the answer, then honours the cancel.

    A store that has ``start_run``, too, coordinates owners, so that several processes may share it, and has all of these::

        start_run(workflow_id, *, workflow, version) -> int     claim an id that is not there; the int is the fence
        claim(workflow_id) -> int                               claim a run that is there
        append(workflow_id, row, *, fence=None)                 refused when the fence is out of date
        clear(workflow_id, *, fence=None)
        release(workflow_id, fence, *, stopped=False)           give a claim up; stopped: resumed by those who ask only
        list_runs(*, status=None, older_than=None, limit=1000) -> list[RunSummary]
        aclose(), and ``async with store``

    `cano.testing.checkpoint_store_suite` checks a store against all this.
    """

    def append(self, workflow_id: str, row: "CheckpointRow") -> Awaitable[None]:
        """Keep a row.

        Raises:
            RunConflictError: The run has a row of this sequence, which stays as it is.
        """
        ...

    def load_run(self, workflow_id: str) -> "Awaitable[list[CheckpointRow]]":
        """The rows of a run in ascending order; empty if there are none."""
        ...

    def clear(self, workflow_id: str) -> Awaitable[None]:
        """Forget all rows of a run; fine if there are none."""
        ...
