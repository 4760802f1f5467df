"""`Workflow` and `Run`: definition, validation, freezing, the state loop, the handle of a run."""

import asyncio
import enum
import functools
import gc
import inspect
import itertools
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    CanoError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    Resource,
    Resources,
    RunContext,
    SplitResult,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    testing,
)


class S(enum.Enum):
    START = 1
    MIDDLE = 2
    OTHER = 3
    DONE = 4
    FAILED = 5


def to(state):
    """A task that goes to a state and declares nothing."""

    def go():
        return state

    return go


def declares(*states, returns=None):
    """A task that declares the states it may return."""

    def go():
        return states[0] if returns is None else returns

    go.__annotations__["return"] = Literal[states]
    return go


def simple(task, **options):
    """START runs the task; DONE ends."""
    return Workflow(**options).register(S.START, task).add_exit_state(S.DONE)


def problems_of(workflow):
    with pytest.raises(ConfigurationError) as caught:
        workflow.validate()
    return list(caught.value.problems)


class Recorded(Resource):
    """A resource that says when it is set up and torn down."""

    def __init__(self):
        self.events = []

    async def setup(self):
        self.events.append("setup")

    async def teardown(self):
        self.events.append("teardown")


# Definition


def test_new_workflow_is_empty():
    """A new workflow has no states, no exit states, no timeout, and a standard name."""
    workflow = Workflow()

    # WF-001
    assert workflow.registered_states == frozenset()
    assert workflow.exit_states == frozenset()
    assert workflow.name == "workflow"
    assert repr(workflow) == "<Workflow workflow states=0 exits=0>"


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda w: w.register(S.START, to(S.DONE)), id="register"),
        pytest.param(
            lambda w: w.register_split(S.START, [], JoinConfig(JoinStrategy.All, S.DONE)), id="register_split"
        ),
        pytest.param(lambda w: w.add_exit_state(S.DONE), id="add_exit_state"),
        pytest.param(lambda w: w.add_exit_states([S.DONE]), id="add_exit_states"),
        pytest.param(lambda w: w.with_timeout(1), id="with_timeout"),
        pytest.param(lambda w: w.with_workflow_id("order-1"), id="with_workflow_id"),
    ],
)
def test_builders_return_the_workflow(build):
    """Every builder changes the workflow in place and returns it, so calls chain and a lost result loses nothing."""
    workflow = Workflow()

    assert build(workflow) is workflow


def test_task_decorator_registers_and_leaves_the_function():
    """`task` registers the function and gives it back unchanged."""
    workflow = Workflow().add_exit_state(S.DONE)

    def start():
        return S.DONE

    assert workflow.task(S.START)(start) is start
    assert testing.run(workflow.orchestrate(S.START)) is S.DONE


def test_bare_has_no_resources():
    """A bare workflow hands its tasks empty resources."""
    seen = []
    workflow = Workflow.bare(name="b").register(S.START, lambda res: seen.append(res) or S.DONE).add_exit_state(S.DONE)

    testing.run(workflow.orchestrate(S.START))

    assert workflow.name == "b"
    assert repr(seen) == "[<Resources known keys: none>]"


def test_subscripted_workflow_is_a_workflow():
    """Naming the state type changes nothing at run time."""
    assert isinstance(Workflow[S](name="typed"), Workflow)


@pytest.mark.parametrize("given", [{"n": 1}, Resources({"n": 1})], ids=["mapping", "Resources"])
def test_resources_reach_the_tasks(given):
    """A workflow takes Resources or a mapping, and its tasks get Resources."""
    seen = []

    def start(res: Resources):
        seen.append(res.get("n"))
        return S.DONE

    testing.run(simple(start, resources=given).orchestrate(S.START))

    assert seen == [1]


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda w: w.add_exit_state(S.DONE).add_exit_state(S.DONE), id="one by one"),
        pytest.param(lambda w: w.add_exit_states([S.DONE, S.DONE]), id="at once"),
        pytest.param(lambda w: w.add_exit_state(S.DONE).add_exit_states([S.DONE]), id="both ways"),
    ],
)
def test_exit_states_are_a_set(add):
    """Adding an exit state again changes nothing."""
    # WF-024
    assert add(Workflow()).exit_states == {S.DONE}


@pytest.mark.parametrize(
    "states",
    [
        pytest.param([S.DONE, S.FAILED], id="list"),
        pytest.param({S.DONE, S.FAILED}, id="set"),
        pytest.param((state for state in (S.DONE, S.FAILED)), id="generator"),
        pytest.param({S.DONE: 1, S.FAILED: 2}, id="mapping"),
    ],
)
def test_exit_states_from_any_iterable(states):
    """`add_exit_states` takes any iterable of states."""
    # WF-026
    assert Workflow().add_exit_states(states).exit_states == {S.DONE, S.FAILED}


def test_registered_states_are_those_with_a_task():
    """Every state with a task or split is listed, and no state that is only an exit."""
    join = JoinConfig(JoinStrategy.All, S.DONE)
    workflow = Workflow().register(S.START, to(S.MIDDLE)).register_split(S.MIDDLE, [to(1)], join)
    workflow.register_split(S.OTHER, lambda: [to(1)], join).add_exit_states([S.DONE, S.OTHER])

    # WF-028
    assert workflow.registered_states == {S.START, S.MIDDLE, S.OTHER}
    assert workflow.exit_states == {S.DONE, S.OTHER}


def test_repr_tells_size_timeout_and_freeze():
    """The repr names the workflow, counts its states, and tells its timeout and whether it is frozen."""
    workflow = simple(to(S.DONE), name="orders").with_timeout(2.5)

    workflow.validate()

    # WF-029
    assert repr(workflow) == "<Workflow orders states=1 exits=1 timeout=2.5 frozen>"


SPLIT = JoinConfig(JoinStrategy.All, S.DONE)


def first():
    return S.DONE


def second():
    return S.DONE


def no_branches():
    return []


