//! The queue, its transactions, and what happens when they fail.

use std::fs;
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};

use super::{Folder, NOW, Opened, PATIENCE, append, entry, settings, start, workflow_id};
use crate::core::checkpoint::{Limits, Row};
use crate::core::claim::Fence;
use crate::store::error::{Failure, StoreError};
use crate::store::file::{Trust, prepare};
use crate::store::sqlite::Database;
use crate::store::writer::Writer;
use crate::store::{Answer, Completion, Operation, Store};

/// A writer that delivers a batch only when the test lets it.
struct Gated {
    gate: Sender<()>, // the first to go: then it stands open
    writer: Writer<u32>,
    batches: Receiver<Vec<Completion<u32>>>,
}

impl Gated {
    fn new(database: Database) -> Self {
        let (sender, batches) = mpsc::channel();
        let (gate, opened) = mpsc::channel();
        let deliver = move |batch| {
            let _ = sender.send(batch);
            let _ = opened.recv_timeout(PATIENCE);
        };
        Self { gate, writer: Writer::start(database, deliver).expect("a thread"), batches }
    }

    fn submit(&self, operation: Operation, ticket: u32) {
        self.writer.submit(operation, ticket).expect("open");
    }

    fn batch(&self) -> Vec<(u32, Result<Answer, StoreError>)> {
        let batch = self.batches.recv_timeout(PATIENCE).expect("a batch");
        batch.into_iter().map(|completion| (completion.ticket, completion.outcome)).collect()
    }

    /// What was submitted while the writer stood at the gate, as it comes through in one batch.
    fn next(&self) -> Vec<(u32, Result<Answer, StoreError>)> {
        self.gate.send(()).expect("the writer waits");
        self.batch()
    }
}

fn database(folder: &Folder) -> Database {
    let file = prepare(&folder.file(), Trust::Ours).expect("a file");
    Database::open(&file, "worker-1".to_owned(), Limits::default()).expect("a store")
}

fn large(sequence: u64) -> Row {
    Row { snapshot: Some(vec![0; 1 << 20]), ..entry(sequence) }
}

fn is_full(outcome: &Result<Answer, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Failed { failure: Failure::DiskFull, .. }))
}

#[test]
fn test_all_that_wait_share_a_transaction() {
    let folder = Folder::new();
    let gated = Gated::new(database(&folder));
    gated.submit(start("run-0"), 0);
    assert_eq!(gated.batch(), [(0, Ok(Answer::Claimed(Fence(1))))]);
    // The writer stands at the gate, and the queue fills: refusals in between are nobody else's matter.
    for ticket in 1..=100 {
        gated.submit(start(&format!("run-{}", ticket / 2)), ticket);
    }

    let batch = gated.next();

    assert_eq!(batch.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), (1..=100).collect::<Vec<_>>());
    for (ticket, outcome) in batch {
        assert_eq!(outcome.is_ok(), ticket % 2 == 0, "{ticket}: {outcome:?}"); // 1 meets run-0, 3 meets run-1 of 2
    }
}

#[test]
fn test_operations_of_one_batch_see_each_other() {
    let folder = Folder::new();
    let gated = Gated::new(database(&folder));
    gated.submit(Operation::Renew { until: NOW }, 0);
    gated.batch();
    gated.submit(append("order-1", None, entry(0)), 1);
    gated.submit(append("order-1", None, entry(1)), 2);
    gated.submit(append("order-1", None, entry(1)), 3);
    gated.submit(Operation::Clear { id: workflow_id("order-1"), fence: None, now: NOW }, 4);
    gated.submit(append("order-1", None, entry(0)), 5);

    let done: Vec<bool> = gated.next().iter().map(|(_, outcome)| outcome.is_ok()).collect();

    assert_eq!(done, [true, true, false, true, true]);
}

#[test]
fn test_large_operations_are_spread_over_transactions() {
    let folder = Folder::new();
    let gated = Gated::new(database(&folder));
    gated.submit(Operation::Renew { until: NOW }, 0);
    gated.batch();
    for ticket in 0..20 {
        gated.submit(append(&format!("run-{ticket}"), None, large(0)), ticket);
    }

    assert_eq!(gated.next().len(), 15);
    assert_eq!(gated.next().len(), 5);
}

