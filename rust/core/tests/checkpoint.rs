//! Rows and their bytes.

use std::path::PathBuf;

use crate::core::checkpoint::{
    Damage, Fault, Limits, MOST_LABEL, Problem, Row, RowError, RowKind, WorkflowId, check_log,
};
use crate::core::error::Error;

const RUN_ID: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn id() -> WorkflowId {
    WorkflowId::new("order-1").expect("an id")
}

/// A row with nothing but what its kind needs.
pub(super) fn row(kind: RowKind, sequence: u64, state: &str, task: &str) -> Row {
    let mut row = Row {
        sequence,
        kind,
        state: state.to_owned(),
        task: task.to_owned(),
        visit: 1,
        attempt: 1,
        version: 3,
        fingerprint: 0x1122_3344_5566_7788,
        run_id: RUN_ID,
        recorded_at: 1_764_000_000_123,
        next_state: None,
        refers_to: None,
        due_at: None,
        is_intent: false,
        payload: None,
        snapshot: None,
    };
    match kind {
        RowKind::StateEntry | RowKind::Finished => {}
        RowKind::CompensationCompletion => {
            row.next_state = Some("SHIP".to_owned());
            row.payload = Some(b"\"payment-17\"".to_vec());
        }
        RowKind::StepCursor => row.payload = Some(b"[4096]".to_vec()),
        RowKind::TimerDue => row.due_at = Some(1_764_003_600_000),
        RowKind::Compensated => row.refers_to = Some(sequence - 1),
        RowKind::RollbackStarted | RowKind::NeedsAttention => row.payload = Some(b"\"why\"".to_vec()),
    }
    row
}

fn encoded(row: &Row) -> Vec<u8> {
    row.encode(&id(), &Limits::default()).expect("a valid row")
}

fn fault(row: &Row) -> Fault {
    match row.encode(&id(), &Limits::default()) {
        Err(RowError { problem: Problem::Fault(fault), .. }) => fault,
        other => panic!("{other:?} for {row:?}"),
    }
}

/// The golden files and what they say. None is ever changed: a new format gets files of its own.
fn golden() -> Vec<(&'static str, Row)> {
    let charge = |kind, sequence| Row { visit: 2, attempt: 3, ..row(kind, sequence, "CHARGE", "Charge") };
    vec![
        (
            "state-entry",
            Row { snapshot: Some(b"{\"total\":42}".to_vec()), ..row(RowKind::StateEntry, 0, "RESERVE", "reserve") },
        ),
        ("state-entry-intent", Row { is_intent: true, ..charge(RowKind::StateEntry, 7) }),
        (
            "compensation-completion",
            Row { snapshot: Some(b"{\"total\":41}".to_vec()), ..charge(RowKind::CompensationCompletion, 8) },
        ),
        ("step-cursor", Row { refers_to: Some(10), ..row(RowKind::StepCursor, 12, "IMPORT", "Import") }),
        (
            "step-cursor-end",
            Row {
                refers_to: Some(10),
                next_state: Some("DONE".to_owned()),
                payload: Some(Vec::new()),
                ..row(RowKind::StepCursor, 13, "IMPORT", "Import")
            },
        ),
        ("timer-due", row(RowKind::TimerDue, 2, "WAIT", "Wait")),
        (
            "rollback-started",
            Row {
                payload: Some("{\"type\":\"OSError\",\"text\":\"\u{fc}berlastet\"}".as_bytes().to_vec()),
                ..row(RowKind::RollbackStarted, 20, "SHIP", "ship")
            },
        ),
        ("compensated", Row { refers_to: Some(8), attempt: 1, ..charge(RowKind::Compensated, 21) }),
        ("finished", Row { version: 0, fingerprint: 0, ..row(RowKind::Finished, 22, "VERSANDT \u{2713}", "") }),
        (
            "needs-attention",
            Row {
                visit: u32::MAX,
                attempt: u32::MAX,
                version: u32::MAX,
                fingerprint: u64::MAX,
                run_id: [0xff; 16],
                recorded_at: 253_402_300_799_999,
                snapshot: Some(b"{}".to_vec()),
                ..row(RowKind::NeedsAttention, 1 << 53, "SHIP", "ship")
            },
        ),
    ]
}

#[test]
fn test_golden_files_are_read_and_written_the_same() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/1");
    for (name, row) in golden() {
        let stored = std::fs::read(folder.join(name).with_extension("row")).expect("a golden file");

        assert_eq!(Row::decode(&id(), row.sequence, &stored), Ok(row.clone()), "{name}"); // CK-010
        assert_eq!(encoded(&row), stored, "{name}");
    }
}

