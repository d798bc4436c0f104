#![forbid(unsafe_code)]
//! Messages from us to the guest: a queue for each VP in front of one slot of its SIMP page (TLFS 6.0b section
//! 11.8 and 11.9).
//!
//! The slot is shared memory and has a protocol of its own:
//!
//! | word | we | the guest |
//! | --- | --- | --- |
//! | type (offset 0) | 0 -> message type, after all else is written | message type -> 0, when it has read all else |
//! | flags (offset 5), bit 0 | set it while a message waits behind a full slot | reads it after freeing the slot |
//! | EOM MSR | look at the queues again | writes it if the flag was set |
//!
//! Set the flag, *then* look at the type again: the guest frees the slot, *then* looks at the flag. With a full
//! barrier on both sides one of the two sees the other. The slot of the present message may already be read by
//! the guest when the flag is set, so a lost flag is possible only for a guest that breaks the protocol.
//!
//! The end-of-message need not come from the VP that freed the slot (a crashing Linux frees the slots of all VPs
//! and writes EOM where it runs), and need not come at all after UNLOAD. So every EOM looks at every queue, and
//! while a slot is full a timer looks again: after 1 ms at first, more rarely for a guest that does not answer
//! ([`retry_delay_ms`]). A guest that failed to allocate memory leaves its slot full and waits for another
//! interrupt: from 10 ms on each look raises the vector again.
//!
//! A VP whose SynIC or message page is off takes no messages: they are dropped, and so is what waits when the
//! page is switched off. The guest asked for them there; it will ask again.

use std::collections::VecDeque;

use super::VMBUS_SINT;
use super::hypercall::MAX_PAYLOAD_BYTES;

/// Message type of a VMBus channel message. Source: Linux 6.1 drivers/hv/hyperv_vmbus.h `HVMSG_...`,
/// include/asm-generic/hyperv-tlfs.h: types below 0x80000000 are the parent's; VMBus uses 1.
pub const CHANNEL_MESSAGE: u32 = 1;

/// Limit: messages that wait for one VM before the guest's posts are refused for lack of buffers.
pub const MAX_WAITING_MESSAGES: usize = 512;

/// Limit: messages that wait for one VM at all. Each of the 64 posts that may be under way then may yield an offer for each
/// of 256 devices, and each device may offer 63 sub-channels; a control plane that goes beyond has lost its mind.
const QUEUED_MESSAGES_MAX: usize = 32 * 1024;

/// A message that the control plane must not post.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    #[error("bulkhead-bus posts a message of {0} bytes to the guest")]
    TooLong(usize),
    #[error("bulkhead-bus posts more than {QUEUED_MESSAGES_MAX} messages that the guest does not take")]
    TooMany,
}

/// Offset of a SINT's slot or flag area in its page (TLFS 6.0b section 11.8.2).
const SLOT_BYTES: u64 = 256;
/// Bit 0 of the flags byte, seen from the 32-bit word at offset 4 (size, flags, reserved).
const PENDING: u32 = 1 << 8;

/// The SIMP pages, one behind the other.
pub trait SlotMemory {
    /// Loads a word with acquire ordering.
    fn load(&self, offset: u64) -> u32;
    /// Sets bits in a word, sequentially consistent.
    fn set_bits(&self, offset: u64, bits: u32);
    /// Copies bytes.
    fn write(&self, offset: u64, bytes: &[u8]);
    /// Stores a word with release ordering.
    fn publish(&self, offset: u64, word: u32);
}

/// What to do after a look at a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pumped {
    /// Raise SINT 2's vector on the VP.
    pub raise: bool,
    /// A message was put into the slot.
    pub delivered: bool,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Vec<u8>>,
    /// Looks by the timer since the slot was last found free.
    looks: u32,
}

/// The queues of all VPs.
#[derive(Debug)]
pub struct MessageQueues {
    queues: Vec<Queue>,
    pub counters: Counters,
}

/// For inspection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub delivered: u64,
    /// For a VP that takes no messages.
    pub dropped: u64,
    /// The vector was raised again for a slot that stayed full.
    pub raised_again: u64,
}

impl MessageQueues {
    pub fn new(vp_count: u16) -> Self {
        let queues = (0..vp_count).map(|_| Queue::default()).collect();
        Self {
            queues,
            counters: Counters::default(),
        }
    }

