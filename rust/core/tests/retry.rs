//! The retry rules, by the ids of the reference behaviours.

use crate::core::retry::{RetryMode, RetryVerdict};
use crate::core::time::Nanos;

const MIDDLE: f64 = 0.5; // the dice that leave a delay as it is
const BELOW_ONE: f64 = 1.0 - f64::EPSILON; // about the highest dice

fn seconds(seconds: f64) -> Nanos {
    Nanos::from_seconds("seconds", seconds).expect("a duration")
}

fn fixed(retries: i64, delay: f64) -> RetryMode {
    RetryMode::fixed(retries, seconds(delay)).expect("a mode")
}

fn exponential(retries: i64, base: f64, factor: f64, max_delay: f64, jitter: f64) -> RetryMode {
    RetryMode::exponential(retries, seconds(base), factor, seconds(max_delay), jitter).expect("a mode")
}

fn pause(mode: RetryMode, failed: u32, dice: f64) -> Nanos {
    match mode.after_failure(failed, None, dice) {
        RetryVerdict::Retry(pause) => pause,
        RetryVerdict::Exhausted | RetryVerdict::NotConfigured => {
            panic!("no retry after failure {failed}")
        }
    }
}

/// Lets every attempt fail and collects the pauses in seconds.
fn pauses(mode: RetryMode) -> Vec<f64> {
    let mut pauses = Vec::new();
    for failed in 1..=mode.max_attempts() {
        match mode.after_failure(failed, None, MIDDLE) {
            RetryVerdict::Retry(pause) => pauses.push(pause.as_seconds()),
            RetryVerdict::Exhausted => break,
            RetryVerdict::NotConfigured => panic!("retries are configured"),
        }
    }
    pauses
}

#[test]
fn test_without_retries_the_error_leaves_bare() {
    // RT-001, RT-017
    for mode in [RetryMode::None, fixed(0, 1.0), exponential(0, 0.1, 2.0, 30.0, 0.1)] {
        assert_eq!(mode.max_attempts(), 1);
        for failed in [0, 1, 2, u32::MAX] {
            assert_eq!(mode.after_failure(failed, None, MIDDLE), RetryVerdict::NotConfigured);
            assert_eq!(mode.after_failure(failed, Some(seconds(1.0)), MIDDLE), RetryVerdict::NotConfigured);
        }
    }
}

#[test]
fn test_fixed_pauses_are_equal_and_end() {
    // RT-002, RT-016
    let mode = fixed(3, 0.1);

    assert_eq!(mode.max_attempts(), 4);
    assert_eq!(pauses(mode), [0.1, 0.1, 0.1]);
    assert_eq!(mode.after_failure(4, None, MIDDLE), RetryVerdict::Exhausted);
    assert_eq!(mode.after_failure(u32::MAX, None, MIDDLE), RetryVerdict::Exhausted);
}

#[test]
fn test_exponential_pauses_grow_up_to_the_cap() {
    let default = exponential(3, 0.1, 2.0, 30.0, 0.1);

    assert_eq!(default.max_attempts(), 4);
    assert_eq!(pauses(default), [0.1, 0.2, 0.4]); // RT-003
    assert_eq!(default.after_failure(4, None, MIDDLE), RetryVerdict::Exhausted); // RT-003
    assert_eq!(pauses(exponential(2, 0.05, 3.0, 30.0, 0.0)), [0.05, 0.15]); // RT-005
    assert_eq!(pauses(exponential(3, 0.1, 10.0, 0.5, 0.0)), [0.1, 0.5, 0.5]); // RT-006
    assert_eq!(pauses(exponential(3, 0.1, 1.0, 0.5, 0.0)), [0.1, 0.1, 0.1]);
    assert_eq!(pauses(exponential(10, 0.1, 2.0, 30.0, 0.1))[8..], [25.6, 30.0]);
}

#[test]
fn test_jitter_spreads_around_the_delay_evenly() {
    // RT-007
    let mode = exponential(3, 0.1, 2.0, 30.0, 0.5);

    assert_eq!(pause(mode, 1, 0.0), seconds(0.05));
    assert_eq!(pause(mode, 1, 0.25), seconds(0.075));
    assert_eq!(pause(mode, 1, 0.5), seconds(0.1));
    assert_eq!(pause(mode, 1, 0.75), seconds(0.125));
    assert!(pause(mode, 1, BELOW_ONE) <= seconds(0.15));
    assert_eq!(pause(mode, 2, 0.0), seconds(0.1));
}

