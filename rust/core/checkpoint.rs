//! What a durable run writes down: rows, one after the other, never changed.
//!
//! Resuming a run is reading its rows. What each part of resuming asks, and which field answers:
//!
//! | question                                          | answer                                                     |
//! |---------------------------------------------------|------------------------------------------------------------|
//! | Where does the run go on?                         | `state` of the last entry; `next_state` of a later row     |
//! | Is this step done?                                | a completion, or a cursor with a `next_state`: it is never |
//! |                                                   | run again                                                  |
//! | Which visit is this, which cursors belong to it?  | `visit`: a state that is entered anew begins the next      |
//! | How often was it tried, does it poison the run?   | `attempt` of the visit's last entry, and how many entries  |
//! |                                                   | the visit has: each resume writes one                      |
//! | How far did a stepped or stream task get?         | `payload` of the visit's last cursor                       |
//! | How long does a timer still wait?                 | `due_at`                                                   |
//! | What would a roll-back undo, and in which order?  | completions and intents, the newest first                  |
//! | Which of it is undone?                            | `refers_to` of each compensated row                        |
//! | Why was it rolled back, what does a person need?  | `payload` of rollback started and needs attention          |
//! | What did the run's own variables hold?            | `snapshot` of the last row that has one                    |
//! | Is it still the same workflow?                    | `version` and `fingerprint` of the last row                |
//! | Is it still the same run, which keys did it use?  | `run_id`: an id that is used again gets a new one          |
//!
//! A cursor that directly follows a cursor of the same visit takes its place: its `refers_to` is the
//! first row that it stands for, and the store may drop the others. So a log grows with the states a
//! run has entered, not with the steps it has made.

use std::fmt;
use std::sync::Arc;

use super::error::Error;

/// Bytes of a state label or of a task's name.
pub const MOST_LABEL: usize = 128;
const MOST_ID: usize = 256;
const MOST_BLOB: i64 = 64 << 20;
const MOST_ROWS: i64 = 1_000_000_000;
const MOST_BYTES: i64 = 1 << 40;
/// The end of the year 9999: what comes after it is no date to SQLite, nor to Python.
pub const MOST_MILLIS: u64 = 253_402_300_799_999;
/// What a signed column of 64 bits holds.
pub const MOST_SEQUENCE: u64 = i64::MAX as u64;

/// The id under which the rows of a run are kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkflowId(Arc<str>);

