//! How much may happen in a time, and who is next.
//!
//! A limiter is a meter and a line. The meter knows how much of the budget is left, the line who
//! waits for it. A call charges one limiter or several at once (the tiers of a multi limiter), and
//! it is granted by all of them or by none:
//!
//! - A try is granted if nobody stands in the lines it would pass and every meter has room.
//! - Who would rather wait draws a ticket and stands in the line of every limiter charged. The call
//!   is admitted when its ticket is first in all of these lines and every meter has room.
//! - A charge of nothing is granted always: it meets no line and leaves no trace.
//! - A charge that its limiter could never grant is refused at once, waiting or not.
//!
//! A line is ordered by ticket number, and a ticket is drawn above every number that any of its
//! limiters has seen. So all lines agree on who came first, and the lowest ticket that waits
//! anywhere is first wherever it stands: lines cannot block each other in a circle.
//!
//! The functions below look at several limiters at once and hold no lock: whoever shares limiters
//! hands in all those of one call together, each once, and keeps them to itself meanwhile. A ticket
//! is good for the limiters it was drawn for, all of them.

use std::collections::BTreeMap;

use super::error::Error;
use super::time::{Moment, Nanos};

/// With at most this many tokens, and durations of at most ten years, no product below leaves 128
/// bits.
const MOST: i64 = 1_000_000_000;
const FLOOR: Nanos = Nanos::from_millis(1);

/// How large a budget is and how it comes back.
///
/// - `Bucket`: starts with `capacity` tokens, gains `tokens` in every `period`, evenly, and never
///   holds more than `capacity`. In any time `w` it grants at most `capacity + tokens * w / period`.
/// - `Window`: `limit` in every `width`. The windows lie end to end from the first grant on.
///
/// 10 tokens per second with a capacity of 7: 7 at once, then one every 0.1 s. The functions below
/// check the parameters; whoever writes a variant by hand vouches for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimiterPolicy {
    Bucket { tokens: u64, period: Nanos, capacity: u64 },
    Window { limit: u64, width: Nanos },
}

impl LimiterPolicy {
    /// A token bucket whose capacity is `max_tokens + burst`; `tokens` and `max_tokens`
    /// 1..=1,000,000,000, `burst` 0..=1,000,000,000, `period` above zero.
    pub fn bucket(tokens: i64, period: Nanos, max_tokens: i64, burst: i64) -> Result<Self, Error> {
        let tokens = counted("tokens", tokens, 1)?;
        let period = lasting("period", period)?;
        let capacity = counted("max_tokens", max_tokens, 1)? + counted("burst", burst, 0)?;
        Ok(Self::Bucket { tokens, period, capacity })
    }

    /// Fixed windows; `limit` 1..=1,000,000,000, `width` above zero (an error calls it `seconds`).
    pub fn window(limit: i64, width: Nanos) -> Result<Self, Error> {
        Ok(Self::Window { limit: counted("limit", limit, 1)?, width: lasting("seconds", width)? })
    }
}

/// What one tier of a call costs, and whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charge {
    /// An index into the limiters of the same call. Several charges may name the same limiter, which
    /// then has to grant their sum.
    pub limiter: usize,
    pub cost: u64,
}

/// Why a call was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The first charge that cannot ever be granted, or else the first that cannot be now.
    pub tier: usize,
    /// How long its limiter needs at least, if nobody in front gives up: 1 ms or more. `None`:
    /// waiting does not help.
    pub retry_after: Option<Nanos>,
}

/// The place of a waiting call in its lines: the lower, the earlier.
///
/// A limiter never sees the same ticket twice. Another limiter may, so a ticket means something only
/// together with the limiters it was drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// How a call that is ready to wait begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Granted,
    /// In line, until `admit` admits it or it leaves.
    Waiting(Ticket),
}

/// What a waiting call does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// Everything was taken, and the ticket is used up. These are to be told.
    Admitted(Vec<Head>),
    /// First in every line: come back after this time, when there will be room (or in ten years).
    Wait(Nanos),
    /// Somebody is in front: come back when told that this ticket is a head.
    NotFirst,
}

/// A ticket that has become the first in the line of a limiter, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub limiter: usize,
    pub ticket: Ticket,
}

