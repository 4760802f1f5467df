//! What the rows of a run say about how it goes on.
//!
//! Read once, in order, in time and memory that grow with the rows. Nothing is decided here that the rows do not say:
//! whether the workflow is still the one that wrote them is for whoever knows both.

use std::collections::HashMap;

use super::checkpoint::{Row, RowKind};

/// Where a run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Position {
    /// In the visit that it was in: the state is entered again, for the `start`-th time.
    Again { state: String, visit: u32, start: u32, cursor: Option<Vec<u8>>, due_at: Option<u64> },
    /// In a new visit: what led there is done for good.
    Next { state: String },
    /// Backwards, for the `start`-th time; the payload of the row that began it says why.
    RollBack { state: String, start: u32, reason: Vec<u8> },
    /// Nowhere: it reached this exit state.
    Finished { state: String },
    /// Nowhere: everything has been undone.
    RolledBack { state: String },
    /// Nowhere, until a person has looked at it.
    NeedsAttention { state: String, reason: Vec<u8> },
}

/// A step that a roll-back has to undo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undo {
    /// The row that a compensated row refers to.
    pub sequence: u64,
    pub state: String,
    pub task: String,
    pub visit: u32,
    /// None where the step may have begun, and nobody knows how it ended.
    pub output: Option<Vec<u8>>,
}

/// All that a resume takes from a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumption {
    pub position: Position,
    /// The sequence of the next row.
    pub next: u64,
    /// The states entered, oldest first; without the one that is entered again.
    pub path: Vec<String>,
    /// How often each state was entered; without the visit that goes on.
    pub visits: HashMap<String, u32>,
    /// Oldest first.
    pub to_undo: Vec<Undo>,
    /// The run's own variables.
    pub snapshot: Option<Vec<u8>>,
}

impl Resumption {
    /// Reads rows that `check_log` let through; none if there are none.
    ///
    /// A state that does not last takes what only the step before it can give, so that step is done again: the rows
    /// since then count for their numbers alone.
    pub fn of(rows: &[Row], lasts: impl Fn(&str) -> bool) -> Option<Self> {
        let next = rows.last()?.sequence + 1;
        let is_step = |row: &Row| row.kind == RowKind::StateEntry && lasts(&row.state);
        let mut valid: Vec<&Row> = Vec::with_capacity(rows.len());
        for row in rows {
            if is_step(row) {
                drop_undone(&mut valid, row, is_step);
            }
            valid.push(row);
        }
        let found = Self::read_all(&valid)?;
        let Position::Again { state, .. } = &found.position else { return Some(Self { next, ..found }) };
        if lasts(state) {
            return Some(Self { next, ..found });
        }
        let step = valid.iter().rposition(|row| is_step(row)).unwrap_or(0);
        Some(Self { next, ..Self::read_all(&valid[..=step])? })
    }

    fn read_all(rows: &[&Row]) -> Option<Self> {
        let last = rows.last()?;
        let mut found = Self {
            position: Position::Next { state: last.state.clone() },
            next: last.sequence + 1,
            path: Vec::new(),
            visits: HashMap::new(),
            to_undo: Vec::new(),
            snapshot: None,
        };
        for row in rows {
            found.read(row);
        }
        if let Position::Again { state, visit, .. } = &found.position {
            found.path.pop();
            found.visits.insert(state.clone(), visit - 1);
        }
        Some(found)
    }

    fn read(&mut self, row: &Row) {
        if row.snapshot.is_some() {
            self.snapshot.clone_from(&row.snapshot);
        }
        let payload = || row.payload.clone().unwrap_or_default();
        match row.kind {
            RowKind::StateEntry => self.enter(row),
            RowKind::CompensationCompletion => {
                self.to_undo.retain(|undo| undo.output.is_some() || !is_of(undo, row));
                self.to_undo.push(undo(row, row.payload.clone()));
                self.lead_on(row);
            }
            RowKind::StepCursor => {
                if let Position::Again { cursor, .. } = &mut self.position {
                    cursor.clone_from(&row.payload);
                }
                self.lead_on(row);
            }
            RowKind::TimerDue => {
                if let Position::Again { due_at, .. } = &mut self.position {
                    *due_at = row.due_at;
                }
            }
            RowKind::RollbackStarted => {
                let start = match &self.position {
                    Position::RollBack { start, .. } => start + 1,
                    _ => 2,
                };
                self.position = Position::RollBack { state: row.state.clone(), start, reason: payload() };
            }
            RowKind::Compensated => self.to_undo.retain(|undo| Some(undo.sequence) != row.refers_to),
            RowKind::Finished => {
                let state = row.state.clone();
                self.position = if let Position::RollBack { .. } = self.position {
                    Position::RolledBack { state }
                } else {
                    Position::Finished { state }
                };
            }
            RowKind::NeedsAttention => {
                self.position = Position::NeedsAttention { state: row.state.clone(), reason: payload() };
            }
        }
    }

    /// The run enters a state, or a resume enters it again.
    fn enter(&mut self, row: &Row) {
        let is_known = |position: &Position| matches!(position, Position::Again { state, visit, .. } if (state, visit) == (&row.state, &row.visit));
        if is_known(&self.position) {
            if let Position::Again { start, .. } = &mut self.position {
                *start += 1;
            }
            return;
        }
        self.path.push(row.state.clone());
        self.visits.insert(row.state.clone(), row.visit);
        if row.is_intent {
            self.to_undo.push(undo(row, None));
        }
        let (state, visit) = (row.state.clone(), row.visit);
        self.position = Position::Again { state, visit, start: 2, cursor: None, due_at: None };
    }

    /// What the row is about is done, if it says what follows.
    fn lead_on(&mut self, row: &Row) {
        if let Some(state) = &row.next_state {
            self.position = Position::Next { state: state.clone() };
        }
    }
}

/// A step that is begun again takes back the states since then that did not last.
fn drop_undone(valid: &mut Vec<&Row>, again: &Row, is_step: impl Fn(&Row) -> bool) {
    let Some(step) = valid.iter().rposition(|row| is_step(row)) else { return };
    if (&valid[step].state, valid[step].visit) != (&again.state, again.visit) {
        return;
    }
    let since = valid[step + 1..].iter().position(|row| row.kind == RowKind::StateEntry);
    if let Some(since) = since {
        valid.truncate(step + 1 + since);
    }
}

fn undo(row: &Row, output: Option<Vec<u8>>) -> Undo {
    Undo { sequence: row.sequence, state: row.state.clone(), task: row.task.clone(), visit: row.visit, output }
}

fn is_of(undo: &Undo, row: &Row) -> bool {
    (&undo.state, undo.visit) == (&row.state, row.visit)
}