#[test]
fn test_page_of_the_format_shows_a_golden_file() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/design/checkpoints.md")).expect("the page");
    let drawn = page.split("```hex\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the drawing");
    let bytes: Vec<u8> = drawn
        .lines()
        .flat_map(|line| line[..48].split_whitespace())
        .map(|pair| u8::from_str_radix(pair, 16).expect("a pair of hex digits"))
        .collect();

    assert_eq!(bytes, std::fs::read(root.join("tests/golden/checkpoints/1/state-entry.row")).expect("a golden file"));
}

#[test]
fn test_each_kind_has_its_fields_and_no_other() {
    // CK-007, CK-008: which blob a row has follows from its kind
    let has = |row: &mut Row, field: &str| match field {
        "next_state" => row.next_state = Some("NEXT".to_owned()),
        "refers_to" => row.refers_to = Some(0),
        "due_at" => row.due_at = Some(0),
        "output_blob" => row.payload = Some(Vec::new()),
        "snapshot" => row.snapshot = Some(Vec::new()),
        "is_intent" => row.is_intent = true,
        other => panic!("{other}"),
    };
    let lacks = |row: &mut Row, field: &str| match field {
        "next_state" => row.next_state = None,
        "refers_to" => row.refers_to = None,
        "due_at" => row.due_at = None,
        "output_blob" => row.payload = None,
        other => panic!("{other}"),
    };
    let fields = ["next_state", "refers_to", "due_at", "output_blob", "snapshot", "is_intent"];
    let table: [(RowKind, &[&str], &[&str]); 8] = [
        (RowKind::StateEntry, &[], &["snapshot", "is_intent"]),
        (RowKind::CompensationCompletion, &["next_state", "output_blob"], &["snapshot"]),
        (RowKind::StepCursor, &["output_blob"], &["next_state", "refers_to", "snapshot"]),
        (RowKind::TimerDue, &["due_at"], &["snapshot"]),
        (RowKind::RollbackStarted, &["output_blob"], &["snapshot"]),
        (RowKind::Compensated, &["refers_to"], &[]),
        (RowKind::Finished, &[], &["snapshot"]),
        (RowKind::NeedsAttention, &["output_blob"], &["snapshot"]),
    ];

    for (kind, always, maybe) in table {
        let plain = row(kind, 3, "STATE", "task");
        encoded(&plain);
        for field in always {
            let mut row = plain.clone();
            lacks(&mut row, field);
            assert_eq!(fault(&row), Fault::Lacks { kind, field });
        }
        for field in fields {
            let mut row = plain.clone();
            has(&mut row, field);
            if always.contains(&field) || maybe.contains(&field) {
                assert_eq!(Row::decode(&id(), 3, &encoded(&row)), Ok(row)); // CK-008: empty is there
            } else {
                assert_eq!(fault(&row), Fault::Has { kind, field });
            }
        }
    }
}

#[test]
fn test_values_out_of_range_are_refused_at_their_limit() {
    let entry = || row(RowKind::StateEntry, 5, "STATE", "task");
    let with_label = |length| Row { state: "s".repeat(length), ..entry() };
    let with_output = |length| Row { payload: Some(vec![0; length]), ..row(RowKind::StepCursor, 5, "STATE", "task") };
    let with_reference = |refers_to| Row { refers_to: Some(refers_to), ..row(RowKind::Compensated, 5, "STATE", "t") };
    let limit = Limits::default().blob;

    encoded(&with_label(MOST_LABEL));
    encoded(&with_output(limit));
    encoded(&with_reference(4));
    assert_eq!(fault(&with_label(129)), Fault::TooLong { field: "state", length: 129, most: 128 });
    assert_eq!(fault(&with_output(limit + 1)), Fault::TooLong { field: "output_blob", length: limit + 1, most: limit });
    assert_eq!(fault(&with_reference(5)), Fault::Ahead { refers_to: 5 });
    for (field, row) in [
        ("visit", Row { visit: 0, ..entry() }),
        ("attempt", Row { attempt: 0, ..entry() }),
        ("sequence", Row { sequence: 1 << 63, ..entry() }),
        ("recorded_at", Row { recorded_at: 253_402_300_800_000, ..entry() }),
        ("due_at", Row { due_at: Some(u64::MAX), ..row(RowKind::TimerDue, 5, "STATE", "task") }),
    ] {
        assert!(matches!(fault(&row), Fault::Range { field: found, .. } if found == field), "{field}");
    }
}

