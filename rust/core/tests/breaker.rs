//! The breaker rules, by the ids of the reference behaviours.

mod model;

use crate::core::breaker::{Admission, Breaker, Change, Outcome, Permit, Policy, SlowCall, Snapshot, State, Trip};
use crate::core::error::Error;
use crate::core::tally::{Counts, Window};
use crate::core::time::{Moment, Nanos};

const OPENED: Change = Change { from: State::Closed, to: State::Open };
const PROBING: Change = Change { from: State::Open, to: State::HalfOpen };
const REOPENED: Change = Change { from: State::HalfOpen, to: State::Open };
const CLOSED: Change = Change { from: State::HalfOpen, to: State::Closed };

const FAST: f64 = 0.0; // a call that takes no time

fn seconds(seconds: f64) -> Nanos {
    Nanos::from_seconds("seconds", seconds).expect("a duration")
}

fn failures(threshold: i64) -> Trip {
    Trip::consecutive_failures(threshold).expect("a trip")
}

fn failure_rate(window: Window, minimum_calls: i64, rate: f64) -> Trip {
    Trip::rate(window, minimum_calls, Some(rate), None).expect("a trip")
}

fn slow_rate(window: Window, minimum_calls: i64, duration: f64, rate: f64) -> Trip {
    let slow_call = SlowCall::new(seconds(duration), rate).expect("a slow call");
    Trip::rate(window, minimum_calls, None, Some(slow_call)).expect("a trip")
}

/// A breaker and its clock.
struct Story {
    breaker: Breaker,
    now: Moment,
}

impl Story {
    /// Resets after 30 s; a probe has 60 s.
    fn new(trip: Trip, half_open_max_calls: i64) -> Self {
        Self::with_policy(Policy::new(trip, seconds(30.0), half_open_max_calls, seconds(60.0)).expect("a policy"))
    }

    fn with_policy(policy: Policy) -> Self {
        Self { breaker: Breaker::new(policy), now: Moment::from_nanos(1_000_000_000_000) }
    }

    /// A breaker of threshold 1 that has just opened.
    fn opened(half_open_max_calls: i64) -> Self {
        let mut story = Self::new(failures(1), half_open_max_calls);
        assert_eq!(story.fail(), Some(OPENED));
        story
    }

    /// One whose first call asks after the reset time: its probe is the permit.
    fn probing(half_open_max_calls: i64) -> (Self, Permit) {
        let mut story = Self::opened(half_open_max_calls);
        story.pass(30.0);
        let (permit, change) = story.admit();
        assert_eq!(change, Some(PROBING));
        (story, permit)
    }

    fn pass(&mut self, duration: f64) {
        self.now = self.now.plus(seconds(duration));
    }

    fn admit(&mut self) -> (Permit, Option<Change>) {
        match self.breaker.acquire(self.now) {
            Admission::Admitted { permit, change } => (permit, change),
            Admission::Rejected { retry_after } => panic!("rejected for {retry_after:?}"),
        }
    }

    /// A call that is let through and changes nothing thereby.
    fn permit(&mut self) -> Permit {
        let (permit, change) = self.admit();
        assert_eq!(change, None);
        permit
    }

    fn reject(&mut self) -> Option<Nanos> {
        match self.breaker.acquire(self.now) {
            Admission::Admitted { permit, .. } => panic!("admitted with {permit:?}"),
            Admission::Rejected { retry_after } => retry_after,
        }
    }

    fn record(&mut self, permit: Permit, outcome: Outcome) -> Option<Change> {
        self.breaker.record(permit, outcome, self.now)
    }

    /// A whole call of this duration.
    fn call(&mut self, outcome: Outcome, duration: f64) -> Option<Change> {
        let permit = self.permit();
        self.pass(duration);
        self.record(permit, outcome)
    }

    fn fail(&mut self) -> Option<Change> {
        self.call(Outcome::Failure, FAST)
    }

