//! Frames both ways.

use crate::network::{FILTER, MAC, from_guest, number_of, running, to_guest};
use device_net::frame::headers::{Headers, checksum_field_offset, write_word};
use device_net::rndis::packet::{ChecksumRequest, FrameRequests, SegmentRequest, Transport};
use device_net::vsc::{DriverOptions, Form};

/// Whether both checksums of an IPv4 TCP frame are right.
fn is_sound(frame: &[u8]) -> bool {
    let headers = Headers::parse(frame).expect("IP");
    let bytes = headers.transport_bytes(frame).expect("whole");
    let part = &frame[headers.transport_offset..headers.transport_offset + bytes];
    let ip = device_net::frame::checksum::Sum::default()
        .add_bytes(&frame[headers.network_offset..headers.transport_offset])
        .finish();
    ip == 0 && headers.pseudo_header(frame, bytes).add_bytes(part).finish() == 0
}

fn tcp_frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = [&[2, 0, 0, 0, 0, 1][..], &MAC[..], &[8, 0]].concat();
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&((40 + payload.len()) as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    frame.extend_from_slice(&[
        0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xFF, 0xFF, 0, 0, 0, 0,
    ]);
    frame.extend_from_slice(payload);
    Headers::parse(&frame).expect("IP").write_ip_checksum(&mut frame);
    frame
}

#[test]
fn frames_of_every_form_and_size_reach_the_network_whole() {
    let (room, mut network, mut driver) = running(DriverOptions::default());
    let mut number = 0;
    for form in [Form::Section, Form::Pages, Form::Partial] {
        for bytes in [18, 60, 61, 1514, 1518, 4000] {
            number += 1;
            driver.send(0, &from_guest(number, bytes), form).expect("sent");
            assert_eq!(network.take(), from_guest(number, bytes), "{form:?} {bytes}");
        }
    }
    driver.wait_sent(room.deadline()).expect("all completed");
    assert!(driver.completed.iter().all(|&status| status == 1));
}

#[test]
fn several_frames_in_one_section_become_several_frames() {
    let (room, mut network, mut driver) = running(DriverOptions::default());
    let frames: Vec<Vec<u8>> = (0..8)
        .map(|number| from_guest(number, 61 + number as usize))
        .collect();
    let parts: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    driver
        .stage_batch(0, &parts, &FrameRequests::default())
        .expect("staged")
        .expect("a section");
    driver.flush(0).expect("flushed");
    for frame in &frames {
        assert_eq!(&network.take(), frame);
    }
    driver.wait_sent(room.deadline()).expect("completed once");
}

#[test]
fn a_vlan_tag_is_put_into_the_frame() {
    let (_room, mut network, mut driver) = running(DriverOptions::default());
    let requests = FrameRequests {
        vlan: Some(0x6042),
        ..FrameRequests::default()
    };
    let frame = from_guest(1, 100);
    driver.send_with(0, &frame, Form::Pages, &requests).expect("sent");
    let mut expected = frame;
    expected.splice(12..12, [0x81, 0, 0x60, 0x42]);
    assert_eq!(network.take(), expected);
}

#[test]
fn checksums_left_to_the_server_are_right_on_a_plain_link() {
    let (_room, mut network, mut driver) = running(DriverOptions::default());
    let mut frame = tcp_frame(b"some odd-sized data");
    let headers = Headers::parse(&frame).expect("IP");
    let sum = headers.pseudo_header(&frame, frame.len() - 34).value();
    write_word(&mut frame, 34 + checksum_field_offset(Transport::Tcp), sum);
    let checksum = Some(ChecksumRequest {
        ip_header: false,
        transport: Some(Transport::Tcp),
        transport_offset: 34,
    });
    let requests = FrameRequests {
        checksum,
        ..FrameRequests::default()
    };
    for form in [Form::Section, Form::Pages] {
        driver.send_with(0, &frame, form, &requests).expect("sent");
        let got = network.take();
        assert!(is_sound(&got));
        assert_eq!(got[54..], frame[54..]);
    }
}

