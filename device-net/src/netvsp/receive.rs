//! The receive buffer: geometry, credits, and the packets that the guest has not given back.
//!
//! The guest lends one large buffer. We cut it into sub-allocations of one size; a packet to the guest names some of
//! them, one frame each, and they are the guest's until it completes that packet. A sub-allocation that were written
//! while the guest holds it would corrupt a received frame, one that is forgotten would be lost until the next open:
//!
//! ```text
//!        draw            publish             guest's completion taken         commit
//!  free ------> drawn -----------> held -------------------------> returning --------> free
//!        <-----
//!        put_back (packet not published)
//! ```
//!
//! *Returning* exists for the sake of a successor: until the take is committed, it would see the completion in the
//! ring again, so the sub-allocation must not yet be part of another packet.
//!
//! Some sub-allocations are kept for answers to control messages, so that a flood of frames cannot block them.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Room before a frame for the RNDIS header (44 bytes) and per-packet information (at most 64 bytes of ours).
/// Hyper-V leaves 256, and 36 bytes unused at the end; a longer sub-allocation costs the guest nothing.
const HEADER_ROOM_BYTES: u32 = 256;
const TAIL_ROOM_BYTES: u32 = 36;
/// Sub-allocations begin on cache lines.
const SUBALLOCATION_ALIGNMENT: u32 = 64;
/// Sub-allocations that only control messages may use.
pub const CONTROL_RESERVE: usize = 16;
/// Limit: the largest buffer that Linux lends is 31 MiB (`NETVSC_RECEIVE_BUFFER_SIZE` and ethtool -G), which is
/// 17,500 sub-allocations; an index must fit 16 bits.
const SUBALLOCATION_COUNT_MAX: u32 = 32_768;
/// Frames in one packet. Limit: Linux takes 375 (`NETVSC_XFER_HEADER_SIZE` buffer, hyperv_net.h); at 64 the packet is
/// below 700 bytes and the gain of more is gone.
pub const FRAMES_PER_PACKET_MAX: usize = 64;
/// Packets to the guest that are not completed, per channel. Limit: each holds a journal slot, of which the
/// transmit side needs its share.
pub const PACKETS_HELD_MAX: usize = 512;

/// Smallest and largest frame size (with Ethernet header) that the geometry is made for; NDIS_CONFIG beyond is clamped.
pub const FRAME_BYTES_MIN: u32 = 1514;
pub const FRAME_BYTES_MAX: u32 = 9216;

/// A receive buffer that the guest lent us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveBuffer {
    pub gpadl: u32,
    pub suballocation_bytes: u32,
    pub suballocation_count: u32,
}

impl ReceiveBuffer {
    /// The geometry for frames of `frame_bytes`; `None` if the buffer is too small for the control reserve and a few
    /// frames.
    pub fn new(gpadl: u32, buffer_bytes: u32, frame_bytes: u32) -> Option<Self> {
        let frame_bytes = frame_bytes.clamp(FRAME_BYTES_MIN, FRAME_BYTES_MAX);
        let suballocation_bytes =
            (HEADER_ROOM_BYTES + frame_bytes + TAIL_ROOM_BYTES).next_multiple_of(SUBALLOCATION_ALIGNMENT);
        let suballocation_count = (buffer_bytes / suballocation_bytes).min(SUBALLOCATION_COUNT_MAX);
        (suballocation_count >= 2 * CONTROL_RESERVE as u32).then_some(Self {
            gpadl,
            suballocation_bytes,
            suballocation_count,
        })
    }

