//! The breaker against a model that is too simple to be wrong.

use super::{CLOSED, OPENED, PROBING, REOPENED};
use crate::core::breaker::{Admission, Breaker, Change, Outcome, Policy, SlowCall, Snapshot, State, Trip};
use crate::core::tally::{Counts, Window};
use crate::core::time::{Moment, Nanos};

/// A policy in whole nanoseconds and percents.
#[derive(Debug, Clone, Copy)]
struct Plain {
    trip: PlainTrip,
    reset_timeout: u64,
    half_open_max_calls: u32,
    probe_timeout: u64,
}

#[derive(Debug, Clone, Copy)]
enum PlainTrip {
    Failures(u32),
    Rate { window: PlainWindow, minimum_calls: u32, failed: Option<u32>, slow: Option<(u64, u32)> },
}

#[derive(Debug, Clone, Copy)]
enum PlainWindow {
    Calls(u32),
    Time(u64),
}

fn nanos(nanos: u64) -> Nanos {
    Nanos::from_u128(nanos.into())
}

impl Plain {
    fn policy(self) -> Policy {
        let share = |percent: u32| f64::from(percent) / 100.0;
        let trip = match self.trip {
            PlainTrip::Failures(threshold) => Trip::consecutive_failures(threshold.into()),
            PlainTrip::Rate { window, minimum_calls, failed, slow } => {
                let window = match window {
                    PlainWindow::Calls(calls) => Window::calls(calls.into()),
                    PlainWindow::Time(duration) => Window::time(nanos(duration)),
                };
                let slow = slow.map(|(duration, rate)| SlowCall::new(nanos(duration), share(rate)).expect("a rate"));
                Trip::rate(window.expect("a window"), minimum_calls.into(), failed.map(share), slow)
            }
        };
        let calls = self.half_open_max_calls.into();
        let policy = Policy::new(trip.expect("a trip"), nanos(self.reset_timeout), calls, nanos(self.probe_timeout));
        policy.expect("a policy")
    }
}

/// The rules read aloud: every outcome of a period is kept, and everything is counted afresh.
struct Model {
    plain: Plain,
    state: State,
    epoch: u64,
    is_forced: bool,
    opened: u64,
    ends: Vec<End>,
    probes: Vec<(u64, u64)>, // number and start of those in flight
    launched: u64,
    successes: u32,
}

/// How a call ended, and in which slice of the clock.
#[derive(Clone, Copy)]
struct End {
    failed: bool,
    slow: bool,
    slice: u64,
}

#[derive(Clone, Copy)]
struct ModelPermit {
    epoch: u64,
    started: u64,
    number: u64,
}

impl Model {
    fn new(plain: Plain) -> Self {
        Self {
            plain,
            state: State::Closed,
            epoch: 0,
            is_forced: false,
            opened: 0,
            ends: Vec::new(),
            probes: Vec::new(),
            launched: 0,
            successes: 0,
        }
    }

    fn become_state(&mut self, to: State, is_forced: bool) -> Option<Change> {
        let from = self.state;
        let epoch = self.epoch + 1;
        *self = Self { state: to, is_forced, epoch, ..Self::new(self.plain) };
        (from != to).then_some(Change { from, to })
    }

    fn open(&mut self, now: u64) -> Option<Change> {
        let change = self.become_state(State::Open, false);
        self.opened = now;
        change
    }

    fn slice(&self, now: u64) -> u64 {
        match self.plain.trip {
            PlainTrip::Rate { window: PlainWindow::Time(duration), .. } => {
                let newest = self.ends.last().map_or(0, |end| end.slice);
                newest.max(now / duration.div_ceil(16))
            }
            PlainTrip::Failures(_) | PlainTrip::Rate { window: PlainWindow::Calls(_), .. } => 0,
        }
    }

    fn counted(&self, now: u64) -> Vec<End> {
        let ends = self.ends.iter().copied();
        match self.plain.trip {
            PlainTrip::Failures(_) => ends.rev().take_while(|end| end.failed).collect(),
            PlainTrip::Rate { window: PlainWindow::Calls(calls), .. } => ends.rev().take(calls as usize).collect(),
            PlainTrip::Rate { window: PlainWindow::Time(_), .. } => {
                ends.filter(|end| end.slice + 16 > self.slice(now)).collect()
            }
        }
    }

