//! Every strategy against every order of ends, and the reference behaviours one by one.

use crate::core::error::Error;
use crate::core::join::{Join, JoinStrategy, JoinVerdict, Outcome};

const WIDEST: usize = 6;
const OUTCOMES: [Outcome; 3] = [Outcome::Succeeded, Outcome::Failed, Outcome::Cancelled];
const PERCENTS: [u32; 9] = [1, 17, 25, 33, 50, 67, 75, 99, 100];

/// A strategy as the reference sees it: percentages in whole numbers.
#[derive(Debug, Clone, Copy)]
enum Rule {
    All,
    Any,
    Quorum(usize),
    Percent(u32),
    PartialResults(usize),
    PartialTimeout,
}

impl Rule {
    fn every() -> Vec<Self> {
        let mut rules = vec![Self::All, Self::Any, Self::PartialTimeout];
        rules.extend(PERCENTS.map(Self::Percent));
        rules.extend((1..=WIDEST + 1).map(Self::Quorum)); // the last is out of reach
        rules.extend((1..=WIDEST + 1).map(Self::PartialResults));
        rules
    }

    fn strategy(self) -> JoinStrategy {
        match self {
            Self::All => JoinStrategy::All,
            Self::Any => JoinStrategy::Any,
            Self::Quorum(n) => JoinStrategy::Quorum(n),
            Self::Percent(percent) => JoinStrategy::Percentage(f64::from(percent) / 100.0),
            Self::PartialResults(n) => JoinStrategy::PartialResults(n),
            Self::PartialTimeout => JoinStrategy::PartialTimeout,
        }
    }

    /// The table of the documentation, column "goes on when", read off a list of ends.
    fn is_met(self, total: usize, ends: &[Outcome], is_late: bool) -> bool {
        let count = |wanted| ends.iter().filter(|end| **end == wanted).count();
        let (good, bad) = (count(Outcome::Succeeded), count(Outcome::Failed));
        match self {
            Self::All => good == total,
            Self::Any => good > 0,
            Self::Quorum(n) => good >= n,
            Self::Percent(percent) => good > 0 && good * 100 >= percent as usize * total,
            Self::PartialResults(n) => good + bad >= n,
            Self::PartialTimeout => good + bad > 0 && (ends.len() == total || is_late),
        }
    }

    /// Whether the best that can still come would meet the rule.
    fn is_open(self, total: usize, ends: &[Outcome]) -> bool {
        let mut best = ends.to_vec();
        best.resize(total, Outcome::Succeeded);
        self.is_met(total, &best, false)
    }

    /// The verdict after these ends, none of which had decided before.
    fn verdict(self, total: usize, ends: &[Outcome], fail_fast: bool) -> JoinVerdict {
        if self.is_met(total, ends, false) {
            JoinVerdict::Proceed
        } else if ends.len() == total || (fail_fast && !self.is_open(total, ends)) {
            JoinVerdict::Fail
        } else {
            JoinVerdict::Undecided
        }
    }
}

/// Every sequence of `length` outcomes.
fn sequences(length: usize) -> Vec<Vec<Outcome>> {
    let mut all = vec![Vec::new()];
    for _ in 0..length {
        let longer = |ends: &Vec<Outcome>| OUTCOMES.map(|end| [ends.as_slice(), &[end]].concat());
        all = all.iter().flat_map(longer).collect();
    }
    all
}

/// Plays one split, the timeout falling after `late` ends, and checks every verdict on the way.
fn play(rule: Rule, ends: &[Outcome], late: Option<usize>, fail_fast: bool) {
    let total = ends.len();
    let story = format!("{rule:?} {ends:?} late {late:?} fail_fast {fail_fast}");
    let mut join = Join::new(rule.strategy(), total, fail_fast);
    let mut expected = JoinVerdict::Undecided;
    for now in 0..=total {
        if now > 0 {
            join.branch_ended(ends[now - 1]);
        }
        if expected == JoinVerdict::Undecided {
            expected = rule.verdict(total, &ends[..now], fail_fast);
        }
        assert_eq!(join.verdict(), expected, "after {now} ends: {story}");
        if late == Some(now) {
            if expected == JoinVerdict::Undecided {
                let is_met = rule.is_met(total, &ends[..now], true);
                expected = if is_met { JoinVerdict::Proceed } else { JoinVerdict::TimedOut };
            }
            assert_eq!(join.timed_out(), expected, "late after {now} ends: {story}");
        }
        assert_eq!(join.ended(), now, "{story}");
        assert_eq!(join.succeeded() + join.failed() + join.cancelled(), now, "{story}"); // JN-008
    }
    assert_ne!(expected, JoinVerdict::Undecided, "a split whose branches have ended is decided: {story}");
    assert_eq!(join.total(), total);
}

