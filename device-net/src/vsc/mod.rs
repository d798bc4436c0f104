//! The guest's side of netvsp: for tests and benchmarks without a VM.
//!
//! [`Driver`] speaks netvsp and RNDIS as Linux's `hv_netvsc` does, in its order; [`Room`] starts the real program in its
//! sandbox, with a played supervisor and a synthetic guest around it. A peer's misbehaviour is an error here, never a
//! panic: a completion for what is not outstanding, a range outside the receive buffer, a sub-allocation that is used
//! while the guest holds it. [`load`] is traffic both ways that verifies itself while servers die and are replaced.

mod driver;
pub mod load;
mod room;
mod traffic;

pub use driver::{Driver, DriverOptions, Nic};
pub use room::{Room, RoomError};
pub use traffic::{Form, ReceivedFrame};

use vmbus::vsc::VscError;

/// What the server did wrong, or what was missing.
fn wrong(what: &'static str) -> VscError {
    VscError::Missing(what)
}
