"""`Workflow`, the definition, and `Run`, the handle of one run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterable, Mapping
from enum import Enum
from functools import partial
from typing import Any, Generic, Self, TypeVar

from . import _core
from ._checkpoints import CheckpointStore
from ._codec import Codec, JsonCodec
from ._config import Seconds, TaskConfig
from ._durable import RECOVERY_LIMIT, Definition, Migration, Ownership, begin, fingerprint, resume
from ._errors import (
    LABEL_LIMIT,
    CompensationFailedError,
    ConfigurationError,
    WorkflowCancelledError,
    WorkflowError,
    check_name,
    check_text,
    label,
    show,
)
from ._join import JoinConfig
from ._log import settled
from ._models import Done, More
from ._on_error import Keys, OnError, keys_of
from ._resources import Resources
from ._shims import prepare, prepare_branches, prepare_compensatable, prepare_router, prepare_stepped, prepare_stream
from ._tasks import SingleResult, SplitRequest, prepare_factory, run_data, states_of

S = TypeVar("S", bound=Hashable)
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_ID_LIMIT = 256

_Work = _core.TaskSpec | tuple[_core.TaskSpec, ...] | _core.Factory


async def _drive(run: _core.Run) -> Any:
    """The frame of every run and of every branch that is one: to asyncio it is an ordinary coroutine."""
    return await run


_SHIMS = (prepare_branches, _drive, SingleResult, SplitRequest, More, Done)


class Workflow(Generic[S]):
    """A finite state machine: states, one task (or one split) per state, and the states that end it.

    The task of a state returns the next state, until an exit state is reached. The first `validate`, `orchestrate` or
    `start` freezes the definition; after that it may run any number of times, also at once.

    Args:
        resources: What tasks share, by key; a mapping is taken as ``Resources(mapping)``; None is empty.
        name: What messages call the workflow; None is "workflow".

    Raises:
        ConfigurationError: `resources` or `name` is of the wrong type.

    Example:
        >>> import asyncio
        >>> workflow = Workflow().register("start", lambda: "done").add_exit_state("done")
        >>> asyncio.run(workflow.orchestrate("start"))
        'done'
    """

    __slots__ = (
        "__weakref__",
        "_codec",
        "_compensation_timeout",
        "_data",
        "_exits",
        "_known",
        "_migrate",
        "_name",
        "_recovery_limit",
        "_resources",
        "_states",
        "_store",
        "_table",
        "_timeout",
        "_version",
        "_workflow_id",
    )

    def __init__(self, resources: Resources | Mapping[Any, Any] | None = None, *, name: str | None = None) -> None:
        if name is not None:
            check_name(name)
        self._name = name or "workflow"
        self._resources = _as_resources(resources)
        self._states: dict[S, tuple[_Work, JoinConfig[S] | None, Keys[S]]] = {}
        self._exits: dict[S, None] = {}
        self._timeout: float | None = None
        self._compensation_timeout: float | None = None
        self._workflow_id: str | None = None
        self._store: CheckpointStore | None = None
        self._version = 0
        self._codec: Codec = JsonCodec()
        self._data: type[Any] | None = None
        self._migrate: Migration | None = None
        self._recovery_limit = RECOVERY_LIMIT
        self._table: _core.Table | None = None
        self._known: Definition | None = None

    @classmethod
    def bare(cls, *, name: str | None = None) -> Self:
        """A workflow without resources, for tasks that take none."""
        return cls(name=name)

    # --- registration ------------------------------------------------------------------------------------------------

    def register(
        self,
        state: S,
        task: object,
        *,
        config: TaskConfig | None = None,
        join: JoinConfig[S] | None = None,
        on_error: OnError[S] | None = None,
    ) -> Self:
        """Give a state its task.

        Args:
            state: Any hashable value, usually an Enum member.
            task: A function, async or plain, a callable, an object with a method ``run`` or ``run_bare``, a `PollTask` or a
                `TimerTask`. Its parameters are filled in by annotation: Resources, Annotated[T, Res(key)], RunContext,
                SplitResult, Caught[E]; a single parameter without annotation gets the resources.
            config: How the task is run; None takes the task's own attribute ``config``, or else ``TaskConfig()``.
            join: Lets the task return ``TaskResult.Split([s1, s2])``: each listed state starts a branch that runs through
                registered states until it reaches an exit state or ``join.next_state``. None refuses such a result.
            on_error: The state that follows an error which would leave the run from this one, retries included, by the
                error's class: a mapping from subclasses of Exception, or tuples of them, to states. The most specific class
                decides; the state's task may take the error as ``Caught[E]``. None lets every error leave the run.

                A `RetryExhaustedError` follows the failure that is its cause, unless a key names RetryExhaustedError
                itself. A ConfigurationError, InvalidTransitionError, UnknownStateError, ResourceError or plain WorkflowError
                follows only keys that are classes of cano's. Never routed: `asyncio.CancelledError` and what else is no
                Exception, the end of the run's own timeout, and any error of a task that was told to stop.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, the task cannot be called or belongs to another registration, a
                key of `on_error` is no class of errors, or the workflow is frozen.

        Example:
            >>> workflow = Workflow[str]().register("charge", lambda: 1 / 0, on_error={ArithmeticError: "failed"})
            >>> asyncio.run(workflow.add_exit_state("failed").orchestrate("charge"))
            'failed'
        """
        if join is not None and not isinstance(join, JoinConfig):
            raise ConfigurationError(f"join of state {label(state)} must be a JoinConfig, got {show(join)}")
        work = self._prepared(prepare, task, config)
        if join is not None and work.model is not None:
            raise ConfigurationError(f"task {work.name} is a {work.model}, which cannot split: it takes no join")
        return self._add(state, work, join, on_error)

    def register_router(
        self, state: S, task: object, *, config: TaskConfig | None = None, on_error: OnError[S] | None = None
    ) -> Self:
        """Give a state a task that only chooses the next one.

        Args:
            state: Any hashable value, usually an Enum member.
            task: A function, async or plain, or an object with a method ``route`` (see `RouterTask`); parameters are filled
                in as for `register`.
            config: How the task is run; None takes the task's own attribute ``config``, or else ``TaskConfig()``.
            on_error: As for `register`.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, `task` is no router, or the workflow is frozen.
        """
        return self._add(state, self._prepared(prepare_router, task, config), None, on_error)

    def register_stepped(
        self, state: S, task: object, *, config: TaskConfig | None = None, on_error: OnError[S] | None = None
    ) -> Self:
        """Give a state a task that works in steps.

        Args:
            state: Any hashable value, usually an Enum member.
            task: An object with a method ``step`` (see `SteppedTask`).
            config: How each step is run, with all of its retries; None takes the task's own attribute ``config``, or else
                ``TaskConfig()``.
            on_error: As for `register`.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, `task` is no stepped task, or the workflow is frozen.
        """
        return self._add(state, self._prepared(prepare_stepped, task, config), None, on_error)

    def register_stream(
        self, state: S, task: object, *, config: TaskConfig | None = None, on_error: OnError[S] | None = None
    ) -> Self:
        """Give a state a task that reads a source window by window.

        Args:
            state: Any hashable value, usually an Enum member.
            task: An object with the methods of a `StreamTask`.
            config: How it is run: an ``attempt_timeout`` bounds each call of a method, everything else is refused. None takes
                the task's own attribute ``config``, or else ``TaskConfig()``.
            on_error: As for `register`.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, `task` is no stream, `config` sets what a stream has no use
                for, or the workflow is frozen.
        """
        return self._add(state, self._prepared(prepare_stream, task, config), None, on_error)

    def register_with_compensation(
        self,
        state: S,
        task: object,
        *,
        config: TaskConfig | None = None,
        on_error: OnError[S] | None = None,
        register_before: bool = False,
    ) -> Self:
        """Give a state a task that is undone if the run fails later.

        Args:
            state: Any hashable value, usually an Enum member.
            task: An object with the methods ``run`` and ``compensate`` (see `CompensatableTask`); its name differs from that
                of every other compensatable task of the workflow.
            config: How ``run`` is run; its ``attempt_timeout`` bounds ``compensate`` as well. None takes the task's own
                attribute ``config``, or else ``TaskConfig()``.
            on_error: As for `register`. A step that leads on this way is not undone for that. A result of ``run`` that is
                refused, such as an unknown state, is never led on from: the run ends, and the step is undone first.
            register_before: Whether the step is undone, with None for its output, also if it has begun and failed, timed out
                or was cancelled; then ``run`` can take no SplitResult and no Caught error. False does not undo it: a step that
                fails is taken to have done nothing.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, `task` is not compensatable, or the workflow is frozen.
        """
        if not isinstance(register_before, bool):
            raise ConfigurationError(f"register_before must be a bool, got {show(register_before)}")
        work = self._prepared(partial(prepare_compensatable, register_before=register_before), task, config)
        return self._add(state, work, None, on_error)

    def register_split(
        self,
        state: S,
        tasks: Iterable[object] | Callable[..., object],
        join: JoinConfig[S],
        *,
        on_error: OnError[S] | None = None,
    ) -> Self:
        """Give a state several tasks, which run at once and are joined.

        Args:
            state: Any hashable value, usually an Enum member.
            tasks: The branches, in order: an iterable of tasks (read now), or a function, async or plain, that returns one
                each time the state is entered; its parameters are filled in like a task's.
            join: When the workflow may go on, and where to.
            on_error: As in `register`; the error of a split whose join fails is its JoinError, whatever its branches raised.

        Returns:
            The workflow itself, so that calls chain.

        Raises:
            ConfigurationError: The state already has a task, something is no task, or the workflow is frozen. Whether the
                join can be reached by so many branches is checked when the workflow is validated, for a run-time list when
                the state is entered.
        """
        if not isinstance(join, JoinConfig):
            raise ConfigurationError(f"join of state {label(state)} must be a JoinConfig, got {show(join)}")
        if isinstance(tasks, Iterable) or not callable(tasks):
            return self._add(state, self._prepared(prepare_branches, tasks), join, on_error)
        return self._add(state, self._prepared(prepare_factory, tasks), join, on_error)

    def task(
        self,
        state: S,
        *,
        config: TaskConfig | None = None,
        join: JoinConfig[S] | None = None,
        on_error: OnError[S] | None = None,
    ) -> Callable[[F], F]:
        """`register` as a decorator; the function stays what it is.

        Example:
            >>> workflow = Workflow[str]()
            >>> @workflow.task("start")
            ... async def start() -> str:
            ...     return "done"
        """

        def decorate(function: F) -> F:
            self.register(state, function, config=config, join=join, on_error=on_error)
            return function

        return decorate

    def add_exit_state(self, state: S) -> Self:
        """Let a run end in this state; a task registered for it never runs. Adding it again changes nothing."""
        self._check_open()
        _check_state(state)
        self._exits[state] = None
        return self

    def add_exit_states(self, states: Iterable[S]) -> Self:
        """`add_exit_state` for each of the states."""
        for state in states_of(states):
            self.add_exit_state(state)
        return self

    def _prepared(self, prepare: Callable[..., T], *given: Any) -> T:
        return prepare(*given) if self._data is None else _prepared_for(self._data, prepare, *given)

    def _add(self, state: S, work: _Work, join: JoinConfig[S] | None, on_error: OnError[S] | None) -> Self:
        if self._table is not None:
            self._check_open()
        _check_state(state)
        if state in self._states:
            raise ConfigurationError(
                f"state {label(state)} of workflow {self._name} already has {_described(self._states[state][0])}, "
                f"it cannot have {_described(work)} as well"
            )
        keys: Keys[S] = ()
        if on_error is not None:
            keys = keys_of(state, on_error)
            for _, target in keys:
                _check_state(target)
        self._states[state] = (work, join, keys)
        return self

    def _check_open(self) -> None:
        if self._table is not None:
            raise ConfigurationError(
                f"workflow {self._name} is frozen since it was first validated or run; change a copy() of it"
            )

    # --- options -----------------------------------------------------------------------------------------------------

    def with_timeout(self, seconds: Seconds | None) -> Self:
        """Bound every run to this many seconds from its start; None is no limit.

        A run that takes longer is cancelled and raises `WorkflowTimeoutError`. Setting resources up counts, tearing them
        down does not.
        """
        self._check_open()
        self._timeout = _core.seconds("timeout", seconds)
        return self

    def with_compensation_timeout(self, seconds: Seconds | None) -> Self:
        """Bound the roll-back of a run that fails to this many seconds.

        What is not undone by then is not begun any more, and is reported in a `CompensationFailedError`. None, the default, is
        half of the run's timeout, at most 30 s; and 30 s for a run without a timeout.
        """
        self._check_open()
        self._compensation_timeout = _core.seconds("compensation_timeout", seconds)
        return self

    def with_workflow_id(self, workflow_id: str | None) -> Self:
        """Name the runs of this workflow in errors and in `RunContext.idempotency_key`; None gives no name.

        Raises:
            ConfigurationError: It is empty or blank, longer than 256 bytes, or has control characters.
        """
        self._check_open()
        self._workflow_id = _checked_id(workflow_id)
        return self

    def with_data(self, data: type[Any]) -> Self:
        """Give each run variables of its own: an object of this class, which tasks get by annotation.

        The object is given to `orchestrate` and is the run's alone. In a durable run what it holds when a state is entered is
        part of that row, and comes back with a resume.

        Args:
            data: A class, before tasks that ask for it are registered. For durable runs the codec must be able to write it:
                `JsonCodec` takes dataclasses, Structs of msgspec, and models of pydantic.

        Raises:
            ConfigurationError: It is no class, or the workflow has another.

        Example:
            >>> from dataclasses import dataclass
            >>> @dataclass
            ... class Order:
            ...     total: int
            >>> def add(order: Order) -> str:
            ...     order.total += 1
            ...     return "done"
            >>> workflow = Workflow[str]().with_data(Order).register("add", add).add_exit_state("done")
            >>> order = Order(41)
            >>> asyncio.run(workflow.orchestrate("add", data=order)), order
            ('done', Order(total=42))
        """
        self._check_open()
        if not isinstance(data, type):
            raise ConfigurationError(f"data must be a class, got {show(data)}")
        if self._data not in (None, data):
            raise ConfigurationError(f"workflow {self._name} has run data of type {show(self._data)} already")
        self._data = data
        return self

    def with_checkpoint_store(self, store: CheckpointStore | None, *, codec: Codec | None = None) -> Self:
        """Make the runs durable: each writes its rows to this store, and can be resumed there.

        Every state that is entered is a row, written before its task begins; so a step is done for good once the next state
        is entered. A run that ends well clears its rows.

        Args:
            store: A `SqliteCheckpointStore`, a `PostgresCheckpointStore`, an `InMemoryCheckpointStore` or one of your own;
                None makes the runs what they are without.
            codec: How cursors, outputs and run data become bytes; None is `JsonCodec`.

        Raises:
            ConfigurationError: The store lacks a method of `CheckpointStore`, or `codec` one of `Codec`.
        """
        self._check_open()
        for method in () if store is None else ("append", "load_run", "clear"):
            if not callable(getattr(store, method, None)):
                raise ConfigurationError(f"store must have append, load_run and clear, got {show(store)}")
        if codec is not None and not isinstance(codec, Codec):
            raise ConfigurationError(f"codec must have encode and decode, got {show(codec)}")
        self._store = store
        self._codec = codec or JsonCodec()
        return self

    def with_workflow_version(self, version: int) -> Self:
        """Number the definition: a run that was begun by another version is not resumed without a migration.

        Args:
            version: 0 to 4,294,967,295; 0 is what a workflow has that was given none.

        Raises:
            ConfigurationError: It is no such number.
        """
        self._check_open()
        self._version = _number("version", version, 0, 0xFFFF_FFFF)
        return self

    def with_migration(self, migrate: Migration | None) -> Self:
        """Say how rows that another version, or another definition, has written are to be read.

        Args:
            migrate: A function that is called with each such row when a run is resumed, and returns it as this definition
                would have written it (`CheckpointRow.replace`); what it raises refuses the resume. The stored rows stay as
                they are. None refuses every such run.

        Raises:
            ConfigurationError: It cannot be called.
        """
        self._check_open()
        if migrate is not None and not callable(migrate):
            raise ConfigurationError(f"migrate must be a function of a row, or None, got {show(migrate)}")
        self._migrate = migrate
        return self

    def with_recovery_limit(self, limit: int) -> Self:
        """Park a run that has begun one visit to a state so often: it may be what kills the process.

        Args:
            limit: 1 or more; 10 unless it is set. A run that was parked needs attention: `NeedsAttentionError`.

        Raises:
            ConfigurationError: It is no such number.
        """
        self._check_open()
        self._recovery_limit = _number("limit", limit, 1, 1_000_000)
        return self

    def copy(self) -> Workflow[S]:
        """A workflow with the same definition that is not frozen; tasks and resources are shared."""
        copy: Workflow[S] = type(self)(self._resources, name=self._name)
        copy._states = dict(self._states)
        copy._exits = dict(self._exits)
        copy._timeout = self._timeout
        copy._compensation_timeout = self._compensation_timeout
        copy._workflow_id = self._workflow_id
        copy._data = self._data
        copy._store, copy._codec = self._store, self._codec
        copy._version, copy._migrate, copy._recovery_limit = self._version, self._migrate, self._recovery_limit
        return copy

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def registered_states(self) -> frozenset[S]:
        """The states that have a task or a split."""
        return frozenset(self._states)

    @property
    def exit_states(self) -> frozenset[S]:
        """The states that end a run."""
        return frozenset(self._exits)

    @property
    def name(self) -> str:
        """What messages call the workflow."""
        return self._name

    def __repr__(self) -> str:
        parts = [f"Workflow {self._name}", f"states={len(self._states)}", f"exits={len(self._exits)}"]
        if self._timeout is not None:
            parts.append(f"timeout={self._timeout}")
        if self._table is not None:
            parts.append("frozen")
        return f"<{' '.join(parts)}>"

    def validate(self) -> None:
        """Check the whole definition and freeze it.

        Found, all at once: no states; no exit states; states with the same label; targets and joins that are neither
        registered nor exit states; joins that cannot be reached by their branches; a SplitResult asked for where no split
        joins, or an error where no ``on_error`` leads; and, from the annotations (``Literal[S.A, S.B]``), states that cannot
        be reached from the one registered first and states without a way to an exit. A task without such an annotation may
        return any state.

        Raises:
            ConfigurationError: The definition has problems; its ``problems`` lists every one.
        """
        self._frozen()

    def validate_initial_state(self, state: S) -> None:
        """Check that a run can start in this state: it is registered or an exit state.

        Raises:
            ConfigurationError: It is neither, or the definition has problems.
        """
        self._frozen().check_initial(state)

    def _frozen(self) -> _core.Table:
        if self._table is None:
            exits = self._exits
            entries: list[tuple[Any, str, _Work | None, JoinConfig[S] | None, Keys[S]]] = [
                (state, _label(state), None, None, ()) if state in exits else (state, _label(state), work, join, keys)
                for state, (work, join, keys) in self._states.items()
            ]
            entries += [(state, _label(state), None, None, ()) for state in exits if state not in self._states]
            shims = _SHIMS
            if self._data is not None:
                shims = (partial(_prepared_for, self._data, prepare_branches), *_SHIMS[1:])
            self._table = _core.Table(f"workflow {self._name}", entries, shims, self._compensation_timeout)
        return self._table

    # --- running -----------------------------------------------------------------------------------------------------

    async def orchestrate(
        self,
        initial_state: S,
        *,
        resources: Resources | Mapping[Any, Any] | None = None,
        workflow_id: str | None = None,
        timeout: Seconds | None = None,
        data: object = None,
    ) -> S:
        """Run from a state until an exit state is reached, and return that state.

        Args:
            initial_state: A registered state, or an exit state (which is returned at once).
            resources: Used instead of the workflow's for this run; None takes the workflow's.
            workflow_id: Used instead of the workflow's for this run; None takes the workflow's.
            timeout: Seconds this run may take, instead of the workflow's; None takes the workflow's.
            data: The run's own variables, where `with_data` says so: an instance of that class.

        Raises:
            ConfigurationError: The definition has problems, or an argument is refused; no user code has run.
            WorkflowTimeoutError: The run took longer than its timeout.
            JoinError: A split did not reach its strategy.
            RetryExhaustedError: A task failed in its last attempt.
            InvalidTransitionError: A task returned something that is no state, or one it did not declare.
            UnknownStateError: A task returned a state that is neither registered nor an exit state.
            Exception: Whatever a task raised, the same object, with a note and the attribute ``__cano__``.

            CompensationFailedError: The run failed, and not all of its compensatable steps could be undone.

        Cancellation: the task in flight and every branch are cancelled and awaited, the compensatable steps that are done are
        undone, resources are torn down, then `asyncio.CancelledError` goes on.
        """
        used = self._resources if resources is None else _as_resources(resources)
        run = _core.Run(
            self._table or self._frozen(),
            initial_state,
            used,
            self._workflow_id if workflow_id is None else _checked_id(workflow_id),
            self._timeout if timeout is None else _core.seconds("timeout", timeout),
            None if self._data is None and data is None else self._checked_data(data),
            None if self._store is None else self._new_log(workflow_id, data),
        )
        if self._store is not None:
            return await self._begin(run, used)
        if used._lifecycle:
            return await _with_resources(run, used)  # type: ignore[no-any-return]
        return await run  # type: ignore[no-any-return]

    def start(
        self,
        initial_state: S,
        *,
        resources: Resources | Mapping[Any, Any] | None = None,
        workflow_id: str | None = None,
        timeout: Seconds | None = None,
        data: object = None,
    ) -> Run[S]:
        """Start a run in a task of its own, and return its handle; the arguments are those of `orchestrate`.

        Raises:
            ConfigurationError: As `orchestrate`, but at once.
            WorkflowError: No event loop is running.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WorkflowError(
                "start() needs a running event loop; use asyncio.run(workflow.orchestrate(...)) outside one"
            ) from None
        used = self._resources if resources is None else _as_resources(resources)
        run = _core.Run(
            self._table or self._frozen(),
            initial_state,
            used,
            self._workflow_id if workflow_id is None else _checked_id(workflow_id),
            self._timeout if timeout is None else _core.seconds("timeout", timeout),
            None if self._data is None and data is None else self._checked_data(data),
            None if self._store is None else self._new_log(workflow_id, data),
        )
        if self._store is not None:
            body = self._begin(run, used)
        else:
            body = _with_resources(run, used) if used._lifecycle else _drive(run)
        task: asyncio.Task[S] = loop.create_task(body, name=self._name)
        tasks = _tasks_of(loop)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return Run(run, task)

    # --- durable runs ------------------------------------------------------------------------------------------------

    async def resume_from(
        self,
        workflow_id: str,
        *,
        resources: Resources | Mapping[Any, Any] | None = None,
        timeout: Seconds | None = None,
    ) -> S:
        """Go on with a run where its rows say it is, and return the exit state that it reaches.

        The state that was entered last is entered again, with its visit's cursor and due time, and with the same
        `RunContext.idempotency_key`; what came before is done. Where that state's task takes a SplitResult or a Caught error,
        which only the step before can give, the step before is done again.

        Args:
            workflow_id: The id under which the run was begun.
            resources: As for `orchestrate`.
            timeout: As for `orchestrate`; the budget begins anew.

        Raises:
            RunNotFoundError: The store has no such run.
            RunClaimedError: Somebody else goes on with it; no user code has run, and nothing was written.
            WorkflowVersionError: It was begun by another version, or by another definition of the same version.
            UnknownStateError: It is in a state that the workflow does not have.
            NeedsAttentionError: It is parked, or is now, since it was begun too often (`with_recovery_limit`).
            RunConflictError: It has been rolled back.
            CorruptRowError: A row is damaged or missing.
            Exception: What `orchestrate` raises.

        Cancellation: as for `orchestrate`; the run can be resumed again.
        """
        if self._store is None:
            raise ConfigurationError(f"workflow {self._name} has no checkpoint store: call with_checkpoint_store()")
        return await self._resume(workflow_id, self._store, resources, timeout)

    async def discard(self, workflow_id: str) -> None:
        """Forget a run that nobody goes on with, as if it had never been; nothing is undone.

        Raises:
            RunClaimedError: Somebody goes on with it.
            ConfigurationError: The workflow has no checkpoint store, or the id is refused.
        """
        if self._store is None:
            raise ConfigurationError(f"workflow {self._name} has no checkpoint store: call with_checkpoint_store()")
        await settled(self._store.clear(self._required_id(workflow_id)))

    async def _resume(
        self,
        workflow_id: str,
        store: Any,
        resources: Resources | Mapping[Any, Any] | None = None,
        timeout: Seconds | None = None,
    ) -> S:
        used = self._resources if resources is None else _as_resources(resources)
        limit = self._timeout if timeout is None else _core.seconds("timeout", timeout)
        table = self._table or self._frozen()
        checked = self._required_id(workflow_id)

        def launch(state: S, log: _core.Log, resumed: _core.Resumed, data: object) -> Awaitable[S]:
            run = _core.Run(table, state, used, checked, limit, data, log, resumed)
            return _with_resources(run, used) if used._lifecycle else _drive(run)

        return await resume(self._definition(), Ownership(store, checked), table, launch)

    async def _begin(self, run: _core.Run, used: Resources) -> S:
        log = run.log
        assert log is not None  # noqa: S101 - the caller made the run with one
        body = partial(_with_resources, run, used) if used._lifecycle else partial(_drive, run)
        return await begin(self._definition(), Ownership(self._store, run.id), log, body)

    def _new_log(self, workflow_id: str | None, data: object) -> _core.Log:
        checked = self._required_id(self._workflow_id if workflow_id is None else workflow_id)
        return self._definition().log(Ownership(self._store, checked), data)

    def _checked_data(self, data: object) -> object:
        if self._data is None:
            raise ConfigurationError(f"workflow {self._name} has no run data: with_data() gives it a class")
        if not isinstance(data, self._data):
            raise ConfigurationError(f"data must be an instance of {self._data.__qualname__}, got {show(data)}")
        return data

    def _required_id(self, workflow_id: str | None) -> str:
        checked = _checked_id(workflow_id)
        if checked is None:
            raise ConfigurationError(
                f"a run of workflow {self._name} is durable and needs a workflow_id, under which it can be resumed"
            )
        return checked

    def _definition(self) -> Definition:
        if self._known is None:
            self._frozen()
            cursors: dict[str, tuple[str, Any]] = {}
            outputs: dict[str, tuple[str, Any]] = {}
            parts: list[str] = []
            for state, (work, _, _) in self._states.items():
                parts.append(f"{_label(state)}: {_described(work)}")
                if isinstance(work, _core.TaskSpec):
                    parts[-1] += f", {work.model}, {work.cursor}, {work.output}"
                    if work.cursor is not None:
                        cursors[_label(state)] = (work.name, work.cursor)
                    if work.output is not None:
                        outputs[_label(state)] = (work.name, work.output)
            digest = fingerprint((self._name, sorted(parts), sorted(map(_label, self._exits)), str(self._data)))
            self._known = Definition(
                self._name,
                self._version,
                digest,
                self._codec,
                cursors,
                outputs,
                self._data,
                self._migrate,
                self._recovery_limit,
            )
        return self._known


