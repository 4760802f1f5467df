//! The limiter rules, by the ids of the reference behaviours.

mod model;

use crate::core::error::Error;
use crate::core::limiter::{
    Charge, Head, Limiter, LimiterPolicy, Place, Refusal, Ticket, Turn, acquire, admit, leave, time_until, try_acquire,
};
use crate::core::time::{Moment, Nanos};

const NOW: Moment = Moment::from_nanos(5_000_000_000); // where most stories begin: no clock starts at zero
const LAST: Moment = Moment::from_nanos(u64::MAX);

fn seconds(seconds: f64) -> Nanos {
    Nanos::from_seconds("seconds", seconds).expect("a duration")
}

fn after(delay: f64) -> Moment {
    NOW.plus(seconds(delay))
}

/// `tokens` per second.
fn bucket(tokens: i64, max_tokens: i64, burst: i64) -> Limiter {
    Limiter::new(LimiterPolicy::bucket(tokens, seconds(1.0), max_tokens, burst).expect("a policy"))
}

/// `limit` in every second.
fn window(limit: i64) -> Limiter {
    Limiter::new(LimiterPolicy::window(limit, seconds(1.0)).expect("a policy"))
}

fn charge(limiter: usize, cost: u64) -> Charge {
    Charge { limiter, cost }
}

fn refused(tier: usize, retry_after: f64) -> Result<(), Refusal> {
    Err(Refusal { tier, retry_after: Some(seconds(retry_after)) })
}

fn never(tier: usize) -> Refusal {
    Refusal { tier, retry_after: None }
}

fn take(limiter: &mut Limiter, now: Moment, cost: u64) -> Result<(), Refusal> {
    try_acquire(now, &mut [limiter], &[charge(0, cost)])
}

fn left(limiter: &Limiter, now: Moment) -> u64 {
    limiter.snapshot(now).available
}

fn wait_for(limiters: &mut [&mut Limiter], charges: &[Charge]) -> Ticket {
    match acquire(NOW, limiters, charges) {
        Ok(Place::Waiting(ticket)) => ticket,
        other => panic!("no place in line but {other:?}"),
    }
}

fn head(limiter: usize, ticket: Ticket) -> Head {
    Head { limiter, ticket }
}

#[test]
fn test_policies_out_of_range_are_refused() {
    // RL-010, WN-007
    const MOST: i64 = 1_000_000_000;
    let budget = |name, amount, least| Err(Error::Budget { name, amount, least, limit: MOST });
    let second = seconds(1.0);

    for count in [0, -1, i64::MIN, MOST + 1, i64::MAX] {
        assert_eq!(LimiterPolicy::bucket(count, second, 1, 0), budget("tokens", count, 1));
        assert_eq!(LimiterPolicy::bucket(1, second, count, 0), budget("max_tokens", count, 1));
        assert_eq!(LimiterPolicy::window(count, second), budget("limit", count, 1));
    }
    for burst in [-1, MOST + 1] {
        assert_eq!(LimiterPolicy::bucket(1, second, 1, burst), budget("burst", burst, 0));
    }
    assert_eq!(LimiterPolicy::bucket(1, Nanos::ZERO, 1, 0), Err(Error::NoDuration { name: "period" }));
    assert_eq!(LimiterPolicy::window(1, Nanos::ZERO), Err(Error::NoDuration { name: "seconds" }));
    assert!(LimiterPolicy::bucket(MOST, Nanos::MAX, MOST, MOST).is_ok());
    assert!(LimiterPolicy::window(MOST, Nanos::MAX).is_ok());
}

#[test]
fn test_a_bucket_starts_full_and_refuses_when_empty() {
    // RL-001, RL-002, RL-005
    let mut limiter = bucket(10, 2, 5);

    for rest in (0..7).rev() {
        assert_eq!(take(&mut limiter, NOW, 1), Ok(()));
        assert_eq!(left(&limiter, NOW), rest);
    }
    assert_eq!(take(&mut limiter, NOW, 1), refused(0, 0.1));
}

#[test]
fn test_tokens_come_back_evenly_and_never_above_capacity() {
    // RL-003
    let mut limiter = bucket(50, 2, 0);
    assert_eq!(take(&mut limiter, NOW, 2), Ok(()));

    assert_eq!(take(&mut limiter, after(0.019_999_999), 1), refused(0, 0.001)); // ML-011
    assert_eq!(take(&mut limiter, after(0.02), 1), Ok(()));
    assert_eq!(take(&mut limiter, after(0.02), 1), refused(0, 0.02));
    assert_eq!(left(&limiter, after(0.059)), 1);
    assert_eq!(left(&limiter, after(0.06)), 2);
    assert_eq!(left(&limiter, after(1e6)), 2);
}

