#![forbid(unsafe_code)]
//! Direct boot of Linux by the 64-bit boot protocol (Linux Documentation/x86/boot.rst): from kernel, initrd and
//! command line to the list of what goes where in guest memory.
//!
//! The supervisor draws up the list, once; `bulkhead-vcpu` copies by it at each power-on and knows nothing of kernels.
//! Of the kernel only headers are read here. They are the operator's files, yet no number in them is trusted: what does
//! not fit is refused here with a reason, and each address is checked against guest RAM again when it is copied to.
//!
//! A file that is overwritten while its VM runs is not read again here: the guest's next boot then fails, and nothing
//! worse.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;
use vmbus::ipc::{BootPlan, BootSegment};
use vmbus::mem::RamLayout;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::memory_map::{
    ACPI_TABLES, BOOT_PARAMS, COMMAND_LINE, GDT, GDT_ENTRIES, HIGH_MEMORY, IDENTITY_GIB, KERNEL,
    MAX_COMMAND_LINE_BYTES, PAGE_TABLES, RESET_VECTOR, e820, low_ram_end,
};
use super::{acpi, ports};

/// Where a bzImage's 64-bit entry lies (boot.rst, "64-bit BOOT PROTOCOL").
const ENTRY_64_OFFSET: u64 = 0x200;
/// `xloadflags` bit 0: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
/// Where a bzImage has its `setup_header`, what stands in `header`, and bit 0 of `loadflags`: it goes above 1 MiB.
const HEADER_OFFSET: u64 = 0x1F1;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADED_HIGH: u8 = 1;
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
    Kernel(&'static str),
    #[error("the kernel's file has been cut off: copy it again")]
    Incomplete,
    #[error("the kernel is a bzImage without a 64-bit entry point")]
    No64BitEntry,
    #[error(
        "the guest's memory is too small: the kernel needs it up to {kernel_end:#x}, RAM ends at {ram_end:#x}"
    )]
    KernelTooLarge { kernel_end: u64, ram_end: u64 },
    #[error("the guest's memory is too small for an initrd of {bytes} bytes beside the kernel")]
    InitrdTooLarge { bytes: u64 },
    #[error("cannot read the initrd: {0}")]
    ReadInitrd(io::Error),
    #[error("the kernel command line has {bytes} bytes; this kernel takes {limit}")]
    CommandLineTooLong { bytes: usize, limit: usize },
    #[error("the kernel command line contains a zero byte")]
    CommandLineHasNul,
}

/// What to boot.
pub struct Boot<'a> {
    pub kernel: &'a File,
    pub initrd: Option<&'a File>,
    pub command_line: &'a str,
    pub vp_count: u16,
}

/// Numbers of the plan's files.
pub const DATA_FILE: u8 = 0;
pub const KERNEL_FILE: u8 = 1;
pub const INITRD_FILE: u8 = 2;

/// Draws up the plan for guest RAM that is zero. The bytes are the content of [`DATA_FILE`].
pub fn plan(boot: &Boot<'_>, ram: &RamLayout) -> Result<(BootPlan, Vec<u8>), BootError> {
    let mut kernel = read_kernel(boot.kernel, low_ram_end(ram))?;
    let mut low = LowMemory::default();
    if let Some(initrd) = boot.initrd {
        let segment = place_initrd(initrd, &kernel, low_ram_end(ram))?;
        kernel.header.ramdisk_image = segment.gpa as u32;
        kernel.header.ramdisk_size = segment.bytes as u32;
        kernel.segments.push(segment);
    }
    put_command_line(boot.command_line, &mut low, &mut kernel.header)?;
    // struct setup_data: next 8, type 4, length 4, data; the data come with each power-on.
    low.put(SETUP_DATA + 8, &SETUP_RNG_SEED.to_le_bytes());
    low.put(SETUP_DATA + 12, &(BootPlan::SEED_BYTES as u32).to_le_bytes());
    kernel.header.setup_data = SETUP_DATA;

    let tables = acpi::tables(boot.vp_count);
    low.put(ACPI_TABLES, &tables.bytes);
    let mut params = boot_params {
        hdr: kernel.header,
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
    low.put(BOOT_PARAMS, params.as_slice());
    low.put(RESET_VECTOR, &RESET_CODE);
    low.put(GDT, &gdt());
    low.put(PAGE_TABLES, &page_tables());
    let mut segments = kernel.segments;
    segments.extend(low.segments);
    let plan = BootPlan {
        segments,
        seed_gpa: SETUP_DATA + 16,
        rip: kernel.entry,
        rsi: BOOT_PARAMS,
    };
    Ok((plan, low.bytes))
}

/// What is not copied from the operator's files.
#[derive(Default)]
struct LowMemory {
    bytes: Vec<u8>,
    segments: Vec<BootSegment>,
}

impl LowMemory {
    fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.segments.push(BootSegment {
            file: DATA_FILE,
            offset: self.bytes.len() as u64,
            gpa,
            bytes: bytes.len() as u64,
        });
        self.bytes.extend(bytes);
    }
}

