//! The adapter's control side: requests in, responses out.
//!
//! Each request is answered from [`Adapter`] and [`Traits`] alone and changes nothing but [`Adapter`], idempotently,
//! so a successor may answer a request again that its predecessor took.

use super::offload::OffloadParameters;
use super::oid;
use super::rss::Steering;
use super::wire::{
    IndicateStatus, InitializeComplete, InitializeRequest, OidRequest, QueryComplete, RndisFault,
    RndisStatus, StatusComplete, emit_message, information, number, split_message,
};
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

/// A control message of the guest is at most this long. Limit: it must fit a journal slot; the longest that Linux
/// sends is SET of RSS parameters with 256 table entries, 1,132 bytes.
pub const REQUEST_BYTES_MAX: usize = 2048;
/// RNDIS messages that a guest may put into one packet (Hyper-V's own figure).
pub const PACKETS_PER_MESSAGE: u32 = 8;
/// Each message begins at a multiple of 1 << 3 bytes (Hyper-V's own figure).
const ALIGNMENT_EXPONENT: u32 = 3;
/// Longest transfer to us, as Hyper-V claims it; the real limits are those of the packet's ranges.
const MAX_TRANSFER_BYTES: u32 = 0xEFFF_FFFF;
const MAJOR_VERSION: u32 = 1;
const MINOR_VERSION: u32 = 0;
/// `RNDIS_DF_CONNECTIONLESS`
const DEVICE_FLAGS: u32 = 1;
/// `NdisMedium802_3`
const MEDIUM: u32 = 0;

/// What kind of adapter this is: fixed by the configuration and the backend, not by the guest.
#[derive(Clone, Debug)]
pub struct Traits {
    pub mac: [u8; 6],
    /// Largest MTU that the backend carries, without Ethernet header.
    pub mtu_bytes: u32,
    pub link_up: bool,
    /// Checksums and segmentation that may be left to us.
    pub offloads: bool,
    pub queues: u16,
}

/// Which frames the guest wants (`NDIS_PACKET_TYPE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketFilter(pub u32);

impl PacketFilter {
    pub const DIRECTED: u32 = 0x1;
    pub const MULTICAST: u32 = 0x2;
    pub const ALL_MULTICAST: u32 = 0x4;
    pub const BROADCAST: u32 = 0x8;
    pub const PROMISCUOUS: u32 = 0x20;

    pub fn is_closed(self) -> bool {
        self.0 == 0
    }

    /// Whether a frame with this destination is wanted. We keep no multicast list: any multicast bit admits all.
    pub fn admits(self, destination: [u8; 6], own: [u8; 6]) -> bool {
        let wanted = if destination == [0xFF; 6] {
            Self::BROADCAST
        } else if destination[0] & 1 != 0 {
            Self::MULTICAST | Self::ALL_MULTICAST
        } else if destination == own {
            Self::DIRECTED
        } else {
            0
        };
        self.0 & (wanted | Self::PROMISCUOUS) != 0
    }
}

/// The adapter's state: what guests set, and successors inherit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// Between INITIALIZE and HALT.
    pub initialized: bool,
    pub filter: PacketFilter,
    pub offload: OffloadParameters,
    pub steering: Steering,
    /// The link state that the guest was told last.
    pub link_told: Option<bool>,
}

impl Adapter {
    /// Handles one request (a private copy). `Ok(None)`: no response is due.
    pub fn on_request(
        &mut self,
        message: &[u8],
        traits: &Traits,
        negotiated_mtu: u32,
    ) -> Result<Option<Vec<u8>>, RndisFault> {
        let (message_type, body) = split_message(message)?;
        let too_short = |wanted| RndisFault::MessageTooShort {
            bytes: body.len(),
            wanted,
        };
        match message_type {
            number::INITIALIZE => {
                let (request, _) = InitializeRequest::read_from_prefix(body).map_err(|_| too_short(16))?;
                self.initialized = true;
                // The guest asks for it as soon as it is initialized.
                self.link_told = Some(traits.link_up);
                Ok(Some(initialize_complete(request.request_id)))
            }
            number::HALT => {
                *self = Self {
                    link_told: self.link_told,
                    ..Self::default()
                };
                Ok(None)
            }
            number::KEEPALIVE => {
                let (request_id, _) = U32::read_from_prefix(body).map_err(|_| too_short(4))?;
                let status = self.initialized_status();
                Ok(Some(status_complete(number::KEEPALIVE, request_id, status)))
            }
            number::QUERY => {
                let (request, _) = OidRequest::read_from_prefix(body).map_err(|_| too_short(20))?;
                if !self.initialized {
                    return Ok(Some(query_complete(
                        request.request_id,
                        RndisStatus::FAILURE,
                        &[],
                    )));
                }
                let asked = information(body, request.info_offset.get(), request.info_length.get());
                let answer = match asked {
                    Ok(asked) => oid::query(self, request.oid.get(), asked, traits, negotiated_mtu),
                    Err(_) => Err(RndisStatus::INVALID_DATA),
                };
                Ok(Some(match answer {
                    Ok(info) => query_complete(request.request_id, RndisStatus::SUCCESS, &info),
                    Err(status) => query_complete(request.request_id, status, &[]),
                }))
            }
            number::SET => {
                let (request, _) = OidRequest::read_from_prefix(body).map_err(|_| too_short(20))?;
                let status = match information(body, request.info_offset.get(), request.info_length.get()) {
                    Ok(_) if !self.initialized => RndisStatus::FAILURE,
                    Ok(info) => oid::set(self, request.oid.get(), info, traits),
                    Err(_) => RndisStatus::INVALID_DATA,
                };
                Ok(Some(status_complete(number::SET, request.request_id, status)))
            }
            other => Err(RndisFault::UnexpectedType(other)),
        }
    }

