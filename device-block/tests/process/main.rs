//! The real `bulkhead-block` in its sandbox, driven by a synthetic guest over real rings.
#![forbid(unsafe_code)]

mod crash;
mod disk;
mod faults;
mod fencing;
mod frozen;
mod hostile;
mod protocol;
mod room;
mod slow;
mod spoiled;
