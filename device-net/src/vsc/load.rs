//! Traffic both ways that verifies itself, for tests in which servers die or are replaced.
//!
//! ```text
//!   thread of the load                       whoever kills
//!     Load::run(&watch)                        Watch::progress(): wait until it grows, then kill, start the next
//!       stage, flush, poll, give back          Watch::take_slowest(): how long the guest waited
//!       write and read the network's end       Watch::stop(): end the load
//!     Load::finish(free credits, deadline) -> Tally
//! ```
//! The load needs an open [`Driver`] whose packet filter admits its frames ([`FILTER`]) and the other end of the stream
//! that the server has as its backend. It does not know who starts servers.
//!
//! Every frame names its sender (transmit channel or flow) and its number among that one's, and ends with a checksum of
//! all of it. So each of these is found, whatever dies when:
//!
//! | fault | found by | counted as |
//! | --- | --- | --- |
//! | a transmit completed twice, or one that was never sent | the driver's table of outstanding packets | error of the driver |
//! | a transmit or control message that is not completed | [`Load::finish`] waits for it | `lost` |
//! | a frame delivered twice, or before an older one of its sender | its number, in both directions | `double` |
//! | a frame changed, or a stream out of step | checksum, length | `wrong` |
//! | a frame overwritten while the guest holds it | read once more when it is given back | `wrong` |
//! | a sub-allocation in two packets | the driver's set of those it holds | error of the driver |
//! | a flow on another channel than before (RSS state forgotten) | the channel of its first frame | `wrong` |
//! | a receive credit gone | free credits of the server at the end | `lost` |
//!
//! A frame that a death has swallowed is no fault: networks lose frames. It shows in `dropped_out` and `dropped_in`.

use super::{Driver, Form};
use crate::rndis::packet::FrameRequests;
use crate::rndis::wire::{emit_message, number};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmbus::mem::HostError;
use vmbus::vsc::VscError;

/// Directed, multicast, broadcast: what Linux sets at ifup.
pub const FILTER: u32 = 0x0B;
/// Packets outstanding on each transmit channel. With four channels the driver's sections and pages are enough for it.
const DEPTH: usize = 32;
/// Frames to the guest that may wait in our memory for the socket.
const OUTBOX_BYTES: usize = 64 << 10;
/// Packets kept by the guest at most before they are given back.
const KEPT: usize = 48;
const FLOWS: u16 = 16;
/// Ethernet, IPv4, UDP.
const HEADER_BYTES: usize = 14 + 20 + 8;
/// Sender, number.
const MARK_BYTES: usize = 2 + 8;
const CHECKSUM_BYTES: usize = 4;
/// Smallest frame of a load.
pub const FRAME_BYTES_MIN: usize = HEADER_BYTES + MARK_BYTES + CHECKSUM_BYTES;
const FRAME_BYTES_MAX: usize = 1514;
/// Longest wait in one step; whoever stops the load waits for it.
const NAP_MS: u16 = 20;
/// Limit: how long nothing at all may move while the load runs. A server that has missed a wake-up is found by it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a load had to stop.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The server broke the protocol.
    #[error(transparent)]
    Vsc(#[from] VscError),
    /// The network's end of the stream is gone.
    #[error("the network's end of the stream: {0}")]
    Stream(std::io::Error),
    /// Nothing has moved for long: [`Load::describe`] says what was waited for.
    #[error("nothing moved for {0:?}")]
    Stuck(Duration),
    /// The credits could not be asked for.
    #[error("free credits: {0}")]
    Credits(String),
}

/// What became of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets of frames given to the server, and those completed.
    pub packets: u64,
    pub completed: u64,
    /// Control messages, and their answers.
    pub requests: u64,
    pub answers: u64,
    /// Frames in those packets, and those that reached the network.
    pub sent: u64,
    pub arrived: u64,
    /// Frames given to the network, and those that reached the guest.
    pub put: u64,
    pub received: u64,
    /// Frames that went missing, as networks may lose them.
    pub dropped_out: u64,
    pub dropped_in: u64,
    /// Packets, requests and credits that never came back.
    pub lost: u64,
    pub double: u64,
    pub wrong: u64,
}

impl Tally {
    /// No fault was found.
    pub fn is_clean(&self) -> bool {
        (self.lost, self.double, self.wrong) == (0, 0, 0)
    }
}

/// What a running load tells other threads, and what they tell it.
#[derive(Debug, Default)]
pub struct Watch {
    stop: AtomicBool,
    progress: AtomicU64,
    slowest_us: AtomicU64,
}