/// What can be seen of a limiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    pub capacity: u64,
    /// What is left now, in whole tokens; those in line have not taken theirs yet.
    pub available: u64,
    /// How long until something is left; zero while something is.
    pub available_in: Nanos,
    /// When the window ends; `None` for a bucket and before the first grant.
    pub resets_at: Option<Moment>,
    /// How many stand in line.
    pub waiting: usize,
}

/// A budget, and those who wait for it.
#[derive(Debug)]
pub struct Limiter {
    meter: Meter,
    line: Line,
}

impl Limiter {
    /// A limiter that has granted nothing yet.
    pub fn new(policy: LimiterPolicy) -> Self {
        let meter = match policy {
            LimiterPolicy::Bucket { tokens, period, capacity } => {
                Meter::Bucket(Bucket { tokens, period: period.as_u64(), capacity, owed: 0, at: Moment::default() })
            }
            LimiterPolicy::Window { limit, width } => {
                Meter::Window(Window { limit, width: width.as_u64(), start: None, used: 0 })
            }
        };
        Self { meter, line: Line::default() }
    }

    /// Looks without changing anything: no window is opened or moved by it.
    pub fn snapshot(&self, now: Moment) -> Snapshot {
        Snapshot {
            capacity: self.meter.capacity(),
            available: self.meter.available(now),
            available_in: self.meter.time_until(now, 1),
            resets_at: self.meter.resets_at(now),
            waiting: self.line.costs.len(),
        }
    }

    /// How long until `cost` fits; `None` if it never will.
    ///
    /// Exact while nobody is in line, and otherwise the least that it takes to serve the others first.
    pub fn time_until(&self, now: Moment, cost: u64) -> Option<Nanos> {
        match cost {
            0 => Some(Nanos::ZERO),
            _ if cost > self.meter.capacity() => None,
            _ => Some(self.meter.time_until(now, self.line.queued + cost)),
        }
    }

    /// Whether a newcomer gets `cost` now.
    fn has_room(&self, now: Moment, cost: u64) -> bool {
        self.line.costs.is_empty() && self.meter.has_room(now, cost)
    }
}

/// Takes every charge now, or none.
///
/// A call without charges is granted. Every `Charge::limiter` must be an index into `limiters`.
pub fn try_acquire(now: Moment, limiters: &mut [&mut Limiter], charges: &[Charge]) -> Result<(), Refusal> {
    check(now, limiters, charges)?;
    for charge in charges {
        limiters[charge.limiter].meter.take(now, charge.cost);
    }
    Ok(())
}

/// Takes every charge now, or stands in line for all of them; refused is only what can never be
/// granted.
pub fn acquire(now: Moment, limiters: &mut [&mut Limiter], charges: &[Charge]) -> Result<Place, Refusal> {
    match try_acquire(now, limiters, charges) {
        Ok(()) => Ok(Place::Granted),
        Err(Refusal { retry_after: Some(_), .. }) => Ok(Place::Waiting(join(limiters, charges))),
        Err(never @ Refusal { retry_after: None, .. }) => Err(never),
    }
}

/// How long until every charge fits; `None` if one never will.
///
/// Of each limiter it is what `Limiter::time_until` says of its whole sum.
pub fn time_until(now: Moment, limiters: &[&mut Limiter], charges: &[Charge]) -> Option<Nanos> {
    limiters.iter().enumerate().try_fold(Nanos::ZERO, |longest, (index, limiter)| {
        Some(longest.max(limiter.time_until(now, sum(charges, index))?))
    })
}

/// Asks whether it is the turn of a waiting call, and takes what it came for if it is.
///
/// A ticket that stands in no line is never first.
pub fn admit(now: Moment, limiters: &mut [&mut Limiter], ticket: Ticket) -> Turn {
    let mut wait = None;
    for limiter in &*limiters {
        if let Some(&cost) = limiter.line.costs.get(&ticket) {
            if limiter.line.first() != Some(ticket) {
                return Turn::NotFirst;
            }
            wait = wait.max(Some(limiter.meter.time_until(now, cost)));
        }
    }
    match wait {
        None => Turn::NotFirst,
        Some(Nanos::ZERO) => {
            for limiter in &mut *limiters {
                let cost = limiter.line.costs.get(&ticket).copied().unwrap_or(0);
                limiter.meter.take(now, cost);
            }
            Turn::Admitted(leave(limiters, ticket))
        }
        Some(wait) => Turn::Wait(wait),
    }
}

