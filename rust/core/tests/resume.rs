//! What a resume reads out of the rows of a run.

use super::checkpoint::row;
use crate::core::checkpoint::{Row, RowKind};
use crate::core::resume::{Position, Resumption, Undo};

/// A log under construction.
#[derive(Default)]
struct Log(Vec<Row>);

impl Log {
    fn add(mut self, kind: RowKind, state: &str, visit: u32, change: impl FnOnce(&mut Row)) -> Self {
        let mut row = row(kind, self.0.len() as u64, state, "task");
        row.visit = visit;
        change(&mut row);
        self.0.push(row);
        self
    }

    fn entry(self, state: &str, visit: u32) -> Self {
        self.add(RowKind::StateEntry, state, visit, |_| {})
    }

    fn done(self, state: &str, visit: u32, output: &str, next: &str) -> Self {
        self.add(RowKind::CompensationCompletion, state, visit, |row| {
            row.payload = Some(output.as_bytes().to_vec());
            row.next_state = Some(next.to_owned());
        })
    }

    fn cursor(self, state: &str, visit: u32, cursor: &str, next: Option<&str>) -> Self {
        self.add(RowKind::StepCursor, state, visit, |row| {
            row.payload = Some(cursor.as_bytes().to_vec());
            row.next_state = next.map(str::to_owned);
        })
    }

    fn read(&self) -> Resumption {
        Resumption::of(&self.0, |_| true).expect("rows")
    }
}

fn again(state: &str, visit: u32, start: u32) -> Position {
    Position::Again { state: state.to_owned(), visit, start, cursor: None, due_at: None }
}

fn next(state: &str) -> Position {
    Position::Next { state: state.to_owned() }
}

fn states(found: &Resumption) -> Vec<String> {
    found.to_undo.iter().map(|undo| format!("{}{}", undo.state, undo.visit)).collect()
}

#[test]
fn test_nothing_is_read_from_no_rows() {
    assert_eq!(Resumption::of(&[], |_| true), None);
}

#[test]
fn test_state_of_the_last_entry_is_entered_again_in_its_visit() {
    // RS-001, RS-002, RS-013
    let found = Log::default().entry("A", 1).entry("B", 1).entry("A", 2).read();

    assert_eq!(found.position, again("A", 2, 2));
    assert_eq!(found.next, 3);
    assert_eq!(found.path, ["A", "B"]);
    assert_eq!((found.visits["A"], found.visits["B"]), (1, 1));
}

#[test]
fn test_each_resume_of_a_visit_is_one_more_start() {
    let found = Log::default().entry("A", 1).entry("B", 1).entry("B", 1).entry("B", 1).read();

    assert_eq!(found.position, again("B", 1, 4));
    assert_eq!(found.path, ["A"]);
}

#[test]
fn test_step_that_is_done_leads_on() {
    // RS-018; B03: not RS-020
    let found = Log::default().entry("A", 1).done("A", 1, "1", "B").read();

    assert_eq!(found.position, next("B"));
    assert_eq!(found.path, ["A"]);
    assert_eq!(found.visits["A"], 1);
    let undo =
        Undo { sequence: 1, state: "A".to_owned(), task: "task".to_owned(), visit: 1, output: Some(b"1".to_vec()) };
    assert_eq!(found.to_undo, [undo]);
}

#[test]
fn test_cursor_belongs_to_its_visit() {
    // B05: not RS-022
    let looped = Log::default().entry("A", 1).cursor("A", 1, "7", None).entry("B", 1).entry("A", 2);
    assert_eq!(looped.read().position, again("A", 2, 2));

    let Position::Again { cursor, .. } = looped.cursor("A", 2, "1", None).entry("A", 2).read().position else {
        panic!("a visit goes on")
    };
    assert_eq!(cursor, Some(b"1".to_vec()));
}

#[test]
fn test_cursor_that_says_what_follows_ends_its_visit() {
    // B39
    let found = Log::default().entry("A", 1).cursor("A", 1, "7", Some("B")).read();

    assert_eq!(found.position, next("B"));
}

#[test]
fn test_timer_keeps_its_due_time() {
    // G09
    let found = Log::default().entry("A", 1).add(RowKind::TimerDue, "A", 1, |row| row.due_at = Some(17)).read();
    let Position::Again { due_at, .. } = found.position else { panic!("a visit goes on") };
    assert_eq!(due_at, Some(17));
}