#[test]
fn test_every_order_of_ends_is_decided_at_the_earliest_event() {
    for total in 0..=WIDEST {
        for ends in sequences(total) {
            for rule in Rule::every() {
                for fail_fast in [false, true] {
                    play(rule, &ends, None, fail_fast);
                    for late in 0..=total {
                        play(rule, &ends, Some(late), fail_fast);
                    }
                }
            }
        }
    }
}

/// Plays ends until the verdict falls: the verdict and the number of ends it took.
fn decided(strategy: JoinStrategy, total: usize, ends: &[Outcome]) -> (JoinVerdict, usize) {
    let mut join = Join::new(strategy, total, false);
    for end in ends {
        if join.verdict() == JoinVerdict::Undecided {
            join.branch_ended(*end);
        }
    }
    (join.verdict(), join.ended())
}

#[test]
fn test_reference_stories() {
    use JoinStrategy::{All, Any, PartialResults, PartialTimeout, Percentage, Quorum};
    use JoinVerdict::{Fail, Proceed, Undecided};
    use Outcome::{Failed as Bad, Succeeded as Good};

    let table = [
        ("JN-001 SP-019", All, 0, vec![], (Proceed, 0)),
        ("SP-001", All, 3, vec![Good, Good, Good], (Proceed, 3)),
        ("SP-002 SP-003", All, 3, vec![Bad, Good, Good], (Fail, 3)),
        ("JN-002 SP-020", Any, 0, vec![], (Fail, 0)),
        ("SP-004 SP-005", Any, 3, vec![Bad, Good, Good], (Proceed, 2)),
        ("JN-003", Quorum(0), 3, vec![], (Proceed, 0)),
        ("JN-003", Quorum(5), 3, vec![Good, Good, Good], (Fail, 3)),
        ("SP-006 B61", Quorum(3), 4, vec![Good, Good, Good, Good], (Proceed, 3)),
        ("SP-006", Quorum(2), 3, vec![Bad, Good, Good], (Proceed, 3)),
        ("JN-004", Percentage(0.5), 3, vec![Good, Good], (Proceed, 2)),
        ("JN-004", Percentage(1.0), 3, vec![Good, Good, Good], (Proceed, 3)),
        ("SP-008", Percentage(0.75), 4, vec![Good, Good, Good, Good], (Proceed, 3)),
        ("SP-008", Percentage(1.0), 2, vec![Bad, Good], (Fail, 2)),
        ("JN-005", Percentage(1.0), usize::MAX, vec![Good, Good], (Undecided, 2)),
        ("SP-009", PartialResults(2), 4, vec![Good, Good], (Proceed, 2)),
        ("SP-010 D02", PartialResults(2), 4, vec![Good, Bad], (Proceed, 2)),
        ("SP-014", PartialTimeout, 2, vec![Good, Bad], (Proceed, 2)),
        ("SP-016", PartialTimeout, 2, vec![Bad, Bad], (Proceed, 2)),
        ("SP-020", PartialTimeout, 0, vec![], (Fail, 0)),
        ("SP-023", All, 1, vec![Good], (Proceed, 1)),
    ];

    for (id, strategy, total, ends, expected) in table {
        assert_eq!(decided(strategy, total, &ends), expected, "{id}");
    }
}

#[test]
fn test_timeout_lets_only_partial_timeout_proceed_and_only_with_an_end() {
    use Outcome::{Cancelled, Failed, Succeeded};

    let late = |strategy, ends: &[Outcome]| {
        let mut join = Join::new(strategy, 4, false);
        for end in ends {
            join.branch_ended(*end);
        }
        join.timed_out()
    };

    let partial = JoinStrategy::PartialTimeout;
    assert_eq!(late(partial, &[Succeeded, Succeeded]), JoinVerdict::Proceed); // SP-012
    assert_eq!(late(partial, &[Failed]), JoinVerdict::Proceed); // SP-013
    assert_eq!(late(partial, &[]), JoinVerdict::TimedOut); // SP-015
    assert_eq!(late(partial, &[Cancelled]), JoinVerdict::TimedOut);
    assert_eq!(late(partial, &[Cancelled; 4]), JoinVerdict::Fail);
    assert_eq!(late(JoinStrategy::All, &[Succeeded; 3]), JoinVerdict::TimedOut); // SP-017
    assert_eq!(late(JoinStrategy::PartialResults(3), &[]), JoinVerdict::TimedOut); // SP-018
    assert_eq!(late(JoinStrategy::Quorum(2), &[Succeeded; 2]), JoinVerdict::Proceed); // SP-039, B61
}

