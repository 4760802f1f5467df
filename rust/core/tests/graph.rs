//! Definitions with known mistakes, and every definition of three states against a closure by hand.

use std::array;

use crate::core::graph::{Next, Node, Problem, Target, problems};

fn node(label: &str, exit: bool, next: Next) -> Node {
    Node { label: label.to_owned(), exit, next, on_error: Vec::new() }
}

fn exit(label: &str) -> Node {
    node(label, true, Next::Undeclared)
}

fn anywhere(label: &str) -> Node {
    node(label, false, Next::Undeclared)
}

fn leads(label: &str, to: &[usize]) -> Node {
    node(label, false, Next::Declared(to.iter().map(|to| Target::State(*to)).collect()))
}

fn fails_into(node: Node, to: &[usize]) -> Node {
    Node { on_error: to.iter().map(|to| Target::State(*to)).collect(), ..node }
}

fn texts(nodes: &[Node], start: Option<usize>) -> Vec<String> {
    problems(nodes, start).iter().map(Problem::to_string).collect()
}

#[test]
fn test_a_sound_definition_has_no_problem() {
    // WF-004, WF-007 (a target that is only an exit), WF-023 (a self-loop with a way out)
    assert_eq!(problems(&[anywhere("A"), exit("DONE")], None), []);
    assert_eq!(problems(&[leads("A", &[0, 1]), leads("B", &[2, 3]), exit("DONE"), exit("FAILED")], None), []);
}

#[test]
fn test_nothing_registered_and_nothing_to_end_are_both_reported() {
    // WF-002, WF-003, WF-005
    assert_eq!(problems(&[], None), [Problem::NoStates, Problem::NoExit]);
    assert_eq!(problems(&[exit("DONE")], None), [Problem::NoStates]);
    assert_eq!(problems(&[anywhere("A")], None), [Problem::NoExit]);
    assert_eq!(problems(&[leads("A", &[0])], None), [Problem::NoExit]); // no blame for the way out
}

#[test]
fn test_everything_is_found_at_once_and_in_order() {
    // WF-006 among others
    let faild = || Target::Missing("FAILD".to_owned());
    let typo = Next::Declared(vec![faild(), Target::State(1), faild()]);
    let nodes = [
        node("VALIDATE", false, typo),
        leads("CHARGE", &[1]),
        leads("SHIP", &[3]),
        exit("DONE"),
        exit("DONE"),
        exit("DONE"),
    ];

    assert_eq!(
        texts(&nodes, None),
        [
            "several states are called DONE; labels must differ",
            "state VALIDATE leads to FAILD, which is neither registered nor an exit state",
            "state SHIP cannot be reached from the initial state",
            "state CHARGE has no way to an exit state",
        ]
    );
}

#[test]
fn test_a_registered_exit_ends_the_run() {
    // WF-019: what its task would return does not count
    let targets = vec![Target::State(2), Target::Missing("NOWHERE".to_owned())];
    let both = fails_into(node("BOTH", true, Next::Declared(targets)), &[2]);
    let nodes = [leads("A", &[1]), both, leads("B", &[1])];

    assert_eq!(problems(&nodes, None), [Problem::Unreachable { state: "B".to_owned() }]);
}

#[test]
fn test_an_error_leads_like_a_result() {
    let nodes = [fails_into(leads("A", &[1]), &[2]), leads("B", &[1]), leads("FAILED", &[3]), exit("DONE")];
    assert_eq!(problems(&nodes, None), [Problem::NoWayOut { state: "B".to_owned() }]);

    let missing = |to: &str| vec![Target::Missing(to.to_owned())];
    let nodes = [Node { on_error: missing("FAILD"), ..anywhere("A") }, Node { on_error: missing("X"), ..exit("DONE") }];
    let (from, to) = ("A".to_owned(), "FAILD".to_owned());
    assert_eq!(problems(&nodes, None), [Problem::MissingTarget { from, to }]);
}

#[test]
fn test_reach_is_measured_from_the_start() {
    let nodes = [leads("A", &[1]), leads("B", &[2]), exit("DONE")];
    let lost = |state: &str| Problem::Unreachable { state: state.to_owned() };

    assert_eq!(problems(&nodes, Some(0)), []);
    assert_eq!(problems(&nodes, Some(1)), [lost("A")]);
    assert_eq!(problems(&nodes, Some(2)), [lost("A"), lost("B")]); // WF-018
}

#[test]
fn test_long_chains_need_no_call_stack() {
    let length = 10_000;
    let mut nodes: Vec<_> = (0..length).map(|at| leads(&format!("S{at}"), &[at + 1])).collect();
    nodes.push(exit("DONE"));
    assert_eq!(problems(&nodes, None), []);

    nodes[length - 1].next = Next::Declared(vec![Target::State(0)]);

    assert_eq!(problems(&nodes, None).len(), length); // no state has a way out
}

/// Every definition of three states, every start: each state is an exit, undeclared, or leads to
/// any subset, to the last of it by an error.
#[test]
fn test_small_definitions_match_a_closure_by_hand() {
    let shapes: Vec<_> = (0..10).collect();
    for &first in &shapes {
        for &second in &shapes {
            for &third in &shapes {
                let nodes = [shape("A", first), shape("B", second), shape("C", third)];
                for start in [None, Some(0), Some(1), Some(2)] {
                    assert_eq!(problems(&nodes, start), by_hand(&nodes, start), "{nodes:?} from {start:?}");
                }
            }
        }
    }
}

fn shape(label: &str, kind: usize) -> Node {
    match kind {
        8 => anywhere(label),
        9 => exit(label),
        subset => {
            let to: Vec<_> = (0..3).filter(|to| subset >> to & 1 == 1).collect();
            let (by_result, by_error) = to.split_at(to.len().saturating_sub(1));
            fails_into(leads(label, by_result), by_error)
        }
    }
}

/// The rules with a reachability matrix, where an undeclared state has an edge to every state.
fn by_hand(nodes: &[Node; 3], start: Option<usize>) -> Vec<Problem> {
    let edge = |from: &Node, to: usize| {
        let target = Target::State(to);
        let by_result = match &from.next {
            Next::Undeclared => true,
            Next::Declared(targets) => targets.contains(&target),
        };
        !from.exit && (by_result || from.on_error.contains(&target))
    };
    let near = |from: usize, to: usize| from == to || edge(&nodes[from], to);
    let mut reach: [[bool; 3]; 3] = array::from_fn(|from| array::from_fn(|to| near(from, to)));
    for via in 0..3 {
        for from in 0..3 {
            for to in 0..3 {
                reach[from][to] |= reach[from][via] && reach[via][to];
            }
        }
    }

    let states: Vec<_> = (0..3).filter(|at| !nodes[*at].exit).collect();
    let exits: Vec<_> = (0..3).filter(|at| nodes[*at].exit).collect();
    let label = |at: usize| nodes[at].label.clone();
    let mut found = Vec::new();
    if states.is_empty() {
        found.push(Problem::NoStates);
    }
    if exits.is_empty() {
        found.push(Problem::NoExit);
    }
    for &at in &states {
        if !reach[start.unwrap_or(states[0])][at] {
            found.push(Problem::Unreachable { state: label(at) });
        }
    }
    for &at in &states {
        if !exits.is_empty() && !exits.iter().any(|exit| reach[at][*exit]) {
            found.push(Problem::NoWayOut { state: label(at) });
        }
    }
    found
}
