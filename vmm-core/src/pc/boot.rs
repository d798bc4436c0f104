#![forbid(unsafe_code)]
//! Direct boot of Linux by the 64-bit boot protocol (Linux Documentation/x86/boot.rst): kernel, initrd, command
//! line, boot_params, GDT and identity page tables.
//!
//! Kernel and initrd are read from their descriptors straight into guest RAM, with no copy in between; a reset
//! reads them again. They are the operator's files, yet no number in them is trusted: each address and length is
//! checked against guest RAM by the loader and by `vm-memory`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{self, KernelLoader, bzimage::BzImage, elf::Elf};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmbus::ipc::KernelFormat;
use vmbus::mem::RamLayout;

use super::memory_map::{
    ACPI_TABLES, BOOT_PARAMS, COMMAND_LINE, GDT, HIGH_MEMORY, IDENTITY_GIB, KERNEL, MAX_COMMAND_LINE_BYTES,
    PAGE_TABLES, RESET_VECTOR, e820, low_ram_end,
};
use super::{acpi, ports};

/// Selectors of the 64-bit boot protocol, `__BOOT_CS` and `__BOOT_DS`.
pub const CODE_SELECTOR: u16 = 0x10;
pub const DATA_SELECTOR: u16 = 0x18;

/// Null, unused, flat 64-bit code, flat data; accessed and present, ring 0.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
/// Bytes behind the base of the GDT that belong to it, less one.
pub const GDT_LIMIT: u16 = (GDT_ENTRIES.len() * 8 - 1) as u16;

/// Where a bzImage's 64-bit entry lies (boot.rst, "64-bit BOOT PROTOCOL").
const ENTRY_64_OFFSET: u64 = 0x200;
/// `xloadflags` bit 0: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
/// boot.rst: a boot loader without an id of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
const PAGE_BYTES: u64 = 4096;
/// `setup_data` type with a seed for the guest's random numbers. Source: Linux 6.1
/// arch/x86/include/uapi/asm/bootparam.h `SETUP_RNG_SEED`.
const SETUP_RNG_SEED: u32 = 9;
/// In the page behind boot_params, which is before the page tables.
const SETUP_DATA: u64 = BOOT_PARAMS + PAGE_BYTES;

/// Real-mode code in place of a BIOS: write [`ports::RESET_VALUE`] to [`ports::RESET`], and halt.
///
/// Quirk(Linux 6.1 reboot_init): with hardware-reduced ACPI it takes EFI for the way to restart even where it was not
/// started by EFI, and falls back to a jump to the BIOS. Without this code it would run through zeros for ever.
const RESET_CODE: [u8; 9] = {
    let port = ports::RESET.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [
        0xBA,
        port[0],
        port[1],
        0xB0,
        ports::RESET_VALUE,
        0xEE,
        0xF4,
        0xEB,
        0xFD,
    ]
};

/// Why the kernel cannot be started; a sentence for the operator.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot read the kernel: {0}")]
    ReadKernel(io::Error),
    #[error("the kernel is neither a bzImage nor an ELF vmlinux for x86-64: {0}")]
    Kernel(loader::Error),
    #[error("the kernel is a bzImage without a 64-bit entry point")]
    No64BitEntry,
    #[error(
        "the guest's memory is too small: the kernel needs it up to {kernel_end:#x}, RAM ends at {ram_end:#x}"
    )]
    KernelTooLarge { kernel_end: u64, ram_end: u64 },
    #[error("the guest's memory is too small for an initrd of {bytes} bytes beside the kernel")]
    InitrdTooLarge { bytes: u64 },
    #[error("cannot read the initrd: {0}")]
    Initrd(String),
    #[error("the kernel command line has {bytes} bytes; this kernel takes {limit}")]
    CommandLineTooLong { bytes: usize, limit: usize },
    #[error("the kernel command line contains a zero byte")]
    CommandLineHasNul,
    #[error("guest memory refused a write: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What to boot.
pub struct Boot<'a> {
    pub kernel: &'a File,
    pub format: KernelFormat,
    pub initrd: Option<&'a File>,
    pub command_line: &'a str,
    pub vp_count: u16,
}

/// State of the boot processor at the kernel's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub rip: u64,
    /// RSI: address of boot_params.
    pub boot_params: u64,
}