@pytest.mark.parametrize(
    ("once", "again", "words"),
    [
        pytest.param(
            lambda w: w.register(S.START, first),
            lambda w: w.register(S.START, second),
            "already has task first, it cannot have task second as well",
            id="task, task",
        ),
        pytest.param(
            lambda w: w.register(S.START, first),
            lambda w: w.register_split(S.START, [first, second], SPLIT),
            "already has task first, it cannot have a split of 2 branches as well",
            id="task, split",
        ),
        pytest.param(
            lambda w: w.register_split(S.START, [first], SPLIT),
            lambda w: w.register(S.START, second),
            "already has a split of 1 branches, it cannot have task second as well",
            id="split, task",
        ),
        pytest.param(
            lambda w: w.register_split(S.START, no_branches, SPLIT),
            lambda w: w.task(S.START)(second),
            "already has a split made at run time, it cannot have task second as well",
            id="run-time split, decorator",
        ),
    ],
)
def test_register_twice_names_both(once, again, words):
    """A state takes one task; the error names the one it has and the one it was offered."""
    workflow = once(Workflow(name="orders"))

    # WF-021
    with pytest.raises(ConfigurationError) as caught:
        again(workflow)

    assert str(caught.value) == f"state START of workflow orders {words}"


def test_register_twice_keeps_the_first():
    """After a refused registration the first task is still the one that runs."""
    ran = []
    workflow = simple(lambda: ran.append(1) or S.DONE)

    with pytest.raises(ConfigurationError):
        workflow.register(S.START, lambda: ran.append(2) or S.DONE)
    testing.run(workflow.orchestrate(S.START))

    assert ran == [1]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(list, id="list"),
        pytest.param(tuple, id="tuple"),
        pytest.param(iter, id="iterator"),
        pytest.param(lambda tasks: (task for task in tasks), id="generator"),
        pytest.param(dict.fromkeys, id="mapping"),
    ],
)
def test_split_takes_any_iterable_at_once(make):
    """Branches may be any iterable; it is read when the split is registered."""
    tasks = [to(1), to(2), to(3)]
    given = make(tasks)
    workflow = Workflow().register_split(S.START, given, JoinConfig(JoinStrategy.All, S.MIDDLE)).add_exit_state(S.DONE)
    seen = []

    def joined(result: SplitResult):
        seen.append(result.values())
        return S.DONE

    # WF-025
    tasks.clear()
    testing.run(workflow.register(S.MIDDLE, joined).orchestrate(S.START))

    assert seen == [[1, 2, 3]]


# Validation


def test_validate_without_states():
    """A workflow with an exit state only has nothing to run."""
    # WF-002
    with pytest.raises(ConfigurationError) as caught:
        Workflow(name="w").add_exit_state(S.DONE).validate()

    assert str(caught.value) == "workflow w: no state is registered"


def test_validate_without_exit():
    """A workflow without an exit state could never end."""
    # WF-003
    with pytest.raises(ConfigurationError) as caught:
        Workflow(name="w").register(S.START, to(S.START)).validate()

    text = "workflow w: no exit state: the run could never end; add one with add_exit_state()"
    assert str(caught.value) == text


def test_validate_the_smallest_workflow():
    """One state and one exit state are valid, and validating again stays so."""
    workflow = simple(to(S.DONE))

    # WF-004
    workflow.validate()
    workflow.validate()


def test_validate_lists_every_problem():
    """One error has every problem, in a fixed order: each is a line of its message and an entry of `problems`."""
    workflow = Workflow(name="w").register(S.START, declares(S.MIDDLE)).register(1, to(1)).register("1", to(1))
    workflow.register_split(S.OTHER, [to(1)], JoinConfig(JoinStrategy.Quorum(2), S.START))
    workflow.register_split("lost", [], JoinConfig(JoinStrategy.Any, "nowhere"))

    # WF-005
    with pytest.raises(ConfigurationError) as caught:
        workflow.validate()

    assert caught.value.problems == (
        "no exit state: the run could never end; add one with add_exit_state()",
        "several states are called 1; labels must differ",
        "state START leads to MIDDLE, which is neither registered nor an exit state",
        "state 1 cannot be reached from the initial state",
        "state 1 cannot be reached from the initial state",
        "state OTHER cannot be reached from the initial state",
        "state lost cannot be reached from the initial state",
        "the split in state OTHER: Quorum(2) cannot be reached: the split has 1 branch",
        "the split in state lost joins into nowhere, which is neither registered nor an exit state",
    )
    assert str(caught.value).splitlines()[0] == "workflow w has 9 problems:"
    assert [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]] == list(caught.value.problems)


def test_validate_no_states_comes_first():
    """The error of an empty workflow says that it has no states before it says that it has no exit."""
    # WF-005
    assert problems_of(Workflow()) == [
        "no state is registered",
        "no exit state: the run could never end; add one with add_exit_state()",
    ]


def test_validate_split_into_nowhere():
    """A join state that is neither registered nor an exit is named."""
    workflow = (
        Workflow().register_split(S.START, [to(1)], JoinConfig(JoinStrategy.All, S.MIDDLE)).add_exit_state(S.DONE)
    )

    # WF-006
    assert problems_of(workflow) == [
        "the split in state START joins into MIDDLE, which is neither registered nor an exit state"
    ]


def test_validate_split_into_an_exit():
    """A split may join into an exit state."""
    workflow = Workflow().register_split(S.START, [to(1)], SPLIT).add_exit_state(S.DONE)

    # WF-007
    assert testing.run(workflow.orchestrate(S.START)) is S.DONE


