//! 4 KiB requests through storvsp, beside the same requests by bare io_uring on the same file.
//!
//! `storvsp-cpu`: processor time that one request costs the real, sandboxed `bulkhead-block`, less what the same request
//! costs a process that has nothing but io_uring. `storvsp-interrupts`: interrupts that the guest gets per completion.
//!
//! # What is in the figure
//! Processor time of the whole server process (`CLOCK_PROCESS_CPUTIME_ID` of its pid), the kernel's workers for its io_uring
//! included, while it serves 20,000 requests. The guest's side is played by this process and not counted. Both sides do the
//! same I/O: one file of 64 MiB in the page cache, 4 KiB at places all over it, cached, 32 in flight, and a new request
//! as soon as one is answered, so the disk's speed plays no part. Two baselines:
//!
//! - *driven*: a process that is sent the same requests by the same loop, through a plain queue in shared memory, with an
//!   eventfd each way that is written when the other side sleeps. It sleeps in io_uring like the server, and wakes the
//!   guest likewise. What is left is VMBus and storvsp: packets, rings, journal, SCSI, checks, answers, event flags, seccomp.
//!   These are the figures without suffix.
//! - *alone*: a process that thinks its requests up itself. Nobody wakes it and it wakes nobody; the difference contains
//!   the wake-ups that any server of another process has. These are the figures with `-alone`.
//!
//! Reads and writes in turn (`storvsp-cpu`), and reads only (`storvsp-cpu-reads`): Linux gives buffered writes of most file systems to
//! worker threads, whose own cost is several times that of everything else and varies with who wakes whom when.
//!
//! The baselines use `vmbus::mem::Uring`, which adds some ten nanoseconds to the io-uring crate, and a registered file, which
//! the server may not have (`vmbus::lease`).

#![forbid(unsafe_code)]

mod bare;
mod served;

use super::Figure;
use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use std::io::Write;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;

pub use bare::server;
pub use served::Served;

const DEPTH: u64 = 32;
const BYTES: u32 = 4096;
const FILE_BYTES: u64 = 64 << 20;
/// Many short rounds in turn, so that both sides see the same noise of a busy machine.
const ROUNDS: usize = 25;
/// Enough for some hundredths of a second of processor time a round.
const REQUESTS: u64 = 20_000;

/// Which requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// Reads and writes in turn.
    Both,
    /// Reads only.
    Reads,
}

/// What a round has cost.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Microseconds of the server's processor time for one request.
    pub cpu_us: f64,
    /// Requests a second.
    pub rate: f64,
}

/// Whoever brings requests to a server.
trait Driver {
    /// Sends a request on the memory page `slot`.
    fn send(&mut self, offset: u64, writes: bool, slot: u64) -> Result<()>;
    /// Waits until there are answers, and gives the slots of all that are there back.
    fn collect(&mut self, free: &mut Vec<u64>) -> Result<()>;
}

/// Measures the figures.
pub fn measure(wanted: &[&str]) -> Result<Vec<Figure>> {
    let image = warm_image()?;
    let program = std::env::current_exe()?.with_file_name("bulkhead-block");
    let mut served = Served::new(&program, &[], image.path())?;
    let mut driven = bare::Driven::new(image.path())?;
    let mut alone = bare::Alone::new(image.path())?;
    let mut figures = Vec::new();
    let mut interrupts = Vec::new();
    for (mix, names) in [
        (Mix::Both, ["storvsp-cpu", "storvsp-cpu-alone"]),
        (Mix::Reads, ["storvsp-cpu-reads", "storvsp-cpu-reads-alone"]),
    ] {
        let counts = mix == Mix::Both && wanted.contains(&"storvsp-interrupts");
        if !counts && !names.iter().any(|name| wanted.contains(name)) {
            continue;
        }
        let mut times: [Vec<f64>; 3] = Default::default();
        // One turn that does not count: page tables, caches, frequency.
        for turn in 0..=ROUNDS {
            let before = served.interrupts();
            let costs = [served.round(mix)?, driven.round(mix)?, alone.round(mix)?];
            if turn == 0 {
                continue;
            }
            for (times, cost) in times.iter_mut().zip(costs) {
                times.push(cost.cpu_us);
            }
            if counts {
                interrupts.push((served.interrupts() - before) as f64 / REQUESTS as f64);
            }
        }
        let [served, driven, alone] = times;
        let added = |to: &[f64]| served.iter().zip(to).map(|(all, bare)| all - bare).collect();
        let [same, itself] = [
            "io_uring in a process that is sent the same requests",
            "io_uring in a process that makes the same requests itself",
        ];
        figures.push(Figure::new(names[0], "us/request", same, added(&driven), driven));
        figures.push(Figure::new(names[1], "us/request", itself, added(&alone), alone));
    }
    let one_each = vec![1.0; interrupts.len()];
    figures.push(Figure::new(
        "storvsp-interrupts",
        "interrupts/completion",
        "one interrupt each",
        interrupts,
        one_each,
    ));
    Ok(figures)
}

/// A file without holes, in the page cache.
pub fn warm_image() -> Result<NamedTempFile> {
    let mut image = NamedTempFile::new().context("cannot make a temporary file")?;
    let block = vec![0x5A; 1 << 20];
    for _ in 0..FILE_BYTES / block.len() as u64 {
        image
            .write_all(&block)
            .context("cannot fill the temporary file")?;
    }
    image.as_file().sync_all()?;
    Ok(image)
}

/// Where request `number` goes, and whether it writes.
fn place(number: u64, mix: Mix) -> (u64, bool) {
    let page = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (
        page % (FILE_BYTES / u64::from(BYTES)) * u64::from(BYTES),
        mix == Mix::Both && number.is_multiple_of(2),
    )
}

/// One round of requests. `clock` is the server's processor time.
fn drive(driver: &mut impl Driver, mix: Mix, clock: ClockId) -> Result<Cost> {
    let (before, start) = (processor_time(clock)?, Instant::now());
    let mut free: Vec<u64> = (0..DEPTH).collect();
    let mut issued = 0;
    while issued < REQUESTS || free.len() < DEPTH as usize {
        while issued < REQUESTS
            && let Some(slot) = free.pop()
        {
            let (offset, writes) = place(issued, mix);
            driver.send(offset, writes, slot)?;
            issued += 1;
        }
        driver.collect(&mut free)?;
    }
    cost(clock, before, start)
}

fn cost(clock: ClockId, before: Duration, start: Instant) -> Result<Cost> {
    let seconds = start.elapsed().as_secs_f64();
    let time = processor_time(clock)? - before;
    Ok(Cost {
        cpu_us: time.as_secs_f64() * 1e6 / REQUESTS as f64,
        rate: REQUESTS as f64 / seconds,
    })
}

/// Processor time of a whole process, threads of io_uring included.
fn processor_time(clock: ClockId) -> Result<Duration> {
    Ok(Duration::from(clock_gettime(clock)?))
}
