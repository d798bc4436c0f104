//! A real TAP with the host's own network stack behind it, in a network namespace of the test's thread.

use crate::network::{FILTER, MAC, config, guest, program};
use device_net::config::BackendKind;
use device_net::frame::checksum::Sum;
use device_net::frame::headers::{Headers, checksum_field_offset, write_word};
use device_net::rndis::packet::{ChecksumRequest, FrameRequests, SegmentRequest, Transport};
use device_net::vsc::{Driver, DriverOptions, Form, Room};
use nix::sched::{CloneFlags, unshare};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

const HOST: [u8; 4] = [10, 99, 0, 1];
const GUEST: [u8; 4] = [10, 99, 0, 2];

struct Link {
    room: Room,
    driver: Driver,
    host_mac: [u8; 6],
}

/// `None`: this host lets us make no TAP.
fn link() -> Option<Link> {
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        skip(&format!("a network namespace cannot be made: {errno}"));
        return None;
    }
    let tap = match sandbox::tap::create("tap0", false) {
        Ok(tap) => tap,
        Err(error) => {
            skip(&format!("a TAP cannot be made: {error}"));
            return None;
        }
    };
    let neighbour = "neigh add 10.99.0.2 lladdr 52:54:00:12:34:56 dev tap0";
    for command in ["addr add 10.99.0.1/24 dev tap0", "link set tap0 up", neighbour] {
        let status = Command::new("ip").args(command.split(' ')).status();
        match status {
            Ok(status) => assert!(status.success(), "ip {command}"),
            Err(error) => {
                skip(&format!("the program ip cannot be run: {error}"));
                return None;
            }
        }
    }
    let output = Command::new("ip")
        .args(["link", "show", "tap0"])
        .output()
        .expect("ip runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mac = text
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .expect("a MAC address");
    let mut host_mac = [0; 6];
    for (byte, part) in host_mac.iter_mut().zip(mac.split(':')) {
        *byte = u8::from_str_radix(part, 16).expect("hexadecimal");
    }
    let mut room = Room::new(program(), &config(BackendKind::Tap), tap, guest()).expect("the server starts");
    let mut driver = room.open(DriverOptions::default()).expect("the NIC opens");
    driver.set_filter(FILTER, room.deadline()).expect("a filter");
    Some(Link {
        room,
        driver,
        host_mac,
    })
}

/// Past the harness's capture, in the form that `cargo xtask test` counts.
fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("\nSKIP {}: {reason}\n", thread.name().unwrap_or("a test"));
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("standard error is open");
}

