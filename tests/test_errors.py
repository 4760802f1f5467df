"""Errors: the tree, notes and `__cano__`, identity of what tasks raise, panics of native extensions, pickling."""

import asyncio
import concurrent.futures
import copy
import enum
import inspect
import pickle
import traceback

import pytest
from hypothesis import given, settings, strategies as st

import cano
from cano import (
    AttemptTimeoutError,
    BranchOutcome,
    CanoError,
    CheckpointError,
    CircuitOpenError,
    CompensationFailedError,
    CompensationTimeoutError,
    ConfigurationError,
    CorruptRowError,
    DuplicateResourceError,
    ErrorContext,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    KeyNotFoundError,
    NeedsAttentionError,
    NonRetryable,
    Orphan,
    OrphanedStepError,
    OutputNotSerializableError,
    OutputTooLargeError,
    OutputUnreadableError,
    RateLimitedError,
    Resource,
    ResourceError,
    ResourceNotFoundError,
    ResourceTypeError,
    RetryAfter,
    RetryExhaustedError,
    RunClaimedError,
    RunConflictError,
    RunNotFoundError,
    RunStatus,
    RunTooLargeError,
    SplitResult,
    StoreError,
    StoreFailedError,
    StoreOpenError,
    StoreTypeError,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    UnknownStateError,
    UnknownTierError,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    WorkflowVersionError,
    _errors,
    in_thread,
    testing,
)


class S(enum.Enum):
    START = 1
    CHARGE = 2
    DONE = 3


def to(state):
    def go():
        return state

    return go


def raises(error):
    """A task that raises this object."""

    def charge():
        raise error

    return charge


def simple(task, **options):
    """START goes to CHARGE, which runs the task; DONE ends."""
    workflow = Workflow().register(S.START, to(S.CHARGE)).register(S.CHARGE, task, **options)
    return workflow.add_exit_state(S.DONE)


def failure(workflow, **options):
    """What a run of the workflow raises."""
    with pytest.raises(BaseException) as caught:
        testing.run(workflow.orchestrate(S.START, **options))
    return caught.value


async def cancel_soon(workflow):
    run = workflow.start(S.START)
    await asyncio.sleep(0)
    run.cancel("enough")
    await run


def notes(error):
    return getattr(error, "__notes__", [])


class Oddity(BaseException):
    """Something that only its own raiser should catch."""


# The tree

TREE = [
    (CanoError, (Exception,), "cano"),
    (ConfigurationError, (CanoError, ValueError), "configuration"),
    (UnknownTierError, (ConfigurationError, KeyError), "configuration"),
    (WorkflowError, (CanoError,), "workflow"),
    (InvalidTransitionError, (WorkflowError,), "workflow"),
    (UnknownStateError, (WorkflowError, LookupError), "workflow"),
    (WorkflowTimeoutError, (WorkflowError, TimeoutError), "timeout"),
    (WorkflowCancelledError, (WorkflowError,), "cancelled"),
    (JoinError, (WorkflowError, ExceptionGroup), "workflow"),
    (JoinTimeoutError, (JoinError,), "timeout"),
    (TaskExecutionError, (CanoError,), "task"),
    (RetryAfter, (TaskExecutionError,), "task"),
    (NonRetryable, (TaskExecutionError,), "task"),
    (RetryExhaustedError, (CanoError,), "retry"),
    (AttemptTimeoutError, (CanoError, TimeoutError), "timeout"),
    (CircuitOpenError, (CanoError,), "circuit"),
    (RateLimitedError, (CanoError,), "rate"),
    (StoreError, (CanoError,), "store"),
    (KeyNotFoundError, (StoreError, KeyError), "store"),
    (StoreTypeError, (StoreError, TypeError), "store"),
    (ResourceError, (CanoError,), "resource"),
    (ResourceNotFoundError, (ResourceError, KeyError), "resource"),
    (ResourceTypeError, (ResourceError, TypeError), "resource"),
    (DuplicateResourceError, (ResourceError,), "resource"),
    (CheckpointError, (CanoError,), "checkpoint"),
    (RunNotFoundError, (CheckpointError, LookupError), "checkpoint"),
    (RunConflictError, (CheckpointError,), "checkpoint"),
    (RunClaimedError, (CheckpointError,), "checkpoint"),
    (RunTooLargeError, (CheckpointError,), "checkpoint"),
    (CorruptRowError, (CheckpointError,), "checkpoint"),
    (WorkflowVersionError, (CheckpointError,), "checkpoint"),
    (NeedsAttentionError, (CheckpointError,), "checkpoint"),
    (StoreFailedError, (CheckpointError,), "checkpoint"),
    (StoreOpenError, (CheckpointError,), "checkpoint"),
    (OutputNotSerializableError, (CanoError,), "output"),
    (OutputTooLargeError, (CanoError,), "output"),
    (OutputUnreadableError, (CanoError,), "output"),
    (CompensationFailedError, (CanoError, ExceptionGroup), "compensation"),
    (OrphanedStepError, (CanoError,), "compensation"),
    (CompensationTimeoutError, (CanoError, TimeoutError), "compensation"),
]
PUBLIC_ERRORS = [kind for kind, _, _ in TREE]
GROUPS = (JoinError, JoinTimeoutError, CompensationFailedError)
PLAIN_ERRORS = [kind for kind in PUBLIC_ERRORS if kind not in (*GROUPS, RetryAfter)]


