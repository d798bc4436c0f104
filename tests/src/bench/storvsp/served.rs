//! The real server, and a guest's driver.

#![forbid(unsafe_code)]

use super::{BYTES, Cost, DEPTH, Driver, Mix, drive};
use anyhow::{Result, ensure};
use device_block::config::{CacheMode, ControllerConfig, DiskConfig, DiskKind};
use device_block::vsc::{Command, Initiator, Reply, Room};
use nix::time::ClockId;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use vmbus::mem::Gpa;

/// Limit: how long one answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The journal's first page says who may read it, and is always written.
const BEHIND_HEADER: u64 = 4096;

/// `bulkhead-block` with one disk, and its guest.
pub struct Served {
    room: Room,
    guest: Guest,
    clock: ClockId,
}

struct Guest {
    primary: Initiator,
    pages: Gpa,
}

impl Served {
    /// Starts `program` with these arguments and the file as its disk.
    pub fn new(program: &Path, args: &[&str], image: &Path) -> Result<Self> {
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
        let mut room = Room::with_arguments(program.to_owned(), args, &config, disks, Default::default())?;
        let primary = room.open_all(0)?.remove(0);
        let pages = room.guest.allocate(DEPTH as usize)?;
        let clock = ClockId::pid_cpu_clock_id(room.child.pid)?;
        Ok(Self {
            room,
            guest: Guest { primary, pages },
            clock,
        })
    }

    /// One round of requests.
    pub fn round(&mut self, mix: Mix) -> Result<Cost> {
        // The server is asleep or about to be: what it did before is over.
        self.room.supervisor.ping(1, self.room.deadline())?;
        drive(&mut self.guest, mix, self.clock)
    }

    /// Whether the server has written anything about its channel into its journal.
    pub fn has_journal(&self) -> Result<bool> {
        let journal = File::from(self.room.journal().try_clone_to_owned()?);
        // The saved state, and the primary channel's header and slots.
        let mut bytes = vec![0; 256 << 10];
        journal.read_exact_at(&mut bytes, BEHIND_HEADER)?;
        Ok(bytes.iter().any(|byte| *byte != 0))
    }

    /// Interrupts that the guest has had.
    pub fn interrupts(&self) -> u64 {
        self.guest.primary.channel.counters().interrupts
    }
}

impl Driver for Guest {
    /// Published by itself, as Linux does it.
    fn send(&mut self, offset: u64, writes: bool, slot: u64) -> Result<()> {
        let page = Gpa(self.pages.0 + slot * u64::from(BYTES));
        let command = match writes {
            true => Command::write(0, offset, page, BYTES),
            false => Command::read(0, offset, page, BYTES),
        };
        self.primary.queue_as(&command, slot + 1)?;
        Ok(self.primary.channel.flush()?)
    }

    fn collect(&mut self, free: &mut Vec<u64>) -> Result<()> {
        let mut failed = None;
        let mut each = |id: u64, reply: Reply| {
            free.push(id - 1);
            if !reply.is_good(BYTES) {
                failed = Some(reply);
            }
        };
        if self.primary.collect_ready(DEPTH as usize, &mut each)? == 0 {
            self.primary.collect(1, Instant::now() + PATIENCE, &mut each)?;
        }
        ensure!(failed.is_none(), "a request failed: {failed:?}");
        Ok(())
    }
}
