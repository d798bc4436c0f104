//! The guest's end of one open channel.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{VscError, wait_until};
use crate::channel::flag_offset;
use crate::mem::{Gpa, HostError, SharedMap};
use crate::ring::{PacketBuf, RingArea, RingReader, RingWriter, StageError};
use crate::wire::{OutPacket, Packet, PacketKind, gpa_direct_header};

/// What a channel has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChannelCounters {
    /// Packets sent.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Kicks written.
    pub kicks: u64,
    /// Interrupts that came: the sum of the eventfd's counts.
    pub interrupts: u64,
    /// Times that interrupts came with the channel's event flag.
    pub flags: u64,
    /// Times that they came without it. No fault by itself: a flag is set before its interrupt is raised, so that a guest
    /// that is looking at its flags because of the last interrupt may take this one's, too.
    pub interrupts_without_flag: u64,
}

/// One open channel, as the guest's driver holds it.
///
/// Sending stages; [`Self::flush`] makes visible and kicks as the ring rules say. Receiving stages, too;
/// [`Self::give_back`] returns the space. [`Self::wait`] follows the rules of sleeping, and gives back before it sleeps.
#[derive(Debug)]
pub struct GuestChannel {
    pub(super) relid: u32,
    pub(super) ring_gpadl: u32,
    pub(super) sub_index: u16,
    pub(super) open_epoch: u32,
    pub(super) reader: RingReader,
    pub(super) writer: RingWriter,
    pub(super) to_host: RingArea,
    pub(super) to_guest: RingArea,
    pub(super) kick: OwnedFd,
    pub(super) interrupt: OwnedFd,
    pub(super) event_flags: Arc<SharedMap>,
    /// Shared with the guest, which retargets.
    pub(super) target_vp: Arc<AtomicU32>,
    pub(super) next_transaction: u64,
    pub(super) header: Vec<u8>,
    pub(super) counters: ChannelCounters,
}

impl GuestChannel {
    /// relid.
    pub fn channel_id(&self) -> u32 {
        self.relid
    }

    /// The GPADL that holds both rings.
    pub fn ring_gpadl(&self) -> u32 {
        self.ring_gpadl
    }

    /// 0: the primary.
    pub fn sub_index(&self) -> u16 {
        self.sub_index
    }

    /// Names this opening.
    pub fn open_epoch(&self) -> u32 {
        self.open_epoch
    }

    /// What was seen so far.
    pub fn counters(&self) -> ChannelCounters {
        self.counters
    }