    fn succeed(&mut self) -> Option<Change> {
        self.call(Outcome::Success, FAST)
    }

    fn state(&self) -> State {
        self.breaker.state()
    }

    fn snapshot(&self) -> Snapshot {
        self.breaker.snapshot(self.now)
    }
}

#[test]
fn test_a_breaker_opens_at_the_last_failure_of_its_threshold() {
    // CB-002, CB-004
    let mut story = Story::new(failures(3), 1);

    assert_eq!([story.fail(), story.fail()], [None, None]);
    assert_eq!(story.state(), State::Closed);
    assert_eq!(story.fail(), Some(OPENED));
    assert_eq!(story.reject(), Some(seconds(30.0)));
    assert_eq!(story.state(), State::Open);
}

#[test]
fn test_a_success_ends_the_row_of_failures() {
    // CB-003
    let mut story = Story::new(failures(3), 1);

    for _ in 0..2 {
        assert_eq!([story.fail(), story.fail(), story.succeed()], [None, None, None]);
    }

    assert_eq!(story.snapshot().counts, Counts::default());
    assert_eq!([story.fail(), story.fail(), story.fail()], [None, None, Some(OPENED)]);
}

#[test]
fn test_callers_share_their_breaker() {
    // CB-017: the permits are out at the same time
    let mut story = Story::new(failures(2), 1);
    let [one, other, late] = [story.permit(), story.permit(), story.permit()];

    assert_eq!(story.record(one, Outcome::Failure), None);
    assert_eq!(story.record(other, Outcome::Failure), Some(OPENED));
    assert_eq!(story.record(late, Outcome::Success), None); // CB-013
    assert_eq!(story.reject(), Some(seconds(30.0)));
}

#[test]
fn test_only_a_call_that_asks_ends_the_open_state() {
    // CB-005
    let mut story = Story::opened(1);
    story.pass(29.999_999_999);
    assert_eq!(story.reject(), Some(seconds(1e-9)));

    story.pass(1e-9);
    assert_eq!((story.state(), story.snapshot().state), (State::Open, State::Open));
    assert_eq!(story.snapshot().retry_after, None);
    story.pass(3600.0);
    assert_eq!((story.state(), story.snapshot().state), (State::Open, State::Open));

    assert_eq!(story.admit().1, Some(PROBING));
    assert_eq!(story.state(), State::HalfOpen);
}

#[test]
fn test_half_open_admits_so_many_at_once() {
    // CB-006
    let (mut story, _probe) = Story::probing(3);
    let _others = [story.permit(), story.permit()];

    assert_eq!(story.reject(), Some(seconds(60.0)));
    assert_eq!(story.snapshot().probes, 3);
}

#[test]
fn test_so_many_successes_close() {
    // CB-007
    let (mut story, probe) = Story::probing(2);

    assert_eq!(story.record(probe, Outcome::Success), None);
    assert_eq!(story.snapshot().successes, 1);
    assert_eq!(story.succeed(), Some(CLOSED)); // CB-009: its place was free again
    assert_eq!(story.snapshot().counts, Counts::default());
}

#[test]
fn test_an_ended_probe_frees_its_place() {
    // CB-009: three probes where two may be in flight
    let (mut story, first) = Story::probing(2);
    let second = story.permit();
    story.reject();

    assert_eq!(story.record(first, Outcome::Success), None);
    let third = story.permit();
    story.reject();
    assert_eq!(story.record(second, Outcome::Ignored), None);
    assert_eq!(story.snapshot().probes, 1);
    assert_eq!(story.record(third, Outcome::Success), Some(CLOSED));
}

#[test]
fn test_a_failed_probe_opens_again_for_the_full_time() {
    // CB-008
    let (mut story, probe) = Story::probing(3);
    story.pass(20.0);

    assert_eq!(story.record(probe, Outcome::Failure), Some(REOPENED));
    assert_eq!(story.reject(), Some(seconds(30.0)));
    story.pass(29.0);
    assert_eq!(story.reject(), Some(seconds(1.0)));
}

