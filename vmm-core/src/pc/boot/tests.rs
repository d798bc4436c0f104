use super::*;
use proptest::prelude::*;
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

proptest! {
    #[test]
    fn whatever_is_written_over_a_kernel_what_is_copied_lies_in_its_file_and_in_ram(
        is_elf in any::<bool>(),
        words in prop::collection::vec((0_usize..0x280, prop_oneof![0_u64..0x1000, any::<u64>()]), 0..4),
        cut in 0_usize..200,
    ) {
        let mut image = match is_elf {
            true => tiny_kernel(&[0xF4; 600]),
            false => bzimage(XLF_KERNEL_64, 1 << 20, 4096),
        };
        for (at, word) in words {
            if let Some(bytes) = image.get_mut(at..at + 8) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        image.truncate(image.len() - cut);
        let kernel = file(&image);
        if let Ok((plan, data)) = plan(&boot(&kernel, None, "quiet"), &RamLayout::for_size(32 * MIB)) {
            for segment in &plan.segments {
                let is_kernel = segment.file == KERNEL_FILE;
                let length = if is_kernel { image.len() } else { data.len() } as u64;
                let ends_within = |start: u64, limit: u64| {
                    start.checked_add(segment.bytes).is_some_and(|end| end <= limit)
                };
                prop_assert!(ends_within(segment.offset, length), "{:?}", segment);
                prop_assert!(ends_within(segment.gpa, 32 * MIB), "{:?}", segment);
                prop_assert!(!is_kernel || segment.gpa >= HIGH_MEMORY, "{:?}", segment);
            }
        }
    }
}