#[test]
fn a_large_segment_is_cut_for_a_plain_link() {
    let (room, mut network, mut driver) = running(DriverOptions::default());
    let data: Vec<u8> = (0..20_000u32).map(|place| (place / 3) as u8).collect();
    let mut frame = tcp_frame(&data);
    // As Linux leaves them.
    write_word(&mut frame, 16, 0);
    write_word(&mut frame, 24, 0);
    let requests = FrameRequests {
        segment: Some(SegmentRequest {
            segment_bytes: 1460,
            transport_offset: 34,
        }),
        ..FrameRequests::default()
    };
    driver.send_with(0, &frame, Form::Pages, &requests).expect("sent");
    let mut got = Vec::new();
    while got.len() < data.len() {
        let frame = network.take();
        assert!(is_sound(&frame) && frame.len() <= 1514);
        got.extend_from_slice(&frame[54..]);
    }
    assert_eq!(got, data);
    driver.wait_sent(room.deadline()).expect("completed once");
}

#[test]
fn frames_from_the_network_reach_the_guest_whole_and_in_order() {
    for scattered in [false, true] {
        let (room, mut network, mut driver) = running(DriverOptions {
            scattered,
            ..DriverOptions::default()
        });
        let sizes = [60, 61, 1514, 18, 1500, 999];
        for (number, bytes) in sizes.into_iter().enumerate() {
            network.put(&to_guest(number as u32, bytes));
        }
        let frames = driver.receive(0, sizes.len(), room.deadline()).expect("received");
        for (number, (frame, bytes)) in frames.iter().zip(sizes).enumerate() {
            assert_eq!(frame.bytes, to_guest(number as u32, bytes));
        }
    }
}

#[test]
fn a_flood_uses_every_credit_but_the_reserve_and_each_comes_back() {
    let options = DriverOptions {
        receive_pages: 256,
        ..DriverOptions::default()
    };
    let (mut room, network, mut driver) = running(options);
    driver.give_back = false;
    let count = driver.suballocation_count;
    assert_eq!(
        room.inspect_until("receive-buffer/free", &count.to_string())
            .expect("a number"),
        count.to_string()
    );
    // More than fit: the server reads only as many as the guest has room for, and the rest waits in the socket.
    let sent = count + 50;
    let writer = network.put_all((0..sent).map(|number| to_guest(number, 200)).collect());
    // The server goes on while a large segment at its smallest (123 frames) would fit beside the reserve of 16.
    let most_held = (count - 16 - 122) as usize;
    while driver.held() < most_held {
        driver
            .poll(0, room.deadline())
            .expect("more, while there is room");
    }
    driver
        .set_filter(FILTER, room.deadline())
        .expect("control works without credits for data");
    let free = room
        .inspect_until("receive-buffer/free", "138")
        .expect("a number");
    assert_eq!(free, "138");
    driver.poll_once(0).expect("well-behaved");
    assert_eq!(driver.held(), most_held);
    driver.return_all().expect("returned");
    driver.give_back = true;
    let frames = driver
        .receive(0, sent as usize, room.deadline())
        .expect("the rest comes");
    let got: Vec<u32> = frames.iter().map(|frame| number_of(&frame.bytes)).collect();
    assert_eq!(got, (0..sent).collect::<Vec<_>>());
    writer.join().expect("all written");
    driver.return_all().expect("returned");
    driver
        .set_filter(FILTER, room.deadline())
        .expect("the server has seen it");
    assert_eq!(
        room.inspect_until("receive-buffer/free", &count.to_string())
            .expect("a number"),
        count.to_string()
    );
}