@pytest.mark.parametrize(
    ("strategy", "branches", "problem"),
    [
        # WF-008
        pytest.param(JoinStrategy.PartialTimeout, 2, "PartialTimeout needs a timeout, got None", id="PartialTimeout"),
        # WF-012, B45
        pytest.param(
            JoinStrategy.Quorum(5), 3, "Quorum(5) cannot be reached: the split has 3 branches", id="Quorum above"
        ),
        pytest.param(
            JoinStrategy.PartialResults(4),
            3,
            "PartialResults(4) cannot be reached: the split has 3 branches",
            id="PartialResults above",
        ),
        pytest.param(
            JoinStrategy.Any,
            0,
            "Any needs at least one branch, the split has none; only All joins an empty split",
            id="Any",
        ),
        pytest.param(
            JoinStrategy.Percentage(0.5),
            0,
            "Percentage(0.5) needs at least one branch, the split has none; only All joins an empty split",
            id="Percentage of none",
        ),
    ],
)
def test_validate_join_out_of_reach(strategy, branches, problem):
    """A join that its branches can never satisfy is refused before anything runs."""
    workflow = (
        Workflow().register_split(S.START, [to(1)] * branches, JoinConfig(strategy, S.DONE)).add_exit_state(S.DONE)
    )

    assert problems_of(workflow) == [f"the split in state START: {problem}"]


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_percentage_out_of_range(p):
    """A percentage is above 0 and at most 1; anything else is refused when it is made."""
    # WF-009
    with pytest.raises(ConfigurationError, match=r"p in Percentage\(p\) must be above 0 and at most 1"):
        JoinStrategy.Percentage(p)


@pytest.mark.parametrize("bulkhead", [0, -1])
def test_bulkhead_below_one(bulkhead):
    """A bulkhead lets at least one branch through; anything less is refused when the join is made."""
    # WF-010
    with pytest.raises(ConfigurationError, match="bulkhead must be an int of at least 1"):
        JoinConfig(JoinStrategy.All, S.DONE, bulkhead=bulkhead)


def test_join_of_a_run_time_split_is_checked_on_entry():
    """Branches that are known only at run time are checked against the join on entry, before any starts."""
    ran = []
    workflow = Workflow().register_split(
        S.START, lambda: [lambda: ran.append(1)] * 2, JoinConfig(JoinStrategy.Quorum(3), S.DONE)
    )
    workflow.add_exit_state(S.DONE).validate()

    # WF-011
    with pytest.raises(ConfigurationError) as caught:
        testing.run(workflow.orchestrate(S.START))

    assert str(caught.value) == "Quorum(3) cannot be reached: the split has 2 branches"
    assert (caught.value.state, ran) == (S.START, [])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        pytest.param(
            lambda w: w.register(1, to(1)).register("1", to(1)),
            "several states are called 1; labels must differ",
            id="1, '1'",
        ),
        pytest.param(
            lambda w: w.register(S.MIDDLE, to(1)).add_exit_state("MIDDLE"),
            "several states are called MIDDLE; labels must differ",
            id="Enum member, its name",
        ),
    ],
)
def test_validate_equal_labels(make, problem):
    """Two states that messages could not tell apart are refused."""
    # B46
    assert problems_of(make(simple(to(S.DONE)))) == [problem]


@pytest.mark.parametrize("state", ["", "x" * 129, "é" * 65], ids=["empty", "129 bytes", "130 bytes in 65 characters"])
def test_validate_label_length(state):
    """A label has 1 to 128 bytes."""
    with pytest.raises(ConfigurationError, match="the name of a state must have 1 to 128 bytes"):
        simple(to(S.DONE)).register(state, to(S.DONE)).validate()


def test_validate_longest_label():
    """A label of 128 bytes is accepted."""
    Workflow().register("é" * 64, to(S.DONE)).add_exit_state(S.DONE).validate()


def test_validate_split_result_without_a_split():
    """A task that needs a SplitResult in a state that no split joins into is a problem."""

    def joined(result: SplitResult):
        return S.DONE

    assert problems_of(simple(joined)) == [
        "the task of state START takes a SplitResult, but no split joins into that state"
    ]


def test_validation_error_has_no_run():
    """What validation refuses is not tied to a run: no note, no state, no path."""
    # WF-017
    with pytest.raises(ConfigurationError) as caught:
        testing.run(Workflow().orchestrate(S.START))

    assert caught.value.__cano__ is None
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("state", [S.START, S.DONE], ids=["registered", "exit"])
def test_initial_state_accepted(state):
    """A run may start in a registered state or in an exit state."""
    # WF-013
    simple(to(S.DONE)).validate_initial_state(state)


@pytest.mark.parametrize("state", [S.OTHER, "START", None, 4, [], {}], ids=repr)
def test_initial_state_refused(state):
    """A run cannot start in any other value; every call checks anew."""
    workflow = simple(to(S.DONE))

    # WF-013, WF-016
    for check in (workflow.validate_initial_state, lambda state: testing.run(workflow.orchestrate(state))):
        with pytest.raises(ConfigurationError, match=r"the initial state .* is neither registered nor an exit state"):
            check(state)
    workflow.validate_initial_state(S.START)


@pytest.mark.parametrize("method", ["orchestrate", "start"])
async def test_run_of_an_invalid_workflow_touches_nothing(method):
    """An invalid workflow fails before a task runs or a resource is set up."""
    resource, ran = Recorded(), []
    workflow = Workflow({"r": resource}).register(S.START, lambda: ran.append(1) or S.DONE)

    # WF-014
    with pytest.raises(ConfigurationError, match="no exit state"):
        await getattr(workflow, method)(S.START)

    assert (resource.events, ran) == ([], [])


# Declared targets


def test_declared_target_that_nobody_registered():
    """A target of an annotation that is no state of the workflow is named, with the state that leads to it."""
    workflow = simple(declares(S.DONE, S.MIDDLE))

    assert problems_of(workflow) == ["state START leads to MIDDLE, which is neither registered nor an exit state"]


def test_declared_states_that_cannot_be_reached():
    """Where every reachable task declares its targets, a state that none of them leads to is a problem."""
    workflow = simple(declares(S.DONE)).register(S.MIDDLE, declares(S.DONE))

    assert problems_of(workflow) == ["state MIDDLE cannot be reached from the initial state"]


