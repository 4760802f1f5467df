//! Who may write, and what may follow.

use crate::core::checkpoint::{Limits, Row, RowKind};
use crate::core::claim::{Fence, Lease, Refusal, RunStatus, Standing, Usage};

const NOW: u64 = 1_764_000_000_000;

fn entry(sequence: u64) -> Row {
    Row {
        sequence,
        kind: RowKind::StateEntry,
        state: "STATE".to_owned(),
        task: "task".to_owned(),
        visit: 1,
        attempt: 1,
        version: 0,
        fingerprint: 0,
        run_id: [0; 16],
        recorded_at: NOW,
        next_state: None,
        refers_to: None,
        due_at: None,
        is_intent: false,
        payload: None,
        snapshot: None,
    }
}

fn lease(until: u64) -> Lease {
    Lease { owner: "worker-1".to_owned(), until }
}

/// A run with three rows, claimed under fence 7.
fn claimed(status: RunStatus) -> Standing {
    Standing { status, lease: Some(lease(NOW + 1)), fence: Fence(7), next: 3, usage: Usage { rows: 3, bytes: 300 } }
}

fn unclaimed(status: RunStatus) -> Standing {
    Standing { lease: None, ..claimed(status) }
}

fn append(standing: &Standing, fence: Option<Fence>, row: &Row) -> Result<RunStatus, Refusal> {
    standing.append(fence, row, 100, &Limits::default())
}

#[test]
fn test_status_follows_from_the_rows() {
    use RowKind::{Compensated, Finished, NeedsAttention, RollbackStarted};
    for kind in RowKind::ALL {
        let forward = match kind {
            RollbackStarted => Some(RunStatus::RollingBack),
            Compensated => None,
            Finished => Some(RunStatus::Finished),
            NeedsAttention => Some(RunStatus::NeedsAttention),
            _ => Some(RunStatus::Running),
        };
        let backward = match kind {
            RollbackStarted | Compensated => Some(RunStatus::RollingBack),
            Finished => Some(RunStatus::RolledBack),
            NeedsAttention => Some(RunStatus::NeedsAttention),
            _ => None, // B02: a roll-back never turns forward again
        };

        assert_eq!(RunStatus::Running.after(kind), forward, "{kind:?}");
        assert_eq!(RunStatus::RollingBack.after(kind), backward, "{kind:?}");
        for status in [RunStatus::Stopped, RunStatus::Finished, RunStatus::RolledBack, RunStatus::NeedsAttention] {
            assert_eq!(status.after(kind), None);
        }
    }
}

#[test]
fn test_status_has_its_name_and_no_other() {
    for status in RunStatus::ALL {
        assert_eq!(RunStatus::from_name(status.name()), Some(status));
    }
    assert_eq!(RunStatus::from_name("Running"), None);
}

#[test]
fn test_run_is_claimed_by_one() {
    // B01
    for status in RunStatus::ALL {
        assert_eq!(claimed(status).claim(NOW), Err(Refusal::Claimed(lease(NOW + 1))));
        assert_eq!(claimed(status).start(NOW), Refusal::Claimed(lease(NOW + 1)));
        assert_eq!(unclaimed(status).start(NOW), Refusal::Exists(status)); // B20, CK-025
        assert_eq!(claimed(status).start(NOW + 1), Refusal::Exists(status));
        assert_eq!(claimed(status).claim(NOW + 1), unclaimed(status).claim(NOW));
    }
}

#[test]
fn test_claim_goes_on_where_the_run_was() {
    let table = [
        (RunStatus::Running, Ok(RunStatus::Running)),
        (RunStatus::RollingBack, Ok(RunStatus::RollingBack)), // D10, B02
        (RunStatus::Stopped, Ok(RunStatus::Running)),
        (RunStatus::Finished, Err(Refusal::Over(RunStatus::Finished))),
        (RunStatus::RolledBack, Err(Refusal::Over(RunStatus::RolledBack))),
        (RunStatus::NeedsAttention, Err(Refusal::Over(RunStatus::NeedsAttention))),
    ];
    for (status, verdict) in table {
        assert_eq!(unclaimed(status).claim(NOW), verdict);
    }
}

