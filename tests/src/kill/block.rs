//! Verified load on a disk: what every block of every place must hold is known at any time.
//!
//! Each channel has places of its own on the disk, and alone decides what they hold. A place with a request
//! under way is left alone by others; a read is therefore right in one way only. Every 4 KiB block carries its place
//! and the number of the write that put it there ([`super::pattern`]).
//!
//! Checked: each request is completed once and with success; what a read returns; that a block whose write or unmap was
//! answered is in the file (a sample of them, and one place after each flush); every place at the end, by reading the
//! file and by reading the disk.
//! Not checked: whether what a flush promised survives a loss of power. The file is in the host's page cache, which no
//! death of a process empties.

#![forbid(unsafe_code)]

use super::faults::{Fault, Faults};
use super::host::Host;
use super::pattern::{self, BLOCK_BYTES, Random};
use super::timeline::{Life, Timeline};
use super::{DEPTH, PATIENCE};
use anyhow::{Context, Result};
use device_block::vsc::{Command, Initiator, Reply};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmbus::mem::{Gpa, GuestRam};
use vmbus::vsc::ChannelOptions;

/// Places of each channel.
const PLACES: u64 = 512;

/// Blocks of the longest request.
const MOST_BLOCKS: u64 = 4;

/// Bytes of the longest request.
const MOST_BYTES: usize = MOST_BLOCKS as usize * BLOCK_BYTES;

/// What is where a read is going to put its data: whatever the device does not write shows.
static UNREAD: [u8; MOST_BYTES] = [0xDD; MOST_BYTES];

/// How often the load looks at the age of its requests, and for how long a channel sleeps before it is looked at.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_MS: u16 = LOOK.as_millis() as u16;

/// Bytes of a disk for so many channels.
pub fn disk_bytes(channels: u16) -> u64 {
    u64::from(channels) * PLACES * BLOCK_BYTES as u64
}

/// The primary and its sub-channels, opened as Linux does, whatever server dies meanwhile.
pub fn open_channels(host: &mut Host<'_>, channels: u16, faults: &Faults) -> Result<Vec<Initiator>> {
    let deadline = Instant::now() + PATIENCE;
    let mut primary = Initiator::new(host.guest.open_channel(ChannelOptions::default())?);
    let is_open = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let hosting = scope.spawn(|| host.serve(&is_open, faults));
        let opened = primary
            .initialize(deadline)
            .and_then(|_| primary.create_sub_channels(channels - 1, deadline));
        // Ordering: a flag; what it says needs nothing else to be seen.
        is_open.store(true, Ordering::Relaxed);
        let hosted = hosting.join();
        hosted.map_err(|_| anyhow::anyhow!("the played bulkhead-vcpu has panicked"))??;
        opened.context("the disk cannot be opened")
    })?;
    let mut initiators = vec![primary];
    // 0, or an error, from a server that has just died: its successor will ask again.
    while matches!(host.guest.wait_sub_channels(deadline), Ok(0) | Err(_)) && Instant::now() < deadline {
        host.turn(faults)?;
    }
    for sub_index in 1..=host.guest.wait_sub_channels(deadline)? {
        let options = ChannelOptions {
            sub_index,
            ..ChannelOptions::default()
        };
        initiators.push(Initiator::new(host.guest.open_channel(options)?));
    }
    anyhow::ensure!(
        initiators.len() == usize::from(channels),
        "{} channels instead of {channels}",
        initiators.len()
    );
    Ok(initiators)
}

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Work {
    Read { first: u64, blocks: u64 },
    Write { first: u64, sequences: Vec<u64> },
    Unmap { first: u64, blocks: u64 },
    Flush,
}

#[derive(Debug)]
struct Request {
    work: Work,
    slot: u64,
    /// When the server could see it; before that, when it was staged.
    sent: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Number of the write that was answered last; 0: none, or unmapped since.
    sequence: u64,
    busy: bool,
}

/// One channel, and what the disk must hold of it.
pub struct Load<'a> {
    channel: usize,
    initiator: Initiator,
    ram: GuestRam,
    /// [`MOST_BLOCKS`] blocks for each of [`DEPTH`] requests.
    pages: Gpa,
    file: &'a File,
    faults: &'a Faults,
    timeline: &'a Timeline,
    random: Random,
    /// Data on its way, [`MOST_BYTES`]: made once, because what the load costs, the servers under test lack.
    buffer: Vec<u8>,
    places: Vec<Place>,
    free_slots: Vec<u64>,
    /// Since when only an interrupt makes it look at its ring, as with a driver.
    asleep: Option<Instant>,
    /// Taken, when, and not checked yet.
    answers: Vec<(u64, Reply, Instant)>,
    under_way: BTreeMap<u64, Request>,
    next_id: u64,
    next_sequence: u64,
}