    fn counts(&self, now: u64) -> [u32; 3] {
        let ends = self.counted(now);
        let count = |is: fn(&&End) -> bool| ends.iter().filter(is).count() as u32;
        [count(|_| true), count(|end| end.failed), count(|end| end.slow)]
    }

    fn has_tripped(&self, now: u64) -> bool {
        let [calls, failed, slow] = self.counts(now);
        match self.plain.trip {
            PlainTrip::Failures(threshold) => failed >= threshold,
            PlainTrip::Rate { minimum_calls, failed: failure_rate, slow: slow_call, .. } => {
                calls >= minimum_calls
                    && (failure_rate.is_some_and(|percent| failed * 100 >= percent * calls)
                        || slow_call.is_some_and(|(_, percent)| slow * 100 >= percent * calls))
            }
        }
    }

    fn in_flight(&self, now: u64) -> Vec<(u64, u64)> {
        let is_live = |probe: &(u64, u64)| now < probe.1 + self.plain.probe_timeout;
        self.probes.iter().copied().filter(is_live).collect()
    }

    fn retry_after(&self, now: u64) -> Option<u64> {
        let in_flight = self.in_flight(now);
        match self.state {
            State::Open if !self.is_forced => (self.opened + self.plain.reset_timeout).checked_sub(now),
            State::HalfOpen if in_flight.len() as u32 == self.plain.half_open_max_calls => {
                in_flight.iter().map(|probe| probe.1 + self.plain.probe_timeout - now).min()
            }
            State::Closed | State::Open | State::HalfOpen => None,
        }
        .filter(|wait| *wait > 0)
    }

    fn acquire(&mut self, now: u64) -> (Option<ModelPermit>, Option<Change>) {
        let is_due = self.state == State::Open && !self.is_forced && self.retry_after(now).is_none();
        let change = if is_due { self.become_state(State::HalfOpen, false) } else { None };
        self.probes = self.in_flight(now);
        let is_admitted = match self.state {
            State::Closed => true,
            State::Open => false,
            State::HalfOpen => (self.probes.len() as u32) < self.plain.half_open_max_calls,
        };
        if is_admitted && self.state == State::HalfOpen {
            self.launched += 1;
            let latest = self.probes.iter().map(|probe| probe.1).max();
            self.probes.push((self.launched, now.max(latest.unwrap_or(0))));
        }
        let permit = ModelPermit { epoch: self.epoch, started: now, number: self.launched };
        (is_admitted.then_some(permit), change)
    }

    fn record(&mut self, permit: ModelPermit, outcome: Outcome, now: u64) -> Option<Change> {
        if permit.epoch != self.epoch {
            return None;
        }
        let slow = match self.plain.trip {
            PlainTrip::Rate { slow: Some((duration, _)), .. } => now >= permit.started + duration,
            PlainTrip::Failures(_) | PlainTrip::Rate { slow: None, .. } => false,
        };
        let failed = outcome == Outcome::Failure;
        if self.state == State::HalfOpen {
            self.probes = self.in_flight(now);
            let before = self.probes.len();
            self.probes.retain(|probe| probe.0 != permit.number);
            let is_late = self.probes.len() == before;
            if is_late || outcome == Outcome::Ignored {
                return None;
            }
            if failed || slow {
                return self.open(now);
            }
            self.successes += 1;
            let is_enough = self.successes == self.plain.half_open_max_calls;
            return if is_enough { self.become_state(State::Closed, false) } else { None };
        }
        if outcome != Outcome::Ignored {
            self.ends.push(End { failed, slow, slice: self.slice(now) });
        }
        if self.has_tripped(now) { self.open(now) } else { None }
    }