struct Kernel {
    entry: u64,
    /// First address that the kernel does not need before it has looked at the memory map.
    end: u64,
    header: setup_header,
    segments: Vec<BootSegment>,
}

fn read_kernel(file: &File, ram_end: u64) -> Result<Kernel, BootError> {
    let mut magic = [0; 4];
    read_exact(file, &mut magic, 0)?;
    let kernel = if magic == ELF_MAGIC {
        read_elf(file)?
    } else {
        read_bzimage(file)?
    };
    if kernel.end > ram_end {
        return Err(BootError::KernelTooLarge {
            kernel_end: kernel.end,
            ram_end,
        });
    }
    Ok(kernel)
}

/// ELF-64's file header (System V ABI, AMD64 supplement).
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ElfHeader {
    magic: [u8; 4],
    /// 2: 64 bits.
    class: u8,
    /// 1: little endian.
    data: u8,
    ident: [u8; 10],
    kind: U16,
    /// 62: x86-64.
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    header_bytes: U16,
    program_header_bytes: U16,
    program_header_count: U16,
    sections: [U16; 3],
}

/// ELF-64's program header.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader {
    /// 1: to be loaded.
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    physical_address: U64,
    file_bytes: U64,
    memory_bytes: U64,
    alignment: U64,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

fn read_exact(kernel: &File, bytes: &mut [u8], at: u64) -> Result<(), BootError> {
    kernel
        .read_exact_at(bytes, at)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => BootError::Kernel("the file is too short"),
            _ => BootError::ReadKernel(error),
        })
}

fn read_elf(file: &File) -> Result<Kernel, BootError> {
    let mut elf = ElfHeader::new_zeroed();
    read_exact(file, elf.as_mut_bytes(), 0)?;
    if (elf.class, elf.data, elf.machine.get()) != (2, 1, 62) {
        return Err(BootError::Kernel("the ELF file is of another architecture"));
    }
    if usize::from(elf.program_header_bytes.get()) != size_of::<ProgramHeader>() {
        return Err(BootError::Kernel(
            "the ELF file's program headers have another size",
        ));
    }
    let mut programs = vec![ProgramHeader::new_zeroed(); elf.program_header_count.get().into()];
    read_exact(file, programs.as_mut_bytes(), elf.program_headers.get())?;
    let length = file.metadata().map_err(BootError::ReadKernel)?.len();
    let (mut segments, mut end) = (Vec::new(), 0);
    for program in programs.iter().filter(|program| program.kind.get() == 1) {
        let gpa = program.physical_address.get();
        let bytes = program.memory_bytes.get().max(program.file_bytes.get());
        end = end.max(gpa.saturating_add(bytes));
        if program.file_bytes.get() > 0 {
            if gpa < HIGH_MEMORY {
                return Err(BootError::Kernel("the ELF file is no kernel"));
            }
            let file_end = program.offset.get().checked_add(program.file_bytes.get());
            if file_end.is_none_or(|end| end > length) {
                return Err(BootError::Incomplete);
            }
            segments.push(BootSegment {
                file: KERNEL_FILE,
                offset: program.offset.get(),
                gpa,
                bytes: program.file_bytes.get(),
            });
        }
    }
    if segments.is_empty() || elf.entry.get() < HIGH_MEMORY {
        return Err(BootError::Kernel("the ELF file is no kernel"));
    }
    let header = setup_header {
        type_of_loader: LOADER_UNDEFINED,
        boot_flag: 0xAA55,
        header: HEADER_MAGIC,
        kernel_alignment: 0x100_0000,
        initrd_addr_max: u32::MAX,
        cmdline_size: 2047,
        ..Default::default()
    };
    Ok(Kernel {
        entry: elf.entry.get(),
        end,
        header,
        segments,
    })
}