def names(kinds):
    return [kind.__name__ for kind in kinds]


@pytest.mark.parametrize(("kind", "bases", "category"), TREE, ids=names(PUBLIC_ERRORS))
def test_tree(kind, bases, category):
    """Each error has its place under CanoError, the built-in base that callers may already catch, and a category."""
    # ER-001
    assert kind.__bases__ == bases
    assert kind.category == category


def test_tree_is_complete():
    """Every public exception is in the table above, and is named in the tree of the module's docstring."""
    public = {
        name for name in cano.__all__ if inspect.isclass(kind := getattr(cano, name)) and issubclass(kind, Exception)
    }

    assert public == set(names(PUBLIC_ERRORS))
    assert all(name in _errors.__doc__ for name in public)


@pytest.mark.parametrize("kind", PUBLIC_ERRORS, ids=names(PUBLIC_ERRORS))
def test_public_home(kind):
    """Tracebacks call an error by its public name."""
    assert (kind.__module__, getattr(cano, kind.__name__)) == ("cano", kind)


@pytest.mark.parametrize("kind", PLAIN_ERRORS, ids=names(PLAIN_ERRORS))
def test_text_is_the_message(kind):
    """The text of an error is its message, also where a built-in base (KeyError) would quote it."""
    assert str(kind("no 'value' here")) == "no 'value' here"


@pytest.mark.parametrize("kind", PLAIN_ERRORS, ids=names(PLAIN_ERRORS))
def test_outside_a_run(kind):
    """An error that no run has seen has no state, task, attempt, path or workflow id."""
    error = kind("no")

    assert (error.state, error.task, error.attempt, error.path, error.workflow_id) == (None,) * 5
    assert error.__cano__ is None


def test_checkpoint_error_knows_its_run():
    """An error about a stored run has the run's id, also where no run has seen it; the context's id else."""
    error, other = CheckpointError("no", "order-1"), CheckpointError("no")
    other.__cano__ = CONTEXT

    assert (error.workflow_id, other.workflow_id) == ("order-1", CONTEXT.workflow_id)


def test_the_two_timeouts_are_apart():
    """The timeout of an attempt and that of a run are different kinds, and both are TimeoutErrors."""

    async def charge():
        await asyncio.sleep(60)

    # ER-008
    attempt = failure(simple(charge, config=TaskConfig().with_attempt_timeout(1)))
    run = failure(simple(charge).with_timeout(1))

    assert (type(attempt), type(run)) == (AttemptTimeoutError, WorkflowTimeoutError)
    assert isinstance(attempt, TimeoutError)
    assert isinstance(run, TimeoutError)
    assert not isinstance(run, AttemptTimeoutError)


def test_configuration_error_of_one_problem():
    """One problem is in the first line, several are one line each; `problems` has them all."""
    one, two = ConfigurationError.of("workflow w", ["a"]), ConfigurationError.of("workflow w", ["a", "b"])

    assert (str(one), one.problems) == ("workflow w: a", ("a",))
    assert (str(two), two.problems) == ("workflow w has 2 problems:\n  - a\n  - b", ("a", "b"))


def test_configuration_error_without_a_list():
    """The message of a single refusal is its only problem."""
    assert ConfigurationError("n must be 1, got 2").problems == ("n must be 1, got 2",)


