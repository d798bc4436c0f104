//! One virtual processor.

use std::arch::x86_64::_rdtsc;
use std::io;
use std::ptr::{self, NonNull};

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs,
    kvm_cpuid_entry2, kvm_device_attr, kvm_enable_cap, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::KvmError;
use super::exit::{CallRegisters, Exit};
use super::kick::Armed;
use crate::pc::memory_map::{CODE_SELECTOR, DATA_SELECTOR, GDT, GDT_LIMIT, PAGE_TABLES};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// MSR numbers and values, Intel SDM volume 4.
const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, all memory write-back: what firmware leaves behind. Without it Linux takes RAM for uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

// Control registers, Intel SDM volume 3, 2.5; EFER, 2.2.1.
const CR0_PROTECTED_PAGED: u64 = 1 << 31 | 1 << 4 | 1;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 10 | 1 << 8;
/// RFLAGS with its one fixed bit.
const RFLAGS_RESERVED: u64 = 2;

/// A vCPU that no thread runs.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    page: NonNull<kvm_run>,
    index: u16,
}

// SAFETY: the page belongs to `fd`, which may move between threads; it is used by the owner of `Vcpu` only.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, index: u16, cpuid: &[kvm_cpuid_entry2]) -> Result<Self, KvmError> {
        let cpuid = CpuId::from_entries(cpuid)
            .map_err(|_| KvmError::new("build the CPUID table", io::Error::other("too many leaves")))?;
        fd.set_cpuid2(&cpuid)
            .map_err(KvmError::ioctl("set a vCPU's CPUID"))?;
        // KVM's paravirtual MSRs are not offered, and so must not work. Old kernels lack the capability.
        let enforce = kvm_enable_cap {
            cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
            args: [1, 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&enforce).ok();
        fd.set_sync_valid_reg(SyncReg::Register);
        let page = NonNull::from(fd.get_kvm_run());
        let vcpu = Self { fd, page, index };
        vcpu.set_msr(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)?;
        vcpu.set_msr(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)?;
        Ok(vcpu)
    }

    /// Index of the vCPU, which is its VP index and its local APIC id.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The TSC's rate.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd
            .get_tsc_khz()
            .map_err(KvmError::ioctl("read the TSC frequency"))
    }

    /// Sets guest TSC = host TSC + `offset`. Linux 5.16; without it all vCPUs made within a second agree anyway
    /// (Linux 6.1 arch/x86/kvm/x86.c `kvm_synchronize_tsc`).
    pub fn set_tsc_offset(&self, offset: u64) -> io::Result<()> {
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: ptr::from_ref(&offset).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: `fd` is a vCPU; for this attribute KVM reads eight bytes at `addr`, which live through the call.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attribute) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Reads the guest's TSC.
    pub fn tsc(&self) -> Result<u64, KvmError> {
        read_tsc(&self.fd)
    }

    /// Makes this the boot processor, at the kernel's 64-bit entry; RSI says where boot_params are.
    pub fn enter_kernel(&self, rip: u64, rsi: u64) -> Result<(), KvmError> {
        let registers = kvm_regs {
            rip,
            rsi,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.fd
            .set_regs(&registers)
            .map_err(KvmError::ioctl("set a vCPU's registers"))?;
        let mut system = self
            .fd
            .get_sregs()
            .map_err(KvmError::ioctl("read a vCPU's system registers"))?;
        let code = kvm_segment {
            selector: CODE_SELECTOR,
            limit: u32::MAX,
            // Execute, read, accessed; 64-bit.
            type_: 0xB,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: DATA_SELECTOR,
            type_: 3,
            l: 0,
            db: 1,
            ..code
        };
        system.cs = code;
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        system.gdt.base = GDT;
        system.gdt.limit = GDT_LIMIT;
        system.cr0 = CR0_PROTECTED_PAGED;
        system.cr3 = PAGE_TABLES;
        system.cr4 = CR4_PAE;
        system.efer = EFER_LONG_MODE;
        self.fd
            .set_sregs(&system)
            .map_err(KvmError::ioctl("set a vCPU's system registers"))
    }

    /// Binds the vCPU to the calling thread, which is going to run it.
    pub fn into_running(self) -> RunningVcpu {
        // SAFETY: the page is mapped while `self.fd` lives; `RunningVcpu` drops `armed` first.
        let armed = unsafe { Armed::new(self.page) };
        RunningVcpu { armed, vcpu: self }
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<(), KvmError> {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry])
            .map_err(|_| KvmError::new("set a vCPU's MSR", io::Error::other("too many")))?;
        match self
            .fd
            .set_msrs(&msrs)
            .map_err(KvmError::ioctl("set a vCPU's MSR"))?
        {
            1 => Ok(()),
            _ => Err(KvmError::new(
                "set a vCPU's MSR",
                io::Error::other(format!("{index:#x} is refused")),
            )),
        }
    }
}

