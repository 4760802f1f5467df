//! The thread that writes, and the queue before it.
//!
//! Whoever wants something written leaves the operation in the queue, with a ticket, and goes on.
//! The thread takes all that waits, does it in one transaction, which is one sync of the disk, and
//! hands back all tickets with their outcomes at once. While it is busy the queue fills, so the more
//! is asked of it, the more shares a sync; who comes alone waits for nobody.
//!
//! - Operations are done in the order in which they were submitted.
//! - A ticket comes back exactly once: after its transaction is on the disk, or has failed.
//! - The queue's lock is held to push and to take, and nothing that can fail or panic happens then.
//! - A panic in a transaction fails that transaction, and the thread goes on.
//! - Closing lets everything be written that was submitted before.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use super::error::{Failure, StoreError};
use super::sqlite::Database;
use super::{Completion, Operation};

/// What one transaction holds at most; beyond this nothing is gained, and everybody waits longer.
const MOST_OPERATIONS: usize = 1_024;
const MOST_BYTES: usize = 16 << 20;

pub(super) struct Writer<T> {
    queue: Arc<Queue<T>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<T: Send + 'static> Writer<T> {
    /// Starts the thread; `deliver` is called there, once for each transaction.
    pub fn start(
        mut database: Database,
        mut deliver: impl FnMut(Vec<Completion<T>>) + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue::new());
        let waiting = Arc::clone(&queue);
        let thread = thread::Builder::new().name("cano-store".to_owned()).spawn(move || {
            while let Some((operations, tickets)) = waiting.take() {
                let outcomes = catch_unwind(AssertUnwindSafe(|| database.commit(&operations)))
                    .unwrap_or_else(|_| vec![Err(panicked()); tickets.len()]);
                database.roll_back();
                let completions = tickets.into_iter().zip(outcomes);
                let completions = completions.map(|(ticket, outcome)| Completion { ticket, outcome }).collect();
                // Whoever panics here has told its waiters nothing, and there is nobody else to tell.
                let _ = catch_unwind(AssertUnwindSafe(|| deliver(completions)));
            }
            database.leave();
        })?;
        Ok(Self { queue, thread: Mutex::new(Some(thread)) })
    }
}

impl<T> Writer<T> {
    /// Leaves an operation in the queue; the ticket comes back with its outcome.
    pub fn submit(&self, operation: Operation, ticket: T) -> Result<(), StoreError> {
        self.queue.push(operation, ticket)
    }

    /// Takes no more operations, and returns once all are done and the thread has ended.
    pub fn close(&self) {
        self.queue.close();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
            thread.join().expect("the thread catches panics");
        }
    }

    /// Lets go of the thread where there is none: in a child of the process that opened the store.
    pub fn forget(&mut self) {
        mem::forget(self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl<T> Drop for Writer<T> {
    fn drop(&mut self) {
        // Without a thread this would lock a queue that the parent's thread may have locked.
        if self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).is_some() {
            self.close();
        }
    }
}

fn panicked() -> StoreError {
    StoreError::Failed { failure: Failure::Other, text: "the transaction panicked".to_owned() }
}

struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    waiting: VecDeque<(Operation, T)>,
    is_closed: bool,
}

impl<T> Queue<T> {
    fn new() -> Self {
        Self { state: Mutex::new(State { waiting: VecDeque::new(), is_closed: false }), changed: Condvar::new() }
    }

    fn push(&self, operation: Operation, ticket: T) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return Err(StoreError::Closed);
        }
        state.waiting.push_back((operation, ticket));
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_one();
    }

    /// The next batch; none when the queue is closed and empty.
    fn take(&self) -> Option<(Vec<Operation>, Vec<T>)> {
        let mut state = lock(&self.state);
        while state.waiting.is_empty() {
            if state.is_closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut bytes = 0;
        let fits = |(operation, _): &&(Operation, T)| {
            bytes += operation.size();
            bytes <= MOST_BYTES
        };
        let count = state.waiting.iter().take(MOST_OPERATIONS).take_while(fits).count().max(1);
        let batch: Vec<_> = if count == state.waiting.len() {
            mem::take(&mut state.waiting).into()
        } else {
            state.waiting.drain(..count).collect()
        };
        drop(state);
        Some(batch.into_iter().unzip())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