#[test]
fn test_a_cost_is_taken_whole_or_not_at_all() {
    // RL-006, RL-015
    let mut limiter = bucket(1, 10, 0);

    assert_eq!(take(&mut limiter, NOW, 3), Ok(()));
    assert_eq!(left(&limiter, NOW), 7);
    for cost in [11, 1_000_000_001, u64::MAX] {
        assert_eq!(take(&mut limiter, NOW, cost), Err(never(0)));
    }
    assert_eq!(take(&mut limiter, NOW, 8), refused(0, 1.0));
    assert_eq!(left(&limiter, NOW), 7);
    assert_eq!(take(&mut limiter, after(3.0), 10), Ok(()));
    assert_eq!(left(&limiter, after(3.0)), 0);
}

#[test]
fn test_a_cost_of_nothing_is_granted_and_leaves_no_trace() {
    // RL-007, RL-012
    for mut limiter in [bucket(1, 1, 0), window(1)] {
        assert_eq!(take(&mut limiter, NOW, 0), Ok(()));
        assert_eq!(limiter.snapshot(NOW).resets_at, None); // no window was opened
        assert_eq!(take(&mut limiter, NOW, 1), Ok(()));
        let ticket = wait_for(&mut [&mut limiter], &[charge(0, 1)]);

        assert_eq!(take(&mut limiter, NOW, 0), Ok(())); // past the line
        assert_eq!(limiter.time_until(NOW, 0), Some(Nanos::ZERO));
        assert_eq!(acquire(NOW, &mut [&mut limiter], &[charge(0, 0)]), Ok(Place::Granted));
        assert_eq!(admit(NOW, &mut [&mut limiter], ticket), Turn::Wait(seconds(1.0)));
    }
}

#[test]
fn test_an_impossible_cost_never_waits() {
    // RL-008 and B44, RL-012, WN-002
    for mut limiter in [bucket(1, 10, 0), window(10)] {
        assert_eq!(acquire(NOW, &mut [&mut limiter], &[charge(0, 11)]), Err(never(0)));
        assert_eq!(limiter.time_until(NOW, 11), None);
        assert_eq!(limiter.time_until(NOW, u64::MAX), None);
        assert_eq!(limiter.snapshot(NOW).waiting, 0);
    }
}

#[test]
fn test_the_slowest_refill_waits_ten_years() {
    // RL-009
    let mut limiter = Limiter::new(LimiterPolicy::bucket(1, Nanos::MAX, 1_000_000_000, 0).expect("a policy"));
    assert_eq!(take(&mut limiter, NOW, 1_000_000_000), Ok(()));

    let slow = Err(Refusal { tier: 0, retry_after: Some(Nanos::MAX) });
    assert_eq!(take(&mut limiter, NOW, 1_000_000_000), slow);
    let ticket = wait_for(&mut [&mut limiter], &[charge(0, 1_000_000_000)]);
    assert_eq!(admit(NOW, &mut [&mut limiter], ticket), Turn::Wait(Nanos::MAX));
    assert_eq!(admit(LAST, &mut [&mut limiter], ticket), Turn::Wait(Nanos::MAX));
}

#[test]
fn test_forty_racers_get_what_there_is() {
    // RL-014
    for mut limiter in [bucket(1, 10, 0), window(10)] {
        let granted = (0..40).filter(|_| take(&mut limiter, NOW, 1).is_ok()).count();

        assert_eq!(granted, 10);
    }
}

#[test]
fn test_a_waiter_gets_its_cost_when_it_is_there() {
    // RL-004
    let mut limiter = bucket(10, 5, 0);
    assert_eq!(take(&mut limiter, NOW, 4), Ok(()));
    let ticket = wait_for(&mut [&mut limiter], &[charge(0, 3)]);

    assert_eq!(admit(NOW, &mut [&mut limiter], ticket), Turn::Wait(seconds(0.2)));
    assert_eq!(admit(after(0.15), &mut [&mut limiter], ticket), Turn::Wait(seconds(0.05)));
    assert_eq!(admit(after(0.2), &mut [&mut limiter], ticket), Turn::Admitted(vec![]));
    assert_eq!(left(&limiter, after(0.2)), 0);
    assert_eq!(admit(after(9.0), &mut [&mut limiter], ticket), Turn::NotFirst); // it is used up
}

