//! One KVM virtual machine: the part that is not a vCPU.
//!
//! A reset of the guest makes a new VM: every register, local APIC, timer and pending interrupt is then in its
//! power-on state by construction. Guest RAM and the eventfds outlive it.
//!
//! Global system interrupts: 0..23 are the I/O APIC's pins, 24+n is an MSI to local APIC n with the vector that
//! the guest put into that VP's SINT 2. A GSI without a route delivers nothing.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, IoEventAddress, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};

use super::capabilities::first_lacking;
use super::memory::GuestMapping;
use super::vcpu::{Vcpu, host_tsc};
use super::{Event, KvmError, cpuid};
use crate::hyperv::hypercall_page::SIGNAL_PORT;
use crate::hyperv::msr;

/// Pins of KVM's I/O APIC. Source: Linux arch/x86/kvm/ioapic.h `IOAPIC_NUM_PINS`.
const IOAPIC_PINS: u32 = 24;
/// First GSI of the VPs.
const VP_GSI_BASE: u32 = IOAPIC_PINS;
/// Where Intel processors without unrestricted guest mode want three pages, out of RAM and of all devices.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// /dev/kvm.
#[derive(Debug)]
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    supported_cpuid: CpuId,
    tsc_deadline: bool,
}

impl Kvm {
    /// Takes an open /dev/kvm and checks that it can do what we need.
    pub fn new(fd: OwnedFd) -> Result<Self, KvmError> {
        let kvm = open(fd)?;
        if let Some(lacking) = first_lacking(&kvm) {
            let lacks = io::Error::other(format!("it lacks {}", lacking.name));
            return Err(KvmError::new("use /dev/kvm", lacks));
        }
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("read what CPUID KVM supports"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            kvm,
            supported_cpuid,
            tsc_deadline,
        })
    }
}

/// Checks that the descriptor is what it should be.
pub(super) fn open(device: OwnedFd) -> Result<kvm_ioctls::Kvm, KvmError> {
    // SAFETY: the descriptor is owned and given away.
    let kvm = unsafe { kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd()) };
    // The stable interface has had this number since Linux 2.6.22.
    if kvm.get_api_version() != 12 {
        let other = io::Error::other("it is no KVM device");
        return Err(KvmError::new("use /dev/kvm", other));
    }
    Ok(kvm)
}

/// A virtual machine with its memory and interrupt controllers.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    /// Keeps the memory slots' mapping alive.
    _memory: Arc<GuestMapping>,
}

impl Vm {
    /// Makes a VM on this memory.
    pub fn new(kvm: &Kvm, memory: Arc<GuestMapping>) -> Result<Self, KvmError> {
        let fd = kvm
            .kvm
            .create_vm()
            .map_err(KvmError::ioctl("make a virtual machine"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(KvmError::ioctl("set the TSS address"))?;
        let vm = Self { fd, _memory: memory };
        // 32-bit APIC ids in MSIs, and id 255 is no broadcast.
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        vm.enable(KVM_CAP_X2APIC_API, u64::from(x2apic), "use 32-bit APIC ids")?;
        vm.enable(
            KVM_CAP_X86_USER_SPACE_MSR,
            u64::from(MsrExitReason::Filter.bits()),
            "send MSRs to user space",
        )?;
        // KVM would patch a VMCALL of the guest into the host's flavour; with software KVM that never ends. Old
        // kernels cannot switch it off.
        vm.enable(
            KVM_CAP_DISABLE_QUIRKS2,
            u64::from(KVM_X86_QUIRK_FIX_HYPERCALL_INSN),
            "disable a quirk",
        )
        .ok();
        vm.filter_msrs()?;
        vm.fd
            .create_irq_chip()
            .map_err(KvmError::ioctl("make the interrupt controllers"))?;
        vm.add_memory()?;
        vm.set_routes(&[])?;
        Ok(vm)
    }

    /// Makes all vCPUs, with equal TSCs that begin near 0.
    pub fn create_vcpus(&self, kvm: &Kvm, count: u16) -> Result<Vec<Vcpu>, KvmError> {
        let mut vcpus = Vec::new();
        for index in 0..count {
            let fd = self
                .fd
                .create_vcpu(u64::from(index))
                .map_err(KvmError::ioctl("make a vCPU"))?;
            let cpuid = cpuid::build(&kvm.supported_cpuid, index, count, kvm.tsc_deadline);
            vcpus.push(Vcpu::new(fd, index, &cpuid)?);
        }
        let offset = host_tsc().wrapping_neg();
        for vcpu in &vcpus {
            // Refused by all or by none; see `set_tsc_offset`.
            vcpu.set_tsc_offset(offset).ok();
        }
        Ok(vcpus)
    }

    /// Sets the vector of each VP's GSI; `None` delivers nothing. Replaces the whole table.
    pub fn set_routes(&self, vectors: &[Option<u8>]) -> Result<(), KvmError> {
        let pins = (0..IOAPIC_PINS).map(|pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entry
        });
        let vps = vectors.iter().enumerate().filter_map(|(vp, vector)| {
            let message = msi(vp as u16, (*vector)?);
            let gsi = VP_GSI_BASE + vp as u32;
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address_lo;
            entry.u.msi.address_hi = message.address_hi;
            entry.u.msi.data = message.data;
            Some(entry)
        });
        let entries: Vec<kvm_irq_routing_entry> = pins.chain(vps).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| KvmError::new("route interrupts", io::Error::other("too many routes")))?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(KvmError::ioctl("route interrupts"))
    }