#[test]
fn a_network_that_is_slow_to_read_costs_no_completion() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    const FRAMES: u32 = 2000;
    let before = driver.completed.len();
    for number in 0..FRAMES {
        loop {
            let frame = from_guest(number, 1514);
            match driver
                .stage_batch(0, &[&frame], &FrameRequests::default())
                .expect("well-behaved")
            {
                Some(_) => break,
                None => {
                    driver.flush(0).expect("flushed");
                    // The socket is full, and 170 packets wait.
                    network.take();
                    driver.poll_once(0).expect("well-behaved");
                }
            }
        }
        driver.flush(0).expect("flushed");
    }
    let reader = network.read_all();
    driver.wait_sent(room.deadline()).expect("all completed once");
    assert_eq!(driver.completed.len() - before, FRAMES as usize);
    assert_eq!(room.inspect("sent/queued").expect("a number"), "0");
    network.end(reader);
}

#[test]
fn frames_for_others_are_filtered_and_a_closed_filter_stops_everything() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    let mut other = to_guest(1, 60);
    other[5] ^= 1;
    network.put(&other);
    network.put(&to_guest(2, 60));
    let frames = driver.receive(0, 1, room.deadline()).expect("received");
    assert_eq!(number_of(&frames[0].bytes), 2);
    assert_eq!(room.inspect("received/filtered").expect("a number"), "1");

    driver.set_filter(0, room.deadline()).expect("closed");
    network.put(&to_guest(3, 60));
    room.supervisor
        .ping(1, room.deadline())
        .expect("the server turns");
    assert_eq!(driver.poll_once(0).expect("well-behaved"), 0);
    // What came meanwhile is stale.
    driver.set_filter(FILTER, room.deadline()).expect("open");
    network.put(&to_guest(4, 60));
    let frames = driver.receive(0, 1, room.deadline()).expect("received");
    assert_eq!(number_of(&frames[0].bytes), 4);
}

#[test]
fn flows_are_spread_over_sub_channels_and_each_can_send() {
    let (room, mut network, mut driver) = running(DriverOptions {
        queues: 4,
        ..DriverOptions::default()
    });
    assert_eq!(driver.channels.len(), 4);
    for channel in 0..4 {
        driver
            .send(channel, &from_guest(channel as u32, 100), Form::Section)
            .expect("sent");
        assert_eq!(network.take(), from_guest(channel as u32, 100));
    }
    driver
        .wait_sent(room.deadline())
        .expect("completed on the channel that sent");
    const FLOWS: u16 = 64;
    for port in 0..FLOWS {
        let mut frame = tcp_frame(b"data");
        frame[..6].copy_from_slice(&MAC);
        write_word(&mut frame, 34, port);
        network.put(&frame);
    }
    let mut received = [0; 4];
    while received.iter().sum::<u16>() < FLOWS {
        for channel in 0..4 {
            driver.poll_once(channel).expect("well-behaved");
        }
        for frame in driver.frames.drain(..) {
            received[frame.channel] += 1;
        }
    }
    assert!(received.iter().all(|&count| count > 2), "{received:?}");
}

#[test]
fn an_idle_server_sleeps() {
    let (mut room, _network, driver) = running(DriverOptions::default());
    let before = room.inspect("channel/0/publications").expect("a number");
    let stat = |room: &mut device_net::vsc::Room| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", room.child.pid)).expect("a status");
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary"))
            .expect("a count")
            .to_owned();
        line.split_whitespace()
            .last()
            .and_then(|count| count.parse::<u64>().ok())
            .expect("a number")
    };
    let waits = stat(&mut room);
    // Two questions of ours are two wake-ups, and nothing else is.
    room.supervisor.ping(1, room.deadline()).expect("awake");
    std::thread::sleep(std::time::Duration::from_millis(300));
    room.supervisor.ping(2, room.deadline()).expect("awake");
    assert!(stat(&mut room) <= waits + 3);
    assert_eq!(room.inspect("channel/0/publications").expect("a number"), before);
    drop(driver);
}