    /// Whether this is a geometry that [`Self::new`] makes for a buffer of that length: a predecessor may have left
    /// any numbers.
    pub fn fits(&self, buffer_bytes: u64) -> bool {
        let smallest = HEADER_ROOM_BYTES + FRAME_BYTES_MIN + TAIL_ROOM_BYTES;
        let largest =
            (HEADER_ROOM_BYTES + FRAME_BYTES_MAX + TAIL_ROOM_BYTES).next_multiple_of(SUBALLOCATION_ALIGNMENT);
        let used_bytes = u64::from(self.suballocation_bytes) * u64::from(self.suballocation_count);
        (smallest..=largest).contains(&self.suballocation_bytes)
            && (2 * CONTROL_RESERVE as u32..=SUBALLOCATION_COUNT_MAX).contains(&self.suballocation_count)
            && used_bytes <= buffer_bytes
    }

    /// Byte offset of a sub-allocation in the buffer.
    pub fn offset_of(&self, suballocation: u16) -> u32 {
        u32::from(suballocation) * self.suballocation_bytes
    }
}

/// Who holds which sub-allocation.
#[derive(Debug, Default)]
pub struct Credits {
    /// Used from the end: what came back last is used first, so few pages are touched at low rates.
    free: Vec<u16>,
    returning: Vec<u16>,
    /// Drawn or held: one bit each. The only judge of whether a return is legitimate.
    in_use: Vec<u64>,
    count: usize,
}

/// The journal of a dead server names sub-allocations that cannot be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RecoveredCreditFault {
    #[error("sub-allocation {0} is beyond the receive buffer")]
    Beyond(u16),
    #[error("sub-allocation {0} is held twice")]
    HeldTwice(u16),
}

impl Credits {
    /// All free.
    pub fn new(count: u32) -> Self {
        let count = count.min(SUBALLOCATION_COUNT_MAX) as usize;
        Self {
            free: (0..count as u16).rev().collect(),
            returning: Vec::new(),
            in_use: vec![0; count.div_ceil(64)],
            count,
        }
    }

    /// A predecessor left these with the guest. To be called before the first one is drawn. After a fault none of them is
    /// drawn either: one of them may be the guest's.
    pub fn mark_held(&mut self, held: &[u16]) -> Result<(), RecoveredCreditFault> {
        let mut result = Ok(());
        for &suballocation in held {
            if usize::from(suballocation) >= self.count {
                result = result.and(Err(RecoveredCreditFault::Beyond(suballocation)));
            } else if self.is_in_use(suballocation) {
                result = result.and(Err(RecoveredCreditFault::HeldTwice(suballocation)));
            } else {
                self.set_in_use(suballocation);
            }
        }
        let in_use = std::mem::take(&mut self.in_use);
        self.free
            .retain(|&index| in_use[usize::from(index) / 64] & (1 << (index % 64)) == 0);
        self.in_use = in_use;
        result
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// How many frames may be sent now.
    pub fn data_available(&self) -> usize {
        self.free.len().saturating_sub(CONTROL_RESERVE)
    }

    /// One for a frame; leaves the reserve alone.
    pub fn draw_for_data(&mut self) -> Option<u16> {
        if self.data_available() == 0 {
            return None;
        }
        self.draw_for_control()
    }

    /// One for an answer to a control message.
    pub fn draw_for_control(&mut self) -> Option<u16> {
        let suballocation = self.free.pop()?;
        self.set_in_use(suballocation);
        Some(suballocation)
    }

    /// A drawn one that was not published after all.
    pub fn put_back(&mut self, suballocation: u16) {
        assert!(
            self.is_in_use(suballocation),
            "only a drawn sub-allocation is put back"
        );
        self.clear_in_use(suballocation);
        self.free.push(suballocation);
    }

    fn give_back_later(&mut self, suballocation: u16) {
        assert!(
            self.is_in_use(suballocation),
            "an outstanding packet holds its sub-allocations"
        );
        self.clear_in_use(suballocation);
        self.returning.push(suballocation);
    }

    /// The takes of all completions so far are committed.
    pub fn commit_returns(&mut self) {
        self.free.append(&mut self.returning);
    }

    fn is_in_use(&self, suballocation: u16) -> bool {
        self.in_use
            .get(usize::from(suballocation) / 64)
            .is_some_and(|word| word & (1 << (suballocation % 64)) != 0)
    }

    fn set_in_use(&mut self, suballocation: u16) {
        self.in_use[usize::from(suballocation) / 64] |= 1 << (suballocation % 64);
    }

    fn clear_in_use(&mut self, suballocation: u16) {
        self.in_use[usize::from(suballocation) / 64] &= !(1 << (suballocation % 64));
    }
}

/// A packet that the guest has not completed, with whatever its channel remembers of it (the journal's token).
#[derive(Debug)]
struct HeldPacket<H> {
    transaction_id: u64,
    suballocations: Vec<u16>,
    held: H,
}

/// The packets of one channel that the guest has not completed.
#[derive(Debug)]
pub struct Outstanding<H> {
    packets: Vec<Option<HeldPacket<H>>>,
    vacant: Vec<u16>,
    /// Emptied lists, to be filled again: the fast path allocates nothing.
    spare_lists: Vec<Vec<u16>>,
    sequence: u32,
}

/// A completion for a packet that is not outstanding: never sent, or completed before.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("receive completion for transaction {transaction_id:#x}, which is not outstanding")]
pub struct NotOutstanding {
    pub transaction_id: u64,
}

impl<H> Default for Outstanding<H> {
    fn default() -> Self {
        Self {
            packets: Vec::new(),
            vacant: Vec::new(),
            spare_lists: Vec::new(),
            sequence: 0,
        }
    }
}

impl<H> Outstanding<H> {
    pub fn count(&self) -> usize {
        self.packets.len() - self.vacant.len()
    }