    /// Puts a message at the end of the VP's queue.
    pub fn push(&mut self, vp: u16, payload: &[u8]) -> Result<(), BadMessage> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(BadMessage::TooLong(payload.len()));
        }
        if self.waiting() >= QUEUED_MESSAGES_MAX {
            return Err(BadMessage::TooMany);
        }
        if let Some(queue) = self.queues.get_mut(usize::from(vp)) {
            queue.messages.push_back(payload.to_vec());
        }
        Ok(())
    }

    /// Messages that wait, of all VPs.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.messages.len()).sum()
    }

    /// Drops what waits for a VP whose message page goes away.
    pub fn drop_waiting(&mut self, vp: u16) {
        if let Some(queue) = self.queues.get_mut(usize::from(vp)) {
            self.counters.dropped += queue.messages.len() as u64;
            *queue = Queue::default();
        }
    }

    /// Moves the VP's first message into its slot if that is free. `by_timer`: nobody said that it is.
    pub fn pump(&mut self, vp: u16, takes_messages: bool, by_timer: bool, memory: &dyn SlotMemory) -> Pumped {
        if !takes_messages {
            self.drop_waiting(vp);
            return Pumped::default();
        }
        let Some(queue) = self.queues.get_mut(usize::from(vp)) else {
            return Pumped::default();
        };
        let Some(message) = queue.messages.front() else {
            return Pumped::default();
        };
        let slot = slot_offset(vp);
        if memory.load(slot) != 0 {
            memory.set_bits(slot + 4, PENDING);
            // Ordering: `set_bits` is a full barrier; it pairs with the guest's between freeing and reading flags.
            if memory.load(slot) != 0 {
                queue.looks = queue.looks.saturating_add(u32::from(by_timer));
                let raise = by_timer && queue.looks >= LOOKS_BEFORE_RAISE;
                self.counters.raised_again += u64::from(raise);
                return Pumped {
                    raise,
                    delivered: false,
                };
            }
        }
        let more_behind = queue.messages.len() > 1;
        write_slot(memory, slot, message, more_behind);
        queue.messages.pop_front();
        queue.looks = 0;
        self.counters.delivered += 1;
        Pumped {
            raise: true,
            delivered: true,
        }
    }

    /// When to look again by timer: `None` if nothing waits.
    pub fn retry_delay_ms(&self) -> Option<u64> {
        let waiting = self.queues.iter().filter(|queue| !queue.messages.is_empty());
        waiting.map(|queue| retry_delay_ms(queue.looks)).min()
    }
}

/// Looks at 1 ms each before the vector is raised again: 10 ms.
const LOOKS_BEFORE_RAISE: u32 = 10;

/// 1 ms for the first 10 ms, 10 ms for the first second, then a quarter of a second: a guest that has stopped
/// answering must not keep the host awake.
fn retry_delay_ms(looks: u32) -> u64 {
    match looks {
        0..10 => 1,
        10..110 => 10,
        _ => 250,
    }
}

fn slot_offset(vp: u16) -> u64 {
    u64::from(vp) * 4096 + u64::from(VMBUS_SINT) * SLOT_BYTES
}

