//! A guest that breaks the rules hurts one channel: its own.

use crate::room::*;
use device_block::storvsp::wire::{Operation, VstorPacket};
use device_block::vsc::{Command, Data, Initiator, Room};
use vmbus::mem::Gpa;
use vmbus::vsc::ChannelOptions;
use vmbus::wire::{OutPacket, PacketKind};
use zerocopy::IntoBytes;

/// Bytes 0..8 of a ring's control page: write index, read index (Linux 6.1 include/linux/hyperv.h).
const WRITE_INDEX: u64 = 0;

/// A room with two channels, of which `misbehave` breaks the second.
/// It is told where the channel's ring to the host begins: the guest hands out its pages in order.
fn breaks(misbehave: impl FnOnce(&mut Room, &mut Initiator, Gpa)) -> String {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut channels = room.open_all(0).unwrap();
    channels[0].create_sub_channels(1, room.deadline()).unwrap();
    room.guest.wait_sub_channels(room.deadline()).unwrap();
    let marker = room.guest.allocate(1).unwrap();
    let mut second = room
        .open(ChannelOptions {
            sub_index: 1,
            ..ChannelOptions::default()
        })
        .unwrap();
    misbehave(&mut room, &mut second, Gpa(marker.0 + 4096));
    let why = room.guest.wait_broken(&second.channel, room.deadline()).unwrap();
    // The other channel goes on, and the broken one can be closed and opened again.
    assert!(run(&room, &mut channels[0], &Command::flush(0)).is_good(0));
    room.guest
        .close_channel(&second.channel, room.deadline())
        .unwrap();
    let mut again = Initiator::new(room.guest.reopen_channel(&second.channel).unwrap());
    assert!(run(&room, &mut again, &Command::flush(0)).is_good(0));
    why
}

#[test]
fn a_write_index_out_of_the_ring_breaks_the_channel() {
    for index in [0xFFFF_FFF8u32, 4, 1 << 20] {
        let why = breaks(|room, channel, ring| {
            put(room, Gpa(ring.0 + WRITE_INDEX), &index.to_le_bytes());
            channel.channel.kick().unwrap();
        });
        assert!(!why.is_empty());
    }
}

#[test]
fn a_packet_too_short_for_storvsp_breaks_the_channel() {
    let why = breaks(|_, channel, _| {
        channel
            .channel
            .send_in_band(1, true, &[&[3, 0, 0, 0, 0, 0, 0, 0]])
            .unwrap();
        channel.channel.flush().unwrap();
    });
    assert!(why.contains("8 bytes"), "{why}");
}

#[test]
fn a_packet_of_another_kind_breaks_the_channel() {
    let why = breaks(|_, channel, _| {
        let packet = OutPacket {
            kind: PacketKind::TRANSFER_PAGES,
            transaction_id: 1,
            completion_requested: true,
            extra_header: &[0; 16],
            payload: &[&[0; 64]],
        };
        channel.channel.send(&packet).unwrap();
        channel.channel.flush().unwrap();
    });
    assert!(why.contains("type 7"), "{why}");
}

#[test]
fn ranges_that_are_not_all_there_break_the_channel() {
    breaks(|_, channel, _| {
        let packet = OutPacket {
            kind: PacketKind::GPA_DIRECT,
            transaction_id: 1,
            completion_requested: true,
            extra_header: &[0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF],
            payload: &[&[0; 64]],
        };
        channel.channel.send(&packet).unwrap();
        channel.channel.flush().unwrap();
    });
}

