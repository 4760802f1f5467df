//! The limiters against a model that counts nanosecond by nanosecond, and laws for any budget.

use std::collections::HashMap;

use super::{NOW, charge, never, take};
use crate::core::limiter::{
    Charge, Head, Limiter, LimiterPolicy, Place, Refusal, Ticket, Turn, acquire, admit, leave, try_acquire,
};
use crate::core::time::{Moment, Nanos};

/// The same dice for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn within(&mut self, least: i64, most: i64) -> i64 {
        least.saturating_add_unsigned(self.below(most.abs_diff(least) + 1))
    }
}

fn some_policy(dice: &mut Dice) -> LimiterPolicy {
    let duration = Nanos::from_u128(u128::from(1 + dice.below(15)));
    let policy = if dice.below(2) == 0 {
        LimiterPolicy::bucket(dice.within(1, 4), duration, dice.within(1, 4), dice.within(0, 2))
    } else {
        LimiterPolicy::window(dice.within(1, 5), duration)
    };
    policy.expect("a policy")
}

/// A budget that is counted at every nanosecond, and remembers all that it granted.
#[derive(Debug, Clone)]
struct Budget {
    policy: LimiterPolicy,
    /// What a bucket holds, in tokens divided by its period.
    level: u64,
    grants: Vec<(u64, u64)>,
}

impl Budget {
    fn new(policy: LimiterPolicy) -> Self {
        let level = match policy {
            LimiterPolicy::Bucket { period, capacity, .. } => capacity * period.as_u64(),
            LimiterPolicy::Window { .. } => 0,
        };
        Self { policy, level, grants: Vec::new() }
    }

    fn tick(&mut self) {
        if let LimiterPolicy::Bucket { tokens, period, capacity } = self.policy {
            self.level = (capacity * period.as_u64()).min(self.level + tokens);
        }
    }

    fn capacity(&self) -> u64 {
        match self.policy {
            LimiterPolicy::Bucket { capacity, .. } => capacity,
            LimiterPolicy::Window { limit, .. } => limit,
        }
    }

    fn has_room(&self, now: u64, cost: u64) -> bool {
        match self.policy {
            LimiterPolicy::Bucket { period, .. } => cost * period.as_u64() <= self.level,
            LimiterPolicy::Window { limit, width } => {
                let window = |at| self.grants.first().map(|&(first, _)| (at - first) / width.as_u64());
                let used: u64 = self.grants.iter().filter(|&&(at, _)| window(at) == window(now)).map(|g| g.1).sum();
                used + cost <= limit
            }
        }
    }

    fn take(&mut self, now: u64, cost: u64) {
        if let LimiterPolicy::Bucket { period, .. } = self.policy {
            self.level -= cost * period.as_u64();
        }
        if cost > 0 {
            self.grants.push((now, cost));
        }
    }

    /// No span of time saw more than was promised.
    fn check(&self) {
        for (index, &(begin, _)) in self.grants.iter().enumerate() {
            let mut granted = 0;
            for &(end, cost) in &self.grants[index..] {
                granted += cost;
                match self.policy {
                    LimiterPolicy::Bucket { tokens, period, capacity } => {
                        let most = capacity * period.as_u64() + tokens * (end - begin);
                        assert!(granted * period.as_u64() <= most, "{self:?} {begin}..={end}");
                    }
                    LimiterPolicy::Window { limit, width } => {
                        let touched = 2 + (end - begin) / width.as_u64();
                        assert!(granted <= limit * touched, "{self:?} {begin}..={end}");
                    }
                }
            }
        }
    }
}

/// Limiters whose waiters stand in one list: each is served as soon as nobody before it in the list
/// needs one of its limiters, and there is room in all of them.
#[derive(Debug, Clone)]
struct Model {
    now: u64,
    budgets: Vec<Budget>,
    /// A name, and what the waiter needs of each limiter.
    waiters: Vec<(usize, Vec<u64>)>,
}

impl Model {
    fn tick(&mut self) {
        self.now += 1;
        self.budgets.iter_mut().for_each(Budget::tick);
    }

    fn needs(&self, tiers: &[Charge]) -> Vec<u64> {
        let sum = |index| tiers.iter().filter(|tier| tier.limiter == index).map(|tier| tier.cost).sum();
        (0..self.budgets.len()).map(sum).collect()
    }

