//! The hypervisor interface that the guest sees, as the TLFS defines it: CPUID leaves, synthetic MSRs,
//! hypercalls, the SynIC's message slots, overlay pages and the reference clock.
//!
//! Everything here is pure: no file descriptor, no clock, no lock, no KVM. A vCPU exit goes in (an MSR and a
//! value, the registers of a hypercall), a value or a list of effects comes out, and `run/` does them.
//!
//! ```text
//!   rdmsr/wrmsr 0x4000xxxx ──> msr.rs ──> Effect::{Overlay, Sint, EndOfMessage, Crash}
//!   in  SLOW_PORT          ──> hypercall.rs ──> Call::{PostMessage, SignalEvent} or a status
//!   out SIGNAL_PORT        ──> (KVM's ioeventfd; a miss: there is no such connection)
//!   message for the guest  ──> synic.rs ──> slot of the SIMP page, then SINT 2's vector
//!   page MSR               ──> overlay.rs ──> which page of ours shows at which guest page
//! ```
//!
//! What is trusted: nothing that the guest writes. What is not checked here: whether a connection id, a channel
//! or a GPADL exists; that is `bus/`.
//!
//! Left out on purpose: KVM's own Hyper-V emulation (many kernels lack it), synthetic timers (the local APIC
//! timer of KVM is cheaper), flush and IPI hypercalls, AutoEOI (the hint "deprecated" is given; an AutoEOI bit
//! in a SINT is stored and has no effect), 32-bit callers of the hypercall page (there is only a 64-bit boot).

#![forbid(unsafe_code)]

pub mod cpuid;
pub mod hypercall;
pub mod hypercall_page;
pub mod msr;
pub mod overlay;
pub mod reference_tsc;
pub mod synic;

/// The SINT that VMBus uses for messages and for event flags. Source: Linux 6.1
/// include/asm-generic/mshyperv.h `VMBUS_MESSAGE_SINT`.
pub const VMBUS_SINT: u8 = 2;

/// Limit: virtual processors of a VM. Event flags and messages name VPs by 16 bits, APIC ids up to 254 need
/// no x2APIC entries in the MADT; 64 is what the rest of the program is tested with.
pub const MAX_VPS: u16 = 64;
