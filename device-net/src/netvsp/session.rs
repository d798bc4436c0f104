//! What guest and host have agreed on since the primary channel was opened.
//!
//! ```text
//!  Opened --INIT accepted--> Ready --NDIS_CONFIG, NDIS_VER, SEND_RECV_BUF, SEND_SEND_BUF, SUBCHANNEL--> Ready
//!    ^                         |
//!    +----- channel closed ----+          REVOKE_* take a buffer back; GPADL teardown does the same
//! ```
//!
//! A core: messages in, [`Outcome`]s out. Each transition is saved before its answer is published, so a successor may
//! see a message again whose effect it already has. Such a message comes as [`Origin::Replayed`] and gets the same
//! answer again; sent twice by the guest itself it is a fault.

use super::buffers::SendBuffer;
use super::receive::{FRAME_BYTES_MAX, ReceiveBuffer};
use super::wire::{
    GuestMessage, HostMessage, NvspStatus, NvspVersion, RECEIVE_BUFFER_ID, SUBCHANNEL_ALLOCATE,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Versions accepted, newest first. Below 5 a guest has no RSS, and other sizes of the offload structures.
pub const VERSIONS: [NvspVersion; 3] = [NvspVersion::V6_1, NvspVersion::V6, NvspVersion::V5];
/// Length of an MDL chain that Hyper-V claims to take; Linux ignores it.
const MAX_MDL_CHAIN: u32 = 34;
/// Bytes of an Ethernet header, which NDIS_CONFIG counts and OID_GEN_MAXIMUM_FRAME_SIZE does not.
pub const ETHERNET_HEADER_BYTES: u32 = 14;
/// Smallest MTU of IPv4 (RFC 791), with Ethernet header.
const FRAME_BYTES_MIN: u32 = 68 + ETHERNET_HEADER_BYTES;

/// Where a message comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From the ring.
    Fresh,
    /// From the journal of a predecessor, which may have applied it already.
    Replayed,
}

/// What the session needs to know of its surroundings.
pub struct Surroundings<'a> {
    pub max_sub_channels: u16,
    /// Length in bytes of a GPADL that the guest has established.
    pub gpadl_bytes: &'a dyn Fn(u32) -> Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Session {
    /// The guest has opened the primary channel, or nothing at all, and no version is agreed.
    #[default]
    Opened,
    /// A version is agreed.
    Ready(Agreement),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    pub version: NvspVersion,
    pub ndis_version: Option<(u32, u32)>,
    /// Largest frame with its Ethernet header, as NDIS_CONFIG said.
    pub frame_bytes: u32,
    pub capabilities: u64,
    pub receive_buffer: Option<ReceiveBuffer>,
    pub send_buffer: Option<SendBuffer>,
    pub sub_channels: u16,
}

/// The payload of the completion that a message gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    None,
    /// Only SWITCH_DATA_PATH may have it: Linux takes an empty completion's transaction id for a pointer.
    Empty,
    Message(HostMessage),
}

/// What the server must do besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    ReceiveBufferGiven(ReceiveBuffer),
    ReceiveBufferRevoked,
    SendBufferGiven(SendBuffer),
    SendBufferRevoked,
    OfferSubChannels(u16),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub answer: Answer,
    pub effect: Option<Effect>,
}

impl Outcome {
    fn quiet() -> Self {
        Self {
            answer: Answer::None,
            effect: None,
        }
    }
    fn answer(message: HostMessage) -> Self {
        Self {
            answer: Answer::Message(message),
            effect: None,
        }
    }
    fn with(self, effect: Effect) -> Self {
        Self {
            effect: Some(effect),
            ..self
        }
    }
}

