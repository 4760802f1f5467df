//! A process that is killed loses nothing that it was told is written.
//!
//! The process is this test binary, run again to play the test named `child`.

use std::collections::HashMap;
use std::env;
use std::io::{BufRead, BufReader, Write, stdout};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use super::{Dice, Folder, LATER, NOW, Opened, append, claim, entry, fence, refusal, settings, start, workflow_id};
use crate::core::claim::{Fence, Lease, Refusal};
use crate::store::{Answer, Completion, Store};

const FILE: &str = "CANO_STORE_OF_THE_KILLED";
const RUNS: usize = 40;
const ROUNDS: usize = 50;

/// Writes rows of many runs until it is killed, and prints those that it was told are written.
#[test]
fn child() {
    let Some(file) = env::var_os(FILE) else { return };
    let (sender, batches) = mpsc::channel();
    let deliver = move |batch: Vec<Completion<usize>>| sender.send(batch).expect("the loop below");
    let store = Store::open(file.as_ref(), settings("the killed"), deliver).expect("a store");
    let mut next: Vec<u64> = Vec::new();
    let mut fences: Vec<Option<Fence>> = vec![None; RUNS];
    for run in 0..RUNS {
        let id = format!("run-{run}");
        let rows = store.load_run(&workflow_id(&id)).expect("rows");
        next.push(rows.len() as u64);
        let operation = if rows.is_empty() { start(&id) } else { claim(&id, NOW) };
        store.submit(operation, run).expect("open");
    }
    let mut out = stdout().lock();
    for completion in batches.iter().flatten() {
        let run = completion.ticket;
        match completion.outcome.expect("nothing but a kill goes wrong here") {
            Answer::Claimed(fence) => fences[run] = Some(fence),
            Answer::Appended(_) => {
                writeln!(out, "run-{run} {}", next[run]).expect("a reader");
                next[run] += 1;
            }
            Answer::Done => {}
        }
        store.submit(append(&format!("run-{run}"), fences[run], entry(next[run])), run).expect("open");
    }
}

fn spawn(folder: &Folder) -> Child {
    Command::new(env::current_exe().expect("this binary"))
        .args(["--exact", "store::tests::kill::child", "--nocapture"])
        .env(FILE, folder.file())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a child")
}

/// Kills the child once it has printed so many lines; returns how many rows of each run it was told
/// of.
fn kill_after(mut child: Child, lines: usize, told: &mut HashMap<String, u64>) {
    let mut heard = 0;
    for line in BufReader::new(child.stdout.take().expect("a pipe")).lines() {
        let line = line.expect("a line");
        // A line that was cut off by the kill tells nothing.
        let words: Vec<&str> = line.split(' ').collect();
        let [run, sequence] = words[..] else { continue };
        let Some(sequence) = run.strip_prefix("run-").and(sequence.parse::<u64>().ok()) else { continue };
        let count = told.entry(run.to_owned()).or_default();
        *count = (*count).max(sequence + 1);
        heard += 1;
        if heard == lines {
            child.kill().expect("killed");
        }
    }
    assert!(heard >= lines, "the child ended by itself after {heard} rows");
    child.wait().expect("ended");
}

#[test]
fn test_rows_that_were_acknowledged_survive_kills() {
    // RS-024, ST-009: what they need of the store
    let folder = Folder::new();
    let mut told = HashMap::new();
    let mut dice = Dice::new();
    for round in 0..ROUNDS {
        kill_after(spawn(&folder), 1 + dice.below(400), &mut told);
        if round % 10 != 9 {
            continue; // the next child opens what this one left
        }
        let opened = Opened::new(&folder.file());
        for run in 0..RUNS {
            let id = format!("run-{run}");
            let rows = opened.load(&id); // dense, undamaged, or this fails
            let told = told.get(&id).copied().unwrap_or(0);
            assert!(rows.len() as u64 >= told, "round {round}: {id} has {} rows of {told}", rows.len());
            for (sequence, row) in rows.iter().enumerate() {
                assert_eq!(*row, entry(sequence as u64));
            }
        }
    }
    let written: u64 = told.values().sum();
    println!("{ROUNDS} kills, {written} acknowledged rows, none lost");
}

#[test]
fn test_claims_of_the_killed_are_free_at_once_if_nobody_else_is_there() {
    let folder = Folder::new();
    kill_after(spawn(&folder), 1, &mut HashMap::new());

    let opened = Opened::new(&folder.file());

    fence(opened.ask(claim("run-0", NOW)));
}

#[test]
fn test_claims_of_the_killed_run_out_if_somebody_else_is_there() {
    let folder = Folder::new();
    let witness = Opened::new(&folder.file());
    kill_after(spawn(&folder), 1, &mut HashMap::new());

    let opened = Opened::of(&folder.file(), "worker-2");

    let held = Refusal::Claimed(Lease { owner: "the killed".to_owned(), until: LATER });
    assert_eq!(refusal(opened.ask(claim("run-0", LATER - 1))), held);
    fence(opened.ask(claim("run-0", LATER)));
    drop(witness);
}
