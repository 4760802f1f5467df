//! How calls have lately ended: counts over a window.

use std::mem;

use super::error::Error;
use super::time::{Moment, Nanos};

const WIDEST: u32 = 10_000;
const SLICES: u64 = 16;

/// Which of the calls that have ended count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// The last so many.
    Calls(u32),
    /// Those that ended within the last so long, to a 16th of it: the clock is cut into slices of a
    /// 16th of the window (rounded up to whole nanoseconds), and what counts is the present slice
    /// and the 15 before it. A window of 60 s has slices of 3.75 s: a call counts for at least
    /// 56.25 s and at most 60 s.
    Time(Nanos),
}

impl Window {
    /// The last `calls`, 1..=10,000.
    pub fn calls(calls: i64) -> Result<Self, Error> {
        counted("calls", calls, WIDEST).map(Self::Calls)
    }

    /// The calls of the last `duration`, above zero.
    pub fn time(duration: Nanos) -> Result<Self, Error> {
        lasting("seconds", duration).map(Self::Time)
    }
}

/// How many calls have ended, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub calls: u64,
    pub failures: u64,
    pub slow_calls: u64,
}

impl Counts {
    /// The counts of a single call.
    pub(super) fn one(failed: bool, slow: bool) -> Self {
        Self { calls: 1, failures: u64::from(failed), slow_calls: u64::from(slow) }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            failures: self.failures + other.failures,
            slow_calls: self.slow_calls + other.slow_calls,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            calls: self.calls - other.calls,
            failures: self.failures - other.failures,
            slow_calls: self.slow_calls - other.slow_calls,
        }
    }
}

/// The books of the calls that have ended.
#[derive(Debug)]
pub(super) enum Tally {
    /// The failures since the last success.
    Streak(Counts),
    Window(Ring),
}

impl Tally {
    pub(super) fn streak() -> Self {
        Self::Streak(Counts::default())
    }

    pub(super) fn over(window: Window) -> Self {
        Self::Window(Ring::new(window))
    }

    /// Books one call, and says what counts from here on.
    #[inline]
    pub(super) fn book(&mut self, call: Counts, now: Moment) -> Counts {
        match self {
            Self::Streak(streak) => {
                *streak = if call.failures == 0 { Counts::default() } else { streak.plus(call) };
                *streak
            }
            Self::Window(ring) => ring.book(call, now),
        }
    }

    /// What counts at `now`.
    pub(super) fn counts(&self, now: Moment) -> Counts {
        match self {
            Self::Streak(streak) => *streak,
            Self::Window(ring) => ring.counts(now),
        }
    }
}

/// The counts of a window, in a ring of buckets.
///
/// A window of `n` calls is `n` buckets of one call each; a window of time has a bucket for each of
/// its slices. `head` is the newest bucket, the one after it the oldest, and `sum` is what all of
/// them hold. A slice never becomes an older one: while the clock is behind the newest slice, calls
/// count in that one, and nothing is forgotten.
#[derive(Debug)]
pub(super) struct Ring {
    pace: Pace,
    buckets: Box<[Counts]>,
    head: usize,
    sum: Counts,
}

/// What begins a new bucket.
#[derive(Debug)]
enum Pace {
    /// Every call.
    Call,
    /// A slice of the clock later than the newest that has a bucket.
    Slice { width: u64, newest: u64 },
}

impl Ring {
    fn new(window: Window) -> Self {
        let (pace, length) = match window {
            Window::Calls(calls) => (Pace::Call, calls.max(1) as usize),
            Window::Time(duration) => {
                let width = duration.as_u64().div_ceil(SLICES).max(1);
                (Pace::Slice { width, newest: 0 }, SLICES as usize)
            }
        };
        Self { pace, buckets: vec![Counts::default(); length].into_boxed_slice(), head: 0, sum: Counts::default() }
    }

    fn book(&mut self, call: Counts, now: Moment) -> Counts {
        let steps = match &mut self.pace {
            Pace::Call => 1,
            Pace::Slice { width, newest } => {
                let steps = (now.as_nanos() / *width).saturating_sub(*newest);
                *newest += steps;
                steps
            }
        };
        for _ in 0..steps.min(self.buckets.len() as u64) {
            self.head = if self.head + 1 == self.buckets.len() { 0 } else { self.head + 1 };
            self.sum = self.sum.minus(mem::take(&mut self.buckets[self.head]));
        }
        self.buckets[self.head] = self.buckets[self.head].plus(call);
        self.sum = self.sum.plus(call);
        self.sum
    }

    fn counts(&self, now: Moment) -> Counts {
        match self.pace {
            Pace::Call => self.sum,
            Pace::Slice { width, newest } => {
                let steps = (now.as_nanos() / width).saturating_sub(newest).min(SLICES);
                let oldest = self.buckets.iter().cycle().skip(self.head + 1).take(steps as usize);
                oldest.fold(self.sum, |sum, bucket| sum.minus(*bucket))
            }
        }
    }
}

/// A number in `1..=limit`.
pub(super) fn counted(name: &'static str, calls: i64, limit: u32) -> Result<u32, Error> {
    match u32::try_from(calls) {
        Ok(count) if (1..=limit).contains(&count) => Ok(count),
        _ => Err(Error::Calls { name, calls, limit }),
    }
}

/// A duration above zero.
pub(super) fn lasting(name: &'static str, duration: Nanos) -> Result<Nanos, Error> {
    if duration > Nanos::ZERO { Ok(duration) } else { Err(Error::NoDuration { name }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Counts = Counts { calls: 1, failures: 0, slow_calls: 0 };

    /// A window of 16 ns has slices of 1 ns.
    fn sixteen_nanos() -> Ring {
        let window = Nanos::from_seconds("window", 16e-9).map(Window::Time);
        Ring::new(window.expect("a duration"))
    }

    #[test]
    fn test_a_window_of_time_keeps_the_present_slice_and_the_fifteen_before_it() {
        let mut ring = sixteen_nanos();
        for now in 100..200 {
            assert_eq!(ring.book(CALL, Moment::from_nanos(now)).calls, 16.min(now - 99));
        }

        let left = [199, 200, 214, 215, 5000, u64::MAX].map(|now| ring.counts(Moment::from_nanos(now)).calls);

        assert_eq!(left, [16, 15, 1, 0, 0, 0]);
    }

    #[test]
    fn test_a_window_of_time_forgets_nothing_while_the_clock_is_behind() {
        let mut ring = sixteen_nanos();
        ring.book(CALL, Moment::from_nanos(1000));

        for now in [999, 10, 0] {
            ring.book(CALL, Moment::from_nanos(now));
        }

        let left = [0, 1000, 1015, 1016].map(|now| ring.counts(Moment::from_nanos(now)).calls);
        assert_eq!(left, [4, 4, 4, 0]);
    }

    #[test]
    fn test_the_end_of_the_clock_is_a_slice_like_any_other() {
        let mut ring = sixteen_nanos();
        for now in [0, u64::MAX - 1, u64::MAX, u64::MAX] {
            ring.book(CALL, Moment::from_nanos(now));
        }

        assert_eq!(ring.counts(Moment::from_nanos(u64::MAX)).calls, 3);
    }
}