    fn snapshot(&self, now: u64) -> Snapshot {
        let [calls, failures, slow_calls] = self.counts(now).map(u64::from);
        Snapshot {
            state: self.state,
            is_forced: self.is_forced,
            epoch: self.epoch,
            counts: Counts { calls, failures, slow_calls },
            probes: self.in_flight(now).len() as u32,
            successes: self.successes,
            retry_after: self.retry_after(now).map(nanos),
        }
    }
}

/// Deterministic dice (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// Plays some hundred random events on a breaker and its model; the changes that were seen.
fn play(plain: Plain, seed: u64) -> Vec<Change> {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15 ^ seed);
    let mut now = if seed.is_multiple_of(2) { 0 } else { 1_000_000_007 };
    let (mut breaker, mut model) = (Breaker::new(plain.policy()), Model::new(plain));
    let mut permits = Vec::new();
    let mut changes = Vec::new();
    let bad_days = dice.below(10); // how often calls fail
    for step in 0..400 {
        let story = format!("{plain:?}, seed {seed}, step {step}");
        let moment = Moment::from_nanos(now);
        let any = if breaker.needs_time() { moment } else { Moment::from_nanos(dice.below(1_000_000)) };
        let change = match dice.below(100) {
            0..45 => {
                let (expected, change) = model.acquire(now);
                match (breaker.acquire(any), expected) {
                    (Admission::Admitted { permit, change: told }, Some(expected)) => {
                        assert_eq!(told, change, "{story}");
                        permits.push((permit, expected));
                    }
                    (Admission::Rejected { retry_after }, None) => {
                        assert_eq!(retry_after, model.retry_after(now).map(nanos), "{story}");
                    }
                    (told, _) => panic!("{told:?}: {story}"),
                }
                change
            }
            45..85 if !permits.is_empty() => {
                let (permit, expected) = permits.swap_remove(dice.below(permits.len() as u64) as usize);
                let outcome = match dice.below(10) {
                    0 => Outcome::Ignored,
                    roll if roll <= bad_days => Outcome::Failure,
                    _ => Outcome::Success,
                };
                let change = model.record(expected, outcome, now);
                let moment = if outcome == Outcome::Failure { moment } else { any };
                assert_eq!(breaker.record(permit, outcome, moment), change, "{story}");
                change
            }
            85..88 => {
                permits.pop(); // a call that never ends
                None
            }
            88 => {
                let change = model.become_state(State::Open, true);
                assert_eq!(breaker.force_open(), change, "{story}");
                change
            }
            89 | 90 => {
                let change = model.become_state(State::Closed, false);
                assert_eq!(breaker.reset(), change, "{story}");
                change
            }
            91 => {
                now = now.saturating_sub(dice.below(40));
                None
            }
            92 | 93 => {
                now += dice.below(200);
                None
            }
            _ => {
                now += dice.below(12);
                None
            }
        };
        changes.extend(change);
        assert_eq!(breaker.snapshot(Moment::from_nanos(now)), model.snapshot(now), "{story}");
    }
    changes
}

#[test]
fn test_a_breaker_does_what_its_model_does() {
    let rate = |window, minimum_calls, failed, slow| PlainTrip::Rate { window, minimum_calls, failed, slow };
    let trips = [
        PlainTrip::Failures(1),
        PlainTrip::Failures(3),
        rate(PlainWindow::Calls(1), 1, Some(100), None),
        rate(PlainWindow::Calls(7), 3, Some(50), None),
        rate(PlainWindow::Calls(5), 5, None, Some((10, 60))),
        rate(PlainWindow::Time(64), 3, Some(50), None),
        rate(PlainWindow::Time(100), 2, Some(70), Some((20, 30))), // slices of 7 ns
        rate(PlainWindow::Time(5), 1, None, Some((1, 100))),       // slices of 1 ns
    ];
    for trip in trips {
        for half_open_max_calls in [1, 2, 5] {
            let plain = Plain { trip, reset_timeout: 40, half_open_max_calls, probe_timeout: 25 };
            let changes: Vec<_> = (0..60).flat_map(|seed| play(plain, seed)).collect();

            for change in [OPENED, PROBING, REOPENED, CLOSED] {
                assert!(changes.contains(&change), "never {change:?}: {plain:?}");
            }
        }
    }
}