    fn may_have(&self, needs: &[u64], before: &[(usize, Vec<u64>)]) -> bool {
        (0..needs.len()).all(|index| {
            let is_first = before.iter().all(|(_, others)| others[index] == 0);
            needs[index] == 0 || (is_first && self.budgets[index].has_room(self.now, needs[index]))
        })
    }

    fn take(&mut self, needs: &[u64]) {
        for (budget, &cost) in self.budgets.iter_mut().zip(needs) {
            budget.take(self.now, cost);
        }
    }

    /// Serves everybody who can be served, and returns their names.
    fn settle(&mut self) -> Vec<usize> {
        let mut served = Vec::new();
        while let Some(place) =
            (0..self.waiters.len()).find(|&place| self.may_have(&self.waiters[place].1, &self.waiters[..place]))
        {
            let (name, needs) = self.waiters.remove(place);
            self.take(&needs);
            served.push(name);
        }
        served
    }

    /// The verdict on a newcomer: granted, or the tier in the way and whether waiting helps.
    fn verdict(&self, tiers: &[Charge]) -> Result<(), (usize, bool)> {
        let prefixes = || (0..tiers.len()).map(|tier| (tier, self.needs(&tiers[..=tier])));
        let is_possible = |needs: &[u64]| needs.iter().zip(&self.budgets).all(|(&cost, b)| cost <= b.capacity());
        if let Some((tier, _)) = prefixes().find(|(_, needs)| !is_possible(needs)) {
            return Err((tier, false));
        }
        match prefixes().find(|(_, needs)| !self.may_have(needs, &self.waiters)) {
            Some((tier, _)) => Err((tier, true)),
            None => Ok(()),
        }
    }

    /// How long a newcomer would have to wait if nobody else came or went.
    fn time_until(&self, needs: Vec<u64>) -> u64 {
        let mut future = self.clone();
        future.waiters.push((usize::MAX, needs));
        while !future.settle().contains(&usize::MAX) {
            future.tick();
        }
        future.now - self.now
    }
}

/// A waiter as a program would keep it.
#[derive(Debug)]
struct Sleeper {
    ticket: Ticket,
    /// The limiters of its call.
    limiters: Vec<usize>,
    /// When its timer rings; without one it waits to be told.
    rings: Option<u64>,
}

/// The limiters with a driver that wakes only whom it is told to wake.
#[derive(Debug)]
struct Driver {
    now: u64,
    limiters: Vec<Limiter>,
    sleepers: HashMap<usize, Sleeper>,
}

