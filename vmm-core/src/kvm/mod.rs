//! UNSAFETY: KVM, and the mapping of guest RAM that KVM runs the guest on.
//!
//! The room's invariant:
//!
//! > Guest RAM's mapping ([`GuestMapping`]) outlives every [`Vm`] that uses it as memory slots; the page of a vCPU
//! > (`kvm_run`) is read only between two runs of that vCPU, by the thread that runs it; and nobody forms a
//! > reference into guest RAM.
//!
//! | file | what | unsafe |
//! | --- | --- | --- |
//! | `memory.rs` | [`GuestMapping`]: RAM as a sealed memfd, overlay pages, huge pages | mmap, madvise |
//! | `vm.rs` | [`Vm`]: capabilities, MSR filter, interrupt routes, irqfds, ioeventfds | memory slots |
//! | `vcpu.rs` | [`Vcpu`]: registers, MSRs, TSC; [`RunningVcpu`]: the run loop's handle | `kvm_run`, one ioctl |
//! | `exit.rs` | [`Exit`]: what KVM_RUN returned, ready to be matched on | no |
//! | `kick.rs` | gets a vCPU out of KVM_RUN from another thread | signal handler |
//! | `capabilities.rs` | [`Capability`]: what of KVM is needed or wanted | no |
//! | `probe.rs` | [`measure`]: how fast this KVM runs a guest kernel | no |
//! | `cpuid.rs` | KVM's supported CPUID, our Hyper-V leaves, topology | no |
//! | `event.rs` | [`Event`]: an eventfd | borrowing its number |
//!
//! A VM descriptor is bound to the process that made it, so no other program could do any of this with a
//! descriptor of ours. What the values *mean* is not known here: `hyperv/`, `pc/` and `run/` know.

mod capabilities;
mod cpuid;
mod event;
mod exit;
mod kick;
mod memory;
mod probe;
mod vcpu;
mod vm;

use std::io;

pub use capabilities::{Capability, capabilities};
pub use event::Event;
pub use exit::{CallRegisters, Exit};
pub use kick::{Kick, install_kick_handler};
pub use memory::{GuestMapping, HugePages};
pub use probe::{BOOT_INSTRUCTIONS_PER_SECOND, KvmSpeed, measure};
pub use vcpu::{RunningVcpu, Vcpu};
pub use vm::{Kvm, Vm};

/// The host refused; a sentence for the operator.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt}: {error}")]
pub struct KvmError {
    attempt: &'static str,
    error: io::Error,
}

impl KvmError {
    fn new(attempt: &'static str, error: impl Into<io::Error>) -> Self {
        Self {
            attempt,
            error: error.into(),
        }
    }

    /// An error of the host that is not KVM's, met while doing something for the VM.
    pub fn host(attempt: &'static str, error: io::Error) -> Self {
        Self::new(attempt, error)
    }

    /// From the error type of `kvm-ioctls`.
    fn ioctl(attempt: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::new(attempt, io::Error::from_raw_os_error(error.errno()))
    }
}