/// The guest broke the order or named things that are not there. `answer` of [`Refusal`] still goes out.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SessionFault {
    #[error("NVSP message before INIT was accepted")]
    NotInitialized,
    #[error("INIT on a session that has version {0:?}")]
    AlreadyInitialized(NvspVersion),
    #[error("INIT with version {0:?}")]
    UnsupportedVersion(NvspVersion),
    #[error("GPADL {0:#x} is not established")]
    UnknownGpadl(u32),
    #[error("receive or send buffer is given twice")]
    BufferGivenTwice,
    #[error("GPADL {gpadl:#x} of {bytes} bytes is too small for a buffer")]
    BufferTooSmall { gpadl: u32, bytes: u32 },
    #[error("buffer id {0:#x}")]
    UnknownBufferId(u16),
    #[error("revocation of a buffer that was not given")]
    NothingToRevoke,
    #[error("SUBCHANNEL operation {operation} for {count} channels")]
    BadSubchannelRequest { operation: u32, count: u32 },
    #[error("message {0:?} has no business here")]
    Unexpected(GuestMessage),
}

/// A refused message: the fault to count, and the answer that the guest gets if it asked for one.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub fault: SessionFault,
    pub answer: HostMessage,
}

impl Session {
    /// The agreement, once there is one.
    pub fn agreement(&self) -> Option<&Agreement> {
        match self {
            Self::Opened => None,
            Self::Ready(agreement) => Some(agreement),
        }
    }

    /// Forgets buffers that are not what the guest has lent, by the lengths in bytes of its GPADLs.
    pub fn keep_only_lent(&mut self, gpadl_bytes: &dyn Fn(u32) -> Option<u64>) {
        let Self::Ready(agreement) = self else { return };
        let lent = |gpadl, fits: &dyn Fn(u64) -> bool| gpadl_bytes(gpadl).is_some_and(fits);
        agreement
            .receive_buffer
            .take_if(|buffer| !lent(buffer.gpadl, &|bytes| buffer.fits(bytes)));
        agreement
            .send_buffer
            .take_if(|buffer| !lent(buffer.gpadl, &|bytes| buffer.fits(bytes)));
    }

    /// Handles a control message of the primary channel. SEND_RNDIS_PKT and its completion are not the session's.
    pub fn on_message(
        &mut self,
        message: GuestMessage,
        origin: Origin,
        around: &Surroundings<'_>,
    ) -> Result<Outcome, Refusal> {
        if let GuestMessage::Init { min, max } = message {
            return self.on_init(min, max, origin);
        }
        match self {
            Self::Opened => Err(refuse(SessionFault::NotInitialized, failing_answer(message))),
            Self::Ready(agreement) => agreement.on_message(message, origin, around),
        }
    }

    fn on_init(&mut self, min: NvspVersion, max: NvspVersion, origin: Origin) -> Result<Outcome, Refusal> {
        if let Self::Ready(agreement) = self {
            let version = agreement.version;
            return if origin == Origin::Replayed && min <= version && version <= max {
                Ok(Outcome::answer(init_complete(version, NvspStatus::SUCCESS)))
            } else {
                Err(refuse(
                    SessionFault::AlreadyInitialized(version),
                    init_complete(NvspVersion(0), NvspStatus::FAIL),
                ))
            };
        }
        let Some(&version) = VERSIONS.iter().find(|&&version| min <= version && version <= max) else {
            let status = if min > VERSIONS[0] {
                NvspStatus::PROTOCOL_TOO_NEW
            } else {
                NvspStatus::PROTOCOL_TOO_OLD
            };
            return Err(refuse(
                SessionFault::UnsupportedVersion(max),
                init_complete(NvspVersion(0), status),
            ));
        };
        *self = Self::Ready(Agreement {
            version,
            ndis_version: None,
            frame_bytes: 1500 + ETHERNET_HEADER_BYTES,
            capabilities: 0,
            receive_buffer: None,
            send_buffer: None,
            sub_channels: 0,
        });
        Ok(Outcome::answer(init_complete(version, NvspStatus::SUCCESS)))
    }