#[test]
fn test_a_window_fills_and_comes_back_whole() {
    // WN-001, WN-002, WN-003, WN-004
    let mut limiter = window(1000);

    assert_eq!(take(&mut limiter, NOW, 1500), Err(never(0)));
    assert_eq!(take(&mut limiter, NOW, 600), Ok(()));
    assert_eq!(take(&mut limiter, after(0.25), 600), refused(0, 0.75));
    assert_eq!(take(&mut limiter, after(0.25), 400), Ok(()));
    assert_eq!(left(&limiter, after(0.25)), 0);
    assert_eq!(limiter.time_until(after(0.4), 1), Some(seconds(0.6)));
    assert_eq!(take(&mut limiter, after(0.999_999_999), 1), refused(0, 0.001));
    assert_eq!(take(&mut limiter, after(1.0), 1000), Ok(()));
}

#[test]
fn test_a_waiter_for_a_window_is_admitted_at_the_reset() {
    // WN-005
    let mut limiter = window(2);
    assert_eq!(take(&mut limiter, NOW, 1), Ok(()));
    let ticket = wait_for(&mut [&mut limiter], &[charge(0, 2)]);

    assert_eq!(admit(after(0.25), &mut [&mut limiter], ticket), Turn::Wait(seconds(0.75)));
    assert_eq!(admit(after(1.0), &mut [&mut limiter], ticket), Turn::Admitted(vec![]));
    assert_eq!(left(&limiter, after(1.0)), 0);
}

#[test]
fn test_windows_begin_with_the_first_grant_and_no_look_moves_them() {
    // WN-009 and B47, D11
    let mut limiter = window(2);
    for look in [-1.0, 0.0, 0.7].map(|delay| after(3.0 + delay)) {
        assert_eq!(limiter.time_until(look, 1), Some(Nanos::ZERO));
        assert_eq!(limiter.snapshot(look).resets_at, None);
    }
    assert_eq!(take(&mut limiter, after(10.5), 2), Ok(()));

    for (look, resets) in [(10.5, 11.5), (11.4, 11.5), (11.5, 12.5), (14.7, 15.5), (1_000_000.2, 1_000_000.5)] {
        assert_eq!(limiter.snapshot(after(look)).resets_at, Some(after(resets)), "{look}");
    }
    assert_eq!(take(&mut limiter, after(13.25), 2), Ok(()));
    assert_eq!(take(&mut limiter, after(13.25), 1), refused(0, 0.25));
    assert_eq!(take(&mut limiter, after(13.5), 2), Ok(()));
}

#[test]
fn test_a_snapshot_shows_the_budget() {
    // WN-008
    let (mut windowed, mut bucketed) = (window(3), bucket(2, 3, 0));
    assert_eq!(take(&mut windowed, NOW, 3), Ok(()));
    assert_eq!(take(&mut bucketed, NOW, 3), Ok(()));
    wait_for(&mut [&mut windowed], &[charge(0, 1)]);

    let (of_window, of_bucket) = (windowed.snapshot(after(0.25)), bucketed.snapshot(after(0.25)));
    assert_eq!((of_window.capacity, of_window.available, of_window.waiting), (3, 0, 1));
    assert_eq!((of_window.available_in, of_window.resets_at), (seconds(0.75), Some(after(1.0))));
    assert_eq!((of_bucket.capacity, of_bucket.available, of_bucket.waiting), (3, 0, 0));
    assert_eq!((of_bucket.available_in, of_bucket.resets_at), (seconds(0.25), None));
    assert_eq!(bucketed.snapshot(after(0.5)).available_in, Nanos::ZERO);
}

#[test]
fn test_a_clock_that_goes_back_brings_nothing_back() {
    for mut limiter in [bucket(2, 2, 0), window(2)] {
        assert_eq!(take(&mut limiter, after(5.0), 2), Ok(()));

        for now in [after(4.0), NOW, Moment::from_nanos(0)] {
            assert_eq!(take(&mut limiter, now, 1).map_err(|refusal| refusal.tier), Err(0));
            assert_eq!(left(&limiter, now), 0);
        }
        assert_eq!(take(&mut limiter, after(4.5), 2), refused(0, 1.5)); // by the clock as it is
        assert_eq!(take(&mut limiter, after(6.0), 2), Ok(()));
    }
}

