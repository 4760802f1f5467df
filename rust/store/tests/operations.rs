//! What each operation does, and refuses.

use std::sync::Barrier;
use std::thread;

use rusqlite::Connection;

use super::{Folder, LATER, NOW, Opened, append, claim, entry, fence, refusal, settings, start, workflow_id};
use crate::core::checkpoint::{Limits, Row, RowKind};
use crate::core::claim::{Fence, Lease, Refusal, RunStatus, Usage};
use crate::core::claim::{RunFilter, RunSummary};
use crate::store::error::{Failure, StoreError};
use crate::store::{Answer, Operation, Settings};

fn all() -> RunFilter {
    RunFilter { statuses: RunStatus::ALL.to_vec(), updated_before: u64::MAX, limit: 100 }
}

fn lease(owner: &str, until: u64) -> Lease {
    Lease { owner: owner.to_owned(), until }
}

fn list(opened: &Opened) -> Vec<RunSummary> {
    opened.store.list_runs(&all()).expect("a list")
}

fn status(opened: &Opened) -> RunStatus {
    list(opened)[0].standing.status
}

#[test]
fn test_rows_come_back_as_they_were_written() {
    // CK-010, CK-014, CK-016
    let folder = Folder::new();
    let rows = [
        entry(0),
        Row {
            kind: RowKind::CompensationCompletion,
            payload: Some(vec![0xff; 70_000]),
            next_state: Some("Order.SHIP".to_owned()),
            ..entry(1)
        },
        Row { kind: RowKind::Finished, task: String::new(), snapshot: None, ..entry(2) },
    ];
    {
        let opened = Opened::new(&folder.file());
        let fence = opened.start("order-1");
        for row in &rows {
            opened.append("order-1", fence, row.clone()).expect("written");
        }
        assert_eq!(opened.load("order-1"), rows);
    }

    assert_eq!(Opened::new(&folder.file()).load("order-1"), rows);
}

#[test]
fn test_runs_do_not_meet() {
    // CK-013, CK-023
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fences = ["order-1", "order-2"].map(|id| opened.start(id));
    for sequence in 0..3 {
        for (id, fence) in ["order-1", "order-2"].into_iter().zip(fences) {
            opened.append(id, fence, Row { task: id.to_owned(), ..entry(sequence) }).expect("written");
        }
    }

    let clear = |id, fence| opened.ask(Operation::Clear { id: workflow_id(id), fence, now: NOW });
    assert_eq!(clear("order-1", Some(fences[0])), Ok(Answer::Done));
    assert_eq!(clear("nobody", None), Ok(Answer::Done));

    assert_eq!(opened.load("order-1"), []);
    assert_eq!(opened.load("nobody"), []);
    assert_eq!(opened.load("order-2").len(), 3);
    assert!(opened.load("order-2").iter().all(|row| row.task == "order-2"));
}

#[test]
fn test_row_is_written_once() {
    // CK-012
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    opened.append("order-1", fence, entry(0)).expect("written");

    let other = opened.append("order-1", fence, Row { attempt: 2, ..entry(0) });
    assert_eq!(refusal(other), Refusal::Conflict { sequence: 0, next: 1, is_same: false });
    // an answer was lost, and the row is sent again
    assert_eq!(
        refusal(opened.append("order-1", fence, entry(0))),
        Refusal::Conflict { sequence: 0, next: 1, is_same: true }
    );
    assert_eq!(refusal(opened.append("order-1", fence, entry(2))), Refusal::Gap { sequence: 2, next: 1 });
    assert!(opened.append("order-1", fence, entry(1)).is_ok());
    assert_eq!(opened.load("order-1"), [entry(0), entry(1)]);
}

#[test]
fn test_append_without_a_claim_makes_a_run_of_nobody() {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());

    assert_eq!(refusal(opened.ask(append("order-1", None, entry(1)))), Refusal::Gap { sequence: 1, next: 0 });
    assert_eq!(list(&opened), []);
    for sequence in 0..2 {
        assert!(opened.ask(append("order-1", None, entry(sequence))).is_ok());
    }
    assert_eq!(opened.load("order-1").len(), 2);
    let fence = fence(opened.ask(claim("order-1", NOW)));
    let claimed = Refusal::Claimed(lease("worker-1", LATER));
    assert_eq!(refusal(opened.ask(append("order-1", None, entry(2)))), claimed);
    assert!(opened.append("order-1", fence, entry(2)).is_ok());
}

