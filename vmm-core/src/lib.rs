//! The machine, and what starts and watches it: the libraries behind `bulkhead` and `bulkhead-vcpu`.

pub mod bus;
pub mod cli;
pub mod hyperv;
// UNSAFETY: KVM runs the guest on memory and pages that only raw pointers may touch; the room's rule is in kvm/mod.rs.
#[expect(unsafe_code)]
pub mod kvm;
pub mod pc;
pub mod run;
pub mod spec;
pub mod supervisor;
