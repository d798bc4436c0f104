//! A journal that an older build left, and what today's journal is to that build. The files are described in
//! `tests/golden/README.md`.

use crate::room::*;
use device_block::storvsp::wire::{Operation, VstorPacket};
use device_block::vsc::{Command, Room};
use nix::sys::uio::pwrite;
use serde::Deserialize;
use vmbus::ipc::codec;
use vmbus::vsc::{ChannelOptions, GuestOptions, state_for_version_1, thaw};
use zerocopy::IntoBytes;

const JOURNAL: &str = include_str!("../golden/journal-1.txt");
const GUEST: &str = include_str!("../golden/guest-1.txt");
const BLOCK_BYTES: usize = 4096;
/// Writes that the older build had not answered.
const LEFT: usize = 4;

#[test]
fn a_server_finishes_what_an_older_build_left() {
    let file = image(1 << 20);
    let guest = GuestOptions {
        ram_bytes: 4 << 20,
        vp_count: 1,
    };
    let disks = vec![("disk".into(), open(file.path()))];
    let mut room = Room::new(program(), &controller(disk_config()), disks, guest).expect("the server starts");
    room.kill().expect("killed");
    // The guest does once more what it did then; it had not read any answer.
    let mut primary = room.open(ChannelOptions::default()).expect("opened");
    let page = room.guest.allocate(1).expect("a page");
    let bytes = pattern(0, 7, BLOCK_BYTES);
    put(&room, page, &bytes);
    let steps: [(Operation, &[u8]); 5] = [
        (Operation::BeginInitialization, &[]),
        (Operation::QueryProtocolVersion, &[2, 6, 0, 0]),
        (Operation::QueryProperties, &[]),
        (Operation::EndInitialization, &[]),
        (Operation::CreateSubChannels, &[2, 0]),
    ];
    for (id, (operation, body)) in (1..).zip(steps) {
        let packet = VstorPacket::with_body(operation, body);
        primary
            .channel
            .send_in_band(id, true, &[packet.as_bytes()])
            .expect("room");
    }
    primary.channel.flush().expect("flushed");
    for block in 0..16u64 {
        let write = Command::write(0, block * BLOCK_BYTES as u64, page, BLOCK_BYTES as u32);
        primary.queue_as(&write, 101 + block).expect("room");
    }
    primary.channel.flush().expect("flushed");
    thaw(GUEST, room.guest.ram_fd()).expect("frozen memory");
    thaw(JOURNAL, room.journal()).expect("frozen memory");
    room.start_successor().expect("the newer server goes on");

    let mut ids = Vec::new();
    primary
        .collect(21, room.deadline(), |id, reply| {
            assert_eq!(reply.packet_status, 0, "transaction {id}");
            ids.push(id);
        })
        .expect("all answers");
    ids.sort_unstable();
    assert_eq!(ids, (1..=5).chain(101..=116).collect::<Vec<u64>>());
    // This disk saw only what was left to do.
    let mut done = 0;
    for block in 0..16 {
        match file_bytes(file.as_file(), block * BLOCK_BYTES as u64, BLOCK_BYTES) {
            found if found == bytes => done += 1,
            found => assert_eq!(found, [0; BLOCK_BYTES]),
        }
    }
    assert_eq!(done, LEFT);
    assert_eq!(room.guest.wait_sub_channels(room.deadline()).expect("offers"), 2);
    let mut second = room
        .open(ChannelOptions {
            sub_index: 1,
            ..ChannelOptions::default()
        })
        .expect("opened");
    assert!(run(&room, &mut second, &Command::read(0, 0, page, 4096)).is_good(4096));
}

/// The types of the build before versions, never to be changed.
#[allow(dead_code)]
#[derive(Debug, PartialEq, Deserialize)]
enum OlderState {
    Closed,
    Began,
    Agreed { version: u16 },
    Described { version: u16, sub_channels: Option<u16> },
    Ready { version: u16, sub_channels: Option<u16> },
}

#[derive(Debug, PartialEq, Deserialize)]
struct OlderAnswered {
    transaction_id: u64,
    request: Vec<u8>,
    reply: Vec<u8>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct OlderSession {
    state: OlderState,
    max_sub_channels: u16,
    last: Option<OlderAnswered>,
}

fn older_session(room: &Room, epoch: u32) -> OlderSession {
    let bytes = state_for_version_1(room.journal(), epoch)
        .expect("the layout of that build")
        .expect("a state");
    codec::decode(&bytes).expect("what the older build decodes")
}

#[test]
fn the_older_build_understands_what_is_saved_now() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open(ChannelOptions::default()).expect("opened");
    let epoch = primary.channel.open_epoch();
    primary.initialize(room.deadline()).expect("initialised");
    let session = older_session(&room, epoch);
    let ready = |sub_channels| OlderState::Ready {
        version: 0x0602,
        sub_channels,
    };
    assert_eq!(session.state, ready(None));
    primary.create_sub_channels(3, room.deadline()).expect("granted");
    let session = older_session(&room, epoch);
    assert_eq!((session.state, session.max_sub_channels), (ready(Some(3)), 3));
    let last = session.last.expect("the last answer");
    let request = VstorPacket::with_body(Operation::CreateSubChannels, &[3, 0]);
    assert_eq!(last.request, request.as_bytes());
    assert_eq!(
        (last.reply.len(), last.transaction_id > 0),
        (request.as_bytes().len(), true)
    );
}

#[test]
fn a_state_from_beyond_the_window_is_refused_before_the_server_is_ready() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).expect("opened").remove(0);
    room.kill().expect("killed");
    // As a version 9 would leave it, with 8 as the oldest that understands it; and then as this version did.
    let versions = |word: u64| pwrite(room.journal(), &word.to_le_bytes(), 0x18).expect("written");
    versions(9 | 8 << 32);
    let refused = room.start_successor().expect_err("it does not fit").to_string();
    assert!(
        refused.contains("version 9, for servers of version 8"),
        "{refused}"
    );
    pwrite(room.journal(), &(2u64 | 1 << 32).to_le_bytes(), 0x18).expect("written");
    pwrite(room.journal(), b"netvsp\0\0", 0x10).expect("written");
    let refused = room.start_successor().expect_err("another device's").to_string();
    assert!(refused.contains("\"netvsp\""), "{refused}");
    pwrite(room.journal(), b"storvsp\0", 0x10).expect("written");
    pwrite(room.journal(), b"BHJ\0\x09\0\0\0", 0).expect("written");
    let refused = room.start_successor().expect_err("another layout's").to_string();
    assert!(refused.contains("layout 9"), "{refused}");
    // Nothing was touched: a server that fits goes on.
    pwrite(room.journal(), b"BHJ\0\x01\0\0\0", 0).expect("written");
    room.start_successor().expect("it fits");
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
}