def _prepared_for(data: type[Any], prepare: Callable[..., T], *given: Any) -> T:
    """What the driver runs, of tasks that may ask for run data of this class."""
    token = run_data.set(data)
    try:
        return prepare(*given)
    finally:
        run_data.reset(token)


# asyncio itself keeps only weak references to tasks.
_running: dict[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]] = {}


def _tasks_of(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """The started runs of a loop; those that a closed loop left behind are let go."""
    if loop not in _running:
        for closed in [other for other in _running if other.is_closed()]:
            del _running[closed]
        _running[loop] = set()
    return _running[loop]


class Run(Generic[S]):
    """The handle of a run that was started with `Workflow.start`.

    Awaiting it returns the exit state, or raises what `Workflow.orchestrate` raises; it may be awaited any number of
    times. As with a task, cancelling whoever awaits it cancels the run; ``asyncio.shield(run)`` prevents that.
    """

    __slots__ = ("__weakref__", "_cancelled", "_failed", "_reason", "_run", "_task")

    def __init__(self, run: _core.Run, task: asyncio.Task[S]) -> None:
        self._run = run
        self._task = task
        self._cancelled = False
        self._reason: str | None = None
        self._failed: CompensationFailedError | None = None

    @property
    def id(self) -> str:
        """The workflow id that was given, else a random id."""
        return self._run.id

    @property
    def state(self) -> S:
        """The state the run is in; after the end, the last one it was in."""
        return self._run.state  # type: ignore[no-any-return]

    @property
    def path(self) -> list[S]:
        """The states entered so far, oldest first; at most the newest 256."""
        return list(self._run.path)

    def done(self) -> bool:
        """Whether the run is over, all of its clean-up included."""
        return self._task.done()

    def cancel(self, reason: str | None = None) -> bool:
        """Ask the run to end; whoever awaits it gets `WorkflowCancelledError` once everything of it has ended.

        Args:
            reason: Kept in the error's ``reason``; None for none. The first reason given counts.

        Returns:
            False if the run was over already.

        Raises:
            ConfigurationError: `reason` is not a text.
        """
        if reason is not None and not isinstance(reason, str):
            raise ConfigurationError(f"reason must be a text or None, got {show(reason)}")
        if not self._task.cancel(reason):
            return False
        if not self._cancelled:
            self._cancelled, self._reason = True, reason
        return True

    def __await__(self) -> Generator[Any, None, S]:
        host = asyncio.current_task()
        # A cancel of the awaiter that is still to be delivered is not one that it has lived through.
        before = 0 if host is None else host.cancelling() - getattr(host, "_must_cancel", False)
        try:
            return (yield from self._task.__await__())
        except asyncio.CancelledError as cancelled:
            awaiter_is_cancelled = host is not None and host.cancelling() > before
            if not self._cancelled or awaiter_is_cancelled or not self._task.cancelled():
                raise
            if isinstance(cancelled.__cause__, CompensationFailedError):  # told to the first one who awaits
                self._failed = cancelled.__cause__
            if self._failed is not None:
                raise self._failed from None
            raise self._cancelled_error() from cancelled
        finally:
            del self, host  # an exception's traceback holds this frame, which must not hold the task that holds it

    def _cancelled_error(self) -> WorkflowCancelledError:
        text = "the run was cancelled" + (f": {show(self._reason)}" if self._reason else "")
        error = WorkflowCancelledError(text, self._reason)
        self._run.annotate(error)
        return error

    def __repr__(self) -> str:
        return f"<Run state={label(self.state)}{' done' if self.done() else ''}>"


async def _with_resources(run: _core.Run, resources: Resources) -> Any:
    """A run around which its resources are set up and torn down."""
    await _set_up(run, resources)
    try:
        return await run
    finally:
        await resources._release()


async def _set_up(run: _core.Run, resources: Resources) -> None:
    """Set the resources up within the budget of the run."""
    deadline = run.deadline
    if deadline is None:
        await resources._acquire()
        return
    # A scope takes a cancel that is pending when it is entered for its own (gh-134471): it is delivered before.
    if getattr(asyncio.current_task(), "_must_cancel", False):
        await asyncio.sleep(0)
    if asyncio.get_running_loop().time() >= deadline:
        raise run.timed_out()
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope:
            await resources._acquire(scope)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise run.timed_out() from error


def _as_resources(given: Any) -> Resources:
    if given is None:
        return Resources()
    if isinstance(given, Resources):
        return given
    if isinstance(given, Mapping):
        return Resources(given)
    raise ConfigurationError(f"resources must be Resources or a mapping, got {show(given)}")


def _check_state(state: Any) -> None:
    if isinstance(state, type) and issubclass(state, Enum):
        raise ConfigurationError(f"{state.__qualname__} is the Enum class; a state is one of its members")
    try:
        hash(state)
    except TypeError:
        raise ConfigurationError(f"a state must be hashable, got {show(state)} ({type(state).__qualname__})") from None


def _label(state: Any) -> str:
    text = label(state)
    check_text("the name of a state", text, LABEL_LIMIT)
    return text


def _described(work: _Work) -> str:
    if isinstance(work, _core.TaskSpec):
        return f"task {work.name}"
    return "a split made at run time" if isinstance(work, _core.Factory) else f"a split of {len(work)} branches"


def _number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ConfigurationError(f"{name} must be an int from {least} to {most}, got {show(value)}")
    return value


def _checked_id(workflow_id: Any) -> str | None:
    if workflow_id is None:
        return None
    if not isinstance(workflow_id, str):
        raise ConfigurationError(f"workflow_id must be a text, got {show(workflow_id)}")
    if not workflow_id.strip():
        raise ConfigurationError(f"workflow_id must not be blank, got {show(workflow_id)}")
    check_text("workflow_id", workflow_id, _ID_LIMIT)
    return workflow_id