def test_errors_are_equal_to_themselves_only():
    """Two errors with the same content are two errors, as everywhere in Python."""
    # ER-006
    assert WorkflowError("no") != WorkflowError("no")


# Messages


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param("x" * 200, "'" + "x" * 76 + "...", id="long text"),
        pytest.param("a\nb\x1b[31m\x00", r"'a\nb\x1b[31m\x00'", id="control characters"),
        pytest.param("\ud800", r"'\ud800'", id="lone surrogate"),
        pytest.param("\u202e", r"'\u202e'", id="direction override"),
        pytest.param(list(range(1000)), str(list(range(1000)))[:77] + "...", id="long repr"),
    ],
)
def test_values_in_messages(value, shown):
    """A value stands in a message with at most 80 characters, all of them printable."""
    with pytest.raises(ConfigurationError) as caught:
        Workflow(resources=value)

    assert str(caught.value) == f"resources must be Resources or a mapping, got {shown}"


@pytest.mark.parametrize(
    "value", ["x" * 10_000, "a\nb\x1b[31m", "\ud800"], ids=["long", "control characters", "surrogate"]
)
@pytest.mark.parametrize("result", [lambda value: value, TaskResult.Single, lambda value: TaskResult.Split([value])])
def test_returned_value_in_a_message(value, result):
    """What a task returned may come from anywhere: in the message it is cut and escaped like any value."""
    workflow = Workflow().register("start", lambda: result(value), join=JoinConfig(JoinStrategy.All, "end"))

    with pytest.raises(UnknownStateError) as caught:
        testing.run(workflow.add_exit_state("end").orchestrate("start"))

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "\u202e"], ids=["newline", "escape", "direction override"])
def test_names_in_notes_are_printable(text):
    """No name of a state or a task brings control characters into a note: it is refused, or escaped."""

    class Charge:
        name = text

        def run(self):
            raise ValueError("no")

    for state, task in ((text, raises(ValueError("no"))), ("start", Charge())):
        with pytest.raises(ValueError) as caught:
            testing.run(Workflow().register(state, task).add_exit_state("end").orchestrate(state))

        assert all(note.isprintable() for note in [str(caught.value), *notes(caught.value)])


# What a task raises


class NeedsArguments(Exception):
    def __init__(self, code, *, detail):
        super().__init__(code)
        self.detail = detail


class Refuses(Exception):
    """Takes no attribute."""

    def __setattr__(self, name, value):
        raise AttributeError(name)


class RefusesNotes(Exception):
    """Takes no note."""

    def add_note(self, note):
        raise RuntimeError("no notes here")


class HasSlots(Exception):
    __slots__ = ("code",)


ERRORS = [
    pytest.param(ValueError("no"), id="ValueError"),
    pytest.param(KeyError("no"), id="KeyError"),
    pytest.param(OSError(2, "no", "file"), id="OSError"),
    pytest.param(TimeoutError("no"), id="TimeoutError"),
    pytest.param(concurrent.futures.CancelledError("no"), id="CancelledError of a thread pool"),
    pytest.param(NeedsArguments(5, detail="x"), id="with arguments of its own"),
    pytest.param(ExceptionGroup("no", [ValueError("a"), ExceptionGroup("b", [KeyError("c")])]), id="ExceptionGroup"),
    pytest.param(HasSlots("no"), id="with slots"),
    pytest.param(Refuses("no"), id="that refuses attributes"),
    pytest.param(RefusesNotes("no"), id="that refuses notes"),
    pytest.param(TaskExecutionError("no"), id="TaskExecutionError"),
    pytest.param(NonRetryable("no"), id="NonRetryable"),
    pytest.param(RetryAfter(3), id="RetryAfter"),
    pytest.param(StopAsyncIteration("no"), id="StopAsyncIteration"),
    pytest.param(RecursionError("no"), id="RecursionError"),
    pytest.param(MemoryError("no"), id="MemoryError"),
]
BASE_ERRORS = [
    pytest.param(Oddity("no"), id="BaseException"),
    pytest.param(BaseExceptionGroup("no", [Oddity("a")]), id="BaseExceptionGroup"),
    pytest.param(KeyboardInterrupt("no"), id="KeyboardInterrupt"),
    pytest.param(SystemExit(3), id="SystemExit"),
    pytest.param(GeneratorExit("no"), id="GeneratorExit"),
]


