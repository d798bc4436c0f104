#![forbid(unsafe_code)]
//! The CPUID of each vCPU: what KVM supports on this host, without KVM's own leaves, with the Hyper-V leaves and
//! a topology of one socket with one thread for each core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::hyperv::cpuid::{HYPERVISOR_BASE, HYPERVISOR_END, leaves};

// Leaf 1 (Intel SDM volume 2, CPUID).
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;

/// The CPUID entries of vCPU `index` of `count`.
pub(super) fn build(supported: &CpuId, index: u16, count: u16, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !(HYPERVISOR_BASE..=HYPERVISOR_END).contains(&entry.function))
        // Topology by V2 extended leaf: Linux falls back to 0xB, which is set below.
        .filter(|entry| entry.function != 0xB && entry.function != 0x1F)
        .copied()
        .collect();
    let max_basic = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    for entry in &mut entries {
        edit(entry, u32::from(index), u32::from(count), tsc_deadline);
    }
    if max_basic >= 0xB {
        entries.extend(topology(u32::from(index), u32::from(count)));
    }
    entries.extend(leaves(count).into_iter().map(|leaf| kvm_cpuid_entry2 {
        function: leaf.function,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }));
    entries
}

fn edit(entry: &mut kvm_cpuid_entry2, apic_id: u32, count: u32, tsc_deadline: bool) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_FFFF | count.min(255) << 16 | apic_id << 24;
            entry.ecx = entry.ecx & !TSC_DEADLINE | HYPERVISOR | X2APIC;
            entry.ecx |= if tsc_deadline { TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !HTT | if count > 1 { HTT } else { 0 };
        }
        // Caches: levels 1 and 2 belong to one thread, level 3 to the socket; cores in the package.
        4 if entry.eax & 0x1F != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | sharing << 14 | (count - 1).min(63) << 26;
        }
        0x8000_001D if entry.eax & 0x1F != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | sharing << 14;
        }
        // Cores in the package, and how many APIC id bits they take.
        0x8000_0008 => entry.ecx = bits_for(count) << 12 | (count - 1),
        // Extended APIC id; core id with one thread for each core; one node.
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
        _ => {}
    }
}

/// Leaf 0xB: one thread in a core, `count` cores in the package.
fn topology(apic_id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: apic_id,
        ..Default::default()
    };
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    [
        level(0, 0, 1, THREADS),
        level(1, bits_for(count), count, CORES),
        level(2, 0, 0, 0),
    ]
}

/// Bits that number `count` things.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        };
        let entries = [
            entry(0, 0xD, 0),
            entry(1, 0, TSC_DEADLINE),
            entry(0xB, 0, 0),
            entry(0x4000_0000, 0x4000_0001, 0x4B4D_564B),
            entry(0x4000_0001, 0x0100_7EFB, 0),
            entry(0x8000_0008, 0x3030, 0x700F),
        ];
        CpuId::from_entries(&entries).expect("few enough")
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|entry| entry.function == function && entry.index == index);
        let leaf = *found.next().expect("listed");
        assert!(found.next().is_none(), "{function:#x}.{index} is listed twice");
        leaf
    }

    #[test]
    fn kvm_leaves_make_way_for_those_of_hyper_v() {
        let entries = build(&supported(), 0, 1, true);
        assert_eq!(leaf(&entries, 0x4000_0000, 0).ebx, u32::from_le_bytes(*b"Micr"));
        assert_eq!(leaf(&entries, 0x4000_0001, 0).eax, u32::from_le_bytes(*b"Hv#1"));
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it() {
        let entries = build(&supported(), 3, 6, false);
        let basic = leaf(&entries, 1, 0);
        assert_eq!((basic.ebx >> 24, basic.ebx >> 16 & 0xFF), (3, 6));
        assert_eq!(
            basic.ecx & (HYPERVISOR | X2APIC | TSC_DEADLINE),
            HYPERVISOR | X2APIC
        );
        for index in 0..3 {
            assert_eq!(leaf(&entries, 0xB, index).edx, 3);
        }
        assert_eq!((leaf(&entries, 0xB, 1).eax, leaf(&entries, 0xB, 1).ebx), (3, 6));
        assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn the_tsc_deadline_bit_follows_the_capability() {
        assert_ne!(leaf(&build(&supported(), 0, 1, true), 1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(
            leaf(&build(&supported(), 0, 1, false), 1, 0).ecx & TSC_DEADLINE,
            0
        );
    }
}
