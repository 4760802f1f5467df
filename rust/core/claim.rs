//! Who may write the log of a run, and what may follow in it.
//!
//! A run is claimed before its first row, by an owner and under a fence. The owner keeps its lease
//! alive; when it has run out, somebody else may claim the run. Each claim draws a fence that its
//! store has never drawn before, and every write shows the fence it was claimed under: whoever
//! comes back from a long pause finds its fence out of date, and its writes change nothing. So the
//! fence decides, and the lease only says how long to wait. The lease is the owner's, one for all of
//! its runs, and keeping it alive costs one write.
//!
//! | status          | claimed again | rows that may follow, and the status then                     |
//! |-----------------|---------------|---------------------------------------------------------------|
//! | running         | running       | entries, completions, cursors and timers: running             |
//! |                 |               | rollback started: rolling back; finished: finished            |
//! | rolling back    | rolling back  | rollback started and compensated: rolling back                |
//! |                 |               | finished: rolled back                                         |
//! | stopped         | running       | none                                                          |
//! | finished        | no            | none                                                          |
//! | rolled back     | no            | none                                                          |
//! | needs attention | no            | none                                                          |
//!
//! Needs attention may follow where anything may. A run that ends gives up its claim with the row
//! that ends it. Times are milliseconds since 1970, of a clock that all owners share.

use std::fmt;

use super::checkpoint::{Limits, Row, RowKind, WorkflowId};

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunStatus {
    /// It goes forward, or would if its owner lived.
    Running,
    /// It goes backwards, or would.
    RollingBack,
    /// It has failed or was cancelled with nothing to undo, and can be resumed.
    Stopped,
    Finished,
    RolledBack,
    /// It cannot go on without a person.
    NeedsAttention,
}

impl RunStatus {
    pub const ALL: [Self; 6] =
        [Self::Running, Self::RollingBack, Self::Stopped, Self::Finished, Self::RolledBack, Self::NeedsAttention];

    /// The status as people read it, and as it is stored.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::RollingBack => "rolling back",
            Self::Stopped => "stopped",
            Self::Finished => "finished",
            Self::RolledBack => "rolled back",
            Self::NeedsAttention => "needs attention",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }

    /// Whether nothing follows any more.
    pub fn is_over(self) -> bool {
        match self {
            Self::Running | Self::RollingBack | Self::Stopped => false,
            Self::Finished | Self::RolledBack | Self::NeedsAttention => true,
        }
    }

    /// The status once a run that its owner gives up is to be resumed by nobody but who asks for it.
    #[must_use]
    pub fn stopped(self) -> Self {
        match self {
            Self::Running => Self::Stopped,
            Self::RollingBack | Self::Stopped | Self::Finished | Self::RolledBack | Self::NeedsAttention => self,
        }
    }

    /// The status when a row of this kind follows, or none if it may not.
    pub fn after(self, kind: RowKind) -> Option<Self> {
        match (self, kind) {
            (
                Self::Running,
                RowKind::StateEntry | RowKind::CompensationCompletion | RowKind::StepCursor | RowKind::TimerDue,
            ) => Some(Self::Running),
            (Self::Running, RowKind::RollbackStarted)
            | (Self::RollingBack, RowKind::RollbackStarted | RowKind::Compensated) => Some(Self::RollingBack),
            (Self::Running, RowKind::Finished) => Some(Self::Finished),
            (Self::RollingBack, RowKind::Finished) => Some(Self::RolledBack),
            (Self::Running | Self::RollingBack, RowKind::NeedsAttention) => Some(Self::NeedsAttention),
            (Self::Running, RowKind::Compensated)
            | (
                Self::RollingBack,
                RowKind::StateEntry | RowKind::CompensationCompletion | RowKind::StepCursor | RowKind::TimerDue,
            )
            | (Self::Stopped | Self::Finished | Self::RolledBack | Self::NeedsAttention, _) => None,
        }
    }
}

/// The number that a claim is made under; a store never draws one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(pub u64);

/// Who owns a run, and until when nobody else may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub owner: String,
    pub until: u64,
}

/// How much a run has written and still keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub rows: u64,
    pub bytes: u64,
}

/// What a store knows of a run besides its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub status: RunStatus,
    pub lease: Option<Lease>,
    /// Under which the run was last claimed; 0 if it never was.
    pub fence: Fence,
    /// The sequence of the next row.
    pub next: u64,
    pub usage: Usage,
}

impl Standing {
    /// A run that nobody has claimed and that has no rows.
    pub const NEW: Self =
        Self { status: RunStatus::Running, lease: None, fence: Fence(0), next: 0, usage: Usage { rows: 0, bytes: 0 } };

    /// Why a run that is there already cannot begin.
    pub fn start(&self, now: u64) -> Refusal {
        match self.alive(now) {
            Some(lease) => Refusal::Claimed(lease.clone()),
            None => Refusal::Exists(self.status),
        }
    }

    /// The status of the run once it is claimed, if it may be.
    pub fn claim(&self, now: u64) -> Result<RunStatus, Refusal> {
        if let Some(lease) = self.alive(now) {
            return Err(Refusal::Claimed(lease.clone()));
        }
        match self.status {
            RunStatus::Running | RunStatus::Stopped => Ok(RunStatus::Running),
            RunStatus::RollingBack => Ok(RunStatus::RollingBack),
            RunStatus::Finished | RunStatus::RolledBack | RunStatus::NeedsAttention => Err(Refusal::Over(self.status)),
        }
    }

