//! When a split is decided.

use std::fmt;

use super::error::Error;

/// Which ends of its branches a split waits for.
///
/// The functions below check the parameters; whoever writes a variant by hand vouches for them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum JoinStrategy {
    /// Every branch succeeds.
    All,
    /// One branch succeeds.
    Any,
    /// `n` branches succeed.
    Quorum(usize),
    /// `ceil(p * total)` branches succeed.
    Percentage(f64),
    /// `n` branches end, well or badly.
    PartialResults(usize),
    /// Every branch ends or the timeout falls, with one branch that ended well or badly.
    PartialTimeout,
}

impl JoinStrategy {
    /// `n` successes, `n` at least 1.
    pub fn quorum(n: i64) -> Result<Self, Error> {
        counted("Quorum", n).map(Self::Quorum)
    }

    /// A share of successes, `p` in `(0, 1]`.
    pub fn percentage(p: f64) -> Result<Self, Error> {
        if p > 0.0 && p <= 1.0 { Ok(Self::Percentage(p)) } else { Err(Error::Percentage { percentage: p }) }
    }

    /// `n` ends, `n` at least 1.
    pub fn partial_results(n: i64) -> Result<Self, Error> {
        counted("PartialResults", n).map(Self::PartialResults)
    }

    /// Whether a split of `total` branches can be joined like this.
    ///
    /// Refused: an empty split unless `All`, more branches asked for than there are,
    /// `PartialTimeout` without a timeout. What passes can proceed, provided that the branches do
    /// their part.
    pub fn check(&self, total: usize, has_timeout: bool) -> Result<(), Error> {
        match *self {
            Self::All => Ok(()),
            _ if total == 0 => Err(Error::EmptySplit { strategy: self.to_string() }),
            Self::Quorum(n) | Self::PartialResults(n) if n > total => {
                Err(Error::JoinOutOfReach { strategy: self.to_string(), total })
            }
            Self::PartialTimeout if !has_timeout => Err(Error::TimeoutMissing),
            Self::Any | Self::Quorum(_) | Self::Percentage(_) | Self::PartialResults(_) | Self::PartialTimeout => {
                Ok(())
            }
        }
    }
}

impl fmt::Display for JoinStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("All"),
            Self::Any => f.write_str("Any"),
            Self::Quorum(n) => write!(f, "Quorum({n})"),
            Self::Percentage(p) => write!(f, "Percentage({p:?})"),
            Self::PartialResults(n) => write!(f, "PartialResults({n})"),
            Self::PartialTimeout => f.write_str("PartialTimeout"),
        }
    }
}

/// How a branch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Succeeded,
    Failed,
    Cancelled,
}

/// What a split does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinVerdict {
    /// Wait for the next end.
    Undecided,
    /// Go on to the joined state.
    Proceed,
    /// The strategy can no longer be met.
    Fail,
    /// The timeout fell first.
    TimedOut,
}

/// What a join that has what it needs still waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    Nothing,
    EveryBranch,
    /// Every branch, and there may be more of them to come.
    MoreBranches,
}

/// The books of one split: what its branches have done, and what that decides.
///
/// Every strategy is three facts, settled in `new`: how many branches it needs (`need`), whether
/// failures count (`counts_failures`), and whether it still waits for every branch once it has them
/// (it is patient). With `reached` the ends that count and `open` the branches that have not ended,
/// the first line that holds is the verdict:
///
/// | holds                                              | verdict   |
/// |----------------------------------------------------|-----------|
/// | `reached >= need` (if patient, also `open == 0`)   | Proceed   |
/// | `open == 0`                                        | Fail      |
/// | `fail_fast` and `reached + open < need`            | Fail      |
/// | none of these                                      | Undecided |
///
/// A timeout is Proceed for a patient join that has reached what it needs, and otherwise
/// `TimedOut`. Invariants: a decided verdict never changes, and while undecided `ended() < total`.
/// An empty split is decided at birth: Proceed under `All`, else Fail (which `check` refuses
/// before).
///
/// A join may also be fed (`fed`): its branches come one after the other, and it is undecided until
/// no more will. Then it proceeds with the last end, whatever the ends were.
#[derive(Debug, Clone)]
pub struct Join {
    total: usize,
    need: usize,
    counts_failures: bool,
    patience: Patience,
    fail_fast: bool,
    succeeded: usize,
    failed: usize,
    cancelled: usize,
    verdict: JoinVerdict,
}

impl Join {
    /// Opens the books of a split; `fail_fast` fails it as soon as it can no longer succeed, not at
    /// the last end.
    pub fn new(strategy: JoinStrategy, total: usize, fail_fast: bool) -> Self {
        let (need, counts_failures, patience) = match strategy {
            JoinStrategy::All => (total, false, Patience::Nothing),
            JoinStrategy::Any => (1, false, Patience::Nothing),
            JoinStrategy::Quorum(n) => (n, false, Patience::Nothing),
            JoinStrategy::Percentage(p) => (share(p, total), false, Patience::Nothing),
            JoinStrategy::PartialResults(n) => (n, true, Patience::Nothing),
            JoinStrategy::PartialTimeout => (1, true, Patience::EveryBranch),
        };
        let mut join = Self {
            total,
            need,
            counts_failures,
            patience,
            fail_fast,
            succeeded: 0,
            failed: 0,
            cancelled: 0,
            verdict: JoinVerdict::Undecided,
        };
        join.verdict = join.decide();
        join
    }