impl WorkflowId {
    /// A text of 1..=256 bytes that is not blank and holds no control characters.
    pub fn new(id: &str) -> Result<Self, Error> {
        let refused = |rule| Err(Error::Id { id: id.to_owned(), rule });
        if id.trim().is_empty() {
            refused("must not be blank")
        } else if id.len() > MOST_ID {
            refused("must be at most 256 bytes long")
        } else if id.chars().any(char::is_control) {
            refused("must not hold control characters")
        } else {
            Ok(Self(id.into()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkflowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a row tells. The numbers are those of the stored format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RowKind {
    /// An attempt of a visit to a state begins.
    StateEntry = 1,
    /// A compensatable step is done: its output, and where the run goes.
    CompensationCompletion = 2,
    /// How far a stepped or stream task got; with a next state, that it ended.
    StepCursor = 3,
    /// When a timer fires.
    TimerDue = 4,
    /// From here on the run goes backwards.
    RollbackStarted = 5,
    /// One step has been undone.
    Compensated = 6,
    /// The run has reached an exit state, or has been rolled back.
    Finished = 7,
    /// The run cannot go on without a person.
    NeedsAttention = 8,
}

impl RowKind {
    pub const ALL: [Self; 8] = [
        Self::StateEntry,
        Self::CompensationCompletion,
        Self::StepCursor,
        Self::TimerDue,
        Self::RollbackStarted,
        Self::Compensated,
        Self::Finished,
        Self::NeedsAttention,
    ];

    /// The kind as people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::StateEntry => "state entry",
            Self::CompensationCompletion => "compensation completion",
            Self::StepCursor => "step cursor",
            Self::TimerDue => "timer due",
            Self::RollbackStarted => "rollback started",
            Self::Compensated => "compensated",
            Self::Finished => "finished",
            Self::NeedsAttention => "needs attention",
        }
    }

    /// Which of the optional fields a row of this kind has.
    fn fields(self) -> Fields {
        use Presence::{Always, Maybe, Never};
        let [next_state, refers_to, due_at, payload, snapshot] = match self {
            Self::StateEntry | Self::Finished => [Never, Never, Never, Never, Maybe],
            Self::CompensationCompletion => [Always, Never, Never, Always, Maybe],
            Self::StepCursor => [Maybe, Maybe, Never, Always, Maybe],
            Self::TimerDue => [Never, Never, Always, Never, Maybe],
            Self::RollbackStarted | Self::NeedsAttention => [Never, Never, Never, Always, Maybe],
            Self::Compensated => [Never, Always, Never, Never, Never],
        };
        Fields { next_state, refers_to, due_at, payload, snapshot }
    }
}

struct Fields {
    next_state: Presence,
    refers_to: Presence,
    due_at: Presence,
    payload: Presence,
    snapshot: Presence,
}

#[derive(Clone, Copy)]
enum Presence {
    Always,
    Maybe,
    Never,
}

/// One row of a run's log.
///
/// | kind                    | next state | refers to | due at | payload    | snapshot | intent |
/// |-------------------------|------------|-----------|--------|------------|----------|--------|
/// | state entry             | -          | -         | -      | -          | may      | may    |
/// | compensation completion | has        | -         | -      | the output | may      | -      |
/// | step cursor             | may        | may       | -      | the cursor | may      | -      |
/// | timer due               | -          | -         | has    | -          | may      | -      |
/// | rollback started        | -          | -         | -      | the error  | may      | -      |
/// | compensated             | -          | has       | -      | -          | -        | -      |
/// | finished                | -          | -         | -      | -          | may      | -      |
/// | needs attention         | -          | -         | -      | the reason | may      | -      |
///
/// An empty payload or snapshot is there; only `None` is not.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Row {
    /// The place in the log, dense from 0.
    pub sequence: u64,
    pub kind: RowKind,
    /// The label of the state that the row is about; the exit state of a run that finished.
    pub state: String,
    /// The name of the state's task; empty for a split and an exit state.
    pub task: String,
    /// Which entry of the run into this state it is, from 1.
    pub visit: u32,
    /// Which attempt of the visit it is, from 1; of a roll-back, which attempt at it.
    pub attempt: u32,
    /// The workflow's version, 0 if it has none.
    pub version: u32,
    /// A digest of the workflow's name and definition, for those who compare it.
    pub fingerprint: u64,
    /// What tells this run from another one under the same id.
    pub run_id: [u8; 16],
    /// When the row was made, in milliseconds since 1970.
    pub recorded_at: u64,
    /// Where the run goes from here, decided for good.
    pub next_state: Option<String>,
    /// Compensated: the row that was undone. Step cursor: the first row whose place it takes.
    pub refers_to: Option<u64>,
    /// When the timer fires, in milliseconds since 1970.
    pub due_at: Option<u64>,
    /// Whether the step is to be compensated from its entry on, without an output, until its
    /// completion says better.
    pub is_intent: bool,
    /// An output, a cursor, an error or a reason, as the codec wrote it.
    pub payload: Option<Vec<u8>>,
    /// The run's own variables, as the codec wrote them.
    pub snapshot: Option<Vec<u8>>,
}

impl Row {
    /// What is wrong with the row by itself, if anything; fields are named as Python names them.
    pub fn check(&self) -> Result<(), Fault> {
        let fields = self.kind.fields();
        let presences = [
            ("next_state", fields.next_state, self.next_state.is_some()),
            ("refers_to", fields.refers_to, self.refers_to.is_some()),
            ("due_at", fields.due_at, self.due_at.is_some()),
            ("output_blob", fields.payload, self.payload.is_some()),
            ("snapshot", fields.snapshot, self.snapshot.is_some()),
        ];
        for (field, presence, is_there) in presences {
            match presence {
                Presence::Always if !is_there => return Err(Fault::Lacks { kind: self.kind, field }),
                Presence::Never if is_there => return Err(Fault::Has { kind: self.kind, field }),
                Presence::Always | Presence::Maybe | Presence::Never => {}
            }
        }
        if self.is_intent && self.kind != RowKind::StateEntry {
            return Err(Fault::Has { kind: self.kind, field: "is_intent" });
        }
        for (field, label) in
            [("state", Some(&self.state)), ("task_id", Some(&self.task)), ("next_state", self.next_state.as_ref())]
        {
            short(field, label.map_or(0, String::len), MOST_LABEL)?;
        }
        within("visit", self.visit.into(), 1, u32::MAX.into())?;
        within("attempt", self.attempt.into(), 1, u32::MAX.into())?;
        within("sequence", self.sequence, 0, MOST_SEQUENCE)?;
        within("recorded_at", self.recorded_at, 0, MOST_MILLIS)?;
        within("due_at", self.due_at.unwrap_or(0), 0, MOST_MILLIS)?;
        match self.refers_to {
            Some(refers_to) if refers_to >= self.sequence => Err(Fault::Ahead { refers_to }),
            _ => Ok(()),
        }
    }

    /// Whether the row is a cursor that takes the place of another one.
    pub fn replaces(&self) -> bool {
        self.kind == RowKind::StepCursor && self.refers_to.is_some()
    }

    /// Whether the row is a cursor that takes the place of the one directly before it.
    pub fn takes_place_of(&self, previous: &Self) -> bool {
        (self.kind, previous.kind) == (RowKind::StepCursor, RowKind::StepCursor)
            && (self.visit, &self.state, self.run_id) == (previous.visit, &previous.state, previous.run_id)
            && (self.sequence, self.refers_to) == (previous.sequence + 1, Some(previous.first()))
    }

    /// The first place in the log that this row stands for.
    fn first(&self) -> u64 {
        match self.kind {
            RowKind::StepCursor => self.refers_to.unwrap_or(self.sequence),
            RowKind::StateEntry
            | RowKind::CompensationCompletion
            | RowKind::TimerDue
            | RowKind::RollbackStarted
            | RowKind::Compensated
            | RowKind::Finished
            | RowKind::NeedsAttention => self.sequence,
        }
    }
}

fn within(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), Fault> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(Fault::Range { field, value, least, most }) }
}