#[test]
fn test_large_payload_is_kept_where_the_limit_allows_it() {
    // CK-018
    let row = Row { payload: Some(vec![0xa5; 5 << 20]), ..row(RowKind::StepCursor, 1, "STATE", "task") };
    let limits = Limits::new(8 << 20, 10, 1 << 30).expect("limits");

    let bytes = row.encode(&id(), &limits).expect("a row within its limits");

    assert_eq!(Row::decode(&id(), 1, &bytes), Ok(row));
}

#[test]
fn test_limits_are_bounded() {
    for limits in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1), ((64 << 20) + 1, 1, 1)] {
        assert!(matches!(Limits::new(limits.0, limits.1, limits.2), Err(Error::Budget { .. })), "{limits:?}");
    }
    assert_eq!(Limits::new(2 << 20, 50_000, 50 << 20), Ok(Limits::default()));
}

#[test]
fn test_ids_that_nobody_could_find_again_are_refused() {
    for bad in ["", " ", "\t\n", "\u{2003}", "a\0b", "a\nb", "a\u{1b}[31m", &"i".repeat(257)] {
        assert!(matches!(WorkflowId::new(bad), Err(Error::Id { .. })), "{bad:?}");
    }
    for good in ["0", "order 1", "\u{e4}\u{1f980}", &"i".repeat(256)] {
        assert_eq!(WorkflowId::new(good).expect("an id").as_str(), good);
    }
}

#[test]
fn test_errors_name_run_sequence_and_offset() {
    // B32, CK-019
    let bytes = encoded(&row(RowKind::StateEntry, 5, "STATE", "task"));
    let text = |bytes: &[u8]| Row::decode(&id(), 5, bytes).expect_err("damaged bytes").to_string();
    let with = |offset: usize, byte| {
        let mut bytes = bytes.clone();
        bytes[offset] = byte;
        bytes
    };

    assert_eq!(text(&[]), "row 5 of run \"order-1\" is damaged at byte 0: 0 bytes are no row");
    assert_eq!(text(&with(0, b'C')), "row 5 of run \"order-1\" is damaged at byte 0: not the beginning of a row");
    assert_eq!(text(&with(4, 2)), "row 5 of run \"order-1\" is of format 2, and this version of cano reads format 1");
    assert_eq!(
        text(&bytes[..78]),
        "row 5 of run \"order-1\" is damaged at byte 8: the row says it has 79 bytes, it has 78"
    );
    assert!(
        text(&with(70, 0)).starts_with("row 5 of run \"order-1\" is damaged at byte 75: the row says its checksum is ")
    );
    assert_eq!(
        Row::decode(&id(), 6, &bytes).expect_err("another row").to_string(),
        "row 6 of run \"order-1\" is damaged at byte 12: the row says it is number 5"
    );
}

#[test]
fn test_row_under_another_run_is_damaged() {
    let bytes = encoded(&row(RowKind::StateEntry, 5, "STATE", "task"));
    let other = WorkflowId::new("order-2").expect("an id");

    let error = Row::decode(&other, 5, &bytes).expect_err("a row of another run");

    assert!(matches!(error.problem, Problem::Damaged { damage: Damage::Checksum { .. }, .. }));
}

/// The same dice for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }
}

/// Damages bytes as disks and people do.
fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let at = dice.below(bytes.len());
    let until = at + 1 + dice.below(bytes.len() - at);
    match dice.below(8) {
        0 => bytes[at] ^= 1 << dice.below(8),
        1 => bytes[at] = dice.below(256) as u8,
        2 => bytes.truncate(at),
        3 => bytes.extend((0..=dice.below(16)).map(|_| 0)),
        4 => bytes[at..until].fill(0),
        5 => bytes[at..until].reverse(),
        6 => drop(bytes.drain(at..until)),
        _ => bytes.insert(at, dice.below(256) as u8),
    }
}

