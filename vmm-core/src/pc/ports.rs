#![forbid(unsafe_code)]
//! The ports for power: what a write does, what a read answers.
//!
//! ACPI describes sleep control, sleep status and reset (`acpi.rs`). Linux tries others when it is told to, or when
//! ACPI fails: the keyboard controller's pulse of the reset line, and port 0xCF9. All ports that nobody claims
//! read as all-ones, as on a bus without a device.
//!
//! Only accesses of one byte have an effect: port 0xCF9 lies within the four bytes of the PCI address port, and Linux's
//! probe for PCI writes those at once.

/// I/O APIC pin of the power button's event device.
pub const POWER_BUTTON_GSI: u32 = 5;
/// Sleep control register (ACPI 6.5 section 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x0600;
/// Sleep status register (same place).
pub const SLEEP_STATUS: u16 = 0x0601;
/// The FADT's reset register, and the value that resets.
pub const RESET: u16 = 0x0602;
pub const RESET_VALUE: u8 = 0x01;
/// What the DSDT's \_S5 says: SLP_TYP of "soft off".
pub const SLEEP_TYPE_OFF: u8 = 5;

/// SLP_EN of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Keyboard controller command port, and its command "pulse output bit 0", the reset line. Source: Linux 6.1
/// arch/x86/kernel/reboot.c `native_machine_emergency_restart`.
const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xFE;
/// Reset control register of many chip sets; bit 2 resets the CPU. Source: same place, BOOT_CF9_FORCE.
const CF9: u16 = 0xCF9;
const CF9_RESET_CPU: u8 = 1 << 2;

/// What the guest wants of its power supply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    Off,
    Reset,
}

/// The effect of writing the byte `value` to `port`; `None` for ports and values without one.
pub fn write(port: u16, value: u8) -> Option<Power> {
    match port {
        SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_OFF => Some(Power::Off),
        RESET if value == RESET_VALUE => Some(Power::Reset),
        KEYBOARD_COMMAND if value == PULSE_RESET => Some(Power::Reset),
        CF9 if value & CF9_RESET_CPU != 0 => Some(Power::Reset),
        _ => None,
    }
}

/// One byte of a read from a port that no device claims.
pub fn read(port: u16) -> u8 {
    match port {
        // Never woken from sleep.
        SLEEP_STATUS => 0,
        _ => 0xFF,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_off_state_with_the_enable_bit_switches_off() {
        assert_eq!(write(SLEEP_CONTROL, 5 << 2 | 1 << 5), Some(Power::Off));
        assert_eq!(write(SLEEP_CONTROL, 5 << 2), None);
        assert_eq!(write(SLEEP_CONTROL, 3 << 2 | 1 << 5), None, "S3 is not offered");
    }

    #[test]
    fn each_way_to_reset_is_caught() {
        for (port, value) in [(RESET, 1), (0x64, 0xFE), (0xCF9, 0x06), (0xCF9, 0x0E)] {
            assert_eq!(write(port, value), Some(Power::Reset), "{port:#x}");
        }
        for (port, value) in [(RESET, 0), (0x64, 0xAD), (0xCF9, 0x02), (0x80, 0xFE)] {
            assert_eq!(write(port, value), None, "{port:#x}");
        }
    }

    #[test]
    fn unclaimed_ports_read_all_ones() {
        assert_eq!(
            (read(0x61), read(0x70), read(0xCFC), read(SLEEP_STATUS)),
            (0xFF, 0xFF, 0xFF, 0)
        );
    }
}
