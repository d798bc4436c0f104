//! Bytes from a guest to a device server across two processes, beside what two processes, or one, can do without VMBus.
//!
//! | figure | what is moved, and how | beside |
//! | --- | --- | --- |
//! | `ring-256` | packets of 256 bytes, guest to server, through the types that every server is made of | a plain ring of bytes |
//! | `ring-64k` | requests whose 64 KiB lie in the guest's pages; the server copies them out and answers | memcpy |
//! | `ring-64k-filled` | the same; the guest fills each buffer anew before it sends it | memcpy |
//! | `ring-256-polled` | packets of 256 bytes through the two ends of a ring, no more; both sides poll | a plain ring of bytes |
//! | `ring-64k-inline` | packets that hold 64 KiB themselves; both sides poll | memcpy |
//! | `ring-64k-crossing` | the same | 64 KiB copied in by one process and out by the other |
//!
//! The first two have bars; the first three are what a VM does (`served`): the guest publishes each packet by itself as Linux does and
//! kicks when the ring's rules say so; the server is `vmbus::channel::Endpoint` and sleeps in io_uring when it has read
//! all. Big data never goes through a ring in bulkhead: a disk's and a network card's stay in the guest's pages,
//! which a GPA-direct packet names, and are moved from there once. So that is what a transfer of 64 KiB is: send the
//! numbers of a buffer's pages, copy out, answer; 32 requests in flight. The guest marks both ends of the buffer, and the
//! server looks for the marks. `ring-64k-filled` contains the making of the data, too, which no transfer can be blamed for: two
//! threads without VMBus, one of which fills buffers that the other copies, come to the same rate within a tenth. The
//! other three (`polled`) tell what the ring itself costs.
//!
//! # The baselines
//! The *plain ring* is a lock-free single-producer ring of bytes, as large as the VMBus ring, between the same two processes: a
//! head and a tail, each in a cache line of its own, each side remembering the other's as long as that will do. Both sides
//! poll. It is measured twice, with and without a pause between two looks at an index that has not moved; `ring-256` is
//! compared with the faster of the two, `ring-256-polled`, which does not pause, with the one that does not.
//!
//! *memcpy* copies the same bytes in one process: from the guest's buffers, one after the other, to a disk's worth of
//! memory of the same size. Nobody fills the buffers meanwhile, and the other processor does nothing.
//!
//! # Noise
//! Two processors are needed to say anything. On a busy machine a round would mostly tell when the scheduler lets both sides
//! run at once; so both ask for real-time priority for the second that it takes, and go on without it if they may not
//! have it. All kinds of rounds take turns, and medians are compared.

#![forbid(unsafe_code)]

mod peer;
mod polled;
mod served;

use super::{Figure, median};
use anyhow::Result;
use std::process::{Command, Stdio};

pub use peer::peer;

/// Bytes of the data area of each ring.
const DATA_BYTES: u64 = 1 << 20;
const SMALL_BYTES: usize = 256;
const LARGE_BYTES: usize = 64 << 10;
/// Enough for some tens of milliseconds a round.
const SMALL_COUNT: u64 = 400_000;
const LARGE_COUNT: u64 = 3_000;
/// Requests in flight, and thus buffers of the guest.
const DEPTH: u64 = 32;
const ROUNDS: usize = 15;

/// What a round moves, and through what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Round {
    Plain256 = 1,
    Plain256Paced = 2,
    Plain64k = 3,
    Polled256 = 4,
    Polled64k = 5,
    Served256 = 6,
    Served64k = 7,
    Filled64k = 8,
    Quit = 9,
}

impl Round {
    const ALL: [Round; 9] = [
        Round::Plain256,
        Round::Plain256Paced,
        Round::Plain64k,
        Round::Polled256,
        Round::Polled64k,
        Round::Served256,
        Round::Served64k,
        Round::Filled64k,
        Round::Quit,
    ];

    fn from_word(word: u32) -> Option<Round> {
        Round::ALL.into_iter().find(|round| *round as u32 == word & 0xFF)
    }

    fn bytes(self) -> usize {
        match self {
            Round::Plain64k | Round::Polled64k | Round::Served64k | Round::Filled64k => LARGE_BYTES,
            _ => SMALL_BYTES,
        }
    }

    fn count(self) -> u64 {
        match self.bytes() {
            LARGE_BYTES => LARGE_COUNT,
            _ => SMALL_COUNT,
        }
    }
}

/// Measures the figures.
pub fn measure(wanted: &[&str]) -> Result<Vec<Figure>> {
    // Before the other process is made, which inherits it.
    let _priority = RealTime::ask();
    let mut peer = peer::Peer::start()?;
    let small = wanted.iter().any(|name| name.starts_with("ring-256"));
    let large = wanted.iter().any(|name| name.starts_with("ring-64k"));
    let kinds = Round::ALL.into_iter().filter(|kind| match kind.bytes() {
        _ if *kind == Round::Quit => false,
        LARGE_BYTES => large,
        _ => small,
    });
    let kinds: Vec<Round> = kinds.collect();
    // Rates by kind, and of memcpy.
    let mut rates: Vec<Vec<f64>> = kinds.iter().map(|_| Vec::new()).collect();
    let mut memcpy = Vec::new();
    // One turn that does not count: page tables, caches, frequency.
    for turn in 0..=ROUNDS {
        for (kind, rates) in kinds.iter().zip(&mut rates) {
            let rate = peer.round(*kind)?;
            if turn > 0 {
                rates.push(rate);
            }
        }
        if large {
            let rate = peer.memcpy()?;
            if turn > 0 {
                memcpy.push(rate);
            }
        }
    }
    peer.end()?;
    let of = |wanted: Round| {
        let found = kinds.iter().position(|kind| *kind == wanted);
        found.map_or_else(Vec::new, |index| rates[index].clone())
    };
    let megabytes = |wanted: Round| -> Vec<f64> {
        let bytes = wanted.bytes() as f64;
        of(wanted).into_iter().map(|rate| rate * bytes / 1e6).collect()
    };
    let memcpy: Vec<f64> = memcpy
        .into_iter()
        .map(|rate| rate * LARGE_BYTES as f64 / 1e6)
        .collect();
    let [plain, paced] = [of(Round::Plain256), of(Round::Plain256Paced)];
    let (fastest, which) = match median(&plain) >= median(&paced) {
        true => (plain.clone(), "a plain ring, not pausing, same processes"),
        false => (paced, "a plain ring, pausing, same processes"),
    };
    Ok(vec![
        Figure::new("ring-256", "packets/s", which, of(Round::Served256), fastest),
        Figure::new(
            "ring-64k",
            "MB/s",
            "memcpy of the same bytes in one process",
            megabytes(Round::Served64k),
            memcpy.clone(),
        ),
        Figure::new(
            "ring-64k-filled",
            "MB/s",
            "memcpy of the same bytes in one process",
            megabytes(Round::Filled64k),
            memcpy.clone(),
        ),
        Figure::new(
            "ring-256-polled",
            "packets/s",
            "a plain ring, not pausing, same processes",
            of(Round::Polled256),
            plain,
        ),
        Figure::new(
            "ring-64k-inline",
            "MB/s",
            "memcpy of the same bytes in one process",
            megabytes(Round::Polled64k),
            memcpy,
        ),
        Figure::new(
            "ring-64k-crossing",
            "MB/s",
            "memcpy in and memcpy out, same processes",
            megabytes(Round::Polled64k),
            megabytes(Round::Plain64k),
        ),
    ])
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
