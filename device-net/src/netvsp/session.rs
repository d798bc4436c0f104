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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sixteen_megabytes(gpadl: u32) -> Option<u32> {
        (gpadl == 0xE1E10).then_some(16 << 20)
    }

    fn around() -> Surroundings<'static> {
        Surroundings {
            max_sub_channels: 3,
            gpadl_bytes: &sixteen_megabytes,
        }
    }

    fn init(version: NvspVersion) -> GuestMessage {
        GuestMessage::Init {
            min: version,
            max: version,
        }
    }

    fn ready() -> Session {
        let mut session = Session::default();
        session
            .on_message(init(NvspVersion::V6), Origin::Fresh, &around())
            .expect("accepted");
        session
    }

    const RECEIVE: GuestMessage = GuestMessage::ReceiveBuffer {
        gpadl: 0xE1E10,
        id: RECEIVE_BUFFER_ID,
    };

    #[test]
    fn versions_5_6_and_6_1_are_accepted_and_others_refused_with_version_zero() {
        for version in VERSIONS {
            let mut session = Session::default();
            let outcome = session
                .on_message(init(version), Origin::Fresh, &around())
                .expect("accepted");
            assert_eq!(
                outcome.answer,
                Answer::Message(init_complete(version, NvspStatus::SUCCESS))
            );
        }
        for (version, status) in [
            (NvspVersion(0x0007_0000), NvspStatus::PROTOCOL_TOO_NEW),
            (NvspVersion::V4, NvspStatus::PROTOCOL_TOO_OLD),
            (NvspVersion::V1, NvspStatus::PROTOCOL_TOO_OLD),
        ] {
            let refusal = Session::default()
                .on_message(init(version), Origin::Fresh, &around())
                .expect_err("refused");
            assert_eq!(refusal.answer, init_complete(NvspVersion(0), status));
        }
    }

    #[test]
    fn a_guest_that_gives_a_range_gets_the_newest_version_in_it() {
        let mut session = Session::default();
        let message = GuestMessage::Init {
            min: NvspVersion::V1,
            max: NvspVersion::V6,
        };
        session
            .on_message(message, Origin::Fresh, &around())
            .expect("accepted");
        assert_eq!(
            session.agreement().map(|agreement| agreement.version),
            Some(NvspVersion::V6)
        );
    }

    #[test]
    fn nothing_works_before_init() {
        let refusal = Session::default()
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect_err("refused");
        assert_eq!(refusal.fault, SessionFault::NotInitialized);
        assert!(matches!(
            refusal.answer,
            HostMessage::ReceiveBufferComplete {
                status: NvspStatus::FAIL,
                ..
            }
        ));
    }

    #[test]
    fn a_second_init_from_the_guest_is_a_fault_but_a_replayed_one_gets_its_answer_again() {
        let mut session = ready();
        assert!(
            session
                .on_message(init(NvspVersion::V6), Origin::Fresh, &around())
                .is_err()
        );
        let again = session
            .on_message(init(NvspVersion::V6), Origin::Replayed, &around())
            .expect("replayed");
        assert_eq!(
            again.answer,
            Answer::Message(init_complete(NvspVersion::V6, NvspStatus::SUCCESS))
        );
    }

    #[test]
    fn the_receive_buffer_is_cut_for_the_mtu_that_the_guest_announced() {
        let mut session = ready();
        let config = GuestMessage::NdisConfig {
            mtu_bytes: 9014,
            capabilities: 0,
        };
        assert_eq!(
            session.on_message(config, Origin::Fresh, &around()),
            Ok(Outcome::quiet())
        );
        let outcome = session
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect("accepted");
        let Some(Effect::ReceiveBufferGiven(buffer)) = outcome.effect else {
            panic!("{outcome:?}")
        };
        assert!(buffer.suballocation_bytes >= 9014 + 256 + 36);
        assert!(buffer.suballocation_bytes * buffer.suballocation_count <= 16 << 20);
    }

    #[test]
    fn a_buffer_given_twice_is_refused_and_a_replay_is_answered_with_the_same_geometry() {
        let mut session = ready();
        let first = session
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect("accepted");
        assert_eq!(
            session.on_message(RECEIVE, Origin::Replayed, &around()),
            Ok(first)
        );
        let refusal = session
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect_err("refused");
        assert_eq!(refusal.fault, SessionFault::BufferGivenTwice);
    }

    #[test]
    fn revoke_and_gpadl_teardown_both_take_the_buffer_away() {
        let mut session = ready();
        session
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect("accepted");
        let revoke = GuestMessage::RevokeReceiveBuffer {
            id: RECEIVE_BUFFER_ID,
        };
        assert_eq!(
            session.on_message(revoke, Origin::Fresh, &around()),
            Ok(Outcome::quiet().with(Effect::ReceiveBufferRevoked))
        );
        assert!(session.on_message(revoke, Origin::Fresh, &around()).is_err());
        session
            .on_message(RECEIVE, Origin::Fresh, &around())
            .expect("accepted");
        assert_eq!(session.on_gpadl_teardown(0xE1E11), []);
        assert_eq!(session.on_gpadl_teardown(0xE1E10), [Effect::ReceiveBufferRevoked]);
    }

    #[test]
    fn sub_channels_are_granted_once_and_never_more_than_asked_or_allowed() {
        let mut session = ready();
        let ask = GuestMessage::Subchannel {
            operation: SUBCHANNEL_ALLOCATE,
            count: 9,
        };
        let outcome = session
            .on_message(ask, Origin::Fresh, &around())
            .expect("granted");
        assert_eq!(outcome.effect, Some(Effect::OfferSubChannels(3)));
        assert!(session.on_message(ask, Origin::Fresh, &around()).is_err());
        assert!(session.on_message(ask, Origin::Replayed, &around()).is_ok());
        let none = GuestMessage::Subchannel {
            operation: SUBCHANNEL_ALLOCATE,
            count: 0,
        };
        assert!(ready().on_message(none, Origin::Fresh, &around()).is_err());
        let free = GuestMessage::Subchannel {
            operation: 2,
            count: 1,
        };
        assert!(ready().on_message(free, Origin::Fresh, &around()).is_err());
    }

    #[test]
    fn only_switch_data_path_is_answered_empty() {
        let mut session = ready();
        let outcome = session
            .on_message(
                GuestMessage::SwitchDataPath { active: 1 },
                Origin::Fresh,
                &around(),
            )
            .expect("answered");
        assert_eq!(outcome.answer, Answer::Empty);
    }

    proptest! {
        #[test]
        fn any_sequence_of_messages_keeps_the_buffers_inside_their_gpadls(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 4..40), 0..60),
            numbers in prop::collection::vec(prop::sample::select(vec![1u32, 100, 101, 103, 104, 106, 125, 129, 133]), 60),
        ) {
            let lengths = |gpadl: u32| Some(gpadl);
            let around = Surroundings { max_sub_channels: 2, gpadl_bytes: &lengths };
            let mut session = Session::default();
            for (mut bytes, number) in messages.into_iter().zip(numbers) {
                bytes[..4].copy_from_slice(&number.to_le_bytes());
                let Ok(message) = GuestMessage::parse(&bytes) else { continue };
                let first = session.on_message(message, Origin::Fresh, &around);
                if let Ok(first) = first {
                    let replayed = session.on_message(message, Origin::Replayed, &around);
                    if first.effect != Some(Effect::ReceiveBufferRevoked) && first.effect != Some(Effect::SendBufferRevoked) {
                        prop_assert_eq!(Ok(first), replayed);
                    }
                }
                if let Some(agreement) = session.agreement() {
                    if let Some(buffer) = agreement.receive_buffer {
                        prop_assert!(u64::from(buffer.suballocation_bytes) * u64::from(buffer.suballocation_count) <= u64::from(buffer.gpadl));
                    }
                    prop_assert!(agreement.sub_channels <= 2);
                    prop_assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&agreement.frame_bytes));
                }
            }
        }
    }
}
