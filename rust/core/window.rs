//! Which outputs of a stream are handed over together.

use super::error::Error;
use super::time::Nanos;

const MOST_OUTPUTS: i64 = 1_000_000_000;

/// How a stream is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// So many outputs, and what is left when the source ends.
    Count(u32),
    /// The outputs between two ends; the ends are `start + k * width`, whatever the outputs cost.
    Duration(Nanos),
}

impl Window {
    /// `outputs` 1..=1,000,000,000.
    pub fn count(outputs: i64) -> Result<Self, Error> {
        match u32::try_from(outputs) {
            Ok(count) if (1..=MOST_OUTPUTS).contains(&outputs) => Ok(Self::Count(count)),
            _ => Err(Error::Budget { name: "n", amount: outputs, least: 1, limit: MOST_OUTPUTS }),
        }
    }

    /// `width` above zero.
    pub fn duration(width: Nanos) -> Result<Self, Error> {
        if width == Nanos::ZERO {
            return Err(Error::NoDuration { name: "seconds" });
        }
        Ok(Self::Duration(width))
    }
}

/// The window that is being filled.
///
/// Empty -> `add` -> filling -> `is_due` -> `hand_over` -> empty. An empty window is never due: a
/// stretch of time without outputs is no window at all.
///
/// Moments are seconds on the clock of the event loop, as it gives them: what is due is compared
/// with the very number that a timer was set to, so no rounding can make the two disagree.
#[derive(Debug, Clone, Copy)]
pub struct Filling {
    window: Window,
    start: f64,
    outputs: u32,
    /// When a window by duration ends; None while it is empty.
    end: Option<f64>,
}

impl Filling {
    pub fn new(window: Window, start: f64) -> Self {
        Self { window, start, outputs: 0, end: None }
    }

    /// One output more, ready at `now`; the first one of a window decides when that ends.
    pub fn add(&mut self, now: f64) {
        self.outputs += 1;
        match self.window {
            Window::Duration(width) if self.end.is_none() => self.end = Some(end_after(self.start, width, now)),
            Window::Duration(_) | Window::Count(_) => {}
        }
    }

    /// Whether the outputs are to be handed over at `now`.
    pub fn is_due(&self, now: f64) -> bool {
        match self.window {
            Window::Count(count) => self.outputs >= count,
            Window::Duration(_) => self.end.is_some_and(|end| now >= end),
        }
    }

    /// The moment at which they are, if that is a matter of time.
    pub fn end(&self) -> Option<f64> {
        self.end
    }

    /// The outputs were handed over.
    pub fn hand_over(&mut self) {
        self.outputs = 0;
        self.end = None;
    }
}

/// The first `start + k * width` after `now`.
///
/// The quotient may be rounded to either side of a whole number, hence the neighbours. Where the
/// clock cannot tell one end from the next, `now` itself is one.
fn end_after(start: f64, width: Nanos, now: f64) -> f64 {
    let width = width.as_seconds();
    let passed = ((now - start) / width).floor();
    let ends = [0.0, 1.0, 2.0].map(|more| start + (passed + more) * width);
    ends.into_iter().find(|end| *end > now).unwrap_or(now)
}
