//! What the core refuses, with the facts of each refusal.

use std::fmt;

/// A value or a combination of values that no definition may hold.
///
/// Every variant is a mistake of whoever wrote the definition and is found before anything runs.
/// The text names the parameter as Python spells it, the value, and what would be right.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// A duration that is not a number, negative, or above ten years.
    Duration { name: String, seconds: f64 },
    /// Fewer than no retries.
    NegativeRetries { retries: i64 },
    /// More retries than the bound that keeps `1 + retries` and every attempt counter far from
    /// overflow.
    TooManyRetries { retries: i64, limit: u32 },
    /// A back-off factor that would shrink the delay, or is not a number.
    Factor { factor: f64 },
    /// A jitter outside 0..=1, or not a number.
    Jitter { jitter: f64 },
    /// A first delay above the cap (both in seconds): the cap would hide what was asked for.
    BaseAboveMaxDelay { base: f64, max_delay: f64 },
    /// A join that counts branches and asks for fewer than one.
    JoinCount { strategy: &'static str, count: i64 },
    /// A percentage outside (0, 1], or not a number.
    Percentage { percentage: f64 },
    /// A join that asks for more branches than the split has.
    JoinOutOfReach { strategy: String, total: usize },
    /// A split without branches whose join needs at least one.
    EmptySplit { strategy: String },
    /// A `PartialTimeout` join without the timeout that ends it.
    TimeoutMissing,
    /// A number of a breaker's calls or failures below one or above its bound.
    Calls { name: &'static str, calls: i64, limit: u32 },
    /// A duration of zero, which would be over before it began.
    NoDuration { name: &'static str },
    /// A share of calls outside (0, 1], or not a number.
    Share { name: &'static str, share: f64 },
    /// More calls to wait for than the window holds: the breaker would never open.
    MinimumAboveWindow { minimum_calls: u32, window: u32 },
    /// A window of calls that no share of failures or of slow calls is measured in.
    RateMissing,
    /// A number of a limiter's tokens, calls or outputs, or of what a store may keep, outside its bounds.
    Budget { name: &'static str, amount: i64, least: i64, limit: i64 },
    /// An id that breaks the rule.
    Id { id: String, rule: &'static str },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Duration { name, seconds } => {
                let seconds = Number(*seconds);
                write!(f, "{name} must be at least 0 and at most ten years (315576000 s), got {seconds}")
            }
            Self::NegativeRetries { retries } => {
                write!(f, "retries must be at least 0, got {retries}")
            }
            Self::TooManyRetries { retries, limit } => {
                write!(f, "retries must be at most {limit}, got {retries}")
            }
            Self::Factor { factor } => write!(f, "factor must be finite and at least 1, got {}", Number(*factor)),
            Self::Jitter { jitter } => write!(f, "jitter must be at least 0 and at most 1, got {}", Number(*jitter)),
            Self::BaseAboveMaxDelay { base, max_delay } => {
                write!(f, "base must be at most max_delay ({} s), got {} s", Number(*max_delay), Number(*base))
            }
            Self::JoinCount { strategy, count } => {
                write!(f, "n in {strategy}(n) must be at least 1, got {count}")
            }
            Self::Percentage { percentage } => {
                write!(f, "p in Percentage(p) must be above 0 and at most 1, got {}", Number(*percentage))
            }
            Self::JoinOutOfReach { strategy, total } => {
                let branches = if *total == 1 { "branch" } else { "branches" };
                write!(f, "{strategy} cannot be reached: the split has {total} {branches}")
            }
            Self::EmptySplit { strategy } => {
                write!(f, "{strategy} needs at least one branch, the split has none; only All joins an empty split")
            }
            Self::TimeoutMissing => f.write_str("PartialTimeout needs a timeout, got None"),
            Self::Calls { name, calls, limit } => {
                write!(f, "{name} must be at least 1 and at most {limit}, got {calls}")
            }
            Self::NoDuration { name } => write!(f, "{name} must be above 0, got 0"),
            Self::Share { name, share } => {
                write!(f, "{name} must be above 0 and at most 1, got {}", Number(*share))
            }
            Self::MinimumAboveWindow { minimum_calls, window } => {
                write!(f, "minimum_calls must be at most the calls of the window ({window}), got {minimum_calls}")
            }
            Self::RateMissing => f.write_str("a rate needs failure_rate or slow_call_rate, got neither"),
            Self::Budget { name, amount, least, limit } => {
                write!(f, "{name} must be at least {least} and at most {limit}, got {amount}")
            }
            Self::Id { id, rule } => {
                let beginning: String = id.chars().take(80).collect();
                write!(f, "workflow_id {rule}, got {beginning:?}")
            }
        }
    }
}

impl std::error::Error for Error {}

/// A number in an error text: plain digits, or an exponent where plain digits would be hundreds of
/// them.
struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self.0.abs();
        if size.is_finite() && size != 0.0 && !(1e-6..1e16).contains(&size) {
            write!(f, "{:e}", self.0)
        } else {
            write!(f, "{}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_text_names_the_parameter_the_value_and_what_is_right() {
        let table = [
            (Error::NegativeRetries { retries: -1 }, "retries must be at least 0, got -1"),
            (
                Error::TooManyRetries { retries: 5_000_000, limit: 1_000_000 },
                "retries must be at most 1000000, got 5000000",
            ),
            (
                Error::Budget { name: "burst", amount: -1, least: 0, limit: 1_000_000_000 },
                "burst must be at least 0 and at most 1000000000, got -1",
            ),
            (Error::Factor { factor: 0.5 }, "factor must be finite and at least 1, got 0.5"),
            (Error::Factor { factor: f64::NAN }, "factor must be finite and at least 1, got NaN"),
            (Error::Jitter { jitter: -1e300 }, "jitter must be at least 0 and at most 1, got -1e300"),
            (
                Error::BaseAboveMaxDelay { base: 60.0, max_delay: 0.5 },
                "base must be at most max_delay (0.5 s), got 60 s",
            ),
        ];

        for (error, text) in table {
            assert_eq!(error.to_string(), text);
        }
    }
}