    fn initialized_status(&self) -> RndisStatus {
        if self.initialized {
            RndisStatus::SUCCESS
        } else {
            RndisStatus::FAILURE
        }
    }

    /// The message that tells the guest of a change of the link, if there is one to tell.
    pub fn on_link(&mut self, up: bool) -> Option<Vec<u8>> {
        if !self.initialized || self.link_told == Some(up) {
            return None;
        }
        self.link_told = Some(up);
        let status = if up {
            RndisStatus::MEDIA_CONNECT
        } else {
            RndisStatus::MEDIA_DISCONNECT
        };
        let body = IndicateStatus {
            status: U32::new(status.0),
            status_buffer_length: U32::ZERO,
            status_buffer_offset: U32::ZERO,
        };
        Some(emit_message(number::INDICATE_STATUS, body.as_bytes(), &[]))
    }
}

fn initialize_complete(request_id: U32) -> Vec<u8> {
    let body = InitializeComplete {
        request_id,
        status: U32::new(RndisStatus::SUCCESS.0),
        major_version: U32::new(MAJOR_VERSION),
        minor_version: U32::new(MINOR_VERSION),
        device_flags: U32::new(DEVICE_FLAGS),
        medium: U32::new(MEDIUM),
        max_packets_per_message: U32::new(PACKETS_PER_MESSAGE),
        max_transfer_size: U32::new(MAX_TRANSFER_BYTES),
        packet_alignment_factor: U32::new(ALIGNMENT_EXPONENT),
        af_list_offset: U32::ZERO,
        af_list_size: U32::ZERO,
    };
    emit_message(number::INITIALIZE | number::COMPLETION, body.as_bytes(), &[])
}

fn status_complete(request: u32, request_id: U32, status: RndisStatus) -> Vec<u8> {
    let body = StatusComplete {
        request_id,
        status: U32::new(status.0),
    };
    emit_message(request | number::COMPLETION, body.as_bytes(), &[])
}

