//! The shape of a definition, and everything that is wrong with it.

use std::collections::{HashMap, HashSet};
use std::fmt;

/// A state of a definition.
///
/// A state that is both registered and an exit is an exit: reaching it ends the run, and where it
/// leads is not looked at.
#[derive(Debug, Clone)]
pub struct Node {
    pub label: String,
    pub exit: bool,
    pub next: Next,
    /// Where an error of its task leads.
    pub on_error: Vec<Target>,
}

/// Where a state may lead.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Its task did not say: anywhere.
    Undeclared,
    /// To these states only.
    Declared(Vec<Target>),
}

/// A state that another one leads to.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// An index into the nodes of the same definition.
    State(usize),
    /// The label of a state that is neither registered nor an exit.
    Missing(String),
}

/// Something that makes a definition wrong before it runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Problem {
    /// No state has a task that could run.
    NoStates,
    /// No state ends the run.
    NoExit,
    /// A state leads to one that does not exist.
    MissingTarget { from: String, to: String },
    /// A registered state that no run can enter.
    Unreachable { state: String },
    /// A state from which no run can end.
    NoWayOut { state: String },
    /// A label that several states have, so that no message could tell them apart.
    DuplicateLabel { label: String },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoStates => f.write_str("no state is registered"),
            Self::NoExit => f.write_str("no exit state: the run could never end; add one with add_exit_state()"),
            Self::MissingTarget { from, to } => {
                write!(f, "state {from} leads to {to}, which is neither registered nor an exit state")
            }
            Self::Unreachable { state } => {
                write!(f, "state {state} cannot be reached from the initial state")
            }
            Self::NoWayOut { state } => write!(f, "state {state} has no way to an exit state"),
            Self::DuplicateLabel { label } => {
                write!(f, "several states are called {label}; labels must differ")
            }
        }
    }
}

/// Finds every problem of a definition at once, in time linear in states and targets.
///
/// Runs begin at `start`, or at the first state that is no exit. The problems come kind by kind (no
/// states, no exit, duplicate labels, missing targets, unreachable states, states without a way
/// out), each kind in node order and each problem once. A state that did not declare where it leads
/// may lead anywhere: once a run can enter it, nothing is unreachable, and it always has a way out.
/// An exit that is never reached is no problem. A missing target may be the way out. Without any exit,
/// `NoExit` says it all and no state is blamed for lacking a way out.
///
/// Every `Target::State` and `start` must be an index into `nodes`.
pub fn problems(nodes: &[Node], start: Option<usize>) -> Vec<Problem> {
    let has_exit = nodes.iter().any(|node| node.exit);
    let first = nodes.iter().position(|node| !node.exit);

    let mut found = Vec::new();
    if first.is_none() {
        found.push(Problem::NoStates);
    }
    if !has_exit {
        found.push(Problem::NoExit);
    }
    found.extend(duplicate_labels(nodes));
    found.extend(missing_targets(nodes));
    found.extend(unreachable(nodes, start.or(first)));
    if has_exit {
        found.extend(without_way_out(nodes));
    }
    found
}

fn duplicate_labels(nodes: &[Node]) -> impl Iterator<Item = Problem> {
    let mut seen = HashMap::new();
    nodes.iter().filter_map(move |Node { label, .. }| {
        let count = seen.entry(label.as_str()).or_insert(0_usize);
        *count += 1;
        (*count == 2).then(|| Problem::DuplicateLabel { label: label.clone() })
    })
}

fn missing_targets(nodes: &[Node]) -> Vec<Problem> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for node in nodes {
        for target in targets(node) {
            if let Target::Missing(to) = target
                && seen.insert((&node.label, to))
            {
                found.push(Problem::MissingTarget { from: node.label.clone(), to: to.clone() });
            }
        }
    }
    found
}

fn unreachable(nodes: &[Node], start: Option<usize>) -> Vec<Problem> {
    let mut onward = vec![Vec::new(); nodes.len()];
    for (from, to) in edges(nodes) {
        onward[from].push(to);
    }
    let reached = flood(&onward, start.into_iter().collect());

    let marked = || nodes.iter().zip(&reached);
    if marked().any(|(node, reached)| *reached && leads_anywhere(node)) {
        return Vec::new();
    }
    let is_lost = |&(node, reached): &(&Node, &bool)| !reached && !node.exit;
    marked().filter(is_lost).map(|(node, _)| Problem::Unreachable { state: node.label.clone() }).collect()
}

fn without_way_out(nodes: &[Node]) -> Vec<Problem> {
    let mut back = vec![Vec::new(); nodes.len()];
    for (from, to) in edges(nodes) {
        back[to].push(from);
    }
    // A target that is missing has been reported; it may well be the way out.
    let leads_astray = |node: &Node| targets(node).any(|target| matches!(target, Target::Missing(_)));
    let is_end = |at: &usize| nodes[*at].exit || leads_anywhere(&nodes[*at]) || leads_astray(&nodes[*at]);
    let saved = flood(&back, (0..nodes.len()).filter(is_end).collect());

    let marked = nodes.iter().zip(&saved).filter(|(_, saved)| !**saved);
    marked.map(|(node, _)| Problem::NoWayOut { state: node.label.clone() }).collect()
}

/// What a state says about its successors; an exit has none.
fn targets(node: &Node) -> impl Iterator<Item = &Target> {
    let declared: &[Target] = match &node.next {
        Next::Declared(targets) => targets,
        Next::Undeclared => &[],
    };
    declared.iter().chain(&node.on_error).filter(|_| !node.exit)
}

fn leads_anywhere(node: &Node) -> bool {
    !node.exit && node.next == Next::Undeclared
}

fn edges(nodes: &[Node]) -> impl Iterator<Item = (usize, usize)> {
    nodes.iter().enumerate().flat_map(|(from, node)| {
        targets(node).filter_map(move |target| match target {
            Target::State(to) => Some((from, *to)),
            Target::Missing(_) => None,
        })
    })
}

/// Marks everything that can be reached from `open`. A stack of its own: a chain of states may be
/// longer than ours.
fn flood(neighbours: &[Vec<usize>], mut open: Vec<usize>) -> Vec<bool> {
    let mut marked = vec![false; neighbours.len()];
    while let Some(at) = open.pop() {
        if !marked[at] {
            marked[at] = true;
            open.extend(&neighbours[at]);
        }
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_text_names_the_states() {
        let to = "FAILD".to_owned();
        let missing = Problem::MissingTarget { from: "VALIDATE".to_owned(), to };

        assert_eq!(missing.to_string(), "state VALIDATE leads to FAILD, which is neither registered nor an exit state");
        assert_eq!(
            Problem::NoExit.to_string(),
            "no exit state: the run could never end; add one with add_exit_state()"
        );
    }
}