/// Fills guest RAM, which must be zero, and says where to start.
pub fn load(boot: &Boot<'_>, memory: &GuestMemoryMmap, ram: &RamLayout) -> Result<Entry, BootError> {
    let kernel = load_kernel(boot, memory, low_ram_end(ram))?;
    let mut header = kernel.header;
    if let Some(initrd) = boot.initrd {
        let (start, bytes) = load_initrd(initrd, memory, &kernel, low_ram_end(ram))?;
        header.ramdisk_image = start as u32;
        header.ramdisk_size = bytes as u32;
    }
    write_command_line(boot.command_line, memory, &mut header)?;
    write_setup_data(memory, &mut header)?;

    let tables = acpi::tables(boot.vp_count);
    memory.write_slice(&tables.bytes, GuestAddress(ACPI_TABLES))?;

    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: tables.rsdp,
        ..Default::default()
    };
    for (slot, entry) in params.e820_table.iter_mut().zip(e820(ram)) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.bytes,
            r#type: entry.kind as u32,
        };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(BOOT_PARAMS))?;
    memory.write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))?;
    write_gdt(memory)?;
    write_page_tables(memory)?;
    Ok(Entry {
        rip: kernel.entry,
        boot_params: BOOT_PARAMS,
    })
}

struct Kernel {
    entry: u64,
    /// First address that the kernel does not need before it has looked at the memory map.
    end: u64,
    header: setup_header,
}

fn load_kernel(boot: &Boot<'_>, memory: &GuestMemoryMmap, ram_end: u64) -> Result<Kernel, BootError> {
    let format = match boot.format {
        KernelFormat::Auto => detect(boot.kernel)?,
        given => given,
    };
    let high = Some(GuestAddress(HIGH_MEMORY));
    let mut file = boot.kernel;
    let kernel = match format {
        KernelFormat::Elf | KernelFormat::Auto => {
            let loaded = Elf::load(memory, None, &mut file, high).map_err(BootError::Kernel)?;
            let header = setup_header {
                type_of_loader: LOADER_UNDEFINED,
                boot_flag: 0xAA55,
                header: 0x5372_6448,
                kernel_alignment: 0x100_0000,
                initrd_addr_max: u32::MAX,
                cmdline_size: 2047,
                ..Default::default()
            };
            Kernel {
                entry: loaded.kernel_load.0,
                end: loaded.kernel_end,
                header,
            }
        }
        KernelFormat::BzImage => {
            let at = Some(GuestAddress(KERNEL));
            let loaded = BzImage::load(memory, at, &mut file, high).map_err(BootError::Kernel)?;
            let mut header = loaded.setup_header.ok_or(BootError::No64BitEntry)?;
            if header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(BootError::No64BitEntry);
            }
            header.type_of_loader = LOADER_UNDEFINED;
            let end = loaded.kernel_end.max(KERNEL + u64::from(header.init_size));
            Kernel {
                entry: KERNEL + ENTRY_64_OFFSET,
                end,
                header,
            }
        }
    };
    if kernel.end > ram_end {
        return Err(BootError::KernelTooLarge {
            kernel_end: kernel.end,
            ram_end,
        });
    }
    Ok(kernel)
}

fn detect(kernel: &File) -> Result<KernelFormat, BootError> {
    let mut magic = [0; 4];
    kernel
        .read_exact_at(&mut magic, 0)
        .map_err(BootError::ReadKernel)?;
    Ok(if magic == *b"\x7fELF" {
        KernelFormat::Elf
    } else {
        KernelFormat::BzImage
    })
}

/// Puts the initrd at the top of low RAM; returns its address and length.
fn load_initrd(
    mut initrd: &File,
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    ram_end: u64,
) -> Result<(u64, u64), BootError> {
    let io_error = |error: io::Error| BootError::Initrd(error.to_string());
    let bytes = initrd.seek(SeekFrom::End(0)).map_err(io_error)?;
    initrd.seek(SeekFrom::Start(0)).map_err(io_error)?;
    let limit = ram_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let start = limit
        .checked_sub(bytes)
        .map(|start| start / PAGE_BYTES * PAGE_BYTES);
    let start = start
        .filter(|start| *start >= kernel.end)
        .ok_or(BootError::InitrdTooLarge { bytes })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut initrd, bytes as usize)
        .map_err(|error| BootError::Initrd(error.to_string()))?;
    Ok((start, bytes))
}

