//! Files that disks and people have damaged are reported, or hold the truth.

use std::fs;

use super::{Dice, Folder, Opened, append, entry, settings, workflow_id};

const ROUNDS: usize = 300;

#[test]
fn test_damaged_file_is_an_error_or_the_truth() {
    let folder = Folder::new();
    {
        let opened = Opened::new(&folder.file());
        for run in 0..60 {
            for sequence in 0..10 {
                opened.store.submit(append(&format!("run-{run}"), None, entry(sequence)), 0).expect("open");
            }
        }
    }
    let whole = fs::read(folder.file()).expect("the file");
    let mut dice = Dice::new();
    let mut below = |bound| dice.below(bound);
    let mut refused = 0;
    for round in 0..ROUNDS {
        let mut bytes = whole.clone();
        let pages = bytes.len() / 4096;
        match below(5) {
            0 => (0..=below(8)).for_each(|_| bytes[below(whole.len())] ^= 1 << below(8)),
            1 => bytes.truncate(below(whole.len())),
            2 => bytes[below(pages) * 4096..][..4096].fill(0),
            3 => {
                let (from, to) = (below(pages) * 4096, below(pages) * 4096);
                bytes.copy_within(from..from + 4096, to);
            }
            _ => {
                let at = below(whole.len() - 64);
                (at..at + 64).for_each(|at| bytes[at] = below(256) as u8);
            }
        }
        for beside in ["runs.db-wal", "runs.db-shm"] {
            let _ = fs::remove_file(folder.0.join(beside));
        }
        fs::write(folder.file(), &bytes).expect("damaged");
        let Ok(opened) = Opened::open(&folder.file(), settings("worker-1")) else {
            refused += 1;
            continue;
        };
        for run in 0..60 {
            match opened.store.load_run(&workflow_id(&format!("run-{run}"))) {
                Ok(rows) => assert!(rows.into_iter().eq((0..10).map(entry)), "round {round}: run-{run}"),
                Err(_) => refused += 1,
            }
        }
    }

    assert!(refused > ROUNDS, "{refused}"); // the damage was felt
}