// Ordering: all relaxed. The words are counters and a request; nothing else is read because of them.
impl Watch {
    /// Packets completed and frames received so far.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Ends [`Load::run`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The longest time, in microseconds, between sending and completion of any packet completed since the last call.
    pub fn take_slowest(&self) -> u64 {
        self.slowest_us.swap(0, Ordering::Relaxed)
    }
}

/// A packet on its way out.
#[derive(Debug)]
struct Flight {
    id: u64,
    since: Instant,
}

/// A packet that the guest keeps.
#[derive(Debug)]
struct Kept {
    channel: usize,
    id: u64,
    /// Sender and number of each frame.
    marks: Vec<(u16, u64)>,
}

/// A load on one NIC.
#[derive(Debug)]
pub struct Load {
    driver: Driver,
    network: Network,
    random: Random,
    flights: Vec<VecDeque<Flight>>,
    /// Next number of each transmit channel, of each flow.
    next_out: Vec<u64>,
    next_in: Vec<u64>,
    /// Number expected at least, by sender.
    expected_out: Vec<u64>,
    expected_in: Vec<u64>,
    channel_of_flow: BTreeMap<u16, usize>,
    kept: Vec<Kept>,
    /// Id of the control request that is not answered.
    asked: Option<u32>,
    next_request: u32,
    /// Steps for which the network is not read, so that the server's side fills up.
    deaf: u32,
    tally: Tally,
    first_fault: Option<String>,
}

impl Load {
    /// A load on an open NIC. `network` is the other end of the stream that the servers have.
    pub fn new(mut driver: Driver, network: UnixStream, seed: u64) -> Result<Self, LoadError> {
        network.set_nonblocking(true).map_err(LoadError::Stream)?;
        driver.give_back = false;
        let channels = driver.channels.len();
        let senders = usize::from(FLOWS);
        Ok(Self {
            network: Network {
                stream: network,
                inbox: Vec::new(),
                outbox: VecDeque::new(),
            },
            random: Random(seed | 1),
            flights: (0..channels).map(|_| VecDeque::new()).collect(),
            next_out: vec![0; channels],
            expected_out: vec![0; channels],
            next_in: vec![0; senders],
            expected_in: vec![0; senders],
            channel_of_flow: BTreeMap::new(),
            kept: Vec::new(),
            asked: None,
            next_request: 1 << 16,
            deaf: 0,
            tally: Tally::default(),
            first_fault: None,
            driver,
        })
    }

    /// Works until told to stop.
    pub fn run(&mut self, watch: &Watch) -> Result<(), LoadError> {
        let mut moved = Instant::now();
        while !watch.stop.load(Ordering::Relaxed) {
            if self.step(watch)? {
                moved = Instant::now();
            } else if moved.elapsed() > PATIENCE {
                return Err(LoadError::Stuck(PATIENCE));
            } else {
                self.nap()?;
            }
        }
        Ok(())
    }

    /// Does a little of everything and waits for nothing. Whether anything moved.
    pub fn step(&mut self, watch: &Watch) -> Result<bool, LoadError> {
        let mut moved = self.offer()?;
        moved |= self.exchange(watch)?;
        Ok(moved)
    }

    /// What is waited for, and the first fault.
    pub fn describe(&self) -> String {
        format!(
            "{:?}, outstanding {:?}, kept {}, asked {:?}, waiting for the network {} bytes, first fault {:?}",
            self.tally,
            self.flights.iter().map(VecDeque::len).collect::<Vec<_>>(),
            self.kept.len(),
            self.asked,
            self.network.outbox.len(),
            self.first_fault
        )
    }

    /// The first fault that was counted, in words.
    pub fn first_fault(&self) -> Option<&str> {
        self.first_fault.as_deref()
    }

