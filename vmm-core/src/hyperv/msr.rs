#![forbid(unsafe_code)]
//! The synthetic MSRs 0x40000000..0x400001FF: values, reset state, and what a write sets off.
//!
//! | MSR | of | read | write |
//! | --- | --- | --- | --- |
//! | GUEST_OS_ID, HYPERCALL, REFERENCE_TSC | partition | what was written | see below |
//! | VP_INDEX, TIME_REF_COUNT, *_FREQUENCY, SVERSION | VP or partition | computed | #GP |
//! | VP_ASSIST_PAGE | VP | what was written | remembered, without effect |
//! | SCONTROL, SIEFP, SIMP, SINT0-15 | VP | what was written | effects |
//! | EOM | VP | 0 | end of message, any value |
//! | CRASH_P0-P4, CRASH_CTL | partition | parameters; what is supported | report |
//! | all others | | #GP | #GP |
//!
//! Order matters to Linux: REFERENCE_TSC, the frequencies and VP_INDEX are used while GUEST_OS_ID is still 0, so
//! nothing but the hypercall page depends on it. Writing 0 to GUEST_OS_ID takes the hypercall page away, and the
//! write of HYPERCALL that follows must succeed.
//!
//! A page MSR that would be enabled at an address that is not guest RAM is refused with #GP. INIT and SIPI change
//! nothing here: the in-kernel local APIC handles them, and only [`Msrs::new`] is a reset.

use vmbus::mem::{Gpa, RamLayout};

use super::overlay::Page;
use super::{VMBUS_SINT, reference_tsc::ReferenceClock};

// TLFS 6.0b appendix C.
pub const GUEST_OS_ID: u32 = 0x4000_0000;
pub const HYPERCALL: u32 = 0x4000_0001;
pub const VP_INDEX: u32 = 0x4000_0002;
pub const TIME_REF_COUNT: u32 = 0x4000_0020;
pub const REFERENCE_TSC: u32 = 0x4000_0021;
pub const TSC_FREQUENCY: u32 = 0x4000_0022;
pub const APIC_FREQUENCY: u32 = 0x4000_0023;
pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
pub const SCONTROL: u32 = 0x4000_0080;
pub const SVERSION: u32 = 0x4000_0081;
pub const SIEFP: u32 = 0x4000_0082;
pub const SIMP: u32 = 0x4000_0083;
pub const EOM: u32 = 0x4000_0084;
pub const SINT0: u32 = 0x4000_0090;
pub const SINT15: u32 = 0x4000_009F;
pub const CRASH_P0: u32 = 0x4000_0100;
pub const CRASH_P4: u32 = 0x4000_0104;
pub const CRASH_CTL: u32 = 0x4000_0105;

/// First MSR that is answered here.
pub const FIRST: u32 = 0x4000_0000;
/// How many MSRs are answered here; the range of KVM's MSR filter.
pub const COUNT: u32 = 0x200;

/// KVM's local APIC timer counts nanoseconds. Source: Linux arch/x86/kvm/lapic.h `APIC_BUS_CYCLE_NS` (1).
const APIC_HZ: u64 = 1_000_000_000;

/// Bit 0 of the page MSRs and of SCONTROL.
const ENABLE: u64 = 1;
/// Bit 1 of HYPERCALL: immutable until reset.
const HYPERCALL_LOCKED: u64 = 1 << 1;
/// Bits 63:12 of a page MSR.
const PAGE_SHIFT: u32 = 12;
/// Bit 16 of a SINT.
const SINT_MASKED: u64 = 1 << 16;
/// CRASH_CTL: the guest reports a crash.
const CRASH_NOTIFY: u64 = 1 << 63;
/// CRASH_CTL: P3 and P4 are address and length of a text.
const CRASH_MESSAGE: u64 = 1 << 62;
/// Limit: of a crash text; TLFS 6.0b section 2.8 gives it one page.
const MAX_CRASH_TEXT_BYTES: u64 = 4096;
/// Local APIC vectors below are reserved for exceptions (Intel SDM volume 3, 11.5.2).
const FIRST_VECTOR: u8 = 16;

/// The access ends in a general-protection fault of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// What a read is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Value(u64),
    /// [`ReferenceClock::at`] the reading VP's TSC.
    ReferenceTime,
}

/// What a write sets off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Fill the page anew and show it at this guest page number; `None`: take it away.
    Place { page: Page, gpn: Option<u64> },
    /// [`Msrs::sint_vector`] of this VP may have changed.
    SintChanged { vp: u16 },
    /// A message slot was freed: look at the message queues of all VPs.
    EndOfMessage,
    /// The guest's kernel crashed. `text`: address and length (at most a page) of its last words.
    Crash {
        parameters: [u64; 5],
        text: Option<(Gpa, usize)>,
    },
}