/// Sends and checks on all channels until `stop` is set and everything is answered; then looks at every place.
///
/// One thread for all, as for a network interface: the guest's own threads, waiting for each other's processor, would look
/// like a server that stalls.
pub fn run(mut loads: Vec<Load<'_>>, faults: &Faults, stop: &AtomicBool) -> Result<String> {
    if let Err(error) = send_and_take(&mut loads, stop) {
        faults.count(Fault::Wrong, format_args!("{error:#}"));
        return Ok(String::new());
    }
    for load in &mut loads {
        load.look_at_all()?;
    }
    Ok(String::new())
}

/// Until nothing is under way and nothing is wanted, or something is lost.
fn send_and_take(loads: &mut [Load<'_>], stop: &AtomicBool) -> Result<()> {
    let mut looked = Instant::now();
    loop {
        // Ordering: a flag; what it says needs nothing else to be seen.
        let stopping = stop.load(Ordering::Relaxed);
        for index in 0..loads.len() {
            // Of all, before one is checked: what has come is not to look late because of that.
            loads.iter_mut().try_for_each(Load::take)?;
            loads[index].turn(stopping)?;
        }
        if stopping && loads.iter().all(|load| load.under_way.is_empty()) {
            return Ok(());
        }
        if looked.elapsed() > LOOK {
            looked = Instant::now();
            for load in &mut *loads {
                if load.has_lost_one() || load.has_lost_interrupt()? {
                    return Ok(());
                }
            }
        }
        hear(loads)?;
    }
}

/// Hears the interrupts of the channels that sleep. If all do, so does this thread.
fn hear(loads: &mut [Load<'_>]) -> Result<()> {
    let timeout = match loads.iter().all(|load| load.asleep.is_some()) {
        true => LOOK_MS,
        false => 0,
    };
    let mut fds: Vec<_> = loads
        .iter()
        .filter(|load| load.asleep.is_some())
        .map(|load| PollFd::new(load.initiator.channel.interrupt(), PollFlags::POLLIN))
        .collect();
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("the load cannot wait for its interrupts"),
    }
    let heard: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    let sleepers = loads.iter_mut().filter(|load| load.asleep.is_some());
    for (load, _) in sleepers.zip(heard).filter(|(_, heard)| *heard) {
        load.initiator.channel.wait_interrupt(Instant::now())?;
        load.asleep = None;
    }
    Ok(())
}

impl<'a> Load<'a> {
    /// Nothing is sent yet.
    pub fn new(
        host: &mut Host<'_>,
        channel: usize,
        initiator: Initiator,
        file: &'a File,
        (faults, timeline): (&'a Faults, &'a Timeline),
        seed: u64,
    ) -> Result<Self> {
        let blocks = DEPTH * MOST_BLOCKS;
        let pages = host.guest.allocate(blocks as usize)?;
        Ok(Self {
            channel,
            initiator,
            ram: host.guest.ram().clone(),
            pages,
            file,
            faults,
            timeline,
            random: Random::new(seed, channel as u64),
            buffer: vec![0; MOST_BYTES],
            places: vec![Place::default(); PLACES as usize],
            free_slots: (0..DEPTH).collect(),
            asleep: None,
            answers: Vec::new(),
            under_way: BTreeMap::new(),
            next_id: 1,
            next_sequence: 1,
        })
    }

    /// Takes the answers that are there, to be checked by [`Self::turn`].
    fn take(&mut self) -> Result<()> {
        if self.asleep.is_some() {
            return Ok(());
        }
        let answers = &mut self.answers;
        self.initiator
            .collect_ready(2 * DEPTH as usize, |id, reply| {
                answers.push((id, reply, Instant::now()))
            })
            .with_context(|| format!("channel {}", self.channel))?;
        Ok(())
    }

    /// Checks what was taken, and sends what there is room for unless `stopping`. Falls asleep if nothing was there.
    fn turn(&mut self, stopping: bool) -> Result<()> {
        if self.asleep.is_some() {
            return Ok(());
        }
        let mut answers = std::mem::take(&mut self.answers);
        let had_some = !answers.is_empty();
        let mut lives = Vec::with_capacity(answers.len());
        for (id, reply, done) in answers.drain(..) {
            self.on_answer(id, &reply, done, &mut lives)?;
        }
        self.answers = answers;
        if !stopping {
            self.send_all()?;
        }
        let oldest = self.under_way.values().next().map(|request| request.sent);
        self.timeline
            .report(self.channel, &lives, oldest, self.under_way.len());
        // Unmasks, and looks once more; the deadline is over before it would wait.
        if !had_some && !self.initiator.channel.wait(Instant::now())? {
            self.asleep = Some(Instant::now());
        }
        Ok(())
    }

    /// Sends what there is room for.
    fn send_all(&mut self) -> Result<()> {
        let first = self.next_id;
        while let Some(slot) = self.free_slots.pop() {
            self.stage(slot)?;
        }
        let now = Instant::now();
        for (_, request) in self.under_way.range_mut(first..) {
            request.sent = now;
        }
        Ok(self.initiator.channel.flush()?)
    }

    fn stage(&mut self, slot: u64) -> Result<()> {
        let page = self.page(slot);
        let work = self.choose();
        let bytes = |blocks: u64| blocks as u32 * BLOCK_BYTES as u32;
        let command = match &work {
            Work::Read { first, blocks } => {
                self.ram.write(page, &UNREAD[..bytes(*blocks) as usize])?;
                Command::read(0, self.offset(*first), page, bytes(*blocks))
            }
            Work::Write { first, sequences } => {
                let number = self.number(*first);
                let data = &mut self.buffer[..sequences.len() * BLOCK_BYTES];
                let blocks = data.chunks_exact_mut(BLOCK_BYTES);
                for ((number, block), sequence) in (number..).zip(blocks).zip(sequences) {
                    pattern::fill(block, number, *sequence);
                }
                self.ram.write(page, data)?;
                let (offset, length) = (self.offset(*first), bytes(sequences.len() as u64));
                match self.random.below(8) {
                    0 => Command::write_durable(0, offset, page, length),
                    _ => Command::write(0, offset, page, length),
                }
            }
            Work::Unmap { first, blocks } => {
                let list = Command::unmap_list(&[(self.offset(*first), bytes(*blocks))]);
                self.ram.write(page, &list)?;
                Command::unmap(0, page, list.len() as u16)
            }
            Work::Flush => Command::flush(0),
        };
        let id = self.next_id;
        self.next_id += 1;
        let sent = Instant::now();
        self.initiator.queue_as(&command, id)?;
        self.under_way.insert(id, Request { work, slot, sent });
        Ok(())
    }

    /// 45 reads, 43 writes, 10 unmaps and 2 flushes of a hundred, of one to four blocks.
    fn choose(&mut self) -> Work {
        let kind = self.random.below(100);
        if kind < 2 {
            return Work::Flush;
        }
        let (first, blocks) = loop {
            let blocks = 1 + self.random.below(MOST_BLOCKS);
            let first = self.random.below(PLACES - blocks + 1);
            if self.span(first, blocks).iter().all(|place| !place.busy) {
                break (first, blocks);
            }
        };
        self.span(first, blocks)
            .iter_mut()
            .for_each(|place| place.busy = true);
        match kind {
            2..12 => Work::Unmap { first, blocks },
            12..55 => {
                let from = self.next_sequence;
                self.next_sequence += blocks;
                Work::Write {
                    first,
                    sequences: (from..from + blocks).collect(),
                }
            }
            _ => Work::Read { first, blocks },
        }
    }

    fn on_answer(&mut self, id: u64, reply: &Reply, done: Instant, lives: &mut Vec<Life>) -> Result<()> {
        let Some(Request { work, slot, sent }) = self.under_way.remove(&id) else {
            let what = if id < self.next_id {
                "again"
            } else {
                "and was never sent"
            };
            self.faults.count(
                Fault::Double,
                format_args!("channel {}: request {id} is completed {what}", self.channel),
            );
            return Ok(());
        };
        lives.push(Life { sent, done });
        let bytes = match &work {
            Work::Read { blocks, .. } => *blocks as u32 * BLOCK_BYTES as u32,
            Work::Write { sequences, .. } => sequences.len() as u32 * BLOCK_BYTES as u32,
            Work::Unmap { .. } => 24,
            Work::Flush => 0,
        };
        let good = match work {
            // What an UNMAP reports as moved is its list, or nothing.
            Work::Unmap { .. } => reply.is_good(bytes) || reply.is_good(0),
            _ => reply.is_good(bytes),
        };
        if !good {
            self.wrong(format_args!("{work:?} is answered with {reply:?}"));
        }
        match work {
            Work::Read { first, blocks } => {
                let page = self.page(slot);
                self.ram.read(page, &mut self.buffer[..bytes as usize])?;
                self.check(first, blocks, "a read");
                self.release(first, blocks);
            }
            Work::Write { first, sequences } => {
                for (place, sequence) in self
                    .span(first, sequences.len() as u64)
                    .iter_mut()
                    .zip(&sequences)
                {
                    place.sequence = *sequence;
                }
                self.after_change(first, sequences.len() as u64, "the file after an answered write")?;
            }
            Work::Unmap { first, blocks } => {
                self.span(first, blocks)
                    .iter_mut()
                    .for_each(|place| place.sequence = 0);
                self.after_change(first, blocks, "the file after an answered unmap")?;
            }
            Work::Flush => {
                let place = self.random.below(PLACES);
                if self.span(place, 1).iter().all(|place| !place.busy) {
                    self.look_at_file(place, 1, "the file after a flush")?;
                }
            }
        }
        self.free_slots.push(slot);
        Ok(())
    }

    fn after_change(&mut self, first: u64, blocks: u64, after: &str) -> Result<()> {
        if self.random.below(8) == 0 {
            self.look_at_file(first, blocks, after)?;
        }
        self.release(first, blocks);
        Ok(())
    }

    fn look_at_file(&mut self, first: u64, blocks: u64, after: &str) -> Result<()> {
        let offset = self.offset(first);
        self.file
            .read_exact_at(&mut self.buffer[..blocks as usize * BLOCK_BYTES], offset)
            .context("the disk's file cannot be read")?;
        self.check(first, blocks, after);
        Ok(())
    }

    /// Checks so many blocks in the buffer.
    fn check(&self, first: u64, blocks: u64, what: &str) {
        for (place, block) in (first..first + blocks).zip(self.buffer.chunks_exact(BLOCK_BYTES)) {
            let sequence = self.places[place as usize].sequence;
            if let Err(why) = pattern::check(block, self.number(place), sequence) {
                self.wrong(format_args!("{what}: {why}"));
            }
        }
    }

    fn wrong(&self, what: std::fmt::Arguments<'_>) {
        self.faults
            .count(Fault::Wrong, format_args!("channel {}: {what}", self.channel));
    }

    /// A request that has waited so long is lost.
    fn has_lost_one(&self) -> bool {
        let is_old = |request: &Request| request.sent.elapsed() > PATIENCE;
        let Some((id, request)) = self.under_way.iter().find(|(_, request)| is_old(request)) else {
            return false;
        };
        self.faults.count(
            Fault::Lost,
            format_args!(
                "channel {}: request {id} ({:?}) has no completion after {PATIENCE:?}; {} more are under way",
                self.channel,
                request.work,
                self.under_way.len() - 1
            ),
        );
        true
    }

    /// Whether it has slept for long, there is something in the ring all the same, and no interrupt comes for it: a guest that
    /// does not look at a clock would wait for ever.
    fn has_lost_interrupt(&mut self) -> Result<bool> {
        if self.asleep.is_none_or(|since| since.elapsed() < LOOK) {
            return Ok(false);
        }
        // If one comes while that is looked at, nobody else will hear it.
        self.asleep = None;
        let is_lost = self.initiator.channel.lacks_interrupt(2 * LOOK)?;
        if is_lost {
            let number = self.channel;
            self.faults.count(
                Fault::Lost,
                format_args!("channel {number}: an answer is in the ring, and no interrupt says so"),
            );
        }
        Ok(is_lost)
    }

    /// Every place, in the file and through the disk.
    fn look_at_all(&mut self) -> Result<()> {
        if !self.under_way.is_empty() {
            // Lost, and counted as such.
            return Ok(());
        }
        for first in (0..PLACES).step_by(MOST_BLOCKS as usize) {
            self.look_at_file(first, MOST_BLOCKS, "the file at the end")?;
            let command = Command::read(
                0,
                self.offset(first),
                self.pages,
                MOST_BLOCKS as u32 * BLOCK_BYTES as u32,
            );
            let reply = self.initiator.execute(&command, Instant::now() + PATIENCE)?;
            if !reply.is_good(MOST_BLOCKS as u32 * BLOCK_BYTES as u32) {
                self.wrong(format_args!(
                    "the last look at place {first} is answered with {reply:?}"
                ));
            }
            self.ram.read(self.pages, &mut self.buffer)?;
            self.check(first, MOST_BLOCKS, "the last read");
        }
        Ok(())
    }

    fn page(&self, slot: u64) -> Gpa {
        Gpa(self.pages.0 + slot * MOST_BYTES as u64)
    }

    fn span(&mut self, first: u64, blocks: u64) -> &mut [Place] {
        &mut self.places[first as usize..(first + blocks) as usize]
    }

    fn release(&mut self, first: u64, blocks: u64) {
        self.span(first, blocks)
            .iter_mut()
            .for_each(|place| place.busy = false);
    }

    /// A place's number among those of all channels.
    fn number(&self, place: u64) -> u64 {
        self.channel as u64 * PLACES + place
    }

    fn offset(&self, place: u64) -> u64 {
        self.number(place) * BLOCK_BYTES as u64
    }
}