#[test]
fn test_successes_do_not_survive_a_reopening() {
    // CB-010
    let (mut story, probe) = Story::probing(2);
    assert_eq!(story.record(probe, Outcome::Success), None);
    assert_eq!(story.fail(), Some(REOPENED));
    story.pass(30.0);
    let (probe, change) = story.admit();

    assert_eq!(change, Some(PROBING));
    assert_eq!(story.record(probe, Outcome::Success), None);
    assert_eq!(story.succeed(), Some(CLOSED));
}

#[test]
fn test_an_ignored_outcome_only_frees_the_place() {
    // B12
    let mut story = Story::new(failures(2), 1);
    assert_eq!([story.fail(), story.call(Outcome::Ignored, FAST)], [None, None]);
    assert_eq!(story.snapshot().counts.failures, 1); // neither a failure nor a success
    assert_eq!(story.fail(), Some(OPENED));

    story.pass(30.0);
    let (probe, _) = story.admit();
    story.reject();
    assert_eq!(story.record(probe, Outcome::Ignored), None);
    assert_eq!((story.state(), story.snapshot().probes, story.snapshot().successes), (State::HalfOpen, 0, 0));
    assert_eq!(story.succeed(), Some(CLOSED));
}

#[test]
fn test_a_dropped_permit_counts_for_nothing_while_closed() {
    // CB-011, the other way: B12
    let mut story = Story::new(failures(1), 1);

    for _ in 0..2 {
        story.permit();
    }

    assert_eq!(story.snapshot().counts, Counts::default());
    assert_eq!(story.state(), State::Closed);
}

#[test]
fn test_outcomes_of_an_earlier_period_count_for_nothing() {
    let mut story = Story::new(failures(1), 1);
    let mut stale: Vec<_> = (0..6).map(|_| story.permit()).collect();
    let mut record = |story: &mut Story, outcome| {
        let permit = stale.pop().expect("six are enough");
        let before = story.snapshot();

        assert_eq!(story.record(permit, outcome), None);
        assert_eq!(story.snapshot(), before);
    };
    assert_eq!(story.fail(), Some(OPENED));

    record(&mut story, Outcome::Failure); // CB-013
    story.pass(30.0);
    let (probe, _) = story.admit();
    record(&mut story, Outcome::Success); // CB-012
    record(&mut story, Outcome::Failure);
    assert_eq!(story.record(probe, Outcome::Success), Some(CLOSED));
    record(&mut story, Outcome::Failure); // CB-014
    assert_eq!(story.fail(), Some(OPENED));
    story.pass(30.0);
    record(&mut story, Outcome::Success);
    let (_probe, _) = story.admit();
    record(&mut story, Outcome::Ignored); // frees no place
    story.reject();
}

#[test]
fn test_a_probe_of_an_earlier_half_open_period_counts_for_nothing() {
    // CB-013
    for outcome in [Outcome::Success, Outcome::Failure, Outcome::Ignored] {
        let (mut story, stale) = Story::probing(2);
        assert_eq!(story.fail(), Some(REOPENED));
        story.pass(30.0);
        let (_probe, _) = story.admit();
        let before = story.snapshot();

        assert_eq!(story.record(stale, outcome), None);
        assert_eq!(story.snapshot(), before, "{outcome:?}");
    }
}

#[test]
fn test_full_cycle() {
    // CB-015
    let mut story = Story::new(failures(2), 1);
    assert_eq!([story.fail(), story.fail()], [None, Some(OPENED)]);
    story.pass(30.0);
    let (probe, change) = story.admit();
    assert_eq!((change, story.record(probe, Outcome::Failure)), (Some(PROBING), Some(REOPENED)));
    story.pass(30.0);
    let (probe, change) = story.admit();
    assert_eq!((change, story.record(probe, Outcome::Success)), (Some(PROBING), Some(CLOSED)));

    assert_eq!([story.fail(), story.fail()], [None, Some(OPENED)]);
    assert_eq!(story.snapshot().epoch, 6); // one period per change
}

