#![forbid(unsafe_code)]
//! The battery clock of a PC (MC146818), read-only: how a guest learns what day it is.
//!
//! Quirk(Linux 6.1 mach_get_cmos_time): it is read at every start, whatever the FADT says. If nothing is there, all-ones
//! look like an update in progress, and Linux polls for a second: 40,000 exits. So there is a clock, and the FADT
//! still says that there is none, which keeps Linux from binding a driver that wants its alarm interrupt.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Index port; the data port is the next one.
pub const INDEX_PORT: u16 = 0x70;
pub const DATA_PORT: u16 = 0x71;

// Registers of the MC146818 data sheet; the century where most PCs have it.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_D: u8 = 0x0D;
const CENTURY: u8 = 0x32;

/// Register A: 32,768 Hz time base, no update in progress.
const TIME_BASE: u8 = 0x26;
/// Register B: binary (2), 24 hours (1).
const BINARY_24_HOURS: u8 = 0x06;
/// Register D: time is valid.
const VALID: u8 = 0x80;

/// The clock. Coordinated universal time, as Linux and the cloud expect it.
#[derive(Debug, Default)]
pub struct Clock {
    index: u8,
    /// Time since the epoch when the guest last asked for the seconds, which come first: the other registers
    /// belong to the same moment.
    latched: Duration,
}

impl Clock {
    /// Selects a register. Bit 7 masks the NMI on a PC, and means nothing here.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7F;
    }

    /// Reads the selected register.
    pub fn read(&mut self, now: SystemTime) -> u8 {
        if self.index == SECONDS {
            // A host clock before 1970 is not worth more than 1970.
            self.latched = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        }
        let seconds = self.latched.as_secs();
        let (year, month, day) = date(seconds / 86_400);
        match self.index {
            SECONDS => (seconds % 60) as u8,
            MINUTES => (seconds / 60 % 60) as u8,
            HOURS => (seconds / 3600 % 24) as u8,
            // 1 is Sunday; 1970 began on a Thursday.
            WEEKDAY => ((seconds / 86_400 + 4) % 7 + 1) as u8,
            DAY => day,
            MONTH => month,
            YEAR => (year % 100) as u8,
            CENTURY => (year / 100) as u8,
            REGISTER_A => TIME_BASE,
            REGISTER_B => BINARY_24_HOURS,
            REGISTER_D => VALID,
            _ => 0,
        }
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn date(mut days: u64) -> (u64, u8, u8) {
    let is_leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        // Year 9999 is the last one that the registers can say.
        if days < length || year == 9999 {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, (days % 31 + 1) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(seconds: u64) -> [u8; 8] {
        let mut clock = Clock::default();
        let now = UNIX_EPOCH + Duration::from_secs(seconds);
        [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|index| {
            clock.select(index | 0x80);
            clock.read(now)
        })
    }

    #[test]
    fn known_moments_read_as_they_are_written() {
        assert_eq!(read_all(0), [0, 0, 0, 5, 1, 1, 70, 19], "a Thursday");
        assert_eq!(
            read_all(951_782_399),
            [59, 59, 23, 2, 28, 2, 0, 20],
            "2000-02-28, a Monday"
        );
        assert_eq!(read_all(951_782_400), [0, 0, 0, 3, 29, 2, 0, 20], "a leap day");
        assert_eq!(
            read_all(1_798_761_599),
            [59, 59, 23, 5, 31, 12, 26, 20],
            "2026-12-31"
        );
    }

    #[test]
    fn all_registers_belong_to_the_moment_the_seconds_were_read() {
        let mut clock = Clock::default();
        clock.select(SECONDS);
        assert_eq!(clock.read(UNIX_EPOCH + Duration::from_secs(59)), 59);
        clock.select(MINUTES);
        assert_eq!(clock.read(UNIX_EPOCH + Duration::from_secs(60)), 0);
    }

    #[test]
    fn no_update_is_ever_in_progress_and_the_time_is_valid() {
        let mut clock = Clock::default();
        clock.select(REGISTER_A);
        assert_eq!(clock.read(UNIX_EPOCH) & 0x80, 0);
        clock.select(REGISTER_D);
        assert_eq!(clock.read(UNIX_EPOCH), 0x80);
        clock.select(0x7F);
        assert_eq!(clock.read(UNIX_EPOCH + Duration::from_secs(u64::MAX / 4)), 0);
    }
}
