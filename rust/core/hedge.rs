//! When the branches of a hedged split may start.

use super::join::Outcome;

/// How many branches may have been started.
///
/// | event                                            | may have been started       |
/// |--------------------------------------------------|-----------------------------|
/// | the split opens                                  | 1                           |
/// | the newest branch has run for `hedge_after`      | 1 more than have been       |
/// | a branch ended without success                   | 1 more than might have been |
///
/// A start that is due may be late, because a bulkhead is full. It is not forgotten, and does not
/// hold back the ones that failures make due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hedge {
    due: usize,
}

impl Hedge {
    /// The rule of a split that opens.
    pub const OPENED: Self = Self { due: 1 };

    /// Whether another branch may start, after so many.
    pub fn is_due(&self, started: usize) -> bool {
        started < self.due
    }

    /// The newest of so many branches has run for long enough.
    pub fn newest_is_slow(&mut self, started: usize) {
        self.due = self.due.max(started + 1);
    }

    pub fn branch_ended(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Succeeded => {}
            Outcome::Failed | Outcome::Cancelled => self.due += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_one_more_for_a_slow_branch_and_for_each_that_fails() {
        let mut hedge = Hedge::OPENED;
        assert!(hedge.is_due(0));
        assert!(!hedge.is_due(1));

        hedge.newest_is_slow(1);
        assert!(hedge.is_due(1));
        assert!(!hedge.is_due(2));

        hedge.branch_ended(Outcome::Failed);
        hedge.branch_ended(Outcome::Cancelled);
        assert!(hedge.is_due(3));
        assert!(!hedge.is_due(4));

        hedge.branch_ended(Outcome::Succeeded);
        assert!(!hedge.is_due(4));
    }

    #[test]
    fn test_a_start_that_is_late_is_due_once() {
        let mut hedge = Hedge::OPENED;

        hedge.newest_is_slow(1);
        hedge.newest_is_slow(1);
        hedge.branch_ended(Outcome::Failed);

        assert!(hedge.is_due(2));
        assert!(!hedge.is_due(3));
    }
}