#[test]
fn test_run_in_the_store_is_not_begun_again() {
    // CK-025, B20
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    let finished = Row { kind: RowKind::Finished, ..entry(0) };

    assert_eq!(refusal(opened.ask(start("order-1"))), Refusal::Claimed(lease("worker-1", LATER)));
    opened.append("order-1", fence, finished.clone()).expect("written");
    assert_eq!(refusal(opened.ask(start("order-1"))), Refusal::Exists(RunStatus::Finished));
    assert_eq!(refusal(opened.ask(claim("order-1", NOW))), Refusal::Over(RunStatus::Finished));
    assert_eq!(opened.load("order-1"), [finished]);
}

#[test]
fn test_loser_of_a_claim_changes_nothing() {
    // B01
    let folder = Folder::new();
    let paused = Opened::of(&folder.file(), "worker-1");
    let next = Opened::of(&folder.file(), "worker-2");
    let lost = paused.start("order-1");
    paused.append("order-1", lost, entry(0)).expect("written");

    let early = Refusal::Claimed(lease("worker-1", LATER));
    assert_eq!(refusal(next.ask(claim("order-1", LATER - 1))), early);
    let won = fence(next.ask(claim("order-1", LATER)));
    assert!(won > lost);

    let loser = Refusal::Claimed(lease("worker-2", LATER + 15_000));
    let id = || workflow_id("order-1");
    assert_eq!(refusal(paused.append("order-1", lost, entry(1))), loser);
    assert_eq!(refusal(paused.append("order-1", lost, entry(0))), loser);
    for operation in [
        Operation::Release { id: id(), fence: lost, now: LATER },
        Operation::Stop { id: id(), fence: lost, now: LATER },
        Operation::Clear { id: id(), fence: Some(lost), now: LATER },
        Operation::Clear { id: id(), fence: None, now: LATER },
    ] {
        assert_eq!(refusal(paused.ask(operation)), loser);
    }
    assert_eq!(next.load("order-1"), [entry(0)]);
    assert!(next.append("order-1", won, entry(1)).is_ok());
}

#[test]
fn test_owner_renews_all_its_leases_at_once() {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    for id in ["order-1", "order-2"] {
        opened.start(id);
    }

    opened.ask(Operation::Renew { until: LATER + 60_000 }).expect("renewed");
    opened.ask(Operation::Renew { until: LATER }).expect("renewed"); // late, and without effect

    for run in list(&opened) {
        assert_eq!(run.standing.lease, Some(lease("worker-1", LATER + 60_000)));
    }
}

#[test]
fn test_claim_that_is_given_up_is_free_at_once() {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let id = || workflow_id("order-1");
    let first = opened.start("order-1");

    opened.ask(Operation::Release { id: id(), fence: first, now: NOW }).expect("released");
    assert_eq!(status(&opened), RunStatus::Running);
    assert_eq!(refusal(opened.append("order-1", first, entry(0))), Refusal::Unclaimed);

    let second = fence(opened.ask(claim("order-1", NOW)));
    opened.ask(Operation::Stop { id: id(), fence: second, now: NOW }).expect("stopped");
    assert_eq!(status(&opened), RunStatus::Stopped);

    let third = fence(opened.ask(claim("order-1", NOW)));
    assert_eq!(status(&opened), RunStatus::Running);
    assert!(first < second && second < third);
}

#[test]
fn test_fences_never_go_back() {
    let folder = Folder::new();
    let stale = {
        let opened = Opened::new(&folder.file());
        let fence = opened.start("order-1");
        opened.ask(Operation::Clear { id: workflow_id("order-1"), fence: Some(fence), now: NOW }).expect("cleared");
        fence
    };
    let opened = Opened::new(&folder.file());

    let fresh = opened.start("order-1");

    assert!(fresh > stale);
    let claimed = Refusal::Claimed(lease("worker-1", LATER));
    assert_eq!(refusal(opened.append("order-1", stale, entry(0))), claimed);
    assert_eq!(refusal(opened.append("nobody", stale, entry(0))), Refusal::Unknown);
    assert_eq!(refusal(opened.ask(claim("nobody", NOW))), Refusal::Unknown);
}