/// Registers of one VP.
#[derive(Clone, Debug)]
struct VpMsrs {
    vp_assist: u64,
    scontrol: u64,
    siefp: u64,
    simp: u64,
    sints: [u64; 16],
}

impl Default for VpMsrs {
    fn default() -> Self {
        Self {
            vp_assist: 0,
            scontrol: 0,
            siefp: 0,
            simp: 0,
            sints: [SINT_MASKED; 16],
        }
    }
}

/// All synthetic MSRs of a VM.
#[derive(Debug)]
pub struct Msrs {
    ram: RamLayout,
    clock: ReferenceClock,
    guest_os_id: u64,
    hypercall: u64,
    reference_tsc: u64,
    crash: [u64; 5],
    vps: Vec<VpMsrs>,
}

impl Msrs {
    /// Reset state.
    pub fn new(vp_count: u16, ram: RamLayout, clock: ReferenceClock) -> Self {
        Self {
            ram,
            clock,
            guest_os_id: 0,
            hypercall: 0,
            reference_tsc: 0,
            crash: [0; 5],
            vps: vec![VpMsrs::default(); usize::from(vp_count)],
        }
    }

    /// RDMSR by `vp`.
    pub fn read(&self, vp: u16, msr: u32) -> Result<Answer, GeneralProtection> {
        let own = self.vps.get(usize::from(vp)).ok_or(GeneralProtection)?;
        let value = match msr {
            GUEST_OS_ID => self.guest_os_id,
            HYPERCALL => self.hypercall,
            VP_INDEX => u64::from(vp),
            TIME_REF_COUNT => return Ok(Answer::ReferenceTime),
            REFERENCE_TSC => self.reference_tsc,
            TSC_FREQUENCY => self.clock.tsc_hz(),
            APIC_FREQUENCY => APIC_HZ,
            VP_ASSIST_PAGE => own.vp_assist,
            SCONTROL => own.scontrol,
            SVERSION => 1,
            SIEFP => own.siefp,
            SIMP => own.simp,
            EOM => 0,
            SINT0..=SINT15 => *own.sints.get((msr - SINT0) as usize).ok_or(GeneralProtection)?,
            CRASH_P0..=CRASH_P4 => *self
                .crash
                .get((msr - CRASH_P0) as usize)
                .ok_or(GeneralProtection)?,
            CRASH_CTL => CRASH_NOTIFY | CRASH_MESSAGE,
            _ => return Err(GeneralProtection),
        };
        Ok(Answer::Value(value))
    }

    /// WRMSR by `vp`.
    pub fn write(&mut self, vp: u16, msr: u32, value: u64) -> Result<Vec<Effect>, GeneralProtection> {
        match msr {
            GUEST_OS_ID => Ok(self.write_guest_os_id(value)),
            HYPERCALL => self.write_hypercall(value),
            REFERENCE_TSC => {
                let gpn = self.checked_page(value)?;
                let effects = placed(Page::ReferenceTsc, self.reference_tsc, value, gpn);
                self.reference_tsc = value;
                Ok(effects)
            }
            CRASH_P0..=CRASH_P4 => {
                *self
                    .crash
                    .get_mut((msr - CRASH_P0) as usize)
                    .ok_or(GeneralProtection)? = value;
                Ok(Vec::new())
            }
            CRASH_CTL => Ok(self.write_crash_control(value)),
            _ => self.write_vp(vp, msr, value),
        }
    }

    fn write_vp(&mut self, vp: u16, msr: u32, value: u64) -> Result<Vec<Effect>, GeneralProtection> {
        let gpn = match msr {
            SIEFP | SIMP => self.checked_page(value)?,
            _ => None,
        };
        let own = self.vps.get_mut(usize::from(vp)).ok_or(GeneralProtection)?;
        match msr {
            VP_ASSIST_PAGE => {
                // Quirk(Linux 6.1 hv_init): written on every processor although no feature bit offers it.
                own.vp_assist = value;
                Ok(Vec::new())
            }
            SCONTROL => {
                own.scontrol = value;
                Ok(vec![Effect::SintChanged { vp }])
            }
            SIEFP => {
                let effects = placed(Page::Siefp(vp), own.siefp, value, gpn);
                own.siefp = value;
                Ok(effects)
            }
            SIMP => {
                let effects = placed(Page::Simp(vp), own.simp, value, gpn);
                own.simp = value;
                Ok(effects)
            }
            EOM => Ok(vec![Effect::EndOfMessage]),
            SINT0..=SINT15 => {
                if value & SINT_MASKED == 0 && (value as u8) < FIRST_VECTOR {
                    return Err(GeneralProtection);
                }
                let sint = (msr - SINT0) as usize;
                *own.sints.get_mut(sint).ok_or(GeneralProtection)? = value;
                if sint == usize::from(VMBUS_SINT) {
                    return Ok(vec![Effect::SintChanged { vp }]);
                }
                Ok(Vec::new())
            }
            _ => Err(GeneralProtection),
        }
    }