/// HV_MESSAGE, TLFS 6.0b section 11.8.1: type 4, size 1, flags 1, reserved 2, sender 8, payload 240.
fn write_slot(memory: &dyn SlotMemory, slot: u64, payload: &[u8], more_behind: bool) {
    let mut body = [0u8; SLOT_BYTES as usize - 4];
    body[0] = payload.len() as u8;
    body[1] = u8::from(more_behind);
    body[12..12 + payload.len()].copy_from_slice(payload);
    memory.write(slot + 4, &body);
    memory.publish(slot, CHANNEL_MESSAGE);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// One or two SIMP pages, and a guest that may free the slot between any two of our accesses.
    struct Pages {
        bytes: RefCell<Vec<u8>>,
        free_before_second_load: RefCell<bool>,
    }

    impl Pages {
        fn new() -> Self {
            Self {
                bytes: RefCell::new(vec![0; 2 * 4096]),
                free_before_second_load: RefCell::new(false),
            }
        }
        fn word(&self, offset: u64) -> u32 {
            let bytes = self.bytes.borrow();
            let at = offset as usize;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        }
        fn free(&self, vp: u16) {
            self.publish(slot_offset(vp), 0);
        }
    }

    impl SlotMemory for Pages {
        fn load(&self, offset: u64) -> u32 {
            self.word(offset)
        }
        fn set_bits(&self, offset: u64, bits: u32) {
            let word = self.word(offset) | bits;
            self.write(offset, &word.to_le_bytes());
            if self.free_before_second_load.replace(false) {
                self.free(0);
            }
        }
        fn write(&self, offset: u64, bytes: &[u8]) {
            let at = offset as usize;
            self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        }
        fn publish(&self, offset: u64, word: u32) {
            self.write(offset, &word.to_le_bytes());
        }
    }

    #[test]
    fn a_message_lands_in_the_slot_of_sint_2_with_its_exact_size() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(2);
        queues.push(1, &[7; 16]).expect("room");
        assert_eq!(
            queues.pump(1, true, false, &pages),
            Pumped {
                raise: true,
                delivered: true
            }
        );
        let slot = 4096 + 0x200;
        assert_eq!(pages.word(slot), 1);
        assert_eq!(pages.word(slot + 4), 16, "size 16, no flag");
        assert_eq!(
            pages.bytes.borrow()[slot as usize + 16..slot as usize + 33],
            [[7; 16].as_slice(), &[0]].concat()
        );
        assert_eq!(queues.retry_delay_ms(), None);
    }

    #[test]
    fn a_full_slot_gets_the_pending_flag_and_keeps_its_message() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(1);
        queues.push(0, &[1; 8]).expect("room");
        queues.pump(0, true, false, &pages);
        queues.push(0, &[2; 8]).expect("room");
        assert_eq!(queues.pump(0, true, false, &pages), Pumped::default());
        assert_eq!(pages.word(0x204), 8 | PENDING);
        assert_eq!(pages.bytes.borrow()[0x210], 1, "not overwritten");
        pages.free(0);
        assert_eq!(
            queues.pump(0, true, false, &pages),
            Pumped {
                raise: true,
                delivered: true
            }
        );
        assert_eq!(pages.bytes.borrow()[0x210], 2);
    }

    #[test]
    fn a_slot_freed_while_the_flag_is_set_is_not_waited_for() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(1);
        queues.push(0, &[1; 8]).expect("room");
        queues.pump(0, true, false, &pages);
        queues.push(0, &[2; 8]).expect("room");
        *pages.free_before_second_load.borrow_mut() = true;
        assert!(queues.pump(0, true, false, &pages).delivered);
    }

    #[test]
    fn a_message_with_others_behind_it_says_so() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(1);
        for _ in 0..2 {
            queues.push(0, &[0; 12]).expect("room");
        }
        queues.pump(0, true, false, &pages);
        assert_eq!(pages.word(0x204), 12 | PENDING);
        pages.free(0);
        queues.pump(0, true, false, &pages);
        assert_eq!(pages.word(0x204), 12);
    }

    #[test]
    fn a_stuck_slot_raises_its_vector_again_after_ten_looks_and_then_rarely() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(1);
        queues.push(0, &[0; 8]).expect("room");
        queues.pump(0, true, false, &pages);
        queues.push(0, &[0; 8]).expect("room");
        let raises = (0..10)
            .filter(|_| queues.pump(0, true, true, &pages).raise)
            .count();
        assert_eq!(raises, 1, "the tenth");
        assert_eq!(queues.retry_delay_ms(), Some(10));
        for _ in 0..100 {
            assert!(queues.pump(0, true, true, &pages).raise);
        }
        assert_eq!(queues.retry_delay_ms(), Some(250));
    }

    #[test]
    fn an_end_of_message_from_elsewhere_is_harmless() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(2);
        assert_eq!(queues.pump(0, true, false, &pages), Pumped::default());
        queues.push(0, &[0; 8]).expect("room");
        queues.pump(0, true, false, &pages);
        assert_eq!(queues.pump(1, true, false, &pages), Pumped::default());
    }

    #[test]
    fn a_vp_with_its_synic_off_loses_its_messages() {
        let pages = Pages::new();
        let mut queues = MessageQueues::new(1);
        queues.push(0, &[0; 8]).expect("room");
        assert_eq!(queues.pump(0, false, false, &pages), Pumped::default());
        assert_eq!((queues.waiting(), queues.counters.dropped), (0, 1));
        assert_eq!(pages.word(0x200), 0);
    }
}