def test_reachability_begins_at_the_state_registered_first():
    """The state that was registered first counts as the initial one."""
    workflow = (
        Workflow().register(S.MIDDLE, declares(S.START)).register(S.START, declares(S.DONE)).add_exit_state(S.DONE)
    )
    workflow.validate()

    turned = Workflow().register(S.START, declares(S.DONE)).register(S.MIDDLE, declares(S.START)).add_exit_state(S.DONE)

    assert problems_of(turned) == ["state MIDDLE cannot be reached from the initial state"]


def test_declared_states_without_a_way_out():
    """States that only lead to each other are named: a run in them could never end."""
    workflow = (
        simple(declares(S.DONE, S.MIDDLE)).register(S.MIDDLE, declares(S.OTHER)).register(S.OTHER, declares(S.MIDDLE))
    )

    assert problems_of(workflow) == [
        "state MIDDLE has no way to an exit state",
        "state OTHER has no way to an exit state",
    ]


def test_undeclared_task_may_lead_anywhere():
    """A task without an annotation can reach every state, so nothing is blamed."""
    simple(to(S.DONE)).register(S.MIDDLE, declares(S.MIDDLE, S.START)).validate()


def test_unused_exit_is_no_problem():
    """An exit state that nothing leads to is allowed."""
    simple(declares(S.DONE)).add_exit_state(S.FAILED).validate()


def test_return_of_an_undeclared_state():
    """A task that returns a state it did not declare fails at that task, although the state exists."""
    workflow = simple(declares(S.DONE, S.MIDDLE, returns=S.START)).register(S.MIDDLE, to(S.DONE))

    with pytest.raises(InvalidTransitionError) as caught:
        testing.run(workflow.orchestrate(S.START))

    assert str(caught.value) == (
        "task declares.<locals>.go in state START returned START, but its annotation declares only DONE, MIDDLE"
    )
    assert caught.value.state is S.START


def declared_graphs():
    """Some states, the targets each declares (None: nothing declared), and which of them are exits too."""
    names = st.integers(0, 6)
    targets = st.one_of(st.none(), st.lists(names, min_size=1, max_size=3))
    return st.tuples(st.lists(targets, min_size=0, max_size=6), st.frozensets(names, max_size=3))


def reference_problems(states, exits):
    """What is wrong with a graph, told by walking every walk of it."""
    known = set(range(len(states))) | exits
    working = [state for state in range(len(states)) if state not in exits]
    onward = {state: set() for state in exits}
    for state in working:
        onward[state] = known if states[state] is None else set(states[state]) & known

    def walks(start):
        seen = {start}
        while more := {target for state in seen for target in onward[state]} - seen:
            seen |= more
        return seen

    found = Counter()
    if not working:
        found["no state is registered"] += 1
    if not exits:
        found["no exit state: the run could never end; add one with add_exit_state()"] += 1
    for state in working:
        for target in set(states[state] or ()) - known:
            found[f"state {state} leads to {target}, which is neither registered nor an exit state"] += 1
    reached = walks(working[0]) if working else set()
    if all(states[state] is not None for state in reached if state in working):
        lost = [state for state in working if state not in reached]
        found.update(f"state {state} cannot be reached from the initial state" for state in lost)
    # A target that is missing may well be the way out.
    ends = exits | {state for state in working if states[state] is None or set(states[state]) - known}
    if exits:
        found.update(f"state {state} has no way to an exit state" for state in working if not walks(state) & ends)
    return found


@settings(deadline=None, max_examples=400)
@given(declared_graphs())
def test_validate_agrees_with_a_search(graph):
    """On any graph, validation finds exactly the problems that a search of every walk finds."""
    states, exits = graph
    workflow = Workflow().add_exit_states(exits)
    for state, targets in enumerate(states):
        workflow.register(state, to(0) if targets is None else declares(*targets))

    try:
        workflow.validate()
        found = Counter()
    except ConfigurationError as error:
        found = Counter(error.problems)

    assert found == reference_problems(states, exits)


# Freezing and copies


