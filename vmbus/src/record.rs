//! The flight recorder: what a process did last, readable after it died.
//!
//! A fixed ring of typed events in a sealed memfd that the supervisor makes and keeps. One thread writes; anyone who
//! holds the descriptor may read, at any time. No text, no allocation, no lock: an event is four stores and a look at
//! the clock.
//!
//! ```text
//!   0     header       u64 magic, u64 number of the next event
//!   4096  512 events   u64 number + 1 (0: never written), u64 monotonic ns,
//!                      u64 kind | channel << 32, u64 value
//! ```
//!
//! The number is set to 0 before an event is overwritten and stored last, so that a torn event is not taken for a whole
//! one. A reader believes nothing: the writer may have been taken over. What it gets are numbers; kinds that
//! it does not know it shows as numbers.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use crate::mem::{Access, HostError, SharedMap, sealed_memfd};

/// Limit: events kept. Enough for some hundred requests, in four pages of memory.
pub const EVENT_COUNT: u64 = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"BHREC\x01\0\0");
const NEXT: u64 = 8;
const EVENTS: u64 = 4096;
const EVENT_BYTES: u64 = 32;

/// Bytes of a recorder's memfd.
pub const RECORDER_BYTES: u64 = EVENTS + EVENT_COUNT * EVENT_BYTES;

const IN_RANGE: &str = "event offsets lie in the mapped recorder";

/// What happened. The meaning of the value is in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum EventKind {
    /// The process started [generation].
    Start = 1,
    /// A channel was opened or taken over [open epoch].
    ChannelOpened = 2,
    /// A channel was given back [open epoch].
    ChannelClosed = 3,
    /// The guest broke a channel [open epoch].
    ChannelBroken = 4,
    /// A kick was drained [0].
    Kick = 5,
    /// A request was taken [transaction id].
    Take = 6,
    /// A request was handed to the backend [transaction id].
    Submit = 7,
    /// The backend is done with a request [transaction id].
    BackendDone = 8,
    /// A completion was staged [transaction id].
    Complete = 9,
    /// Staged packets were made visible [write index].
    Publish = 10,
    /// The guest was interrupted [target VP].
    Interrupt = 11,
    /// The device's protocol changed its state [the device's own number].
    State = 12,
}

impl EventKind {
    fn from_number(number: u32) -> Option<Self> {
        use EventKind::*;
        let all = [
            Start,
            ChannelOpened,
            ChannelClosed,
            ChannelBroken,
            Kick,
            Take,
            Submit,
            BackendDone,
            Complete,
            Publish,
            Interrupt,
            State,
        ];
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// The writing end.
#[derive(Debug)]
pub struct Recorder {
    map: SharedMap,
    /// Written by one thread only; atomic so that the recorder can be shared within that rule.
    next: AtomicU64,
}

impl Recorder {
    /// Makes the memory of a recorder. The supervisor does, once for each process.
    pub fn new_memory() -> Result<OwnedFd, HostError> {
        sealed_memfd("recorder", RECORDER_BYTES)
    }

    /// Writes behind what a predecessor wrote.
    pub fn new(fd: BorrowedFd<'_>) -> Result<Self, HostError> {
        let map = map(fd, Access::ReadWrite)?;
        let next = match map.load_u64(0, Ordering::Acquire).expect(IN_RANGE) {
            MAGIC => map.load_u64(NEXT, Ordering::Acquire).expect(IN_RANGE),
            _ => 0,
        };
        map.store_u64(0, MAGIC, Ordering::Release).expect(IN_RANGE);
        Ok(Self {
            map,
            next: AtomicU64::new(next),
        })
    }

    /// Records an event of `channel` (a sub-channel index; 0 where there is none).
    pub fn record(&self, kind: EventKind, channel: u16, value: u64) {
        // Ordering: one thread writes; a reader in another process trusts only numbers that it reads twice.
        let number = self.next.load(Ordering::Relaxed);
        let at = EVENTS + number % EVENT_COUNT * EVENT_BYTES;
        let kind = u64::from(kind as u32) | u64::from(channel) << 32;
        let store = |offset: u64, value: u64| {
            self.map
                .store_u64(offset, value, Ordering::Release)
                .expect(IN_RANGE);
        };
        store(at, 0);
        store(at + 8, monotonic_ns());
        store(at + 16, kind);
        store(at + 24, value);
        store(at, number.wrapping_add(1));
        self.next.store(number.wrapping_add(1), Ordering::Relaxed);
        store(NEXT, number.wrapping_add(1));
    }
}

/// An event as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Counts all events of the device.
    pub number: u64,
    /// CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// `None`: a kind that this program does not know.
    pub kind: Option<EventKind>,
    /// Sub-channel index.
    pub channel: u16,
    pub value: u64,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanoseconds) = (self.time_ns / 1_000_000_000, self.time_ns % 1_000_000_000);
        write!(f, "{seconds}.{nanoseconds:09} channel {} ", self.channel)?;
        match self.kind {
            Some(kind) => write!(f, "{kind:?} {:#x}", self.value),
            None => write!(f, "unknown event {:#x}", self.value),
        }
    }
}

