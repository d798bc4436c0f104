#![forbid(unsafe_code)]
//! What this program asks of KVM: the one table, for the start of a VM and for `bulkhead doctor`.

use std::os::fd::OwnedFd;

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_IOEVENTFD, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_MAX_VCPUS,
    KVM_CAP_SIGNAL_MSI, KVM_CAP_SYNC_REGS, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY,
    KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_X2APIC_API, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
};

use super::KvmError;
use super::vm::open;

/// One capability of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// KVM_CAP_* number.
    number: u32,
    /// KVM_CHECK_EXTENSION has to answer at least this.
    at_least: i32,
    /// These bits have to be set in the answer.
    bits: u32,
    /// What it is, for people.
    pub name: &'static str,
    /// What a VM loses without it; empty if there is no VM without it.
    pub without: &'static str,
}

impl Capability {
    const fn needed(number: u32, name: &'static str) -> Self {
        Self::wanted(number, name, "")
    }

    const fn wanted(number: u32, name: &'static str, without: &'static str) -> Self {
        Self {
            number,
            at_least: 1,
            bits: 0,
            name,
            without,
        }
    }

    /// All of them.
    pub fn all() -> &'static [Capability] {
        &TABLE
    }

    /// Whether there is no VM without it.
    pub fn is_needed(&self) -> bool {
        self.without.is_empty()
    }

    fn is_met_by(&self, answer: i32) -> bool {
        answer >= self.at_least && answer.cast_unsigned() & self.bits == self.bits
    }
}

/// Each of them with the answer of one KVM_CHECK_EXTENSION. The Linux version is the first with it.
#[rustfmt::skip] // a table: one entry a line
static TABLE: [Capability; 17] = [
    Capability::needed(KVM_CAP_USER_MEMORY, "memory slots"),
    Capability::needed(KVM_CAP_IRQCHIP, "an in-kernel interrupt controller"),
    Capability::needed(KVM_CAP_IRQ_ROUTING, "interrupt routing"),
    Capability::needed(KVM_CAP_IRQFD, "irqfd"),
    Capability::needed(KVM_CAP_IOEVENTFD, "ioeventfd"),
    Capability::needed(KVM_CAP_SIGNAL_MSI, "message-signalled interrupts"),
    Capability::needed(KVM_CAP_X2APIC_API, "32-bit APIC ids (Linux 4.8)"),
    Capability::needed(KVM_CAP_X86_USER_SPACE_MSR, "MSR exits to user space (Linux 5.10)"),
    Capability::needed(KVM_CAP_X86_MSR_FILTER, "the MSR filter (Linux 5.10)"),
    Capability::needed(KVM_CAP_IMMEDIATE_EXIT, "immediate exit"),
    Capability::needed(KVM_CAP_SYNC_REGS, "registers in the vCPU page"),
    Capability::needed(KVM_CAP_GET_TSC_KHZ, "the TSC frequency"),
    Capability::wanted(KVM_CAP_VCPU_ATTRIBUTES, "vCPU TSC offsets (Linux 5.16)", "the TSCs of several vCPUs may differ a little"),
    Capability::wanted(KVM_CAP_TSC_DEADLINE_TIMER, "the TSC deadline timer", "the guest's timers cost more exits"),
    Capability { bits: KVM_X86_QUIRK_FIX_HYPERCALL_INSN, ..Capability::wanted(KVM_CAP_DISABLE_QUIRKS2, "leaving the guest's VMCALL alone (Linux 5.18)", "a guest that calls an unknown hypervisor may hang itself") },
    Capability::wanted(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "hiding KVM's own registers (Linux 5.10)", "the guest may use registers that it was not offered"),
    // Limit: as many as a VM of ours may have.
    Capability { at_least: 64, ..Capability::wanted(KVM_CAP_MAX_VCPUS, "64 vCPUs", "only smaller VMs can be made") },
];

/// Asks an open /dev/kvm for each entry of the table, in its order.
pub fn capabilities(device: OwnedFd) -> Result<Vec<(Capability, bool)>, KvmError> {
    let kvm = open(device)?;
    Ok(TABLE
        .map(|capability| (capability, is_met(&kvm, &capability)))
        .to_vec())
}

/// What there is no VM without, and this KVM lacks.
pub(super) fn first_lacking(kvm: &kvm_ioctls::Kvm) -> Option<&'static Capability> {
    TABLE
        .iter()
        .find(|capability| capability.is_needed() && !is_met(kvm, capability))
}

fn is_met(kvm: &kvm_ioctls::Kvm, capability: &Capability) -> bool {
    capability.is_met_by(kvm.check_extension_raw(capability.number.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_judged_by_size_and_by_bits() {
        let entry = |number: u32| {
            TABLE
                .iter()
                .find(|entry| entry.number == number)
                .expect("in the table")
        };
        let irqfd = entry(KVM_CAP_IRQFD);
        assert!(irqfd.is_needed() && irqfd.is_met_by(1) && !irqfd.is_met_by(0) && !irqfd.is_met_by(-1));
        let quirk = entry(KVM_CAP_DISABLE_QUIRKS2);
        assert!(quirk.is_met_by(0x3F) && !quirk.is_met_by(0x1F) && !quirk.is_met_by(-1));
        let vcpus = entry(KVM_CAP_MAX_VCPUS);
        assert!(vcpus.is_met_by(1024) && !vcpus.is_met_by(8));
    }
}
