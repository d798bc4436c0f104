#![forbid(unsafe_code)]
//! The partition's reference clock: 100 ns units since the VM was powered on (TLFS 6.0b section 12.7).
//!
//! The guest computes `time = high64(tsc * scale) + offset` from the page; MSR TIME_REF_COUNT is answered with
//! the very same numbers, or time would jump for a guest that mixes the two. The page is written once, before
//! the guest can see it: all vCPUs have the same TSC offset, and the host's TSC does not change its rate.

use zerocopy::byteorder::little_endian::{I64, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// Ticks of the reference clock in a second.
const TICKS_PER_SECOND: u128 = 10_000_000;

/// How reference time follows from the guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReferenceClock {
    tsc_hz: u64,
    /// 0.64 fixed point.
    scale: u64,
    /// 100 ns units.
    offset: i64,
}

/// HV_REFERENCE_TSC_PAGE, TLFS 6.0b section 12.7.3; the rest of the page is reserved.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ReferenceTscPage {
    /// 0 means "do not use": never written here.
    tsc_sequence: U32,
    reserved1: U32,
    tsc_scale: U64,
    tsc_offset: I64,
}
const _: () = assert!(size_of::<ReferenceTscPage>() == 24);

impl ReferenceClock {
    /// The clock that is 0 when the guest's TSC reads `tsc_at_start`. `None` if the frequency is below the
    /// clock's own or out of any sense.
    pub fn new(tsc_khz: u32, tsc_at_start: u64) -> Option<Self> {
        let tsc_hz = u64::from(tsc_khz).checked_mul(1000)?;
        let scale = (TICKS_PER_SECOND << 64).checked_div(u128::from(tsc_hz))?;
        let scale = u64::try_from(scale).ok()?;
        let start = i64::try_from(scaled(tsc_at_start, scale)).ok()?;
        Some(Self {
            tsc_hz,
            scale,
            offset: start.checked_neg()?,
        })
    }

    /// Reference time at this TSC value of the guest.
    pub fn at(&self, tsc: u64) -> u64 {
        scaled(tsc, self.scale).wrapping_add_signed(self.offset)
    }

    /// For MSR TSC_FREQUENCY.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// The head of the reference TSC page; the rest is zero.
    pub fn page(&self) -> Vec<u8> {
        ReferenceTscPage {
            tsc_sequence: 1.into(),
            reserved1: 0.into(),
            tsc_scale: self.scale.into(),
            tsc_offset: self.offset.into(),
        }
        .as_bytes()
        .to_vec()
    }
}

fn scaled(tsc: u64, scale: u64) -> u64 {
    // The product of two 64-bit numbers, shifted by 64, is a 64-bit number.
    ((u128::from(tsc) * u128::from(scale)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_tsc_is_ten_million_ticks() {
        let clock = ReferenceClock::new(2_000_000, 0).expect("sane");
        let second = clock.at(2_000_000_000);
        assert!((9_999_999..=10_000_000).contains(&second), "{second}");
    }

    #[test]
    fn time_begins_at_zero_wherever_the_tsc_stands() {
        let clock = ReferenceClock::new(2_445_408, 123_456_789_012_345).expect("sane");
        assert_eq!(clock.at(123_456_789_012_345), 0);
        assert!(clock.at(123_456_789_012_345 + 2_445_408_000) >= 9_999_998);
    }

    #[test]
    fn frequencies_without_sense_are_refused_not_divided_by() {
        assert_eq!(ReferenceClock::new(0, 0), None);
        assert_eq!(
            ReferenceClock::new(10_000, 0),
            None,
            "scale would not fit 0.64 fixed point"
        );
        assert!(ReferenceClock::new(10_001, 0).is_some());
    }

    #[test]
    fn the_page_has_a_valid_sequence_and_the_fields_where_the_guest_reads_them() {
        let clock = ReferenceClock::new(1_000_000, 5_000_000).expect("sane");
        let page = clock.page();
        assert_eq!(page[0..4], 1u32.to_le_bytes());
        assert_eq!(page[8..16], clock.scale.to_le_bytes());
        assert_eq!(page[16..24], clock.offset.to_le_bytes());
    }
}