#[test]
fn test_status_and_claim_follow_the_rows() {
    // B02, B28
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    let row = |sequence, kind| {
        let payload = (kind == RowKind::RollbackStarted).then(|| b"{}".to_vec());
        let refers_to = (kind == RowKind::Compensated).then_some(0);
        let snapshot = None;
        opened.append("order-1", fence, Row { kind, refers_to, payload, snapshot, ..entry(sequence) })
    };

    row(0, RowKind::StateEntry).expect("written");
    row(1, RowKind::RollbackStarted).expect("written");
    assert_eq!(status(&opened), RunStatus::RollingBack);
    let forward = Refusal::OutOfPlace { status: RunStatus::RollingBack, kind: RowKind::StateEntry };
    assert_eq!(refusal(row(2, RowKind::StateEntry)), forward);
    row(2, RowKind::Compensated).expect("written");
    row(3, RowKind::Finished).expect("written");
    assert_eq!(status(&opened), RunStatus::RolledBack);
    assert_eq!(list(&opened)[0].standing.lease, None);
    assert_eq!(refusal(row(4, RowKind::StateEntry)), Refusal::Over(RunStatus::RolledBack));
    assert_eq!(refusal(row(3, RowKind::Finished)), Refusal::Conflict { sequence: 3, next: 4, is_same: true });
}

#[test]
fn test_cursor_takes_the_place_of_those_before_it() {
    // B41, ST-004
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    let cursor = |sequence, refers_to| Row {
        kind: RowKind::StepCursor,
        refers_to,
        payload: Some(b"4096".to_vec()),
        snapshot: None,
        ..entry(sequence)
    };
    let mut usage = Vec::new();
    for row in [entry(0), cursor(1, None), cursor(2, Some(1)), cursor(3, Some(1)), entry(4)] {
        match opened.append("order-1", fence, row) {
            Ok(Answer::Appended(now)) => usage.push(now.rows),
            other => panic!("{other:?}"),
        }
    }

    assert_eq!(usage, [1, 2, 2, 2, 3]);
    assert_eq!(opened.load("order-1"), [entry(0), cursor(3, Some(1)), entry(4)]);
    let bytes = [entry(0), cursor(3, Some(1)), entry(4)]
        .map(|row| row.encode(&workflow_id("order-1"), &Limits::default()).expect("a row").len() as u64);
    assert_eq!(list(&opened)[0].standing.usage, Usage { rows: 3, bytes: bytes.iter().sum() });
    let misplaced = Refusal::Misplaced { sequence: 5 };
    for refers_to in [0, 1, 3, 4] {
        assert_eq!(refusal(opened.append("order-1", fence, cursor(5, Some(refers_to)))), misplaced);
    }
    assert_eq!(opened.load("order-1").len(), 3);
    opened.append("order-1", fence, cursor(5, None)).expect("written");
    let next_visit = Row { visit: 2, ..cursor(6, Some(5)) };
    assert_eq!(refusal(opened.append("order-1", fence, next_visit)), Refusal::Misplaced { sequence: 6 }); // B05
}

#[test]
fn test_limits_hold() {
    // G06
    let folder = Folder::new();
    let limits = Limits::new(200, 2, 1_000_000).expect("limits");
    let opened = Opened::open(&folder.file(), Settings { limits, ..settings("worker-1") }).expect("a store");
    let fence = opened.start("order-1");
    let append =
        |sequence, size| opened.append("order-1", fence, Row { snapshot: Some(vec![0; size]), ..entry(sequence) });

    assert!(matches!(append(0, 201), Err(StoreError::Row(_))));
    assert!(append(0, 200).is_ok());
    assert!(append(1, 200).is_ok());
    assert_eq!(refusal(append(2, 0)), Refusal::Full { what: "rows", limit: 2 });
    assert_eq!(opened.load("order-1").len(), 2);
}