FREEZERS = [
    pytest.param(lambda w: w.validate(), id="validate"),
    pytest.param(lambda w: w.validate_initial_state(S.START), id="validate_initial_state"),
    pytest.param(lambda w: testing.run(w.orchestrate(S.START)), id="orchestrate"),
]
CHANGES = [
    pytest.param(lambda w: w.register(S.OTHER, first), id="register"),
    pytest.param(lambda w: w.task(S.OTHER)(first), id="task"),
    pytest.param(lambda w: w.register_split(S.OTHER, [first], SPLIT), id="register_split"),
    pytest.param(lambda w: w.add_exit_state(S.FAILED), id="add_exit_state"),
    pytest.param(lambda w: w.add_exit_states([S.FAILED]), id="add_exit_states"),
    pytest.param(lambda w: w.with_timeout(1), id="with_timeout"),
    pytest.param(lambda w: w.with_workflow_id("x"), id="with_workflow_id"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("freeze", FREEZERS)
def test_frozen_workflow_refuses_changes(freeze, change):
    """The first validation or run freezes the definition; a later change is refused and points at copy()."""
    workflow = simple(to(S.DONE), name="orders")

    # WF-015, B24
    freeze(workflow)
    with pytest.raises(ConfigurationError) as caught:
        change(workflow)

    assert str(caught.value) == "workflow orders is frozen since it was first validated or run; change a copy() of it"


async def test_start_freezes():
    """Starting a run freezes the definition as well."""
    workflow = simple(to(S.DONE))

    run = workflow.start(S.START)

    with pytest.raises(ConfigurationError, match="is frozen"):
        workflow.add_exit_state(S.FAILED)
    await run


def test_failed_validation_does_not_freeze():
    """A definition that was refused can be mended and validated again."""
    workflow = Workflow().register(S.START, to(S.DONE))
    with pytest.raises(ConfigurationError):
        workflow.validate()

    workflow.add_exit_state(S.DONE)

    assert testing.run(workflow.orchestrate(S.START)) is S.DONE


@pytest.mark.parametrize("change", CHANGES)
def test_copy_can_be_changed(change):
    """A copy of a frozen workflow is open to every change."""
    workflow = simple(to(S.DONE))
    workflow.validate()

    copy = workflow.copy()
    change(copy)

    assert "frozen" not in repr(copy)


def test_copy_and_original_are_apart():
    """A change of the copy does not reach the original, nor the other way round."""
    workflow = simple(to(S.DONE))
    copy = workflow.copy()

    copy.register(S.MIDDLE, first).add_exit_state(S.FAILED)
    workflow.register(S.OTHER, first)

    assert workflow.registered_states == {S.START, S.OTHER}
    assert workflow.exit_states == {S.DONE}
    assert copy.registered_states == {S.START, S.MIDDLE}
    assert copy.exit_states == {S.DONE, S.FAILED}


async def test_copy_keeps_the_options():
    """A copy has the original's name, resources, timeout and workflow id."""
    seen = []

    def start(res: Resources, ctx: RunContext):
        seen.append((res, ctx.workflow_id, ctx.remaining()))
        return S.DONE

    resources = Resources()
    workflow = simple(start, resources=resources, name="orders").with_timeout(3).with_workflow_id("order-1")

    # WF-027
    copy = workflow.copy()
    await copy.orchestrate(S.START)

    ((found, workflow_id, remaining),) = seen
    assert copy.name == "orders"
    assert found is resources
    assert workflow_id == "order-1"
    assert 0 < remaining <= 3


def test_copy_validates_afresh():
    """A copy is checked by itself: its verdict is its own."""
    workflow = simple(to(S.DONE))
    workflow.validate()
    copy = workflow.copy().register("START", to(S.DONE))

    # WF-015
    assert problems_of(copy) == ["several states are called START; labels must differ"]
    workflow.validate()


# Running


async def test_orchestrate_is_a_coroutine_function():
    """`orchestrate` does nothing until it is awaited."""
    ran = []
    coroutine = simple(lambda: ran.append(1) or S.DONE).orchestrate(S.START)

    assert inspect.iscoroutinefunction(Workflow.orchestrate)
    assert ran == []
    assert await coroutine is S.DONE
    assert ran == [1]


@pytest.mark.parametrize("registered", [False, True], ids=["exit only", "exit and registered"])
async def test_start_in_an_exit_state(registered):
    """A run that starts in an exit state returns it at once, and no task runs."""
    ran = []
    workflow = simple(lambda: ran.append(1) or S.DONE)
    if registered:
        workflow.register(S.DONE, lambda: ran.append(2) or S.START)

    # WF-018, WF-019
    assert await workflow.orchestrate(S.DONE) is S.DONE
    assert ran == []


async def test_exit_state_with_a_task_ends_the_run():
    """Reaching a state that is registered and an exit ends the run; its task never runs."""
    ran = []
    workflow = simple(to(S.DONE)).register(S.DONE, lambda: ran.append(1) or S.START)

    # WF-019
    assert await workflow.orchestrate(S.START) is S.DONE
    assert ran == []


async def test_unknown_state():
    """A state that is neither registered nor an exit fails the run, naming the task, its state and what it returned."""
    workflow = simple(first).register(S.MIDDLE, to(S.OTHER))

    # WF-020
    with pytest.raises(UnknownStateError) as caught:
        await workflow.orchestrate(S.MIDDLE)

    text = "task to.<locals>.go in state MIDDLE returned OTHER, which is neither registered nor an exit state"
    assert str(caught.value) == text
    assert isinstance(caught.value, LookupError)
    assert caught.value.state is S.MIDDLE


async def test_self_loop():
    """A task that returns its own state runs again each time, until it goes elsewhere."""
    ran = []

    def start():
        ran.append(1)
        return S.START if len(ran) < 5 else S.DONE

    # WF-023
    assert await simple(start).orchestrate(S.START) is S.DONE
    assert len(ran) == 5


async def test_path_holds_every_state_entered():
    """The path has each state in the order it was entered, the initial one and the exit included."""
    workflow = simple(to(S.MIDDLE)).register(S.MIDDLE, to(S.OTHER)).register(S.OTHER, to(S.DONE))

    run = workflow.start(S.START)
    await run

    # FSM-003
    assert run.path == [S.START, S.MIDDLE, S.OTHER, S.DONE]


async def test_path_of_a_failure():
    """The error of a failing task has the path up to the failing state."""

    def fail():
        raise ValueError("no")

    # FSM-001, FSM-007, FSM-008
    with pytest.raises(ValueError, match="no") as caught:
        await simple(to(S.MIDDLE)).register(S.MIDDLE, fail).orchestrate(S.START)

    context = caught.value.__cano__
    assert (context.state, context.path) == (S.MIDDLE, (S.START, S.MIDDLE))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), max_size=300), st.sampled_from(["plain", "async", "suspending"]))
def test_path_is_what_the_tasks_returned(walk, kind):
    """For any walk through the states, the run enters exactly what the tasks returned, and keeps the newest 256."""
    returns = iter([*walk, "end"])

    def plain():
        return next(returns)

    async def without_suspending():
        return next(returns)

    async def suspending():
        await asyncio.sleep(0)
        return next(returns)

    task = {"plain": plain, "async": without_suspending, "suspending": suspending}[kind]
    workflow = Workflow().add_exit_state("end")
    for state in range(5):
        workflow.register(state, task)

    async def main():
        run = workflow.start(0)
        assert await run == "end"
        return run.path

    assert testing.run(main()) == [0, *walk, "end"][-256:]


async def test_plain_state_that_returns_a_split():
    """A split returned where no join was given fails, names the two remedies, and has the context of any failure."""
    workflow = simple(lambda: TaskResult.Split([S.MIDDLE])).register(S.MIDDLE, to(S.DONE))

    # WF-032, WF-033
    with pytest.raises(WorkflowError) as caught:
        await workflow.orchestrate(S.START)

    assert "register_split(), or give register() a join=" in str(caught.value)
    assert (caught.value.state, caught.value.path) == (S.START, (S.START,))


