//! The store against the real disk.

mod damage;
mod files;
mod kill;
mod model;
mod operations;
mod speed;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use super::error::StoreError;
use super::file::Trust;
use super::{Answer, Completion, Operation, Settings, Store};
use crate::core::checkpoint::{Limits, Row, RowKind, WorkflowId};
use crate::core::claim::{Fence, Refusal};

const NOW: u64 = 1_764_000_000_000;
const LATER: u64 = NOW + 15_000;
/// Longer than any disk takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder that goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cano-store-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("a new folder");
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("runs.db")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A store whose outcomes can be waited for.
struct Opened {
    store: Store<u32>,
    outcomes: Receiver<Vec<Completion<u32>>>,
}

impl Opened {
    fn new(file: &Path) -> Self {
        Self::of(file, "worker-1")
    }

    fn of(file: &Path, owner: &str) -> Self {
        Self::open(file, settings(owner)).expect("a store")
    }

    fn open(file: &Path, settings: Settings) -> Result<Self, StoreError> {
        let (sender, outcomes) = mpsc::channel();
        let store = Store::open(file, settings, move |batch| sender.send(batch).expect("the test listens"))?;
        Ok(Self { store, outcomes })
    }

    /// Does one operation and waits for it.
    fn ask(&self, operation: Operation) -> Result<Answer, StoreError> {
        self.store.submit(operation, 0)?;
        let mut batch = self.outcomes.recv_timeout(PATIENCE).expect("an outcome");
        assert_eq!(batch.len(), 1);
        batch.remove(0).outcome
    }

    fn start(&self, id: &str) -> Fence {
        fence(self.ask(start(id)))
    }

    fn append(&self, id: &str, fence: Fence, row: Row) -> Result<Answer, StoreError> {
        self.ask(append(id, Some(fence), row))
    }

    fn load(&self, id: &str) -> Vec<Row> {
        self.store.load_run(&workflow_id(id)).expect("rows")
    }
}

fn settings(owner: &str) -> Settings {
    Settings { owner: owner.to_owned(), limits: Limits::default(), trust: Trust::Ours }
}

fn workflow_id(id: &str) -> WorkflowId {
    WorkflowId::new(id).expect("an id")
}

fn entry(sequence: u64) -> Row {
    Row {
        sequence,
        kind: RowKind::StateEntry,
        state: "Order.CHARGE".to_owned(),
        task: "charge".to_owned(),
        visit: 1,
        attempt: 1,
        version: 3,
        fingerprint: 1,
        run_id: [7; 16],
        recorded_at: NOW + sequence,
        next_state: None,
        refers_to: None,
        due_at: None,
        is_intent: false,
        payload: None,
        snapshot: Some(vec![b'x'; 100]),
    }
}

fn start(id: &str) -> Operation {
    Operation::Start { id: workflow_id(id), workflow: "orders".to_owned(), version: 3, now: NOW, until: LATER }
}

fn claim(id: &str, now: u64) -> Operation {
    Operation::Claim { id: workflow_id(id), now, until: now + 15_000 }
}

fn append(id: &str, fence: Option<Fence>, row: Row) -> Operation {
    Operation::Append { id: workflow_id(id), fence, row }
}

fn fence(outcome: Result<Answer, StoreError>) -> Fence {
    match outcome {
        Ok(Answer::Claimed(fence)) => fence,
        other => panic!("no claim: {other:?}"),
    }
}

fn refusal<R: std::fmt::Debug>(outcome: Result<R, StoreError>) -> Refusal {
    match outcome {
        Err(StoreError::Refused { refusal, .. }) => refusal,
        other => panic!("no refusal: {other:?}"),
    }
}

/// The same dice each time.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}
