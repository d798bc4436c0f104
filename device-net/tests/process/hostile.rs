//! Guests and networks that break the rules: counted, answered or cut off; the server goes on.

use crate::network::{from_guest, room, running, to_guest};
use device_net::netvsp::wire::{GuestMessage, RndisKind, SectionClaim};
use device_net::rndis::packet::{FrameRequests, SegmentRequest, emit_guest_header};
use device_net::vsc::{Driver, DriverOptions, Form, Room};
use vmbus::mem::Gpa;

fn faults(room: &mut Room) -> u64 {
    room.inspect("guest/faults")
        .expect("a number")
        .parse()
        .expect("a number")
}

/// The NIC still works.
fn still_works(room: &Room, network: &mut crate::network::Network, driver: &mut Driver) {
    driver.send(0, &from_guest(77, 90), Form::Section).expect("sent");
    assert_eq!(network.take(), from_guest(77, 90));
    network.put(&to_guest(78, 90));
    let frames = driver.receive(0, 1, room.deadline()).expect("received");
    assert_eq!(frames[0].bytes, to_guest(78, 90));
    driver.wait_sent(room.deadline()).expect("completed");
}

#[test]
fn completions_that_nobody_waits_for_free_nothing() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    let free = driver.suballocation_count.to_string();
    let answer = GuestMessage::RndisPacketComplete { status: 1 }.emit();
    for id in [0, 1, 2, 1 << 32, (1 << 32) | 1, (2 << 32) | 1, u64::MAX] {
        driver.channels[0].complete(id, &[&answer]).expect("staged");
        driver.channels[0].complete(id, &[&answer]).expect("staged");
    }
    driver.flush(0).expect("flushed");
    still_works(&room, &mut network, &mut driver);
    assert!(faults(&mut room) >= 13);
    let found = room.inspect_until("receive-buffer/free", &free);
    assert_eq!(found.expect("a number"), free);
}

#[test]
fn sections_and_pages_outside_are_refused_with_a_status() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    let deadline = room.deadline();
    for claim in [
        SectionClaim {
            index: 170,
            used_bytes: 100,
        },
        SectionClaim {
            index: 0xFFFF_FFFE,
            used_bytes: 100,
        },
        SectionClaim {
            index: 0,
            used_bytes: 6145,
        },
    ] {
        let message = GuestMessage::RndisPacket {
            kind: RndisKind::Data,
            section: Some(claim),
        };
        let payload = driver.channels[0]
            .call(&[&message.emit()], deadline)
            .expect("answered");
        assert_eq!(payload.len(), 40);
        assert_eq!(payload[..8], [108, 0, 0, 0, 2, 0, 0, 0]);
    }
    let channel = &mut driver.channels[0];
    let id = channel.new_transaction_id();
    let message = GuestMessage::RndisPacket {
        kind: RndisKind::Data,
        section: None,
    }
    .emit();
    channel
        .send_gpa_direct(id, &[(Gpa(1 << 45), 100)], &[&message])
        .expect("staged");
    channel.flush().expect("flushed");
    let (_, answered, payload) = channel.receive_one(deadline).expect("answered");
    assert_eq!((answered, payload[4]), (id, 2));
    still_works(&room, &mut network, &mut driver);
    assert!(faults(&mut room) >= 4);
}

#[test]
fn malformed_frames_are_completed_as_invalid_and_not_sent() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    let good = [
        emit_guest_header(60, &FrameRequests::default()),
        from_guest(1, 60),
    ]
    .concat();
    let mut bad: Vec<Vec<u8>> = [
        (0usize, 9u32),
        (4, 7),
        (4, 105),
        (4, u32::MAX),
        (8, 37),
        (8, u32::MAX),
        (12, 61),
        (12, 5),
    ]
    .into_iter()
    .map(|(offset, value)| {
        let mut bytes = good.clone();
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    })
    .collect();
    // Per-packet information that loops or reaches outside.
    let vlan = FrameRequests {
        vlan: Some(5),
        ..FrameRequests::default()
    };
    let tagged = [emit_guest_header(60, &vlan), from_guest(1, 60)].concat();
    for (offset, value) in [
        (44usize, 0u32),
        (44, 17),
        (44, u32::MAX),
        (52, 16),
        (32, u32::MAX),
        (28, 5000),
        (28, 35),
    ] {
        let mut bytes = tagged.clone();
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        bad.push(bytes);
    }
    let expected = bad.len();
    let before = driver.completed.len();
    for bytes in &bad {
        driver.send_raw(0, bytes).expect("sent");
    }
    driver.wait_sent(room.deadline()).expect("all completed");
    assert_eq!(driver.completed[before..], vec![5; expected]);
    still_works(&room, &mut network, &mut driver);
    assert!(faults(&mut room) >= expected as u64);
}

