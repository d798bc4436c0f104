//! The machine, and what starts and watches it: the libraries behind `bulkhead`, `bulkhead-vcpu` and `bulkhead-bus`.

pub mod bus;
mod child;
pub mod cli;
pub mod control_plane;
pub mod hyperv;
// UNSAFETY: KVM runs the guest on memory and pages that only raw pointers may touch; the room's rule is in kvm/mod.rs.
#[expect(unsafe_code)]
pub mod kvm;
pub mod pc;
pub mod run;
pub mod spec;
pub mod supervisor;
