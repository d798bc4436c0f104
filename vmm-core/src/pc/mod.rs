//! The little that is left of a PC: where things lie in guest memory, how Linux is started, what ACPI tells it,
//! the serial console,
//! the battery clock, and the ports for power.
//!
//! There is no firmware, no PCI, no PIT, no keyboard controller. The guest is started directly by the
//! 64-bit boot protocol; hardware-reduced ACPI describes the processors, the I/O APIC, one serial port and the
//! VMBus device. Whatever else it probes answers all-ones.
//!
//! Pure, but for `boot.rs`, which reads the kernel's headers. It and `acpi.rs` are the supervisor's: `bulkhead-vcpu` only
//! copies what they have drawn up.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod clock;
pub mod memory_map;
pub mod ports;
pub mod serial;
