//! Maps, layouts, spans and areas: every access checked against a plain byte array, every edge refused.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn map(pages: usize) -> Arc<SharedMap> {
    Arc::new(SharedMap::anonymous("mem-test", pages * 4096).expect("memory"))
}

/// A map whose every byte says where it is.
fn numbered(pages: usize) -> (Arc<SharedMap>, Vec<u8>) {
    let map = map(pages);
    let bytes: Vec<u8> = (0..pages * 4096).map(|i| (i / 4096 * 37 + i) as u8).collect();
    map.write(0, &bytes).expect("in range");
    (map, bytes)
}

#[test]
fn a_file_that_can_shrink_or_is_too_short_is_not_mapped() {
    let fd = sealed_memfd("short", 4096).expect("memfd");
    let error = SharedMap::map(fd.as_fd(), 4097, Access::ReadWrite).expect_err("too short");
    assert_eq!(error.errno, nix::errno::Errno::EOVERFLOW);
    assert!(SharedMap::map(fd.as_fd(), 0, Access::ReadWrite).is_err());

    let unsealed = nix::sys::memfd::memfd_create(c"unsealed", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING)
        .expect("memfd");
    nix::unistd::ftruncate(&unsealed, 8192).expect("grows");
    let error = SharedMap::map(unsealed.as_fd(), 4096, Access::ReadWrite).expect_err("not sealed");
    assert_eq!(error.errno, nix::errno::Errno::EPERM);

    let regular = tempfile::tempfile().expect("a file");
    regular.set_len(8192).expect("grows");
    assert!(
        SharedMap::map(regular.as_fd(), 4096, Access::ReadWrite).is_err(),
        "a regular file has no seals"
    );
}

#[test]
fn a_sealed_memfd_can_be_neither_shrunk_nor_grown_nor_unsealed() {
    let fd = sealed_memfd("sealed", 8192).expect("memfd");
    assert!(nix::unistd::ftruncate(&fd, 4096).is_err());
    assert!(nix::unistd::ftruncate(&fd, 12288).is_err());
    let more = nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_WRITE);
    assert!(nix::fcntl::fcntl(&fd, more).is_err());
}

#[test]
fn two_maps_of_one_file_see_each_other() {
    let fd = sealed_memfd("shared", 4096).expect("memfd");
    let writer = SharedMap::map(fd.as_fd(), 4096, Access::ReadWrite).expect("maps");
    let reader = SharedMap::map(fd.as_fd(), 4096, Access::ReadOnly).expect("maps");
    writer
        .store_u32(8, 0xAABBCCDD, Ordering::Release)
        .expect("in range");
    assert_eq!(reader.load_u32(8, Ordering::Acquire), Ok(0xAABBCCDD));
    let mut bytes = [0; 4];
    reader.read(8, &mut bytes).expect("in range");
    assert_eq!(bytes, [0xDD, 0xCC, 0xBB, 0xAA], "words are little-endian");
    assert_eq!(writer.fetch_or_u32(8, 0x22, Ordering::SeqCst), Ok(0xAABBCCDD));
    assert_eq!(writer.fetch_and_u32(8, 0xFF, Ordering::SeqCst), Ok(0xAABBCCFF));
    assert_eq!(writer.swap_u32(8, 5, Ordering::SeqCst), Ok(0xFF));
    assert_eq!(writer.compare_exchange_u32(8, 4, 6, Ordering::SeqCst), Ok(Err(5)));
    assert_eq!(writer.compare_exchange_u32(8, 5, 6, Ordering::SeqCst), Ok(Ok(5)));
    writer
        .store_u64(16, 1 << 40, Ordering::Release)
        .expect("in range");
    assert_eq!(writer.fetch_or_u64(16, 1, Ordering::SeqCst), Ok(1 << 40));
    assert_eq!(reader.load_u64(16, Ordering::Acquire), Ok((1 << 40) | 1));
}

#[test]
#[should_panic(expected = "store through a read-only map")]
fn a_store_through_a_read_only_map_is_a_mistake_of_ours() {
    let fd = sealed_memfd("shared", 4096).expect("memfd");
    let reader = SharedMap::map(fd.as_fd(), 4096, Access::ReadOnly).expect("maps");
    reader
        .store_u32(0, 1, Ordering::Relaxed)
        .expect("never comes here");
}