#[test]
fn test_no_pause_is_longer_than_the_cap_or_shorter_than_the_floor() {
    // RT-008 and B16 (the cap includes jitter), RT-012 (full jitter never gives zero)
    for base in [1e-9, 0.000_4, 0.001, 0.1, 1.0] {
        for jitter in [0.0, 0.1, 0.5, 1.0] {
            let mode = exponential(40, base, 2.0, 1.0, jitter);
            let floor = seconds(f64::min(base, 0.001));
            for failed in 1..=40 {
                for step in 0..256 {
                    let pause = pause(mode, failed, f64::from(step) / 256.0);

                    assert!(floor <= pause && pause <= seconds(1.0), "{mode:?} {failed} {step}: {pause:?}");
                }
            }
        }
    }
}

#[test]
fn test_full_jitter_with_the_lowest_dice_is_one_millisecond() {
    // RT-012
    assert_eq!(pause(exponential(3, 0.1, 2.0, 30.0, 1.0), 1, 0.0), seconds(0.001));
}

#[test]
fn test_pauses_below_a_millisecond_are_kept() {
    // RT-014, B17
    assert_eq!(pauses(exponential(3, 0.000_25, 2.0, 30.0, 0.0)), [0.000_25, 0.000_5, 0.001]);
    assert_eq!(pauses(fixed(1, 0.000_000_001)), [0.000_000_001]);
    assert_eq!(pause(exponential(3, 0.000_25, 2.0, 30.0, 1.0), 1, 0.0), seconds(0.000_25));
}

#[test]
fn test_a_base_of_zero_stays_zero() {
    // RT-013; the power overflows on the way, and zero times infinity must not come out of it
    let mode = exponential(1_000_000, 0.0, f64::MAX, 30.0, 1.0);

    for failed in [1, 2, 3, 1_000_000] {
        assert_eq!(pause(mode, failed, 0.9), Nanos::ZERO);
    }
}

#[test]
fn test_a_huge_attempt_number_waits_for_the_cap() {
    // RT-011
    let doubling = exponential(1_000_000, 0.1, 2.0, 30.0, 0.0);
    let steep = RetryMode::exponential(1_000_000, Nanos::MAX, f64::MAX, Nanos::MAX, 1.0).expect("a mode");
    let unchecked = RetryMode::Exponential {
        retries: u32::MAX,
        base: seconds(0.1),
        factor: 2.0,
        max_delay: seconds(30.0),
        jitter: 0.0,
    };

    assert_eq!(pause(doubling, 1_000_000, MIDDLE), seconds(30.0));
    assert_eq!(pause(steep, 1_000_000, BELOW_ONE), Nanos::MAX);
    assert_eq!(pause(unchecked, u32::MAX, MIDDLE), seconds(30.0));
    assert_eq!(unchecked.max_attempts(), u32::MAX); // RT-026
}

#[test]
fn test_dice_that_are_no_number_keep_the_pause_inside_its_bounds() {
    let mode = exponential(3, 0.1, 2.0, 30.0, 1.0);

    for dice in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let pause = pause(mode, 1, dice);

        assert!(seconds(0.001) <= pause && pause <= seconds(30.0), "{dice}: {pause:?}");
    }
}

#[test]
fn test_an_asked_delay_replaces_the_computed_one() {
    for dice in [0.0, 0.5, 0.99] {
        let spread = exponential(3, 0.1, 2.0, 30.0, 1.0);
        let asked = |mode: RetryMode, delay| mode.after_failure(1, Some(seconds(delay)), dice);

        assert_eq!(asked(spread, 3.0), RetryVerdict::Retry(seconds(3.0)));
        assert_eq!(asked(spread, 0.0), RetryVerdict::Retry(Nanos::ZERO));
        assert_eq!(asked(spread, 3600.0), RetryVerdict::Retry(seconds(30.0)));
        assert_eq!(asked(fixed(3, 0.1), 3600.0), RetryVerdict::Retry(seconds(3600.0)));
    }
}

#[test]
fn test_an_asked_delay_grants_no_further_attempt() {
    for mode in [fixed(2, 0.1), exponential(2, 0.1, 2.0, 30.0, 0.1)] {
        assert_eq!(mode.after_failure(3, Some(seconds(1.0)), MIDDLE), RetryVerdict::Exhausted);
    }
}