@pytest.mark.parametrize("kind", ["plain", "async", "suspended", "in_thread"])
@pytest.mark.parametrize("error", [*ERRORS, *BASE_ERRORS])
def test_identity(error, kind):
    """What a task raises leaves the run as the same object, whatever it is, and however the task is written."""

    def plain():
        raise error

    async def asynchronous():
        raise error

    async def suspended():
        await asyncio.sleep(0)
        raise error

    tasks = {"plain": plain, "async": asynchronous, "suspended": suspended, "in_thread": in_thread(plain)}

    # ER-002, ER-007, PAN-003
    assert failure(simple(tasks[kind])) is error


@pytest.mark.parametrize("error", BASE_ERRORS)
def test_base_exceptions_are_not_retried(error):
    """A BaseException ends the run in the first attempt, whatever is configured."""
    calls = []

    def charge():
        calls.append(1)
        raise error

    config = TaskConfig(retry_on=lambda _: True).with_fixed_retry(5, 0)

    assert failure(simple(charge, config=config)) is error
    assert calls == [1]


def test_cancelled_error_of_a_task_passes():
    """A CancelledError that a task raises by itself goes through like any cancellation."""
    error = failure(simple(raises(asyncio.CancelledError("own"))))

    assert type(error) is asyncio.CancelledError


def test_traceback():
    """The traceback of a task's exception ends in the task, with one frame of cano's between it and the caller's."""

    def deeper():
        raise ValueError("no")

    async def charge():
        deeper()

    error = failure(simple(charge))

    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert frames[-3:] == ["orchestrate", "charge", "deeper"]


def test_cause_and_context_stay():
    """A run adds no cause and no context to what a task raises."""
    cause = KeyError("why")

    def charge():
        try:
            raise OSError("while")
        except OSError:
            raise ValueError("no") from cause

    error = failure(simple(charge))

    assert error.__cause__ is cause
    assert isinstance(error.__context__, OSError)
    assert failure(simple(raises(ValueError("alone")))).__context__ is None


# Notes and __cano__


def test_note():
    """The note tells state, task, attempt and path."""

    class Charge:
        name = "charge"

        def run(self):
            raise ValueError("no")

    # FSM-007, FSM-008
    assert notes(failure(simple(Charge()))) == ["state=CHARGE task=charge attempt=1/1 path=START>CHARGE"]


def test_note_with_a_workflow_id():
    """The note begins with the workflow id where there is one."""
    error = failure(simple(raises(ValueError("no"))), workflow_id="order-1")

    (note,) = notes(error)
    assert note.startswith("workflow_id='order-1' state=CHARGE task=")


def test_note_of_an_exhausted_task():
    """Each attempt counts in the note of the last failure and of what is raised because of it."""

    def charge():
        raise ValueError("no")

    # ER-003, ER-005, FSM-011
    error = failure(simple(charge, config=TaskConfig().with_fixed_retry(2, 0)))

    name = "test_note_of_an_exhausted_task.<locals>.charge"
    assert type(error) is RetryExhaustedError
    assert str(error) == f"task {name} failed in each of its 3 attempts: ValueError"
    assert notes(error) == notes(error.__cause__) == [f"state=CHARGE task={name} attempt=3/3 path=START>CHARGE"]
    assert (error.attempts, error.attempt, str(error.__cause__)) == (3, 3, "no")


def test_note_of_a_branch():
    """The exception of a branch names its task and index; the JoinError names the split."""

    def charge():
        raise ValueError("no")

    workflow = Workflow().register_split(S.START, [to(1), charge], JoinConfig(JoinStrategy.All, S.DONE))
    error = failure(workflow.add_exit_state(S.DONE))

    (member,) = error.exceptions
    assert notes(error) == ["state=START attempt=1/1 path=START"]
    assert notes(member) == ["state=START task=test_note_of_a_branch.<locals>.charge branch=1 attempt=1/1 path=START"]
    assert (member.__cano__.branch, error.__cano__.branch) == (1, None)


def test_note_of_a_long_path():
    """The note shows the newest 16 states and counts the others."""
    workflow = Workflow().add_exit_state("end")
    for n in range(20):
        workflow.register(f"s{n}", to(f"s{n + 1}"))
    workflow.register("s20", raises(ValueError("no")))

    with pytest.raises(ValueError, match="no") as caught:
        testing.run(workflow.orchestrate("s0"))

    (note,) = notes(caught.value)
    assert note.endswith(" path=(5 more)>" + ">".join(f"s{n}" for n in range(5, 21)))