/// Quirk(Linux 6.1 netvsc): the information's offset must be at least 16 and inside the message even if it is empty;
/// the status is not looked at, only the length.
fn query_complete(request_id: U32, status: RndisStatus, info: &[u8]) -> Vec<u8> {
    let body = QueryComplete {
        request_id,
        status: U32::new(status.0),
        info_length: U32::new(info.len() as u32),
        info_offset: U32::new(size_of::<QueryComplete>() as u32),
    };
    emit_message(number::QUERY | number::COMPLETION, body.as_bytes(), info)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn traits() -> Traits {
        Traits {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            mtu_bytes: 1500,
            link_up: true,
            offloads: true,
            queues: 4,
        }
    }

    pub fn request(message_type: u32, oid: u32, info: &[u8]) -> Vec<u8> {
        let body = OidRequest {
            request_id: U32::new(0x77),
            oid: U32::new(oid),
            info_length: U32::new(info.len() as u32),
            info_offset: U32::new(20),
            vc_handle: U32::ZERO,
        };
        emit_message(message_type, body.as_bytes(), info)
    }

    fn initialize() -> Vec<u8> {
        let body = InitializeRequest {
            request_id: U32::new(5),
            major_version: U32::new(1),
            minor_version: U32::ZERO,
            max_transfer_size: U32::new(0x4000),
        };
        emit_message(number::INITIALIZE, body.as_bytes(), &[])
    }

    pub fn initialized() -> Adapter {
        let mut adapter = Adapter::default();
        adapter
            .on_request(&initialize(), &traits(), 1500)
            .expect("well-formed");
        adapter
    }

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect()
    }

    #[test]
    fn initialize_is_answered_with_eight_messages_per_packet_aligned_to_eight() {
        let mut adapter = Adapter::default();
        let answer = adapter
            .on_request(&initialize(), &traits(), 1500)
            .expect("well-formed")
            .expect("answered");
        assert_eq!(
            words(&answer),
            [0x8000_0002, 52, 5, 0, 1, 0, 1, 0, 8, 0xEFFF_FFFF, 3, 0, 0]
        );
        assert!(adapter.initialized);
    }

    #[test]
    fn an_unknown_query_is_answered_empty_with_an_offset_that_linux_accepts() {
        let answer = initialized()
            .on_request(&request(number::QUERY, 0x1234, &[]), &traits(), 1500)
            .expect("well-formed");
        assert_eq!(
            words(&answer.expect("answered")),
            [0x8000_0004, 24, 0x77, 0xC000_00BB, 0, 16]
        );
    }

    #[test]
    fn nothing_is_told_or_set_before_initialize() {
        let mut adapter = Adapter::default();
        let answer = adapter.on_request(&request(number::QUERY, 0x0101_0101, &[]), &traits(), 1500);
        assert_eq!(
            words(&answer.expect("well-formed").expect("answered"))[3],
            RndisStatus::FAILURE.0
        );
        let answer = adapter.on_request(&request(number::SET, 0x0001_010E, &[1, 0, 0, 0]), &traits(), 1500);
        assert_eq!(
            words(&answer.expect("well-formed").expect("answered"))[3],
            RndisStatus::FAILURE.0
        );
        assert!(adapter.filter.is_closed());
    }

    #[test]
    fn halt_is_not_answered_and_closes_the_filter() {
        let mut adapter = initialized();
        adapter
            .on_request(
                &request(number::SET, 0x0001_010E, &[0x2B, 0, 0, 0]),
                &traits(),
                1500,
            )
            .expect("set");
        assert_eq!(adapter.filter, PacketFilter(0x2B));
        let halt = emit_message(number::HALT, &[1, 0, 0, 0], &[]);
        assert_eq!(adapter.on_request(&halt, &traits(), 1500), Ok(None));
        assert!(!adapter.initialized && adapter.filter.is_closed());
    }

    #[test]
    fn information_outside_the_message_is_invalid_data_not_a_read() {
        let mut message = request(number::SET, 0x0001_010E, &[1, 0, 0, 0]);
        message[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        let answer = initialized()
            .on_request(&message, &traits(), 1500)
            .expect("answered")
            .expect("answered");
        assert_eq!(words(&answer)[3], RndisStatus::INVALID_DATA.0);
    }

    #[test]
    fn the_filter_admits_what_it_names() {
        let own = [2, 0, 0, 0, 0, 1];
        let other = [2, 0, 0, 0, 0, 2];
        let group = [1, 0, 0x5E, 0, 0, 1];
        let linux = PacketFilter(PacketFilter::DIRECTED | PacketFilter::BROADCAST);
        assert!(linux.admits(own, own) && linux.admits([0xFF; 6], own));
        assert!(!linux.admits(other, own) && !linux.admits(group, own));
        assert!(PacketFilter(PacketFilter::ALL_MULTICAST).admits(group, own));
        assert!(PacketFilter(PacketFilter::PROMISCUOUS).admits(other, own));
        assert!(!PacketFilter(0).admits(own, own));
    }

    #[test]
    fn a_change_of_the_link_is_told_once() {
        let mut adapter = initialized();
        assert_eq!(
            words(&adapter.on_link(false).expect("told")),
            [7, 20, 0x4001_000C, 0, 0]
        );
        assert_eq!(adapter.on_link(false), None);
        assert_eq!(words(&adapter.on_link(true).expect("told"))[2], 0x4001_000B);
        assert_eq!(Adapter::default().on_link(true), None);
    }

    proptest! {
        #[test]
        fn any_request_is_survived_and_answering_it_again_gives_the_same(
            message_type in 0u32..10,
            oid in prop::sample::select(vec![0x0001_0106u32, 0x0101_0101, 0x0002_0216, 0xFC01_020D, 0xFC01_020C, 0x0001_0114, 0x0001_0107, 0x0001_0203, 0x0001_0204, 0x0001_010E, 0x0001_021B]),
            offset in prop::option::of(any::<u32>()), length in prop::option::of(any::<u32>()),
            info in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut message = request(message_type, oid, &info);
            if let Some(length) = length { message[16..20].copy_from_slice(&length.to_le_bytes()); }
            if let Some(offset) = offset { message[20..24].copy_from_slice(&offset.to_le_bytes()); }
            let mut adapter = initialized();
            let first = adapter.on_request(&message, &traits(), 1500);
            let state = adapter.clone();
            if message_type != number::HALT {
                let second = adapter.on_request(&message, &traits(), 1500);
                prop_assert_eq!(&first, &second);
                prop_assert_eq!(&adapter, &state);
            }
            if let Ok(Some(answer)) = first {
                prop_assert_eq!(answer.len() as u32, u32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]));
                prop_assert!(answer.len() < 512);
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            // The outcome is free; the absence of a panic is the property.
            initialized().on_request(&bytes, &traits(), 1500).ok();
        }
    }
}