#[test]
fn test_append_needs_the_fence_of_the_claim() {
    // B01
    let run = claimed(RunStatus::Running);
    let lost = Err(Refusal::Claimed(lease(NOW + 1)));

    assert_eq!(append(&run, Some(Fence(7)), &entry(3)), Ok(RunStatus::Running));
    for fence in [Some(Fence(6)), Some(Fence(8)), None] {
        assert_eq!(append(&run, fence, &entry(3)), lost);
    }
    assert_eq!(append(&run, Some(Fence(6)), &entry(2)), lost); // not a conflict: it has lost everything
    assert_eq!(append(&unclaimed(RunStatus::Running), Some(Fence(7)), &entry(3)), Err(Refusal::Unclaimed));
}

#[test]
fn test_append_without_a_fence_is_for_runs_of_nobody() {
    assert_eq!(append(&Standing::NEW, None, &entry(0)), Ok(RunStatus::Running));
    assert_eq!(append(&unclaimed(RunStatus::Running), None, &entry(3)), Ok(RunStatus::Running));
    assert_eq!(append(&Standing::NEW, Some(Fence(1)), &entry(0)), Err(Refusal::Unclaimed));
}

#[test]
fn test_sequences_are_dense_and_written_once() {
    // CK-001, CK-012
    let run = claimed(RunStatus::Running);

    for sequence in 0..3 {
        let conflict = Err(Refusal::Conflict { sequence, next: 3, is_same: false });
        assert_eq!(append(&run, Some(Fence(7)), &entry(sequence)), conflict);
    }
    assert_eq!(append(&run, Some(Fence(7)), &entry(4)), Err(Refusal::Gap { sequence: 4, next: 3 }));
}

#[test]
fn test_nothing_follows_a_run_that_is_over() {
    for status in [RunStatus::Finished, RunStatus::RolledBack, RunStatus::NeedsAttention] {
        let run = unclaimed(status);

        assert_eq!(append(&run, Some(Fence(7)), &entry(3)), Err(Refusal::Over(status)));
        assert_eq!(append(&run, None, &entry(3)), Err(Refusal::Over(status)));
        // the row that ended it, sent again because its answer was lost
        let conflict = Err(Refusal::Conflict { sequence: 2, next: 3, is_same: false });
        assert_eq!(append(&run, Some(Fence(7)), &entry(2)), conflict);
    }
    let out_of_place = Refusal::OutOfPlace { status: RunStatus::RollingBack, kind: RowKind::StateEntry };
    assert_eq!(append(&claimed(RunStatus::RollingBack), Some(Fence(7)), &entry(3)), Err(out_of_place));
}

#[test]
fn test_run_writes_no_more_than_it_may() {
    // G06
    let limits = Limits::new(100, 4, 1_000).expect("limits");
    let run = claimed(RunStatus::Running);
    let append = |run: &Standing, bytes| run.append(Some(Fence(7)), &entry(3), bytes, &limits);
    let full = Standing { usage: Usage { rows: 4, bytes: 300 }, ..run.clone() };

    assert_eq!(append(&run, 700), Ok(RunStatus::Running));
    assert_eq!(append(&run, 701), Err(Refusal::Full { what: "bytes", limit: 1_000 }));
    assert_eq!(append(&full, 1), Err(Refusal::Full { what: "rows", limit: 4 }));
}

#[test]
fn test_claim_is_given_up_by_its_holder_alone() {
    let run = claimed(RunStatus::Running);

    assert_eq!(run.release(Fence(7)), Ok(()));
    assert_eq!(run.release(Fence(6)), Err(Refusal::Claimed(lease(NOW + 1))));
    assert_eq!(unclaimed(RunStatus::Running).release(Fence(7)), Err(Refusal::Unclaimed));
}

#[test]
fn test_run_is_forgotten_by_its_owner_or_when_it_is_nobodys() {
    // B01: a loser clears nothing
    let run = claimed(RunStatus::Running);
    let refused = Err(Refusal::Claimed(lease(NOW + 1)));

    assert_eq!(run.clear(Some(Fence(7)), NOW), Ok(()));
    assert_eq!(run.clear(Some(Fence(6)), NOW), refused);
    assert_eq!(run.clear(None, NOW), refused);
    assert_eq!(run.clear(None, NOW + 1), Ok(()));
    assert_eq!(unclaimed(RunStatus::Finished).clear(Some(Fence(7)), NOW), Ok(()));
    assert_eq!(unclaimed(RunStatus::Finished).clear(None, NOW), Ok(()));
}
