//! When calls are let through to something that fails, and when they are spared it.

use std::collections::VecDeque;
use std::fmt;

use super::error::Error;
use super::tally::{Counts, Tally, Window, counted, lasting};
use super::time::{Moment, Nanos};

const MOST_FAILURES: u32 = 1_000_000;
const MOST_PROBES: u32 = 10_000;
const NO_PROBE: u64 = 0;

/// What opens a breaker, and how it closes again.
///
/// - `trip`: what opens it.
/// - `reset_timeout`: how long it stays open before probes are let through.
/// - `half_open_max_calls`: how many probes may be in flight at once, and how many must succeed.
/// - `probe_timeout`: how long a probe holds its place. It should be longer than any healthy call:
///   a probe that takes this long frees its place, and its outcome counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    pub trip: Trip,
    pub reset_timeout: Nanos,
    pub half_open_max_calls: u32,
    pub probe_timeout: Nanos,
}

impl Policy {
    /// Durations above zero; `half_open_max_calls` 1..=10,000.
    pub fn new(
        trip: Trip,
        reset_timeout: Nanos,
        half_open_max_calls: i64,
        probe_timeout: Nanos,
    ) -> Result<Self, Error> {
        Ok(Self {
            trip,
            reset_timeout: lasting("reset_timeout", reset_timeout)?,
            half_open_max_calls: counted("half_open_max_calls", half_open_max_calls, MOST_PROBES)?,
            probe_timeout: lasting("probe_timeout", probe_timeout)?,
        })
    }
}

/// What opens a closed breaker; looked at after every outcome that counts.
///
/// - `ConsecutiveFailures`: `threshold` failures without a success between them.
/// - `Rate`: with at least `minimum_calls` in the window, `failures / calls >= failure_rate` or
///   `slow_calls / calls >= slow_call.rate`. Ten calls with a `failure_rate` of 0.5 open it at the
///   fifth failure, or at the tenth call if the five failures came before.
///
/// The functions below check the parameters; whoever writes a variant by hand vouches for them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trip {
    ConsecutiveFailures { threshold: u32 },
    Rate { window: Window, minimum_calls: u32, failure_rate: Option<f64>, slow_call: Option<SlowCall> },
}

impl Trip {
    /// So many failures in a row, `threshold` 1..=1,000,000.
    pub fn consecutive_failures(threshold: i64) -> Result<Self, Error> {
        let threshold = counted("failure_threshold", threshold, MOST_FAILURES)?;
        Ok(Self::ConsecutiveFailures { threshold })
    }

    /// A share of the calls in a window, of failures or of slow calls or of either;
    /// `minimum_calls` 1..=1,000,000 and no more than the window holds, `failure_rate` in `(0, 1]`.
    pub fn rate(
        window: Window,
        minimum_calls: i64,
        failure_rate: Option<f64>,
        slow_call: Option<SlowCall>,
    ) -> Result<Self, Error> {
        let minimum_calls = counted("minimum_calls", minimum_calls, MOST_FAILURES)?;
        match window {
            Window::Calls(window) if minimum_calls > window => {
                return Err(Error::MinimumAboveWindow { minimum_calls, window });
            }
            Window::Calls(_) | Window::Time(_) => {}
        }
        if failure_rate.is_none() && slow_call.is_none() {
            return Err(Error::RateMissing);
        }
        let failure_rate = failure_rate.map(|rate| share("failure_rate", rate)).transpose()?;
        Ok(Self::Rate { window, minimum_calls, failure_rate, slow_call })
    }

    fn is_slow(&self, took: Nanos) -> bool {
        match self {
            Self::ConsecutiveFailures { .. } => false,
            Self::Rate { slow_call, .. } => slow_call.is_some_and(|slow| took >= slow.duration),
        }
    }

