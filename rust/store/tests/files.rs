//! Which files are opened, and what is looked at first.

use std::fs;
use std::path::Path;
use std::thread;

use rusqlite::Connection;

use super::{Folder, LATER, NOW, Opened, claim, entry, fence, refusal, settings};
use crate::core::claim::{Lease, Refusal};
use crate::store::Settings;
use crate::store::error::{Failure, OpenReason, StoreError};
use crate::store::file::{Presence, Trust, prepare};

fn reason(file: &Path) -> OpenReason {
    match Opened::open(file, settings("worker-1")) {
        Err(StoreError::Open { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{} was opened", file.display()),
    }
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn mode(file: &Path) -> u32 {
        fs::metadata(file).expect("a file").permissions().mode() & 0o7777
    }

    fn set_mode(file: &Path, mode: u32) {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).expect("a mode");
    }

    #[test]
    fn test_files_are_for_their_owner_alone() {
        // G07
        let folder = Folder::new();
        let opened = Opened::new(&folder.file());
        opened.start("order-1");

        for file in fs::read_dir(&folder.0).expect("the folder") {
            assert_eq!(mode(&file.expect("a file").path()), 0o600);
        }
    }

    #[test]
    fn test_symbolic_links_are_refused() {
        let folder = Folder::new();
        fs::write(folder.0.join("target"), "").expect("a file");
        symlink("target", folder.file()).expect("a link");
        symlink("nowhere", folder.0.join("broken")).expect("a link");
        symlink("target", folder.0.join("other.db-wal")).expect("a link");

        for (name, link) in [("runs.db", "runs.db"), ("broken", "broken"), ("other.db", "other.db-wal")] {
            let link = folder.0.canonicalize().expect("a path").join(link);
            assert_eq!(reason(&folder.0.join(name)), OpenReason::Symlink(link.clone()));
            let anyones = Settings { trust: Trust::Anyones, ..settings("worker-1") };
            assert!(Opened::open(&folder.0.join(name), anyones).is_err());
        }
        assert!(!folder.0.join("nowhere").exists());
        assert_eq!(fs::read(folder.0.join("target")).expect("a file"), b"");
    }

    #[test]
    fn test_what_others_may_write_to_is_refused() {
        // G07
        let folder = Folder::new();
        for (folder_mode, file_mode, is_fine) in [
            (0o700, 0o600, true),
            (0o755, 0o644, true),
            (0o1777, 0o600, true),
            (0o777, 0o600, false),
            (0o770, 0o600, false),
            (0o700, 0o620, false),
            (0o700, 0o602, false),
        ] {
            fs::write(folder.file(), "").expect("a file");
            set_mode(&folder.file(), file_mode);
            set_mode(&folder.0, folder_mode);

            let opened = Opened::open(&folder.file(), settings("worker-1"));
            let anyway = Settings { trust: Trust::Anyones, ..settings("worker-1") };

            assert_eq!(opened.is_ok(), is_fine, "{folder_mode:o} {file_mode:o}");
            if let Err(error) = opened {
                let mode = if folder_mode == 0o700 { file_mode } else { folder_mode };
                assert!(error.to_string().ends_with(&format!("(mode {mode:04o})")), "{error}");
            }
            assert!(Opened::open(&folder.file(), anyway).is_ok());
            fs::remove_file(folder.file()).expect("removed");
        }
    }

    #[test]
    fn test_files_of_other_users_are_refused() {
        let folder = Folder::new();
        fs::write(folder.file(), "").expect("a file");
        if chown(folder.file(), Some(12_345), None).is_err() {
            eprintln!("skipped: only root can give a file away");
            return;
        }

        assert!(matches!(reason(&folder.file()), OpenReason::OtherOwner { owner: 12_345, .. }));
    }
}

#[test]
fn test_paths_that_are_no_file_are_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.file()).expect("a folder");

    assert_eq!(reason(&folder.0.join("..")), OpenReason::NoName);
    assert!(matches!(reason(&folder.0.join("none/runs.db")), OpenReason::DirectoryMissing(_)));
    assert!(matches!(reason(&folder.file()), OpenReason::NotAFile(_)));
    assert!(!folder.0.join("none").exists());
}

