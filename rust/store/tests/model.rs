//! The store against a model that keeps everything in plain lists.

use std::collections::BTreeMap;

use super::{Dice, Folder, NOW, entry, workflow_id};
use crate::core::checkpoint::{Limits, Row, RowKind};
use crate::core::claim::RunFilter;
use crate::core::claim::{Fence, Refusal, RunStatus};
use crate::store::connection::open_to_read;
use crate::store::error::StoreError;
use crate::store::file::{Presence, Trust, prepare};
use crate::store::reader::Reader;
use crate::store::sqlite::Database;
use crate::store::{Answer, Operation};

const OWNERS: usize = 3;
const ROUNDS: usize = 150;
const BATCH: usize = 40;

#[derive(Default)]
struct Model {
    runs: BTreeMap<String, Run>,
    leases: [u64; OWNERS],
    fences: u64,
}

struct Run {
    status: &'static str,
    owner: Option<usize>,
    fence: u64,
    next: u64,
    rows: Vec<Row>,
}

impl Model {
    /// What the store should say, in a word or two.
    fn apply(&mut self, owner: usize, operation: &Operation) -> String {
        match operation {
            Operation::Start { id, now, until, .. } => {
                if let Some(run) = self.runs.get(id.as_str()) {
                    return if self.is_alive(run, *now) { "claimed" } else { "exists" }.to_owned();
                }
                let run = Run { status: "running", owner: None, fence: 0, next: 0, rows: Vec::new() };
                self.runs.insert(id.as_str().to_owned(), run);
                self.take(owner, id.as_str(), *until)
            }
            Operation::Claim { id, now, until } => match self.runs.get(id.as_str()) {
                None => "unknown".to_owned(),
                Some(run) if self.is_alive(run, *now) => "claimed".to_owned(),
                Some(run) if run.is_over() => "over".to_owned(),
                Some(_) => self.take(owner, id.as_str(), *until),
            },
            Operation::Append { id, fence, row } => {
                let new = Run { status: "running", owner: None, fence: 0, next: 0, rows: Vec::new() };
                if fence.is_some() && !self.runs.contains_key(id.as_str()) {
                    return "unknown".to_owned();
                }
                let mut run = self.runs.remove(id.as_str()).unwrap_or(new);
                let said = run.append(*fence, row);
                if run.next > 0 || run.fence > 0 {
                    self.runs.insert(id.as_str().to_owned(), run);
                }
                said
            }
            Operation::Renew { until } => {
                self.leases[owner] = self.leases[owner].max(*until);
                "done".to_owned()
            }
            Operation::Release { id, fence, .. } | Operation::Stop { id, fence, .. } => {
                let stops = matches!(operation, Operation::Stop { .. });
                match self.runs.get_mut(id.as_str()) {
                    None => "unknown".to_owned(),
                    Some(run) if run.fence != fence.0 || run.owner.is_none() => run.lost(),
                    Some(run) => {
                        run.owner = None;
                        if stops && run.status == "running" {
                            run.status = "stopped";
                        }
                        "done".to_owned()
                    }
                }
            }
            Operation::Clear { id, fence, now } => {
                match self.runs.get(id.as_str()) {
                    Some(run) if fence.is_some_and(|fence| fence.0 != run.fence) => return run.lost(),
                    Some(run) if fence.is_none() && self.is_alive(run, *now) => return "claimed".to_owned(),
                    _ => {}
                }
                self.runs.remove(id.as_str());
                "done".to_owned()
            }
        }
    }

    fn is_alive(&self, run: &Run, now: u64) -> bool {
        run.owner.is_some_and(|owner| self.leases[owner] > now)
    }

    fn take(&mut self, owner: usize, id: &str, until: u64) -> String {
        self.fences += 1;
        self.leases[owner] = self.leases[owner].max(until);
        let run = self.runs.get_mut(id).expect("a run");
        (run.owner, run.fence) = (Some(owner), self.fences);
        if run.status == "stopped" {
            run.status = "running";
        }
        format!("fence {}", self.fences)
    }
}

