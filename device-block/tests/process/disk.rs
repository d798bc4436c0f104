//! Data: what is written is read, on all kinds of disks.

use crate::room::*;
use device_block::config::{CacheMode, DiskConfig, DiskKind};
use device_block::vsc::{Command, Initiator, Room};
use std::os::fd::OwnedFd;
use tempfile::NamedTempFile;
use vmbus::mem::{Gpa, sealed_memfd};

const DEPTH: usize = 32;
const PIECE: u32 = 16384;

/// Writes every piece of `total` bytes with a pattern, `DEPTH` deep on each of the channels, then reads and compares.
fn write_and_verify(room: &mut Room, channels: &mut [Initiator], total: u64, round: u64) {
    let pieces = total / u64::from(PIECE);
    for reading in [false, true] {
        let share = pieces / channels.len() as u64;
        let slots = DEPTH.min(share as usize);
        let mut next = 0u64;
        for initiator in channels.iter_mut() {
            let area = room.guest.allocate(slots * PIECE as usize / 4096).unwrap();
            let (first, end) = (next, next + share);
            next = end;
            let mut issued = first;
            let mut busy: Vec<Option<u64>> = vec![None; slots];
            let mut done = first;
            while done < end {
                for (slot, piece) in busy.iter_mut().enumerate() {
                    if piece.is_some() || issued == end {
                        continue;
                    }
                    let gpa = Gpa(area.0 + slot as u64 * u64::from(PIECE));
                    let offset = issued * u64::from(PIECE);
                    let command = if reading {
                        put(room, gpa, &vec![0xAA; PIECE as usize]);
                        Command::read(0, offset, gpa, PIECE)
                    } else {
                        put(room, gpa, &pattern(offset, round, PIECE as usize));
                        Command::write(0, offset, gpa, PIECE)
                    };
                    initiator.queue_as(&command, slot as u64 + 1).unwrap();
                    *piece = Some(issued);
                    issued += 1;
                }
                initiator.channel.flush().unwrap();
                let mut finished = Vec::new();
                let deadline = room.deadline();
                initiator
                    .collect(1, deadline, |id, reply| {
                        assert!(reply.is_good(PIECE), "{reply:?}");
                        finished.push(id as usize - 1);
                    })
                    .unwrap();
                initiator
                    .collect_ready(DEPTH, |id, reply| {
                        assert!(reply.is_good(PIECE), "{reply:?}");
                        finished.push(id as usize - 1);
                    })
                    .unwrap();
                for slot in finished {
                    let piece = busy[slot].take().expect("answered once");
                    if reading {
                        let gpa = Gpa(area.0 + slot as u64 * u64::from(PIECE));
                        let offset = piece * u64::from(PIECE);
                        assert!(get(room, gpa, PIECE as usize) == pattern(offset, round, PIECE as usize));
                    }
                    done += 1;
                }
            }
            room.guest.free(area, slots * PIECE as usize / 4096);
        }
    }
}

fn serve_all(disk: DiskConfig, fd: OwnedFd) {
    let mut room = room_with(disk, fd);
    let mut channels = room.open_all(3).unwrap();
    write_and_verify(&mut room, &mut channels, 8 << 20, 1);
    assert!(run(&room, &mut channels[1], &Command::flush(0)).is_good(0));
    for initiator in &channels {
        let counters = initiator.channel.counters();
        assert!(
            counters.flags > 0 || counters.interrupts == 0,
            "the first interrupt comes with the channel's flag: {counters:?}"
        );
    }
}

#[test]
fn a_file_keeps_what_was_written_at_depth_32_over_four_channels() {
    let file = image(8 << 20);
    serve_all(disk_config(), open(file.path()));
    assert!(file_bytes(file.as_file(), 0, PIECE as usize) == pattern(0, 1, PIECE as usize));
    let last = (8 << 20) - u64::from(PIECE);
    assert!(file_bytes(file.as_file(), last, PIECE as usize) == pattern(last, 1, PIECE as usize));
}

#[test]
fn a_file_served_around_the_page_cache_keeps_what_was_written() {
    let file = image(8 << 20);
    serve_all(
        DiskConfig {
            direct: true,
            ..disk_config()
        },
        open(file.path()),
    );
    assert!(file_bytes(file.as_file(), 65536, 512) == pattern(65536, 1, 512));
}

#[test]
fn a_disk_without_cache_keeps_what_was_written() {
    let file = image(8 << 20);
    serve_all(
        DiskConfig {
            cache: CacheMode::Writethrough,
            ..disk_config()
        },
        open(file.path()),
    );
}

#[test]
fn a_memory_disk_keeps_what_was_written() {
    let disk = DiskConfig {
        kind: DiskKind::Memory,
        ..disk_config()
    };
    serve_all(disk, sealed_memfd("disk", 8 << 20).unwrap());
}

