//! Longer stories about the rules, told through their public face.

mod graph;
mod join;
mod retry;
mod time;
