//! Durations, and the moments they lie between.

use super::error::Error;

const PER_SECOND: f64 = 1e9;

/// A duration in whole nanoseconds, at most ten years.
///
/// The bound leaves so much room in 64 bits (a factor of 58) that adding a few durations cannot
/// overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Nanos(u64);

impl Nanos {
    pub const ZERO: Self = Self(0);
    /// Ten years of 365.25 days, 315,576,000 s.
    pub const MAX: Self = Self(315_576_000 * 1_000_000_000);

    /// Converts seconds, rounded to the nearest nanosecond.
    ///
    /// Only zero becomes zero: a positive duration is at least 1 ns, so that a back-off somebody
    /// asked for is never rounded into a busy loop. `name` is the parameter that an error talks
    /// about.
    pub fn from_seconds(name: &str, seconds: f64) -> Result<Self, Error> {
        if !(0.0..=Self::MAX.as_seconds()).contains(&seconds) {
            return Err(Error::Duration { name: name.to_owned(), seconds });
        }
        let nanos = (seconds * PER_SECOND).round() as u64;
        Ok(Self(nanos.max(u64::from(seconds > 0.0))))
    }

    /// The duration in seconds, exact to the nanosecond below 104 days.
    pub fn as_seconds(self) -> f64 {
        self.as_f64() / PER_SECOND
    }

    /// The duration in whole milliseconds, rounded down.
    pub fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Whole milliseconds, for the constants of the core; a product beyond 64 bits does not compile
    /// in one.
    pub(super) const fn from_millis(millis: u64) -> Self {
        Self(millis * 1_000_000)
    }

    /// A computed number of nanoseconds, rounded and cut to the range; NaN is zero.
    pub(super) fn from_f64(nanos: f64) -> Self {
        Self(nanos.round() as u64).min(Self::MAX)
    }

    /// The number of nanoseconds as a float, for arithmetic that may leave the range of an integer.
    pub(super) fn as_f64(self) -> f64 {
        self.0 as f64
    }

    /// A computed number of nanoseconds, cut to the range.
    pub(super) fn from_u128(nanos: u128) -> Self {
        u64::try_from(nanos).map_or(Self::MAX, |nanos| Self(nanos).min(Self::MAX))
    }

    /// The number of nanoseconds, for exact arithmetic.
    pub(super) const fn as_u64(self) -> u64 {
        self.0
    }
}

/// A point in time: nanoseconds on some monotonic clock, whose zero means nothing.
///
/// Moments of different clocks must not meet. A clock that was set back is no error: `since` a later
/// moment is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(u64);

impl Moment {
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The moment `duration` later, or the last moment there is.
    #[must_use]
    pub fn plus(self, duration: Nanos) -> Self {
        Self(self.0.saturating_add(duration.0))
    }

    /// How long ago `earlier` was: zero if it lies ahead, and at most `Nanos::MAX`.
    pub fn since(self, earlier: Self) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0)).min(Nanos::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_seconds_become_nanoseconds() {
        let table = [
            (0.0, 0),
            (-0.0, 0),
            (0.1, 100_000_000),
            (0.000_4, 400_000), // B17: below a millisecond
            (1e-9, 1),
            (1e-12, 1),
            (f64::MIN_POSITIVE, 1),
            (315_576_000.0, Nanos::MAX.0),
        ];

        for (seconds, nanos) in table {
            assert_eq!(Nanos::from_seconds("delay", seconds), Ok(Nanos(nanos)));
        }
    }
}
