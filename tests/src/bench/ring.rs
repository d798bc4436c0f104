//! One direction of a VMBus ring across two processes that both poll.
//!
//! `ring-256`: packets of 256 bytes of payload, each published by itself, beside a plain lock-free single-producer ring of
//! bytes that moves messages of 256 bytes between the same two processes. `ring-64k`: payloads of 64 KiB beside what memcpy
//! makes of the same way: one process copies each payload into an area of the same size, the other one copies it out,
//! and between them is nothing but an index. Both have to fetch the other processor's cache lines.
//!
//! `ring-64k-alone` has no bar. It is the same transfer beside one memcpy of one process within its own cache, where no
//! byte goes from one processor to another and each is copied once instead of twice: what crossing costs at all.
//!
//! Both processes spin, so two processors are needed to say anything. On a busy machine a round would mostly tell when
//! the scheduler lets both run at once; so they ask for real-time priority for the half second that it takes, and go on
//! without it if they may not have it.

#![forbid(unsafe_code)]

use super::Figure;
use anyhow::{Context, Result, ensure};
use std::hint::spin_loop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmbus::mem::{Access, PagedArea, SharedMap, sealed_memfd};
use vmbus::ring::{PacketBuf, RingArea, RingReader, RingWriter, StageError};
use vmbus::wire::OutPacket;

const PAGE: u64 = 4096;
const DATA_BYTES: u64 = 1 << 20;
/// Some hundred nanoseconds.
const PAUSES: u32 = 16;
const ROUNDS: usize = 9;
/// Enough for some tens of milliseconds a round.
const SMALL_COUNT: u64 = 400_000;
const LARGE_COUNT: u64 = 3_000;
const SMALL_BYTES: usize = 256;
const LARGE_BYTES: usize = 64 << 10;

/// The shared area: words to agree by, each in a cache line of its own, then the VMBus ring, then the plain ring.
const ROUND_WORD: u64 = 0;
const DONE_WORD: u64 = 128;
const HEAD_WORD: u64 = 256;
const TAIL_WORD: u64 = 384;
const RING_START: u64 = PAGE;
const PLAIN_START: u64 = RING_START + PAGE + DATA_BYTES;
const AREA_BYTES: u64 = PLAIN_START + DATA_BYTES;

/// What a round moves, and through what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Round {
    Plain256 = 1,
    Ring256 = 2,
    Ring64k = 3,
    Plain64k = 4,
    Quit = 5,
}

impl Round {
    fn from_word(word: u32) -> Option<Round> {
        [
            Round::Plain256,
            Round::Ring256,
            Round::Ring64k,
            Round::Plain64k,
            Round::Quit,
        ]
        .into_iter()
        .find(|round| *round as u32 == word & 0xFF)
    }
}

/// Measures the three figures.
pub fn measure(wanted: &[&str]) -> Result<Vec<Figure>> {
    // Before the other process is made, which inherits it.
    let _priority = RealTime::ask();
    let memory = sealed_memfd("bench-ring", AREA_BYTES)?;
    let shared = Shared::map(memory.as_fd())?;
    let mut peer = Peer::start(memory)?;
    let mut serial = 0;
    let mut round = |kind: Round| -> Result<f64> {
        serial += 1;
        shared.run(kind, serial, &mut peer)
    };
    let (mut plain, mut small) = (Vec::new(), Vec::new());
    let (mut large, mut both, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        if wanted.contains(&"ring-256") {
            plain.push(round(Round::Plain256)?);
            small.push(round(Round::Ring256)?);
        }
        if wanted.iter().any(|name| name.starts_with("ring-64k")) {
            large.push(round(Round::Ring64k)? * LARGE_BYTES as f64 / 1e6);
            both.push(round(Round::Plain64k)? * LARGE_BYTES as f64 / 1e6);
            alone.push(memcpy_rate(&shared.map)? / 1e6);
        }
    }
    shared.say_quit(serial + 1)?;
    peer.end()?;
    Ok(vec![
        Figure::new(
            "ring-256",
            "packets/s",
            "plain SPSC byte ring, same processes",
            small,
            plain,
        ),
        Figure::new(
            "ring-64k",
            "MB/s",
            "memcpy in and memcpy out, same processes",
            large.clone(),
            both,
        ),
        Figure::new(
            "ring-64k-alone",
            "MB/s",
            "memcpy of one process within its cache",
            large,
            alone,
        ),
    ])
}