    fn is_met(&self, counts: Counts) -> bool {
        match *self {
            Self::ConsecutiveFailures { threshold } => counts.failures >= u64::from(threshold),
            Self::Rate { minimum_calls, failure_rate, slow_call, .. } => {
                // A quotient is rounded as the literal is: 7 / 100 reaches 0.07, where 0.07 * 100 is above 7.
                let is_reached = |part: u64, rate| part as f64 / counts.calls as f64 >= rate;
                counts.calls >= u64::from(minimum_calls)
                    && (failure_rate.is_some_and(|rate| is_reached(counts.failures, rate))
                        || slow_call.is_some_and(|slow| is_reached(counts.slow_calls, slow.rate)))
            }
        }
    }
}

/// From how long on a call is slow, from permit to outcome and however it ends, and which share of
/// slow calls opens the breaker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowCall {
    pub duration: Nanos,
    pub rate: f64,
}

impl SlowCall {
    /// A `duration` above zero, a `rate` in `(0, 1]`.
    pub fn new(duration: Nanos, rate: f64) -> Result<Self, Error> {
        Ok(Self { duration: lasting("slow_call_duration", duration)?, rate: share("slow_call_rate", rate)? })
    }
}

/// What a breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Every call is let through.
    Closed,
    /// No call is.
    Open,
    /// A few are, to find out.
    HalfOpen,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        })
    }
}

/// A change of state, for those who announce it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub from: State,
    pub to: State,
}

/// The right to make one call, to be given back to the same breaker with the call's outcome, once.
///
/// A permit that is never given back costs nothing while the breaker is closed, and a probe's place
/// until `probe_timeout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit {
    epoch: u64,
    started: Moment,
    probe: u64,
}

/// The answer to a call that asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    Admitted {
        permit: Permit,
        change: Option<Change>,
    },
    /// `retry_after` is the time until the next call is admitted, provided that nothing happens
    /// before: the rest of `reset_timeout`, or of the oldest probe's `probe_timeout`. None if only
    /// `reset` ends it.
    Rejected {
        retry_after: Option<Nanos>,
    },
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
    /// Neither: a cancelled call says nothing about what it called.
    Ignored,
}

/// A breaker as it looks from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    pub state: State,
    /// Whether it is open by `force_open`, that is until `reset`.
    pub is_forced: bool,
    /// The number of this period; each change of state, `force_open` and `reset` begins the next.
    pub epoch: u64,
    /// What counts towards a trip: the present failures in a row, or the window. Zero unless
    /// closed.
    pub counts: Counts,
    /// Probes in flight.
    pub probes: u32,
    /// Probes that have succeeded in this period.
    pub successes: u32,
    /// As in `Admission::Rejected`; none as well if a call would be admitted.
    pub retry_after: Option<Nanos>,
}

/// A circuit breaker.
///
/// | state     | event                                                  | next                |
/// |-----------|--------------------------------------------------------|---------------------|
/// | closed    | an outcome, after which `trip` is met                  | open                |
/// | open      | a call asks, `reset_timeout` after the breaker opened  | half-open           |
/// | half-open | a probe fails, or is a slow call                       | open                |
/// | half-open | `half_open_max_calls` probes have succeeded            | closed              |
/// | any       | `force_open`                                           | open, until `reset` |
/// | any       | `reset`                                                | closed              |
///
/// An open breaker becomes half-open only when a call asks: no timer runs, and looking changes
/// nothing. Each state begins afresh, with counters at zero and a full `reset_timeout`.
///
/// Invariants. An outcome counts only in the period (`epoch`) whose permit it is of. In half-open at
/// most `half_open_max_calls` probes are in flight; any outcome frees a probe's place, and so does
/// `probe_timeout`, after which the outcome counts for nothing. `Outcome::Ignored` does nothing
/// else. When the clock goes back, nothing is over too early: it counts as standing still until it is
/// where it was.
#[derive(Debug)]
pub struct Breaker {
    policy: Policy,
    phase: Phase,
    epoch: u64,
}

/// A state and what belongs to it.
#[derive(Debug)]
enum Phase {
    Closed(Tally),
    Open { since: Moment },
    Forced,
    HalfOpen(Probes),
}