@pytest.mark.parametrize("suspends", [False, True], ids=["at once", "suspending"])
async def test_a_hundred_runs_at_once(suspends):
    """One workflow runs any number of times at once, and the runs do not mix."""
    seen = {}

    async def start(ctx: RunContext):
        if suspends:
            await asyncio.sleep(0.01)
        return S.MIDDLE

    async def middle(ctx: RunContext):
        if suspends:
            await asyncio.sleep(0.01)
        seen[ctx.workflow_id] = (ctx.visit, ctx.state)
        return S.DONE

    workflow = simple(start).register(S.MIDDLE, middle)

    # WF-034
    ended = await asyncio.gather(*(workflow.orchestrate(S.START, workflow_id=f"run-{n}") for n in range(100)))

    assert ended == [S.DONE] * 100
    assert seen == {f"run-{n}": (1, S.MIDDLE) for n in range(100)}


async def test_one_task_object_in_ten_runs():
    """Ten concurrent callers of the same task object give ten executions."""

    class Counting:
        count = 0

        async def run(self):
            await asyncio.sleep(0)
            self.count += 1
            return S.DONE

    task = Counting()

    # WF-034
    await asyncio.gather(*(simple(task).orchestrate(S.START) for _ in range(10)))

    assert task.count == 10


def test_one_workflow_in_two_threads():
    """Threads with a loop each may run the same frozen workflow at once."""
    met = threading.Barrier(2, timeout=10)

    def meet():
        met.wait()
        return S.DONE

    workflow = simple(lambda: S.MIDDLE).register(S.MIDDLE, meet)
    ended = []
    threads = [
        threading.Thread(target=lambda: ended.append(asyncio.run(workflow.orchestrate(S.START)))) for _ in range(2)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ended == [S.DONE, S.DONE]


async def test_run_options_override_the_workflow():
    """Resources, workflow id and timeout of one run take the place of the workflow's, for this run only."""
    seen = []

    def start(res: Resources, ctx: RunContext):
        seen.append((res.get("n"), ctx.workflow_id, ctx.remaining()))
        return S.DONE

    workflow = simple(start, resources={"n": 1}).with_workflow_id("mine").with_timeout(60)

    await workflow.orchestrate(S.START, resources={"n": 2}, workflow_id="yours", timeout=5)
    await workflow.start(S.START, resources=Resources({"n": 3}))

    assert [entry[:2] for entry in seen] == [(2, "yours"), (3, "mine")]
    assert seen[0][2] <= 5 < seen[1][2] <= 60


async def test_workflow_inside_a_workflow():
    """A task may run another workflow, and the outer path holds only its own states."""
    inner = simple(to(S.MIDDLE)).register(S.MIDDLE, to(S.DONE))

    async def outer_start():
        return await inner.orchestrate(S.START)

    run = simple(outer_start).start(S.START)
    await run

    assert run.path == [S.START, S.DONE]


# States


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2
    THREE = 3


class Word(enum.StrEnum):
    ONE = "one"
    TWO = "two"
    THREE = "three"


class Flags(enum.Flag):
    ONE = enum.auto()
    TWO = enum.auto()
    THREE = enum.auto()


class Marker:
    pass


@pytest.mark.parametrize(
    "states",
    [
        pytest.param((S.START, S.MIDDLE, S.DONE), id="Enum"),
        pytest.param(tuple(Number), id="IntEnum"),
        pytest.param(tuple(Word), id="StrEnum"),
        pytest.param(tuple(Flags), id="Flag"),
        pytest.param(("start", "middle", "done"), id="str"),
        pytest.param((1, 2**70, -3), id="int"),
        pytest.param((("a", 1), ("a", 2), ("b", 1)), id="tuple"),
        pytest.param((Point(1, 1), Point(1, 2), Point(2, 1)), id="frozen dataclass"),
        pytest.param((None, True, 0.5), id="None, bool, float"),
        pytest.param((Marker(), Marker(), Marker()), id="plain objects"),
        pytest.param((Marker, int, str), id="classes"),
        pytest.param((frozenset({1}), b"x", ...), id="others"),
    ],
)
async def test_any_hashable_value_is_a_state(states):
    """States may be of any hashable type, and of several types at once."""
    start, middle, done = states
    workflow = Workflow().register(start, to(middle)).register(middle, to(done)).add_exit_state(done)

    run = workflow.start(start)

    assert await run is done
    assert run.path == list(states)


@pytest.mark.parametrize(
    ("state", "equal"),
    [
        pytest.param("middle", "-middle"[1:], id="str"),
        pytest.param(100_000, int("100000"), id="int"),
        pytest.param(1, 1.0, id="int, float"),
        pytest.param(Word.TWO, "two", id="StrEnum, str"),
        pytest.param(("a", 1), tuple(["a", 1]), id="tuple"),  # noqa: C409 - a literal would be the same object
        pytest.param(Point(1, 2), Point(1, 2), id="dataclass"),
    ],
)
async def test_equal_value_is_the_same_state(state, equal):
    """A task may return a value that only equals a state, and a run may start in one; the registered object counts."""
    workflow = Workflow().register("start", to(equal)).register(state, to("done")).add_exit_state("done")

    run = workflow.start("start")
    await run

    assert run.path[1] is state
    assert workflow.start(equal).state is state
    assert await workflow.orchestrate(equal) == "done"


def test_nan_is_found_by_identity():
    """A state that does not equal itself is found as the object it is."""
    nan = float("nan")
    workflow = Workflow().register("start", to(nan)).register(nan, to("done")).add_exit_state("done")

    assert testing.run(workflow.orchestrate("start")) == "done"


class Broken:
    """A value whose hash or equality fails."""

    def __init__(self, *, hashes=True):
        self.hashes = hashes

    def __hash__(self):
        if not self.hashes:
            raise RuntimeError("broken hash")
        return hash("start")

    def __eq__(self, other):
        raise RuntimeError("broken eq")


@pytest.mark.parametrize(
    ("state", "message"),
    [pytest.param(Broken(hashes=False), "broken hash", id="hash"), pytest.param(Broken(), "broken eq", id="eq")],
)
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda w, state: w.register(state, to("done")), id="register"),
        pytest.param(lambda w, state: w.add_exit_states(["start", state]), id="add_exit_states"),
        pytest.param(lambda w, state: w.validate_initial_state(state), id="initial"),
        pytest.param(lambda w, state: testing.run(w.copy().register("x", to(state)).orchestrate("x")), id="returned"),
    ],
)
def test_broken_hash_or_eq_surfaces(use, state, message):
    """What a user's __hash__ or __eq__ raises comes out as it is."""
    workflow = Workflow().register("start", to("done")).add_exit_state("done")

    with pytest.raises(RuntimeError, match=message):
        use(workflow, state)