def test_note_is_one_of_several():
    """Notes that were there stay, before ours."""
    error = ValueError("no")
    error.add_note("mine")

    failure(simple(raises(error)))

    assert [note.split()[0] for note in notes(error)] == ["mine", "state=CHARGE"]


def test_context_has_the_facts_of_the_note():
    """`__cano__` holds the same as attributes, on any exception."""
    error = failure(
        simple(raises(KeyError("no")), config=TaskConfig().with_fixed_retry(3, 0)).with_workflow_id("order-1")
    )

    context = error.__cause__.__cano__
    assert context == ErrorContext(
        state=S.CHARGE,
        task="raises.<locals>.charge",
        attempt=4,
        max_attempts=4,
        path=(S.START, S.CHARGE),
        entered=2,
        workflow_id="order-1",
        branch=None,
        sequence=context.sequence,
    )
    assert str(context) == notes(error.__cause__)[0]


def test_attributes_of_our_own_errors():
    """Our own errors also have the facts as attributes of their own."""
    error = failure(simple(raises(TaskExecutionError("no"))), workflow_id="order-1")

    facts = (error.state, error.task, error.attempt, error.path, error.workflow_id)
    assert facts == (S.CHARGE, "raises.<locals>.charge", 1, (S.START, S.CHARGE), "order-1")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda workflow: workflow.orchestrate(S.START, timeout=1), id="timeout"),
        pytest.param(cancel_soon, id="cancelled"),
    ],
)
def test_attempt_is_0_when_none_has_finished(end):
    """A timeout of the run and a cancel through its handle interrupt an attempt: none had finished."""

    async def charge():
        await asyncio.sleep(60)

    # FSM-012, FSM-013
    with pytest.raises(WorkflowError) as caught:
        testing.run(end(simple(charge)))

    assert (caught.value.state, caught.value.attempt) == (S.CHARGE, 0)


def test_cancelled_error_has_its_reason():
    """The reason given to `cancel` is in the text and an attribute; the CancelledError is the cause."""

    async def charge():
        await asyncio.sleep(60)

    with pytest.raises(WorkflowCancelledError) as caught:
        testing.run(cancel_soon(simple(charge)))

    assert (str(caught.value), caught.value.reason) == ("the run was cancelled: 'enough'", "enough")
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.parametrize("error", [Refuses("no"), RefusesNotes("no")], ids=["attributes", "notes"])
def test_exception_that_cannot_be_annotated(error):
    """An exception that takes no note or attribute leaves the run as it was."""
    failure(simple(raises(error)))

    assert notes(error) == []
    assert getattr(error, "__cano__", None) is None


# Exceptions that are raised again

SINGLETON = ValueError("always the same")


def test_singleton_has_the_note_of_its_latest_run():
    """An exception object that several runs raise carries one note, that of the latest."""
    for workflow_id in ("one", "two", "three"):
        error = failure(simple(raises(SINGLETON)), workflow_id=workflow_id)

        assert error is SINGLETON
        assert error.__cano__.workflow_id == workflow_id
        assert [note.split()[0] for note in notes(error)] == [f"workflow_id='{workflow_id}'"]


def test_singleton_of_our_own():
    """The same holds for an error of cano's own kinds."""
    error = TaskExecutionError("always the same")

    for state in ("a", "b"):
        workflow = Workflow().register(state, raises(error)).add_exit_state("end")
        with pytest.raises(TaskExecutionError):
            testing.run(workflow.orchestrate(state))
        assert (error.state, len(notes(error))) == (state, 1)


def test_singleton_keeps_the_notes_of_others():
    """Only the note of the earlier run is replaced."""
    error = ValueError("always the same")

    failure(simple(raises(error)))
    error.add_note("mine")
    failure(simple(raises(error)))

    assert [note.split()[0] for note in notes(error)] == ["mine", "state=CHARGE"]


def test_singleton_in_two_branches():
    """Two branches that raise the same object both have it as their outcome; the note is of the first."""
    error = ValueError("always the same")
    workflow = Workflow().register_split(S.START, [raises(error)] * 2, JoinConfig(JoinStrategy.All, S.DONE))

    group = failure(workflow.add_exit_state(S.DONE))

    assert group.exceptions == (error, error)
    assert (len(notes(error)), error.__cano__.branch) == (1, 0)