    /// Sub-allocations with the guest on this channel.
    pub fn suballocation_count(&self) -> usize {
        self.packets
            .iter()
            .flatten()
            .map(|packet| packet.suballocations.len())
            .sum()
    }

    /// The id for the next packet that is to be held; `None` at [`PACKETS_HELD_MAX`]. Low half: its place in the table,
    /// from 1. High half: a number that differs from the place's last user, so a late duplicate hits nobody.
    pub fn next_transaction_id(&self) -> Option<u64> {
        let index = match self.vacant.last() {
            Some(&index) => index,
            None if self.packets.len() < PACKETS_HELD_MAX => self.packets.len() as u16,
            None => return None,
        };
        Some((u64::from(self.sequence.wrapping_add(1)) << 32) | (u64::from(index) + 1))
    }

    /// The packet with [`Self::next_transaction_id`] was staged.
    pub fn hold(&mut self, transaction_id: u64, suballocations: &[u16], held: H) {
        assert_eq!(
            Some(transaction_id),
            self.next_transaction_id(),
            "one packet is held after the other"
        );
        let index = match self.vacant.pop() {
            Some(index) => usize::from(index),
            None => {
                self.packets.push(None);
                self.packets.len() - 1
            }
        };
        self.sequence = self.sequence.wrapping_add(1);
        let mut list = self.spare_lists.pop().unwrap_or_default();
        list.extend_from_slice(suballocations);
        self.packets[index] = Some(HeldPacket {
            transaction_id,
            suballocations: list,
            held,
        });
    }

    /// The guest completed a packet: its sub-allocations begin to return.
    pub fn settle(&mut self, transaction_id: u64, credits: &mut Credits) -> Result<H, NotOutstanding> {
        let fault = NotOutstanding { transaction_id };
        let index = (transaction_id as u32).checked_sub(1).ok_or(fault)?;
        let place = self.packets.get_mut(index as usize).ok_or(fault)?;
        match place.take_if(|packet| packet.transaction_id == transaction_id) {
            Some(mut packet) => {
                for suballocation in packet.suballocations.drain(..) {
                    credits.give_back_later(suballocation);
                }
                self.spare_lists.push(packet.suballocations);
                self.vacant.push(index as u16);
                Ok(packet.held)
            }
            None => Err(fault),
        }
    }