/// Reads the last `count` events, the oldest first. Events that are being written are left out.
///
/// By pread: nothing is mapped, so that the supervisor shares no memory with a server.
pub fn read_last(fd: BorrowedFd<'_>, count: usize) -> Result<Vec<Event>, HostError> {
    let (before, after) = (contents(fd)?, contents(fd)?);
    let events = before.chunks_exact(WORDS).zip(after.chunks_exact(WORDS));
    let mut events: Vec<Event> = (0..)
        .zip(events)
        .filter_map(|(index, (before, after))| {
            // The event may have been overwritten meanwhile.
            let &[mark, time_ns, kind, value] = before else {
                return None;
            };
            let number = mark.checked_sub(1)?;
            if before != after || number % EVENT_COUNT != index {
                return None;
            }
            // The halves of the word.
            let (number_of_kind, channel) = (kind as u32, (kind >> 32) as u16);
            Some(Event {
                number,
                time_ns,
                kind: EventKind::from_number(number_of_kind),
                channel,
                value,
            })
        })
        .collect();
    events.sort_unstable_by_key(|event| event.number);
    Ok(events.split_off(events.len().saturating_sub(count)))
}

/// 64-bit words of an event.
const WORDS: usize = (EVENT_BYTES / 8) as usize;

/// All events as words.
fn contents(fd: BorrowedFd<'_>) -> Result<Vec<u64>, HostError> {
    let failed = |error: std::io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EINVAL as i32));
        HostError::new("read a flight recorder", errno)
    };
    let file = File::from(fd.try_clone_to_owned().map_err(failed)?);
    let mut bytes = vec![0; (EVENT_COUNT * EVENT_BYTES) as usize];
    file.read_exact_at(&mut bytes, EVENTS).map_err(failed)?;
    let words = bytes.as_chunks::<8>().0.iter();
    Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
}

fn map(fd: BorrowedFd<'_>, access: Access) -> Result<SharedMap, HostError> {
    let length = usize::try_from(RECORDER_BYTES).expect("64-bit hosts only");
    SharedMap::map(fd.as_fd(), length, access)
}

fn monotonic_ns() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else {
        return 0;
    };
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn the_last_events_survive_their_writer_in_order() {
        let fd = Recorder::new_memory().expect("a memfd");
        let recorder = Recorder::new(fd.as_fd()).expect("a recorder");
        for id in 0..EVENT_COUNT + 10 {
            recorder.record(EventKind::Take, 3, id);
        }
        drop(recorder);
        let events = read_last(fd.as_fd(), 2).expect("readable");
        assert_eq!(numbers(&events), [EVENT_COUNT + 8, EVENT_COUNT + 9]);
        let last = events[1];
        assert_eq!(
            (last.kind, last.channel, last.value),
            (Some(EventKind::Take), 3, EVENT_COUNT + 9)
        );
        assert!(last.time_ns >= events[0].time_ns && last.time_ns > 0);
        assert_eq!(
            read_last(fd.as_fd(), usize::MAX).expect("readable").len(),
            EVENT_COUNT as usize
        );
    }

    #[test]
    fn a_successor_writes_on() {
        let fd = Recorder::new_memory().expect("a memfd");
        for generation in 1..=2 {
            Recorder::new(fd.as_fd())
                .expect("a recorder")
                .record(EventKind::Start, 0, generation);
        }
        let events = read_last(fd.as_fd(), 10).expect("readable");
        assert_eq!(events.iter().map(|event| event.value).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_recorder_full_of_anything_is_read_without_harm() {
        let fd = Recorder::new_memory().expect("a memfd");
        let map = map(fd.as_fd(), Access::ReadWrite).expect("mapped");
        for offset in (0..RECORDER_BYTES).step_by(8) {
            let value = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            map.store_u64(offset, value, Ordering::Relaxed).expect("mapped");
        }
        read_last(fd.as_fd(), 100)
            .expect("readable")
            .iter()
            .for_each(|event| drop(event.to_string()));
        map.fill(0, RECORDER_BYTES as usize, 0xff).expect("mapped");
        assert!(read_last(fd.as_fd(), 100).expect("readable").len() <= 1);
        Recorder::new(fd.as_fd())
            .expect("a recorder")
            .record(EventKind::Kick, 0, 0);
    }
}
