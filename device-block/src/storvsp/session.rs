//! The initialisation conversation of one SCSI controller, as a state machine: packets in, answers out.
//!
//! ```text
//!              BEGIN              QUERY_VERSION ok        QUERY_PROPERTIES             END
//! Closed ----------------> Began -----------------> Agreed ----------------> Described ------> Ready
//!   ^                     (a refused version stays in Began)                 CREATE_SUB_CHANNELS is taken
//!   '---- the primary channel is opened anew ----                            in Described and in Ready, once
//! ```
//!
//! Everything at the wrong time is answered STATUS_INVALID_DEVICE_STATE, as Hyper-V does, and changes
//! nothing. The state is saved on each transition, *before* the answer is published, so that a successor
//! continues from it. A request that was handled but whose answer was not published comes again out of the
//! journal: [`Session::on_replay`] knows it by its bytes and repeats the answer without a second transition.

mod saved;

use super::wire::{CHANNEL_SUPPORTS_MULTI_CHANNEL, ChannelProperties, Operation, PacketStatus, VstorPacket};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

/// Bytes that one request may move, as told to the guest.
///
/// Limit: 1 MiB is 257 page numbers, 2.1 KiB of ring and of journal slot; Linux builds larger I/O of several
/// requests. A larger one would fill a 128 KiB ring with fewer than 32 requests.
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;

/// storvsp protocol versions that we speak (Linux 6.1 `VMSTOR_PROTO_VERSION_WIN10`, `_WIN8_1`, `_WIN8`).
/// Older ones have a shorter SRB.
const KNOWN_VERSIONS: [u16; 3] = [0x0602, 0x0600, 0x0501];

/// Where the conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has opened the primary channel at most.
    Closed,
    /// BEGIN_INITIALIZATION was answered.
    Began,
    /// A version was accepted.
    Agreed { version: u16 },
    /// The properties were told.
    Described { version: u16, sub_channels: Option<u16> },
    /// END_INITIALIZATION was answered: SCSI requests are served.
    Ready { version: u16, sub_channels: Option<u16> },
}

/// A request that was answered, and how. Kept for a successor.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answered {
    transaction_id: u64,
    request: Vec<u8>,
    reply: Vec<u8>,
}

/// What to do with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Save the session, then send this answer.
    Reply(VstorPacket),
    /// Save the session, send the answer, then offer sub-channels 1 to `count`.
    ReplyAndOffer {
        /// The answer.
        reply: VstorPacket,
        /// How many sub-channels the guest asked for.
        count: u16,
    },
    /// Run the SCSI request in the packet's body.
    Execute,
    /// Finish all that is outstanding on the controller, then answer with success.
    Reset,
}

/// The conversation of one controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    state: State,
    max_sub_channels: u16,
    /// What the guest is told, or was told by a predecessor.
    max_transfer_bytes: u32,
    last: Option<Answered>,
}

impl Session {
    /// A controller that offers up to `max_sub_channels` sub-channels.
    pub fn new(max_sub_channels: u16) -> Self {
        Self {
            state: State::Closed,
            max_sub_channels,
            max_transfer_bytes: MAX_TRANSFER_BYTES,
            last: None,
        }
    }

    /// The guest has opened the primary channel: the conversation starts again.
    pub fn on_primary_opened(&mut self) {
        *self = Self::new(self.max_sub_channels);
    }

    /// A packet that asked for a completion came in on the channel `sub_index` (0: the primary).
    pub fn on_packet(&mut self, sub_index: u16, transaction_id: u64, packet: &VstorPacket) -> Step {
        let operation = packet.operation();
        match operation {
            Operation::ExecuteSrb => return self.on_execute(),
            Operation::ResetBus | Operation::ResetAdapter | Operation::ResetLun => return self.on_reset(),
            _ => {}
        }
        let step = if sub_index == 0 {
            self.on_control(operation, packet)
        } else {
            refuse(PacketStatus::InvalidDeviceState)
        };
        if let Step::Reply(reply) | Step::ReplyAndOffer { reply, .. } = &step {
            self.last = Some(Answered {
                transaction_id,
                request: packet.as_bytes().to_vec(),
                reply: reply.as_bytes().to_vec(),
            });
        }
        step
    }

    /// A packet comes again out of a predecessor's journal. If the predecessor had handled it (this session is
    /// the state after it), the same answer is given and nothing changes.
    pub fn on_replay(&mut self, sub_index: u16, transaction_id: u64, packet: &VstorPacket) -> Step {
        if let Some(last) = &self.last
            && sub_index == 0
            && last.transaction_id == transaction_id
            && last.request == packet.as_bytes()
            && let Ok(reply) = VstorPacket::parse(&last.reply)
        {
            let granted =
                packet.operation() == Operation::CreateSubChannels && reply.header.status.get() == 0;
            return match self.sub_channels() {
                Some(count) if granted => Step::ReplyAndOffer { reply, count },
                _ => Step::Reply(reply),
            };
        }
        self.on_packet(sub_index, transaction_id, packet)
    }

