//! Traffic both ways that verifies itself, for tests in which servers die or are replaced.
//!
//! ```text
//!   thread of the load                       whoever kills
//!     Load::run(&watch)                        Watch::progress(): wait until it grows
//!       stage, flush, poll, give back          Watch::dying(), kill, wait for the end, Watch::dead(), start the next
//!       write and read the network's end       Watch::take_slowest(): how long the guest waited
//!     Load::finish(&watch, …) -> Tally         Watch::stop(): end the load
//! ```
//! The load needs an open [`Driver`] whose packet filter admits its frames ([`FILTER`]) and the other end of the stream
//! that the server has as its backend. It does not know who starts servers.
//!
//! Every frame names its sender (transmit channel or flow) and its number among that one's, and ends with a checksum of
//! all of it. So each of these is found, whatever dies when:
//!
//! | fault | found by | counted as |
//! | --- | --- | --- |
//! | a transmit completed twice, or one that was never sent | the driver's table of outstanding packets | `double`, and an error |
//! | a transmit or control message that is not completed | [`Load::finish`] waits for it | `lost` |
//! | a frame delivered twice, or before an older one of its sender | its number, in both directions | `double` |
//! | a frame changed, or a stream out of step | checksum, length | `wrong` |
//! | a frame overwritten while the guest holds it | read once more when it is given back | `wrong` |
//! | a sub-allocation in two packets | the driver's set of those it holds | error of the driver |
//! | a flow on another channel than before (RSS state forgotten) | the channel of its first frame | `wrong` |
//! | an interrupt missing while the guest sleeps | a look into the rings after a nap | `lost` |
//! | a receive credit gone | free credits of the server whenever [`Load::finish`] is called | `lost` |
//! | a frame gone without a death to blame | no server was dying during its life (below) | `lost` |
//!
//! Networks lose frames, and a server that dies between back end and ring takes frames with it: what it has read from the
//! network and not published, what it has taken from the guest and not sent. Such a frame is no fault and shows in
//! `dropped_out` and `dropped_in`; TCP sends it again. No other frame may be missing, since this load neither overruns
//! the server's queues nor its receive buffer. So a missing frame must have been under way while a server was dying: for
//! a frame of the guest's between staging its packet and the completion of that, for one of the network's between
//! queueing it for the socket and the next arrival of its flow.

mod network;
mod watch;
mod way;

pub use network::FRAME_BYTES_MIN;
pub use watch::{Tally, Watch};

use super::driver::oid_body;
use super::traffic::UNASKED;
use super::{Driver, Form};
use crate::rndis::oid;
use crate::rndis::packet::FrameRequests;
use crate::rndis::wire::{emit_message, number};
use network::{Network, Random, frame, mark_of};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Arguments;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmbus::mem::HostError;
use vmbus::vsc::VscError;
use way::{Arrival, Way};

/// Directed, multicast, broadcast: what Linux sets at ifup.
pub const FILTER: u32 = 0x0B;
/// A bit more, without effect on the frames of a load.
const ALL_MULTICAST: u32 = 0x04;
/// Packets outstanding on each transmit channel. With four channels the driver's sections and pages are enough for it.
const DEPTH: usize = 32;
/// Frames to the guest that may wait in our memory for the socket.
const OUTBOX_BYTES: usize = 64 << 10;
/// Packets kept by the guest at most before they are given back.
const KEPT: usize = 48;
const FLOWS: u16 = 16;
/// Longest wait in one step; whoever stops the load waits for it.
const NAP_MS: u16 = 20;
/// Steps for which the network does not read now and then.
const DEAF_STEPS: u32 = 200;
/// A nap counts for so many of them: some 80 ms at most, longer than a server that is replaced waits for the network.
const DEAF_STEPS_OF_NAP: u32 = 50;
/// Limit: how long an interrupt may take after what it tells of.
const INTERRUPT_DELAY: Duration = Duration::from_secs(1);
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

/// A packet on its way out.
#[derive(Debug)]
struct Flight {
    id: u64,
    since: Instant,
    /// Its frames.
    numbers: Range<u64>,
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
    /// By transmit channel.
    ways_out: Vec<Way>,
    /// By flow.
    ways_in: Vec<Way>,
    channel_of_flow: BTreeMap<u16, usize>,
    kept: Vec<Kept>,
    /// Id of the control request that is not answered.
    asked: Option<u32>,
    next_request: u32,
    /// Steps for which the network is not read, so that the server's side fills up.
    deaf: u32,
    tally: Tally,
    first_fault: Option<String>,
    /// If wanted: of each packet completed, when it was sent and when its completion was seen. Whoever wants them takes
    /// them out.
    pub lives: Option<Vec<(Instant, Instant)>>,
}