#[test]
fn test_the_last_moment_of_the_clock_grants_no_extra() {
    for mut limiter in [bucket(1, 3, 0), window(3)] {
        let granted = (0..10).filter(|_| take(&mut limiter, LAST, 1).is_ok()).count();

        assert_eq!(granted, 3);
        assert_eq!(limiter.time_until(LAST, 1), Some(seconds(1.0)));
        assert!(limiter.snapshot(LAST).resets_at.is_none_or(|resets| resets == LAST));
    }
}

#[test]
fn test_nobody_overtakes_the_line() {
    // RL-016 and B55
    let mut limiter = bucket(1, 10, 0);
    let limiter = &mut limiter;
    assert_eq!(take(limiter, NOW, 4), Ok(()));
    let first = wait_for(&mut [&mut *limiter], &[charge(0, 8)]);
    let second = wait_for(&mut [&mut *limiter], &[charge(0, 1)]);

    // There are 6: enough for the second and for a newcomer, but a large cost must not starve.
    assert_eq!(admit(NOW, &mut [&mut *limiter], first), Turn::Wait(seconds(2.0)));
    assert_eq!(admit(NOW, &mut [&mut *limiter], second), Turn::NotFirst);
    assert_eq!(take(limiter, NOW, 1), refused(0, 4.0)); // 8 + 1 + 1 of 6
    assert_eq!(take(limiter, NOW, 10), refused(0, 13.0));
    assert_eq!(limiter.time_until(NOW, 1), Some(seconds(4.0)));

    let admitted = admit(after(4.0), &mut [&mut *limiter], first);
    assert_eq!(admitted, Turn::Admitted(vec![head(0, second)]));
    assert_eq!(take(limiter, after(4.0), 1), refused(0, 0.001)); // room for both, but not its turn
    assert_eq!(admit(after(4.0), &mut [&mut *limiter], second), Turn::Admitted(vec![]));
    assert_eq!(take(limiter, after(4.0), 1), Ok(()));
    assert_eq!(left(limiter, after(4.0)), 0);
}

#[test]
fn test_the_line_of_a_window_takes_as_many_windows_as_it_needs() {
    let mut limiter = window(10);
    assert_eq!(take(&mut limiter, NOW, 9), Ok(()));
    for _ in 0..3 {
        wait_for(&mut [&mut limiter], &[charge(0, 5)]);
    }

    for (cost, wait) in [(1, 1.5), (6, 1.5), (7, 2.5), (10, 2.5)] {
        assert_eq!(limiter.time_until(after(0.5), cost), Some(seconds(wait)), "{cost}"); // 9 + 15 + cost
    }
}

#[test]
fn test_a_cancelled_waiter_costs_nothing_and_passes_its_turn_on() {
    // B55
    let mut limiter = bucket(1, 4, 0);
    let limiter = &mut limiter;
    assert_eq!(take(limiter, NOW, 4), Ok(()));
    let [a, b, c] = [3, 2, 1].map(|cost| wait_for(&mut [&mut *limiter], &[charge(0, cost)]));

    assert_eq!(leave(&mut [&mut *limiter], b), []); // it was not first
    assert_eq!(limiter.time_until(NOW, 1), Some(seconds(5.0)));
    assert_eq!(leave(&mut [&mut *limiter], a), [head(0, c)]);
    assert_eq!(leave(&mut [&mut *limiter], a), []);
    assert_eq!(admit(NOW, &mut [&mut *limiter], c), Turn::Wait(seconds(1.0)));
    assert_eq!(admit(after(1.0), &mut [&mut *limiter], a), Turn::NotFirst);
    assert_eq!(leave(&mut [&mut *limiter], c), []);
    assert_eq!(left(limiter, after(4.0)), 4);
}