def test_broken_eq_of_a_returned_value_is_a_failure_of_the_task():
    """When comparing what a task returned fails, the error has the task's context."""
    workflow = Workflow().register("start", to(Broken())).add_exit_state("done")

    with pytest.raises(RuntimeError, match="broken eq") as caught:
        testing.run(workflow.orchestrate("start"))

    assert (caught.value.__cano__.state, caught.value.__cano__.task) == ("start", "to.<locals>.go")


# Length


async def test_chain_of_ten_thousand_states():
    """A chain of 10,000 declared states is validated and run without recursion."""
    workflow = Workflow().add_exit_state(10_000)
    for state in range(10_000):
        workflow.register(state, declares(state + 1))

    run = workflow.start(0)

    assert await run == 10_000
    assert run.path == list(range(10_001 - 256, 10_001))


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_hundred_thousand_self_loops(kind):
    """100,000 loops run without recursion; the path keeps the newest 256 states, and the error counts all of them."""
    count = itertools.count(1)

    def plain():
        if next(count) == 100_000:
            raise ValueError("enough")
        return S.START

    async def asynchronous():
        return plain()

    # FSM-010, G03
    with pytest.raises(ValueError, match="enough") as caught:
        await simple(plain if kind == "plain" else asynchronous).orchestrate(S.START)

    context = caught.value.__cano__
    assert (context.path, context.entered) == ((S.START,) * 256, 100_000)
    assert f"path=({100_000 - 16} more)>START>" in str(context)


def nested(depth):
    """A workflow in a workflow, to some depth."""
    workflow = simple(to(S.DONE))
    for _ in range(depth):

        async def start(inner=workflow):
            return await inner.orchestrate(S.START)

        workflow = simple(start)
    return workflow


def test_two_hundred_nested_workflows():
    """Workflows nest 200 deep."""
    assert testing.run(nested(200).orchestrate(S.START)) is S.DONE


def test_a_thousand_nested_workflows():
    """Beyond what Python's own stack takes, nested workflows end in Python's own error, and later runs are unharmed."""
    workflow = nested(1000)

    with pytest.raises(RecursionError):
        testing.run(workflow.orchestrate(S.START))

    assert testing.run(nested(10).orchestrate(S.START)) is S.DONE


# The loop gets its turn


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_loop_gets_a_turn_every_1024_transitions(kind):
    """Transitions that never suspend let the loop run other tasks once in 1,024."""
    count, seen = 0, []

    def plain():
        nonlocal count
        count += 1
        return S.START if count < 5000 else S.DONE

    async def asynchronous():
        return plain()

    async def other():
        while True:
            seen.append(count)
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await simple(plain if kind == "plain" else asynchronous).orchestrate(S.START)
    beside.cancel()
    await asyncio.wait([beside])

    assert seen[:4] == [1023, 2047, 3071, 4095]


async def test_suspensions_are_turns():
    """A run that suspends by itself is not suspended once more: only transitions since its last suspension count."""
    count, turns = 0, 0

    async def start():
        nonlocal count
        count += 1
        if count % 1000 == 0:
            await asyncio.sleep(0)
        return S.START if count < 10_000 else S.DONE

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await simple(start).orchestrate(S.START)
    beside.cancel()
    await asyncio.wait([beside])

    assert turns == 10


async def test_pending_cancel_reaches_a_run_that_never_suspends():
    """A cancel asked for from inside such a run is delivered at its next turn, at most 1,024 transitions later."""
    count = 0

    def start():
        nonlocal count
        count += 1
        if count == 10:
            run.cancel("enough")
        return S.START if count < 100_000 else S.DONE

    run = simple(start).start(S.START)

    # FSM-002
    with pytest.raises(WorkflowCancelledError):
        await run
    assert count == 1023
    assert run.state is S.START


# Run


async def test_run_id_is_the_workflow_id():
    """The handle's id is the workflow id where one was given."""
    run = simple(to(S.DONE)).start(S.START, workflow_id="order-1")

    assert run.id == "order-1"
    await run


async def test_run_ids_differ():
    """Without a workflow id each run has a random id of 32 hexadecimal digits, which stays the same."""
    workflow = simple(to(S.DONE))

    runs = [workflow.start(S.START) for _ in range(10)]
    ids = {run.id for run in runs}
    await asyncio.gather(*runs)

    assert len(ids) == 10
    assert {run.id for run in runs} == ids
    assert all(len(bytes.fromhex(run_id)) == 16 for run_id in ids)


async def test_run_before_its_first_step():
    """A run that was just started is in its initial state, has entered nothing and is not done."""
    ran = []

    run = simple(lambda: ran.append(1) or S.DONE).start(S.START)

    assert (run.state, run.path, run.done(), ran) == (S.START, [], False, [])
    assert repr(run) == "<Run state=START>"
    await run


async def test_run_while_it_waits():
    """While a task waits, the handle tells the state it is in and the path so far."""
    gate = asyncio.Event()

    async def middle():
        await gate.wait()
        return S.DONE

    run = simple(to(S.MIDDLE)).register(S.MIDDLE, middle).start(S.START)
    await asyncio.sleep(0)

    assert (run.state, run.path, run.done()) == (S.MIDDLE, [S.START, S.MIDDLE], False)
    gate.set()
    await run