def nest(workflow, name):
    """A workflow whose only task runs another one."""

    async def task():
        return await workflow.orchestrate(S.START)

    task.__qualname__ = name
    return Workflow(name=name).register(S.START, task).add_exit_state(S.DONE)


@pytest.mark.parametrize("depth", [1, 3])
def test_nested_run_keeps_the_innermost_context(depth):
    """Through any number of nested runs, the note and context are those of the run that failed first."""
    workflow = simple(raises(ValueError("no")))
    for level in range(depth):
        workflow = nest(workflow, f"outer{level}")

    # FSM-014
    error = failure(workflow)

    assert notes(error) == ["state=CHARGE task=raises.<locals>.charge attempt=1/1 path=START>CHARGE"]
    assert error.__cano__.state is S.CHARGE


def test_error_of_a_nested_run_that_is_raised_from():
    """What the outer task raises because of the inner failure has the outer context, and the inner one stays."""
    inner = simple(raises(ValueError("no")))

    async def outer():
        try:
            return await inner.orchestrate(S.START)
        except ValueError as error:
            raise KeyError("outer") from error

    error = failure(Workflow().register(S.START, outer).add_exit_state(S.DONE))

    assert error.__cano__.path == (S.START,)
    assert error.__cause__.__cano__.path == (S.START, S.CHARGE)


def test_handled_failure_leaves_no_trace_in_later_ones():
    """A run that handled an inner failure and fails later tells where it failed itself."""
    inner = simple(raises(SINGLETON))

    async def start():
        with pytest.raises(ValueError, match="always"):
            await inner.orchestrate(S.START)
        return "later"

    workflow = Workflow().register("start", start).register("later", raises(KeyError("no"))).add_exit_state("end")

    with pytest.raises(KeyError) as caught:
        testing.run(workflow.orchestrate("start"))

    assert caught.value.__cano__.path == ("start", "later")


# Panics of native extensions

PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


class Panics:
    """A task that panics, with retries that it must not get."""

    name = "native"
    config = TaskConfig(retry_on=lambda _: True).with_fixed_retry(5, 0)

    def __init__(self, payload="index out of bounds: 7"):
        self.payload = payload
        self.calls = 0

    async def run(self):
        self.calls += 1
        raise PanicException(self.payload)


def test_panic():
    """A panic becomes a TaskExecutionError with its message; the panic is the cause."""
    # PAN-001
    error = failure(simple(Panics()))

    assert type(error) is TaskExecutionError
    assert str(error) == "panic: index out of bounds: 7"
    assert type(error.__cause__) is PanicException
    assert notes(error) == ["state=CHARGE task=native attempt=1/6 path=START>CHARGE"]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        pytest.param(
            "called `Option::unwrap()` on a `None` value", "called `Option::unwrap()` on a `None` value", id="text"
        ),
        pytest.param("", "", id="empty"),
        pytest.param(5, "5", id="number"),
        pytest.param(("a", 1), "('a', 1)", id="tuple"),
    ],
)
def test_panic_message(payload, text):
    """The message of a panic is kept as it is; what is no text is shown."""
    # PAN-002
    assert str(failure(simple(Panics(payload)))) == f"panic: {text}"


def test_panic_is_not_retried():
    """A panic fails in the first attempt, whatever is configured."""
    task = Panics()

    # PAN-004
    failure(simple(task))

    assert task.calls == 1


@pytest.mark.parametrize("config", [None, TaskConfig()], ids=["with a policy", "plain"])
def test_panic_of_a_branch(config):
    """A panicking branch is a failed branch with its index; the others are unaffected."""
    ran = []
    task = Panics()
    task.config = config or task.config

    async def sibling():
        await asyncio.sleep(1)
        ran.append(1)

    workflow = Workflow().register_split(S.START, [sibling, task, sibling], JoinConfig(JoinStrategy.All, S.DONE))

    # PAN-005
    error = failure(workflow.add_exit_state(S.DONE))

    (member,) = error.exceptions
    assert (type(member), str(member), member.__cano__.branch) == (
        TaskExecutionError,
        "panic: index out of bounds: 7",
        1,
    )
    assert ran == [1, 1]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(raises(PanicException("x")), id="plain function"),
        pytest.param(in_thread(raises(PanicException("x"))), id="in_thread"),
    ],
)
def test_panic_of_any_form(task):
    """However the task is written, its panic is an error."""
    assert str(failure(simple(task))) == "panic: x"


