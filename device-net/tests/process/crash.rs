//! Death and replacement: every packet is completed once, and no credit is in two hands.

use crate::network::{FILTER, from_guest, number_of, room, running, to_guest};
use device_net::netvsp::wire::{GuestMessage, HostMessage, NvspStatus, NvspVersion, RECEIVE_BUFFER_ID};
use device_net::vsc::{DriverOptions, Form, Room};
use std::time::Instant;
use vmbus::mem::Gpa;
use vmbus::ring::PacketBuf;
use vmbus::vsc::ChannelOptions;
use vmbus::wire::PacketKind;

fn replace(room: &mut Room) {
    room.kill().expect("killed");
    room.start_successor().expect("the successor attaches");
}

/// Waits until the server has taken all `sent` frames from the ring, which it does in portions. Returns how many of them
/// wait for the network.
fn wait_until_taken(room: &mut Room, sent: u32) -> u32 {
    let end = room.deadline();
    loop {
        let mut number = |path| {
            let text = room.inspect(path).expect("the server answers");
            text.parse::<u32>().expect("a number")
        };
        // In this order: a frame goes from the second to the first.
        let passed_on = number("sent/frames");
        let waits = number("sent/queued");
        if passed_on + waits >= sent {
            return waits;
        }
        assert!(Instant::now() < end, "{passed_on} frames sent, {waits} wait");
    }
}

#[test]
fn a_successor_goes_on_with_an_open_nic() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for number in 0..5 {
        replace(&mut room);
        driver
            .send(0, &from_guest(number, 200), Form::Section)
            .expect("sent");
        assert_eq!(network.take(), from_guest(number, 200));
        network.put(&to_guest(number, 300));
        let frames = driver.receive(0, 1, room.deadline()).expect("received");
        assert_eq!(frames[0].bytes, to_guest(number, 300));
        driver.set_filter(FILTER, room.deadline()).expect("control works");
    }
    driver.wait_sent(room.deadline()).expect("all completed once");
}

#[test]
fn a_polite_swap_loses_nothing() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for number in 0..5 {
        driver
            .send(0, &from_guest(number, 200), Form::Section)
            .expect("sent");
        assert!(room.stop().expect("it ends").is_success());
        room.start_successor().expect("the successor attaches");
        assert_eq!(network.take(), from_guest(number, 200));
    }
    driver.wait_sent(room.deadline()).expect("all completed once");
}

/// The network reads nothing until the server was told to stop.
#[test]
fn a_server_that_stops_gives_the_network_what_it_took_from_the_guest() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for round in 0..3 {
        let mut sent = 0;
        // The socket is full after a few dozen of these, and the server takes more.
        while sent < 120 {
            driver
                .send(0, &from_guest(round * 1000 + sent, 6000), Form::Section)
                .expect("sent");
            sent += 1;
        }
        let waits = wait_until_taken(&mut room, sent);
        assert_ne!(waits, 0, "the server took more than the network");
        room.supervisor.stop().expect("told");
        for number in 0..sent {
            assert_eq!(network.take(), from_guest(round * 1000 + number, 6000));
        }
        assert!(room.wait_end().expect("it ends").is_success());
        room.guest.server_gone();
        room.start_successor().expect("the successor attaches");
        driver.wait_sent(room.deadline()).expect("all completed once");
    }
}

#[test]
fn a_server_that_stops_does_not_wait_for_a_network_that_does_not_read() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for number in 0..120 {
        driver
            .send(0, &from_guest(number, 6000), Form::Section)
            .expect("sent");
    }
    assert_ne!(wait_until_taken(&mut room, 120), 0);
    assert!(room.stop().expect("it ends").is_success());
    room.start_successor().expect("the successor attaches");
    driver.wait_sent(room.deadline()).expect("all completed once");
    driver
        .send(0, &from_guest(500, 200), Form::Section)
        .expect("sent");
    let mut expected = 0;
    loop {
        let frame = network.take();
        let number = number_of(&frame);
        if number == 500 {
            break;
        }
        assert_eq!(frame, from_guest(expected, 6000), "in order, once, whole");
        expected += 1;
    }
}

/// The successor must not wait for what the predecessor's state says was open.
#[test]
fn a_sub_channel_that_closed_while_nobody_served_leaves_the_nic_hearing() {
    let options = DriverOptions {
        queues: 3,
        ..DriverOptions::default()
    };
    let (mut room, mut network, mut driver) = running(options);
    let mut left = driver.channels.len();
    assert_eq!(left, 3);
    for number in 0..2 {
        room.kill().expect("killed");
        left -= 1;
        let closing = driver.channels.pop().expect("a sub-channel");
        assert_eq!(driver.channels.len(), left);
        let deadline = room.deadline();
        room.guest.close_channel(&closing, deadline).expect("closed");
        room.start_successor().expect("the successor attaches");
        network.put(&to_guest(number, 300));
        let frames = driver.receive(0, 1, room.deadline()).expect("received");
        assert_eq!(frames[0].bytes, to_guest(number, 300));
        // An answer needs a sub-allocation, too.
        driver.set_filter(FILTER, room.deadline()).expect("control works");
        replace(&mut room);
        network.put(&to_guest(number, 400));
        let frames = driver.receive(0, 1, room.deadline()).expect("received");
        assert_eq!(frames[0].bytes, to_guest(number, 400));
    }
    let expected = driver.suballocation_count.to_string();
    let free = room.inspect_until("receive-buffer/free", &expected);
    assert_eq!(free.expect("a number"), expected);
}