    /// Opens the books of a split that is fed with branches.
    pub fn fed() -> Self {
        Self {
            total: 0,
            need: 0,
            counts_failures: true,
            patience: Patience::MoreBranches,
            fail_fast: false,
            succeeded: 0,
            failed: 0,
            cancelled: 0,
            verdict: JoinVerdict::Undecided,
        }
    }

    /// One branch more, of a split that is fed.
    pub fn branch_added(&mut self) {
        debug_assert!(self.patience == Patience::MoreBranches, "only a split that is fed grows");
        self.total += 1;
    }

    /// No more branches will come.
    pub fn fed_up(&mut self) -> JoinVerdict {
        self.patience = Patience::EveryBranch;
        if self.verdict == JoinVerdict::Undecided {
            self.verdict = self.decide();
        }
        self.verdict
    }

    pub fn verdict(&self) -> JoinVerdict {
        self.verdict
    }

    /// Books the end of one branch; after the decision ends are only counted.
    pub fn branch_ended(&mut self, outcome: Outcome) -> JoinVerdict {
        debug_assert!(self.ended() < self.total, "a branch ends once");
        match outcome {
            Outcome::Succeeded => self.succeeded += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::Cancelled => self.cancelled += 1,
        }
        if self.verdict == JoinVerdict::Undecided {
            self.verdict = self.decide();
        }
        self.verdict
    }

    /// Books the timeout; it changes nothing after the decision, so a straggler cannot undo a
    /// quorum.
    pub fn timed_out(&mut self) -> JoinVerdict {
        if self.verdict == JoinVerdict::Undecided {
            // Only a patient join is still undecided with all that it needs.
            self.verdict = if self.reached() >= self.need { JoinVerdict::Proceed } else { JoinVerdict::TimedOut };
        }
        self.verdict
    }

    pub fn succeeded(&self) -> usize {
        self.succeeded
    }

    pub fn failed(&self) -> usize {
        self.failed
    }

    pub fn cancelled(&self) -> usize {
        self.cancelled
    }

    pub fn total(&self) -> usize {
        self.total
    }

    /// The branches that have ended in any way.
    pub fn ended(&self) -> usize {
        self.succeeded + self.failed + self.cancelled
    }

    fn reached(&self) -> usize {
        self.succeeded + if self.counts_failures { self.failed } else { 0 }
    }

    fn decide(&self) -> JoinVerdict {
        let open = self.total - self.ended();
        let is_complete = open == 0 && self.patience != Patience::MoreBranches;
        let is_met = self.reached() >= self.need && (is_complete || self.patience == Patience::Nothing);
        let is_lost = is_complete || (self.fail_fast && self.reached() + open < self.need);
        match (is_met, is_lost) {
            (true, _) => JoinVerdict::Proceed,
            (false, true) => JoinVerdict::Fail,
            (false, false) => JoinVerdict::Undecided,
        }
    }
}

fn counted(strategy: &'static str, count: i64) -> Result<usize, Error> {
    match usize::try_from(count) {
        Ok(n) if n >= 1 => Ok(n),
        _ => Err(Error::JoinCount { strategy, count }),
    }
}

/// `ceil(p * total)`, at least 1 and, for a split with branches, at most `total`.
///
/// Neither 0.07 nor its product with 100 is exact, and `7.000000000000001` must not ask for eight
/// branches: a product within a few rounding errors of a whole number is that number.
fn share(p: f64, total: usize) -> usize {
    let product = p * total as f64;
    let whole = product.round();
    let is_whole = (product - whole).abs() <= 4.0 * f64::EPSILON * product;
    let need = if is_whole { whole } else { product.ceil() };
    (need as usize).min(total).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_share_is_the_rounded_up_part_in_whole_numbers() {
        // JN-004: every hundredth of every split up to 300 branches, against integer arithmetic.
        for percent in 1..=100_u32 {
            for total in 1..=300_usize {
                let need = (percent as usize * total).div_ceil(100);

                assert_eq!(share(f64::from(percent) / 100.0, total), need, "{percent} % of {total}");
            }
        }
    }

    #[test]
    fn test_share_at_the_edges() {
        // JN-005 and products that rounding would push over or under a whole number
        for (p, total, need) in [
            (0.07, 100, 7),
            (0.1, 30, 3),
            (0.1 + 0.2, 10, 3),
            (1.0 / 3.0, 3, 1),
            (f64::MIN_POSITIVE, 5, 1),
            (1e-15, 1000, 1),
            (0.500_000_1, 10, 6),
            (1.0, usize::MAX, usize::MAX),
        ] {
            assert_eq!(share(p, total), need, "{p} of {total}");
        }
    }

    #[test]
    fn test_names_read_as_written() {
        let names = [JoinStrategy::All, JoinStrategy::Quorum(3), JoinStrategy::Percentage(1.0)].map(|s| s.to_string());

        assert_eq!(names, ["All", "Quorum(3)", "Percentage(1.0)"]);
    }
}