    /// Becomes readable when the server interrupts.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.interrupt.as_fd()
    }

    /// The ring to the host, for tests that scribble in it.
    pub fn to_host(&self) -> &RingArea {
        &self.to_host
    }

    /// The ring to the guest, for tests that scribble in it.
    pub fn to_guest(&self) -> &RingArea {
        &self.to_guest
    }

    /// A number that no packet of this channel has had. Small, as those of Linux are.
    pub fn new_transaction_id(&mut self) -> u64 {
        self.next_transaction += 1;
        self.next_transaction
    }

    /// Stages a packet.
    pub fn send(&mut self, packet: &OutPacket<'_>) -> Result<(), StageError> {
        self.writer.stage(packet)?;
        self.counters.sent += 1;
        Ok(())
    }

    /// Stages an in-band packet (type 6).
    pub fn send_in_band(
        &mut self,
        transaction_id: u64,
        completion_requested: bool,
        payload: &[&[u8]],
    ) -> Result<(), StageError> {
        self.send(&OutPacket::in_band(transaction_id, completion_requested, payload))
    }

    /// Stages a GPA-direct packet (type 9) that asks for a completion. Each range lies in consecutive pages.
    pub fn send_gpa_direct(
        &mut self,
        transaction_id: u64,
        ranges: &[(Gpa, u32)],
        payload: &[&[u8]],
    ) -> Result<(), StageError> {
        self.header = gpa_direct_header(ranges);
        self.writer.stage(&OutPacket {
            kind: PacketKind::GPA_DIRECT,
            transaction_id,
            completion_requested: true,
            extra_header: &self.header,
            payload,
        })?;
        self.counters.sent += 1;
        Ok(())
    }

    /// Stages the answer to a packet of the server.
    pub fn complete(&mut self, transaction_id: u64, payload: &[&[u8]]) -> Result<(), StageError> {
        self.send(&OutPacket::completion(transaction_id, payload))
    }

    /// Makes everything staged visible to the server, and kicks it if the ring rules ask for it.
    pub fn flush(&mut self) -> Result<(), VscError> {
        if self.writer.commit()?.is_needed() {
            self.kick()?;
        }
        Ok(())
    }

    /// Kicks the server, needed or not.
    pub fn kick(&mut self) -> Result<(), VscError> {
        self.counters.kicks += 1;
        match nix::unistd::write(&self.kick, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(HostError::new("kick a server", errno).into()),
        }
    }

    /// Copies the next packet of the server into `buf`, if there is one.
    pub fn receive<'b>(&mut self, buf: &'b mut PacketBuf) -> Result<Option<Packet<'b>>, VscError> {
        let packet = self.reader.next(buf)?;
        self.counters.received += u64::from(packet.is_some());
        Ok(packet)
    }

    /// Gives the space of what was received back to the server, and kicks it if it waits for that.
    pub fn give_back(&mut self) -> Result<(), VscError> {
        if self.reader.commit().is_needed() {
            self.kick()?;
        }
        Ok(())
    }

    /// Asks the server not to interrupt, as a driver does while it polls. [`Self::wait`] undoes it.
    pub fn mask(&mut self) {
        self.reader.mask_interrupts();
    }

    /// Waits until there is something to receive, in the way a driver sleeps. `false`: the deadline has passed.
    pub fn wait(&mut self, deadline: Instant) -> Result<bool, VscError> {
        self.give_back()?;
        loop {
            if self.reader.unmask_and_check()? {
                return Ok(true);
            }
            if !self.wait_interrupt(deadline)? {
                return Ok(false);
            }
        }
    }

    /// Waits until more than `needed` bytes (see [`RingWriter::needed_bytes`]) can be staged, as a driver does whose packet
    /// found no room: the server interrupts when it has made it. `false`: the deadline has passed.
    pub fn wait_room(&mut self, needed: u32, deadline: Instant) -> Result<bool, VscError> {
        while !self.writer.request_space(needed)? {
            if !self.wait_interrupt(deadline)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// For a guest that has just slept: whether there is something to receive and, however long it waits, no interrupt
    /// that says so.
    pub fn lacks_interrupt(&mut self, patience: Duration) -> Result<bool, VscError> {
        let before = self.counters.interrupts;
        let is_there = self.wait(Instant::now())?;
        // It may have come just now.
        Ok(is_there
            && self.counters.interrupts == before
            && !self.wait_interrupt(Instant::now() + patience)?)
    }

    /// Waits for an interrupt, whether or not there is something to receive. `false`: the deadline has passed.
    pub fn wait_interrupt(&mut self, deadline: Instant) -> Result<bool, VscError> {
        if !wait_until(self.interrupt.as_fd(), deadline)? {
            return Ok(false);
        }
        let mut count = [0; 8];
        match nix::unistd::read(&self.interrupt, &mut count) {
            Ok(_) => self.counters.interrupts += u64::from_ne_bytes(count),
            Err(Errno::EAGAIN) => return Ok(true),
            Err(errno) => return Err(HostError::new("read an interrupt", errno).into()),
        }
        match self.take_flag()? {
            true => self.counters.flags += 1,
            false => self.counters.interrupts_without_flag += 1,
        }
        Ok(true)
    }

    /// Clears the channel's event flag; whether it was set.
    fn take_flag(&self) -> Result<bool, VscError> {
        // Ordering: the VP changes rarely, and then the server signals again.
        let vp = self.target_vp.load(Ordering::Relaxed) as u16;
        let bit = 1 << (self.relid % 32);
        // Ordering: acquire pairs with the server's release; what it wrote before the flag is seen after it.
        let word = self
            .event_flags
            .fetch_and_u32(flag_offset(vp, self.relid), !bit, Ordering::AcqRel)?;
        Ok(word & bit != 0)
    }

    /// Receives `count` packets, calling `each` with every one, and gives the space back. Waits as a driver does.
    pub fn receive_exactly(
        &mut self,
        count: usize,
        deadline: Instant,
        mut each: impl FnMut(Packet<'_>),
    ) -> Result<(), VscError> {
        let mut buf = PacketBuf::new();
        let mut left = count;
        while left > 0 {
            self.mask();
            while left > 0
                && let Some(packet) = self.receive(&mut buf)?
            {
                each(packet);
                left -= 1;
            }
            self.give_back()?;
            if left > 0 && !self.wait(deadline)? {
                return Err(VscError::Deadline("a packet of the server"));
            }
        }
        Ok(())
    }

    /// Receives one packet; its type, transaction id and payload.
    pub fn receive_one(&mut self, deadline: Instant) -> Result<(PacketKind, u64, Vec<u8>), VscError> {
        let mut found = None;
        self.receive_exactly(1, deadline, |packet| {
            found = Some((packet.kind, packet.transaction_id, packet.payload.to_vec()));
        })?;
        found.ok_or(VscError::Missing("packet"))
    }

    /// Sends one in-band request and waits for its completion, whose payload it returns. Other packets that come
    /// before are an error.
    pub fn call(&mut self, payload: &[&[u8]], deadline: Instant) -> Result<Vec<u8>, VscError> {
        let transaction_id = self.new_transaction_id();
        self.send_in_band(transaction_id, true, payload)?;
        self.flush()?;
        match self.receive_one(deadline)? {
            (PacketKind::COMPLETION, id, payload) if id == transaction_id => Ok(payload),
            _ => Err(VscError::Missing("completion where another packet came")),
        }
    }
}
