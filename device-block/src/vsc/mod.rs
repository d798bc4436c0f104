//! The guest's side of storvsp: for tests and benchmarks without a VM.
//!
//! [`Initiator`] speaks storvsp on one channel as Linux's `hv_storvsc` does; [`Room`] starts the real program in its
//! sandbox, with a played supervisor and a synthetic guest around it. A peer's misbehaviour is an error here, never a
//! panic.

mod command;
mod room;

pub use command::{Command, Data, Reply};
pub use room::{Room, RoomError};

use crate::storvsp::wire::{ChannelProperties, Operation, PACKET_BYTES, ProtocolVersionQuery, VstorPacket};
use std::time::Instant;
use vmbus::ring::PacketBuf;
use vmbus::vsc::{GuestChannel, VscError};
use vmbus::wire::{Packet, PacketKind};
use zerocopy::IntoBytes;

/// The versions in the order in which Linux 6.1 asks for them.
const VERSIONS: [u16; 3] = [0x0602, 0x0600, 0x0501];

/// The driver's end of one storvsp channel.
#[derive(Debug)]
pub struct Initiator {
    /// The channel below.
    pub channel: GuestChannel,
    buffer: PacketBuf,
}

impl Initiator {
    /// The driver of an open channel.
    pub fn new(channel: GuestChannel) -> Self {
        Self {
            channel,
            buffer: PacketBuf::new(),
        }
    }

    /// Goes through the initialisation as Linux does, up to END_INITIALIZATION.
    pub fn initialize(&mut self, deadline: Instant) -> Result<ChannelProperties, VscError> {
        self.control(Operation::BeginInitialization, &[], deadline)?;
        let mut agreed = false;
        for version in VERSIONS {
            let query = ProtocolVersionQuery {
                major_minor: version.into(),
                revision: 0.into(),
            };
            let packet = VstorPacket::with_body(Operation::QueryProtocolVersion, query.as_bytes());
            if self.call(&packet, deadline)?.header.status.get() == 0 {
                agreed = true;
                break;
            }
        }
        if !agreed {
            return Err(VscError::Missing("common version of storvsp"));
        }
        let properties = self
            .control(Operation::QueryProperties, &[], deadline)?
            .channel_properties();
        self.control(Operation::EndInitialization, &[], deadline)?;
        Ok(properties)
    }

    /// Asks for sub-channels.
    pub fn create_sub_channels(&mut self, count: u16, deadline: Instant) -> Result<(), VscError> {
        self.control(Operation::CreateSubChannels, &count.to_le_bytes(), deadline)
            .map(|_| ())
    }

    /// Sends a packet without data and waits for its answer, which must be the only packet that comes.
    pub fn call(&mut self, packet: &VstorPacket, deadline: Instant) -> Result<VstorPacket, VscError> {
        let answer = self.channel.call(&[packet.as_bytes()], deadline)?;
        parse(PacketKind::COMPLETION, &answer)
    }

    /// Stages a command; its transaction id. [`GuestChannel::flush`] sends it.
    pub fn queue(&mut self, command: &Command) -> Result<u64, VscError> {
        let id = self.channel.new_transaction_id();
        self.queue_as(command, id)?;
        Ok(id)
    }

    /// Stages a command under a transaction id of the caller's choice.
    pub fn queue_as(&mut self, command: &Command, id: u64) -> Result<(), VscError> {
        let packet = command.packet();
        match command.data.range() {
            Some(range) => self.channel.send_gpa_direct(id, &[range], &[packet.as_bytes()])?,
            None => self.channel.send_in_band(id, true, &[packet.as_bytes()])?,
        }
        Ok(())
    }

    /// Executes one command and waits for its answer, which must be the only packet that comes.
    pub fn execute(&mut self, command: &Command, deadline: Instant) -> Result<Reply, VscError> {
        let id = self.queue(command)?;
        self.channel.flush()?;
        let mut found = None;
        self.collect(1, deadline, |answered, reply| {
            found = (answered == id).then_some(reply)
        })?;
        found.ok_or(VscError::Missing("completion with the command's id"))
    }

    /// Waits for `count` answers as a driver does, calling `each` with every one.
    pub fn collect(
        &mut self,
        count: usize,
        deadline: Instant,
        mut each: impl FnMut(u64, Reply),
    ) -> Result<(), VscError> {
        let mut left = count;
        while left > 0 {
            left -= self.collect_ready(left, &mut each)?;
            if left > 0 && !self.channel.wait(deadline)? {
                return Err(VscError::Deadline("an answer of the server"));
            }
        }
        Ok(())
    }

    /// Takes up to `most` answers that are there already; how many there were.
    pub fn collect_ready(
        &mut self,
        most: usize,
        mut each: impl FnMut(u64, Reply),
    ) -> Result<usize, VscError> {
        self.channel.mask();
        let mut count = 0;
        while count < most
            && let Some(packet) = self.channel.receive(&mut self.buffer)?
        {
            let Packet {
                kind,
                transaction_id,
                payload,
                ..
            } = packet;
            each(transaction_id, Reply::new(&parse(kind, payload)?));
            count += 1;
        }
        self.channel.give_back()?;
        Ok(count)
    }

    fn control(
        &mut self,
        operation: Operation,
        body: &[u8],
        deadline: Instant,
    ) -> Result<VstorPacket, VscError> {
        let answer = self.call(&VstorPacket::with_body(operation, body), deadline)?;
        match answer.header.status.get() {
            0 => Ok(answer),
            _ => Err(VscError::Missing("success of an initialisation step")),
        }
    }
}

/// What Linux insists on: a completion of exactly 64 bytes that says COMPLETE_IO.
fn parse(kind: PacketKind, payload: &[u8]) -> Result<VstorPacket, VscError> {
    if kind != PacketKind::COMPLETION || payload.len() != PACKET_BYTES {
        return Err(VscError::Missing("completion of 64 bytes"));
    }
    match VstorPacket::parse(payload) {
        Ok(packet) if packet.operation() == Operation::CompleteIo => Ok(packet),
        _ => Err(VscError::Missing("COMPLETE_IO in a completion")),
    }
}