#[test]
fn words_out_of_place_are_refused() {
    let map = map(1);
    for offset in [1, 2, 3, 4093, 4096, 4097, u64::MAX, u64::MAX - 3] {
        assert!(
            map.load_u32(offset, Ordering::Relaxed).is_err(),
            "u32 at {offset:#x}"
        );
        assert!(
            map.store_u32(offset, 0, Ordering::Relaxed).is_err(),
            "u32 at {offset:#x}"
        );
    }
    for offset in [4, 4092, 4096, u64::MAX, u64::MAX - 7] {
        assert!(
            map.load_u64(offset, Ordering::Relaxed).is_err(),
            "u64 at {offset:#x}"
        );
    }
}

fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..12300, 4090u64..4100, 8185u64..8200, any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn copies_agree_with_a_byte_array_or_are_refused(offset in edge(), len in 0usize..9000) {
        let (map, bytes) = numbered(3);
        let expected = usize::try_from(offset).ok().and_then(|at| bytes.get(at..at.checked_add(len)?));
        let mut out = vec![0xEE; len];
        match (map.read(offset, &mut out), expected) {
            (Ok(()), Some(expected)) => prop_assert_eq!(&out[..], expected),
            (Err(_), None) => prop_assert!(out.iter().all(|byte| *byte == 0xEE)),
            (result, expected) => prop_assert!(false, "{result:?} {}", expected.is_some()),
        }
        prop_assert_eq!(map.write(offset, &out).is_ok(), expected.is_some());
        prop_assert_eq!(map.fill(offset, len, 1).is_ok(), expected.is_some());
        prop_assert_eq!(map.copy_to_map(offset, &map, 0, len).is_ok(), expected.is_some() && len <= bytes.len());
    }

    #[test]
    fn a_paged_area_agrees_with_the_pages_laid_end_to_end(
        pages in prop_oneof![vec(0u64..6, 1..6), Just(vec![2, 3, 4]), Just(vec![5])],
        start in 0u64..6000, len in 0u64..20000, cut in (0u64..9000, 0u64..9000), access in (edge(), 0usize..9000),
    ) {
        let (map, bytes) = numbered(6);
        let offsets: Vec<u64> = pages.iter().map(|page| page * PAGE_BYTES).collect();
        let flat: Vec<u8> = pages.iter().flat_map(|page| &bytes[*page as usize * 4096..][..4096]).copied().collect();
        let area = PagedArea::new(map.clone(), offsets, start, len);
        let flat = flat.get(start as usize..(start + len) as usize);
        prop_assert_eq!(area.is_ok(), flat.is_some());
        let (Ok(area), Some(flat)) = (area, flat) else { return Ok(()) };

        for (area, flat) in [
            (Some(area.clone()), Some(flat)),
            (area.slice(cut.0, cut.1).ok(), flat.get(cut.0 as usize..(cut.0 + cut.1) as usize)),
        ] {
            prop_assert_eq!(area.is_some(), flat.is_some());
            let (Some(area), Some(flat)) = (area, flat) else { continue };
            prop_assert_eq!(area.len(), flat.len() as u64);
            let (at, len) = access;
            let expected = usize::try_from(at).ok().and_then(|at| flat.get(at..at.checked_add(len)?));
            let mut out = vec![0; len];
            prop_assert_eq!(area.read(at, &mut out).is_ok(), expected.is_some());
            let spans = area.spans(at, len);
            prop_assert_eq!(spans.is_ok(), expected.is_some());
            if let (Ok(spans), Some(expected)) = (spans, expected) {
                prop_assert_eq!(&out[..], expected);
                let mut by_spans = vec![0; len];
                spans.copy_to(&mut by_spans).expect("as long as the spans");
                prop_assert_eq!(&by_spans[..], expected);
            }
            if let Ok(word) = area.load_u32(at, Ordering::Relaxed) {
                prop_assert_eq!(&word.to_le_bytes()[..], &flat[at as usize..at as usize + 4]);
            }
        }
    }

    #[test]
    fn spans_agree_with_the_bytes_they_name(
        pieces in vec((0u64..12288, 0u32..3000), 0..12), part in (0usize..12000, 0usize..12000),
    ) {
        let (map, bytes) = numbered(3);
        let mut spans = GuestSpans::new(map.clone());
        let mut flat = Vec::new();
        for (offset, len) in pieces {
            let inside = bytes.get(offset as usize..offset as usize + len as usize);
            prop_assert_eq!(spans.push(offset, len).is_ok(), inside.is_some());
            flat.extend_from_slice(inside.unwrap_or_default());
        }
        prop_assert_eq!(spans.len(), flat.len());
        prop_assert_eq!(spans.iter().map(|(_, len)| len as usize).sum::<usize>(), flat.len());
        let mut out = vec![0; flat.len()];
        spans.copy_to(&mut out).expect("as long as the spans");
        prop_assert_eq!(&out, &flat);

        let expected = flat.get(part.0..part.0 + part.1);
        let slice = spans.slice(part.0, part.1);
        prop_assert_eq!(slice.is_ok(), expected.is_some());
        let mut out = vec![0; part.1];
        prop_assert_eq!(spans.copy_to_at(part.0, &mut out).is_ok(), expected.is_some());
        prop_assert_eq!(spans.zero(part.0, part.1).is_ok(), expected.is_some());
        if let (Ok(slice), Some(expected)) = (slice, expected) {
            prop_assert_eq!(slice.len(), expected.len());
            prop_assert_eq!(&out[..], expected);
            slice.copy_to(&mut out).expect("as long as the slice");
            prop_assert!(out.iter().all(|byte| *byte == 0), "zeroed through the spans");
        }
        spans.clear();
        prop_assert!(spans.is_empty() && spans.piece_count() == 0);
    }

    #[test]
    fn a_layout_that_validates_never_leads_outside_the_file(
        regions in vec((0u64..64, 0u64..16, 0u64..64), 0..5), gpa in 0u64..400_000, len in 0u64..70_000, wild in any::<bool>(),
    ) {
        let page = |n: u64| if wild && n % 7 == 3 { u64::MAX - n } else { n * PAGE_BYTES };
        let layout = RamLayout {
            regions: regions
                .iter()
                .map(|(gpa, len, offset)| RamRegion { gpa: page(*gpa), len: page(*len), file_offset: page(*offset) })
                .collect(),
        };
        let file_len = 64 * PAGE_BYTES;
        if layout.validate(file_len).is_ok() {
            if let Some(offset) = layout.offset_of(Gpa(gpa), len) {
                prop_assert!(offset + len <= file_len);
            }
            prop_assert!(layout.offset_of(Gpa(u64::MAX), 2).is_none());
            prop_assert!(layout.offset_of(Gpa(gpa), u64::MAX).is_none());
        }
    }
}