impl Run {
    fn is_over(&self) -> bool {
        ["finished", "rolled back", "needs attention"].contains(&self.status)
    }

    fn lost(&self) -> String {
        if self.owner.is_some() { "claimed" } else { "unclaimed" }.to_owned()
    }

    fn append(&mut self, fence: Option<Fence>, row: &Row) -> String {
        if fence.is_some_and(|fence| fence.0 != self.fence) {
            return self.lost();
        }
        if row.sequence < self.next {
            return if self.rows.contains(row) { "same" } else { "conflict" }.to_owned();
        }
        if self.is_over() {
            return "over".to_owned();
        }
        if fence.is_some() != self.owner.is_some() {
            return self.lost();
        }
        let is_forward = ["state entry", "step cursor", "finished"].contains(&row.kind.name());
        self.status = match (self.status, row.kind.name()) {
            ("running", "finished") => "finished",
            ("rolling back", "finished") => "rolled back",
            ("running" | "rolling back", "needs attention") => "needs attention",
            ("running" | "rolling back", "rollback started") => "rolling back",
            ("running", _) if is_forward => "running",
            _ => return "out of place".to_owned(),
        };
        if row.sequence > self.next {
            return "gap".to_owned(); // never with a change of status: see `some_row`
        }
        if row.refers_to.is_some() {
            let before = self.rows.last().filter(|last| last.kind == RowKind::StepCursor);
            let first = before.map(|last| last.refers_to.unwrap_or(last.sequence));
            if first.is_none() || first != row.refers_to || before.map(|last| last.visit) != Some(row.visit) {
                return "misplaced".to_owned();
            }
            self.rows.pop();
        }
        self.rows.push(row.clone());
        self.next += 1;
        if self.is_over() {
            self.owner = None;
        }
        format!("{} rows", self.rows.len())
    }
}

fn said(outcome: &Result<Answer, StoreError>) -> String {
    let word = match outcome {
        Ok(Answer::Claimed(fence)) => return format!("fence {}", fence.0),
        Ok(Answer::Appended(usage)) => return format!("{} rows", usage.rows),
        Ok(Answer::Done) => "done",
        Err(StoreError::Refused { refusal, .. }) => match refusal {
            Refusal::Claimed(_) => "claimed",
            Refusal::Unclaimed => "unclaimed",
            Refusal::Unknown => "unknown",
            Refusal::Exists(_) => "exists",
            Refusal::Over(_) => "over",
            Refusal::Conflict { is_same: true, .. } => "same",
            Refusal::Conflict { is_same: false, .. } => "conflict",
            Refusal::Gap { .. } => "gap",
            Refusal::OutOfPlace { .. } => "out of place",
            Refusal::Misplaced { .. } => "misplaced",
            Refusal::Full { .. } => "full",
        },
        Err(other) => panic!("{other}"),
    };
    word.to_owned()
}

/// A row that follows, most of the time.
fn some_row(dice: &mut Dice, run: Option<&Run>) -> Row {
    let next = run.map_or(0, |run| run.next);
    let last = run.and_then(|run| run.rows.last());
    match dice.below(20) {
        0 => entry(next + 1),
        1 if next > 0 => entry(next - 1),
        2 if next > 0 => run.and_then(|run| run.rows.last()).expect("a row").clone(),
        3 => Row { kind: RowKind::RollbackStarted, payload: Some(Vec::new()), ..entry(next) },
        4 => Row { kind: RowKind::Finished, ..entry(next) },
        5 => Row { kind: RowKind::NeedsAttention, payload: Some(Vec::new()), ..entry(next) },
        6..12 => {
            let first = last.filter(|last| last.kind == RowKind::StepCursor);
            let first = first.map(|last| last.refers_to.unwrap_or(last.sequence));
            let refers_to = if dice.below(6) == 0 { next.checked_sub(1) } else { first };
            let visit = 1 + u32::from(dice.below(6) == 0);
            Row { kind: RowKind::StepCursor, refers_to, visit, payload: Some(vec![1; 9]), ..entry(next) }
        }
        _ => entry(next),
    }
}