async def test_run_after_its_end():
    """After the end the handle tells the exit state, the whole path, and that it is done."""
    run = simple(to(S.DONE)).start(S.START)

    await run

    assert (run.state, run.path, run.done()) == (S.DONE, [S.START, S.DONE], True)
    assert repr(run) == "<Run state=DONE done>"


async def test_run_path_is_a_copy():
    """The list that `path` gives may be changed without harm."""
    run = simple(to(S.DONE)).start(S.START)
    await run

    run.path.clear()

    assert run.path == [S.START, S.DONE]


async def test_run_goes_on_without_being_awaited():
    """A started run runs by itself, even when its handle is dropped."""
    ended = asyncio.Event()

    async def start():
        await asyncio.sleep(0.01)
        ended.set()
        return S.DONE

    simple(start).start(S.START)
    gc.collect()

    await asyncio.wait_for(ended.wait(), 5)


async def test_run_awaited_twice():
    """A handle may be awaited again, also after its end."""
    run = simple(to(S.DONE)).start(S.START)

    assert [await run, await run] == [S.DONE, S.DONE]


async def test_failed_run_awaited_twice():
    """Each await of a failed run raises the same exception."""
    error = ValueError("no")

    def start():
        raise error

    run = simple(start).start(S.START)

    for _ in range(2):
        with pytest.raises(ValueError, match="no") as caught:
            await run
        assert caught.value is error


async def test_run_awaited_by_two_tasks():
    """Two tasks may wait for one run, and both get its result."""

    async def start():
        await asyncio.sleep(0.01)
        return S.DONE

    run = simple(start).start(S.START)

    async def waiter():
        return await run

    assert await asyncio.gather(waiter(), waiter()) == [S.DONE, S.DONE]


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda run: asyncio.gather(run, run), id="gather"),
        pytest.param(lambda run: asyncio.wait_for(run, 5), id="wait_for"),
        pytest.param(asyncio.shield, id="shield"),
        pytest.param(asyncio.ensure_future, id="ensure_future"),
    ],
)
async def test_run_with_asyncio(wait):
    """asyncio's own functions take a run like any awaitable."""

    async def start():
        await asyncio.sleep(0.01)
        return S.DONE

    ended = await wait(simple(start).start(S.START))

    assert ended in (S.DONE, [S.DONE, S.DONE])


async def test_shielded_run_survives_its_awaiter():
    """Cancelling whoever awaits `asyncio.shield(run)` leaves the run alone."""
    gate = asyncio.Event()

    async def start():
        await gate.wait()
        return S.DONE

    run = simple(start).start(S.START)
    shield = asyncio.shield(run)
    await asyncio.sleep(0)

    shield.cancel()
    gate.set()

    assert await run is S.DONE


async def test_cancel_after_the_end():
    """A run that is over cannot be cancelled, and its result stays."""
    run = simple(to(S.DONE)).start(S.START)
    await run

    # FSM-006
    assert run.cancel("late") is False
    assert await run is S.DONE


@pytest.mark.parametrize("reason", [5, b"x", ["x"]], ids=repr)
async def test_cancel_reason_is_a_text(reason):
    """A reason that is no text is refused, and the run goes on."""
    run = simple(to(S.DONE)).start(S.START)

    with pytest.raises(ConfigurationError, match="reason must be a text or None"):
        run.cancel(reason)

    assert await run is S.DONE


def test_start_outside_a_loop():
    """Without a running loop, `start` says what to use instead."""
    # the workflow is not to blame, so it is no ConfigurationError
    with pytest.raises(WorkflowError) as caught:
        simple(to(S.DONE)).start(S.START)

    text = "start() needs a running event loop; use asyncio.run(workflow.orchestrate(...)) outside one"
    assert str(caught.value) == text


async def test_start_in_another_thread():
    """A thread without a loop cannot start a run, whatever runs elsewhere."""
    workflow = simple(to(S.DONE))

    with pytest.raises(WorkflowError, match="needs a running event loop"):
        await asyncio.to_thread(workflow.start, S.START)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"initial_state": S.OTHER}, "the initial state", id="initial state"),
        pytest.param({"resources": 5}, "resources must be Resources or a mapping", id="resources"),
        pytest.param({"workflow_id": ""}, "workflow_id must be printable and not blank", id="workflow_id"),
        pytest.param({"timeout": -1}, "timeout must be at least 0", id="timeout"),
    ],
)
async def test_start_refuses_at_once(options, message):
    """`start` raises what is wrong with its arguments itself; nothing is started."""
    workflow = simple(to(S.DONE))

    with pytest.raises(ConfigurationError, match=message):
        workflow.start(**({"initial_state": S.START} | options))


async def test_zero_timeout():
    """A budget of nothing is used up before the first task, whose code never runs."""
    ran = []

    # FSM-012
    with pytest.raises(WorkflowTimeoutError) as caught:
        await simple(lambda: ran.append(1) or S.DONE).orchestrate(S.START, timeout=0)

    assert (caught.value.limit, caught.value.attempt, ran) == (0, 0, [])


async def test_run_is_a_task_of_its_own():
    """`start` runs in a task that carries the workflow's name; `orchestrate` runs in the caller's."""
    seen = []

    def start():
        seen.append(asyncio.current_task())
        return S.DONE

    workflow = simple(start, name="orders")

    await workflow.start(S.START)
    await workflow.orchestrate(S.START)

    assert seen[0].get_name() == "orders"
    assert seen[1] is asyncio.current_task()


async def test_every_cano_error_of_the_loop_has_its_state():
    """Whatever the state loop itself refuses is a WorkflowError with state, task and path."""
    bad: dict[str, Any] = {"none": None, "unknown": S.OTHER, "split": TaskResult.Split([]), "number": 5}

    for value in bad.values():
        with pytest.raises(CanoError) as caught:
            await simple(functools.partial(lambda value: value, value)).orchestrate(S.START)

        assert isinstance(caught.value, WorkflowError)
        assert (caught.value.state, caught.value.path, caught.value.attempt) == (S.START, (S.START,), 1)