#[test]
fn ram_beyond_three_gib_continues_at_four() {
    let small = RamLayout::for_size(256 << 20);
    assert_eq!(
        small.regions,
        [RamRegion {
            gpa: 0,
            len: 256 << 20,
            file_offset: 0
        }]
    );
    let big = RamLayout::for_size(8 << 30);
    assert_eq!(big.total_bytes(), 8 << 30);
    assert_eq!(big.validate(8 << 30), Ok(()));
    assert_eq!(big.validate((8 << 30) - 1), Err(LayoutFault::BeyondFile(1)));
    assert_eq!(big.offset_of(Gpa((3 << 30) - 1), 1), Some((3 << 30) - 1));
    assert_eq!(big.offset_of(Gpa((3 << 30) - 1), 2), None);
    assert_eq!(big.offset_of(Gpa(3 << 30), 1), None);
    assert_eq!(big.offset_of(Gpa(4 << 30), 1), Some(3 << 30));
    assert_eq!(big.offset_of(Gpa((9 << 30) - 1), 1), Some((8 << 30) - 1));
    assert_eq!(big.offset_of(Gpa((9 << 30) - 1), 2), None);
}

#[test]
fn layouts_that_overlap_or_overflow_are_refused() {
    let region = |gpa, len, file_offset| RamRegion {
        gpa,
        len,
        file_offset,
    };
    let of = |regions: &[RamRegion]| {
        RamLayout {
            regions: regions.to_vec(),
        }
        .validate(1 << 20)
    };
    assert_eq!(of(&[]), Err(LayoutFault::RegionCount(0)));
    assert_eq!(
        of(&vec![region(0, 4096, 0); 65]),
        Err(LayoutFault::RegionCount(65))
    );
    assert_eq!(of(&[region(0, 0, 0)]), Err(LayoutFault::NotWholePages(0)));
    assert_eq!(of(&[region(1, 4096, 0)]), Err(LayoutFault::NotWholePages(0)));
    assert_eq!(
        of(&[region(0, 8192, 0), region(4096, 4096, 8192)]),
        Err(LayoutFault::OutOfOrder(1))
    );
    assert_eq!(
        of(&[region(8192, 4096, 0), region(0, 4096, 4096)]),
        Err(LayoutFault::OutOfOrder(1))
    );
    assert_eq!(
        of(&[region(u64::MAX - 4095, 8192, 0)]),
        Err(LayoutFault::OutOfOrder(0))
    );
    assert_eq!(
        of(&[region(0, 4096, u64::MAX - 4095)]),
        Err(LayoutFault::BeyondFile(0))
    );
    assert_eq!(of(&[region(0, 4096, (1 << 20) - 4096)]), Ok(()));
}

