#![forbid(unsafe_code)]
//! Lets the control thread hold vCPU threads, and stop them for good.
//!
//! A vCPU thread looks at the gate before each entry into the guest. Whoever closes the gate does so first and kicks
//! the threads afterwards (`kvm/kick.rs` has why that order loses nothing).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::kvm::Event;

/// What vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wanted {
    Run,
    Pause,
    /// Leave the guest and give the vCPU back.
    Stop,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads that have a vCPU.
    running: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// A copy of `wanted` for the look before each entry.
    fast: AtomicU8,
    /// Signalled when the last thread has stopped.
    all_stopped: Event,
}

impl Gate {
    /// A gate that holds whoever comes.
    pub fn new(all_stopped: Event) -> Self {
        let state = Mutex::new(State {
            wanted: Wanted::Pause,
            running: 0,
        });
        Self {
            state,
            changed: Condvar::new(),
            fast: AtomicU8::new(Wanted::Pause as u8),
            all_stopped,
        }
    }

    /// Says what is wanted. Threads in the guest must be kicked afterwards.
    pub fn set(&self, wanted: Wanted) {
        let mut state = self.lock();
        state.wanted = wanted;
        // Ordering: SeqCst, before the signal that makes a vCPU thread look.
        self.fast.store(wanted as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Counts the threads that are about to be given a vCPU.
    pub fn expect(&self, threads: usize) {
        self.lock().running = threads;
    }

    /// Whether every thread has given its vCPU back.
    pub fn is_empty(&self) -> bool {
        self.lock().running == 0
    }

    /// Passes, waits, or says that the thread is to stop: false.
    pub fn pass(&self) -> bool {
        // Ordering: SeqCst pairs with `set`; read after `immediate_exit` was cleared.
        if self.fast.load(Ordering::SeqCst) == Wanted::Run as u8 {
            return true;
        }
        let state = self.lock();
        let state = self
            .changed
            .wait_while(state, |state| state.wanted == Wanted::Pause);
        state.unwrap_or_else(PoisonError::into_inner).wanted == Wanted::Run
    }

    /// A thread has given its vCPU back.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        if state.running == 0 {
            self.all_stopped.signal();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn a_held_thread_goes_on_or_stops_as_it_is_told() {
        for (wanted, passes) in [(Wanted::Run, true), (Wanted::Stop, false)] {
            let gate = Arc::new(Gate::new(Event::new().expect("eventfd")));
            let waiting = thread::spawn({
                let gate = gate.clone();
                move || gate.pass()
            });
            gate.set(wanted);
            assert_eq!(waiting.join().expect("no panic"), passes);
        }
    }

    #[test]
    fn the_last_thread_to_leave_says_so() {
        let stopped = Event::new().expect("eventfd");
        let gate = Gate::new(stopped.try_clone().expect("dup"));
        gate.expect(2);
        gate.leave();
        assert!(!stopped.drain() && !gate.is_empty());
        gate.leave();
        assert!(stopped.drain() && gate.is_empty());
    }
}