fn read_bzimage(file: &File) -> Result<Kernel, BootError> {
    let mut header = setup_header::default();
    read_exact(file, header.as_mut_slice(), HEADER_OFFSET)?;
    if header.header != HEADER_MAGIC || header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::Kernel("it lacks a bzImage's header"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (setup_sectors + 1) * 512;
    let length = file.metadata().map_err(BootError::ReadKernel)?.len();
    let bytes = length.checked_sub(offset).ok_or(BootError::Incomplete)?;
    // Units of 16 bytes (boot.rst).
    if bytes < u64::from(header.syssize) * 16 {
        return Err(BootError::Incomplete);
    }
    header.type_of_loader = LOADER_UNDEFINED;
    header.code32_start = KERNEL as u32;
    let needed = bytes.max(header.init_size.into());
    Ok(Kernel {
        entry: KERNEL + ENTRY_64_OFFSET,
        end: KERNEL.saturating_add(needed),
        header,
        segments: vec![BootSegment {
            file: KERNEL_FILE,
            offset,
            gpa: KERNEL,
            bytes,
        }],
    })
}

/// Puts the initrd at the top of low RAM.
fn place_initrd(initrd: &File, kernel: &Kernel, ram_end: u64) -> Result<BootSegment, BootError> {
    let bytes = initrd.metadata().map_err(BootError::ReadInitrd)?.len();
    let limit = ram_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let gpa = limit
        .checked_sub(bytes)
        .map(|start| start / PAGE_BYTES * PAGE_BYTES)
        .filter(|start| *start >= kernel.end)
        .ok_or(BootError::InitrdTooLarge { bytes })?;
    Ok(BootSegment {
        file: INITRD_FILE,
        offset: 0,
        gpa,
        bytes,
    })
}

fn put_command_line(line: &str, low: &mut LowMemory, header: &mut setup_header) -> Result<(), BootError> {
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
    low.put(COMMAND_LINE, line.as_bytes());
    header.cmd_line_ptr = COMMAND_LINE as u32;
    Ok(())
}

/// The content of [`GDT`].
pub fn gdt() -> Vec<u8> {
    GDT_ENTRIES.map(u64::to_le_bytes).concat()
}

/// Tables for address [`PAGE_TABLES`] that map the first [`IDENTITY_GIB`] one to one by 2 MiB pages.
pub fn page_tables() -> Vec<u8> {
    // Intel SDM volume 3, 4.5: present 0, writable 1, page size 7.
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7 | 0b11;
    let page = |entries: Vec<u64>| {
        let mut bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES as usize), 0);
        bytes
    };
    let pdpt = PAGE_TABLES + PAGE_BYTES;
    let directories = pdpt + PAGE_BYTES;
    let pml4 = page(vec![pdpt | TABLE]);
    let pdpt = (0..IDENTITY_GIB).map(|gib| (directories + gib * PAGE_BYTES) | TABLE);
    let directories = (0..IDENTITY_GIB * 512).map(|index| index << 21 | LARGE_PAGE);
    [pml4, page(pdpt.collect()), page(directories.collect())].concat()
}

/// The smallest file that passes for a kernel, for tests in which another program plays `bulkhead-vcpu`: one HLT.
pub fn halting_kernel() -> Vec<u8> {
    tiny_kernel(&[0xF4])
}

/// An ELF with nothing but these instructions, for tests that run them.
pub fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    let elf = ElfHeader {
        magic: ELF_MAGIC,
        class: 2,
        data: 1,
        machine: 62.into(),
        entry: KERNEL.into(),
        program_headers: (size_of::<ElfHeader>() as u64).into(),
        program_header_bytes: (size_of::<ProgramHeader>() as u16).into(),
        program_header_count: 1.into(),
        ..ElfHeader::new_zeroed()
    };
    let program = ProgramHeader {
        kind: 1.into(),
        offset: ((size_of::<ElfHeader>() + size_of::<ProgramHeader>()) as u64).into(),
        physical_address: KERNEL.into(),
        file_bytes: (code.len() as u64).into(),
        memory_bytes: (code.len() as u64).into(),
        ..ProgramHeader::new_zeroed()
    };
    [elf.as_bytes(), program.as_bytes(), code].concat()
}

#[cfg(test)]
mod tests;
