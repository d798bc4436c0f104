//! Lets a test stop the running thread before any store to shared memory, as a kill would. Test builds only.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores that are still allowed; `None`: any number.
    static STORES_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What the stopped thread unwinds with.
struct Killed;

/// Runs `action` and stops it before the store number `stores + 1`. `None`: it was stopped.
pub(crate) fn kill_after<T>(stores: u64, action: impl FnOnce() -> T) -> Option<T> {
    STORES_LEFT.set(Some(stores));
    let result = catch_unwind(AssertUnwindSafe(action));
    STORES_LEFT.set(None);
    match result {
        Ok(value) => Some(value),
        Err(panic) if panic.is::<Killed>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

/// Called by every store.
#[inline]
pub(super) fn before_store() {
    // Nothing is stored while a kill unwinds.
    match STORES_LEFT.get() {
        Some(0) if !std::thread::panicking() => resume_unwind(Box::new(Killed)),
        Some(left) => STORES_LEFT.set(Some(left.saturating_sub(1))),
        None => {}
    }
}