/// The other process: reads what the first one writes, until it is told to quit. Its standard input is the shared area.
pub fn peer() -> Result<ExitCode> {
    let shared = Shared::map(std::io::stdin().as_fd())?;
    let mut seen = 0;
    loop {
        let word = shared.map.load_u32(ROUND_WORD, Ordering::Acquire)?;
        if word == seen {
            spin_loop();
            continue;
        }
        seen = word;
        match Round::from_word(word).context("an unknown round")? {
            Round::Plain256 => shared.read_plain::<SMALL_BYTES>(SMALL_COUNT)?,
            Round::Plain64k => shared.read_plain::<LARGE_BYTES>(LARGE_COUNT)?,
            Round::Ring256 => shared.read_ring(SMALL_COUNT)?,
            Round::Ring64k => shared.read_ring(LARGE_COUNT)?,
            Round::Quit => return Ok(ExitCode::SUCCESS),
        }
        shared.map.store_u32(DONE_WORD, word, Ordering::Release)?;
    }
}

struct Shared {
    map: Arc<SharedMap>,
}

impl Shared {
    fn map(memory: BorrowedFd<'_>) -> Result<Shared> {
        let map = Arc::new(SharedMap::map(memory, AREA_BYTES as usize, Access::ReadWrite)?);
        // So that no round pays for page faults.
        for page in 0..AREA_BYTES / PAGE {
            map.fetch_or_u32(page * PAGE, 0, Ordering::Relaxed)?;
        }
        Ok(Shared { map })
    }

    fn ring(&self) -> Result<RingArea> {
        let area = PagedArea::contiguous(self.map.clone(), RING_START, PAGE + DATA_BYTES)?;
        Ok(RingArea::new(area)?)
    }

    /// One round as its writer; the rate in messages a second, from the first byte to the reader's last.
    fn run(&self, kind: Round, serial: u32, peer: &mut Peer) -> Result<f64> {
        self.ring()?.initialize();
        self.map.store_u32(HEAD_WORD, 0, Ordering::Relaxed)?;
        self.map.store_u32(TAIL_WORD, 0, Ordering::Relaxed)?;
        let word = serial << 8 | kind as u32;
        let start = Instant::now();
        self.map.store_u32(ROUND_WORD, word, Ordering::Release)?;
        let count = match kind {
            Round::Plain256 => self.write_plain::<SMALL_BYTES>(SMALL_COUNT)?,
            Round::Plain64k => self.write_plain::<LARGE_BYTES>(LARGE_COUNT)?,
            Round::Ring256 => self.write_ring(SMALL_COUNT, SMALL_BYTES)?,
            Round::Ring64k => self.write_ring(LARGE_COUNT, LARGE_BYTES)?,
            Round::Quit => 0,
        };
        while self.map.load_u32(DONE_WORD, Ordering::Acquire)? != word {
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "the reading process is stuck"
            );
            peer.must_be_alive()?;
            spin_loop();
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    }

    fn say_quit(&self, serial: u32) -> Result<()> {
        let word = serial << 8 | Round::Quit as u32;
        Ok(self.map.store_u32(ROUND_WORD, word, Ordering::Release)?)
    }

    fn write_ring(&self, count: u64, bytes: usize) -> Result<u64> {
        let mut writer = RingWriter::new(self.ring()?, 0)?;
        let payload = vec![0x5A_u8; bytes];
        for number in 0..count {
            let parts = [&payload[..]];
            let packet = OutPacket::in_band(number, false, &parts);
            loop {
                match writer.stage(&packet) {
                    Ok(()) => break,
                    Err(StageError::Full) => spin_loop(),
                    Err(error) => return Err(error.into()),
                }
            }
            // The reader polls, so that it needs no signal.
            let _ = writer.commit()?;
        }
        Ok(count)
    }

    fn read_ring(&self, count: u64) -> Result<()> {
        let mut reader = RingReader::new(self.ring()?, 0)?;
        let mut buffer = PacketBuf::new();
        reader.mask_interrupts();
        let mut expected = 0;
        while expected < count {
            match reader.next(&mut buffer)? {
                Some(packet) => {
                    ensure!(packet.transaction_id == expected, "packet {expected} is missing");
                    expected += 1;
                    // Space goes back early enough that the writer never runs dry: each eighth of the ring. (So it needs
                    // not go back when the ring is empty.)
                    if used(reader.committed_index(), reader.staged_index()) > DATA_BYTES / 8 {
                        give_back(&mut reader);
                    }
                }
                None => pause(),
            }
        }
        give_back(&mut reader);
        Ok(())
    }