    /// The vector that VMBus raises on `vp`; `None` while the SINT is masked or the SynIC of the VP is off.
    pub fn sint_vector(&self, vp: u16) -> Option<u8> {
        let own = self.vps.get(usize::from(vp))?;
        let sint = *own.sints.get(usize::from(VMBUS_SINT))?;
        let vector = sint as u8;
        let on = own.scontrol & ENABLE != 0 && sint & SINT_MASKED == 0 && vector >= FIRST_VECTOR;
        on.then_some(vector)
    }

    /// Whether messages can be put into the VP's slots: its SynIC and its message page are on.
    pub fn takes_messages(&self, vp: u16) -> bool {
        self.vps
            .get(usize::from(vp))
            .is_some_and(|own| own.scontrol & ENABLE != 0 && own.simp & ENABLE != 0)
    }

    /// What the guest called itself; 0 before it did.
    pub fn guest_os_id(&self) -> u64 {
        self.guest_os_id
    }

    fn write_guest_os_id(&mut self, value: u64) -> Vec<Effect> {
        self.guest_os_id = value;
        if value != 0 || self.hypercall & ENABLE == 0 {
            return Vec::new();
        }
        self.hypercall &= !ENABLE;
        vec![Effect::Place {
            page: Page::Hypercall,
            gpn: None,
        }]
    }

    fn write_hypercall(&mut self, value: u64) -> Result<Vec<Effect>, GeneralProtection> {
        if self.hypercall & HYPERCALL_LOCKED != 0 {
            return Ok(Vec::new());
        }
        // Without a guest OS id the page cannot be enabled; the rest of the value is kept.
        let value = if self.guest_os_id == 0 {
            value & !ENABLE
        } else {
            value
        };
        let gpn = self.checked_page(value)?;
        let effects = placed(Page::Hypercall, self.hypercall, value, gpn);
        self.hypercall = value;
        Ok(effects)
    }

    fn write_crash_control(&mut self, value: u64) -> Vec<Effect> {
        if value & CRASH_NOTIFY == 0 {
            return Vec::new();
        }
        let [_, _, _, gpa, bytes] = self.crash;
        let text = (value & CRASH_MESSAGE != 0 && gpa != 0 && bytes != 0)
            .then(|| (Gpa(gpa), bytes.min(MAX_CRASH_TEXT_BYTES) as usize));
        vec![Effect::Crash {
            parameters: self.crash,
            text,
        }]
    }

    /// The guest page number of an enabled page MSR; `None` if not enabled.
    fn checked_page(&self, value: u64) -> Result<Option<u64>, GeneralProtection> {
        if value & ENABLE == 0 {
            return Ok(None);
        }
        let gpn = value >> PAGE_SHIFT;
        match self.ram.offset_of(Gpa(gpn << PAGE_SHIFT), 1 << PAGE_SHIFT) {
            Some(_) => Ok(Some(gpn)),
            None => Err(GeneralProtection),
        }
    }
}