def test_panic_of_a_split_function():
    """A panic while the branches of a split are made is an error as well."""
    workflow = Workflow().register_split(S.START, raises(PanicException("x")), JoinConfig(JoinStrategy.All, S.DONE))

    error = failure(workflow.add_exit_state(S.DONE))

    assert (str(error), error.state) == ("panic: x", S.START)


@pytest.mark.parametrize("step", ["setup", "teardown"])
def test_panic_in_a_resource(step):
    """A panic while resources are set up or torn down keeps none of the others from being torn down."""
    events = []

    class Part(Resource):
        def __init__(self, name, *, panics):
            self.name = name
            self.panics = panics

        async def setup(self):
            if self.panics == "setup":
                raise PanicException("x")
            events.append(f"+{self.name}")

        async def teardown(self):
            events.append(f"-{self.name}")
            if self.panics == "teardown":
                raise PanicException("x")

    parts = {"a": Part("a", panics=None), "b": Part("b", panics=step), "c": Part("c", panics=None)}
    workflow = Workflow(parts).register(S.START, to(S.DONE)).add_exit_state(S.DONE)

    # PAN-013, B36
    with pytest.raises(BaseException) as caught:
        testing.run(workflow.orchestrate(S.START))

    assert "x" in str(caught.value)
    assert events == (["+a", "-a"] if step == "setup" else ["+a", "+b", "+c", "-c", "-b", "-a"])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(type("PanicException", (BaseException,), {"__module__": "elsewhere"}), id="of another module"),
        pytest.param(type("Panic", (BaseException,), {"__module__": "pyo3_runtime"}), id="of another name"),
    ],
)
def test_other_base_exceptions_are_no_panics(kind):
    """Only PyO3's own class is taken for a panic."""
    error = kind("x")

    assert failure(simple(raises(error))) is error


# Pickling


CONTEXT = ErrorContext(
    state=S.CHARGE,
    task="charge",
    attempt=2,
    max_attempts=3,
    path=(S.START, S.CHARGE),
    entered=2,
    workflow_id="order-1",
    branch=1,
    sequence=7,
)
RESULT = SplitResult([BranchOutcome(0, "a", value=1, elapsed=0.5), BranchOutcome(1, "b", error=ValueError("no"))], [2])


ORPHANS = (Orphan(S.CHARGE, "charge", 1, {"id": 7}, ValueError("no")),)


def made(kind, message):
    """An error of this kind with all of its facts."""
    if kind in GROUPS:
        return kind(message, [ValueError("no"), KeyError("k")], ORPHANS if kind is CompensationFailedError else RESULT)
    if kind is RetryAfter:
        return kind(2.5, message)
    facts = {
        ConfigurationError: (["a", "b"],),
        WorkflowTimeoutError: (3.5, 3.0),
        WorkflowCancelledError: ("enough",),
        RetryExhaustedError: (4,),
        AttemptTimeoutError: (1.5,),
        CircuitOpenError: ("payments", 12.5),
        RateLimitedError: ("calls", 0.1),
        CheckpointError: ("order-1", 3),
        RunNotFoundError: ("order-1",),
        RunConflictError: ("order-1", 3, RunStatus.Stopped, True),
        RunClaimedError: ("order-1", None, "worker-2", 1_764_000_000_000),
        CorruptRowError: ("order-1", 3),
        WorkflowVersionError: ("order-1", 1, 2),
        StoreFailedError: (None, None, "disk-full"),
        StoreOpenError: ("symlink",),
        OutputTooLargeError: (11, 10),
        CompensationTimeoutError: (2.5,),
    }
    return kind(message, *facts.get(kind, ()))


def facts_of(error):
    facts = {name: value for name, value in vars(error).items() if name not in ("result", "orphans", "__notes__")}
    facts["orphans"] = repr(getattr(error, "orphans", ()))
    members = [repr(member) for member in getattr(error, "exceptions", ())]
    result = getattr(error, "result", None)
    return type(error), str(error), error.args[:1], notes(error), facts, members, result and repr(result)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", PUBLIC_ERRORS, ids=names(PUBLIC_ERRORS))
