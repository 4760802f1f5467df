//! Longer stories about the rules, told through their public face.

mod breaker;
mod bulkhead;
mod checkpoint;
mod claim;
mod graph;
mod join;
mod limiter;
mod resume;
mod retry;
mod time;
mod window;