#[test]
fn test_damaged_bytes_are_never_another_row() {
    // B32, CK-019, CK-020: a row without a format is not guessed at either
    let rows: Vec<Row> = golden().into_iter().map(|(_, row)| row).collect();
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let mut refused = 0;
    for round in 0..20_000 {
        let row = &rows[round % rows.len()];
        let mut bytes = encoded(row);
        for _ in 0..=dice.below(4) {
            if !bytes.is_empty() {
                mutate(&mut bytes, &mut dice);
            }
        }

        match Row::decode(&id(), row.sequence, &bytes) {
            Ok(decoded) => assert_eq!((&decoded, &bytes), (row, &encoded(row)), "round {round}"),
            Err(_) => refused += 1,
        }
    }

    assert!(refused > 19_000, "{refused}"); // a few mutations change nothing
}

#[test]
fn test_any_bytes_that_are_read_are_the_only_ones_for_their_row() {
    // Forged bytes: the damage gets length and checksum of its own.
    let rows: Vec<Row> = golden().into_iter().map(|(_, row)| row).collect();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let castagnoli = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
    let mut read = 0;
    for round in 0..20_000 {
        let row = &rows[round % rows.len()];
        let mut bytes = encoded(row);
        bytes.truncate(bytes.len() - 4);
        mutate(&mut bytes, &mut dice);
        let length = bytes.len() as u32 + 4;
        if bytes.len() >= 12 {
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
        }
        let mut digest = castagnoli.digest();
        digest.update(b"order-1");
        digest.update(&bytes);
        bytes.extend(digest.finalize().to_le_bytes());

        if let Ok(decoded) = Row::decode(&id(), row.sequence, &bytes) {
            read += 1;
            assert_eq!(encoded(&decoded), bytes, "round {round}");
        }
    }

    assert!(read > 1_000, "{read}");
}

#[test]
fn test_log_is_checked_for_gaps_doubles_and_strangers() {
    let entry = |sequence| row(RowKind::StateEntry, sequence, "STATE", "task");
    let cursor = |sequence, refers_to| Row { refers_to, ..row(RowKind::StepCursor, sequence, "STATE", "task") };
    let stranger = |sequence| Row { run_id: [7; 16], ..entry(sequence) };
    let problem = |rows: &[Row]| check_log(&id(), rows).map_err(|error| (error.sequence, error.problem));

    assert_eq!(problem(&[]), Ok(()));
    assert_eq!(problem(&[entry(0), entry(1), entry(2)]), Ok(()));
    assert_eq!(problem(&[entry(1)]), Err((0, Problem::Missing)));
    assert_eq!(problem(&[entry(0), entry(2)]), Err((1, Problem::Missing)));
    assert_eq!(problem(&[entry(0), entry(0)]), Err((0, Problem::Twice)));
    assert_eq!(problem(&[entry(0), stranger(1)]), Err((1, Problem::OtherRun)));
    // B41: a cursor stands for those before it, whether they are kept or not
    assert_eq!(problem(&[entry(0), cursor(1, None), cursor(2, Some(1)), cursor(3, Some(1)), entry(4)]), Ok(()));
    assert_eq!(problem(&[entry(0), cursor(3, Some(1)), entry(4)]), Ok(()));
    assert_eq!(problem(&[entry(0), cursor(3, Some(2)), entry(4)]), Err((1, Problem::Missing)));
    assert_eq!(problem(&[entry(0), cursor(3, None)]), Err((1, Problem::Missing)));
    // what a compensated row refers to is another matter
    assert_eq!(
        problem(&[entry(0), Row { refers_to: Some(0), ..row(RowKind::Compensated, 2, "STATE", "task") }]),
        Err((1, Problem::Missing))
    );
}

#[test]
fn test_cursor_takes_the_place_of_a_cursor_of_its_visit() {
    // B05, B41
    let cursor = |sequence, refers_to| Row { refers_to, ..row(RowKind::StepCursor, sequence, "STATE", "task") };
    let takes = |later: Row, earlier: Row| later.takes_place_of(&earlier);

    assert!(takes(cursor(3, Some(2)), cursor(2, None)));
    assert!(takes(cursor(4, Some(2)), cursor(3, Some(2))));
    assert!(!takes(cursor(3, None), cursor(2, None)));
    assert!(!takes(cursor(4, Some(3)), cursor(3, Some(2))));
    assert!(!takes(cursor(4, Some(2)), cursor(2, None)));
    assert!(!takes(cursor(3, Some(2)), Row { visit: 2, ..cursor(2, None) }));
    assert!(!takes(cursor(3, Some(2)), Row { state: "OTHER".to_owned(), ..cursor(2, None) }));
    assert!(!takes(cursor(3, Some(2)), row(RowKind::StateEntry, 2, "STATE", "task")));
}