fn write_command_line(
    line: &str,
    memory: &GuestMemoryMmap,
    header: &mut setup_header,
) -> Result<(), BootError> {
    let limit = (header.cmdline_size as usize).min(MAX_COMMAND_LINE_BYTES - 1);
    if line.len() > limit {
        return Err(BootError::CommandLineTooLong {
            bytes: line.len(),
            limit,
        });
    }
    if line.contains('\0') {
        return Err(BootError::CommandLineHasNul);
    }
    memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(COMMAND_LINE + line.len() as u64))?;
    header.cmd_line_ptr = COMMAND_LINE as u32;
    Ok(())
}

/// Gives the guest a seed for its random numbers: it has no disk noise and perhaps no RDRAND at this moment.
/// Version 4 UUIDs are the kernel's random bits, all but six of each 128.
fn write_setup_data(memory: &GuestMemoryMmap, header: &mut setup_header) -> Result<(), BootError> {
    let seed = [
        *Uuid::new_v4().as_bytes(),
        *Uuid::new_v4().as_bytes(),
        *Uuid::new_v4().as_bytes(),
    ]
    .concat();
    // struct setup_data: next 8, type 4, length 4, data.
    memory.write_obj(0u64, GuestAddress(SETUP_DATA))?;
    memory.write_obj(SETUP_RNG_SEED, GuestAddress(SETUP_DATA + 8))?;
    memory.write_obj(seed.len() as u32, GuestAddress(SETUP_DATA + 12))?;
    memory.write_slice(&seed, GuestAddress(SETUP_DATA + 16))?;
    header.setup_data = SETUP_DATA;
    Ok(())
}

