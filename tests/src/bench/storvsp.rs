//! 4 KiB requests through storvsp, beside the same requests by bare io_uring on the same file.
//!
//! `storvsp-cpu`: processor time that one request costs the real, sandboxed `bulkhead-block`, less what the same request
//! costs a process that only uses io_uring: what is added by rings, journal, SCSI, answers and interrupts. The
//! guest's side is played by this process and not counted; its interrupts' cost for the server is.
//! `storvsp-interrupts`: interrupts that the guest gets per completion.
//!
//! Both at a depth of 32, reads and writes in turn at places all over a file that is in the page cache, so that
//! the disk's speed plays no part. The baseline uses `vmbus::mem::Uring`, which adds some ten nanoseconds to the
//! io-uring crate.

#![forbid(unsafe_code)]

use super::Figure;
use anyhow::{Context, Result, ensure};
use device_block::config::{CacheMode, ControllerConfig, DiskConfig, DiskKind};
use device_block::vsc::{Command, Initiator, Room};
use nix::time::{ClockId, clock_gettime};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use tempfile::NamedTempFile;
use vmbus::mem::{Durability, File as UringFile, Gpa, GuestSpans, SharedMap, Uring};

const DEPTH: u64 = 32;
const BYTES: u32 = 4096;
const FILE_BYTES: u64 = 64 << 20;
/// Many short rounds in turn, so that both sides see the same noise of a busy machine.
const ROUNDS: usize = 31;
/// Enough for a tenth of a second of processor time a round.
const REQUESTS: u64 = 20_000;

/// Measures both figures.
pub fn measure(_wanted: &[&str]) -> Result<Vec<Figure>> {
    let image = warm_image()?;
    let file = OpenOptions::new().read(true).write(true).open(image.path())?;
    let mut bare = Bare::new(&file)?;
    let mut served = Served::new(image.path())?;
    let (mut added, mut alone, mut interrupts) = (Vec::new(), Vec::new(), Vec::new());
    // One round each that does not count: page tables, caches, frequency.
    bare.round()?;
    served.round()?;
    for _ in 0..ROUNDS {
        let bare_us = bare.round()?;
        let (served_us, per_completion) = served.round()?;
        added.push(served_us - bare_us);
        alone.push(bare_us);
        interrupts.push(per_completion);
    }
    let one_each = vec![1.0; interrupts.len()];
    Ok(vec![
        Figure::new(
            "storvsp-cpu",
            "us/request",
            "bare io_uring, same requests",
            added,
            alone,
        ),
        Figure::new(
            "storvsp-interrupts",
            "interrupts/completion",
            "one interrupt each",
            interrupts,
            one_each,
        ),
    ])
}