#[test]
fn test_roll_back_goes_on_with_what_is_left() {
    // B02
    let log = Log::default()
        .entry("A", 1)
        .done("A", 1, "1", "B")
        .entry("B", 1)
        .done("B", 1, "2", "C")
        .entry("C", 1)
        .add(RowKind::RollbackStarted, "C", 1, |row| row.payload = Some(b"why".to_vec()));
    let found = log.read();
    let reason = b"why".to_vec();
    assert_eq!(found.position, Position::RollBack { state: "C".to_owned(), start: 2, reason: reason.clone() });
    assert_eq!(states(&found), ["A1", "B1"]);

    let log = log.add(RowKind::Compensated, "B", 1, |row| row.refers_to = Some(3)).add(
        RowKind::RollbackStarted,
        "C",
        1,
        |row| row.payload = Some(b"why".to_vec()),
    );
    let found = log.read();
    assert_eq!(found.position, Position::RollBack { state: "C".to_owned(), start: 3, reason });
    assert_eq!(states(&found), ["A1"]);

    let found = log.add(RowKind::Finished, "C", 1, |_| {}).read();
    assert_eq!(found.position, Position::RolledBack { state: "C".to_owned() });
}

#[test]
fn test_intent_stands_until_its_completion() {
    // G08
    let intent = || Log::default().add(RowKind::StateEntry, "A", 1, |row| row.is_intent = true);
    let found = intent().read();
    assert_eq!(found.to_undo.iter().map(|undo| &undo.output).collect::<Vec<_>>(), [&None]);

    let found = intent().add(RowKind::StateEntry, "A", 1, |row| row.is_intent = true).read();
    assert_eq!(states(&found), ["A1"]);

    let found = intent().done("A", 1, "1", "B").read();
    assert_eq!(found.to_undo.iter().map(|undo| undo.output.clone()).collect::<Vec<_>>(), [Some(b"1".to_vec())]);
}

#[test]
fn test_run_that_is_over() {
    // RS-004
    let log = Log::default().entry("A", 1).add(RowKind::Finished, "END", 1, |_| {});
    assert_eq!(log.read().position, Position::Finished { state: "END".to_owned() });

    let log =
        Log::default().entry("A", 1).add(RowKind::NeedsAttention, "A", 1, |row| row.payload = Some(b"!".to_vec()));
    let reason = b"!".to_vec();
    assert_eq!(log.read().position, Position::NeedsAttention { state: "A".to_owned(), reason });
}

#[test]
fn test_newest_snapshot_counts() {
    let log = Log::default()
        .add(RowKind::StateEntry, "A", 1, |row| row.snapshot = Some(b"1".to_vec()))
        .add(RowKind::StateEntry, "B", 1, |row| row.snapshot = Some(b"2".to_vec()))
        .cursor("B", 1, "7", None);

    assert_eq!(log.read().snapshot, Some(b"2".to_vec()));
}

#[test]
fn test_state_that_does_not_last_sends_back_to_the_step_before() {
    let log = Log::default().entry("A", 1).entry("SPLIT", 1).entry("JOINED", 1).entry("JOINED", 1);
    let found = Resumption::of(&log.0, |state| state != "JOINED").expect("rows");

    assert_eq!(found.position, again("SPLIT", 1, 2));
    assert_eq!(found.next, 4);
    assert_eq!(found.path, ["A"]);
    assert!(!found.visits.contains_key("JOINED"));
}

#[test]
fn test_state_that_does_not_last_is_taken_back_each_time() {
    // G16
    let lasts = |state: &str| state != "JOIN";
    let killed = Log::default().entry("A", 1).entry("B", 1).entry("JOIN", 1).entry("B", 1).entry("JOIN", 1);

    let found = Resumption::of(&killed.0, lasts).expect("rows");
    assert_eq!(found.position, again("B", 1, 3));
    assert_eq!((found.next, found.path), (5, vec!["A".to_owned()]));
    assert_eq!((found.visits["B"], found.visits.get("JOIN")), (0, None));

    let found = Resumption::of(&killed.entry("C", 1).0, lasts).expect("rows");
    assert_eq!(found.path, ["A", "B", "JOIN"]);
    assert_eq!((found.visits["B"], found.visits["JOIN"]), (1, 1));
}

#[test]
fn test_ten_thousand_rows_are_read_in_one_go() {
    // RS-023; the time is measured in benches/test_checkpoints.py
    let log = (1..=5_000).fold(Log::default(), |log, visit| log.entry("A", visit).entry("B", visit));
    let found = log.read();

    assert_eq!(found.position, again("B", 5_000, 2));
    assert_eq!((found.visits["A"], found.path.len()), (5_000, 9_999));
}