/// Writes the GDT that [`CODE_SELECTOR`] and [`DATA_SELECTOR`] select from.
pub fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    for (index, entry) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// Maps the first [`IDENTITY_GIB`] one to one by 2 MiB pages.
pub fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    // Intel SDM volume 3, 4.5: present 0, writable 1, page size 7.
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7 | 0b11;
    let pdpt = PAGE_TABLES + PAGE_BYTES;
    let directories = pdpt + PAGE_BYTES;
    memory.write_obj(pdpt | TABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..IDENTITY_GIB {
        memory.write_obj(
            (directories + gib * PAGE_BYTES) | TABLE,
            GuestAddress(pdpt + gib * 8),
        )?;
    }
    let entries: Vec<u8> = (0..IDENTITY_GIB * 512)
        .flat_map(|index| (index << 21 | LARGE_PAGE).to_le_bytes())
        .collect();
    memory.write_slice(&entries, GuestAddress(directories))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    fn memory(bytes: u64) -> (GuestMemoryMmap, RamLayout) {
        let ranges = [(GuestAddress(0), bytes as usize)];
        (
            GuestMemoryMmap::from_ranges(&ranges).expect("anonymous memory"),
            RamLayout::for_size(bytes),
        )
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("temporary file");
        file.write_all(content).expect("written");
        file
    }

    /// The head of a bzImage with one setup sector, and a payload of `payload` bytes.
    fn bzimage(xloadflags: u16, init_size: u32, payload: usize) -> Vec<u8> {
        let mut image = vec![0; 1024 + payload];
        image[0x1F1] = 1; // setup_sects
        image[0x1FE..0x200].copy_from_slice(&0xAA55u16.to_le_bytes());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020Fu16.to_le_bytes());
        image[0x211] = 1; // loadflags: LOADED_HIGH
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22C..0x230].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes()); // initrd_addr_max
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x238..0x23C].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image[1024..].fill(0x90);
        image
    }

    fn boot<'a>(kernel: &'a File, initrd: Option<&'a File>, command_line: &'a str) -> Boot<'a> {
        Boot {
            kernel,
            format: KernelFormat::Auto,
            initrd,
            command_line,
            vp_count: 2,
        }
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry_with_boot_params_in_place() {
        let (memory, ram) = memory(64 * MIB);
        let kernel = file(&bzimage(XLF_KERNEL_64, 2 << 20, 8192));
        let initrd = file(&[0x5A; 5000]);
        let entry = load(&boot(&kernel, Some(&initrd), "console=ttyS0"), &memory, &ram).expect("loads");
        assert_eq!(
            entry,
            Entry {
                rip: 0x100_0200,
                boot_params: 0x7000
            }
        );

        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("in RAM");
        let header = params.hdr;
        assert_eq!({ header.ramdisk_size }, 5000);
        let start = u64::from(header.ramdisk_image);
        assert_eq!((start % 4096, start), (0, 64 * MIB - 8192));
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(start + 4999)).expect("in RAM"),
            0x5A
        );
        assert_eq!(params.e820_entries, 3);
        let mut line = [0; 14];
        memory
            .read_slice(&mut line, GuestAddress(u64::from(header.cmd_line_ptr)))
            .expect("in RAM");
        assert_eq!(&line, b"console=ttyS0\0");
        let mut rsdp = [0; 8];
        memory
            .read_slice(&mut rsdp, GuestAddress(params.acpi_rsdp_addr))
            .expect("in RAM");
        assert_eq!(&rsdp, b"RSD PTR ");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(KERNEL)).expect("in RAM"), 0x90);
        let mut restart = [0; 6];
        memory
            .read_slice(&mut restart, GuestAddress(0xF_FFF0))
            .expect("in RAM");
        assert_eq!(
            restart,
            [0xBA, 0x02, 0x06, 0xB0, 0x01, 0xEE],
            "mov dx, 0x602; mov al, 1; out dx, al"
        );
    }

    #[test]
    fn page_tables_map_four_gibibytes_one_to_one() {
        let (memory, _) = memory(64 * MIB);
        write_page_tables(&memory).expect("in RAM");
        let word = |gpa: u64| memory.read_obj::<u64>(GuestAddress(gpa)).expect("in RAM");
        let address: u64 = 0xFEE0_1234;
        let pdpt = word(PAGE_TABLES + (address >> 39) * 8) & !0xFFF;
        let directory = word(pdpt + (address >> 30 & 511) * 8) & !0xFFF;
        assert_eq!(word(directory + (address >> 21 & 511) * 8), 0xFEE0_0083);
    }

    #[test]
    fn a_kernel_or_initrd_that_does_not_fit_is_refused_with_a_reason() {
        let (memory, ram) = memory(32 * MIB);
        let kernel = file(&bzimage(XLF_KERNEL_64, 17 << 20, 4096));
        let error = load(&boot(&kernel, None, ""), &memory, &ram).expect_err("too large");
        assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");
        let kernel = file(&bzimage(XLF_KERNEL_64, 4 << 20, 4096));
        let initrd = file(&vec![0; 13 << 20]);
        let error = load(&boot(&kernel, Some(&initrd), ""), &memory, &ram).expect_err("too large");
        assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    }

    #[test]
    fn files_that_are_no_kernel_are_refused() {
        let (memory, ram) = memory(64 * MIB);
        for content in [
            vec![],
            b"#!/bin/sh\n".to_vec(),
            vec![0; 4096],
            b"\x7fELF".to_vec(),
        ] {
            assert!(load(&boot(&file(&content), None, ""), &memory, &ram).is_err());
        }
        let no_entry = file(&bzimage(0, 1 << 20, 4096));
        let error = load(&boot(&no_entry, None, ""), &memory, &ram).expect_err("32-bit");
        assert!(matches!(error, BootError::No64BitEntry));
    }

    #[test]
    fn a_command_line_longer_than_the_kernel_takes_is_refused_not_cut() {
        let (memory, ram) = memory(64 * MIB);
        let kernel = file(&bzimage(XLF_KERNEL_64, 1 << 20, 4096));
        let line = "x".repeat(2048);
        let error = load(&boot(&kernel, None, &line), &memory, &ram).expect_err("too long");
        assert!(matches!(
            error,
            BootError::CommandLineTooLong {
                bytes: 2048,
                limit: 2047
            }
        ));
        let error = load(&boot(&kernel, None, "a\0b"), &memory, &ram).expect_err("zero byte");
        assert!(matches!(error, BootError::CommandLineHasNul));
    }
}
