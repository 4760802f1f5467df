//! How fast the store is on this disk. Asserts nothing; prints with
//! `cargo test --release --features sqlite speed -- --ignored --nocapture`.
#![expect(clippy::disallowed_methods, reason = "measures the real clock")]

use std::time::Instant;

use rusqlite::{Connection, params};

use super::{Folder, Opened, append, entry, start, workflow_id};
use crate::core::checkpoint::Limits;
use crate::core::claim::Fence;
use crate::store::file::{Trust, prepare};
use crate::store::sqlite::Database;
use crate::store::{Answer, Operation};

const PASSES: usize = 5;

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn per_second(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

fn fences(outcomes: Vec<Answer>) -> Vec<Fence> {
    let fence = |answer| match answer {
        Answer::Claimed(fence) => fence,
        Answer::Appended(_) | Answer::Done => panic!("no claim"),
    };
    outcomes.into_iter().map(fence).collect()
}

fn id(run: usize) -> String {
    format!("0197a1b2-{:04x}-7000-8000-{run:012x}", run * 7_919 % 65_536)
}

/// Each run submits its next row when the one before is on the disk.
fn in_flight(runs: usize, rows: usize) -> f64 {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fences: Vec<_> = (0..runs).map(|run| opened.start(&id(run))).collect();
    let submit = |run: usize, sequence| {
        let operation = append(&id(run), Some(fences[run]), entry(sequence));
        opened.store.submit(operation, run as u32).expect("open");
    };
    let mut next = vec![0; runs];
    let mut left = runs * rows;
    let since = Instant::now();
    (0..runs).for_each(|run| submit(run, 0));
    for completion in opened.outcomes.iter().flatten() {
        completion.outcome.expect("written");
        let run = completion.ticket as usize;
        next[run] += 1;
        left -= 1;
        if next[run] < rows as u64 {
            submit(run, next[run]);
        } else if left == 0 {
            break;
        }
    }
    per_second(runs * rows, since)
}

/// The same rows of the same runs, each in a transaction of its own.
fn one_by_one(runs: usize, rows: usize) -> f64 {
    let folder = Folder::new();
    let file = prepare(&folder.file(), Trust::Ours).expect("a file");
    let mut database = Database::open(&file, "worker-1".to_owned(), Limits::default()).expect("a store");
    let starts: Vec<Operation> = (0..runs).map(|run| start(&id(run))).collect();
    let fences = fences(database.commit(&starts).into_iter().map(|outcome| outcome.expect("claimed")).collect());
    let since = Instant::now();
    for sequence in 0..rows {
        for (run, fence) in fences.iter().enumerate() {
            let operation = append(&id(run), Some(*fence), entry(sequence as u64));
            database.commit(&[operation]).remove(0).expect("written");
        }
    }
    per_second(runs * rows, since)
}

/// What SQLite needs for a row of the same size and nothing else, in a transaction of its own.
fn bare(rows: u32) -> Vec<f64> {
    let folder = Folder::new();
    let bytes = entry(0).encode(&workflow_id(&id(0)), &Limits::default()).expect("a row");
    let file = Connection::open(folder.file()).expect("a file");
    file.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE rows (id, sequence, row)")
        .expect("a table");
    let mut took = Vec::new();
    for sequence in 0..rows {
        let since = Instant::now();
        let mut insert = file.prepare_cached("INSERT INTO rows VALUES (?, ?, ?)").expect("a statement");
        insert.execute(params![id(0), sequence, bytes]).expect("written");
        took.push(since.elapsed().as_secs_f64() * 1e6);
    }
    took
}

/// Submits and waits, one row at a time.
fn alone(rows: usize) -> Vec<f64> {
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start(&id(0));
    let mut took = Vec::new();
    for sequence in 0..rows {
        let operation = append(&id(0), Some(fence), entry(sequence as u64));
        let since = Instant::now();
        opened.ask(operation).expect("written");
        took.push(since.elapsed().as_secs_f64() * 1e6);
    }
    took
}

#[test]
#[ignore = "measures"]
fn appends() {
    for pass in 1..=PASSES {
        let base = one_by_one(1_000, 4);
        print!("pass {pass}: one commit an append {base:6.0}/s;");
        for (runs, rows) in [(1, 2_000), (8, 1_000), (64, 200), (1_000, 60)] {
            let grouped = in_flight(runs, rows);
            print!(" {runs} in flight {grouped:6.0}/s ({:.1}x)", grouped / base);
        }
        println!();
    }
}

#[test]
#[ignore = "measures"]
fn latency() {
    for pass in 1..=PASSES {
        let (bare, alone) = (median(bare(1_000)), median(alone(1_000)));
        println!("pass {pass}: median of a bare commit {bare:.0} us, of a lone append {alone:.0} us");
    }
}

#[test]
#[ignore = "measures"]
fn load() {
    const ROWS: usize = 10_000;
    let folder = Folder::new();
    let opened = Opened::new(&folder.file());
    let fence = opened.start("long");
    for sequence in 0..ROWS {
        opened.store.submit(append("long", Some(fence), entry(sequence as u64)), 0).expect("open");
    }
    let written: usize = opened
        .outcomes
        .iter()
        .map(|batch| batch.len())
        .scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        })
        .find(|sum| *sum == ROWS)
        .expect("all");
    for pass in 1..=PASSES {
        let since = Instant::now();
        assert_eq!(opened.load("long").len(), written);
        println!("pass {pass}: {ROWS} rows loaded in {:.1} ms", since.elapsed().as_secs_f64() * 1e3);
    }
}