    /// Offers nothing more, waits for all that is due, and says what became of everything.
    ///
    /// `free_credits` asks the server for `receive-buffer/free`; at the end it must be all of them.
    pub fn finish(
        &mut self,
        mut free_credits: impl FnMut() -> Result<u32, String>,
        deadline: Instant,
    ) -> Result<Tally, LoadError> {
        let watch = Watch::default();
        self.deaf = 0;
        loop {
            let moved = self.exchange(&watch)?;
            self.give_back(0)?;
            let is_due = self.driver.outstanding() != 0 || self.asked.is_some() || !self.kept.is_empty();
            let is_quiet = !moved && !is_due && self.network.outbox.is_empty();
            if is_quiet && free_credits().map_err(LoadError::Credits)? == self.driver.suballocation_count {
                break;
            }
            if Instant::now() > deadline {
                let missing = free_credits().map_err(LoadError::Credits)?;
                let missing = self.driver.suballocation_count.saturating_sub(missing);
                self.tally.lost += self.driver.outstanding() as u64 + u64::from(missing);
                self.fault(format!("{missing} credits missing at the end"));
                break;
            }
            if !moved && is_due {
                self.nap()?;
            }
        }
        // What arrived with the last completion.
        while self.exchange(&watch)? {}
        self.tally.dropped_out = self.tally.sent - self.tally.arrived;
        self.tally.dropped_in = self.tally.put - self.tally.received;
        Ok(self.tally)
    }

    /// Gives the driver back.
    pub fn into_driver(self) -> Driver {
        self.driver
    }

    fn fault(&mut self, what: String) {
        self.first_fault.get_or_insert(what);
    }

    /// New packets for the server, new frames for the network, and now and then a question.
    fn offer(&mut self) -> Result<bool, LoadError> {
        let mut moved = false;
        for channel in 0..self.flights.len() {
            for _ in 0..self.random.below(4) {
                if self.flights[channel].len() < DEPTH {
                    self.send(channel)?;
                    moved = true;
                }
            }
            self.driver.flush(channel)?;
        }
        for _ in 0..self.random.below(8) {
            if self.network.outbox.len() < OUTBOX_BYTES {
                let flow = self.random.below(u64::from(FLOWS)) as u16;
                let bytes = self.random.frame_bytes();
                let place = usize::from(flow);
                let frame = frame(self.driver.nic.mac, flow, self.next_in[place], bytes);
                self.next_in[place] += 1;
                self.network.put(&frame);
                self.tally.put += 1;
                moved = true;
            }
        }
        if self.asked.is_none() && self.random.below(64) == 0 {
            self.ask()?;
            moved = true;
        }
        if self.deaf == 0 && self.random.below(500) == 0 {
            self.deaf = 200;
        }
        Ok(moved)
    }

    fn send(&mut self, channel: usize) -> Result<(), LoadError> {
        const TO: [u8; 6] = [2, 0, 0, 0, 0, 1];
        let form = [Form::Section, Form::Pages, Form::Partial][self.random.below(3) as usize];
        let count = if form == Form::Section {
            1 + self.random.below(4)
        } else {
            1
        };
        let mut frames = Vec::new();
        for _ in 0..count {
            let bytes = self.random.frame_bytes() / count as usize;
            let number = self.next_out[channel];
            self.next_out[channel] += 1;
            frames.push(frame(TO, channel as u16, number, bytes));
        }
        let requests = FrameRequests::default();
        let id = if form == Form::Section {
            let parts: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            let staged = self.driver.stage_batch(channel, &parts, &requests)?;
            staged.ok_or(VscError::Missing("free section"))?
        } else {
            self.driver.stage_pages(channel, &frames[0], form, &requests)?
        };
        self.flights[channel].push_back(Flight {
            id,
            since: Instant::now(),
        });
        self.tally.packets += 1;
        self.tally.sent += count;
        Ok(())
    }

    /// A control message, answered once whoever dies in between.
    fn ask(&mut self) -> Result<(), LoadError> {
        self.next_request += 1;
        let request = self.next_request;
        self.driver
            .send_control(&emit_message(number::KEEPALIVE, &request.to_le_bytes(), &[]))?;
        self.asked = Some(request);
        self.tally.requests += 1;
        Ok(())
    }

    /// Takes what has come, from both sides, and gives back some.
    fn exchange(&mut self, watch: &Watch) -> Result<bool, LoadError> {
        let mut moved = false;
        for channel in 0..self.flights.len() {
            let seen = self.driver.poll_once(channel)?;
            moved |= seen != 0;
            if seen != 0 {
                self.settle_flights(channel, watch);
            }
        }
        // Each frame is read where it lies, with the packet that it came in.
        self.driver.frames.clear();
        for (channel, id) in std::mem::take(&mut self.driver.unreturned) {
            self.on_packet(channel, id)?;
            watch.progress.fetch_add(1, Ordering::Relaxed);
        }
        while let Some(response) = self.driver.responses.pop_front() {
            let id = response.get(8..12).and_then(|bytes| bytes.first_chunk());
            let id = id.map(|bytes| u32::from_le_bytes(*bytes));
            if id.is_some() && id == self.asked {
                self.asked = None;
                self.tally.answers += 1;
            } else {
                self.tally.double += 1;
                self.fault(format!(
                    "an answer to request {id:x?}, which does not wait for one"
                ));
            }
        }
        let kept = self.random.below(KEPT as u64) as usize;
        self.give_back(kept)?;
        moved |= self.network.flush(&mut self.random).map_err(LoadError::Stream)?;
        if self.deaf > 0 {
            self.deaf -= 1;
        } else {
            moved |= self.network.read().map_err(LoadError::Stream)?;
            self.on_arrived();
        }
        Ok(moved)
    }

