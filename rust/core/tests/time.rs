//! Seconds in, seconds out, and the moments between.

use crate::core::time::{Moment, Nanos};

#[test]
fn test_seconds_survive_the_way_there_and_back() {
    for seconds in [0.0, 1e-9, 0.000_25, 0.1, 1.0 / 3.0, 86_400.000_000_001, 315_576_000.0] {
        let once = Nanos::from_seconds("delay", seconds);
        let twice = once.clone().and_then(|once| Nanos::from_seconds("delay", once.as_seconds()));

        assert!(once.is_ok());
        assert_eq!(once, twice, "{seconds}");
    }
}

#[test]
fn test_what_is_no_duration_is_refused() {
    let above = 315_576_000.000_000_1; // the next float above ten years
    for seconds in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-12, above, f64::MAX] {
        assert!(Nanos::from_seconds("timeout", seconds).is_err(), "{seconds}");
    }

    let text = Nanos::from_seconds("max_delay", -1.0).map_err(|error| error.to_string());

    let refusal = "max_delay must be at least 0 and at most ten years (315576000 s), got -1";
    assert_eq!(text, Err(refusal.to_owned()));
}

#[test]
fn test_ten_years_is_the_longest_duration() {
    assert_eq!(Nanos::from_seconds("timeout", 315_576_000.0), Ok(Nanos::MAX));
    assert!((Nanos::MAX.as_seconds() - 3652.5 * 86_400.0).abs() < f64::EPSILON);
    assert_eq!(Nanos::default(), Nanos::ZERO);
}

#[test]
fn test_moments_neither_overflow_nor_run_backwards() {
    let [first, last] = [0, u64::MAX].map(Moment::from_nanos);
    let nano = Nanos::from_seconds("nano", 1e-9);

    assert_eq!(last.plus(Nanos::MAX), last);
    assert_eq!(last.since(first), Nanos::MAX);
    assert_eq!(first.since(last), Nanos::ZERO);
    assert_eq!(nano.map(|nano| first.plus(nano)), Ok(Moment::from_nanos(1)));
    assert_eq!(first.plus(Nanos::MAX).since(first), Nanos::MAX);
}