#[test]
fn test_full_disk_fails_its_transaction_and_no_other() {
    // B29, CK-026
    let folder = Folder::new();
    let database = database(&folder);
    let pages: i64 = database.connection().query_row("PRAGMA page_count", [], |found| found.get(0)).expect("a count");
    database.connection().pragma_update(None, "max_page_count", pages + 40).expect("a limit");
    let gated = Gated::new(database);
    gated.submit(append("run-0", None, entry(0)), 0);
    assert!(gated.batch()[0].1.is_ok());
    for ticket in 1..=3 {
        let row = if ticket == 2 { large(0) } else { entry(0) };
        gated.submit(append(&format!("run-{ticket}"), None, row), ticket);
    }

    let batch = gated.next();
    assert_eq!(batch.len(), 3);
    assert!(batch.iter().all(|(_, outcome)| is_full(outcome)), "{batch:?}");

    // what did not fit is gone without a trace, and the others have room
    gated.submit(append("run-1", None, entry(0)), 4);
    gated.submit(append("run-0", None, entry(1)), 5);
    assert!(gated.next().iter().all(|(_, outcome)| outcome.is_ok()));
    drop(gated);
    let opened = Opened::new(&folder.file());
    assert_eq!(["run-0", "run-1", "run-2"].map(|id| opened.load(id).len()), [2, 1, 0]);
}

#[test]
fn test_writing_goes_on_when_a_full_disk_has_room_again() {
    let folder = Folder::new();
    let is_mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m,mode=0700", "cano"])
        .arg(&folder.0)
        .output()
        .is_ok_and(|output| output.status.success());
    if !is_mounted {
        eprintln!("skipped: a small disk cannot be made here");
        return;
    }
    let ballast = folder.0.join("ballast");
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    opened.append("order-1", fence, entry(0)).expect("written");
    fs::write(&ballast, vec![0; 700 << 10]).expect("room for it");

    let mut sequence = 1;
    let outcome = loop {
        match opened.append("order-1", fence, Row { snapshot: Some(vec![0; 10_000]), ..entry(sequence) }) {
            Ok(_) if sequence < 200 => sequence += 1,
            outcome => break outcome,
        }
    };
    assert!(is_full(&outcome), "{outcome:?} at {sequence}");
    assert_eq!(opened.load("order-1").len() as u64, sequence);

    fs::remove_file(&ballast).expect("room again");
    opened.append("order-1", fence, entry(sequence)).expect("written");
    assert_eq!(opened.load("order-1").len() as u64, sequence + 1);
    drop(opened);
    assert!(Command::new("umount").arg(&folder.0).status().is_ok_and(|status| status.success()));
}

#[test]
fn test_closing_writes_what_was_submitted_and_nothing_else() {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    for run in 0..500 {
        opened.store.submit(append(&format!("run-{run}"), None, entry(0)), run).expect("open");
    }

    opened.store.close();

    assert_eq!(opened.outcomes.try_iter().flatten().filter(|done| done.outcome.is_ok()).count(), 500);
    assert_eq!(opened.store.submit(start("late"), 0), Err(StoreError::Closed));
    assert_eq!(opened.store.load_run(&workflow_id("run-0")), Err(StoreError::Closed));
    opened.store.close();
    assert!(!folder.0.join("runs.db-wal").exists()); // all is in the file itself
    assert_eq!(Opened::new(&folder.file()).load("run-499").len(), 1);
}

#[test]
fn test_writer_outlives_whoever_panics_when_told() {
    let folder = Folder::new();
    let (sender, outcomes) = mpsc::channel();
    let deliver = move |batch: Vec<Completion<bool>>| {
        assert!(batch[0].ticket, "told not to listen");
        sender.send(batch).expect("the test listens");
    };
    let store = Store::open(&folder.file(), settings("worker-1"), deliver).expect("a store");

    store.submit(start("order-1"), false).expect("open");
    store.submit(start("order-2"), true).expect("open");
    store.close();

    assert!(store.load_run(&workflow_id("order-1")).is_err());
    assert!(outcomes.try_iter().count() <= 1); // one, or none if both shared a transaction
    let again = Opened::new(&folder.file());
    assert!(again.ask(start("order-1")).is_err());
    assert!(again.ask(start("order-2")).is_err());
}

#[test]
fn test_store_may_be_closed_by_whom_it_tells() {
    let folder = Folder::new();
    let (sender, receiver) = mpsc::channel::<std::sync::Arc<Store<u32>>>();
    let (told, outcomes) = mpsc::channel();
    let deliver = move |batch: Vec<Completion<u32>>| {
        receiver.recv_timeout(PATIENCE).expect("the store").close();
        told.send(batch.len()).expect("the test listens");
    };
    let store = std::sync::Arc::new(Store::open(&folder.file(), settings("worker-1"), deliver).expect("a store"));
    store.submit(start("order-1"), 0).expect("open");

    sender.send(std::sync::Arc::clone(&store)).expect("the writer waits");

    assert_eq!(outcomes.recv_timeout(PATIENCE), Ok(1));
    assert_eq!(store.submit(start("order-2"), 0), Err(StoreError::Closed));
}
