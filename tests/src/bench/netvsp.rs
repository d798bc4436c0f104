//! Frames from a guest to its network, through the real, sandboxed `bulkhead-net` into a stream socket, beside the same
//! frames written to such a socket by one process.
//!
//! Frames of 60 bytes, eight to a packet as Linux batches them at most, so that the cost of a frame and not that of a
//! byte is measured. The guest's side is played by this process; the socket's other end is read by a thread of
//! it in both cases, and a round ends when that thread has the last byte.

#![forbid(unsafe_code)]

use super::Figure;
use anyhow::{Context, Result, anyhow, ensure};
use device_net::config::{BackendKind, NicConfig};
use device_net::rndis::packet::FrameRequests;
use device_net::vsc::{Driver, DriverOptions, Room};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmbus::vsc::GuestOptions;

const ROUNDS: usize = 7;
/// Enough for some tenths of a second a round.
const FRAMES: usize = 80_000;
const FRAMES_PER_PACKET: usize = 8;
const FRAME_BYTES: usize = 60;
const LENGTH_BYTES: usize = 4;
/// Limit: how long the last byte of a round may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures the figure.
pub fn measure(_wanted: &[&str]) -> Result<Vec<Figure>> {
    let mut served = Served::new()?;
    let mut bare = Bare::new()?;
    let (mut through, mut directly) = (Vec::new(), Vec::new());
    // One round each that does not count: page tables, caches, frequency.
    served.round()?;
    bare.round()?;
    for _ in 0..ROUNDS {
        directly.push(bare.round()?);
        through.push(served.round()?);
    }
    Ok(vec![Figure::new(
        "netvsp-pps",
        "frames/s",
        "the same frames written to a stream socket",
        through,
        directly,
    )])
}

/// The other end of a socket: counts bytes, and says when a round's are there.
struct Sink {
    rounds: Receiver<()>,
    _thread: JoinHandle<()>,
}

impl Sink {
    fn new(mut stream: UnixStream) -> Self {
        let (said, rounds) = channel();
        let thread = std::thread::spawn(move || {
            let mut bytes = vec![0; 256 << 10];
            let mut seen = 0;
            while let Ok(count) = stream.read(&mut bytes)
                && count > 0
            {
                seen += count;
                if seen >= FRAMES * (LENGTH_BYTES + FRAME_BYTES) {
                    seen = 0;
                    if said.send(()).is_err() {
                        return;
                    }
                }
            }
        });
        Self {
            rounds,
            _thread: thread,
        }
    }

    fn wait(&self) -> Result<()> {
        self.rounds
            .recv_timeout(PATIENCE)
            .context("frames did not arrive in time")
    }
}

fn frame() -> Vec<u8> {
    let mut frame = vec![0x5A; FRAME_BYTES];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame
}

struct Served {
    room: Room,
    driver: Driver,
    sink: Sink,
}

impl Served {
    fn new() -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("bulkhead-net");
        ensure!(program.exists(), "{} is not there", program.display());
        let (ours, theirs) = UnixStream::pair()?;
        let config = NicConfig {
            mac: [0x52, 0x54, 0, 0, 0, 1],
            backend: BackendKind::Stream,
            fd: "net".to_owned(),
            mtu: 1500,
            max_queues: 1,
        };
        let guest = GuestOptions {
            ram_bytes: 64 << 20,
            vp_count: 1,
        };
        let mut room = Room::new(program, &config, theirs.into(), guest)?;
        let driver = room.open(DriverOptions::default())?;
        Ok(Self {
            room,
            driver,
            sink: Sink::new(ours),
        })
    }

    /// Frames a second.
    fn round(&mut self) -> Result<f64> {
        let frame = frame();
        let batch = [&frame[..]; FRAMES_PER_PACKET];
        let requests = FrameRequests::default();
        let start = Instant::now();
        let mut packets = 0;
        while packets < FRAMES / FRAMES_PER_PACKET {
            match self.driver.stage_batch(0, &batch, &requests)? {
                Some(_) => packets += 1,
                None => {
                    // As a driver's queue does: it stops, and completions wake it.
                    self.driver.flush(0)?;
                    self.driver.poll(0, self.room.deadline())?;
                }
            }
            if packets % 8 == 0 {
                self.driver.flush(0)?;
            }
        }
        self.driver.flush(0)?;
        self.sink.wait()?;
        let seconds = start.elapsed().as_secs_f64();
        self.driver.wait_sent(self.room.deadline())?;
        let wrong = self
            .driver
            .completed
            .drain(..)
            .filter(|&status| status != 1)
            .count();
        ensure!(wrong == 0, "{wrong} packets were refused");
        Ok(FRAMES as f64 / seconds)
    }
}

struct Bare {
    stream: UnixStream,
    sink: Sink,
}

impl Bare {
    fn new() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok(Self {
            stream: theirs,
            sink: Sink::new(ours),
        })
    }

    fn round(&mut self) -> Result<f64> {
        let bytes = [&(FRAME_BYTES as u32).to_be_bytes()[..], &frame()].concat();
        let start = Instant::now();
        for _ in 0..FRAMES {
            self.stream
                .write_all(&bytes)
                .map_err(|error| anyhow!("the socket: {error}"))?;
        }
        self.sink.wait()?;
        Ok(FRAMES as f64 / start.elapsed().as_secs_f64())
    }
}