/// A file without holes, in the page cache.
fn warm_image() -> Result<NamedTempFile> {
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
fn place(number: u64) -> (u64, bool) {
    let page = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    (
        page % (FILE_BYTES / u64::from(BYTES)) * u64::from(BYTES),
        number.is_multiple_of(2),
    )
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Processor time of a whole process, threads of io_uring included.
fn processor_time(clock: ClockId) -> Result<Duration> {
    Ok(Duration::from(clock_gettime(clock)?))
}

/// The baseline.
struct Bare<'f> {
    io: Uring,
    file: &'f File,
    pages: Vec<GuestSpans>,
}

impl<'f> Bare<'f> {
    fn new(file: &'f File) -> Result<Self> {
        let map = Arc::new(SharedMap::anonymous(
            "bench-pages",
            (DEPTH * u64::from(BYTES)) as usize,
        )?);
        let pages = (0..DEPTH)
            .map(|slot| GuestSpans::from_map(map.clone(), slot * u64::from(BYTES), BYTES))
            .collect::<Result<_, _>>()?;
        let mut io = Uring::new(2 * DEPTH as u32)?;
        io.register_files(&[file.as_fd()])?;
        Ok(Self { io, file, pages })
    }

    /// Microseconds of processor time a request.
    fn round(&mut self) -> Result<f64> {
        ensure!(
            self.file.metadata()?.len() == FILE_BYTES,
            "the file has changed its length"
        );
        let before = processor_time(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
        for slot in 0..DEPTH {
            self.issue(slot, slot)?;
        }
        let (mut issued, mut done) = (DEPTH, 0);
        while done < REQUESTS {
            self.io.submit_and_wait(1, None)?;
            while let Some(completion) = self.io.next_completion() {
                ensure!(
                    completion.result == BYTES as i32,
                    "a request failed: {}",
                    completion.result
                );
                done += 1;
                if issued < REQUESTS {
                    self.issue(issued, completion.user_data)?;
                    issued += 1;
                }
            }
        }
        let time = processor_time(ClockId::CLOCK_PROCESS_CPUTIME_ID)? - before;
        Ok(micros(time) / REQUESTS as f64)
    }

    fn issue(&mut self, number: u64, slot: u64) -> Result<()> {
        let (offset, writes) = place(number);
        let (file, page) = (UringFile::Registered(0), &self.pages[slot as usize]);
        match writes {
            true => self.io.write(file, page, offset, Durability::Cached, slot)?,
            false => self.io.read(file, page, offset, slot)?,
        };
        Ok(())
    }
}

/// The same by way of storvsp.
struct Served {
    room: Room,
    primary: Initiator,
    pages: Gpa,
    clock: ClockId,
}

impl Served {
    fn new(image: &std::path::Path) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("bulkhead-block");
        let config = ControllerConfig {
            instance: uuid::Uuid::from_u128(1),
            disks: vec![DiskConfig {
                lun: 0,
                fd: "disk".into(),
                read_only: false,
                kind: DiskKind::File,
                bytes: None,
                serial: None,
                cache: CacheMode::Writeback,
                direct: false,
            }],
            max_sub_channels: 0,
        };
        let disk = OpenOptions::new().read(true).write(true).open(image)?;
        let disks = vec![("disk".to_owned(), disk.into())];
        let mut room = Room::new(program, &config, disks, Default::default())?;
        let primary = room.open_all(0)?.remove(0);
        let pages = room.guest.allocate(DEPTH as usize)?;
        let clock = ClockId::pid_cpu_clock_id(room.child.pid)?;
        Ok(Self {
            room,
            primary,
            pages,
            clock,
        })
    }

    /// Microseconds of the server's processor time a request, and interrupts a completion.
    fn round(&mut self) -> Result<(f64, f64)> {
        // The server is asleep or about to be: what it did before is over.
        self.room.supervisor.ping(1, self.room.deadline())?;
        let before = processor_time(self.clock)?;
        let interrupts = self.primary.channel.counters().interrupts;
        let (mut issued, mut done) = (0, 0);
        let mut free: Vec<u64> = (0..DEPTH).collect();
        while done < REQUESTS {
            while issued < REQUESTS
                && let Some(slot) = free.pop()
            {
                let (offset, writes) = place(issued);
                let page = Gpa(self.pages.0 + slot * u64::from(BYTES));
                let command = match writes {
                    true => Command::write(0, offset, page, BYTES),
                    false => Command::read(0, offset, page, BYTES),
                };
                self.primary.queue_as(&command, slot + 1)?;
                issued += 1;
            }
            self.primary.channel.flush()?;
            let mut failed = None;
            let mut each = |id: u64, reply: device_block::vsc::Reply| {
                free.push(id - 1);
                if !reply.is_good(BYTES) {
                    failed = Some(reply);
                }
            };
            let had = self.primary.collect_ready(DEPTH as usize, &mut each)? as u64;
            done += had;
            if had == 0 {
                self.primary.collect(1, self.room.deadline(), &mut each)?;
                done += 1;
            }
            ensure!(failed.is_none(), "a request failed: {failed:?}");
        }
        let time = processor_time(self.clock)? - before;
        let interrupts = self.primary.channel.counters().interrupts - interrupts;
        Ok((
            micros(time) / REQUESTS as f64,
            interrupts as f64 / REQUESTS as f64,
        ))
    }
}