/// READ and WRITE of single blocks into the middle of pages, which direct I/O cannot do without help.
fn misaligned(direct: bool) {
    let file: NamedTempFile = image(1 << 20);
    let mut room = room_with(
        DiskConfig {
            direct,
            ..disk_config()
        },
        open(file.path()),
    );
    let mut primary = room.open_all(0).unwrap().remove(0);
    let pages = room.guest.allocate(4).unwrap();
    for (offset, shift, len) in [
        (512u64, 4u64, 512u32),
        (1024, 100, 4096),
        (8192, 1, 8192),
        (512, 512, 1024),
    ] {
        let gpa = Gpa(pages.0 + shift);
        let bytes = pattern(offset, shift, len as usize);
        put(&room, gpa, &bytes);
        assert!(run(&room, &mut primary, &Command::write(0, offset, gpa, len)).is_good(len));
        assert!(file_bytes(file.as_file(), offset, len as usize) == bytes);
        put(&room, pages, &[0xEE; 16384]);
        assert!(run(&room, &mut primary, &Command::read(0, offset, gpa, len)).is_good(len));
        assert!(get(&room, gpa, len as usize) == bytes);
        assert_eq!(get(&room, Gpa(gpa.0 - 1), 1), [0xEE], "nothing before it");
        assert_eq!(
            get(&room, Gpa(gpa.0 + u64::from(len)), 1),
            [0xEE],
            "nothing behind it"
        );
    }
}

#[test]
fn any_guest_memory_will_do() {
    misaligned(false);
}

#[test]
fn any_guest_memory_will_do_around_the_page_cache() {
    misaligned(true);
}

#[test]
fn the_largest_transfer_goes_through_in_one_piece() {
    let file = image(4 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let data = room.guest.allocate(257).unwrap();
    let gpa = Gpa(data.0 + 512);
    let bytes = pattern(3, 3, 1 << 20);
    put(&room, gpa, &bytes);
    assert!(run(&room, &mut primary, &Command::write(0, 1 << 20, gpa, 1 << 20)).is_good(1 << 20));
    put(&room, gpa, &vec![0; 1 << 20]);
    assert!(run(&room, &mut primary, &Command::read(0, 1 << 20, gpa, 1 << 20)).is_good(1 << 20));
    assert!(get(&room, gpa, 1 << 20) == bytes);
}

#[test]
fn unmapped_blocks_read_zero_and_give_room_back() {
    use std::os::unix::fs::MetadataExt;
    let file = image(8 << 20);
    let mut room = room(&file);
    let mut channels = room.open_all(0).unwrap();
    write_and_verify(&mut room, &mut channels, 8 << 20, 5);
    let primary = &mut channels[0];
    assert!(run(&room, primary, &Command::flush(0)).is_good(0));
    let before = file.as_file().metadata().unwrap().blocks();
    let page = room.guest.allocate(1).unwrap();
    let list = Command::unmap_list(&[(1 << 20, 1 << 20), (4 << 20, 2 << 20)]);
    put(&room, page, &list);
    assert!(run(&room, primary, &Command::unmap(0, page, list.len() as u16)).is_good(0));
    assert!(run(&room, primary, &Command::read(0, 5 << 20, page, 4096)).is_good(4096));
    assert_eq!(get(&room, page, 4096), vec![0; 4096]);
    assert!(run(&room, primary, &Command::read(0, 3 << 20, page, 4096)).is_good(4096));
    assert!(get(&room, page, 4096) == pattern(3 << 20, 5, PIECE as usize)[..4096]);
    assert!(file.as_file().metadata().unwrap().blocks() < before);
}

#[test]
fn forced_writes_and_flushes_are_answered() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    assert!(run(&room, &mut primary, &Command::write_durable(0, 4096, page, 4096)).is_good(4096));
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
}

#[test]
fn more_requests_than_fit_at_once_are_all_answered() {
    let file = image(16 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    // As many as the ring takes, again and again, without a look at the answers in between.
    let (mut sent, mut answered) = (0u64, 0u64);
    while answered < 5000 {
        while sent < 5000 && sent - answered < 1000 {
            let command = Command::read(0, sent % 4096 * 4096, page, 4096);
            if primary.queue_as(&command, sent + 1).is_err() {
                break;
            }
            sent += 1;
        }
        primary.channel.flush().unwrap();
        let deadline = room.deadline();
        primary
            .collect(1, deadline, |_, reply| assert!(reply.is_good(4096), "{reply:?}"))
            .unwrap();
        answered += 1;
        answered += primary
            .collect_ready(2000, |_, reply| assert!(reply.is_good(4096), "{reply:?}"))
            .unwrap() as u64;
    }
}
