use super::*;
use proptest::prelude::*;

const BLOCKS: u64 = 1000;

fn disk() -> Disk {
    Disk {
        identity: Identity::new("serial", [1; 16], 0),
        limits: Limits {
            physical_block_bytes: 4096,
            max_transfer_blocks: 2048,
            unmap: Some(UnmapLimits {
                max_blocks: 900,
                max_descriptors: 4,
                granularity_blocks: 8,
            }),
        },
        block_count: BLOCKS,
        mode: ModeState {
            read_only: false,
            write_cache: true,
        },
    }
}

fn run(disk: &Disk, cdb: &[u8]) -> Action {
    disk.on_command(&Command::parse(cdb))
}

fn list(descriptors: &[(u64, u32)]) -> Vec<u8> {
    let bytes = (descriptors.len() * 16) as u16;
    let mut list = (bytes + 6).to_be_bytes().to_vec();
    list.extend_from_slice(&bytes.to_be_bytes());
    list.extend_from_slice(&[0; 4]);
    for (lba, count) in descriptors {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&count.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    list
}

#[test]
fn reads_and_writes_name_bytes_of_the_medium() {
    let disk = disk();
    assert_eq!(
        run(&disk, &[0x28, 0, 0, 0, 0, 8, 0, 0, 16, 0]),
        Action::Read(Extent {
            offset_bytes: 4096,
            len_bytes: 8192
        })
    );
    assert_eq!(
        run(&disk, &[0x2A, 0, 0, 0, 0, 1, 0, 0, 1, 0]),
        Action::Write {
            extent: Extent {
                offset_bytes: 512,
                len_bytes: 512
            },
            durable: false
        }
    );
    assert_eq!(
        run(&disk, &[0x28, 0, 0, 0, 0, 8, 0, 0, 0, 0]),
        Action::Good,
        "no blocks, no work"
    );
}

#[test]
fn the_last_block_is_in_range_and_the_next_is_not() {
    let disk = disk();
    let last = (BLOCKS - 1) as u8 as u32 | ((BLOCKS - 1) as u32 & 0xFF00);
    let mut cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    cdb[2..6].copy_from_slice(&last.to_be_bytes());
    assert!(matches!(run(&disk, &cdb), Action::Read(_)));
    cdb[8] = 2;
    assert_eq!(run(&disk, &cdb), Action::Check(Sense::LBA_OUT_OF_RANGE));
    let mut wrapping = [
        0x88, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 2, 0, 0,
    ];
    assert_eq!(run(&disk, &wrapping), Action::Check(Sense::LBA_OUT_OF_RANGE));
    wrapping[0] = 0x8A;
    assert_eq!(run(&disk, &wrapping), Action::Check(Sense::LBA_OUT_OF_RANGE));
}

#[test]
fn a_transfer_beyond_the_told_limit_is_refused() {
    let mut disk = disk();
    disk.block_count = 1 << 20;
    assert_eq!(
        run(&disk, &[0x28, 0, 0, 0, 0, 0, 0, 8, 1, 0]),
        Action::Check(Sense::INVALID_FIELD_IN_CDB)
    );
    assert!(matches!(
        run(&disk, &[0x28, 0, 0, 0, 0, 0, 0, 8, 0, 0]),
        Action::Read(_)
    ));
}

#[test]
fn a_protected_disk_takes_no_writes() {
    let mut disk = disk();
    disk.mode.read_only = true;
    let refused = Action::Check(Sense::WRITE_PROTECTED);
    assert_eq!(run(&disk, &[0x2A, 0, 0, 0, 0, 1, 0, 0, 1, 0]), refused);
    assert_eq!(run(&disk, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), refused);
    assert!(matches!(
        run(&disk, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0]),
        Action::Read(_)
    ));
    assert_eq!(run(&disk, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Action::Flush);
}

#[test]
fn writes_are_durable_when_forced_and_when_there_is_no_cache() {
    let mut disk = disk();
    let durable = |disk: &Disk, flags| match run(disk, &[0x2A, flags, 0, 0, 0, 1, 0, 0, 1, 0]) {
        Action::Write { durable, .. } => durable,
        other => panic!("{other:?}"),
    };
    assert!(!durable(&disk, 0));
    assert!(durable(&disk, 0x08));
    disk.mode.write_cache = false;
    assert!(durable(&disk, 0));
}

#[test]
fn commands_that_are_not_there_are_refused_as_such() {
    let disk = disk();
    // WRITE SAME: Linux then writes zeroes; ATA pass-through: smartd gives up.
    for opcode in [0x41u8, 0x93, 0x85, 0xA1, 0x5E, 0x5F, 0x89, 0x15, 0x55, 0x2F, 0xA3] {
        assert_eq!(
            run(&disk, &[opcode; 16]),
            Action::Check(Sense::INVALID_OPCODE),
            "{opcode:#x}"
        );
    }
    assert_eq!(run(&disk, &[0x9E, 0x12]), Action::Check(Sense::INVALID_OPCODE));
}

#[test]
fn answers_are_cut_to_what_the_guest_allocated() {
    let disk = disk();
    for allocation in [0u8, 4, 36, 255] {
        let Action::Data(bytes) = run(&disk, &[0x12, 0, 0, 0, allocation, 0]) else {
            panic!("no data")
        };
        assert_eq!(bytes.len(), usize::from(allocation).min(36));
    }
}

#[test]
fn request_sense_has_nothing_to_say() {
    let Action::Data(bytes) = run(&disk(), &[0x03, 0, 0, 0, 252, 0]) else {
        panic!("no data")
    };
    assert_eq!(bytes[..3], [0x70, 0, 0]);
}

#[test]
fn unmap_of_linux_names_one_extent() {
    let disk = disk();
    assert_eq!(
        run(&disk, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]),
        Action::FetchUnmapList { bytes: 24 }
    );
    assert_eq!(
        disk.on_unmap_list(&list(&[(8, 16)])),
        Ok(vec![Extent {
            offset_bytes: 4096,
            len_bytes: 8192
        }])
    );
}