    /// Sub-channels that the guest has asked for and that must therefore be on offer.
    pub fn sub_channels(&self) -> Option<u16> {
        match self.state {
            State::Closed | State::Began | State::Agreed { .. } => None,
            State::Described { sub_channels, .. } | State::Ready { sub_channels, .. } => sub_channels,
        }
    }

    /// The state in one word, for inspection.
    pub fn describe(&self) -> String {
        match self.state {
            State::Closed => "closed".into(),
            State::Began => "initializing".into(),
            State::Agreed { version } => format!("initializing version={version:#06x}"),
            State::Described { version, .. } => format!("described version={version:#06x}"),
            State::Ready {
                version,
                sub_channels,
            } => {
                format!(
                    "ready version={version:#06x} sub_channels={}",
                    sub_channels.unwrap_or(0)
                )
            }
        }
    }

    fn on_execute(&self) -> Step {
        match self.state {
            State::Ready { .. } => Step::Execute,
            State::Closed | State::Began | State::Agreed { .. } | State::Described { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_reset(&self) -> Step {
        match self.state {
            State::Ready { .. } => Step::Reset,
            State::Closed | State::Began | State::Agreed { .. } | State::Described { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_control(&mut self, operation: Operation, packet: &VstorPacket) -> Step {
        match operation {
            Operation::BeginInitialization => self.on_begin(),
            Operation::QueryProtocolVersion => {
                self.on_query_version(packet.protocol_version().major_minor.get())
            }
            Operation::QueryProperties => self.on_query_properties(),
            Operation::EndInitialization => self.on_end(),
            Operation::CreateSubChannels => self.on_create_sub_channels(packet.sub_channel_count()),
            // The rest goes from us to the guest, is for Fibre Channel, or is unknown. Named, not `_`, so that
            // a new operation must be decided on here.
            Operation::CompleteIo
            | Operation::RemoveDevice
            | Operation::ExecuteSrb
            | Operation::ResetLun
            | Operation::ResetAdapter
            | Operation::ResetBus
            | Operation::EnumerateBus
            | Operation::FchbaData
            | Operation::Unknown(_) => refuse(PacketStatus::InvalidDeviceRequest),
        }
    }

    fn on_begin(&mut self) -> Step {
        match self.state {
            State::Closed => {
                self.state = State::Began;
                accept()
            }
            State::Began | State::Agreed { .. } | State::Described { .. } | State::Ready { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_query_version(&mut self, version: u16) -> Step {
        match self.state {
            State::Began if KNOWN_VERSIONS.contains(&version) => {
                self.state = State::Agreed { version };
                accept()
            }
            State::Began => refuse(PacketStatus::RevisionMismatch),
            State::Closed | State::Agreed { .. } | State::Described { .. } | State::Ready { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_query_properties(&mut self) -> Step {
        match self.state {
            State::Agreed { version } => {
                self.state = State::Described {
                    version,
                    sub_channels: None,
                };
                Step::Reply(self.properties())
            }
            State::Closed | State::Began | State::Described { .. } | State::Ready { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_end(&mut self) -> Step {
        match self.state {
            State::Described {
                version,
                sub_channels,
            } => {
                self.state = State::Ready {
                    version,
                    sub_channels,
                };
                accept()
            }
            State::Closed | State::Began | State::Agreed { .. } | State::Ready { .. } => {
                refuse(PacketStatus::InvalidDeviceState)
            }
        }
    }

    fn on_create_sub_channels(&mut self, count: u16) -> Step {
        let sub_channels = match &mut self.state {
            State::Described { sub_channels, .. } | State::Ready { sub_channels, .. } => sub_channels,
            State::Closed | State::Began | State::Agreed { .. } => {
                return refuse(PacketStatus::InvalidDeviceState);
            }
        };
        if sub_channels.is_some() {
            return refuse(PacketStatus::InvalidDeviceState);
        }
        if count > self.max_sub_channels {
            return refuse(PacketStatus::InvalidParameter);
        }
        *sub_channels = Some(count);
        Step::ReplyAndOffer {
            reply: VstorPacket::completion(PacketStatus::Success),
            count,
        }
    }

    fn properties(&self) -> VstorPacket {
        let flags = if self.max_sub_channels > 0 {
            CHANNEL_SUPPORTS_MULTI_CHANNEL
        } else {
            0
        };
        let properties = ChannelProperties {
            reserved: U32::ZERO,
            max_channel_count: U16::new(self.max_sub_channels),
            reserved1: U16::ZERO,
            flags: U32::new(flags),
            max_transfer_bytes: U32::new(self.max_transfer_bytes),
            reserved2: U64::ZERO,
        };
        VstorPacket::with_body(Operation::CompleteIo, properties.as_bytes())
    }
}

fn accept() -> Step {
    Step::Reply(VstorPacket::completion(PacketStatus::Success))
}

fn refuse(status: PacketStatus) -> Step {
    Step::Reply(VstorPacket::completion(status))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
