//! Durations.

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