impl Driver {
    fn lock<'a>(limiters: &'a mut [Limiter], indices: &[usize]) -> Vec<&'a mut Limiter> {
        limiters.iter_mut().enumerate().filter(|(index, _)| indices.contains(index)).map(|(_, held)| held).collect()
    }

    /// The limiters of a call, each once, and its tiers as charges on them.
    fn resolve(tiers: &[Charge]) -> (Vec<usize>, Vec<Charge>) {
        let mut indices: Vec<usize> = tiers.iter().map(|tier| tier.limiter).collect();
        indices.sort_unstable();
        indices.dedup();
        let place = |index| indices.iter().position(|&held| held == index).expect("one of them");
        let charges = tiers.iter().map(|tier| charge(place(tier.limiter), tier.cost)).collect();
        (indices, charges)
    }

    fn try_acquire(&mut self, tiers: &[Charge]) -> Result<(), Refusal> {
        let (indices, charges) = Self::resolve(tiers);
        try_acquire(Moment::from_nanos(self.now), &mut Self::lock(&mut self.limiters, &indices), &charges)
    }

    fn acquire(&mut self, name: usize, tiers: &[Charge]) -> Result<Vec<usize>, Refusal> {
        let (indices, charges) = Self::resolve(tiers);
        let now = Moment::from_nanos(self.now);
        match acquire(now, &mut Self::lock(&mut self.limiters, &indices), &charges)? {
            Place::Granted => Ok(vec![name]),
            Place::Waiting(ticket) => {
                self.sleepers.insert(name, Sleeper { ticket, limiters: indices, rings: None });
                let admitted = self.wake(vec![name]);
                assert!(!admitted.contains(&name), "it was refused a moment ago");
                Ok(admitted)
            }
        }
    }

    fn cancel(&mut self, name: usize) -> Vec<usize> {
        let gone = self.sleepers.remove(&name).expect("a sleeper");
        let heads = leave(&mut Self::lock(&mut self.limiters, &gone.limiters), gone.ticket);
        self.wake(self.names(&gone.limiters, &heads))
    }

    /// Lets time pass for everybody whose timer rings; each must be served then.
    fn ring(&mut self) -> Vec<usize> {
        let mut ringing: Vec<usize> = self
            .sleepers
            .iter()
            .filter(|(_, sleeper)| sleeper.rings == Some(self.now))
            .map(|(&name, _)| name)
            .collect();
        ringing.sort_unstable();
        let admitted = self.wake(ringing.clone());
        assert!(ringing.iter().all(|name| admitted.contains(name)), "the wait was exact");
        admitted
    }

    fn wake(&mut self, mut woken: Vec<usize>) -> Vec<usize> {
        let mut admitted = Vec::new();
        while let Some(name) = woken.pop() {
            let Some(sleeper) = self.sleepers.get_mut(&name) else { continue };
            let mut held = Self::lock(&mut self.limiters, &sleeper.limiters);
            sleeper.rings = match admit(Moment::from_nanos(self.now), &mut held, sleeper.ticket) {
                Turn::Wait(wait) => Some(self.now + wait.as_u64()),
                Turn::NotFirst => None,
                Turn::Admitted(heads) => {
                    let gone = self.sleepers.remove(&name).expect("it was here");
                    woken.extend(self.names(&gone.limiters, &heads));
                    admitted.push(name);
                    continue;
                }
            };
        }
        admitted
    }

    fn names(&self, limiters: &[usize], heads: &[Head]) -> Vec<usize> {
        let of = |head: &Head| {
            let stands =
                |sleeper: &Sleeper| sleeper.ticket == head.ticket && sleeper.limiters.contains(&limiters[head.limiter]);
            let mut names = self.sleepers.iter().filter(|(_, sleeper)| stands(sleeper)).map(|(&name, _)| name);
            let name = names.next().expect("somebody stands there");
            assert_eq!(names.next(), None, "a limiter never sees the same ticket twice");
            name
        };
        heads.iter().map(of).collect()
    }
}

fn some_tiers(dice: &mut Dice) -> Vec<Charge> {
    (0..dice.below(4)).map(|_| charge(dice.below(3) as usize, dice.below(4))).collect()
}

fn sorted(mut names: Vec<usize>) -> Vec<usize> {
    names.sort_unstable();
    names
}

/// One story of 200 ns: newcomers that try, newcomers that wait, waiters that give up.
fn play(seed: u64) {
    let mut dice = Dice(seed);
    let policies = [(); 3].map(|()| some_policy(&mut dice));
    let mut model = Model { now: 1000, budgets: policies.map(Budget::new).to_vec(), waiters: Vec::new() };
    let mut driver =
        Driver { now: 1000, limiters: policies.map(Limiter::new).into_iter().collect(), sleepers: HashMap::new() };
    for name in 0.. {
        if name >= 200 && model.waiters.is_empty() {
            break;
        }
        assert!(name < 5000, "everybody is served in the end");
        model.tick();
        driver.now += 1;
        assert_eq!(sorted(driver.ring()), sorted(model.settle()), "{seed} at {name}");

        let tiers = if name < 200 { some_tiers(&mut dice) } else { Vec::new() };
        let verdict = model.verdict(&tiers);
        match dice.below(4) {
            0 => {
                let granted = driver.try_acquire(&tiers);
                assert_eq!(granted.map_err(|r| (r.tier, r.retry_after.is_some())), verdict, "{seed} at {name}");
                if verdict.is_ok() {
                    model.take(&model.needs(&tiers));
                }
            }
            1 | 2 => match (driver.acquire(name, &tiers), verdict) {
                (Ok(admitted), Ok(()) | Err((_, true))) => {
                    model.waiters.push((name, model.needs(&tiers)));
                    assert_eq!(admitted, model.settle(), "{seed} at {name}");
                }
                (Err(refusal), Err((tier, false))) => assert_eq!(refusal, never(tier), "{seed} at {name}"),
                (ours, theirs) => panic!("{seed} at {name}: {ours:?} but {theirs:?}"),
            },
            _ if model.waiters.is_empty() || name >= 200 => {}
            _ => {
                let place = dice.below(model.waiters.len() as u64) as usize;
                let (gone, _) = model.waiters.remove(place);
                assert_eq!(sorted(driver.cancel(gone)), sorted(model.settle()), "{seed} at {name}");
            }
        }

        let index = dice.below(3) as usize;
        let cost = 1 + dice.below(model.budgets[index].capacity());
        let ours = driver.limiters[index].time_until(Moment::from_nanos(driver.now), cost).expect("possible").as_u64();
        let theirs = model.time_until(model.needs(&[charge(index, cost)]));
        let is_alone = model.waiters.iter().all(|(_, needs)| needs[index] == 0);
        assert!(ours == theirs || (ours < theirs && !is_alone), "{seed} at {name}: {ours} and {theirs}");
    }
    assert!(driver.sleepers.is_empty(), "{seed}");
    model.budgets.iter().for_each(Budget::check);
}

