//! Streams as lists of moments at which outputs are ready, and the windows that come of them.

use crate::core::error::Error;
use crate::core::time::Nanos;
use crate::core::window::{Filling, Window};

fn width(seconds: f64) -> Window {
    let width = Nanos::from_seconds("seconds", seconds).expect("a duration");
    Window::duration(width).expect("a window")
}

/// The windows of outputs that are ready at these moments, and when each was handed over: at its
/// end, or when the source had ended.
fn windows(window: Window, start: f64, ready: &[f64]) -> Vec<(Vec<f64>, Option<f64>)> {
    let mut filling = Filling::new(window, start);
    let (mut done, mut open) = (Vec::new(), Vec::new());
    for now in ready {
        if let Some(end) = filling.end().filter(|end| now >= end) {
            filling.hand_over();
            done.push((std::mem::take(&mut open), Some(end)));
        }
        filling.add(*now);
        open.push(*now);
        if filling.is_due(*now) {
            filling.hand_over();
            done.push((std::mem::take(&mut open), Some(*now)));
        }
    }
    if !open.is_empty() {
        done.push((open, None));
    }
    done
}

#[test]
fn test_windows_by_count_are_full_but_for_the_last() {
    // STR-001, STR-008
    let two = Window::count(2).expect("a window");

    let five = windows(two, 0.0, &[1.0, 2.0, 3.0, 4.0, 5.0]);

    let expected = [(vec![1.0, 2.0], Some(2.0)), (vec![3.0, 4.0], Some(4.0)), (vec![5.0], None)];
    assert_eq!(five, expected);
    assert_eq!(windows(two, 0.0, &[1.0, 2.0]), [(vec![1.0, 2.0], Some(2.0))]);
    assert_eq!(windows(two, 0.0, &[]), []);
}

#[test]
fn test_windows_by_duration_end_at_multiples_of_their_width() {
    // STR-004, STR-005, B40: the third of 50 ms is empty, and the one after a late output ends on time
    let ready = [0.030, 0.060, 0.090, 0.170, 0.199, 0.2];

    let cut = windows(width(0.05), 0.0, &ready);

    let expected = [
        (vec![0.030], Some(0.05)),
        (vec![0.060, 0.090], Some(0.1)),
        (vec![0.170, 0.199], Some(0.2)),
        (vec![0.2], None),
    ];
    assert_eq!(cut, expected);
}

#[test]
fn test_an_empty_window_is_never_due() {
    for window in [width(1.0), Window::count(1).expect("a window")] {
        let mut filling = Filling::new(window, 0.0);

        assert!(!filling.is_due(1e9));
        assert_eq!(filling.end(), None);
        filling.add(0.5);
        assert!(filling.is_due(1.0));
        filling.hand_over();
        assert!(!filling.is_due(1e9));
    }
}

#[test]
fn test_a_window_ends_after_its_first_output_and_at_most_a_width_later() {
    for start in [0.0, 1e-3, 12.345, 86_400.1, 4.2e6, 1e9] {
        for seconds in [0.001, 0.05, 0.1, 1.0 / 3.0, 1.0, 3600.0] {
            for step in 0..1_000 {
                let now = start + f64::from(step) * seconds / 7.0;
                let mut filling = Filling::new(width(seconds), start);

                filling.add(now);

                let end = filling.end().expect("an end");
                let slack = 4.0 * f64::EPSILON * end;
                assert!(end > now, "{start} {seconds} {step}");
                assert!(end - now <= seconds + slack, "{start} {seconds} {step}");
                assert!(filling.is_due(end), "what a timer was set to is due");
                // B40: a whole number of widths from the start
                let widths = (end - start) / Nanos::from_seconds("s", seconds).expect("a duration").as_seconds();
                assert!((widths - widths.round()).abs() * seconds <= slack, "{start} {seconds} {step}");
            }
        }
    }
}

#[test]
fn test_a_width_that_the_clock_cannot_tell_ends_within_a_tick() {
    for now in [1e9, 1e15, f64::MAX] {
        let mut filling = Filling::new(width(1e-9), 0.0);

        filling.add(now);

        assert!(filling.is_due(now.next_up()), "{now}");
    }
}

#[test]
fn test_windows_that_hold_nothing_are_refused() {
    // STR-003, refused
    let bounds = |amount| Err(Error::Budget { name: "n", amount, least: 1, limit: 1_000_000_000 });
    for outputs in [0, -1, 1_000_000_001, i64::MAX, i64::MIN] {
        assert_eq!(Window::count(outputs), bounds(outputs));
    }
    assert_eq!(Window::count(1_000_000_000), Ok(Window::Count(1_000_000_000)));
    assert_eq!(Window::duration(Nanos::ZERO), Err(Error::NoDuration { name: "seconds" }));
}