/// Leaves all lines, and tells who is first where the ticket was: one head per line at most, in the
/// order of the limiters.
///
/// Nothing is charged. Whoever gives up has to leave, or those behind wait for ever; leaving twice
/// does no harm.
pub fn leave(limiters: &mut [&mut Limiter], ticket: Ticket) -> Vec<Head> {
    let mut heads = Vec::new();
    for (index, limiter) in limiters.iter_mut().enumerate() {
        let was_first = limiter.line.first() == Some(ticket);
        limiter.line.remove(ticket);
        if let (true, Some(first)) = (was_first, limiter.line.first()) {
            heads.push(Head { limiter: index, ticket: first });
        }
    }
    heads
}

/// Finds the charge that stands in the way of a newcomer: one that can never be granted before one
/// that cannot be now, and else the first in the order of the tiers.
fn check(now: Moment, limiters: &[&mut Limiter], charges: &[Charge]) -> Result<(), Refusal> {
    for (tier, charge) in charges.iter().enumerate() {
        if sum(&charges[..=tier], charge.limiter) > limiters[charge.limiter].meter.capacity() {
            return Err(Refusal { tier, retry_after: None });
        }
    }
    for (tier, charge) in charges.iter().enumerate() {
        let limiter = &limiters[charge.limiter];
        if charge.cost > 0 && !limiter.has_room(now, sum(&charges[..=tier], charge.limiter)) {
            let whole = limiter.time_until(now, sum(charges, charge.limiter));
            return Err(Refusal { tier, retry_after: whole.map(|wait| wait.max(FLOOR)) });
        }
    }
    Ok(())
}

/// Draws a ticket and stands in every line that it has to pass.
fn join(limiters: &mut [&mut Limiter], charges: &[Charge]) -> Ticket {
    let number = limiters.iter().map(|limiter| limiter.line.unseen).max().unwrap_or(0);
    for (index, limiter) in limiters.iter_mut().enumerate() {
        limiter.line.unseen = number + 1;
        limiter.line.insert(Ticket(number), sum(charges, index));
    }
    Ticket(number)
}

/// What one limiter has to grant; a sum beyond 64 bits is as impossible as the highest one.
fn sum(charges: &[Charge], limiter: usize) -> u64 {
    charges
        .iter()
        .filter(|charge| charge.limiter == limiter)
        .fold(0, |sum, charge| u64::saturating_add(sum, charge.cost))
}

/// What is left of a budget. A clock that is set back stands still for it: nothing comes back until
/// the clock has caught up.
#[derive(Debug)]
enum Meter {
    Bucket(Bucket),
    Window(Window),
}

impl Meter {
    /// The highest cost that can ever be granted at once.
    fn capacity(&self) -> u64 {
        match self {
            Self::Bucket(bucket) => bucket.capacity,
            Self::Window(window) => window.limit,
        }
    }

    fn has_room(&self, now: Moment, cost: u64) -> bool {
        match self {
            Self::Bucket(bucket) => bucket.excess(now, cost) == 0,
            Self::Window(window) => window.excess(now, cost) == 0,
        }
    }

    /// How long until `cost` has been granted if all of it is taken as soon as possible; it may be
    /// more than fits at once.
    fn time_until(&self, now: Moment, cost: u64) -> Nanos {
        match self {
            Self::Bucket(bucket) => bucket.time_until(now, cost),
            Self::Window(window) => window.time_until(now, cost),
        }
    }

    /// Takes a cost that there is room for.
    fn take(&mut self, now: Moment, cost: u64) {
        debug_assert!(self.has_room(now, cost), "checked before");
        if cost > 0 {
            match self {
                Self::Bucket(bucket) => bucket.take(now, cost),
                Self::Window(window) => window.take(now, cost),
            }
        }
    }

    fn available(&self, now: Moment) -> u64 {
        match self {
            Self::Bucket(bucket) => bucket.capacity - bucket.owed(now).div_ceil(u128::from(bucket.period)) as u64,
            Self::Window(window) => window.limit - window.current(now).1,
        }
    }

