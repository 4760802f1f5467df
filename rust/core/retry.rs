//! When a failed attempt is repeated, and after which delay.

use super::error::Error;
use super::time::Nanos;

const MOST_RETRIES: u32 = 1_000_000;
const FLOOR: Nanos = Nanos::from_millis(1);

/// How often a task is repeated after a failure, and how long the pauses are.
///
/// With `k` the number of the attempt that failed (1-based):
///
/// - `None`: one attempt, no pause.
/// - `Fixed`: `1 + retries` attempts; every pause is `delay`.
/// - `Exponential`: `1 + retries` attempts; `d(k) = min(max_delay, base * factor^(k - 1))`, spread
///   evenly over `d * (1 - jitter) .. d * (1 + jitter)` and cut to `min(1 ms, d) ..= max_delay`.
///   The cut comes last: no pause is longer than `max_delay`, and full jitter cannot turn a pause
///   into none. A `base` of zero stays zero.
///
/// Base 0.1 s, factor 2, cap 30 s and jitter 0.1 pause around 0.1, 0.2, 0.4 s and so on, 30 s from
/// the tenth failure. The functions below check the parameters; whoever writes a variant by hand
/// vouches for them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryMode {
    None,
    Fixed { retries: u32, delay: Nanos },
    Exponential { retries: u32, base: Nanos, factor: f64, max_delay: Nanos, jitter: f64 },
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryVerdict {
    /// Pause this long, then try again.
    Retry(Nanos),
    /// Every attempt that was configured has failed.
    Exhausted,
    /// Retries were never asked for: the task's own error leaves as it is.
    NotConfigured,
}

impl RetryMode {
    /// Equal pauses; `retries` 0..=1,000,000.
    pub fn fixed(retries: i64, delay: Nanos) -> Result<Self, Error> {
        Ok(Self::Fixed { retries: checked(retries)?, delay })
    }

    /// Growing pauses; `retries` 0..=1,000,000, `factor` at least 1, `jitter` 0..=1, `base` at most
    /// `max_delay`.
    pub fn exponential(retries: i64, base: Nanos, factor: f64, max_delay: Nanos, jitter: f64) -> Result<Self, Error> {
        let retries = checked(retries)?;
        if !(factor.is_finite() && factor >= 1.0) {
            return Err(Error::Factor { factor });
        }
        if !(0.0..=1.0).contains(&jitter) {
            return Err(Error::Jitter { jitter });
        }
        if base > max_delay {
            return Err(Error::BaseAboveMaxDelay { base: base.as_seconds(), max_delay: max_delay.as_seconds() });
        }
        Ok(Self::Exponential { retries, base, factor, max_delay, jitter })
    }

    /// The attempts a task gets: the first one and its retries.
    pub fn max_attempts(&self) -> u32 {
        match *self {
            Self::None => 1,
            Self::Fixed { retries, .. } | Self::Exponential { retries, .. } => retries.saturating_add(1),
        }
    }

    /// Judges the failure of attempt number `failed` (1-based).
    ///
    /// `asked` is a delay the task itself asked for: it replaces the computed one, without jitter,
    /// but not beyond `max_delay` (a fixed mode has no such bound). `dice` in `[0, 1)` picks the
    /// point inside the jitter.
    pub fn after_failure(&self, failed: u32, asked: Option<Nanos>, dice: f64) -> RetryVerdict {
        match *self {
            Self::None | Self::Fixed { retries: 0, .. } | Self::Exponential { retries: 0, .. } => {
                RetryVerdict::NotConfigured
            }
            Self::Fixed { retries, .. } | Self::Exponential { retries, .. } if failed > retries => {
                RetryVerdict::Exhausted
            }
            Self::Fixed { delay, .. } => RetryVerdict::Retry(asked.unwrap_or(delay)),
            Self::Exponential { base, factor, max_delay, jitter, .. } => {
                let delay = grown(base, factor, failed).min(max_delay);
                let spread = jittered(delay, jitter, dice).clamp(delay.min(FLOOR), max_delay);
                RetryVerdict::Retry(asked.map_or(spread, |asked| asked.min(max_delay)))
            }
        }
    }
}

fn checked(retries: i64) -> Result<u32, Error> {
    match u32::try_from(retries) {
        Ok(count) if count <= MOST_RETRIES => Ok(count),
        _ if retries < 0 => Err(Error::NegativeRetries { retries }),
        _ => Err(Error::TooManyRetries { retries, limit: MOST_RETRIES }),
    }
}

/// `base * factor^(failed - 1)`. Zero times an infinite power is NaN, which `from_f64` takes for
/// zero.
fn grown(base: Nanos, factor: f64, failed: u32) -> Nanos {
    let power = factor.powf(f64::from(failed.saturating_sub(1)));
    Nanos::from_f64(base.as_f64() * power)
}

fn jittered(delay: Nanos, jitter: f64, dice: f64) -> Nanos {
    Nanos::from_f64(delay.as_f64() * (1.0 + jitter * (2.0 * dice - 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Nanos {
        Nanos::from_seconds("seconds", seconds).expect("a duration")
    }

    #[test]
    fn test_parameters_out_of_range_are_refused() {
        let exponential = |factor, jitter| RetryMode::exponential(3, seconds(0.1), factor, seconds(30.0), jitter);

        for factor in [0.0, 0.999, -2.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(exponential(factor, 0.1), Err(Error::Factor { .. })), "{factor}"); // RT-010, refused
        }
        for jitter in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(matches!(exponential(2.0, jitter), Err(Error::Jitter { .. })), "{jitter}"); // RT-009, refused
        }
        assert!(exponential(1.0, 0.0).is_ok());
        assert!(exponential(f64::MAX, 1.0).is_ok());
        assert_eq!(
            RetryMode::exponential(3, seconds(2.0), 2.0, seconds(1.0), 0.0),
            Err(Error::BaseAboveMaxDelay { base: 2.0, max_delay: 1.0 })
        );
    }

    #[test]
    fn test_retries_are_bounded() {
        // RT-026, B15
        assert_eq!(RetryMode::fixed(-1, Nanos::ZERO), Err(Error::NegativeRetries { retries: -1 }));
        for retries in [1_000_001, i64::from(u32::MAX) + 1, i64::MAX] {
            let refused = Err(Error::TooManyRetries { retries, limit: MOST_RETRIES });

            assert_eq!(RetryMode::fixed(retries, Nanos::ZERO), refused);
            assert_eq!(RetryMode::exponential(retries, Nanos::ZERO, 2.0, Nanos::MAX, 0.1), refused);
        }
        assert_eq!(RetryMode::fixed(1_000_000, Nanos::ZERO).map(|mode| mode.max_attempts()), Ok(1_000_001));
    }
}
