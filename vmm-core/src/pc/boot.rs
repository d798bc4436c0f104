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
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const MIB: u64 = 1 << 20;

    /// Guest memory after power-on by a plan.
    fn carried_out(boot: &Boot<'_>, bytes: u64) -> (BootPlan, GuestMemoryMmap) {
        let (plan, data) = plan(boot, &RamLayout::for_size(bytes)).expect("planned");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).expect("memory");
        let data = file(&data);
        for segment in &plan.segments {
            let from = [Some(&data), Some(boot.kernel), boot.initrd][usize::from(segment.file)];
            let mut bytes = vec![0; segment.bytes as usize];
            from.expect("given")
                .read_exact_at(&mut bytes, segment.offset)
                .expect("there");
            memory
                .write_slice(&bytes, GuestAddress(segment.gpa))
                .expect("in RAM");
        }
        (plan, memory)
    }

    fn refused(boot: &Boot<'_>, bytes: u64) -> BootError {
        plan(boot, &RamLayout::for_size(bytes)).expect_err("refused")
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
            initrd,
            command_line,
            vp_count: 2,
        }
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry_with_boot_params_in_place() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 2 << 20, 8192));
        let initrd = file(&[0x5A; 5000]);
        let (plan, memory) = carried_out(&boot(&kernel, Some(&initrd), "console=ttyS0"), 64 * MIB);
        assert_eq!((plan.rip, plan.rsi), (0x100_0200, 0x7000));
        assert_eq!(plan.seed_gpa, 0x8010);

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
    fn the_guest_is_told_of_a_seed_where_power_on_puts_one() {
        let kernel = file(&halting_kernel());
        let (plan, memory) = carried_out(&boot(&kernel, None, ""), 64 * MIB);
        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("in RAM");
        let word = |gpa: u64| memory.read_obj::<u32>(GuestAddress(gpa)).expect("in RAM");
        let data = { params.hdr.setup_data };
        assert_eq!((word(data), word(data + 4)), (0, 0), "no other follows");
        assert_eq!((word(data + 8), word(data + 12)), (9, 48));
        assert_eq!(plan.seed_gpa, data + 16);
    }

    #[test]
    fn an_elf_is_entered_at_its_entry_with_its_segments_in_place() {
        let kernel = file(&halting_kernel());
        let (plan, memory) = carried_out(&boot(&kernel, None, ""), 64 * MIB);
        assert_eq!(plan.rip, 0x100_0000);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(plan.rip)).expect("in RAM"),
            0xF4
        );
        let mut other = halting_kernel();
        other[18] = 183;
        assert!(matches!(
            refused(&boot(&file(&other), None, ""), 64 * MIB),
            BootError::Kernel(_)
        ));
    }

    #[test]
    fn page_tables_map_four_gibibytes_one_to_one() {
        let tables = page_tables();
        let word = |gpa: u64| {
            let at = (gpa - PAGE_TABLES) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().expect("eight bytes"))
        };
        let address: u64 = 0xFEE0_1234;
        let pdpt = word(PAGE_TABLES + (address >> 39) * 8) & !0xFFF;
        let directory = word(pdpt + (address >> 30 & 511) * 8) & !0xFFF;
        assert_eq!(word(directory + (address >> 21 & 511) * 8), 0xFEE0_0083);
    }

    #[test]
    fn a_kernel_or_initrd_that_does_not_fit_is_refused_with_a_reason() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 17 << 20, 4096));
        let error = refused(&boot(&kernel, None, ""), 32 * MIB);
        assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");
        let kernel = file(&bzimage(XLF_KERNEL_64, 4 << 20, 4096));
        let initrd = file(&vec![0; 13 << 20]);
        let error = refused(&boot(&kernel, Some(&initrd), ""), 32 * MIB);
        assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
    }

    #[test]
    fn files_that_are_no_kernel_are_refused() {
        for content in [
            vec![],
            b"#!/bin/sh\n".to_vec(),
            vec![0; 4096],
            b"\x7fELF".to_vec(),
        ] {
            let error = refused(&boot(&file(&content), None, ""), 64 * MIB);
            assert!(matches!(error, BootError::Kernel(_)), "{error}");
        }
        let no_entry = file(&bzimage(0, 1 << 20, 4096));
        let error = refused(&boot(&no_entry, None, ""), 64 * MIB);
        assert!(matches!(error, BootError::No64BitEntry));
    }

    #[test]
    fn a_kernel_that_was_cut_off_is_refused() {
        let mut image = bzimage(XLF_KERNEL_64, 1 << 20, 4096);
        image[0x1F4..0x1F8].copy_from_slice(&(4096_u32 / 16).to_le_bytes());
        carried_out(&boot(&file(&image), None, ""), 64 * MIB);
        for whole in [image, tiny_kernel(&[0xF4; 8])] {
            let cut = file(&whole[..whole.len() - 1]);
            let error = refused(&boot(&cut, None, ""), 64 * MIB);
            assert!(matches!(error, BootError::Incomplete), "{error}");
        }
    }

    #[test]
    fn an_elf_that_would_lie_where_the_boot_data_are_is_refused() {
        let mut low = halting_kernel();
        let address = size_of::<ElfHeader>() + 24;
        low[address..address + 8].copy_from_slice(&BOOT_PARAMS.to_le_bytes());
        let error = refused(&boot(&file(&low), None, ""), 64 * MIB);
        assert!(matches!(error, BootError::Kernel(_)), "{error}");
    }

    #[test]
    fn a_command_line_longer_than_the_kernel_takes_is_refused_not_cut() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 1 << 20, 4096));
        let error = refused(&boot(&kernel, None, &"x".repeat(2048)), 64 * MIB);
        assert!(matches!(
            error,
            BootError::CommandLineTooLong {
                bytes: 2048,
                limit: 2047
            }
        ));
        let error = refused(&boot(&kernel, None, "a\0b"), 64 * MIB);
        assert!(matches!(error, BootError::CommandLineHasNul));
    }
}
