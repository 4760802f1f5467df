//! How many may be at work at once, and who is next.
//!
//! A bulkhead has `limit` slots. Who finds none free stands in the line. A slot that is given back
//! while somebody stands there is never free: it is in the hands of the first at once, who is in the
//! line no more, however long the news take. So nobody who comes later can be faster, and no slot is
//! lost as long as each one in use is given back once, whether anything was done with it or not.
//!
//! Invariants: `in_use <= limit`, and while somebody stands in the line `in_use == limit`.

use std::collections::BTreeMap;
use std::mem;

use super::error::Error;

const MOST: i64 = 1_000_000_000;

/// The place of somebody in the line: the lower, the earlier. None is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// How a newcomer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// With a slot.
    Taken,
    /// In the line.
    Waiting(Ticket),
}

/// The slots, and the line of those who wait for one; `W` is how each of them is told.
#[derive(Debug)]
pub struct Bulkhead<W> {
    limit: usize,
    in_use: usize,
    line: BTreeMap<Ticket, W>,
    unseen: u64,
}

impl<W> Bulkhead<W> {
    /// All slots free; `limit` 1..=1,000,000,000.
    pub fn new(limit: i64) -> Result<Self, Error> {
        if !(1..=MOST).contains(&limit) {
            return Err(Error::Budget { name: "limit", amount: limit, least: 1, limit: MOST });
        }
        Ok(Self { limit: limit as usize, in_use: 0, line: BTreeMap::new(), unseen: 0 })
    }

    /// Takes a free slot, if there is one.
    pub fn try_acquire(&mut self) -> bool {
        let is_free = self.in_use < self.limit;
        self.in_use += usize::from(is_free);
        is_free
    }

    /// Takes a free slot, or stands at the end of the line.
    pub fn acquire(&mut self, waiting: impl FnOnce() -> W) -> Place {
        if self.try_acquire() {
            return Place::Taken;
        }
        let ticket = Ticket(self.unseen);
        self.unseen += 1;
        self.line.insert(ticket, waiting());
        Place::Waiting(ticket)
    }

    /// Gives a slot back; it belongs now to who is returned, and is free if nobody is.
    pub fn release(&mut self) -> Option<W> {
        let first = self.line.pop_first().map(|(_, waiting)| waiting);
        debug_assert!(self.in_use > 0, "only what was taken is given back");
        self.in_use -= usize::from(first.is_none());
        first
    }

    /// Gives a slot back and has it again at once: the same as `release`, where the ticket is the first
    /// of the line, which it leaves. None, and nothing happened, where it is not.
    pub fn renew(&mut self, ticket: Ticket) -> Option<W> {
        let first = self.line.first_entry().filter(|first| *first.key() == ticket)?;
        Some(first.remove())
    }

    /// Gives up a place in the line. None if the ticket stands there no more: then a slot may be on
    /// its way to who had it, and has to be given back.
    pub fn leave(&mut self, ticket: Ticket) -> Option<W> {
        self.line.remove(&ticket)
    }

    /// Forgets who stands in the line.
    pub fn clear(&mut self) -> Vec<W> {
        mem::take(&mut self.line).into_values().collect()
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The slots that are not free, also those whose new owner has not heard of it yet.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// How many stand in the line.
    pub fn waiting(&self) -> usize {
        self.line.len()
    }

    /// Those who stand in the line, first to last.
    pub fn line(&self) -> impl Iterator<Item = &W> {
        self.line.values()
    }
}