    fn write_plain<const BYTES: usize>(&self, count: u64) -> Result<u64> {
        let message = [0x5A_u8; BYTES];
        let (mut head, mut tail) = (0_u64, 0_u64);
        for _ in 0..count {
            while head - tail + BYTES as u64 > DATA_BYTES {
                tail = widen(tail, self.map.load_u32(TAIL_WORD, Ordering::Acquire)?);
                spin_loop();
            }
            self.map.write(PLAIN_START + head % DATA_BYTES, &message)?;
            head += BYTES as u64;
            self.map.store_u32(HEAD_WORD, head as u32, Ordering::Release)?;
        }
        Ok(count)
    }

    fn read_plain<const BYTES: usize>(&self, count: u64) -> Result<()> {
        let mut message = [0_u8; BYTES];
        let (mut head, mut tail) = (0_u64, 0_u64);
        while tail < count * BYTES as u64 {
            if head == tail {
                head = widen(head, self.map.load_u32(HEAD_WORD, Ordering::Acquire)?);
                if head == tail {
                    pause();
                }
                continue;
            }
            self.map.read(PLAIN_START + tail % DATA_BYTES, &mut message)?;
            std::hint::black_box(&message);
            tail += BYTES as u64;
            self.map.store_u32(TAIL_WORD, tail as u32, Ordering::Release)?;
        }
        Ok(())
    }
}

/// A reader's wait before it looks again at an index that has not moved. Without it each look takes the index's cache line
/// away from the writer, and what is measured is how fast two processors can quarrel about one line. The same for both rings.
fn pause() {
    for _ in 0..PAUSES {
        spin_loop();
    }
}

/// The writer polls, so that it needs no signal.
fn give_back(reader: &mut RingReader) {
    // Nobody sleeps here.
    let _ = reader.commit();
}

/// A counter that was shared by its low half: the next value at or after `known` that ends so.
fn widen(known: u64, low: u32) -> u64 {
    known + u64::from(low.wrapping_sub(known as u32))
}

fn used(from: u32, to: u32) -> u64 {
    (u64::from(to) + DATA_BYTES - u64::from(from)) % DATA_BYTES
}

/// Bytes a second by one memcpy of each payload, through an area as large as the ring.
fn memcpy_rate(map: &SharedMap) -> Result<f64> {
    let payload = vec![0x5A_u8; LARGE_BYTES];
    let start = Instant::now();
    for number in 0..LARGE_COUNT {
        let place = number * LARGE_BYTES as u64 % DATA_BYTES;
        map.write(PLAIN_START + place, std::hint::black_box(&payload))?;
    }
    Ok((LARGE_COUNT * LARGE_BYTES as u64) as f64 / start.elapsed().as_secs_f64())
}

/// Real-time priority of this thread, given back on drop.
struct RealTime;

impl RealTime {
    /// `None`: not allowed, or no `chrt`.
    fn ask() -> Option<RealTime> {
        chrt(&["--fifo", "--pid", "1"]).then_some(RealTime)
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        // What is measured next would be measured with an unfair advantage.
        assert!(chrt(&["--other", "--pid", "0"]), "a priority can be given back");
    }
}

fn chrt(arguments: &[&str]) -> bool {
    let status = Command::new("chrt")
        .args(arguments)
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

struct Peer {
    child: Child,
    looks: u32,
}

impl Peer {
    fn start(memory: OwnedFd) -> Result<Peer> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let child = Command::new(program)
            .arg("bench-peer")
            .stdin(Stdio::from(memory))
            .spawn()
            .context("cannot start the reading process")?;
        Ok(Peer { child, looks: 0 })
    }

    /// Asks now and then; a system call a look would be measured, too.
    fn must_be_alive(&mut self) -> Result<()> {
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(1 << 20) {
            ensure!(self.child.try_wait()?.is_none(), "the reading process has died");
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "the reading process ended with {status}");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // It spins on a word that nobody will write any more.
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_half_counter_is_widened_across_its_wrap() {
        assert_eq!(widen(0xFFFF_FF00, 0x100), 0x1_0000_0100);
        assert_eq!(widen(5, 5), 5);
    }
}
