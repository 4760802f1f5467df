//! Keeps the logs of durable runs in an SQLite file.
//!
//! Writes go through one thread, many in one transaction (`writer`); reads have a connection of
//! their own and block the caller, who calls them where blocking is fine. What is stored is decided
//! in `core` (`checkpoint`, `format`, `claim`); here it is carried out. Nothing here reads a clock:
//! times are arguments.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::{mem, process};

use crate::core::checkpoint::{Limits, Row, WorkflowId};
use crate::core::claim::{Fence, RunFilter, RunSummary, Usage};

pub mod error;

pub mod file;

mod connection;

mod reader;

mod sqlite;

mod writer;

use error::{OpenReason, StoreError};
use file::{Presence, Trust};
use reader::Reader;
use sqlite::Database;
use writer::Writer;

#[cfg(test)]
mod tests;

/// Something to be written. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Claims a run that is not there yet, until the owner's lease ends.
    Start { id: WorkflowId, workflow: String, version: u32, now: u64, until: u64 },
    /// Claims a run that is there and nobody's, or whose owner's lease has run out.
    Claim { id: WorkflowId, now: u64, until: u64 },
    /// Adds the next row. Without a fence the run must be nobody's, and begins with its row 0.
    Append { id: WorkflowId, fence: Option<Fence>, row: Row },
    /// Moves the end of the owner's lease, for all of its runs; never to an earlier time.
    Renew { until: u64 },
    /// Gives up a claim: whoever looks for runs to resume may have this one at once.
    Release { id: WorkflowId, fence: Fence, now: u64 },
    /// Gives up a claim for good: the run has failed, and is resumed by those who ask for it only.
    Stop { id: WorkflowId, fence: Fence, now: u64 },
    /// Forgets a run and its rows; fine if there is none. Without a fence it must be nobody's.
    Clear { id: WorkflowId, fence: Option<Fence>, now: u64 },
}

impl Operation {
    /// About how many bytes it writes.
    fn size(&self) -> usize {
        match self {
            Self::Append { row, .. } => {
                let length = |blob: &Option<Vec<u8>>| blob.as_ref().map_or(0, Vec::len);
                256 + length(&row.payload) + length(&row.snapshot)
            }
            Self::Start { .. }
            | Self::Claim { .. }
            | Self::Renew { .. }
            | Self::Release { .. }
            | Self::Stop { .. }
            | Self::Clear { .. } => 256,
        }
    }
}

/// What came of an operation that was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Claimed(Fence),
    /// The row is on the disk; what the run keeps with it, for those who warn before a limit.
    Appended(Usage),
    Done,
}

/// A ticket that comes back. Other than `Failed`, an error leaves everything as it was.
#[derive(Debug)]
pub struct Completion<T> {
    pub ticket: T,
    pub outcome: Result<Answer, StoreError>,
}

/// How a store is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Who claims what is claimed through this store; unique among all that are open.
    pub owner: String,
    pub limits: Limits,
    pub trust: Trust,
}

/// An open store. Tickets are the caller's: they are handed in with an operation and come back with
/// its outcome.
pub struct Store<T> {
    writer: Writer<T>,
    reader: Mutex<Option<Reader>>,
    process: u32,
}

impl<T: Send + 'static> Store<T> {
    /// Opens the store, and creates it, with mode 0600, if there is no file.
    ///
    /// `deliver` is called in the store's own thread, once for each transaction, with the tickets of
    /// its operations in order.
    pub fn open(
        path: &Path,
        settings: Settings,
        deliver: impl FnMut(Vec<Completion<T>>) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let open = || {
            let file = file::prepare(path, settings.trust)?;
            let presence = Presence::new(&file)?;
            let database = Database::open(&file, settings.owner, settings.limits)?;
            let reader = Reader::new(connection::open_to_read(&file)?, presence);
            let writer = Writer::start(database, deliver)?;
            Ok(Self { writer, reader: Mutex::new(Some(reader)), process: process::id() })
        };
        open().map_err(|reason: OpenReason| StoreError::Open { path: path.to_owned(), reason })
    }
}

impl<T> Store<T> {
    /// Submits an operation and returns at once. An error here is the outcome, and the ticket is
    /// dropped.
    pub fn submit(&self, operation: Operation, ticket: T) -> Result<(), StoreError> {
        if self.is_inherited() {
            return Err(StoreError::Forked);
        }
        self.writer.submit(operation, ticket)
    }

    /// The rows of a run in ascending order, complete and undamaged; none if there is no such run.
    pub fn load_run(&self, id: &WorkflowId) -> Result<Vec<Row>, StoreError> {
        self.read(|reader| reader.load_run(id))
    }

    /// The runs that the filter lets through, the longest untouched first.
    pub fn list_runs(&self, filter: &RunFilter) -> Result<Vec<RunSummary>, StoreError> {
        self.read(|reader| reader.list_runs(filter))
    }

    /// Writes what was submitted, gives up all claims, and lets go of the file. Closing again, or
    /// from `deliver`, does nothing that was not done.
    pub fn close(&self) {
        if !self.is_inherited() {
            self.writer.close();
            self.reader.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// Whether this is a child of the process that opened the store.
    fn is_inherited(&self) -> bool {
        self.process != process::id()
    }

    fn read<R>(&self, question: impl FnOnce(&mut Reader) -> Result<R, StoreError>) -> Result<R, StoreError> {
        if self.is_inherited() {
            return Err(StoreError::Forked);
        }
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        question(reader.as_mut().ok_or(StoreError::Closed)?)
    }
}

impl<T> Drop for Store<T> {
    fn drop(&mut self) {
        if self.is_inherited() {
            // The thread is not here, and closing the file would meddle with that of the parent.
            self.writer.forget();
            mem::forget(self.reader.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        } else {
            self.close();
        }
    }
}
