#![forbid(unsafe_code)]
//! Where things lie in guest-physical memory, and the e820 map that says so.
//!
//! ```text
//!   0x0000_0500  GDT                        0x0000_7000  boot_params ("zero page")
//!   0x0000_9000  identity page tables       0x0002_0000  command line
//!   0x0009_fc00  end of usable low memory
//!   0x000e_0000  ACPI tables                0x000f_fff0  code that resets
//!   0x0010_0000  usable: kernel (16 MiB up), initrd (at the top)
//!   0xc000_0000  end of RAM below the hole  0xfec0_0000  I/O APIC   0xfee0_0000  local APICs
//!   0x1_0000_0000  the rest of RAM
//! ```

use vmbus::mem::RamLayout;

pub const GDT: u64 = 0x500;
/// Null, unused, flat 64-bit code, flat data; accessed and present, ring 0.
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
/// Bytes behind the base of the GDT that belong to it, less one.
pub const GDT_LIMIT: u16 = (GDT_ENTRIES.len() * 8 - 1) as u16;
/// Selectors of the 64-bit boot protocol, `__BOOT_CS` and `__BOOT_DS`.
pub const CODE_SELECTOR: u16 = 0x10;
pub const DATA_SELECTOR: u16 = 0x18;
pub const BOOT_PARAMS: u64 = 0x7000;
/// PML4, then the PDPT, then [`IDENTITY_GIB`] page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Gibibytes that the page tables map one to one.
pub const IDENTITY_GIB: u64 = 4;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Limit: from the command line's address to the end of low memory, and more than Linux takes (2,048).
pub const MAX_COMMAND_LINE_BYTES: usize = 0x1_0000;
const LOW_MEMORY_END: u64 = 0x9_FC00;
pub const ACPI_TABLES: u64 = 0xE_0000;
pub const ACPI_TABLES_END: u64 = 0xF_0000;
/// Where a processor in real mode goes to restart the machine.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Where the kernel goes: the address that Linux prefers on x86-64 (CONFIG_PHYSICAL_START), so that it need not
/// relocate itself.
pub const KERNEL: u64 = 0x100_0000;

pub const IOAPIC: u32 = 0xFEC0_0000;
pub const LOCAL_APIC: u32 = 0xFEE0_0000;

/// Type of an e820 entry (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Usable = 1,
    Reserved = 2,
}

/// One e820 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub start: u64,
    pub bytes: u64,
    pub kind: Kind,
}

/// The memory map of a VM. RAM that does not reach high memory has no sensible map: empty.
pub fn e820(ram: &RamLayout) -> Vec<Entry> {
    let mut entries = vec![
        Entry {
            start: 0,
            bytes: LOW_MEMORY_END,
            kind: Kind::Usable,
        },
        Entry {
            start: LOW_MEMORY_END,
            bytes: HIGH_MEMORY - LOW_MEMORY_END,
            kind: Kind::Reserved,
        },
    ];
    for region in &ram.regions {
        let start = region.gpa.max(HIGH_MEMORY);
        let end = region.gpa.saturating_add(region.len);
        if let Some(bytes) = end.checked_sub(start).filter(|bytes| *bytes > 0) {
            entries.push(Entry {
                start,
                bytes,
                kind: Kind::Usable,
            });
        }
    }
    entries
}

/// First address behind the RAM that begins at 0.
pub fn low_ram_end(ram: &RamLayout) -> u64 {
    ram.regions
        .iter()
        .find(|region| region.gpa == 0)
        .map_or(0, |region| region.len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_sorted_and_do_not_overlap() {
        for bytes in [64 << 20, 3u64 << 30, 8 << 30] {
            let entries = e820(&RamLayout::for_size(bytes));
            for pair in entries.windows(2) {
                assert!(pair[0].start + pair[0].bytes <= pair[1].start);
            }
        }
    }

    #[test]
    fn all_ram_but_the_legacy_hole_is_usable() {
        let bytes = 8u64 << 30;
        let usable: u64 = e820(&RamLayout::for_size(bytes))
            .iter()
            .filter(|entry| entry.kind == Kind::Usable)
            .map(|entry| entry.bytes)
            .sum();
        assert_eq!(usable, bytes - (HIGH_MEMORY - LOW_MEMORY_END));
    }

    #[test]
    fn what_we_write_does_not_overlap() {
        const TABLES_END: u64 = PAGE_TABLES + (2 + IDENTITY_GIB) * 4096;
        const { assert!(GDT + 0x100 <= BOOT_PARAMS && BOOT_PARAMS + 4096 <= PAGE_TABLES) };
        const { assert!(TABLES_END <= COMMAND_LINE) };
        const { assert!(COMMAND_LINE + MAX_COMMAND_LINE_BYTES as u64 <= LOW_MEMORY_END) };
    }
}