/// A vCPU on its thread. Not `Send`.
#[derive(Debug)]
pub struct RunningVcpu {
    // Dropped in this order.
    armed: Armed,
    vcpu: Vcpu,
}

impl RunningVcpu {
    /// Forgets kicks that have been seen. To be called before looking for what a kick announces.
    pub fn clear_kick(&self) {
        self.armed.clear();
    }

    /// Runs the guest until it needs something.
    pub fn run(&mut self) -> Exit<'_> {
        let (page, index) = (self.vcpu.page, self.vcpu.index);
        // SAFETY: the page is mapped while `self` lives, KVM writes it only during KVM_RUN, and the exit reason has
        // selected this field of the union.
        let size = || unsafe { (*page.as_ptr()).__bindgen_anon_1.io.size };
        let registers = || {
            // SAFETY: as above; `s.regs.regs` was asked for by `set_sync_valid_reg`.
            let registers = unsafe { (*page.as_ptr()).s.regs.regs };
            CallRegisters {
                rcx: registers.rcx,
                r8: registers.r8,
                r9: registers.r9,
            }
        };
        match self.vcpu.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => Exit::PortWrite {
                port,
                size: size(),
                data,
            },
            Ok(VcpuExit::IoIn(port, data)) => Exit::PortRead {
                port,
                size: size(),
                data,
                registers: registers(),
            },
            Ok(VcpuExit::MmioRead(_, data)) => Exit::MmioRead { data },
            Ok(VcpuExit::MmioWrite(..)) => Exit::MmioWrite,
            Ok(VcpuExit::X86Rdmsr(exit)) => Exit::ReadMsr { msr: exit.index },
            Ok(VcpuExit::X86Wrmsr(exit)) => Exit::WriteMsr {
                msr: exit.index,
                value: exit.data,
            },
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => Exit::Interrupted,
            Ok(VcpuExit::InternalError) => Exit::Fault(describe_internal_error(page, index)),
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::Fault(format!(
                "the processor refused to enter the guest, reason {reason:#x}"
            )),
            Ok(other) => Exit::Fault(format!("KVM returned what it was not asked for: {other:?}")),
            // EAGAIN: a processor that was waiting for its start-up IPI has got it.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Exit::Interrupted,
            Err(error) => Exit::Fault(format!("KVM cannot run the vCPU: {error}")),
        }
    }

    /// Sets R9, the status that the hypercall page returns after a signal that matched no eventfd.
    pub fn set_r9(&mut self, value: u64) {
        self.vcpu.fd.sync_regs_mut().regs.r9 = value;
        self.vcpu.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Answers the RDMSR that the vCPU has just exited with.
    pub fn answer_msr(&mut self, value: u64) {
        // SAFETY: the page is mapped while `self` lives; KVM reads the field on the next KVM_RUN, if it asked for it.
        unsafe { (*self.vcpu.page.as_ptr()).__bindgen_anon_1.msr.data = value };
    }

    /// Lets the RDMSR or WRMSR that the vCPU has just exited with end in #GP.
    pub fn fault_msr(&mut self) {
        // SAFETY: as in `answer_msr`.
        unsafe { (*self.vcpu.page.as_ptr()).__bindgen_anon_1.msr.error = 1 };
    }

    /// The guest's TSC now.
    pub fn tsc(&self) -> Result<u64, KvmError> {
        read_tsc(&self.vcpu.fd)
    }
}

fn describe_internal_error(page: NonNull<kvm_run>, index: u16) -> String {
    // SAFETY: mapped while the caller's vCPU lives; KVM_EXIT_INTERNAL_ERROR selects the union's first field.
    let (internal, rip) = unsafe {
        (
            (*page.as_ptr()).__bindgen_anon_1.internal,
            (*page.as_ptr()).s.regs.regs.rip,
        )
    };
    let data: Vec<String> = internal
        .data
        .iter()
        .take(internal.ndata.min(4) as usize)
        .map(|word| format!("{word:#x}"))
        .collect();
    format!(
        "KVM cannot emulate what vCPU {index} does at {rip:#x} (suberror {}, data [{}])",
        internal.suberror,
        data.join(", ")
    )
}

fn read_tsc(fd: &VcpuFd) -> Result<u64, KvmError> {
    let entry = kvm_msr_entry {
        index: IA32_TSC,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry])
        .map_err(|_| KvmError::new("read a vCPU's TSC", io::Error::other("too many")))?;
    fd.get_msrs(&mut msrs)
        .map_err(KvmError::ioctl("read a vCPU's TSC"))?;
    Ok(msrs.as_slice().first().map_or(0, |entry| entry.data))
}

/// The host's TSC.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux does not forbid it to user space by default.
    unsafe { _rdtsc() }
}