    /// The guest takes a GPADL back, with or without a REVOKE before: nothing may touch that buffer any more.
    pub fn on_gpadl_teardown(&mut self, gpadl: u32) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Self::Ready(agreement) = self {
            if agreement
                .receive_buffer
                .take_if(|buffer| buffer.gpadl == gpadl)
                .is_some()
            {
                effects.push(Effect::ReceiveBufferRevoked);
            }
            if agreement
                .send_buffer
                .take_if(|buffer| buffer.gpadl == gpadl)
                .is_some()
            {
                effects.push(Effect::SendBufferRevoked);
            }
        }
        effects
    }
}

impl Agreement {
    /// The MTU as IP sees it.
    pub fn mtu_bytes(&self) -> u32 {
        self.frame_bytes.saturating_sub(ETHERNET_HEADER_BYTES)
    }

    fn on_message(
        &mut self,
        message: GuestMessage,
        origin: Origin,
        around: &Surroundings<'_>,
    ) -> Result<Outcome, Refusal> {
        match message {
            GuestMessage::NdisVersion { major, minor } => {
                self.ndis_version = Some((major, minor));
                Ok(Outcome::quiet())
            }
            GuestMessage::NdisConfig {
                mtu_bytes,
                capabilities,
            } => {
                self.frame_bytes = mtu_bytes.clamp(FRAME_BYTES_MIN, FRAME_BYTES_MAX);
                self.capabilities = capabilities;
                Ok(Outcome::quiet())
            }
            GuestMessage::ReceiveBuffer { gpadl, id } => self.on_receive_buffer(gpadl, id, origin, around),
            GuestMessage::SendBuffer { gpadl, id: _ } => self.on_send_buffer(gpadl, origin, around),
            GuestMessage::RevokeReceiveBuffer { id } => {
                if id != RECEIVE_BUFFER_ID {
                    return Err(refuse(SessionFault::UnknownBufferId(id), failing_answer(message)));
                }
                match self.receive_buffer.take() {
                    Some(_) => Ok(Outcome::quiet().with(Effect::ReceiveBufferRevoked)),
                    None => Err(refuse(SessionFault::NothingToRevoke, failing_answer(message))),
                }
            }
            GuestMessage::RevokeSendBuffer { .. } => match self.send_buffer.take() {
                Some(_) => Ok(Outcome::quiet().with(Effect::SendBufferRevoked)),
                None => Err(refuse(SessionFault::NothingToRevoke, failing_answer(message))),
            },
            GuestMessage::SwitchDataPath { .. } => Ok(Outcome {
                answer: Answer::Empty,
                effect: None,
            }),
            GuestMessage::Subchannel { operation, count } => {
                self.on_subchannel(operation, count, origin, around)
            }
            GuestMessage::Init { .. }
            | GuestMessage::RndisPacket { .. }
            | GuestMessage::RndisPacketComplete { .. }
            | GuestMessage::Unknown(_) => {
                Err(refuse(SessionFault::Unexpected(message), failing_answer(message)))
            }
        }
    }

    fn on_receive_buffer(
        &mut self,
        gpadl: u32,
        id: u16,
        origin: Origin,
        around: &Surroundings<'_>,
    ) -> Result<Outcome, Refusal> {
        let refused = |fault| {
            Err(refuse(
                fault,
                HostMessage::ReceiveBufferComplete {
                    status: NvspStatus::FAIL,
                    suballocation_bytes: 0,
                    suballocation_count: 0,
                },
            ))
        };
        if id != RECEIVE_BUFFER_ID {
            return refused(SessionFault::UnknownBufferId(id));
        }
        let buffer = match self.receive_buffer {
            Some(buffer) if origin == Origin::Replayed && buffer.gpadl == gpadl => buffer,
            Some(_) => return refused(SessionFault::BufferGivenTwice),
            None => {
                let Some(bytes) = (around.gpadl_bytes)(gpadl) else {
                    return refused(SessionFault::UnknownGpadl(gpadl));
                };
                match ReceiveBuffer::new(gpadl, bytes, self.frame_bytes) {
                    Some(buffer) => buffer,
                    None => return refused(SessionFault::BufferTooSmall { gpadl, bytes }),
                }
            }
        };
        self.receive_buffer = Some(buffer);
        let answer = HostMessage::ReceiveBufferComplete {
            status: NvspStatus::SUCCESS,
            suballocation_bytes: buffer.suballocation_bytes,
            suballocation_count: buffer.suballocation_count,
        };
        Ok(Outcome::answer(answer).with(Effect::ReceiveBufferGiven(buffer)))
    }

