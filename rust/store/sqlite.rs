//! The writing connection: doing a batch of operations in one transaction.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};

use super::connection::{self, number, standing};
use super::error::{OpenReason, StoreError};
use super::{Answer, Operation};
use crate::core::checkpoint::{Limits, Row, WorkflowId};
use crate::core::claim::{Fence, Refusal, RunStatus, Standing, Usage};

/// The connection that writes.
pub(super) struct Database {
    connection: Connection,
    owner: String,
    limits: Limits,
}

/// Why one operation of a batch was not done, or why none of the batch can be.
enum Stop {
    This(StoreError),
    All(rusqlite::Error),
}

impl From<rusqlite::Error> for Stop {
    fn from(error: rusqlite::Error) -> Self {
        Self::All(error)
    }
}

impl Database {
    /// Opens a file that `file::prepare` has looked at, and makes it a store if it is empty.
    pub fn open(file: &Path, owner: String, limits: Limits) -> Result<Self, OpenReason> {
        Ok(Self { connection: connection::open(file)?, owner, limits })
    }

    /// Does all operations in one transaction; one outcome each, in order.
    ///
    /// An operation that is refused changes nothing, and the others are done. If SQLite fails, none
    /// is done, and each has that error.
    pub fn commit(&mut self, operations: &[Operation]) -> Vec<Result<Answer, StoreError>> {
        self.transaction(operations).unwrap_or_else(|error| {
            self.roll_back();
            vec![Err(error.into()); operations.len()]
        })
    }

    /// Leaves no transaction open, whatever happened.
    pub fn roll_back(&mut self) {
        if !self.connection.is_autocommit() {
            // Without a connection that works, the next BEGIN reports it.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
    }

    /// Gives up all claims of this owner; what fails here is left to the leases.
    pub fn leave(&mut self) {
        let _ = self.connection.execute("UPDATE runs SET owner = NULL WHERE owner = ?", [&self.owner]);
        let _ = self.connection.execute("DELETE FROM owners WHERE owner = ?", [&self.owner]);
    }

    #[cfg(test)]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    fn transaction(&self, operations: &[Operation]) -> rusqlite::Result<Vec<Result<Answer, StoreError>>> {
        self.execute("BEGIN IMMEDIATE", [])?;
        let mut outcomes = Vec::with_capacity(operations.len());
        for operation in operations {
            outcomes.push(match self.apply(operation) {
                Ok(answer) => Ok(answer),
                Err(Stop::This(error)) => Err(error),
                Err(Stop::All(error)) => return Err(error),
            });
        }
        self.execute("COMMIT", [])?;
        Ok(outcomes)
    }

    fn apply(&self, operation: &Operation) -> Result<Answer, Stop> {
        match operation {
            Operation::Start { id, workflow, version, now, until } => self.start(id, workflow, *version, *now, *until),
            Operation::Claim { id, now, until } => self.claim(id, *now, *until),
            Operation::Append { id, fence, row } => self.append(id, *fence, row),
            Operation::Renew { until } => {
                self.renew(*until)?;
                Ok(Answer::Done)
            }
            Operation::Release { id, fence, now } => self.release(id, *fence, *now, |status| status),
            Operation::Stop { id, fence, now } => self.release(id, *fence, *now, RunStatus::stopped),
            Operation::Clear { id, fence, now } => self.clear(id, *fence, *now),
        }
    }

    fn start(&self, id: &WorkflowId, workflow: &str, version: u32, now: u64, until: u64) -> Result<Answer, Stop> {
        if let Some((_, standing)) = self.known(id)? {
            return Err(refused(id, standing.start(now)));
        }
        let fence = self.draw()?;
        self.renew(until)?;
        self.insert(id, Some(&self.owner), fence, workflow, version, now)?;
        Ok(Answer::Claimed(fence))
    }

    fn claim(&self, id: &WorkflowId, now: u64, until: u64) -> Result<Answer, Stop> {
        let (run, standing) = self.known(id)?.ok_or_else(|| refused(id, Refusal::Unknown))?;
        let status = standing.claim(now).map_err(|refusal| refused(id, refusal))?;
        let fence = self.draw()?;
        self.renew(until)?;
        self.execute(
            "UPDATE runs SET status = ?, owner = ?, fence = ?, updated_at = ? WHERE run = ?",
            params![status.name(), self.owner, number(fence.0), number(now), run],
        )?;
        Ok(Answer::Claimed(fence))
    }