#[test]
fn test_a_probe_that_never_ends_gives_its_place_back() {
    // B13
    let (mut story, lost) = Story::probing(1);
    story.pass(59.999_999_999);
    assert_eq!(story.reject(), Some(seconds(1e-9)));
    story.pass(1e-9);
    assert_eq!((story.snapshot().probes, story.snapshot().retry_after), (0, None));

    let probe = story.permit();
    assert_eq!(story.record(lost, Outcome::Failure), None); // too late, and not the other's place
    assert_eq!(story.snapshot().probes, 1);
    assert_eq!(story.record(probe, Outcome::Success), Some(CLOSED));
}

#[test]
fn test_a_probe_that_ends_at_its_deadline_is_too_late() {
    // B13
    for outcome in [Outcome::Success, Outcome::Failure] {
        for (duration, is_late) in [(59.999_999_999, false), (60.0, true), (61.0, true)] {
            let (mut story, probe) = Story::probing(1);
            story.pass(duration);

            assert_eq!(story.record(probe, outcome).is_none(), is_late, "{outcome:?} after {duration} s");
            assert_eq!(story.snapshot().probes, 0);
        }
    }
}

#[test]
fn test_probes_expire_one_by_one() {
    // B13
    let (mut story, _first) = Story::probing(3);
    story.pass(10.0);
    let second = story.permit();
    story.pass(10.0);
    let _third = story.permit();

    assert_eq!(story.reject(), Some(seconds(40.0)));
    assert_eq!(story.record(second, Outcome::Ignored), None);
    story.pass(40.0);
    assert_eq!(story.snapshot().probes, 1);
    story.pass(20.0);
    assert_eq!(story.snapshot().probes, 0);
}

#[test]
fn test_forced_open_lasts_until_reset() {
    let mut story = Story::new(failures(1), 1);
    let stale = story.permit();

    assert_eq!(story.breaker.force_open(), Some(OPENED));
    story.pass(315_576_000.0);
    assert_eq!(story.reject(), None);
    assert!(story.snapshot().is_forced);
    assert_eq!(story.record(stale, Outcome::Success), None);
    assert_eq!(story.breaker.reset(), Some(Change { from: State::Open, to: State::Closed }));
    assert_eq!(story.succeed(), None);
}

#[test]
fn test_a_change_is_reported_once() {
    let mut story = Story::opened(1);

    assert_eq!(story.breaker.force_open(), None); // open it was
    assert_eq!(story.breaker.force_open(), None);
    assert!(story.breaker.reset().is_some());
    assert_eq!(story.breaker.reset(), None);
}

#[test]
fn test_a_reset_forgets_calls_in_flight_and_failures() {
    let mut story = Story::new(failures(2), 1);
    assert_eq!(story.fail(), None);
    let stale = story.permit();

    assert_eq!(story.breaker.reset(), None); // closed it was, yet a new period
    assert_eq!(story.record(stale, Outcome::Failure), None);
    assert_eq!(story.snapshot().counts, Counts::default());
    assert_eq!([story.fail(), story.fail()], [None, Some(OPENED)]);
}

