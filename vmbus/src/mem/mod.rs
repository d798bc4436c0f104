//! UNSAFETY: memory that others may change at any time, and the only place in this crate that touches it.
//!
//! Guest RAM, rings, event-flag pages and journals are memfds mapped with `MAP_SHARED`. Another process, or the guest,
//! may write any byte of them between any two of our instructions. The room's one invariant:
//!
//! > A [`SharedMap`] owns a mapping of exactly `len` bytes that stays mapped until the last owner drops it, and whose
//! > file cannot shrink (`F_SEAL_SHRINK`, checked at map time). Every access computes its address from a bounds check
//! > against that private `len`, goes through a raw pointer, and moves plain bytes. No `&[u8]`, `&T` or `&mut T` over
//! > shared bytes is ever formed; the one exception is `AtomicU32`/`AtomicU64` at an aligned address for the duration
//! > of one atomic operation, which is what those types are for.
//!
//! Bytes are copied by `copy_nonoverlapping` between two compiler barriers, so that the compiler can neither read the
//! shared source a second time in place of our private copy nor move the copy across an atomic access. A copy may be
//! torn if the other side writes at the same time; that is the other side's problem, because whatever we got is then
//! parsed like any hostile bytes.
//!
//! | file | what | unsafe |
//! | --- | --- | --- |
//! | `shared.rs` | [`SharedMap`]: the mapping, copies, atomics; [`sealed_memfd`] | yes |
//! | `huge.rs`   | mappings at which huge pages can be used as such | yes |
//! | `fdio.rs` | `readv(2)` and friends straight into and out of a mapping | yes |
//! | `uring.rs` | [`Uring`]: the same, asynchronous; buffers live until completion | yes |
//! | `gpa.rs` | [`Gpa`], [`Gpn`], [`RamLayout`]: where guest-physical memory lies in the file | no |
//! | `ram.rs` | [`GuestRam`]: guest-physical reads and writes; claims become [`GuestSpans`] | no |
//! | `spans.rs` | [`GuestSpans`]: checked pieces of one mapping | no |
//! | `paged.rs` | [`PagedArea`]: scattered pages seen as one area (GPADLs) | no |
//!
//! What this module does *not* check: that the bytes mean anything. `wire` does.
//!
//! Who may see guest memory how is decided here, too. A server holds [`GuestRam`] and gets [`GuestSpans`] from it; it
//! can copy, slice and hand spans to [`Uring`], but never learns an address. An implementation in which a filter does the
//! copying (grants) replaces what is behind these two types, not the code that uses them.

#[cfg(test)]
pub(crate) mod crash_point;
mod fdio;
mod gpa;
mod huge;
mod paged;
mod ram;
mod shared;
mod spans;
#[cfg(test)]
mod tests;
mod uring;
#[cfg(test)]
mod uring_tests;

pub use crate::fault::{HostError, OutOfRange};
pub use gpa::{Gpa, Gpn, LayoutFault, PAGE_BYTES, RamLayout, RamRegion};
pub use paged::PagedArea;
pub use ram::GuestRam;
// The model checker has memory of its own (ring/memory.rs).
pub use shared::{Access, SharedMap, sealed_memfd};
#[cfg(not(loom))]
pub(crate) use shared::{PieceWriter, full_fence};
pub use spans::{GuestSpan, GuestSpans, MAX_PIECES};
pub use uring::{Completion, Durability, File, OpId, Uring, UringError};