    /// A packet that a predecessor left with the guest. False if no packet of ours can have such an id.
    pub fn restore(&mut self, transaction_id: u64, suballocations: Vec<u16>, held: H) -> Result<(), H> {
        let Some(index) = (transaction_id as u32).checked_sub(1).map(|index| index as usize) else {
            return Err(held);
        };
        if index >= PACKETS_HELD_MAX || self.packets.get(index).is_some_and(Option::is_some) {
            return Err(held);
        }
        while self.packets.len() <= index {
            self.vacant.push(self.packets.len() as u16);
            self.packets.push(None);
        }
        self.vacant.retain(|&vacant| usize::from(vacant) != index);
        self.packets[index] = Some(HeldPacket {
            transaction_id,
            suballocations,
            held,
        });
        self.sequence = self.sequence.max((transaction_id >> 32) as u32);
        Ok(())
    }

    /// The guest took the receive buffer away while it held packets: their completions will return nothing.
    pub fn orphan_all(&mut self) {
        for packet in self.packets.iter_mut().flatten() {
            packet.suballocations.clear();
        }
    }

    /// The channel is closed: the guest's claim on the buffer ended with it.
    pub fn forget_all(&mut self, credits: &mut Credits) -> Vec<H> {
        let mut all = Vec::new();
        for packet in self.packets.drain(..).flatten() {
            for suballocation in packet.suballocations {
                credits.give_back_later(suballocation);
            }
            all.push(packet.held);
        }
        self.vacant.clear();
        credits.commit_returns();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn send(outstanding: &mut Outstanding<()>, credits: &mut Credits, frames: usize) -> Option<u64> {
        let id = outstanding.next_transaction_id()?;
        let mut list = Vec::new();
        for _ in 0..frames {
            match credits.draw_for_data() {
                Some(index) => list.push(index),
                None => break,
            }
        }
        if list.is_empty() {
            return None;
        }
        outstanding.hold(id, &list, ());
        Some(id)
    }

    #[test]
    fn sixteen_megabytes_hold_nine_thousand_frames_of_1500() {
        let buffer = ReceiveBuffer::new(1, 16 << 20, 1514).expect("large enough");
        assert_eq!(buffer.suballocation_bytes, 1856);
        assert_eq!(buffer.suballocation_count, 9039);
        assert!(buffer.offset_of(9038) + buffer.suballocation_bytes <= 16 << 20);
    }

    #[test]
    fn a_wild_mtu_is_clamped_to_what_fits() {
        assert_eq!(
            ReceiveBuffer::new(1, 1 << 20, u32::MAX).map(|buffer| buffer.suballocation_bytes),
            Some((256u32 + 9216 + 36).next_multiple_of(64))
        );
        assert_eq!(
            ReceiveBuffer::new(1, 1 << 20, 0).map(|buffer| buffer.suballocation_bytes),
            Some(1856)
        );
        assert_eq!(ReceiveBuffer::new(1, 31 * 1856, 1514), None);
    }

    #[test]
    fn frames_never_use_the_control_reserve() {
        let mut credits = Credits::new(20);
        let drawn = std::iter::from_fn(|| credits.draw_for_data()).count();
        assert_eq!(drawn, 4);
        let control = std::iter::from_fn(|| credits.draw_for_control()).count();
        assert_eq!(control, CONTROL_RESERVE);
    }

    #[test]
    fn a_completion_returns_all_frames_of_its_packet_once_and_only_after_the_commit() {
        let mut credits = Credits::new(64);
        let mut outstanding = Outstanding::default();
        let id = send(&mut outstanding, &mut credits, 5).expect("credits");
        assert_eq!(credits.free_count(), 59);
        assert_eq!(outstanding.settle(id, &mut credits), Ok(()));
        assert_eq!(credits.free_count(), 59);
        assert_eq!(
            outstanding.settle(id, &mut credits),
            Err(NotOutstanding { transaction_id: id })
        );
        credits.commit_returns();
        assert_eq!(credits.free_count(), 64);
    }

    #[test]
    fn a_late_duplicate_does_not_hit_the_next_user_of_the_place() {
        let mut credits = Credits::new(64);
        let mut outstanding = Outstanding::default();
        let first = send(&mut outstanding, &mut credits, 1).expect("credits");
        outstanding.settle(first, &mut credits).expect("outstanding");
        let second = send(&mut outstanding, &mut credits, 1).expect("credits");
        assert_eq!(first as u32, second as u32);
        assert!(outstanding.settle(first, &mut credits).is_err());
        assert_eq!(outstanding.count(), 1);
    }

    #[test]
    fn a_successor_draws_only_what_the_guest_does_not_hold() {
        let mut credits = Credits::new(40);
        credits.mark_held(&[0, 7, 39]).expect("valid");
        assert_eq!(credits.free_count(), 37);
        let drawn: BTreeSet<u16> = std::iter::from_fn(|| credits.draw_for_control()).collect();
        assert_eq!(drawn.len(), 37);
        assert!([0, 7, 39].iter().all(|held| !drawn.contains(held)));
        assert_eq!(
            Credits::new(40).mark_held(&[40]),
            Err(RecoveredCreditFault::Beyond(40))
        );
        assert_eq!(
            Credits::new(40).mark_held(&[1, 1]),
            Err(RecoveredCreditFault::HeldTwice(1))
        );
    }

    #[test]
    fn restored_packets_settle_under_their_old_id() {
        let mut credits = Credits::new(64);
        credits.mark_held(&[3, 4]).expect("valid");
        let mut outstanding = Outstanding::default();
        let id = (9u64 << 32) | 6;
        assert_eq!(outstanding.restore(id, vec![3, 4], "token"), Ok(()));
        assert_eq!(outstanding.restore(id, vec![], "again"), Err("again"));
        assert_eq!(outstanding.restore(9 << 32, vec![], "no place"), Err("no place"));
        assert_eq!(outstanding.count(), 1);
        let next = outstanding.next_transaction_id().expect("room");
        assert_ne!(next as u32, 6);
        assert!(next >> 32 > 9);
        assert_eq!(outstanding.settle(id, &mut credits), Ok("token"));
        credits.commit_returns();
        assert_eq!(credits.free_count(), 64);
    }

    proptest! {
        /// A guest that completes what it likes, as often as it likes, in any order.
        #[test]
        fn no_sub_allocation_is_ever_in_two_hands(actions in prop::collection::vec((0u8..3, any::<u64>(), 1usize..9), 1..200)) {
            let mut credits = Credits::new(48);
            let mut outstanding = Outstanding::default();
            let mut sent: Vec<u64> = Vec::new();
            let mut settled: BTreeSet<u64> = BTreeSet::new();
            for (action, pick, frames) in actions {
                match action {
                    0 => sent.extend(send(&mut outstanding, &mut credits, frames)),
                    1 if !sent.is_empty() => {
                        let id = sent[pick as usize % sent.len()];
                        prop_assert_eq!(outstanding.settle(id, &mut credits).is_ok(), settled.insert(id));
                    }
                    _ => {
                        if !sent.contains(&pick) {
                            prop_assert!(outstanding.settle(pick, &mut credits).is_err());
                        }
                        credits.commit_returns();
                    }
                }
                prop_assert_eq!(
                    credits.free_count() + credits.returning.len() + outstanding.suballocation_count(),
                    48
                );
                let mut all: Vec<u16> = credits.free.iter().chain(&credits.returning).copied().collect();
                all.extend(outstanding.packets.iter().flatten().flat_map(|packet| packet.suballocations.clone()));
                let distinct: BTreeSet<u16> = all.iter().copied().collect();
                prop_assert_eq!(distinct.len(), 48);
            }
        }
    }
}