/// What can happen to a breaker.
#[derive(Debug, Clone, Copy)]
enum Event {
    Asked { now: Moment },
    Ended { probe: u64, outcome: Outcome, is_slow: bool, now: Moment },
    Forced,
    Reset,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(policy: Policy) -> Self {
        Self { policy, phase: closed(&policy), epoch: 0 }
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    pub fn state(&self) -> State {
        match self.phase {
            Phase::Closed(_) => State::Closed,
            Phase::Open { .. } | Phase::Forced => State::Open,
            Phase::HalfOpen(_) => State::HalfOpen,
        }
    }

    pub fn snapshot(&self, now: Moment) -> Snapshot {
        let (counts, probes, successes) = match &self.phase {
            Phase::Closed(tally) => (tally.counts(now), 0, 0),
            Phase::Open { .. } | Phase::Forced => (Counts::default(), 0, 0),
            Phase::HalfOpen(probes) => (Counts::default(), probes.in_flight(&self.policy, now), probes.successes),
        };
        Snapshot {
            state: self.state(),
            is_forced: matches!(self.phase, Phase::Forced),
            epoch: self.epoch,
            counts,
            probes: probes as u32,
            successes,
            retry_after: self.retry_after(now),
        }
    }

    /// Whether the time matters to a call that asks, or to an outcome that is no failure.
    ///
    /// A closed breaker that counts failures in a row does without; it may be given any moment.
    #[inline]
    pub fn needs_time(&self) -> bool {
        !matches!((&self.phase, self.policy.trip), (Phase::Closed(_), Trip::ConsecutiveFailures { .. }))
    }

    /// Asks for a permit to call.
    #[inline]
    pub fn acquire(&mut self, now: Moment) -> Admission {
        let change = self.step(Event::Asked { now });
        let probe = match &mut self.phase {
            Phase::Closed(_) => Some(NO_PROBE),
            Phase::Open { .. } | Phase::Forced => None,
            Phase::HalfOpen(probes) => probes.launch(&self.policy, now),
        };
        match probe {
            Some(probe) => Admission::Admitted { permit: Permit { epoch: self.epoch, started: now, probe }, change },
            None => Admission::Rejected { retry_after: self.retry_after(now) },
        }
    }

    /// Gives a permit back with the outcome of its call.
    #[inline]
    pub fn record(&mut self, permit: Permit, outcome: Outcome, now: Moment) -> Option<Change> {
        if permit.epoch != self.epoch {
            return None;
        }
        let is_slow = self.policy.trip.is_slow(now.since(permit.started));
        self.step(Event::Ended { probe: permit.probe, outcome, is_slow, now })
    }

    /// Opens the breaker until `reset`; no call is admitted before.
    pub fn force_open(&mut self) -> Option<Change> {
        self.step(Event::Forced)
    }

    /// Closes the breaker with counters at zero; calls in flight no longer count.
    pub fn reset(&mut self) -> Option<Change> {
        self.step(Event::Reset)
    }

    #[inline]
    fn step(&mut self, event: Event) -> Option<Change> {
        let from = self.state();
        self.phase = self.next(event)?;
        self.epoch = self.epoch.wrapping_add(1);
        let to = self.state();
        (from != to).then_some(Change { from, to })
    }

    /// The transition table: the phase that an event begins, if it does.
    #[inline]
    fn next(&mut self, event: Event) -> Option<Phase> {
        let policy = &self.policy;
        match (&mut self.phase, event) {
            (Phase::Closed(tally), Event::Ended { outcome, is_slow, now, .. }) => {
                let has_failed = match outcome {
                    Outcome::Success => false,
                    Outcome::Failure => true,
                    Outcome::Ignored => return None,
                };
                let counts = tally.book(Counts::one(has_failed, is_slow), now);
                policy.trip.is_met(counts).then_some(Phase::Open { since: now })
            }
            (Phase::Open { since }, Event::Asked { now }) => {
                let is_over = left(*since, policy.reset_timeout, now).is_none();
                is_over.then(|| Phase::HalfOpen(Probes::default()))
            }
            (Phase::HalfOpen(probes), Event::Ended { probe, outcome, is_slow, now }) => {
                if !probes.land(probe, policy, now) {
                    return None;
                }
                match outcome {
                    Outcome::Success if !is_slow => probes.succeed(policy).then(|| closed(policy)),
                    Outcome::Success | Outcome::Failure => Some(Phase::Open { since: now }),
                    Outcome::Ignored => None,
                }
            }
            // No permit is of an open period, so nothing ends in one.
            (Phase::Closed(_) | Phase::Forced | Phase::HalfOpen(_), Event::Asked { .. })
            | (Phase::Open { .. } | Phase::Forced, Event::Ended { .. }) => None,
            (Phase::Closed(_) | Phase::Open { .. } | Phase::Forced | Phase::HalfOpen(_), Event::Forced) => {
                Some(Phase::Forced)
            }
            (Phase::Closed(_) | Phase::Open { .. } | Phase::Forced | Phase::HalfOpen(_), Event::Reset) => {
                Some(closed(policy))
            }
        }
    }

    fn retry_after(&self, now: Moment) -> Option<Nanos> {
        match &self.phase {
            Phase::Closed(_) | Phase::Forced => None,
            Phase::Open { since } => left(*since, self.policy.reset_timeout, now),
            Phase::HalfOpen(probes) => probes.retry_after(&self.policy, now),
        }
    }
}

/// The probes of one half-open period.
///
/// Those in flight are in the order of their numbers and of their starts, so the first is the first
/// to be over.
#[derive(Debug, Default)]
struct Probes {
    in_flight: VecDeque<Probe>,
    launched: u64,
    successes: u32,
}

#[derive(Debug)]
struct Probe {
    number: u64,
    started: Moment,
}

impl Probes {
    /// Gives a place and a number to a probe, if there is a place.
    fn launch(&mut self, policy: &Policy, now: Moment) -> Option<u64> {
        self.expire(policy, now);
        if self.in_flight.len() >= policy.half_open_max_calls as usize {
            return None;
        }
        self.launched += 1;
        let number = self.launched;
        let started = self.in_flight.back().map_or(now, |last| last.started.max(now));
        self.in_flight.push_back(Probe { number, started });
        Some(number)
    }