    /// Notes which packets are completed, and how long that took.
    fn settle_flights(&mut self, channel: usize, watch: &Watch) {
        let (driver, tally) = (&self.driver, &mut self.tally);
        self.flights[channel].retain(|flight| {
            let is_out = driver.is_outstanding(channel, flight.id);
            if !is_out {
                tally.completed += 1;
                let took = flight.since.elapsed().as_micros() as u64;
                watch.slowest_us.fetch_max(took, Ordering::Relaxed);
                watch.progress.fetch_add(1, Ordering::Relaxed);
            }
            is_out
        });
        for status in self.driver.completed.drain(..) {
            if status != 1 {
                self.tally.wrong += 1;
                self.first_fault
                    .get_or_insert(format!("a packet completed with status {status}"));
            }
        }
    }

    /// A packet of frames for the guest.
    fn on_packet(&mut self, channel: usize, id: u64) -> Result<(), LoadError> {
        let mut marks = Vec::new();
        for bytes in self.driver.reread(channel, id)? {
            let Some((flow, number)) = mark_of(&bytes) else {
                self.tally.wrong += 1;
                self.fault(format!(
                    "a frame of {} bytes for the guest was changed",
                    bytes.len()
                ));
                continue;
            };
            self.tally.received += 1;
            marks.push((flow, number));
            let Some(expected) = self.expected_in.get_mut(usize::from(flow)) else {
                self.tally.wrong += 1;
                continue;
            };
            if number < *expected {
                let expected = *expected;
                self.tally.double += 1;
                self.fault(format!(
                    "flow {flow}: frame {number} came when {expected} was due"
                ));
            } else {
                *expected = number + 1;
            }
            let usual = *self.channel_of_flow.entry(flow).or_insert(channel);
            if usual != channel {
                self.tally.wrong += 1;
                self.fault(format!("flow {flow} came on channel {channel}, not {usual}"));
            }
        }
        self.kept.push(Kept { channel, id, marks });
        Ok(())
    }

    /// Gives packets back, in any order, until at most so many are kept. Each must be as it was when it came.
    fn give_back(&mut self, most: usize) -> Result<(), LoadError> {
        while self.kept.len() > most {
            let place = self.random.below(self.kept.len() as u64) as usize;
            let Kept { channel, id, marks } = self.kept.swap_remove(place);
            let now: Vec<_> = self.driver.reread(channel, id)?;
            if now.iter().filter_map(|bytes| mark_of(bytes)).collect::<Vec<_>>() != marks {
                self.tally.wrong += 1;
                self.fault("a frame was overwritten while the guest held it".to_owned());
            }
            self.driver.give_back_packet(channel, id)?;
        }
        for channel in 0..self.flights.len() {
            self.driver.flush(channel)?;
        }
        Ok(())
    }

    /// Frames that reached the network.
    fn on_arrived(&mut self) {
        while let Some(bytes) = self.network.take() {
            let mark = mark_of(&bytes);
            let Some((channel, number)) = mark else {
                self.tally.wrong += 1;
                self.fault(format!(
                    "a frame of {} bytes for the network was changed",
                    bytes.len()
                ));
                continue;
            };
            self.tally.arrived += 1;
            match self.expected_out.get_mut(usize::from(channel)) {
                None => self.tally.wrong += 1,
                Some(expected) if number < *expected => {
                    let expected = *expected;
                    self.tally.double += 1;
                    self.fault(format!(
                        "channel {channel}: frame {number} arrived when {expected} was due"
                    ));
                }
                Some(expected) => *expected = number + 1,
            }
        }
    }