#[test]
fn packets_sent_while_nobody_serves_are_sent_by_the_successor() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    room.kill().expect("killed");
    for number in 0..20 {
        driver
            .send(0, &from_guest(number, 200), Form::Partial)
            .expect("sent");
    }
    network.put(&to_guest(1, 100));
    room.start_successor().expect("the successor attaches");
    for number in 0..20 {
        assert_eq!(network.take(), from_guest(number, 200));
    }
    driver.wait_sent(room.deadline()).expect("all completed once");
    let frames = driver.receive(0, 1, room.deadline()).expect("received");
    assert_eq!(number_of(&frames[0].bytes), 1);
}

#[test]
fn frames_with_the_guest_are_not_overwritten_by_the_successor() {
    let options = DriverOptions {
        receive_pages: 128,
        ..DriverOptions::default()
    };
    let (mut room, mut network, mut driver) = running(options);
    driver.give_back = false;
    for number in 0..100 {
        network.put(&to_guest(number, 100));
    }
    while driver.frames.len() < 100 {
        driver.poll(0, room.deadline()).expect("well-behaved");
    }
    driver.frames.clear();
    let held = driver.held();
    replace(&mut room);
    let expected = (driver.suballocation_count as usize - held).to_string();
    let free = room.inspect_until("receive-buffer/free", &expected);
    assert_eq!(free.expect("a number"), expected);
    // The driver refuses a sub-allocation that it holds.
    for number in 100..140 {
        network.put(&to_guest(number, 100));
    }
    while driver.frames.len() < 40 {
        driver.poll(0, room.deadline()).expect("well-behaved");
    }
    driver.return_all().expect("returned");
    driver.set_filter(FILTER, room.deadline()).expect("seen");
    let expected = driver.suballocation_count.to_string();
    let free = room.inspect_until("receive-buffer/free", &expected);
    assert_eq!(free.expect("a number"), expected);
}

/// Each step of start-up is asked, and the server dies before, while or after it answers.
#[test]
fn killed_during_start_up_each_step_is_answered_once() {
    let (mut room, _network) = room();
    let deadline = room.deadline();
    let options = ChannelOptions {
        ring_pages: 128,
        ..Default::default()
    };
    let mut primary = room.guest.open_channel(options).expect("open");
    let pages = room.guest.allocate(4096 + 256).expect("memory");
    let relid = primary.channel_id();
    let receive = room.guest.add_gpadl_at(relid, pages, 4096).expect("a GPADL");
    let send = room
        .guest
        .add_gpadl_at(relid, Gpa(pages.0 + 4096 * 4096), 256)
        .expect("a GPADL");
    let version = NvspVersion::V6_1;
    let steps = [
        GuestMessage::Init {
            min: version,
            max: version,
        },
        GuestMessage::ReceiveBuffer {
            gpadl: receive,
            id: RECEIVE_BUFFER_ID,
        },
        GuestMessage::SendBuffer { gpadl: send, id: 0 },
        GuestMessage::Subchannel {
            operation: 1,
            count: 2,
        },
        GuestMessage::SwitchDataPath { active: 0 },
    ];
    for step in steps {
        let id = primary.new_transaction_id();
        primary.send_in_band(id, true, &[&step.emit()]).expect("staged");
        primary.flush().expect("flushed");
        replace(&mut room);
        let (kind, answered, payload) = primary.receive_one(deadline).expect("answered");
        assert_eq!((kind, answered), (PacketKind::COMPLETION, id));
        match HostMessage::parse(&payload) {
            Some(
                HostMessage::InitComplete { status, .. }
                | HostMessage::ReceiveBufferComplete { status, .. }
                | HostMessage::SendBufferComplete { status, .. }
                | HostMessage::SubchannelComplete { status, .. },
            ) => assert_eq!(status, NvspStatus::SUCCESS, "{step:?}"),
            None if payload.is_empty() => {}
            other => panic!("{step:?}: {other:?}"),
        }
    }
    room.supervisor.ping(1, deadline).expect("the server turns");
    let mut buf = PacketBuf::new();
    assert!(
        primary.receive(&mut buf).expect("well-behaved").is_none(),
        "no step is answered twice"
    );
    assert_eq!(room.guest.wait_sub_channels(deadline).expect("offered"), 2);
}