    /// Frees the place of a probe; false if it had none any more.
    fn land(&mut self, number: u64, policy: &Policy, now: Moment) -> bool {
        self.expire(policy, now);
        let position = self.in_flight.binary_search_by_key(&number, |probe| probe.number);
        position.is_ok_and(|position| self.in_flight.remove(position).is_some())
    }

    /// Counts a success; true if it was the last one needed.
    fn succeed(&mut self, policy: &Policy) -> bool {
        self.successes += 1;
        self.successes >= policy.half_open_max_calls
    }

    fn expire(&mut self, policy: &Policy, now: Moment) {
        let expired = self.expired(policy, now);
        self.in_flight.drain(..expired);
    }

    fn expired(&self, policy: &Policy, now: Moment) -> usize {
        self.in_flight.partition_point(|probe| left(probe.started, policy.probe_timeout, now).is_none())
    }

    fn in_flight(&self, policy: &Policy, now: Moment) -> usize {
        self.in_flight.len() - self.expired(policy, now)
    }

    /// The time until a place is free, if none is.
    fn retry_after(&self, policy: &Policy, now: Moment) -> Option<Nanos> {
        let is_full = self.in_flight.len() >= policy.half_open_max_calls as usize;
        let oldest = self.in_flight.front().filter(|_| is_full)?;
        left(oldest.started, policy.probe_timeout, now)
    }
}

fn closed(policy: &Policy) -> Phase {
    Phase::Closed(match policy.trip {
        Trip::ConsecutiveFailures { .. } => Tally::streak(),
        Trip::Rate { window, .. } => Tally::over(window),
    })
}

/// The time from `now` until `duration` has passed since `start`, if it has not.
///
/// Elapsed time is compared, not a deadline: that would come early at the end of the clock.
fn left(start: Moment, duration: Nanos, now: Moment) -> Option<Nanos> {
    (now.since(start) < duration).then(|| start.plus(duration).since(now))
}

fn share(name: &'static str, share: f64) -> Result<f64, Error> {
    if share > 0.0 && share <= 1.0 { Ok(share) } else { Err(Error::Share { name, share }) }
}