def test_pickle(kind, protocol):
    """Every error survives pickling with its message, facts, note and context."""
    error = made(kind, "no")
    error.__cano__ = CONTEXT
    error.add_note(str(CONTEXT))

    back = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own

    assert facts_of(back) == facts_of(error)
    assert back.__cano__ == CONTEXT


@settings(deadline=None, max_examples=200)
@given(
    kind=st.sampled_from(PUBLIC_ERRORS),
    message=st.text(),
    path=st.lists(st.sampled_from(S), max_size=5),
    notes=st.lists(st.text(), max_size=3),
    way=st.sampled_from(["pickle", "copy", "deepcopy"]),
)
def test_copies_of_errors_are_alike(kind, message, path, notes, way):
    """Whatever an error says and carries, pickling and copying give one that says and carries the same."""
    error = made(kind, message)
    error.__cano__ = ErrorContext(S.START, None, 1, 10, tuple(path), len(path), None, None, 1)
    for note in notes:
        error.add_note(note)

    ways = {"pickle": lambda error: pickle.loads(pickle.dumps(error)), "copy": copy.copy, "deepcopy": copy.deepcopy}  # noqa: S301

    assert facts_of(ways[way](error)) == facts_of(error)


@pytest.mark.parametrize(
    "workflow",
    [
        pytest.param(Workflow().register(S.START, to(S.CHARGE)).add_exit_state(S.DONE), id="UnknownStateError"),
        pytest.param(Workflow().register(S.START, to(None)).add_exit_state(S.DONE), id="InvalidTransitionError"),
        pytest.param(simple(raises(ValueError("no"))), id="a task's own"),
        pytest.param(simple(raises(ValueError("no")), config=TaskConfig().with_fixed_retry(1, 0)), id="exhausted"),
        pytest.param(simple(lambda: asyncio.sleep(60)).with_timeout(1), id="timeout"),
        pytest.param(
            Workflow()
            .register_split(S.START, [raises(ValueError("no")), to(1)], JoinConfig(JoinStrategy.All, S.DONE))
            .add_exit_state(S.DONE),
            id="JoinError",
        ),
        pytest.param(
            Workflow()
            .register_split(S.START, [lambda: asyncio.sleep(60)], JoinConfig(JoinStrategy.All, S.DONE, timeout=1))
            .add_exit_state(S.DONE),
            id="JoinTimeoutError",
        ),
    ],
)
def test_pickle_what_a_run_raises(workflow):
    """What a run raises can be sent to another process."""
    error = failure(workflow, workflow_id="order-1")

    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert facts_of(back) == facts_of(error)
    assert back.__cano__ == error.__cano__


# Groups


def test_join_error_is_a_group():
    """`except*` takes a JoinError apart, and each part keeps the kind, the note, the context and the result."""
    error = made(JoinTimeoutError, "no")
    error.__cano__ = CONTEXT
    error.add_note("mine")

    matched, rest = error.split(ValueError)

    for part, kind in ((matched, ValueError), (rest, KeyError)):
        assert type(part) is JoinTimeoutError
        assert [type(member) for member in part.exceptions] == [kind]
        assert (part.result, notes(part)) == (RESULT, ["mine"])


def test_compensation_error_is_a_group():
    """`except*` takes a CompensationFailedError apart, and each part keeps the orphans."""
    error = made(CompensationFailedError, "no")
    error.__cano__ = CONTEXT

    matched, rest = error.split(ValueError)

    for part, kind in ((matched, ValueError), (rest, KeyError)):
        assert type(part) is CompensationFailedError
        assert [type(member) for member in part.exceptions] == [kind]
        assert (part.orphans, part.__cano__) == (ORPHANS, CONTEXT)


def test_join_error_text():
    """The text of a JoinError counts its members, as that of every group does."""
    assert str(made(JoinError, "no")) == "no (2 sub-exceptions)"


# RetryAfter


@pytest.mark.parametrize("delay", [0, 1.5, 3], ids=repr)
def test_retry_after(delay):
    """RetryAfter keeps its delay and says it, unless it is told what to say."""
    assert (RetryAfter(delay).delay, RetryAfter(delay, "busy").delay) == (delay, delay)
    assert str(RetryAfter(delay, "busy")) == "busy"
    assert str(RetryAfter(delay)).startswith(f"retry after {delay}")
