//! What the state of a channel is, judged from what a dead server left. Pure.
#![forbid(unsafe_code)]

use super::layout::SLOT_COUNT;
use super::slot::{Role, SlotHead, SlotWords};

/// Limit: sequence numbers beyond this are no server's (2^62 takes last 146,000 years at a million a second), and
/// below it counting on cannot overflow.
const MAX_SEQ: u64 = 1 << 62;

/// A publication in two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Record {
    pub seq: u64,
    /// Old write index in the low half, new one in the high half.
    pub indexes: u64,
}

impl Record {
    pub(super) fn pack(old: u32, new: u32) -> u64 {
        u64::from(old) | u64::from(new) << 32
    }

    fn old_index(self) -> u32 {
        // The low half.
        self.indexes as u32
    }

    fn new_index(self) -> u32 {
        (self.indexes >> 32) as u32
    }
}

/// A channel's part of the journal, copied out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ChannelImage {
    pub taken_seq: u64,
    pub take_index: [u64; 2],
    pub published_seq: u64,
    pub records: [Record; 2],
    /// The slots that were ever used.
    pub slots: Vec<SlotWords>,
}

/// What must be known of the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingView {
    pub to_host_data_bytes: u32,
    pub to_guest_data_bytes: u32,
    /// As it stands in guest memory.
    pub to_guest_write_index: u32,
}

/// A live slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LiveSlot {
    pub slot: u16,
    pub head: SlotHead,
    pub transaction_id: u64,
    /// The sequence number that ends it was written, but not committed: to be set to 0.
    pub has_stale_end: bool,
    /// By which the guest's (or our own) order of the packets is known.
    seq: u64,
}

/// What is true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recovery {
    /// Our read index of the ring to the host.
    pub read_index: u32,
    /// Our write index of the ring to the guest.
    pub write_index: u32,
    pub taken_seq: u64,
    pub published_seq: u64,
    /// In the order in which they were taken.
    pub requests: Vec<LiveSlot>,
    /// In the order in which they were published.
    pub held: Vec<LiveSlot>,
    /// Dead slots whose words must be set to 0 before numbers are counted on.
    pub stale: Vec<(u16, Role)>,
}

/// Why nothing can be said. The channel is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoverFault {
    /// A predecessor has given the channel up; its rings say nothing any more.
    #[error("the channel was given up before")]
    GivenUp,
    /// A sequence number that cannot have been reached.
    #[error("journal: sequence number {0:#x} is impossible")]
    Sequence(u64),
    /// An index in the journal does not lie in its ring.
    #[error("journal: ring index {index:#x} is not a multiple of 8 below {data_bytes:#x}")]
    Index { index: u64, data_bytes: u32 },
    /// The ring's write index, which is ours, was changed by the guest.
    #[error("ring: the guest changed our write index to {found:#x}; it was {old:#x} or {new:#x}")]
    WriteIndexTampered { found: u32, old: u32, new: u32 },
    /// A live slot says something that no server writes.
    #[error("journal: slot {slot} begins with {head:#x}")]
    Slot { slot: u16, head: u64 },
}

fn check_index(index: u64, data_bytes: u32) -> Result<u32, RecoverFault> {
    match u32::try_from(index) {
        Ok(index) if index < data_bytes && index % 8 == 0 => Ok(index),
        _ => Err(RecoverFault::Index { index, data_bytes }),
    }
}

fn check_seq(seq: u64) -> Result<u64, RecoverFault> {
    if seq <= MAX_SEQ {
        Ok(seq)
    } else {
        Err(RecoverFault::Sequence(seq))
    }
}

/// Judges an image. See the module `journal` for the rules; any bytes may be in the image.
pub(crate) fn recover(image: &ChannelImage, ring: RingView) -> Result<Recovery, RecoverFault> {
    let taken_seq = check_seq(image.taken_seq)?;
    let read_index = check_index(
        image.take_index[usize::from(taken_seq % 2 == 1)],
        ring.to_host_data_bytes,
    )?;
    let (published_seq, write_index) = published(image, ring)?;

    let (mut requests, mut held, mut stale) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, words) in (0..SLOT_COUNT).zip(&image.slots) {
        if words.take_seq == 0 && words.publish_seq == 0 {
            continue;
        }
        let head = SlotHead::unpack(words.head).ok_or(RecoverFault::Slot {
            slot,
            head: words.head,
        })?;
        if !words.is_live(head.role, taken_seq, published_seq) {
            stale.push((slot, head.role));
            continue;
        }
        let (list, seq, end) = match head.role {
            Role::Request => (&mut requests, words.take_seq, words.publish_seq),
            Role::Held => (&mut held, words.publish_seq, words.take_seq),
        };
        let transaction_id = words.transaction_id;
        list.push(LiveSlot {
            slot,
            head,
            transaction_id,
            has_stale_end: end != 0,
            seq,
        });
    }
    requests.sort_unstable_by_key(|live| live.seq);
    held.sort_unstable_by_key(|live| live.seq);
    Ok(Recovery {
        read_index,
        write_index,
        taken_seq,
        published_seq,
        requests,
        held,
        stale,
    })
}

/// The last publication that the guest can see, and the write index that goes with it.
fn published(image: &ChannelImage, ring: RingView) -> Result<(u64, u32), RecoverFault> {
    let found = ring.to_guest_write_index;
    let seq = check_seq(image.published_seq)?;
    let last = image.records[usize::from(seq % 2 == 1)];
    // Before the first publication there is no record: all words are 0, and so was the ring's index at open.
    if last.seq != seq {
        return Err(RecoverFault::Sequence(last.seq));
    }
    let index = check_index(u64::from(last.new_index()), ring.to_guest_data_bytes)?;
    let next = image.records[usize::from(seq % 2 == 0)];
    if next.seq == seq + 1 {
        let new = check_index(u64::from(next.new_index()), ring.to_guest_data_bytes)?;
        // A record that does not continue the last one is no server's.
        if next.old_index() != index || new == index {
            return Err(RecoverFault::Index {
                index: next.indexes,
                data_bytes: ring.to_guest_data_bytes,
            });
        }
        if found == new {
            return Ok((seq + 1, new));
        }
        if found != index {
            return Err(RecoverFault::WriteIndexTampered {
                found,
                old: index,
                new,
            });
        }
        return Ok((seq, index));
    }
    if found != index {
        return Err(RecoverFault::WriteIndexTampered {
            found,
            old: index,
            new: index,
        });
    }
    Ok((seq, index))
}