/// The effect of a changed page MSR: none if neither the enable bit nor, while enabled, the page changed.
fn placed(page: Page, old: u64, new: u64, gpn: Option<u64>) -> Vec<Effect> {
    let old = (old & ENABLE != 0).then_some(old >> PAGE_SHIFT);
    debug_assert_eq!(gpn, (new & ENABLE != 0).then_some(new >> PAGE_SHIFT));
    if old == gpn {
        Vec::new()
    } else {
        vec![Effect::Place { page, gpn }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GP: GeneralProtection = GeneralProtection;
    const RAM_BYTES: u64 = 256 << 20;

    fn msrs() -> Msrs {
        let clock = ReferenceClock::new(2_000_000, 0).expect("sane");
        Msrs::new(2, RamLayout::for_size(RAM_BYTES), clock)
    }

    fn read(msrs: &Msrs, vp: u16, msr: u32) -> Result<u64, GeneralProtection> {
        match msrs.read(vp, msr)? {
            Answer::Value(value) => Ok(value),
            Answer::ReferenceTime => panic!("not a stored value"),
        }
    }

    #[test]
    fn reset_state_is_all_zero_but_for_masked_sints() {
        let msrs = msrs();
        for msr in [
            GUEST_OS_ID,
            HYPERCALL,
            REFERENCE_TSC,
            SCONTROL,
            SIEFP,
            SIMP,
            EOM,
            VP_ASSIST_PAGE,
        ] {
            assert_eq!(read(&msrs, 1, msr), Ok(0), "{msr:#x}");
        }
        assert_eq!(read(&msrs, 0, SINT15), Ok(0x10000));
        assert_eq!(msrs.sint_vector(0), None);
    }

    #[test]
    fn what_is_computed_is_read_only() {
        let mut msrs = msrs();
        assert_eq!(read(&msrs, 1, VP_INDEX), Ok(1));
        assert_eq!(read(&msrs, 1, SVERSION), Ok(1));
        assert_eq!(read(&msrs, 0, TSC_FREQUENCY), Ok(2_000_000_000));
        assert_eq!(read(&msrs, 0, APIC_FREQUENCY), Ok(1_000_000_000));
        assert_eq!(msrs.read(0, TIME_REF_COUNT), Ok(Answer::ReferenceTime));
        for msr in [VP_INDEX, TIME_REF_COUNT, TSC_FREQUENCY, APIC_FREQUENCY, SVERSION] {
            assert_eq!(msrs.write(0, msr, 1), Err(GP), "{msr:#x}");
        }
    }

    #[test]
    fn what_is_not_offered_faults() {
        let mut msrs = msrs();
        for msr in [
            0x4000_0003,
            0x4000_0010,
            0x4000_0070,
            0x4000_00B0,
            0x4000_00F0,
            0x4000_0106,
            0x4000_0118,
        ] {
            assert_eq!(msrs.read(0, msr), Err(GP), "{msr:#x}");
            assert_eq!(msrs.write(0, msr, 0), Err(GP), "{msr:#x}");
        }
        assert_eq!(msrs.read(2, SIMP), Err(GP), "no such VP");
    }

    #[test]
    fn the_hypercall_page_needs_a_guest_os_id_and_goes_with_it() {
        let mut msrs = msrs();
        assert_eq!(msrs.write(0, HYPERCALL, 0x5001), Ok(vec![]));
        assert_eq!(read(&msrs, 0, HYPERCALL), Ok(0x5000), "not enabled");
        msrs.write(0, GUEST_OS_ID, 0x8100_0006_0100_0000)
            .expect("any value");
        let placed = Effect::Place {
            page: Page::Hypercall,
            gpn: Some(5),
        };
        assert_eq!(msrs.write(0, HYPERCALL, 0x5001), Ok(vec![placed]));
        let gone = Effect::Place {
            page: Page::Hypercall,
            gpn: None,
        };
        assert_eq!(msrs.write(0, GUEST_OS_ID, 0), Ok(vec![gone]));
        assert_eq!(
            msrs.write(0, HYPERCALL, 0x5000),
            Ok(vec![]),
            "Linux's clean-up comes afterwards"
        );
    }

    #[test]
    fn a_locked_hypercall_page_stays_where_it_is() {
        let mut msrs = msrs();
        msrs.write(0, GUEST_OS_ID, 1).expect("any value");
        msrs.write(0, HYPERCALL, 0x5003).expect("in RAM");
        assert_eq!(msrs.write(0, HYPERCALL, 0x6001), Ok(vec![]));
        assert_eq!(read(&msrs, 0, HYPERCALL), Ok(0x5003));
    }

    #[test]
    fn the_tsc_page_works_before_the_guest_has_named_itself() {
        let mut msrs = msrs();
        let placed = Effect::Place {
            page: Page::ReferenceTsc,
            gpn: Some(9),
        };
        assert_eq!(msrs.write(1, REFERENCE_TSC, 0x9001), Ok(vec![placed]));
        assert_eq!(
            msrs.write(0, REFERENCE_TSC, 0x9FFF),
            Ok(vec![]),
            "same page, other reserved bits"
        );
        assert_eq!(
            read(&msrs, 0, REFERENCE_TSC),
            Ok(0x9FFF),
            "reserved bits are preserved"
        );
    }

    #[test]
    fn pages_beyond_ram_fault_and_change_nothing() {
        let mut msrs = msrs();
        for value in [0x1000_0001, u64::MAX, 1 << 63 | 1, 0xFEE0_0001] {
            for msr in [SIMP, SIEFP, REFERENCE_TSC] {
                assert_eq!(msrs.write(0, msr, value), Err(GP), "{msr:#x} = {value:#x}");
                assert_eq!(read(&msrs, 0, msr), Ok(0));
            }
        }
        assert_eq!(
            msrs.write(0, SIMP, u64::MAX - 1),
            Ok(vec![]),
            "not enabled: any address is stored"
        );
        let last = Effect::Place {
            page: Page::Simp(0),
            gpn: Some(0xFFFF),
        };
        assert_eq!(msrs.write(0, SIMP, 0x0FFF_F001), Ok(vec![last]));
    }

    #[test]
    fn synic_pages_and_sints_are_per_vp() {
        let mut msrs = msrs();
        msrs.write(1, SIMP, 0x1001).expect("in RAM");
        msrs.write(1, SCONTROL, 1).expect("any value");
        assert!(msrs.takes_messages(1) && !msrs.takes_messages(0));
        assert_eq!(
            msrs.write(1, 0x4000_0092, 0xF3),
            Ok(vec![Effect::SintChanged { vp: 1 }])
        );
        assert_eq!((msrs.sint_vector(0), msrs.sint_vector(1)), (None, Some(0xF3)));
        msrs.write(1, SCONTROL, 0).expect("any value");
        assert_eq!(msrs.sint_vector(1), None);
    }

    #[test]
    fn an_unmasked_sint_with_an_exception_vector_faults() {
        let mut msrs = msrs();
        assert_eq!(msrs.write(0, 0x4000_0092, 15), Err(GP));
        assert!(msrs.write(0, 0x4000_0092, 15 | 0x10000).is_ok());
        assert!(msrs.write(0, 0x4000_0092, 16).is_ok());
    }

    #[test]
    fn a_crash_report_bounds_its_text() {
        let mut msrs = msrs();
        msrs.write(0, CRASH_P0 + 3, 0x7000).expect("any value");
        msrs.write(0, CRASH_P4, u64::MAX).expect("any value");
        let effects = msrs
            .write(0, CRASH_CTL, CRASH_NOTIFY | CRASH_MESSAGE)
            .expect("any value");
        let parameters = [0, 0, 0, 0x7000, u64::MAX];
        assert_eq!(
            effects,
            [Effect::Crash {
                parameters,
                text: Some((Gpa(0x7000), 4096))
            }]
        );
        let effects = msrs.write(0, CRASH_CTL, CRASH_NOTIFY).expect("any value");
        assert_eq!(
            effects,
            [Effect::Crash {
                parameters,
                text: None
            }]
        );
        assert_eq!(msrs.write(0, CRASH_CTL, 0), Ok(vec![]));
        assert_eq!(read(&msrs, 0, CRASH_CTL), Ok(CRASH_NOTIFY | CRASH_MESSAGE));
    }

    /// An MSR that is answered here: often one that means something.
    fn any_msr() -> impl Strategy<Value = u32> {
        let known = [
            GUEST_OS_ID,
            HYPERCALL,
            REFERENCE_TSC,
            SCONTROL,
            SIEFP,
            SIMP,
            EOM,
            SINT0 + u32::from(VMBUS_SINT),
            CRASH_P4 - 1,
            CRASH_P4,
            CRASH_CTL,
        ];
        prop_oneof![proptest::sample::select(known.to_vec()), FIRST..FIRST + COUNT]
    }

    /// Any value: often that of a page near an end of RAM, switched on.
    fn any_value() -> impl Strategy<Value = u64> {
        let near = (RAM_BYTES - 0x2000..RAM_BYTES + 0x2000).prop_map(|gpa| gpa & !0xFFE | ENABLE);
        prop_oneof![any::<u64>(), near, 0_u64..32, Just(CRASH_NOTIFY | CRASH_MESSAGE)]
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_nothing_of_ours_lies_outside_of_its_ram(
            writes in prop::collection::vec((0_u16..4, any_msr(), any_value()), 0..60)
        ) {
            let mut msrs = msrs();
            for (vp, msr, value) in writes {
                for effect in msrs.write(vp, msr, value).unwrap_or_default() {
                    match effect {
                        Effect::Place { gpn: Some(gpn), .. } => {
                            prop_assert!(gpn.checked_mul(4096).is_some_and(|gpa| gpa < RAM_BYTES));
                        }
                        Effect::Crash { text: Some((_, bytes)), .. } => prop_assert!(bytes <= 4096),
                        Effect::SintChanged { vp } => prop_assert!(vp < 2),
                        Effect::Place { .. } | Effect::Crash { .. } | Effect::EndOfMessage => {}
                    }
                }
                prop_assert!(msrs.read(vp, msr).is_err() || vp < 2);
                prop_assert!(msrs.sint_vector(vp).is_none_or(|vector| vector >= FIRST_VECTOR));
            }
        }
    }
}