impl Link {
    /// An IPv4 frame from the guest to the host, its transport checksum only begun.
    fn frame(&self, transport: Transport, header: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut frame = [&self.host_mac[..], &MAC[..], &[8, 0, 0x45, 0]].concat();
        frame.extend_from_slice(&((20 + header.len() + payload.len()) as u16).to_be_bytes());
        let protocol = if transport == Transport::Tcp { 6 } else { 17 };
        frame.extend_from_slice(&[0, 1, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend_from_slice(&GUEST);
        frame.extend_from_slice(&HOST);
        frame.extend_from_slice(header);
        frame.extend_from_slice(payload);
        let headers = Headers::parse(&frame).expect("IP");
        headers.write_ip_checksum(&mut frame);
        let sum = headers
            .pseudo_header(&frame, header.len() + payload.len())
            .value();
        write_word(&mut frame, 34 + checksum_field_offset(transport), sum);
        frame
    }

    fn send(&mut self, transport: Transport, header: &[u8], payload: &[u8]) {
        let frame = self.frame(transport, header, payload);
        let checksum = Some(ChecksumRequest {
            ip_header: false,
            transport: Some(transport),
            transport_offset: 34,
        });
        let requests = FrameRequests {
            checksum,
            ..FrameRequests::default()
        };
        self.driver
            .send_with(0, &frame, Form::Pages, &requests)
            .expect("sent");
    }

    /// The next frame that `is_it` accepts.
    fn receive(&mut self, is_it: impl Fn(&[u8]) -> bool) -> (Vec<u8>, u32) {
        let deadline = self.room.deadline();
        loop {
            let frame = self.driver.receive(0, 1, deadline).expect("received").remove(0);
            if is_it(&frame.bytes) {
                return (frame.bytes, frame.checksum);
            }
        }
    }
}

fn is_sound(frame: &[u8]) -> bool {
    let headers = Headers::parse(frame).expect("IP");
    let bytes = headers.transport_bytes(frame).expect("whole");
    let part = &frame[headers.transport_offset..headers.transport_offset + bytes];
    headers.pseudo_header(frame, bytes).add_bytes(part).finish() == 0
        && Sum::default()
            .add_bytes(&frame[14..headers.transport_offset])
            .finish()
            == 0
}

fn is_protocol(frame: &[u8], protocol: u8) -> bool {
    frame[12..14] == [8, 0] && frame[23] == protocol
}

fn tcp_header(sequence: u32, acknowledge: u32, flags: u8) -> Vec<u8> {
    let mut header = vec![0x30, 0x39, 0x1F, 0x90];
    header.extend_from_slice(&sequence.to_be_bytes());
    header.extend_from_slice(&acknowledge.to_be_bytes());
    header.extend_from_slice(&[0x50, flags, 0xFF, 0xFF, 0, 0, 0, 0]);
    header
}

const SYN: u8 = 2;
const ACK: u8 = 16;

#[test]
fn datagrams_pass_both_ways_with_checksums_left_to_the_host() {
    let Some(mut link) = link() else { return };
    let socket = UdpSocket::bind("10.99.0.1:7000").expect("bound");
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("timeout");
    for bytes in [1usize, 18, 100, 1472] {
        let payload = vec![bytes as u8; bytes];
        let length = ((8 + bytes) as u16).to_be_bytes();
        link.send(
            Transport::Udp,
            &[0x30, 0x39, 0x1B, 0x58, length[0], length[1], 0, 0],
            &payload,
        );
        let mut got = [0; 2000];
        let (count, from) = socket
            .recv_from(&mut got)
            .expect("a datagram with a right checksum");
        assert_eq!(&got[..count], payload);
        socket.send_to(&payload, from).expect("sent");
        let (frame, checksum) = link.receive(|frame| is_protocol(frame, 17));
        assert!(is_sound(&frame));
        assert_eq!(&frame[42..42 + bytes], payload);
        assert_eq!(checksum & (1 << 4), 1 << 4, "the host vouches for UDP");
    }
    link.driver.wait_sent(link.room.deadline()).expect("completed");
}

#[test]
fn large_tcp_segments_pass_both_ways() {
    let Some(mut link) = link() else { return };
    let listener = TcpListener::bind("10.99.0.1:8080").expect("bound");
    link.send(Transport::Tcp, &tcp_header(1000, 0, SYN), &[]);
    let (answer, _) = link.receive(|frame| is_protocol(frame, 6));
    let theirs = u32::from_be_bytes([answer[38], answer[39], answer[40], answer[41]]);
    link.send(Transport::Tcp, &tcp_header(1001, theirs + 1, ACK), &[]);
    let (mut stream, _) = listener.accept().expect("connected");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("timeout");

    // Guest to host: 20,000 bytes in one frame, as Linux leaves it to the host to cut.
    let data: Vec<u8> = (0..20_000u32).map(|place| (place / 7) as u8).collect();
    let mut frame = link.frame(Transport::Tcp, &tcp_header(1001, theirs + 1, ACK), &data);
    write_word(&mut frame, 16, 0);
    write_word(&mut frame, 24, 0);
    let requests = FrameRequests {
        segment: Some(SegmentRequest {
            segment_bytes: 1460,
            transport_offset: 34,
        }),
        ..FrameRequests::default()
    };
    link.driver
        .send_with(0, &frame, Form::Pages, &requests)
        .expect("sent");
    let mut got = vec![0; data.len()];
    stream.read_exact(&mut got).expect("all of it");
    assert_eq!(got, data);

    // Host to guest: as much as the host's first window allows, which it hands over uncut.
    stream.write_all(&data).expect("written");
    let mut got = Vec::new();
    while got.len() < 5000 {
        let (frame, checksum) =
            link.receive(|frame| is_protocol(frame, 6) && u16::from_be_bytes([frame[16], frame[17]]) > 40);
        assert!(is_sound(&frame) && frame.len() <= 1514);
        assert_eq!(checksum & (1 << 3), 1 << 3, "the host vouches for TCP");
        let end = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let header = 34 + usize::from(frame[46] >> 4) * 4;
        got.extend_from_slice(&frame[header..end]);
    }
    assert_eq!(got, data[..got.len()]);
}

#[test]
fn a_successor_goes_on_with_the_same_tap() {
    let Some(mut link) = link() else { return };
    let socket = UdpSocket::bind("10.99.0.1:7000").expect("bound");
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("timeout");
    for number in 0..3u8 {
        link.room.kill().expect("killed");
        link.room.start_successor().expect("the successor attaches");
        link.send(Transport::Udp, &[0x30, 0x39, 0x1B, 0x58, 0, 9, 0, 0], &[number]);
        let mut got = [0; 10];
        assert_eq!(socket.recv(&mut got).expect("a datagram"), 1);
        assert_eq!(got[0], number);
    }
    link.driver.wait_sent(link.room.deadline()).expect("completed");
}