#[test]
fn test_fail_fast_fails_at_the_first_hopeless_end() {
    // B48, the opt-in half; without it the last branch is waited for (SP-003)
    for (fail_fast, expected) in [(true, JoinVerdict::Fail), (false, JoinVerdict::Undecided)] {
        let mut all = Join::new(JoinStrategy::All, 3, fail_fast);
        let mut quorum = Join::new(JoinStrategy::Quorum(2), 3, fail_fast);

        assert_eq!(all.branch_ended(Outcome::Failed), expected);
        assert_eq!(quorum.branch_ended(Outcome::Failed), JoinVerdict::Undecided);
        assert_eq!(quorum.branch_ended(Outcome::Cancelled), expected);
    }
}

#[test]
fn test_a_split_that_cannot_be_joined_is_refused() {
    let refusal = |strategy: JoinStrategy, total, has_timeout| {
        let verdict = strategy.check(total, has_timeout);
        verdict.map_err(|error| error.to_string())
    };
    let none = "Any needs at least one branch, the split has none; only All joins an empty split";

    // B45, WF-012
    let three = Err("Quorum(5) cannot be reached: the split has 3 branches".to_owned());
    assert_eq!(refusal(JoinStrategy::Quorum(5), 3, false), three);
    let one = Err("PartialResults(2) cannot be reached: the split has 1 branch".to_owned());
    assert_eq!(refusal(JoinStrategy::PartialResults(2), 1, true), one);
    // SP-020
    assert_eq!(refusal(JoinStrategy::Any, 0, false), Err(none.to_owned()));
    // WF-008
    assert_eq!(JoinStrategy::PartialTimeout.check(3, false), Err(Error::TimeoutMissing));
}

#[test]
fn test_what_passes_the_check_can_proceed() {
    for total in 0..=WIDEST {
        for rule in Rule::every() {
            let is_accepted = rule.strategy().check(total, true).is_ok();
            let is_possible = rule.is_open(total, &[]);

            assert_eq!(is_accepted, is_possible, "{rule:?} of {total}");
        }
    }
}

#[test]
fn test_parameters_out_of_range_are_refused() {
    for n in [0, -1, i64::MIN] {
        assert_eq!(JoinStrategy::quorum(n), Err(Error::JoinCount { strategy: "Quorum", count: n }));
        assert_eq!(JoinStrategy::partial_results(n), Err(Error::JoinCount { strategy: "PartialResults", count: n }));
    }
    // WF-009, SP-022
    for p in [0.0, -0.0, -0.5, 1.5, 1.0 + f64::EPSILON, f64::INFINITY, f64::NAN] {
        assert!(matches!(JoinStrategy::percentage(p), Err(Error::Percentage { .. })), "{p}");
    }

    assert_eq!(JoinStrategy::quorum(3), Ok(JoinStrategy::Quorum(3)));
    assert_eq!(JoinStrategy::partial_results(1), Ok(JoinStrategy::PartialResults(1)));
    assert_eq!(JoinStrategy::percentage(1.0), Ok(JoinStrategy::Percentage(1.0)));
}

#[test]
fn test_a_fed_join_proceeds_when_no_more_come_and_all_have_ended() {
    // BT-003: failures fill their places like successes
    let mut join = Join::fed();
    for outcome in [Outcome::Succeeded, Outcome::Failed] {
        join.branch_added();
        assert_eq!(join.branch_ended(outcome), JoinVerdict::Undecided);
    }
    join.branch_added();
    assert_eq!(join.fed_up(), JoinVerdict::Undecided);
    assert_eq!(join.branch_ended(Outcome::Failed), JoinVerdict::Proceed);
    assert_eq!(Join::fed().fed_up(), JoinVerdict::Proceed);
}