#[test]
fn requests_that_make_no_sense_are_answered_and_hurt_nothing() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    let mut cases = vec![
        // Pages that are no RAM, or beyond the end of it.
        Command::read(0, 0, Gpa(1 << 40), 4096),
        Command::read(0, 0, Gpa((64 << 20) - 2048), 4096),
        Command::read(0, 0, Gpa(!4095), 4096),
        // A direction that contradicts the command.
        Command {
            data: Data::FromGuest(page, 4096),
            ..Command::read(0, 0, page, 4096)
        },
        Command {
            data: Data::None,
            ..Command::write(0, 0, page, 4096)
        },
        // Fewer bytes than the command names.
        Command {
            data: Data::ToGuest(page, 512),
            ..Command::read(0, 0, page, 4096)
        },
    ];
    let mut long_cdb = Command::flush(0);
    long_cdb.cdb = vec![0x35; 17];
    cases.push(long_cdb);
    for command in &cases {
        let reply = run(&room, &mut primary, command);
        assert_eq!(
            (reply.packet_status, reply.srb_status, reply.bytes),
            (0, 0x06, 0),
            "{command:?}"
        );
    }
    // More page numbers than any transfer has.
    let big = room.guest.allocate(400).unwrap();
    let reply = run(&room, &mut primary, &Command::read(0, 0, big, 400 * 4096));
    assert_eq!(reply.srb_status, 0x06);
    // Operations that do not exist, or go the other way.
    for operation in [1u32, 2, 11, 12, 14, 0, u32::MAX] {
        let packet = VstorPacket::with_body(Operation::from(operation), &[0xFF; 52]);
        let answer = primary.call(&packet, room.deadline()).unwrap();
        assert_ne!(answer.header.status.get(), 0, "{operation}");
    }
    // A packet that wants no answer gets none.
    let packet = Command::flush(0).packet();
    primary
        .channel
        .send_in_band(5, false, &[packet.as_bytes()])
        .unwrap();
    assert!(run(&room, &mut primary, &Command::read(0, 0, page, 4096)).is_good(4096));
}

#[test]
fn one_id_used_twice_is_answered_twice() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    for _ in 0..4 {
        primary.queue_as(&Command::read(0, 0, page, 4096), 42).unwrap();
    }
    primary.channel.flush().unwrap();
    let mut ids = Vec::new();
    primary
        .collect(4, room.deadline(), |id, reply| {
            ids.push((id, reply.is_good(4096)))
        })
        .unwrap();
    assert_eq!(ids, [(42, true); 4]);
}

#[test]
fn random_packets_never_stop_the_server() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let channels = room.open_all(1).unwrap();
    let mut channels = channels.into_iter();
    let (mut primary, mut victim) = (channels.next().unwrap(), channels.next().unwrap());
    let mut seed = 0x5EED_0001u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut broken = 0;
    for round in 0..300u64 {
        // Mostly well-formed SRBs with random contents, now and then anything at all.
        let mut bytes = [0u8; 64];
        for byte in &mut bytes {
            *byte = next() as u8;
        }
        if round % 4 != 0 {
            bytes[..12].copy_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            bytes[12 + 5..12 + 8].copy_from_slice(&[0, 0, (next() % 2) as u8]);
            bytes[12 + 8] = 1 + (next() % 16) as u8;
        }
        let kind = [6u16, 9, 6, 9, (next() % 16) as u16][(next() % 5) as usize];
        let header: Vec<u8> = (0..8 * (next() % 6)).map(|_| (next() % 5) as u8).collect();
        let packet = OutPacket {
            kind: PacketKind(kind),
            transaction_id: next(),
            completion_requested: next() % 8 != 0,
            extra_header: &header,
            payload: &[&bytes[..if round % 16 == 0 {
                (next() % 64) as usize
            } else {
                64
            }]],
        };
        if victim.channel.send(&packet).is_ok() {
            victim.channel.flush().unwrap();
        }
        // The server's loop turns, and the neighbour is served.
        assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
        let mut is_broken = false;
        while let Some(message) = room.guest.next_message().unwrap() {
            is_broken |= format!("{message:?}").starts_with("ChannelBroken");
        }
        if is_broken {
            broken += 1;
            room.guest
                .close_channel(&victim.channel, room.deadline())
                .unwrap();
            victim = Initiator::new(room.guest.reopen_channel(&victim.channel).unwrap());
        } else if let Err(error) = victim.collect_ready(1000, |_, _| {}) {
            panic!("the server broke a rule: {error}");
        }
    }
    assert!(broken > 0, "some of it must have been against the rules");
}