    /// Sleeps as a driver does, until anything comes.
    fn nap(&mut self) -> Result<(), LoadError> {
        for channel in &mut self.driver.channels {
            // Unmasks, and looks once more; the deadline is over before it would wait.
            if channel.wait(Instant::now())? {
                return Ok(());
            }
        }
        let mut fds: Vec<PollFd<'_>> = self
            .driver
            .channels
            .iter()
            .map(|channel| PollFd::new(channel.interrupt(), PollFlags::POLLIN))
            .collect();
        fds.push(PollFd::new(self.network.stream.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::from(NAP_MS)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(VscError::from(HostError::new("wait for a load", errno)).into()),
        }
    }
}

/// The far end of the stream.
#[derive(Debug)]
struct Network {
    stream: UnixStream,
    inbox: Vec<u8>,
    outbox: VecDeque<u8>,
}

impl Network {
    fn put(&mut self, frame: &[u8]) {
        self.outbox.extend((frame.len() as u32).to_be_bytes());
        self.outbox.extend(frame);
    }

    /// Writes pieces that end anywhere, so that the server sees halves of frames. Whether any were written.
    fn flush(&mut self, random: &mut Random) -> std::io::Result<bool> {
        let mut moved = false;
        while !self.outbox.is_empty() {
            let piece = 1 + random.below(4000) as usize;
            let (front, _) = self.outbox.as_slices();
            match self.stream.write(&front[..front.len().min(piece)]) {
                Ok(count) => {
                    self.outbox.drain(..count);
                    moved = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    fn read(&mut self) -> std::io::Result<bool> {
        let mut moved = false;
        let mut bytes = vec![0; 64 << 10];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.inbox.extend_from_slice(&bytes[..count]);
                    moved = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next whole frame.
    fn take(&mut self) -> Option<Vec<u8>> {
        let (length, rest) = self.inbox.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let frame = rest.get(..length)?.to_vec();
        self.inbox.drain(..4 + length);
        Some(frame)
    }
}

/// A frame of a load: UDP, so that receive-side scaling sees a flow.
fn frame(to: [u8; 6], sender: u16, number: u64, bytes: usize) -> Vec<u8> {
    let bytes = bytes.clamp(FRAME_BYTES_MIN, FRAME_BYTES_MAX);
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&((bytes - 14) as u16).to_be_bytes());
    // Not a fragment; 64 hops; UDP; no checksum, which nobody on the way looks at.
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    frame.extend_from_slice(&(4000 + sender).to_be_bytes());
    frame.extend_from_slice(&[0x20, 0]);
    frame.extend_from_slice(&((bytes - 34) as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(&sender.to_be_bytes());
    frame.extend_from_slice(&number.to_be_bytes());
    let filling = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    frame.extend((frame.len()..bytes - CHECKSUM_BYTES).map(|place| (place as u64 ^ filling) as u8));
    let checksum = crc32fast::hash(&frame);
    frame.extend_from_slice(&checksum.to_be_bytes());
    frame
}

/// Sender and number of a frame; `None` if it is not as it was made.
fn mark_of(frame: &[u8]) -> Option<(u16, u64)> {
    let (body, checksum) = frame.split_last_chunk::<CHECKSUM_BYTES>()?;
    if crc32fast::hash(body) != u32::from_be_bytes(*checksum) {
        return None;
    }
    let mark = body.get(HEADER_BYTES..)?;
    let (sender, rest) = mark.split_first_chunk::<2>()?;
    Some((
        u16::from_be_bytes(*sender),
        u64::from_be_bytes(*rest.first_chunk()?),
    ))
}

/// Xorshift, so that a seed names a load.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        if limit == 0 { 0 } else { self.0 % limit }
    }

    fn frame_bytes(&mut self) -> usize {
        match self.below(3) {
            0 => FRAME_BYTES_MIN,
            1 => FRAME_BYTES_MAX,
            _ => FRAME_BYTES_MIN + self.below((FRAME_BYTES_MAX - FRAME_BYTES_MIN) as u64) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_tells_who_it_is_and_whether_it_was_changed() {
        for bytes in [0, FRAME_BYTES_MIN, 500, FRAME_BYTES_MAX] {
            let mut frame = frame([2; 6], 7, 0x1_0000_0001, bytes);
            assert_eq!(frame.len(), bytes.max(FRAME_BYTES_MIN));
            assert_eq!(mark_of(&frame), Some((7, 0x1_0000_0001)));
            for place in [0, 20, HEADER_BYTES, frame.len() - 1] {
                frame[place] ^= 4;
                assert_eq!(mark_of(&frame), None);
                frame[place] ^= 4;
            }
        }
    }
}