    /// The status after this row of so many bytes, if it may be written.
    ///
    /// Without a fence the run must be nobody's. The order of the questions is part of the answer:
    /// whoever has lost the run learns that and nothing else, and a row that is there already is a
    /// conflict even if it was the last one.
    pub fn append(&self, fence: Option<Fence>, row: &Row, bytes: u64, limits: &Limits) -> Result<RunStatus, Refusal> {
        if fence.is_some_and(|fence| fence != self.fence) {
            return Err(self.lost());
        }
        if row.sequence < self.next {
            return Err(Refusal::Conflict { sequence: row.sequence, next: self.next, is_same: false });
        }
        if self.status.is_over() {
            return Err(Refusal::Over(self.status));
        }
        if fence.is_some() != self.lease.is_some() {
            return Err(self.lost());
        }
        let Some(status) = self.status.after(row.kind) else {
            return Err(Refusal::OutOfPlace { status: self.status, kind: row.kind });
        };
        if row.sequence > self.next {
            return Err(Refusal::Gap { sequence: row.sequence, next: self.next });
        }
        // What a cursor takes the place of is not subtracted: the limit is met a row early.
        if self.usage.rows >= limits.rows {
            return Err(Refusal::Full { what: "rows", limit: limits.rows });
        }
        if self.usage.bytes + bytes > limits.bytes {
            return Err(Refusal::Full { what: "bytes", limit: limits.bytes });
        }
        Ok(status)
    }

    /// Whether the holder of the fence still owns the run, to give it up.
    pub fn release(&self, fence: Fence) -> Result<(), Refusal> {
        if fence == self.fence && self.lease.is_some() { Ok(()) } else { Err(self.lost()) }
    }

    /// Whether the run may be forgotten: by its owner, by the owner it had when it ended, or without
    /// a fence if it is nobody's now.
    pub fn clear(&self, fence: Option<Fence>, now: u64) -> Result<(), Refusal> {
        match fence {
            Some(fence) if fence == self.fence => Ok(()),
            Some(_) => Err(self.lost()),
            None => self.alive(now).map_or(Ok(()), |lease| Err(Refusal::Claimed(lease.clone()))),
        }
    }

    fn alive(&self, now: u64) -> Option<&Lease> {
        self.lease.as_ref().filter(|lease| lease.until > now)
    }

    fn lost(&self) -> Refusal {
        match &self.lease {
            Some(lease) => Refusal::Claimed(lease.clone()),
            None => Refusal::Unclaimed,
        }
    }
}

/// Which runs to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFilter {
    pub statuses: Vec<RunStatus>,
    /// Runs whose last write is older than this.
    pub updated_before: u64,
    pub limit: u32,
}

/// A run as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSummary {
    pub id: WorkflowId,
    pub standing: Standing,
    /// The workflow's name; empty if the run was begun without a claim.
    pub workflow: String,
    /// The workflow's version, as of the last row.
    pub version: u32,
    /// The state of the last row; empty before the first.
    pub state: String,
    pub created_at: u64,
    pub updated_at: u64,
}

/// Why a store did not do what it was asked; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The run is somebody else's.
    Claimed(Lease),
    /// The claim has been given up or taken back, and nobody has claimed the run since.
    Unclaimed,
    /// There is no such run.
    Unknown,
    /// A run of this id is there already.
    Exists(RunStatus),
    /// The run is over.
    Over(RunStatus),
    /// A row of this sequence is there already; `is_same`: with the same bytes.
    Conflict { sequence: u64, next: u64, is_same: bool },
    /// A row before this one is not there yet.
    Gap { sequence: u64, next: u64 },
    /// No row of this kind may follow.
    OutOfPlace { status: RunStatus, kind: RowKind },
    /// What the row says it takes the place of is not what stands before it.
    Misplaced { sequence: u64 },
    /// The run has written as much as it may.
    Full { what: &'static str, limit: u64 },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claimed(Lease { owner, until }) => write!(f, "is claimed by {owner:?} until {until} ms since 1970"),
            Self::Unclaimed => f.write_str("is not claimed any more"),
            Self::Unknown => f.write_str("is not there"),
            Self::Exists(status) => write!(f, "is there already and is {}: resume or discard it", status.name()),
            Self::Over(status) => write!(f, "is over: it is {}", status.name()),
            Self::Conflict { sequence, next, is_same: false } => {
                write!(f, "has another row {sequence} already; the next is {next}")
            }
            Self::Conflict { sequence, next, is_same: true } => {
                write!(f, "has this row {sequence} already; the next is {next}")
            }
            Self::Gap { sequence, next } => write!(f, "cannot have row {sequence} yet; the next is {next}"),
            Self::OutOfPlace { status, kind } => {
                write!(f, "is {}: no {} row may follow", status.name(), kind.name())
            }
            Self::Misplaced { sequence } => {
                write!(f, "has no cursor of the same visit before row {sequence} that it could take the place of")
            }
            Self::Full { what, limit } => write!(f, "has as many {what} as it may, {limit}"),
        }
    }
}