#[test]
fn unmap_lists_beyond_the_limits_are_refused() {
    let disk = disk();
    assert_eq!(
        disk.on_unmap_list(&[0; 7]),
        Err(Sense::PARAMETER_LIST_LENGTH_ERROR)
    );
    assert_eq!(
        disk.on_unmap_list(&list(&[(0, 1); 5])),
        Err(Sense::INVALID_FIELD_IN_PARAMETERS)
    );
    assert_eq!(
        disk.on_unmap_list(&list(&[(0, 900), (0, 1)])),
        Err(Sense::INVALID_FIELD_IN_PARAMETERS)
    );
    assert_eq!(
        disk.on_unmap_list(&list(&[(BLOCKS, 1)])),
        Err(Sense::LBA_OUT_OF_RANGE)
    );
    assert_eq!(
        disk.on_unmap_list(&list(&[(u64::MAX, 2)])),
        Err(Sense::LBA_OUT_OF_RANGE)
    );
    assert_eq!(
        run(&disk, &[0x42, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0]),
        Action::Check(Sense::PARAMETER_LIST_LENGTH_ERROR)
    );
    assert_eq!(
        run(&disk, &[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0]),
        Action::Check(Sense::INVALID_FIELD_IN_CDB)
    );
}

#[test]
fn an_unmap_descriptor_that_is_cut_off_is_ignored() {
    let disk = disk();
    let mut cut = list(&[(1, 1), (2, 1)]);
    cut.truncate(8 + 16 + 15);
    assert_eq!(disk.on_unmap_list(&cut).map(|extents| extents.len()), Ok(1));
    assert_eq!(disk.on_unmap_list(&list(&[])), Ok(vec![]));
    assert_eq!(disk.on_unmap_list(&list(&[(5, 0)])), Ok(vec![]));
}

#[test]
fn the_naa_is_local_stable_and_differs_by_unit() {
    let a = Identity::new("s", [1; 16], 0);
    assert_eq!(a, Identity::new("s", [1; 16], 0));
    assert_eq!(a.naa >> 60, 3);
    assert_ne!(a.naa, Identity::new("s", [1; 16], 1).naa);
    assert_ne!(a.naa, Identity::new("t", [1; 16], 0).naa);
    assert_eq!(Identity::new("a\nb\u{e9}", [0; 16], 0).serial, "a_b_");
}

proptest! {
    #[test]
    fn no_cdb_reaches_beyond_the_medium(cdb in proptest::collection::vec(any::<u8>(), 1..17)) {
        match run(&disk(), &cdb) {
            Action::Read(extent) | Action::Write { extent, .. } => {
                prop_assert!(extent.len_bytes > 0);
                prop_assert!(extent.offset_bytes + extent.len_bytes <= BLOCKS * 512);
            }
            Action::Data(bytes) => prop_assert!(bytes.len() <= 4096),
            Action::FetchUnmapList { bytes } => prop_assert!(bytes <= 8 + 4 * 16),
            Action::Good | Action::Flush | Action::Check(_) => {}
        }
    }

    #[test]
    fn no_unmap_list_reaches_beyond_the_medium(
        list in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..100)
    ) {
        if let Ok(extents) = disk().on_unmap_list(&list) {
            prop_assert!(extents.len() <= 4);
            for extent in extents {
                prop_assert!(extent.offset_bytes + extent.len_bytes <= BLOCKS * 512);
            }
        }
    }

    #[test]
    fn unmap_lists_in_range_are_taken_whole(
        descriptors in proptest::collection::vec((0u64..700, 1u32..225), 1..5)
    ) {
        let extents = disk().on_unmap_list(&list(&descriptors)).unwrap();
        let expected: Vec<_> = descriptors
            .iter()
            .map(|(lba, count)| Extent { offset_bytes: lba * 512, len_bytes: u64::from(*count) * 512 })
            .collect();
        prop_assert_eq!(extents, expected);
    }
}