#[test]
fn test_all_tiers_grant_or_none() {
    // ML-001, ML-002, ML-003, ML-004, ML-005 and B52
    let (mut wide, mut narrow) = (window(100), bucket(1, 4, 0));
    let tiers = [charge(0, 1), charge(1, 2)];
    assert_eq!(try_acquire(NOW, &mut [], &[]), Ok(()));
    for _ in 0..2 {
        assert_eq!(try_acquire(NOW, &mut [&mut wide, &mut narrow], &tiers), Ok(()));
    }

    for _ in 0..10 {
        assert_eq!(try_acquire(NOW, &mut [&mut wide, &mut narrow], &tiers), refused(1, 2.0));
    }
    assert_eq!((left(&wide, NOW), left(&narrow, NOW)), (98, 0));

    let free = [charge(0, 98), charge(1, 0)];
    assert_eq!(try_acquire(NOW, &mut [&mut wide, &mut narrow], &free), Ok(())); // ML-005: inert
    assert_eq!(try_acquire(after(0.5), &mut [&mut wide, &mut narrow], &tiers), refused(0, 0.5)); // the first
}

#[test]
fn test_racers_through_tiers_get_what_the_scarce_one_has() {
    // ML-008
    let (mut wide, mut scarce) = (bucket(1, 100, 0), window(5));
    let tiers = [charge(0, 1), charge(1, 1)];

    let granted = (0..24).filter(|_| try_acquire(NOW, &mut [&mut wide, &mut scarce], &tiers).is_ok()).count();

    assert_eq!(granted, 5);
    assert_eq!((left(&wide, NOW), left(&scarce, NOW)), (95, 0));
}

#[test]
fn test_a_limiter_under_two_tiers_grants_their_sum() {
    // ML-009
    let mut limiter = bucket(1, 5, 0);
    let twice = [charge(0, 2), charge(0, 1)];
    assert_eq!(try_acquire(NOW, &mut [&mut limiter], &twice), Ok(()));
    assert_eq!(left(&limiter, NOW), 2);

    assert_eq!(try_acquire(NOW, &mut [&mut limiter], &twice), refused(1, 1.0)); // 2 of 2, then 1 too many
    assert_eq!(try_acquire(NOW, &mut [&mut limiter], &[charge(0, 3), charge(0, 2)]), refused(0, 3.0)); // of the sum
    assert_eq!(try_acquire(NOW, &mut [&mut limiter], &[charge(0, 3), charge(0, 3)]), Err(never(1)));
    assert_eq!(try_acquire(NOW, &mut [&mut limiter], &[charge(0, 1), charge(0, u64::MAX)]), Err(never(1)));

    let ticket = wait_for(&mut [&mut limiter], &twice);
    assert_eq!(limiter.snapshot(NOW).waiting, 1);
    assert_eq!(admit(NOW, &mut [&mut limiter], ticket), Turn::Wait(seconds(1.0)));
    assert_eq!(admit(after(1.0), &mut [&mut limiter], ticket), Turn::Admitted(vec![]));
    assert_eq!(left(&limiter, after(1.0)), 0);
}

#[test]
fn test_time_until_all_tiers_fit_is_that_of_the_slowest() {
    // RL-012
    let (mut a, mut b) = (bucket(1, 4, 0), window(3));
    assert_eq!(time_until(NOW, &[], &[]), Some(Nanos::ZERO));
    assert_eq!(take(&mut a, NOW, 4), Ok(()));
    assert_eq!(take(&mut b, NOW, 1), Ok(()));

    for (charges, wait) in [
        (vec![charge(0, 0), charge(1, 0)], Some(0.0)),
        (vec![charge(1, 2)], Some(0.0)),
        (vec![charge(0, 2), charge(1, 3)], Some(2.0)),
        (vec![charge(0, 2), charge(1, 1), charge(0, 1)], Some(3.0)),
        (vec![charge(0, 2), charge(0, 3)], None),
        (vec![charge(0, 1), charge(1, 4)], None),
    ] {
        assert_eq!(time_until(NOW, &[&mut a, &mut b], &charges), wait.map(seconds));
    }
}

#[test]
fn test_an_impossible_tier_is_named_before_one_that_is_only_short() {
    // ML-010 and B44
    let (mut short, mut small) = (bucket(1, 10, 0), window(3));
    assert_eq!(take(&mut short, NOW, 10), Ok(()));
    let tiers = [charge(0, 1), charge(1, 4)];

    assert_eq!(try_acquire(NOW, &mut [&mut short, &mut small], &tiers), Err(never(1)));
    assert_eq!(acquire(NOW, &mut [&mut short, &mut small], &tiers), Err(never(1)));
    assert_eq!((short.snapshot(NOW).waiting, small.snapshot(NOW).waiting), (0, 0));
}