#[test]
fn test_every_state_meets_every_event() {
    use State::{Closed, HalfOpen, Open};

    fn call(story: &mut Story, outcome: Outcome) {
        if let Admission::Admitted { permit, .. } = story.breaker.acquire(story.now) {
            story.record(permit, outcome);
        }
    }
    type Begin = fn() -> Story;
    type Happen = fn(&mut Story);

    let states: [(&str, Begin); 5] = [
        ("closed", || Story::new(failures(1), 1)),
        ("open", || Story::opened(1)),
        ("open, reset time over", || {
            let mut story = Story::opened(1);
            story.pass(30.0);
            story
        }),
        ("forced open", || {
            let mut story = Story::new(failures(1), 1);
            story.breaker.force_open();
            story.pass(30.0);
            story
        }),
        ("half-open", || {
            let (mut story, probe) = Story::probing(1);
            story.record(probe, Outcome::Ignored);
            story
        }),
    ];
    let events: [(&str, Happen); 6] = [
        ("call asks", |story| {
            story.breaker.acquire(story.now);
        }),
        ("call fails", |story| call(story, Outcome::Failure)),
        ("call succeeds", |story| call(story, Outcome::Success)),
        ("call is ignored", |story| call(story, Outcome::Ignored)),
        ("forced open", |story| {
            story.breaker.force_open();
        }),
        ("reset", |story| {
            story.breaker.reset();
        }),
    ];
    let table = [
        [Closed, Open, Closed, Closed, Open, Closed],
        [Open, Open, Open, Open, Open, Closed],
        [HalfOpen, Open, Closed, HalfOpen, Open, Closed],
        [Open, Open, Open, Open, Open, Closed],
        [HalfOpen, Open, Closed, HalfOpen, Open, Closed],
    ];

    for ((state, in_state), row) in states.into_iter().zip(table) {
        for ((event, happen), next) in events.into_iter().zip(row) {
            let mut story = in_state();
            happen(&mut story);

            assert_eq!(story.state(), next, "{state}: {event}");
        }
    }
}

#[test]
fn test_a_rate_needs_its_minimum_of_calls() {
    let mut story = Story::new(failure_rate(Window::Calls(10), 4, 0.5), 1);

    assert_eq!([story.fail(), story.fail(), story.fail()], [None, None, None]);
    assert_eq!(story.succeed(), Some(OPENED)); // the fourth call: 3 of 4 have failed
    assert_eq!(story.snapshot().counts, Counts::default());
}

#[test]
fn test_a_window_of_calls_forgets_the_oldest() {
    let mut story = Story::new(failure_rate(Window::Calls(4), 4, 0.5), 1);
    for _ in 0..3 {
        assert_eq!([story.fail(), story.succeed(), story.succeed(), story.succeed()], [None; 4]);
        story.pass(3600.0); // however long ago
    }

    assert_eq!(story.snapshot().counts, Counts { calls: 4, failures: 1, slow_calls: 0 });
    assert_eq!(story.fail(), None); // the failure before falls out
    assert_eq!(story.fail(), Some(OPENED));
}

#[test]
fn test_a_window_of_time_forgets_what_is_older() {
    let mut story = Story::new(failure_rate(Window::Time(seconds(16.0)), 2, 1.0), 1);
    assert_eq!(story.fail(), None);
    story.pass(15.0);
    assert_eq!(story.snapshot().counts.failures, 1);
    story.pass(1.0);
    assert_eq!(story.snapshot().counts.failures, 0);

    assert_eq!(story.fail(), None);
    story.pass(15.0);
    assert_eq!(story.fail(), Some(OPENED));
}

#[test]
fn test_a_share_that_is_just_reached_opens() {
    // Neither 0.07 nor its product with 100 is exact; 7 of 100 is 0.07 all the same.
    for percent in 1..=100_u32 {
        let trip = failure_rate(Window::Calls(100), 100, f64::from(percent) / 100.0);
        let calls = |failed: u32| {
            let mut story = Story::new(trip, 1);
            for _ in failed..100 {
                assert_eq!(story.succeed(), None);
            }
            (0..failed).filter_map(|_| story.fail()).count()
        };

        assert_eq!((calls(percent), calls(percent - 1)), (1, 0), "{percent} %");
    }
}