#[test]
fn test_runs_are_listed_by_status_and_age() {
    // B42
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    for (id, age) in [("young", 0), ("old", 2_000), ("older", 3_000)] {
        let fence = opened.start(id);
        opened.append(id, fence, Row { recorded_at: NOW - age, ..entry(0) }).expect("written");
        if id == "old" {
            opened.ask(Operation::Stop { id: workflow_id(id), fence, now: NOW - age }).expect("stopped");
        }
    }
    let ids = |filter: &RunFilter| -> Vec<String> {
        let runs = opened.store.list_runs(filter).expect("a list");
        runs.iter().map(|run| run.id.to_string()).collect()
    };

    assert_eq!(ids(&all()), ["older", "old", "young"]);
    assert_eq!(ids(&RunFilter { updated_before: NOW - 2_000, ..all() }), ["older"]);
    assert_eq!(ids(&RunFilter { statuses: vec![RunStatus::Running], ..all() }), ["older", "young"]);
    assert_eq!(ids(&RunFilter { statuses: vec![], ..all() }), [""; 0]);
    assert_eq!(ids(&RunFilter { limit: 1, ..all() }), ["older"]);
    let run = &list(&opened)[0];
    assert_eq!((run.workflow.as_str(), run.version, run.state.as_str()), ("orders", 3, "Order.CHARGE"));
    assert_eq!((run.created_at, run.updated_at, run.standing.next), (NOW, NOW - 3_000, 1));
}

#[test]
fn test_one_of_many_claims_wins() {
    // B01, CK-024
    let folder = Folder::new();
    Opened::new(&folder.file()).ask(append("order-1", None, entry(0))).expect("written");
    let racers: Vec<_> = (0..8).map(|owner| Opened::of(&folder.file(), &format!("worker-{owner}"))).collect();
    let together = Barrier::new(8);

    let outcomes: Vec<_> = thread::scope(|scope| {
        let race = |racer: Opened| {
            let together = &together;
            scope.spawn(move || {
                together.wait();
                (racer.ask(claim("order-1", NOW)), racer)
            })
        };
        let racing: Vec<_> = racers.into_iter().map(race).collect();
        let ended: Vec<_> = racing.into_iter().map(|racer| racer.join().expect("an outcome")).collect();
        ended.into_iter().map(|(outcome, _)| outcome).collect() // nobody leaves before all have asked
    });

    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    for outcome in outcomes {
        assert!(outcome.is_ok() || matches!(refusal(outcome), Refusal::Claimed(_)));
    }
}

#[test]
fn test_appends_of_many_threads_all_land() {
    // CK-015, CK-017
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fences: Vec<Fence> = (0..16).map(|run| opened.start(&format!("run-{run}"))).collect();

    thread::scope(|scope| {
        for (run, fence) in fences.iter().enumerate() {
            let store = &opened.store;
            scope.spawn(move || {
                for sequence in 0..12 {
                    store.submit(append(&format!("run-{run}"), Some(*fence), entry(sequence)), 0).expect("open");
                }
            });
        }
    });
    opened.store.close();

    let completions: Vec<_> = opened.outcomes.try_iter().flatten().collect();
    assert_eq!(completions.len(), 16 * 12);
    assert!(completions.iter().all(|completion| completion.outcome.is_ok()));
    let again = Opened::new(&folder.file());
    for run in 0..16 {
        assert_eq!(again.load(&format!("run-{run}")).len(), 12);
    }
}

#[test]
fn test_damaged_rows_are_reported_by_run_and_sequence() {
    // B32, CK-019
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    for sequence in 0..3 {
        opened.append("order-1", fence, entry(sequence)).expect("written");
    }
    drop(opened);
    let broken = |sql: &str| {
        let connection = Connection::open(folder.file()).expect("the file");
        connection.execute_batch(sql).expect("broken");
        drop(connection);
        let opened = Opened::new(&folder.file());
        opened.store.load_run(&workflow_id("order-1")).expect_err("a damaged row").to_string()
    };

    let damaged = broken("UPDATE rows SET row = zeroblob(20) WHERE sequence = 1");
    assert_eq!(damaged, "row 1 of run \"order-1\" is damaged at byte 0: not the beginning of a row");
    let missing = broken("DELETE FROM rows WHERE sequence = 1");
    assert_eq!(missing, "row 1 of run \"order-1\" is missing");
    let cut = broken("DELETE FROM rows WHERE sequence > 0");
    assert_eq!(cut, "row 1 of run \"order-1\" is missing");
    Connection::open(folder.file()).expect("the file").execute_batch("UPDATE runs SET status = 'x'").expect("broken");
    let listed = Opened::new(&folder.file()).store.list_runs(&all());
    assert_eq!(listed, Ok(vec![])); // a status that is none is in no list
    let claimed = Opened::new(&folder.file()).ask(claim("order-1", NOW));
    assert!(matches!(claimed, Err(StoreError::Failed { failure: Failure::Damaged, .. })));
}