#[test]
fn test_a_waiter_through_tiers_stands_in_every_line() {
    // ML-007, B52, B55
    let (mut a, mut b) = (window(2), bucket(1, 2, 0));
    assert_eq!(take(&mut b, NOW, 2), Ok(()));
    let alone = wait_for(&mut [&mut b], &[charge(0, 1)]);
    let both = wait_for(&mut [&mut a, &mut b], &[charge(0, 1), charge(1, 2)]);
    let behind = wait_for(&mut [&mut a], &[charge(0, 2)]); // a is free, but somebody is in front

    assert_eq!(admit(after(9.0), &mut [&mut a, &mut b], both), Turn::NotFirst); // in the line of b
    assert_eq!(admit(after(9.0), &mut [&mut a], behind), Turn::NotFirst);
    assert_eq!(left(&a, NOW), 2); // and nothing is taken meanwhile

    assert_eq!(admit(after(1.0), &mut [&mut b], alone), Turn::Admitted(vec![head(0, both)]));
    assert_eq!(admit(after(1.0), &mut [&mut a, &mut b], both), Turn::Wait(seconds(2.0)));
    let admitted = admit(after(3.0), &mut [&mut a, &mut b], both);
    assert_eq!(admitted, Turn::Admitted(vec![head(0, behind)]));
    assert_eq!(admit(after(3.0), &mut [&mut a], behind), Turn::Wait(seconds(1.0)));
    assert_eq!((left(&a, after(3.0)), left(&b, after(3.0))), (1, 0));
}

#[test]
fn test_a_waiter_through_tiers_waits_for_the_slowest_of_them() {
    let (mut a, mut b) = (bucket(4, 1, 0), bucket(2, 1, 0));
    assert_eq!(take(&mut a, NOW, 1), Ok(()));
    assert_eq!(take(&mut b, NOW, 1), Ok(()));

    let ticket = wait_for(&mut [&mut a, &mut b], &[charge(0, 1), charge(1, 1)]);

    assert_eq!(admit(NOW, &mut [&mut a, &mut b], ticket), Turn::Wait(seconds(0.5)));
    assert_eq!(admit(after(0.25), &mut [&mut a, &mut b], ticket), Turn::Wait(seconds(0.25)));
    assert_eq!(left(&a, after(0.25)), 1);
}

#[test]
fn test_a_waiter_stands_in_no_line_that_costs_it_nothing() {
    let (mut free, mut full) = (bucket(1, 1, 0), bucket(1, 1, 0));
    assert_eq!(take(&mut full, NOW, 1), Ok(()));
    let ticket = wait_for(&mut [&mut free, &mut full], &[charge(0, 0), charge(1, 1)]);

    // The next ticket of the free limiter differs from this one, although it is not in that line.
    assert_eq!(take(&mut free, NOW, 1), Ok(()));
    let other = wait_for(&mut [&mut free], &[charge(0, 1)]);

    assert_ne!(other, ticket);
    assert_eq!(leave(&mut [&mut free, &mut full], ticket), []);
    assert_eq!((free.snapshot(NOW).waiting, full.snapshot(NOW).waiting), (1, 0));
}

#[test]
fn test_waiters_in_a_circle_of_limiters_do_not_block_each_other() {
    let [mut a, mut b, mut c] = [(); 3].map(|()| bucket(1, 1, 0));
    for limiter in [&mut a, &mut b, &mut c] {
        assert_eq!(take(limiter, NOW, 1), Ok(()));
    }
    let tiers = [charge(0, 1), charge(1, 1)];
    let ab = wait_for(&mut [&mut a, &mut b], &tiers);
    let bc = wait_for(&mut [&mut b, &mut c], &tiers);
    let ca = wait_for(&mut [&mut c, &mut a], &tiers);

    assert_eq!(admit(after(1.0), &mut [&mut c, &mut a], ca), Turn::NotFirst);
    assert_eq!(admit(after(1.0), &mut [&mut b, &mut c], bc), Turn::NotFirst);
    assert_eq!(admit(after(1.0), &mut [&mut a, &mut b], ab), Turn::Admitted(vec![head(0, ca), head(1, bc)]));
    assert_eq!(admit(after(2.0), &mut [&mut b, &mut c], bc), Turn::Admitted(vec![head(1, ca)]));
    assert_eq!(admit(after(3.0), &mut [&mut c, &mut a], ca), Turn::Admitted(vec![]));
}