#[test]
fn test_slow_calls_open_however_they_end() {
    let slow = || Story::new(slow_rate(Window::Calls(4), 4, 2.0, 0.5), 1);

    for outcome in [Outcome::Success, Outcome::Failure] {
        let mut story = slow();
        assert_eq!([story.fail(), story.fail(), story.call(outcome, 2.0)], [None, None, None]); // fast failures are none
        assert_eq!(story.snapshot().counts.slow_calls, 1);
        assert_eq!(story.call(outcome, 2.0), Some(OPENED));
    }
    for duration in [FAST, 1.999_999_999] {
        let mut story = slow();
        for _ in 0..20 {
            assert_eq!(story.call(Outcome::Failure, duration), None, "{duration}");
        }
    }
    let mut story = slow();
    for _ in 0..20 {
        assert_eq!(story.call(Outcome::Ignored, 100.0), None); // B12
    }
    assert_eq!(story.snapshot().counts, Counts::default());
}

#[test]
fn test_failures_and_slow_calls_are_two_ways_to_open() {
    let slow_call = SlowCall::new(seconds(2.0), 0.75).ok();
    let trip = Trip::rate(Window::Calls(4), 4, Some(0.5), slow_call).expect("a trip");
    let opens = |failed, slow| {
        let mut story = Story::new(trip, 1);
        (0..4).any(|call| {
            let outcome = if call < failed { Outcome::Failure } else { Outcome::Success };
            story.call(outcome, if 4 - call <= slow { 2.0 } else { FAST }).is_some()
        })
    };

    let table = [((1, 2), false), ((2, 0), true), ((0, 3), true), ((1, 3), true), ((0, 0), false)];
    for ((failed, slow), expected) in table {
        assert_eq!(opens(failed, slow), expected, "{failed} failed, {slow} slow");
    }
}

#[test]
fn test_a_slow_probe_opens_again() {
    let mut story = Story::new(slow_rate(Window::Calls(2), 1, 2.0, 0.5), 1);
    assert_eq!(story.call(Outcome::Success, 2.0), Some(OPENED));
    for (duration, expected) in [(2.0, REOPENED), (1.9, CLOSED)] {
        story.pass(30.0);
        let (probe, _) = story.admit();
        story.pass(duration);

        assert_eq!(story.record(probe, Outcome::Success), Some(expected), "{duration}");
    }
}

#[test]
fn test_a_clock_that_goes_back_ends_nothing_early() {
    // B14
    let (mut story, _probe) = Story::probing(1);
    let noon = story.now;
    let dawn = Moment::from_nanos(0);

    story.now = dawn;
    assert_eq!(story.reject(), Some(seconds(60.0 + 1030.0))); // no probe expires
    story.now = noon.plus(seconds(60.0));
    assert_eq!(story.fail(), Some(REOPENED));

    story.now = dawn;
    story.reject();
    story.now = noon.plus(seconds(60.0 + 29.0));
    assert_eq!(story.reject(), Some(seconds(1.0)));
}

#[test]
fn test_probes_launched_while_the_clock_is_behind_expire_in_order() {
    // B13
    let (mut story, _first) = Story::probing(2);
    let noon = story.now;
    story.now = Moment::from_nanos(0);
    let _second = story.permit();

    story.now = noon.plus(seconds(59.0));
    assert_eq!(story.reject(), Some(seconds(1.0)));
    story.pass(1.0);
    assert_eq!(story.snapshot().probes, 0);
}

#[test]
fn test_extreme_policies_neither_panic_nor_end_early() {
    // B14
    let slow_call = SlowCall::new(Nanos::MAX, 1.0).expect("a slow call");
    let trips = [
        failures(1),
        failure_rate(Window::Calls(1), 1, f64::MIN_POSITIVE),
        failure_rate(Window::Time(seconds(1e-9)), 1, 1.0),
        Trip::rate(Window::Time(Nanos::MAX), 1, Some(1.0), Some(slow_call)).expect("a trip"),
    ];
    let moments = [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX].map(Moment::from_nanos);
    for trip in trips {
        let policy = Policy::new(trip, Nanos::MAX, 10_000, Nanos::MAX).expect("a policy");
        for (start, later) in moments.iter().flat_map(|start| moments.map(|later| (*start, later))) {
            let mut story = Story::with_policy(policy);
            story.now = start;
            assert_eq!(story.fail(), Some(OPENED), "{trip:?}");
            story.now = later;
            let is_over = later.since(start) == Nanos::MAX;

            assert_eq!(
                matches!(story.breaker.acquire(later), Admission::Admitted { .. }),
                is_over,
                "{trip:?} {start:?} {later:?}"
            );
        }
    }
}