    fn append(&self, id: &WorkflowId, fence: Option<Fence>, row: &Row) -> Result<Answer, Stop> {
        let bytes = row.encode(id, &self.limits).map_err(|error| Stop::This(error.into()))?;
        let (run, standing) = match (self.known(id)?, fence) {
            (Some((run, standing)), _) => (Some(run), standing),
            (None, Some(_)) => return Err(refused(id, Refusal::Unknown)),
            (None, None) => (None, Standing::NEW),
        };
        let status = match standing.append(fence, row, bytes.len() as u64, &self.limits) {
            Ok(status) => status,
            Err(Refusal::Conflict { sequence, next, .. }) => {
                let is_same = self.row(id, sequence)?.is_some_and(|stored| stored == bytes);
                return Err(refused(id, Refusal::Conflict { sequence, next, is_same }));
            }
            Err(refusal) => return Err(refused(id, refusal)),
        };
        let run = match run {
            Some(run) => run,
            None => self.insert(id, None, Fence(0), "", row.version, row.recorded_at)?,
        };
        let replaced = self.replace(id, run, row)?;
        let usage = Usage {
            rows: standing.usage.rows + 1 - replaced.rows,
            bytes: standing.usage.bytes + bytes.len() as u64 - replaced.bytes,
        };
        self.execute(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                run,
                number(row.sequence),
                row.kind.name(),
                row.state,
                row.task,
                row.visit,
                row.attempt,
                row.next_state,
                number(row.recorded_at),
                bytes
            ],
        )?;
        // A column that an index knows costs something even if it stays as it is.
        self.execute(
            "UPDATE runs SET next_sequence = ?, kept_rows = ?, kept_bytes = ?, state = ?, version = ?, updated_at = ?
             WHERE run = ?",
            params![
                number(row.sequence + 1),
                number(usage.rows),
                number(usage.bytes),
                row.state,
                row.version,
                number(row.recorded_at),
                run
            ],
        )?;
        if status != standing.status {
            self.execute(
                "UPDATE runs SET status = ?1, owner = iif(?2, NULL, owner) WHERE run = ?3",
                params![status.name(), status.is_over(), run],
            )?;
        }
        Ok(Answer::Appended(usage))
    }

    /// Drops the cursor whose place the row takes, and says how much that was.
    fn replace(&self, id: &WorkflowId, run: i64, row: &Row) -> Result<Usage, Stop> {
        if !row.replaces() {
            return Ok(Usage::default());
        }
        let previous = row.sequence - 1; // it refers to a row below it
        let bytes = self.row(id, previous)?.unwrap_or_default();
        let cursor = Row::decode(id, previous, &bytes).ok().filter(|cursor| row.takes_place_of(cursor));
        if cursor.is_none() {
            return Err(refused(id, Refusal::Misplaced { sequence: row.sequence }));
        }
        self.execute("DELETE FROM rows WHERE run = ? AND sequence = ?", params![run, number(previous)])?;
        Ok(Usage { rows: 1, bytes: bytes.len() as u64 })
    }

    fn release(
        &self,
        id: &WorkflowId,
        fence: Fence,
        now: u64,
        after: fn(RunStatus) -> RunStatus,
    ) -> Result<Answer, Stop> {
        let (run, standing) = self.known(id)?.ok_or_else(|| refused(id, Refusal::Unknown))?;
        standing.release(fence).map_err(|refusal| refused(id, refusal))?;
        self.execute(
            "UPDATE runs SET status = ?, owner = NULL, updated_at = ? WHERE run = ?",
            params![after(standing.status).name(), number(now), run],
        )?;
        Ok(Answer::Done)
    }

    fn clear(&self, id: &WorkflowId, fence: Option<Fence>, now: u64) -> Result<Answer, Stop> {
        if let Some((run, standing)) = self.known(id)? {
            standing.clear(fence, now).map_err(|refusal| refused(id, refusal))?;
            self.execute("DELETE FROM rows WHERE run = ?", [run])?;
            self.execute("DELETE FROM runs WHERE run = ?", [run])?;
        }
        Ok(Answer::Done)
    }

    fn renew(&self, until: u64) -> rusqlite::Result<()> {
        self.execute(
            "INSERT INTO owners VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET lease_until = ?2 WHERE lease_until < ?2",
            params![self.owner, number(until)],
        )
    }

    fn draw(&self) -> rusqlite::Result<Fence> {
        let mut statement = self.connection.prepare_cached("UPDATE fences SET last = last + 1 RETURNING last")?;
        statement.query_row([], |found| found.get(0)).map(|last: i64| Fence(last.cast_unsigned()))
    }

    fn insert(
        &self,
        id: &WorkflowId,
        owner: Option<&str>,
        fence: Fence,
        workflow: &str,
        version: u32,
        now: u64,
    ) -> rusqlite::Result<i64> {
        self.execute(
            "INSERT INTO runs VALUES (NULL, ?1, 'running', ?2, ?3, ?4, ?5, '', 0, 0, 0, ?6, ?6)",
            params![id.as_str(), owner, number(fence.0), workflow, version, number(now)],
        )?;
        Ok(self.connection.last_insert_rowid())
    }

    /// The number of the run in the tables, and its standing.
    fn known(&self, id: &WorkflowId) -> Result<Option<(i64, Standing)>, Stop> {
        let mut statement = self.connection.prepare_cached(
            "SELECT status, runs.owner, lease_until, fence, next_sequence, kept_rows, kept_bytes, run
             FROM runs LEFT JOIN owners USING (owner) WHERE workflow_id = ?",
        )?;
        match statement.query_row([id.as_str()], |found| Ok((found.get("run")?, standing(found)?))).optional() {
            // What is wrong with one run is no failure of the others.
            Err(error @ rusqlite::Error::FromSqlConversionFailure(..)) => Err(Stop::This(error.into())),
            known => Ok(known?),
        }
    }

    fn row(&self, id: &WorkflowId, sequence: u64) -> rusqlite::Result<Option<Vec<u8>>> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT row FROM rows JOIN runs USING (run) WHERE workflow_id = ? AND sequence = ?")?;
        statement.query_row(params![id.as_str(), number(sequence)], |found| found.get(0)).optional()
    }

    fn execute(&self, sql: &str, params: impl rusqlite::Params) -> rusqlite::Result<()> {
        self.connection.prepare_cached(sql)?.execute(params).map(drop)
    }
}

fn refused(id: &WorkflowId, refusal: Refusal) -> Stop {
    Stop::This(StoreError::Refused { id: id.clone(), refusal })
}
