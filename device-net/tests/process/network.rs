//! What all these tests need: a room with a NIC, and the network at its other end.

use device_net::config::{BackendKind, NicConfig};
use device_net::vsc::{Driver, DriverOptions, Room};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;
use vmbus::vsc::GuestOptions;

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Directed, multicast, broadcast: what Linux sets at ifup.
pub const FILTER: u32 = 0x0B;

pub fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_bulkhead-net").into()
}

pub fn config(backend: BackendKind) -> NicConfig {
    NicConfig {
        mac: MAC,
        backend,
        fd: "net".to_owned(),
        mtu: 9000,
        max_queues: 4,
    }
}

pub fn guest() -> GuestOptions {
    GuestOptions {
        ram_bytes: 128 << 20,
        vp_count: 4,
    }
}

/// The other end of a stream.
pub struct Network {
    stream: UnixStream,
}

impl Network {
    pub fn put(&mut self, frame: &[u8]) {
        let bytes = [&(frame.len() as u32).to_be_bytes(), frame].concat();
        self.stream.write_all(&bytes).expect("the server reads");
    }

    /// Writes frames from a thread, for as long as it takes until the server has room for them.
    pub fn put_all(&self, frames: Vec<Vec<u8>>) -> JoinHandle<()> {
        let mut writer = self.stream.try_clone().expect("duplicate");
        std::thread::spawn(move || {
            for frame in frames {
                let bytes = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
                writer.write_all(&bytes).expect("the server reads");
            }
        })
    }

    pub fn put_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    pub fn take(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).expect("a frame in time");
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame).expect("a whole frame");
        frame
    }
}

/// A room with a stream, nothing opened.
pub fn room() -> (Room, Network) {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    ours.set_read_timeout(Some(Duration::from_secs(30)))
        .expect("timeout");
    ours.set_write_timeout(Some(Duration::from_secs(30)))
        .expect("timeout");
    let room = Room::new(program(), &config(BackendKind::Stream), theirs.into(), guest())
        .expect("the server starts");
    (room, Network { stream: ours })
}

/// A room with an open NIC that receives.
pub fn running(options: DriverOptions) -> (Room, Network, Driver) {
    let (mut room, network) = room();
    let mut driver = room.open(options).expect("the NIC opens");
    driver.set_filter(FILTER, room.deadline()).expect("a filter");
    (room, network, driver)
}

/// A frame to the guest that says which one it is.
pub fn to_guest(number: u32, bytes: usize) -> Vec<u8> {
    marked(MAC, [2, 0, 0, 0, 0, 1], number, bytes)
}

/// A frame from the guest that says which one it is.
pub fn from_guest(number: u32, bytes: usize) -> Vec<u8> {
    marked([2, 0, 0, 0, 0, 1], MAC, number, bytes)
}

fn marked(to: [u8; 6], from: [u8; 6], number: u32, bytes: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xB5], &number.to_be_bytes()].concat();
    frame.extend((frame.len()..bytes).map(|place| (place as u32).wrapping_mul(number | 1) as u8));
    frame
}

/// Which one it is.
pub fn number_of(frame: &[u8]) -> u32 {
    u32::from_be_bytes([frame[14], frame[15], frame[16], frame[17]])
}

impl Network {
    /// Reads whatever the guest sends from now on, so that the network is never full.
    pub fn read_all(&self) -> JoinHandle<()> {
        let mut reader = self.stream.try_clone().expect("duplicate");
        std::thread::spawn(move || {
            let mut bytes = [0; 65536];
            while matches!(reader.read(&mut bytes), Ok(count) if count > 0) {}
        })
    }

    /// All frames that come until every server is gone; none may be cut.
    pub fn rest(mut self) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            // What was put there and nobody has read.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            end => drop(end.expect("an end in time")),
        }
        let mut frames = Vec::new();
        let mut left = &bytes[..];
        while let Some((length, after)) = left.split_first_chunk::<4>() {
            let (frame, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            frames.push(frame.to_vec());
            left = after;
        }
        assert!(left.is_empty(), "a length is cut");
        frames
    }

    /// Goes away, and waits for the reader.
    pub fn end(self, reader: JoinHandle<()>) {
        self.stream.shutdown(Shutdown::Both).expect("shut down");
        reader.join().expect("no panic");
    }
}

impl Network {
    /// The bare end of the stream, for a load.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}