#[test]
fn impossible_segmentation_drops_the_frame() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for segment_bytes in [0, 1] {
        let segment = Some(SegmentRequest {
            segment_bytes,
            transport_offset: 1000,
        });
        let requests = FrameRequests {
            segment,
            ..FrameRequests::default()
        };
        driver
            .send_with(0, &from_guest(1, 100), Form::Section, &requests)
            .expect("sent");
    }
    driver.wait_sent(room.deadline()).expect("completed");
    still_works(&room, &mut network, &mut driver);
    assert_eq!(faults(&mut room), 2);
}

#[test]
fn any_bytes_in_control_messages_are_survived() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    let mut state = 0x1234_5678_9ABC_DEF1u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..300 {
        let length = 8 + (random() % 120) as usize;
        let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        // Mostly the right shape, so that it gets somewhere; never HALT, which would be obeyed.
        bytes[..4].copy_from_slice(&[[4, 5, 8, 2, 7, 6][round % 6], 0, 0, 0]);
        if round % 3 != 0 {
            bytes[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        }
        driver.send_control(&bytes).expect("sent");
        driver.wait_sent(room.deadline()).expect("completed");
    }
    driver.frames.clear();
    driver
        .set_filter(crate::network::FILTER, room.deadline())
        .expect("control works");
    still_works(&room, &mut network, &mut driver);
    assert!(faults(&mut room) > 0);
}

#[test]
fn any_nvsp_message_is_answered_or_ignored() {
    let (mut room, _network, mut driver) = running(DriverOptions::default());
    let deadline = room.deadline();
    for number in (0..140u32).filter(|number| *number != 107) {
        for fill in [0u8, 0xFF] {
            let mut message = vec![fill; 40];
            message[..4].copy_from_slice(&number.to_le_bytes());
            let answer = driver.channels[0].call(&[&message], deadline).expect("answered");
            assert!(
                answer.len() == 40 || (number == 129 && answer.is_empty()),
                "{number}: {answer:?}"
            );
        }
    }
    // The buffers may have been revoked; the server lives and a fresh guest gets its NIC.
    room.guest.quiesce(deadline).expect("quiesced");
    room.open(DriverOptions::default()).expect("opens again");
}

#[test]
fn a_scribbled_ring_breaks_the_channel_and_nothing_else() {
    let (mut room, mut network) = room();
    let deadline = room.deadline();
    // Pages are given out in order: the ring to the host, its write index first, follows the marker.
    let marker = room.guest.allocate(1).expect("memory");
    let driver = room.open(DriverOptions::default()).expect("the NIC opens");
    room.guest
        .ram()
        .write(Gpa(marker.0 + 4096), &0x7FFF_FFF1u32.to_le_bytes())
        .expect("RAM");
    let mut primary = driver.channels.into_iter().next().expect("primary");
    primary.kick().expect("kicked");
    let why = room.guest.wait_broken(&primary, deadline).expect("reported");
    assert!(why.contains("index"), "{why}");
    room.guest.close_channel(&primary, deadline).expect("closed");
    let primary = room.guest.reopen_channel(&primary).expect("re-opened");
    let mut driver =
        Driver::open_on(&mut room.guest, primary, DriverOptions::default(), deadline).expect("opens again");
    driver
        .set_filter(crate::network::FILTER, deadline)
        .expect("a filter");
    still_works(&room, &mut network, &mut driver);
}

#[test]
fn a_stream_that_announces_nonsense_is_given_up() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    network.put(&to_guest(1, 60));
    network.put_raw(&[0xFF; 8]);
    driver
        .receive(0, 1, room.deadline())
        .expect("the frame before it");
    while driver.indications.is_empty() {
        driver.poll(0, room.deadline()).expect("an indication");
    }
    assert_eq!(room.inspect("link/up").expect("a value"), "false");
}
