//! The rules of the engine as plain data: outcomes in, verdicts out.
//!
//! Nothing here knows Python, reads a clock, rolls dice or waits. Time, dice and outcomes are
//! arguments, so every rule is a function that a test can walk through exhaustively, and the driver
//! in `py` only carries out what it is told. A module uses only the modules listed above it.

pub mod error;
pub mod time;

pub mod retry;

pub mod window;

pub mod tally;

pub mod breaker;

pub mod limiter;

pub mod bulkhead;

pub mod join;

pub mod hedge;

pub mod graph;

pub mod checkpoint;

pub mod format;

pub mod claim;

pub mod resume;

pub mod ledger;

#[cfg(test)]
mod tests;
