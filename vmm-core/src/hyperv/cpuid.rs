#![forbid(unsafe_code)]
//! CPUID leaves 0x40000000.. as an unmodified Linux guest wants them (TLFS 6.0b section 2.4).
//!
//! Each bit offered is a promise that some other file keeps; each bit left out is a path that the guest then
//! does not take. The two that decide most: hint "AutoEOI deprecated" (without it Linux does not acknowledge
//! SINT interrupts, and an MSI-delivered vector stays in service for ever), and no synthetic timers (so Linux
//! keeps KVM's local APIC timer).

/// One leaf. Sub-leaves do not exist in this range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub function: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// First leaf of the range that hypervisors own.
pub const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// Last leaf of that range.
pub const HYPERVISOR_END: u32 = 0x4FFF_FFFF;

/// 0x40000003 EAX: partition reference counter (1), SynIC (2), hypercall MSRs (5), VP index (6), reference TSC
/// page (9), frequency MSRs (11).
const FEATURES_EAX: u32 = 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11;
/// 0x40000003 EBX: post messages (4), signal events (5).
const FEATURES_EBX: u32 = 1 << 4 | 1 << 5;
/// 0x40000003 EDX: frequency MSRs are there (8), guest crash MSRs (10).
const FEATURES_EDX: u32 = 1 << 8 | 1 << 10;
/// 0x40000004 EAX: relaxed timing (5), AutoEOI deprecated (9).
const HINTS_EAX: u32 = 1 << 5 | 1 << 9;

/// The leaves for a partition with at most `max_vps` virtual processors.
pub fn leaves(max_vps: u16) -> Vec<Leaf> {
    let zero = |function| Leaf {
        function,
        eax: 0,
        ebx: 0,
        ecx: 0,
        edx: 0,
    };
    vec![
        // "Microsoft Hv". The maximum stays below 0x4000000A, where nested features would be read.
        Leaf {
            eax: 0x4000_0006,
            ebx: 0x7263_694D,
            ecx: 0x666F_736F,
            edx: 0x7648_2074,
            ..zero(0x4000_0000)
        },
        // "Hv#1": the interface below is the one of the TLFS.
        Leaf {
            eax: 0x3123_7648,
            ..zero(0x4000_0001)
        },
        // Build and version are printed by the guest, nothing else. Ours is 0.1.
        Leaf {
            eax: 1,
            ebx: 10 << 16,
            ..zero(0x4000_0002)
        },
        Leaf {
            eax: FEATURES_EAX,
            ebx: FEATURES_EBX,
            edx: FEATURES_EDX,
            ..zero(0x4000_0003)
        },
        // EBX: never tell the hypervisor about a spinning lock.
        Leaf {
            eax: HINTS_EAX,
            ebx: u32::MAX,
            ..zero(0x4000_0004)
        },
        Leaf {
            eax: u32::from(max_vps),
            ebx: u32::from(max_vps),
            ..zero(0x4000_0005)
        },
        zero(0x4000_0006),
        // Linux reads these without looking at a maximum; KVM would answer a missing leaf with another one's
        // data on an Intel vendor id.
        zero(0x4000_0080),
        zero(0x4000_0081),
        zero(0x4000_0082),
        zero(0x4000_0100),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> Leaf {
        *leaves(4)
            .iter()
            .find(|leaf| leaf.function == function)
            .expect("listed")
    }

    #[test]
    fn the_signature_reads_microsoft_hv() {
        let base = leaf(0x4000_0000);
        let mut text = Vec::new();
        for register in [base.ebx, base.ecx, base.edx] {
            text.extend_from_slice(&register.to_le_bytes());
        }
        assert_eq!(text, b"Microsoft Hv");
        assert!((0x4000_0005..0x4000_000A).contains(&base.eax));
    }

    #[test]
    fn the_bits_that_would_lead_linux_astray_are_clear() {
        let features = leaf(0x4000_0003);
        assert_eq!(
            features.eax & (1 << 3 | 1 << 4 | 1 << 15),
            0,
            "timers, APIC MSRs, TSC invariant control"
        );
        assert_eq!(
            features.ebx & (1 << 1 | 1 << 12 | 1 << 20 | 1 << 22),
            0,
            "root and isolation privileges"
        );
        assert_ne!(leaf(0x4000_0004).eax & 1 << 9, 0, "AutoEOI must be deprecated");
        assert_eq!(
            leaf(0x4000_0004).eax & (1 << 2 | 1 << 10),
            0,
            "no flush and IPI hypercalls"
        );
    }

    #[test]
    fn no_leaf_is_listed_twice_and_none_carries_the_kvm_signature() {
        let all = leaves(64);
        for (position, leaf) in all.iter().enumerate() {
            assert!(
                all[..position]
                    .iter()
                    .all(|other| other.function != leaf.function)
            );
            assert_ne!(leaf.ebx, u32::from_le_bytes(*b"KVMK"));
        }
    }
}
