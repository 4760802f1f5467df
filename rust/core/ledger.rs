//! The runs of a store that keeps them in memory: the rules of `claim`, carried out.
//!
//! An owner lives as long as it says so, and leaves at the end: its leases have no end of their own.

use std::collections::BTreeMap;

use super::checkpoint::{Limits, Row, RowError, WorkflowId};
use super::claim::{Fence, Lease, Refusal, RunFilter, RunStatus, RunSummary, Standing, Usage};

/// The end of a lease that only its owner ends.
const NEVER: u64 = u64::MAX;

#[derive(Debug)]
pub struct Ledger {
    limits: Limits,
    /// The last fence that was drawn.
    drawn: Fence,
    runs: BTreeMap<WorkflowId, Run>,
}

#[derive(Debug)]
struct Run {
    standing: Standing,
    rows: Vec<Row>,
    workflow: String,
    version: u32,
    created_at: u64,
    updated_at: u64,
}

/// Why a row was not added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unwritten {
    Refused(Refusal),
    Row(RowError),
}

impl From<Refusal> for Unwritten {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Ledger {
    pub fn new(limits: Limits) -> Self {
        Self { limits, drawn: Fence(0), runs: BTreeMap::new() }
    }

    /// Claims a run that is not there yet.
    pub fn start(
        &mut self,
        id: &WorkflowId,
        owner: &str,
        workflow: &str,
        version: u32,
        now: u64,
    ) -> Result<Fence, Refusal> {
        if let Some(run) = self.runs.get(id) {
            return Err(run.standing.start(now));
        }
        let fence = self.draw();
        let standing = Standing { lease: Some(lease(owner)), fence, ..Standing::NEW };
        self.runs.insert(id.clone(), Run::new(standing, workflow, version, now));
        Ok(fence)
    }

    /// Claims a run that is there and nobody's.
    pub fn claim(&mut self, id: &WorkflowId, owner: &str, now: u64) -> Result<Fence, Refusal> {
        let status = self.run(id)?.standing.claim(now)?;
        let fence = self.draw();
        let run = self.run(id)?;
        run.standing = Standing { status, lease: Some(lease(owner)), fence, ..run.standing };
        run.updated_at = now;
        Ok(fence)
    }

    /// Adds the next row. Without a fence the run must be nobody's, and begins with its row 0.
    pub fn append(&mut self, id: &WorkflowId, fence: Option<Fence>, row: Row) -> Result<(), Unwritten> {
        let bytes = row.encode(id, &self.limits).map_err(Unwritten::Row)?.len() as u64;
        match (self.runs.get_mut(id), fence) {
            (Some(run), _) => run.append(id, fence, row, bytes, &self.limits),
            (None, Some(_)) => Err(Refusal::Unknown.into()),
            (None, None) => {
                let mut run = Run::new(Standing::NEW, "", row.version, row.recorded_at);
                run.append(id, fence, row, bytes, &self.limits)?;
                self.runs.insert(id.clone(), run);
                Ok(())
            }
        }
    }

    /// Gives up a claim; `after` says what the run is then.
    pub fn release(
        &mut self,
        id: &WorkflowId,
        fence: Fence,
        now: u64,
        after: fn(RunStatus) -> RunStatus,
    ) -> Result<(), Refusal> {
        let run = self.run(id)?;
        run.standing.release(fence)?;
        run.standing.lease = None;
        run.standing.status = after(run.standing.status);
        run.updated_at = now;
        Ok(())
    }

    /// Forgets a run and its rows; fine if there is none.
    pub fn clear(&mut self, id: &WorkflowId, fence: Option<Fence>, now: u64) -> Result<(), Refusal> {
        if let Some(run) = self.runs.get(id) {
            run.standing.clear(fence, now)?;
            self.runs.remove(id);
        }
        Ok(())
    }

    /// Gives up all claims of an owner.
    pub fn leave(&mut self, owner: &str) {
        for run in self.runs.values_mut() {
            if run.standing.lease.as_ref().is_some_and(|lease| lease.owner == owner) {
                run.standing.lease = None;
            }
        }
    }

    /// The rows of a run in ascending order; none if there is no such run.
    pub fn rows(&self, id: &WorkflowId) -> &[Row] {
        self.runs.get(id).map_or(&[], |run| &run.rows)
    }

    /// The runs that the filter lets through, the longest untouched first.
    pub fn list(&self, filter: &RunFilter) -> Vec<RunSummary> {
        let mut found: Vec<_> = self.runs.iter().collect();
        found.retain(|(_, run)| {
            filter.statuses.contains(&run.standing.status) && run.updated_at < filter.updated_before
        });
        found.sort_by_key(|(_, run)| run.updated_at);
        found.into_iter().take(filter.limit as usize).map(|(id, run)| run.summary(id)).collect()
    }

    fn run(&mut self, id: &WorkflowId) -> Result<&mut Run, Refusal> {
        self.runs.get_mut(id).ok_or(Refusal::Unknown)
    }

    fn draw(&mut self) -> Fence {
        self.drawn = Fence(self.drawn.0 + 1);
        self.drawn
    }
}

impl Run {
    fn new(standing: Standing, workflow: &str, version: u32, now: u64) -> Self {
        Self { standing, rows: Vec::new(), workflow: workflow.to_owned(), version, created_at: now, updated_at: now }
    }

    fn append(
        &mut self,
        id: &WorkflowId,
        fence: Option<Fence>,
        row: Row,
        bytes: u64,
        limits: &Limits,
    ) -> Result<(), Unwritten> {
        let status = match self.standing.append(fence, &row, bytes, limits) {
            Err(Refusal::Conflict { sequence, next, .. }) => {
                let is_same = self.rows.contains(&row);
                return Err(Refusal::Conflict { sequence, next, is_same }.into());
            }
            status => status?,
        };
        let mut usage = Usage { rows: self.standing.usage.rows + 1, bytes: self.standing.usage.bytes + bytes };
        if row.replaces() {
            let replaced = self.rows.pop_if(|last| row.takes_place_of(last));
            let replaced = replaced.ok_or(Refusal::Misplaced { sequence: row.sequence })?;
            usage.rows -= 1;
            usage.bytes -= replaced.encode(id, limits).map_err(Unwritten::Row)?.len() as u64;
        }
        let lease = self.standing.lease.take().filter(|_| !status.is_over());
        self.standing = Standing { status, lease, fence: self.standing.fence, next: row.sequence + 1, usage };
        self.version = row.version;
        self.updated_at = row.recorded_at;
        self.rows.push(row);
        Ok(())
    }

    fn summary(&self, id: &WorkflowId) -> RunSummary {
        RunSummary {
            id: id.clone(),
            standing: self.standing.clone(),
            workflow: self.workflow.clone(),
            version: self.version,
            state: self.rows.last().map_or_else(String::new, |row| row.state.clone()),
            created_at: self.created_at,
            updated_at: self.updated_at,
        }
    }
}

fn lease(owner: &str) -> Lease {
    Lease { owner: owner.to_owned(), until: NEVER }
}