#[test]
fn test_any_story_goes_as_in_the_model() {
    // M3: the budgets, the order, who is woken and when, and the rate in any span of time
    for seed in 1..=1000 {
        play(u64::wrapping_mul(seed, 0x2545_f491_4f6c_dd1d));
    }
}

#[test]
fn test_a_cost_fits_exactly_when_it_was_said_to() {
    // Budgets of every size: refused one nanosecond before, granted at the time.
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20_000 {
        let count = |dice: &mut Dice| {
            let most = 10_i64.pow(dice.below(10) as u32);
            dice.within(1, most)
        };
        let duration = |dice: &mut Dice| {
            let most = 10_u64.pow(dice.below(17) as u32);
            Nanos::from_u128(u128::from(1 + dice.below(most)))
        };
        let policy = if dice.below(2) == 0 {
            LimiterPolicy::bucket(count(&mut dice), duration(&mut dice), count(&mut dice), count(&mut dice))
        } else {
            LimiterPolicy::window(count(&mut dice), duration(&mut dice))
        };
        let mut limiter = Limiter::new(policy.expect("a policy"));
        let mut now = NOW;
        for _ in 0..5 {
            now = now.plus(duration(&mut dice));
            let cost = 1 + dice.below(limiter.snapshot(now).capacity);
            let wait = limiter.time_until(now, cost).expect("possible");
            if wait > Nanos::ZERO {
                let early = Moment::from_nanos(now.as_nanos() + wait.as_u64() - 1);
                assert_eq!(take(&mut limiter, early, cost).map_err(|refusal| refusal.tier), Err(0), "{limiter:?}");
            }
            if wait < Nanos::MAX {
                now = now.plus(wait);
                assert_eq!(take(&mut limiter, now, cost), Ok(()), "{limiter:?}");
            }
        }
    }
}

#[test]
fn test_a_clock_that_jumps_grants_no_more_than_one_that_runs() {
    let mut dice = Dice(0xbf58_476d_1ce4_e5b9);
    for _ in 0..500 {
        let policy = some_policy(&mut dice);
        let mut limiter = Limiter::new(policy);
        let (mut granted, mut first, mut latest) = (0, None, 0);
        for _ in 0..200 {
            let now = 1000 + dice.below(100);
            let cost = 1 + dice.below(limiter.snapshot(Moment::from_nanos(now)).capacity);
            if take(&mut limiter, Moment::from_nanos(now), cost).is_ok() {
                granted += cost;
                first.get_or_insert(now);
                latest = latest.max(now);
            }
        }
        let time = latest - first.expect("a full budget");
        match policy {
            LimiterPolicy::Bucket { tokens, period, capacity } => {
                assert!(granted * period.as_u64() <= capacity * period.as_u64() + tokens * time, "{policy:?}");
            }
            LimiterPolicy::Window { limit, width } => {
                assert!(granted <= limit * (time / width.as_u64() + 1), "{policy:?}");
            }
        }
    }
}