pub(super) fn short(field: &'static str, length: usize, most: usize) -> Result<(), Fault> {
    if length <= most { Ok(()) } else { Err(Fault::TooLong { field, length, most }) }
}

/// Checks that the rows of a run, in ascending order, are all there and of one run.
///
/// Rows whose place a later cursor has taken may be there or not.
pub fn check_log(id: &WorkflowId, rows: &[Row]) -> Result<(), RowError> {
    let mut next = 0;
    for row in rows {
        let error = |problem| RowError { id: id.clone(), sequence: row.sequence, problem };
        if row.first() > next {
            return Err(RowError { id: id.clone(), sequence: next, problem: Problem::Missing });
        }
        if row.sequence < next {
            return Err(error(Problem::Twice));
        }
        if row.run_id != rows[0].run_id {
            return Err(error(Problem::OtherRun));
        }
        next = row.sequence + 1;
    }
    Ok(())
}

/// How much a run may write; what is above is refused, not cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one payload or snapshot.
    pub blob: usize,
    /// Rows that a run keeps.
    pub rows: u64,
    /// Bytes of these rows together.
    pub bytes: u64,
}

impl Limits {
    /// As much as any store may allow.
    pub const MOST: Self = Self { blob: MOST_BLOB as usize, rows: MOST_ROWS as u64, bytes: MOST_BYTES as u64 };