impl Load {
    /// A load on an open NIC. `network` is the other end of the stream that the servers have.
    pub fn new(mut driver: Driver, network: UnixStream, seed: u64) -> Result<Self, LoadError> {
        network.set_nonblocking(true).map_err(LoadError::Stream)?;
        driver.give_back = false;
        let channels = driver.channels.len();
        let senders = usize::from(FLOWS);
        Ok(Self {
            network: Network::new(network),
            random: Random(seed | 1),
            flights: (0..channels).map(|_| VecDeque::new()).collect(),
            ways_out: (0..channels).map(|_| Way::default()).collect(),
            ways_in: (0..senders).map(|_| Way::default()).collect(),
            channel_of_flow: BTreeMap::new(),
            kept: Vec::new(),
            asked: None,
            next_request: 1 << 16,
            deaf: 0,
            tally: Tally::default(),
            first_fault: None,
            lives: None,
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

    /// What was counted so far. The dropped frames are those known at the last [`Load::finish`].
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// The network does not read now, so that packets wait for it.
    pub fn is_deaf(&self) -> bool {
        self.deaf > 0
    }

    /// When the oldest packet was sent that is not completed.
    pub fn oldest(&self) -> Option<Instant> {
        let oldest = self.flights.iter().filter_map(VecDeque::front);
        oldest.map(|flight| flight.since).min()
    }

    /// Packets sent and not completed.
    pub fn under_way(&self) -> usize {
        self.flights.iter().map(VecDeque::len).sum()
    }

    /// The first fault that was counted, in words.
    pub fn first_fault(&self) -> Option<&str> {
        self.first_fault.as_deref()
    }

    /// Offers nothing more, waits for all that is due, and says what became of everything so far. The load may go on
    /// after it.
    ///
    /// `free_credits` asks the server for `receive-buffer/free`; at the end it must be all of them. No server dies
    /// meanwhile.
    pub fn finish(
        &mut self,
        watch: &Watch,
        mut free_credits: impl FnMut() -> Result<u32, String>,
        deadline: Instant,
    ) -> Result<Tally, LoadError> {
        self.deaf = 0;
        loop {
            let moved = self.exchange(watch)?;
            self.give_back(0)?;
            let ways = || self.ways_out.iter().chain(&self.ways_in);
            let frames_due: u64 = ways().map(|way| way.due(&watch.deaths)).sum();
            let is_due = self.driver.outstanding() != 0
                || self.asked.is_some()
                || !self.kept.is_empty()
                || frames_due != 0;
            let is_quiet = !moved && !is_due && self.network.outbox.is_empty();
            if is_quiet && free_credits().map_err(LoadError::Credits)? == self.driver.suballocation_count {
                break;
            }
            if Instant::now() > deadline {
                let missing = free_credits().map_err(LoadError::Credits)?;
                let missing = self.driver.suballocation_count.saturating_sub(missing);
                let outstanding = self.driver.outstanding();
                self.tally.lost += outstanding as u64 + u64::from(missing) + frames_due;
                self.fault(format!(
                    "{missing} credits, {outstanding} completions and {frames_due} frames missing at the end"
                ));
                break;
            }
            if !moved && is_due {
                self.nap()?;
            }
        }
        // What arrived with the last completion.
        while self.exchange(watch)? {}
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
                let frame = frame(self.driver.nic.mac, flow, self.ways_in[place].set_out(), bytes);
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
            self.deaf = DEAF_STEPS;
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
        let since = Instant::now();
        let mut frames = Vec::new();
        let mut numbers = 0..0;
        for index in 0..count {
            let bytes = self.random.frame_bytes() / count as usize;
            let number = self.ways_out[channel].set_out();
            if index == 0 {
                numbers.start = number;
            }
            numbers.end = number + 1;
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
        self.flights[channel].push_back(Flight { id, since, numbers });
        self.tally.packets += 1;
        self.tally.sent += count;
        Ok(())
    }

    /// A control message, answered once whoever dies in between.
    fn ask(&mut self) -> Result<(), LoadError> {
        self.next_request += 1;
        let request = self.next_request;
        // Every other one changes what the server has saved, and nothing else.
        let message = if request.is_multiple_of(2) {
            emit_message(number::KEEPALIVE, &request.to_le_bytes(), &[])
        } else {
            let bits = [FILTER, FILTER | ALL_MULTICAST][request as usize / 2 % 2];
            let mut body = oid_body(oid::GEN_CURRENT_PACKET_FILTER, &bits.to_le_bytes());
            body[..4].copy_from_slice(&request.to_le_bytes());
            emit_message(number::SET, &body, &[])
        };
        self.driver.send_control(&message)?;
        self.asked = Some(request);
        self.tally.requests += 1;
        Ok(())
    }

    /// Takes what has come, from both sides, and gives back some.
    fn exchange(&mut self, watch: &Watch) -> Result<bool, LoadError> {
        let mut moved = false;
        for channel in 0..self.flights.len() {
            let seen = self.driver.poll_once(channel).inspect_err(|error| {
                if matches!(error, VscError::Missing(UNASKED)) {
                    self.tally.double += 1;
                    let what = format!("channel {channel}: a packet is completed that is not under way");
                    self.first_fault.get_or_insert(what);
                }
            })?;
            moved |= seen != 0;
            if seen != 0 {
                self.settle_flights(channel, watch);
            }
        }
        // Each frame is read where it lies, with the packet that it came in.
        self.driver.frames.clear();
        for (channel, id) in std::mem::take(&mut self.driver.unreturned) {
            self.on_packet(channel, id, watch)?;
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
            self.on_arrived(watch);
        }
        Ok(moved)
    }

    /// Notes which packets are completed, and how long that took.
    fn settle_flights(&mut self, channel: usize, watch: &Watch) {
        let (driver, tally) = (&self.driver, &mut self.tally);
        let (way, lives) = (&mut self.ways_out[channel], &mut self.lives);
        let done = Instant::now();
        self.flights[channel].retain(|flight| {
            let is_out = driver.is_outstanding(channel, flight.id);
            if !is_out {
                tally.completed += 1;
                way.complete(flight.numbers.clone(), done);
                lives
                    .iter_mut()
                    .for_each(|lives| lives.push((flight.since, done)));
                let took = done.saturating_duration_since(flight.since).as_micros() as u64;
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
    fn on_packet(&mut self, channel: usize, id: u64, watch: &Watch) -> Result<(), LoadError> {
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
            let way = self.ways_in.get_mut(usize::from(flow));
            let arrival = way.map_or(Arrival::Unknown, |way| way.arrive(number, &watch.deaths));
            self.note_arrival(arrival, format_args!("frame {number} of flow {flow}"));
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
    fn on_arrived(&mut self, watch: &Watch) {
        while let Some(bytes) = self.network.take() {
            let (mark, bytes) = (mark_of(bytes), bytes.len());
            let Some((channel, number)) = mark else {
                self.tally.wrong += 1;
                self.fault(format!("a frame of {bytes} bytes for the network was changed"));
                continue;
            };
            self.tally.arrived += 1;
            let way = self.ways_out.get_mut(usize::from(channel));
            let arrival = way.map_or(Arrival::Unknown, |way| way.arrive(number, &watch.deaths));
            self.note_arrival(arrival, format_args!("frame {number} of channel {channel}"));
        }
    }

    fn note_arrival(&mut self, arrival: Arrival, what: Arguments<'_>) {
        match arrival {
            Arrival::Due { lost: 0, .. } => {}
            Arrival::Due { swallowed, lost } => {
                self.tally.lost += lost;
                self.fault(format!(
                    "{what} came, and of those before it {lost} never did, with no death to blame; {swallowed} with one"
                ));
            }
            Arrival::Again(due) => {
                self.tally.double += 1;
                self.fault(format!("{what} came when {due} was due"));
            }
            Arrival::Unknown => {
                self.tally.wrong += 1;
                self.fault(format!("{what} was never sent"));
            }
        }
    }

    /// Sleeps as a driver does, until anything comes.
    ///
    /// If nothing comes although there is something in a ring, a guest without a clock would sleep for ever.
    pub fn nap(&mut self) -> Result<(), LoadError> {
        self.deaf = self.deaf.saturating_sub(DEAF_STEPS_OF_NAP);
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
            Ok(0) => {}
            Ok(_) | Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(VscError::from(HostError::new("wait for a load", errno)).into()),
        }
        for channel in &mut self.driver.channels {
            if channel.lacks_interrupt(INTERRUPT_DELAY)? {
                self.tally.lost += 1;
                self.first_fault
                    .get_or_insert("something is in a ring, and no interrupt says so".to_owned());
            }
        }
        Ok(())
    }
}