fn some_operation(dice: &mut Dice, model: &Model, now: u64) -> Operation {
    let id = format!("run-{}", dice.below(6));
    let run = model.runs.get(&id);
    let held = run.map_or(0, |run| run.fence);
    let fence = Fence(if dice.below(8) == 0 { held.saturating_sub(1) } else { held });
    let until = now + 50;
    let id = workflow_id(&id);
    match dice.below(40) {
        0..4 => Operation::Start { id, workflow: "orders".to_owned(), version: 3, now, until },
        4..8 => Operation::Claim { id, now, until },
        8 => Operation::Renew { until },
        9 => Operation::Release { id, fence, now },
        10 => Operation::Stop { id, fence, now },
        11 => Operation::Clear { id, fence: (dice.below(2) == 0).then_some(fence), now },
        _ => {
            let fence = if held == 0 || dice.below(12) == 0 { None } else { Some(fence) };
            Operation::Append { id, fence, row: some_row(dice, run) }
        }
    }
}

#[test]
fn test_store_agrees_with_the_model() {
    let folder = Folder::new();
    let file = prepare(&folder.file(), Trust::Ours).expect("a file");
    let open = |owner| Database::open(&file, format!("worker-{owner}"), Limits::default()).expect("a store");
    let mut databases: Vec<Database> = (0..OWNERS).map(open).collect();
    let presence = Presence::new(&file).expect("not forked");
    let mut reader = Reader::new(open_to_read(&file).expect("a reader"), presence);
    let mut dice = Dice::new();
    let mut model = Model::default();
    let mut now = NOW;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..ROUNDS {
        let owner = dice.below(OWNERS);
        let mut batch = Vec::new();
        let mut expected = Vec::new();
        for _ in 0..BATCH {
            now += dice.below(8) as u64;
            let operation = some_operation(&mut dice, &model, now);
            expected.push(model.apply(owner, &operation));
            batch.push(operation);
        }

        let outcomes = databases[owner].commit(&batch);

        for ((operation, outcome), expected) in batch.iter().zip(&outcomes).zip(expected) {
            assert_eq!(said(outcome), expected, "round {round}: {operation:?}");
            let word = expected.split(' ').next_back().unwrap_or_default().to_owned();
            *seen.entry(word).or_default() += 1;
        }
        for (id, run) in &model.runs {
            assert_eq!(reader.load_run(&workflow_id(id)).as_ref(), Ok(&run.rows), "round {round}: {id}");
        }
    }

    let filter = RunFilter { statuses: RunStatus::ALL.to_vec(), updated_before: u64::MAX, limit: 100 };
    let listed = reader.list_runs(&filter).expect("a list");
    assert_eq!(listed.len(), model.runs.len());
    for summary in listed {
        let run = &model.runs[summary.id.as_str()];
        let bytes = |row: &Row| row.encode(&summary.id, &Limits::default()).expect("a row").len() as u64;
        assert_eq!(summary.standing.status.name(), run.status);
        assert_eq!((summary.standing.fence.0, summary.standing.next), (run.fence, run.next));
        assert_eq!(summary.standing.usage.rows, run.rows.len() as u64);
        assert_eq!(summary.standing.usage.bytes, run.rows.iter().map(bytes).sum::<u64>());
        let lease = run.owner.map(|owner| (format!("worker-{owner}"), model.leases[owner]));
        assert_eq!(summary.standing.lease.map(|lease| (lease.owner, lease.until)), lease);
    }
    for word in ["claimed", "unclaimed", "unknown", "exists", "over", "same", "conflict", "gap", "place", "misplaced"] {
        assert!(seen.contains_key(word), "{word} was never said: {seen:?}");
    }
}