    fn resets_at(&self, now: Moment) -> Option<Moment> {
        match self {
            Self::Bucket(_) => None,
            Self::Window(window) => window.start.map(|_| {
                let ends = window.current(now).0.saturating_add(window.width);
                Moment::from_nanos(ends)
            }),
        }
    }
}

/// A bucket, by what is missing from it.
///
/// The unit is a token divided by `period`, so that a nanosecond brings back exactly `tokens` units
/// and a token is `period` of them.
#[derive(Debug)]
struct Bucket {
    tokens: u64,
    period: u64,
    capacity: u64,
    /// The units missing at the moment `at`.
    owed: u128,
    at: Moment,
}

impl Bucket {
    fn owed(&self, now: Moment) -> u128 {
        let elapsed = now.as_nanos().saturating_sub(self.at.as_nanos());
        self.owed.saturating_sub(product(elapsed, self.tokens))
    }

    /// By how many units `cost` is too much.
    fn excess(&self, now: Moment, cost: u64) -> u128 {
        (self.owed(now) + product(cost, self.period)).saturating_sub(product(self.capacity, self.period))
    }

    fn time_until(&self, now: Moment, cost: u64) -> Nanos {
        match self.excess(now, cost) {
            0 => Nanos::ZERO,
            excess => {
                let from = u128::from(now.max(self.at).as_nanos());
                let free = from + excess.div_ceil(u128::from(self.tokens));
                Nanos::from_u128(free - u128::from(now.as_nanos()))
            }
        }
    }

    fn take(&mut self, now: Moment, cost: u64) {
        self.owed = self.owed(now) + product(cost, self.period);
        self.at = self.at.max(now);
    }
}

/// A window, by what was used of it.
#[derive(Debug)]
struct Window {
    limit: u64,
    width: u64,
    /// When the window of the latest grant began.
    start: Option<u64>,
    used: u64,
}

impl Window {
    /// The beginning of the present window and what was used of it.
    fn current(&self, now: Moment) -> (u64, u64) {
        let now = now.as_nanos();
        match self.start {
            None => (now, 0),
            Some(start) if now.saturating_sub(start) < self.width => (start, self.used),
            Some(start) => (now - (now - start) % self.width, 0),
        }
    }

    /// By how much `cost` is too much.
    fn excess(&self, now: Moment, cost: u64) -> u64 {
        let (_, used) = self.current(now);
        (used + cost).saturating_sub(self.limit)
    }

    fn time_until(&self, now: Moment, cost: u64) -> Nanos {
        match self.excess(now, cost) {
            0 => Nanos::ZERO,
            excess => {
                let (start, _) = self.current(now);
                let free = u128::from(start) + product(excess.div_ceil(self.limit), self.width);
                Nanos::from_u128(free - u128::from(now.as_nanos()))
            }
        }
    }

    fn take(&mut self, now: Moment, cost: u64) {
        let (start, used) = self.current(now);
        self.start = Some(start);
        self.used = used + cost;
    }
}

/// Those who wait for one limiter, with what each has to get from it.
#[derive(Debug, Default)]
struct Line {
    costs: BTreeMap<Ticket, u64>,
    /// All costs together.
    queued: u64,
    /// The lowest number that no ticket of this limiter has had.
    unseen: u64,
}

impl Line {
    fn first(&self) -> Option<Ticket> {
        self.costs.first_key_value().map(|(&ticket, _)| ticket)
    }

    fn insert(&mut self, ticket: Ticket, cost: u64) {
        if cost > 0 {
            self.costs.insert(ticket, cost);
            self.queued += cost;
        }
    }

    fn remove(&mut self, ticket: Ticket) {
        self.queued -= self.costs.remove(&ticket).unwrap_or(0);
    }
}

fn product(left: u64, right: u64) -> u128 {
    u128::from(left) * u128::from(right)
}

fn counted(name: &'static str, count: i64, least: i64) -> Result<u64, Error> {
    if (least..=MOST).contains(&count) {
        Ok(count as u64)
    } else {
        Err(Error::Budget { name, amount: count, least, limit: MOST })
    }
}

fn lasting(name: &'static str, duration: Nanos) -> Result<Nanos, Error> {
    if duration > Nanos::ZERO { Ok(duration) } else { Err(Error::NoDuration { name }) }
}