    fn on_send_buffer(
        &mut self,
        gpadl: u32,
        origin: Origin,
        around: &Surroundings<'_>,
    ) -> Result<Outcome, Refusal> {
        let refused = |fault| {
            Err(refuse(
                fault,
                HostMessage::SendBufferComplete {
                    status: NvspStatus::FAIL,
                    section_bytes: 0,
                },
            ))
        };
        let buffer = match self.send_buffer {
            Some(buffer) if origin == Origin::Replayed && buffer.gpadl == gpadl => buffer,
            Some(_) => return refused(SessionFault::BufferGivenTwice),
            None => {
                let Some(bytes) = (around.gpadl_bytes)(gpadl) else {
                    return refused(SessionFault::UnknownGpadl(gpadl));
                };
                match SendBuffer::new(gpadl, bytes) {
                    Some(buffer) => buffer,
                    None => return refused(SessionFault::BufferTooSmall { gpadl, bytes }),
                }
            }
        };
        self.send_buffer = Some(buffer);
        let answer = HostMessage::SendBufferComplete {
            status: NvspStatus::SUCCESS,
            section_bytes: super::buffers::SECTION_BYTES,
        };
        Ok(Outcome::answer(answer).with(Effect::SendBufferGiven(buffer)))
    }

    fn on_subchannel(
        &mut self,
        operation: u32,
        count: u32,
        origin: Origin,
        around: &Surroundings<'_>,
    ) -> Result<Outcome, Refusal> {
        let granted = count.min(u32::from(around.max_sub_channels)) as u16;
        let again = self.sub_channels != 0 && origin == Origin::Fresh;
        if operation != SUBCHANNEL_ALLOCATE || granted == 0 || again {
            return Err(refuse(
                SessionFault::BadSubchannelRequest { operation, count },
                HostMessage::SubchannelComplete {
                    status: NvspStatus::FAIL,
                    count: 0,
                },
            ));
        }
        self.sub_channels = granted;
        let answer = HostMessage::SubchannelComplete {
            status: NvspStatus::SUCCESS,
            count: u32::from(granted),
        };
        Ok(Outcome::answer(answer).with(Effect::OfferSubChannels(granted)))
    }
}

fn refuse(fault: SessionFault, answer: HostMessage) -> Refusal {
    Refusal { fault, answer }
}

fn init_complete(version: NvspVersion, status: NvspStatus) -> HostMessage {
    HostMessage::InitComplete {
        version,
        max_mdl_chain: MAX_MDL_CHAIN,
        status,
    }
}

/// The refusal that fits a message, for guests that asked for a completion.
pub fn failing_answer(message: GuestMessage) -> HostMessage {
    let status = NvspStatus::FAIL;
    match message {
        GuestMessage::Init { .. } => init_complete(NvspVersion(0), status),
        GuestMessage::ReceiveBuffer { .. } => HostMessage::ReceiveBufferComplete {
            status,
            suballocation_bytes: 0,
            suballocation_count: 0,
        },
        GuestMessage::SendBuffer { .. } => HostMessage::SendBufferComplete {
            status,
            section_bytes: 0,
        },
        GuestMessage::Subchannel { .. } => HostMessage::SubchannelComplete { status, count: 0 },
        GuestMessage::NdisVersion { .. }
        | GuestMessage::NdisConfig { .. }
        | GuestMessage::RevokeReceiveBuffer { .. }
        | GuestMessage::RevokeSendBuffer { .. }
        | GuestMessage::RndisPacket { .. }
        | GuestMessage::RndisPacketComplete { .. }
        | GuestMessage::SwitchDataPath { .. }
        | GuestMessage::Unknown(_) => HostMessage::RndisPacketComplete { status },
    }
}

#[cfg(test)]
mod tests;