    /// `blob` 1..=64 MiB, `rows` 1..=1,000,000,000, `bytes` 1..=1 TiB.
    pub fn new(blob: i64, rows: i64, bytes: i64) -> Result<Self, Error> {
        let counted = |name, amount: i64, limit| match u64::try_from(amount) {
            Ok(count) if (1..=limit).contains(&amount) => Ok(count),
            _ => Err(Error::Budget { name, amount, least: 1, limit }),
        };
        Ok(Self {
            blob: counted("max_blob", blob, MOST_BLOB)? as usize,
            rows: counted("max_rows", rows, MOST_ROWS)?,
            bytes: counted("max_bytes", bytes, MOST_BYTES)?,
        })
    }
}

impl Default for Limits {
    /// 2 MiB a payload or snapshot, 50,000 rows and 50 MiB a run.
    fn default() -> Self {
        Self { blob: 2 << 20, rows: 50_000, bytes: 50 << 20 }
    }
}

/// What is wrong with the contents of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    Lacks { kind: RowKind, field: &'static str },
    Has { kind: RowKind, field: &'static str },
    Range { field: &'static str, value: u64, least: u64, most: u64 },
    TooLong { field: &'static str, length: usize, most: usize },
    Ahead { refers_to: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lacks { kind, field } => write!(f, "a {} row needs {field}, got none", kind.name()),
            Self::Has { kind, field } => write!(f, "a {} row has no {field}, got one", kind.name()),
            Self::TooLong { field, length, most } => {
                write!(f, "{field} must be at most {most} bytes long, got {length}")
            }
            Self::Range { field, value, least, most } => {
                write!(f, "{field} must be at least {least} and at most {most}, got {value}")
            }
            Self::Ahead { refers_to } => write!(f, "refers_to must be below sequence, got {refers_to}"),
        }
    }
}

/// A row that is refused: when it is written, when its bytes are read, or where it stands in its
/// log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowError {
    pub id: WorkflowId,
    pub sequence: u64,
    pub problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The row itself breaks a rule.
    Fault(Fault),
    /// The bytes are not what was written.
    Damaged { offset: usize, damage: Damage },
    /// The bytes begin as a row of a format that this version does not know.
    Format { format: u16 },
    /// The log has later rows, and not this one.
    Missing,
    /// The log has the row twice.
    Twice,
    /// The row was written by another run under the same id.
    OtherRun,
}

/// How bytes differ from those of any row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    Magic,
    /// Fewer bytes than any row has.
    Short {
        length: usize,
    },
    Length {
        said: u32,
        length: usize,
    },
    Checksum {
        stored: u32,
        computed: u32,
    },
    Kind(u8),
    Flags(u8),
    Text,
    /// The fields end elsewhere than the row.
    End,
    Sequence(u64),
    Fault(Fault),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("not the beginning of a row"),
            Self::Short { length } => write!(f, "{length} bytes are no row"),
            Self::Length { said, length } => write!(f, "the row says it has {said} bytes, it has {length}"),
            Self::Checksum { stored, computed } => {
                write!(f, "the row says its checksum is {stored:08x}, it is {computed:08x}")
            }
            Self::Kind(kind) => write!(f, "{kind} is no kind of row"),
            Self::Flags(flags) => write!(f, "{flags:#010b} has flags without a meaning"),
            Self::Text => f.write_str("a label is no UTF-8"),
            Self::End => f.write_str("the fields do not end where the row ends"),
            Self::Sequence(sequence) => write!(f, "the row says it is number {sequence}"),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl fmt::Display for RowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, sequence, problem } = self;
        write!(f, "row {sequence} of run {:?} ", id.as_str())?;
        match problem {
            Problem::Fault(fault) => write!(f, "cannot be written: {fault}"),
            Problem::Damaged { offset, damage } => write!(f, "is damaged at byte {offset}: {damage}"),
            Problem::Format { format } => {
                write!(f, "is of format {format}, and this version of cano reads format 1")
            }
            Problem::Missing => f.write_str("is missing"),
            Problem::Twice => f.write_str("is there twice"),
            Problem::OtherRun => f.write_str("was written by another run under the same id"),
        }
    }
}

impl std::error::Error for RowError {}