    /// Raises a vector on a VP, once. It is lost if the guest has given that VP's id to no local APIC, as on hardware.
    pub fn raise(&self, vp: u16, vector: u8) -> Result<(), KvmError> {
        match self.fd.signal_msi(msi(vp, vector)) {
            // -1: nobody was found (Linux 6.1 arch/x86/kvm/irq_comm.c kvm_irq_delivery_to_apic).
            Err(error) if error.errno() == libc::EPERM => Ok(()),
            raised => raised.map(drop).map_err(KvmError::ioctl("raise an interrupt")),
        }
    }

    /// Lets the eventfd raise SINT 2 of a VP, as far as that has a route.
    pub fn bind_vp_interrupt(&self, event: &Event, vp: u16) -> Result<(), KvmError> {
        self.bind_pin(event, VP_GSI_BASE + u32::from(vp))
    }

    /// Undoes [`Self::bind_vp_interrupt`].
    pub fn unbind_vp_interrupt(&self, event: &Event, vp: u16) -> Result<(), KvmError> {
        self.unbind_pin(event, VP_GSI_BASE + u32::from(vp))
    }

    /// Lets the eventfd raise a pin of the I/O APIC, as an edge.
    ///
    /// Quirk(Linux 6.18): an eventfd is bound once on the whole host (EBUSY), where 6.1 looked at one VM only. It has to be
    /// unbound from one VM before the next one can have it.
    pub fn bind_pin(&self, event: &Event, pin: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event.inner(), pin)
            .map_err(KvmError::ioctl("bind an interrupt"))
    }

    /// Undoes [`Self::bind_pin`].
    pub fn unbind_pin(&self, event: &Event, pin: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_irqfd(event.inner(), pin)
            .map_err(KvmError::ioctl("unbind an interrupt"))
    }

    /// Lets the guest's signal of a connection write the eventfd, without an exit.
    pub fn bind_signal(&self, event: &Event, connection_id: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event.inner(), &SIGNAL_ADDRESS, connection_id)
            .map_err(KvmError::ioctl("bind a signal"))
    }

    /// Undoes [`Self::bind_signal`].
    pub fn unbind_signal(&self, event: &Event, connection_id: u32) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(event.inner(), &SIGNAL_ADDRESS, connection_id)
            .map_err(KvmError::ioctl("unbind a signal"))
    }

    fn enable(&self, cap: u32, argument: u64, attempt: &'static str) -> Result<(), KvmError> {
        let cap = kvm_enable_cap {
            cap,
            args: [argument, 0, 0, 0],
            ..Default::default()
        };
        self.fd.enable_cap(&cap).map_err(KvmError::ioctl(attempt))
    }

    /// Sends the synthetic MSRs to user space, all others to KVM.
    fn filter_msrs(&self) -> Result<(), KvmError> {
        let denied = [0u8; (msr::COUNT / 8) as usize];
        let range = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: msr::FIRST,
            msr_count: msr::COUNT,
            bitmap: &denied,
        };
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
            .map_err(KvmError::ioctl("filter MSRs"))
    }

    fn add_memory(&self) -> Result<(), KvmError> {
        for (slot, (gpa, len, host)) in self._memory.slots().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: len,
                userspace_addr: host,
            };
            // SAFETY: the range is mapped while `_memory` lives, which is as long as this VM; guest RAM is never
            // referenced by Rust code.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::ioctl("give the guest its memory"))?;
        }
        Ok(())
    }
}

const SIGNAL_ADDRESS: IoEventAddress = IoEventAddress::Pio(SIGNAL_PORT as u64);

/// A fixed, edge-triggered message to the local APIC of a VP, by physical destination (Intel SDM volume 3, 11.11;
/// bits of ids above 255 in the high address: Linux Documentation/virt/kvm/api.rst, KVM_CAP_X2APIC_API).
fn msi(vp: u16, vector: u8) -> kvm_msi {
    let apic_id = u32::from(vp);
    kvm_msi {
        address_lo: 0xFEE0_0000 | (apic_id & 0xFF) << 12,
        address_hi: apic_id & !0xFF,
        data: u32::from(vector),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msi_names_the_apic_and_the_vector_and_nothing_else() {
        let message = msi(3, 0xF3);
        assert_eq!(
            (message.address_lo, message.address_hi, message.data),
            (0xFEE0_3000, 0, 0xF3)
        );
    }
}
