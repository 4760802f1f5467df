//! The slots and the line: stories, and every sequence of events up to a length against a model.

use std::collections::VecDeque;

use crate::core::bulkhead::{Bulkhead, Place, Ticket};
use crate::core::error::Error;

fn bulkhead(limit: i64) -> Bulkhead<usize> {
    Bulkhead::new(limit).expect("a limit")
}

fn ticket(place: Place) -> Ticket {
    match place {
        Place::Waiting(ticket) => ticket,
        Place::Taken => panic!("no place in the line but a slot"),
    }
}

#[test]
fn test_limit_out_of_range_is_refused() {
    for limit in [0, -1, i64::MIN, 1_000_000_001, i64::MAX] {
        let refused = Bulkhead::<usize>::new(limit).err();

        assert_eq!(refused, Some(Error::Budget { name: "limit", amount: limit, least: 1, limit: 1_000_000_000 }));
    }
    assert_eq!(bulkhead(1_000_000_000).limit(), 1_000_000_000);
}

#[test]
fn test_slots_are_handed_on_in_the_order_of_the_line() {
    let mut bulkhead = bulkhead(2);
    assert_eq!(bulkhead.acquire(|| 0), Place::Taken);
    assert!(bulkhead.try_acquire());

    ticket(bulkhead.acquire(|| 2));
    ticket(bulkhead.acquire(|| 3));

    assert_eq!((bulkhead.in_use(), bulkhead.waiting()), (2, 2));
    assert_eq!(bulkhead.release(), Some(2));
    assert!(!bulkhead.try_acquire());
    assert_eq!(bulkhead.release(), Some(3));
    assert_eq!(bulkhead.release(), None);
    assert_eq!((bulkhead.in_use(), bulkhead.waiting()), (1, 0));
    assert!(bulkhead.try_acquire());
}

#[test]
fn test_who_leaves_the_line_gets_no_slot_and_who_got_one_has_to_give_it_back() {
    let mut bulkhead = bulkhead(1);
    assert!(bulkhead.try_acquire());
    let (first, second) = (ticket(bulkhead.acquire(|| 1)), ticket(bulkhead.acquire(|| 2)));

    assert_eq!(bulkhead.leave(first), Some(1));
    assert_eq!(bulkhead.leave(first), None);
    assert_eq!(bulkhead.release(), Some(2));
    assert_eq!(bulkhead.leave(second), None); // too late
    assert_eq!(bulkhead.in_use(), 1);
    assert_eq!(bulkhead.release(), None);
    assert_eq!(bulkhead.in_use(), 0);
}

#[test]
fn test_a_slot_is_renewed_by_the_first_of_the_line_alone() {
    let mut bulkhead = bulkhead(1);
    assert!(bulkhead.try_acquire());
    let (first, second) = (ticket(bulkhead.acquire(|| 1)), ticket(bulkhead.acquire(|| 2)));

    assert_eq!(bulkhead.renew(second), None);
    assert_eq!(bulkhead.waiting(), 2);
    assert_eq!(bulkhead.renew(first), Some(1));
    assert_eq!((bulkhead.in_use(), bulkhead.waiting()), (1, 1));
    assert_eq!(bulkhead.renew(first), None);
    assert_eq!(bulkhead.release(), Some(2));
}

/// The rule in the plainest words: a list of who has a slot, and a list of who waits.
#[derive(Default)]
struct Model {
    limit: usize,
    owners: Vec<usize>,
    line: VecDeque<usize>,
}

impl Model {
    fn acquire(&mut self, who: usize) {
        if self.owners.len() < self.limit && self.line.is_empty() {
            self.owners.push(who);
        } else {
            self.line.push_back(who);
        }
    }

    fn release(&mut self, who: usize) -> Option<usize> {
        self.owners.retain(|owner| *owner != who);
        let next = self.line.pop_front();
        self.owners.extend(next);
        next
    }

    fn leave(&mut self, who: usize) {
        self.line.retain(|waiting| *waiting != who);
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Comes,
    FirstOwnerReleases,
    LastOwnerReleases,
    FirstInLineLeaves,
    LastInLineLeaves,
}

#[test]
fn test_every_sequence_of_events_follows_the_model() {
    use Event::{Comes, FirstInLineLeaves, FirstOwnerReleases, LastInLineLeaves, LastOwnerReleases};
    const LENGTH: u32 = 7;
    let events = [Comes, FirstOwnerReleases, LastOwnerReleases, FirstInLineLeaves, LastInLineLeaves];

    for limit in 1..=2 {
        for sequence in 0..events.len().pow(LENGTH) {
            let digits = (0..LENGTH).map(|at| events[sequence / events.len().pow(at) % events.len()]);
            follow(limit, digits);
        }
    }
}

fn follow(limit: usize, events: impl Iterator<Item = Event>) {
    let mut ours = bulkhead(i64::try_from(limit).expect("a small one"));
    let mut model = Model { limit, ..Model::default() };
    let mut tickets = Vec::new();
    for (who, event) in events.enumerate() {
        match event {
            Event::Comes => {
                model.acquire(who);
                match ours.acquire(|| who) {
                    Place::Taken => assert!(model.owners.contains(&who)),
                    Place::Waiting(ticket) => tickets.push((who, ticket)),
                }
            }
            Event::FirstOwnerReleases | Event::LastOwnerReleases => {
                let is_first = matches!(event, Event::FirstOwnerReleases);
                let owner = if is_first { model.owners.first() } else { model.owners.last() };
                if let Some(&owner) = owner {
                    assert_eq!(ours.release(), model.release(owner));
                }
            }
            Event::FirstInLineLeaves | Event::LastInLineLeaves => {
                let is_first = matches!(event, Event::FirstInLineLeaves);
                let waiting = if is_first { model.line.front() } else { model.line.back() };
                if let Some(&who) = waiting {
                    let ticket = tickets.iter().find(|(other, _)| *other == who).expect("a ticket").1;
                    assert_eq!(ours.leave(ticket), Some(who));
                    model.leave(who);
                }
            }
        }
        assert_eq!(ours.in_use(), model.owners.len());
        assert!(ours.line().eq(&model.line));
    }
}