#[test]
fn test_what_no_policy_may_hold_is_refused() {
    // CB-016
    let text = |error: Option<Error>| error.map(|error| error.to_string()).unwrap_or_default();
    let policy = |reset, calls, probe| Policy::new(failures(1), seconds(reset), calls, seconds(probe)).err();
    let rate = |minimum_calls, rate| Trip::rate(Window::Calls(100), minimum_calls, rate, None).err();

    let table = [
        (Trip::consecutive_failures(0).err(), "failure_threshold must be at least 1 and at most 1000000, got 0"),
        (
            Trip::consecutive_failures(1_000_001).err(),
            "failure_threshold must be at least 1 and at most 1000000, got 1000001",
        ),
        (policy(0.0, 1, 1.0), "reset_timeout must be above 0, got 0"),
        (policy(1.0, 1, 0.0), "probe_timeout must be above 0, got 0"),
        (policy(1.0, 0, 1.0), "half_open_max_calls must be at least 1 and at most 10000, got 0"),
        (policy(1.0, 1 << 31, 1.0), "half_open_max_calls must be at least 1 and at most 10000, got 2147483648"),
        (Window::calls(0).err(), "calls must be at least 1 and at most 10000, got 0"),
        (Window::calls(10_001).err(), "calls must be at least 1 and at most 10000, got 10001"),
        (Window::time(Nanos::ZERO).err(), "seconds must be above 0, got 0"),
        (rate(0, Some(0.5)), "minimum_calls must be at least 1 and at most 1000000, got 0"),
        (rate(101, Some(0.5)), "minimum_calls must be at most the calls of the window (100), got 101"),
        (rate(100, None), "a rate needs failure_rate or slow_call_rate, got neither"),
        (rate(100, Some(1.5)), "failure_rate must be above 0 and at most 1, got 1.5"),
        (SlowCall::new(Nanos::ZERO, 0.5).err(), "slow_call_duration must be above 0, got 0"),
        (SlowCall::new(seconds(1.0), 0.0).err(), "slow_call_rate must be above 0 and at most 1, got 0"),
    ];

    for (error, expected) in table {
        assert_eq!(text(error), expected);
    }
    for rate in [0.0, -0.0, -0.5, 1.0 + f64::EPSILON, f64::INFINITY, f64::NAN] {
        assert!(matches!(SlowCall::new(seconds(1.0), rate), Err(Error::Share { .. })), "{rate}");
    }
    for count in [-1, i64::from(u32::MAX) + 2, i64::MIN, i64::MAX] {
        assert!(matches!(Trip::consecutive_failures(count), Err(Error::Calls { .. })), "{count}");
    }
}

#[test]
fn test_what_a_policy_may_hold_at_most() {
    assert!(Trip::consecutive_failures(1_000_000).is_ok());
    assert!(Trip::rate(Window::Calls(10_000), 10_000, Some(1.0), None).is_ok());
    assert!(Trip::rate(Window::Time(Nanos::MAX), 1_000_000, Some(f64::MIN_POSITIVE), None).is_ok());
    let policy = Policy::new(failures(5), seconds(1e-9), 10_000, Nanos::MAX);

    assert_eq!(policy.clone().map(|policy| *Breaker::new(policy).policy()), policy); // CB-019
}

#[test]
fn test_states_read_as_in_the_documentation() {
    let names = [State::Closed, State::Open, State::HalfOpen].map(|state| state.to_string());

    assert_eq!(names, ["closed", "open", "half-open"]);
}