#[test]
fn vectored_file_io_goes_straight_into_the_pieces() {
    let (map, bytes) = numbered(3);
    let mut spans = GuestSpans::new(map.clone());
    for (offset, len) in [(100, 50), (5000, 4000), (0, 7)] {
        spans.push(offset, len).expect("in range");
    }
    let flat = [&bytes[100..150], &bytes[5000..9000], &bytes[..7]].concat();
    let file = tempfile::tempfile().expect("a file");
    assert_eq!(spans.pwritev_to(file.as_fd(), 3), Ok(flat.len()));
    map.fill(0, 3 * 4096, 0).expect("in range");
    assert_eq!(spans.preadv_from(file.as_fd(), 3), Ok(flat.len()));
    let mut out = vec![0; flat.len()];
    spans.copy_to(&mut out).expect("as long");
    assert_eq!(out, flat);
    assert_eq!(
        spans.preadv_from(file.as_fd(), 4000),
        Ok(60),
        "short at the end of the file"
    );
    assert!(spans.preadv_from(file.as_fd(), u64::MAX).is_err());

    // One call is one datagram, with a private prefix before the guest's bytes.
    let (left, right) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        None,
        nix::sys::socket::SockFlag::empty(),
    )
    .expect("sockets");
    spans.copy_from(&flat).expect("as long");
    assert_eq!(spans.writev_to(left.as_fd(), b"head"), Ok(4 + flat.len()));
    spans.zero(0, flat.len()).expect("in range");
    let mut prefix = [0; 4];
    assert_eq!(spans.readv_from(right.as_fd(), &mut prefix), Ok(4 + flat.len()));
    assert_eq!(&prefix, b"head");
    spans.copy_to(&mut out).expect("as long");
    assert_eq!(out, flat);
}

#[test]
fn lists_longer_than_the_kernel_takes_are_refused_and_their_slices_accepted() {
    let map = map(1);
    let mut spans = GuestSpans::new(map);
    for i in 0..MAX_PIECES as u64 + 1 {
        spans.push(i % 2 * 2048, 1).expect("in range");
    }
    let file = tempfile::tempfile().expect("a file");
    let error = spans.pwritev_to(file.as_fd(), 0).expect_err("too many");
    assert_eq!(error.errno, nix::errno::Errno::EINVAL);
    let part = spans.slice(0, MAX_PIECES).expect("in range");
    assert_eq!(part.pwritev_to(file.as_fd(), 0), Ok(MAX_PIECES));
    let mut uring = Uring::new(4).expect("io_uring");
    let result = uring.read(file.as_fd().into(), &spans, 0, 0);
    assert_eq!(result, Err(UringError::TooManyPieces(MAX_PIECES + 1)));
    assert_eq!(uring.free_slots(), 4);
}

#[test]
fn alignment_for_direct_io_looks_at_every_piece() {
    let map = map(2);
    let mut spans = GuestSpans::new(map);
    spans.push(512, 1024).expect("in range");
    spans.push(4096, 512).expect("in range");
    assert!(spans.is_aligned(512) && !spans.is_aligned(1024));
    spans.push(5000, 512).expect("in range");
    assert!(!spans.is_aligned(512) && spans.is_aligned(8));
}
