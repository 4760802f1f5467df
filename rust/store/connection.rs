//! The SQLite file, and what is made sure of when it is opened.
//!
//! The file is in WAL mode with `synchronous=FULL`: a commit appends to the write-ahead log and
//! syncs it once, and what was committed outlives the process and the machine.
//!
//! Several processes may have the file open. Their transactions wait for each other; runs are kept
//! apart by claims. A process that dies leaves claims behind, and its lease runs out in time; but
//! whoever opens the file and finds that nobody else has it open need not wait for that: the claims
//! are those of the dead, and are taken back at once (`take_back`). SQLite's own locks say who has
//! it open, because they go with their process, however it ends.
//!
//! One process must not open the file by this library and by another copy of SQLite (Python's
//! `sqlite3`, say): when either closes it, the operating system drops the locks of both. To look
//! into it from another process, with the `sqlite3` tool, is always fine.

use std::path::Path;
use std::thread;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OpenFlags};

use super::error::{Failure, OpenReason};
use crate::core::claim::{Fence, Lease, RunStatus, Standing, Usage};

const SCHEMA: &str = include_str!("schema.sql");
const APPLICATION: i64 = 0x6361_6e6f;
const VERSION: i64 = 1;
/// How long a transaction waits for those of other processes.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries to open a file.
const PAUSE: Duration = Duration::from_millis(20);

/// Opens a file that `file::prepare` has looked at, and makes it a store if it is empty.
///
/// Going to WAL mode, and recovering a log that somebody else recovers, are refused at once where other transactions wait: so
/// these are tried again for as long as those would wait.
pub(super) fn open(file: &Path) -> Result<Connection, OpenReason> {
    let tries = PATIENCE.as_millis() / (2 * PAUSE).as_millis();
    for _ in 1..tries {
        match open_once(file) {
            #[allow(clippy::disallowed_methods, reason = "as SQLite waits for a lock; whoever opens a file is blocked")]
            Err(OpenReason::Failed { failure: Failure::Busy, .. }) => thread::sleep(PAUSE),
            opened => return opened,
        }
    }
    open_once(file)
}

fn open_once(file: &Path) -> Result<Connection, OpenReason> {
    take_back(file)?;
    let connection = connect(file, PAUSE, "NORMAL")?;
    if identify(&connection)? == Identity::Empty {
        use_wal(&connection)?;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        if identify(&connection)? == Identity::Empty {
            connection.execute_batch(SCHEMA)?;
        }
        connection.execute_batch("COMMIT")?;
    }
    use_wal(&connection)?;
    check_runs(&connection)?;
    connection.busy_timeout(PATIENCE)?;
    Ok(connection)
}

/// A second connection to a file that is open already, which cannot write.
pub(super) fn open_to_read(file: &Path) -> Result<Connection, OpenReason> {
    let connection = connect(file, PATIENCE, "NORMAL")?;
    connection.pragma_update(None, "query_only", true)?;
    Ok(connection)
}

/// Takes back all claims if nobody else has the file open.
///
/// The connection asks for the file alone and for no patience: it either has it at once, and then
/// nobody can claim anything before it is closed again, or somebody lives.
fn take_back(file: &Path) -> Result<(), OpenReason> {
    let alone = || -> Result<(), OpenReason> {
        let connection = connect(file, Duration::ZERO, "EXCLUSIVE")?;
        match identify(&connection)? {
            Identity::Empty => Ok(()),
            Identity::Store => Ok(connection.execute_batch(
                "BEGIN IMMEDIATE;
                 UPDATE runs SET owner = NULL WHERE owner IS NOT NULL;
                 DELETE FROM owners;
                 COMMIT;",
            )?),
        }
    };
    match alone() {
        Err(OpenReason::Failed { failure: Failure::Busy, .. }) => Ok(()),
        taken => taken,
    }
}

/// `locking`: whether locks are given back after each transaction (NORMAL) or kept (EXCLUSIVE); it is
/// said before anything is read.
fn connect(file: &Path, patience: Duration, locking: &str) -> Result<Connection, OpenReason> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(patience)?;
    connection.pragma_update(None, "locking_mode", locking)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

#[derive(PartialEq, Eq)]
enum Identity {
    Empty,
    Store,
}

/// One statement, so that it does not see half of what another process makes of a new file.
fn identify(connection: &Connection) -> Result<Identity, OpenReason> {
    let what: (i64, i64, i64) = connection.query_row(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
         FROM pragma_application_id, pragma_user_version",
        [],
        |found| Ok((found.get(0)?, found.get(1)?, found.get(2)?)),
    )?;
    match what {
        (APPLICATION, VERSION, _) => Ok(Identity::Store),
        (APPLICATION, version, _) => Err(OpenReason::Version { version }),
        (0, 0, 0) => Ok(Identity::Empty),
        _ => Err(OpenReason::NotAStore),
    }
}

/// Compares the two places where SQLite keeps the id of each run, the table and its index.
///
/// A row says by its checksum that it is damaged. A run whose id is damaged would be taken for one
/// that was never begun, and begun again.
fn check_runs(connection: &Connection) -> Result<(), OpenReason> {
    let found: String = connection.query_row("PRAGMA integrity_check(runs)", [], |found| found.get(0))?;
    if found == "ok" { Ok(()) } else { Err(OpenReason::Failed { failure: Failure::Damaged, text: found }) }
}

fn use_wal(connection: &Connection) -> Result<(), OpenReason> {
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |found| found.get(0))?;
    if mode == "wal" { Ok(()) } else { Err(OpenReason::NoWal) }
}

/// Reads what is stored of a run's standing: the columns from `status` to `kept_bytes`, in order.
pub(super) fn standing(found: &rusqlite::Row<'_>) -> rusqlite::Result<Standing> {
    let status: String = found.get(0)?;
    let status = RunStatus::from_name(&status).ok_or_else(|| {
        let error = format!("{status:?} is no status of a run");
        rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into())
    })?;
    let owner: Option<String> = found.get(1)?;
    let until: Option<i64> = found.get(2)?;
    let count = |column| found.get(column).map(i64::cast_unsigned);
    Ok(Standing {
        status,
        lease: owner.map(|owner| Lease { owner, until: until.unwrap_or(0).cast_unsigned() }),
        fence: Fence(count(3)?),
        next: count(4)?,
        usage: Usage { rows: count(5)?, bytes: count(6)? },
    })
}

/// A number as SQLite stores it. None that matters is cut: the core bounds them.
pub(super) fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
