//! What crosses a wall between processes: bytes, their meaning, and both ends of a VMBus ring.
//!
//! Knows no process, no KVM and no device. See each module for its theory.

pub mod channel;
pub mod fault;
pub mod ipc;
pub mod journal;
pub mod lease;
// UNSAFETY: shared memory; the invariant stands at the top of mem/mod.rs.
#[expect(unsafe_code)]
// The model checker brings a memory of its own, so that nobody calls what only rings call.
#[cfg_attr(loom, expect(dead_code))]
pub mod mem;
pub mod record;
pub mod ring;
pub mod vsc;
pub mod wire;