#[test]
fn test_files_of_other_programs_stay_as_they_are() {
    let folder = Folder::new();
    let text = folder.0.join("text");
    fs::write(&text, "x".repeat(4096)).expect("a file");
    let table = folder.0.join("table.db");
    Connection::open(&table).and_then(|file| file.execute_batch("CREATE TABLE runs (x)")).expect("a database");
    let newer = folder.0.join("newer.db");
    drop(Opened::new(&newer));
    Connection::open(&newer).and_then(|file| file.execute_batch("PRAGMA user_version = 2")).expect("a database");
    #[cfg(unix)]
    for file in [&text, &table, &newer] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(file, mode).expect("a mode");
    }
    let before = [&text, &table, &newer].map(|file| fs::read(file).expect("a file"));

    assert!(matches!(reason(&text), OpenReason::Failed { failure: Failure::Damaged, .. }));
    assert_eq!(reason(&table), OpenReason::NotAStore);
    assert_eq!(reason(&newer), OpenReason::Version { version: 2 });

    assert!([&text, &table, &newer].map(|file| fs::read(file).expect("a file")) == before);
}

#[test]
fn test_many_open_a_new_file_at_once() {
    for _ in 0..5 {
        let folder = Folder::new();
        thread::scope(|scope| {
            for owner in 0..6 {
                let folder = &folder;
                scope.spawn(move || {
                    let opened = Opened::of(&folder.file(), &format!("worker-{owner}"));
                    let fence = opened.start(&format!("run-{owner}"));
                    opened.append(&format!("run-{owner}"), fence, entry(0)).expect("written");
                });
            }
        });

        let opened = Opened::new(&folder.file());
        for owner in 0..6 {
            assert_eq!(opened.load(&format!("run-{owner}")).len(), 1);
        }
    }
}

#[test]
fn test_claims_of_the_living_are_not_taken_back() {
    // B01; what happens to those of the dead is told by the tests of kill
    let folder = Folder::new();
    let first = Opened::of(&folder.file(), "worker-1");
    first.start("order-1");

    let second = Opened::of(&folder.file(), "worker-2");

    let held = Refusal::Claimed(Lease { owner: "worker-1".to_owned(), until: LATER });
    assert_eq!(refusal(second.ask(claim("order-1", NOW))), held);
    drop(first); // gives up what it holds
    fence(second.ask(claim("order-1", NOW)));
}

#[test]
fn test_child_of_a_process_that_has_the_file_open_may_not_open_it() {
    let folder = Folder::new();
    let file = prepare(&folder.file(), Trust::Ours).expect("a file");
    let parent = std::process::id() + 1;
    let opened = Opened::new(&folder.file());
    assert!(Presence::of(parent, &file).is_err());
    opened.store.close();
    let inherited = Presence::of(parent, &file).expect("nobody has it open");

    assert_eq!(reason(&folder.file()), OpenReason::Forked);
    drop(inherited);
    assert_eq!(reason(&folder.file()), OpenReason::Forked); // what is inherited stays
}

#[test]
fn test_file_can_be_read_with_the_tools_of_sqlite() {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("order-1");
    opened.append("order-1", fence, entry(0)).expect("written");
    drop(opened);

    let file = Connection::open(folder.file()).expect("the file");
    let shown: String = file
        .query_row(
            "SELECT concat_ws('|', workflow_id, sequence, kind, state, task, visit, attempt, recorded_at) FROM log",
            [],
            |found| found.get(0),
        )
        .expect("a row");

    assert_eq!(shown, "order-1|0|state entry|Order.CHARGE|charge|1|1|2025-11-24 16:00:00.000");
}
