#![forbid(unsafe_code)]
//! What KVM_RUN returned.
//!
//! This is the wall between the guest and this process: numbers in an [`Exit`] are whatever the guest chose. The
//! slices lie in the vCPU's page, which the guest cannot reach; they are stable until the next run.

/// Registers that the hypercall page leaves for user space when it reads the slow port (`hyperv/hypercall_page.rs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallRegisters {
    pub rcx: u64,
    pub r8: u64,
    pub r9: u64,
}

/// One exit to user space. What is to be answered is written into the exit before the next run.
#[derive(Debug)]
pub enum Exit<'a> {
    /// OUT, once or by a string instruction: `data` is a multiple of `size` long.
    PortWrite { port: u16, size: u8, data: &'a [u8] },
    /// IN, likewise.
    PortRead {
        port: u16,
        size: u8,
        data: &'a mut [u8],
        registers: CallRegisters,
    },
    /// A load from an address without RAM.
    MmioRead { data: &'a mut [u8] },
    /// A store to an address without RAM.
    MmioWrite,
    /// RDMSR of an MSR that the filter sends here; see `RunningVcpu::answer_msr`.
    ReadMsr { msr: u32 },
    /// WRMSR of one; see `RunningVcpu::fault_msr`.
    WriteMsr { msr: u32, value: u64 },
    /// A signal, or nothing in particular.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// The vCPU cannot go on. One sentence.
    Fault(String),
}
