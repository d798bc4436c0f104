//! PACKET messages: one Ethernet frame each, with per-packet information.
//!
//! On the way out the guest may change its memory while we look: the first [`WINDOW_BYTES`] of a message are copied
//! once, and everything that decides anything is read from the copy. On the way in we build the header in private
//! memory and copy it in front of the frame before the packet is published.
//!
//! Quirk(Linux 6.1 netvsc): a malformed element in our per-packet information makes the guest loop for ever in its
//! softirq.

use super::wire::{HEADER_BYTES, MessageHeader, PacketBody, PerPacketInfo, RndisFault, number};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a message that are copied to be parsed: header (44), the information that Linux sends (at most 64), and
/// the frame's own headers up to TCP's with options (14 + 4 + 40 + 60).
pub const WINDOW_BYTES: usize = 256;
/// Limit: Ethernet header; below, there is nothing to send.
const FRAME_BYTES_MIN: u32 = 14;
/// Header and fixed body of a PACKET.
pub const PACKET_HEADER_BYTES: usize = HEADER_BYTES + size_of::<PacketBody>();
/// Longest header that we put before a frame: PACKET and one checksum element.
pub const TO_GUEST_HEADER_BYTES_MAX: usize = PACKET_HEADER_BYTES + INFO_WORD_BYTES;
/// An element whose data is one u32.
const INFO_WORD_BYTES: usize = size_of::<PerPacketInfo>() + 4;

/// Kinds of per-packet information (`enum rndis_per_pkt_info_interal_type`, `TCPIP_CHKSUM_PKTINFO` ff.).
pub mod info {
    pub const CHECKSUM: u32 = 0;
    pub const LARGE_SEND: u32 = 2;
    pub const VLAN: u32 = 6;
}

/// Checksums that the guest leaves to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChecksumRequest {
    pub ip_header: bool,
    pub transport: Option<Transport>,
    /// From the start of the frame as the guest sent it; 0 if the guest does not say.
    pub transport_offset: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

/// A TCP frame that is to be cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRequest {
    pub segment_bytes: u32,
    pub transport_offset: u16,
}

/// What a PACKET asks for besides sending its frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameRequests {
    /// Tag control information of an 802.1Q tag that is not in the frame.
    pub vlan: Option<u16>,
    pub checksum: Option<ChecksumRequest>,
    pub segment: Option<SegmentRequest>,
}

/// One PACKET of the guest, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutgoingPacket {
    /// Length of the whole message: where the next begins.
    pub message_bytes: usize,
    /// The frame's place, from the start of the message.
    pub frame_offset: usize,
    pub frame_bytes: usize,
    pub requests: FrameRequests,
}

impl OutgoingPacket {
    /// Reads a message from its window; `available` bytes of guest memory belong to it and those behind it.
    pub fn parse(window: &[u8], available: usize) -> Result<Self, RndisFault> {
        let short = RndisFault::MessageTooShort {
            bytes: available,
            wanted: PACKET_HEADER_BYTES,
        };
        let (header, rest) = MessageHeader::read_from_prefix(window).map_err(|_| short)?;
        if header.message_type.get() != number::PACKET {
            return Err(RndisFault::UnexpectedType(header.message_type.get()));
        }
        let (body, _) = PacketBody::read_from_prefix(rest).map_err(|_| short)?;
        let claimed = header.message_length.get();
        let message_bytes = claimed as usize;
        if message_bytes > available {
            return Err(RndisFault::MessageOverrun {
                claimed,
                bytes: available,
            });
        }
        if message_bytes < PACKET_HEADER_BYTES {
            return Err(RndisFault::MessageTooShort {
                bytes: message_bytes,
                wanted: PACKET_HEADER_BYTES,
            });
        }
        let body_bytes = message_bytes - HEADER_BYTES;
        let (offset, length) = (body.data_offset.get(), body.data_length.get());
        let outside = RndisFault::FrameOutside { offset, length };
        let end = (offset as usize).checked_add(length as usize).ok_or(outside)?;
        if end > body_bytes {
            return Err(outside);
        }
        if !(FRAME_BYTES_MIN..=u32::from(u16::MAX)).contains(&length) {
            return Err(RndisFault::FrameSize(length));
        }
        let requests = parse_info(
            &window[..window.len().min(message_bytes)],
            body.per_packet_info_offset.get(),
            body.per_packet_info_length.get(),
        )?;
        Ok(Self {
            message_bytes,
            frame_offset: HEADER_BYTES + offset as usize,
            frame_bytes: length as usize,
            requests,
        })
    }
}

fn parse_info(message: &[u8], offset: u32, length: u32) -> Result<FrameRequests, RndisFault> {
    let mut requests = FrameRequests::default();
    if length == 0 {
        return Ok(requests);
    }
    let outside = RndisFault::PacketInfoOutside { offset, length };
    let start = (offset as usize).checked_add(HEADER_BYTES).ok_or(outside)?;
    let end = start.checked_add(length as usize).ok_or(outside)?;
    if start < PACKET_HEADER_BYTES {
        return Err(outside);
    }
    let mut elements = message.get(start..end).ok_or(outside)?;
    while !elements.is_empty() {
        let malformed = RndisFault::PacketInfoMalformed {
            size: elements.len() as u32,
            offset: 0,
        };
        let (element, _) = PerPacketInfo::read_from_prefix(elements).map_err(|_| malformed)?;
        let (size, data_offset) = (element.size.get(), element.offset.get());
        let malformed = RndisFault::PacketInfoMalformed {
            size,
            offset: data_offset,
        };
        let (this, next) = elements.split_at_checked(size as usize).ok_or(malformed)?;
        if this.len() < size_of::<PerPacketInfo>() {
            return Err(malformed);
        }
        let word = || {
            let data = this
                .get(data_offset as usize..)
                .and_then(|data| data.first_chunk());
            data.map(|bytes| u32::from_le_bytes(*bytes)).ok_or(malformed)
        };
        match element.kind.get() {
            info::CHECKSUM => requests.checksum = Some(checksum_request(word()?)),
            info::LARGE_SEND => requests.segment = Some(segment_request(word()?)),
            info::VLAN => requests.vlan = Some(tag_control(word()?)),
            // Hints (hash value and the like) change nothing.
            _ => {}
        }
        elements = next;
    }
    Ok(requests)
}

/// `struct ndis_tcp_ip_checksum_info`, transmit form.
fn checksum_request(word: u32) -> ChecksumRequest {
    let transport = match (word & 4 != 0, word & 8 != 0) {
        (true, _) => Some(Transport::Tcp),
        (false, true) => Some(Transport::Udp),
        (false, false) => None,
    };
    ChecksumRequest {
        ip_header: word & 0x10 != 0,
        transport,
        transport_offset: ((word >> 16) & 0x3FF) as u16,
    }
}

/// `struct ndis_tcp_lso_info`; v1 and v2 have the two fields in the same places.
fn segment_request(word: u32) -> SegmentRequest {
    SegmentRequest {
        segment_bytes: word & 0xF_FFFF,
        transport_offset: ((word >> 20) & 0x3FF) as u16,
    }
}

/// `struct ndis_pkt_8021q_info` to the tag as it stands in a frame: priority, CFI, VLAN id from the top.
fn tag_control(word: u32) -> u16 {
    let (priority, canonical, id) = (word & 7, (word >> 3) & 1, (word >> 4) & 0xFFF);
    ((priority << 13) | (canonical << 12) | id) as u16
}

/// What we vouch for in a frame to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    pub transport: Option<Transport>,
    /// The IPv4 header's own checksum.
    pub ip_header: bool,
}

impl Verified {
    /// `struct ndis_tcp_ip_checksum_info`, receive form: bit 3 TCP ok, 4 UDP ok, 5 IP ok.
    fn word(self) -> u32 {
        let transport = match self.transport {
            None => 0,
            Some(Transport::Tcp) => 1 << 3,
            Some(Transport::Udp) => 1 << 4,
        };
        transport | (u32::from(self.ip_header) << 5)
    }
}

/// The header that goes before a frame in its sub-allocation. Returns the bytes and how many of them count.
pub fn emit_header(frame_bytes: usize, verified: Verified) -> ([u8; TO_GUEST_HEADER_BYTES_MAX], usize) {
    let word = verified.word();
    let info_bytes = if word == 0 { 0 } else { INFO_WORD_BYTES };
    let header_bytes = PACKET_HEADER_BYTES + info_bytes;
    let mut bytes = [0u8; TO_GUEST_HEADER_BYTES_MAX];
    let header = MessageHeader {
        message_type: U32::new(number::PACKET),
        message_length: U32::new((header_bytes + frame_bytes) as u32),
    };
    let body = PacketBody {
        data_offset: U32::new((header_bytes - HEADER_BYTES) as u32),
        data_length: U32::new(frame_bytes as u32),
        oob_data_offset: U32::ZERO,
        oob_data_length: U32::ZERO,
        num_oob_data_elements: U32::ZERO,
        // Quirk(Linux 6.1 netvsc): without information both words must be 0.
        per_packet_info_offset: U32::new(if info_bytes == 0 {
            0
        } else {
            size_of::<PacketBody>() as u32
        }),
        per_packet_info_length: U32::new(info_bytes as u32),
        vc_handle: U32::ZERO,
        reserved: U32::ZERO,
    };
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    bytes[HEADER_BYTES..PACKET_HEADER_BYTES].copy_from_slice(body.as_bytes());
    if info_bytes != 0 {
        let element = info_word(info::CHECKSUM, word);
        bytes[PACKET_HEADER_BYTES..].copy_from_slice(&element);
    }
    (bytes, header_bytes)
}

fn info_word(kind: u32, word: u32) -> [u8; INFO_WORD_BYTES] {
    let element = PerPacketInfo {
        size: U32::new(INFO_WORD_BYTES as u32),
        kind: U32::new(kind),
        offset: U32::new(size_of::<PerPacketInfo>() as u32),
    };
    let mut bytes = [0u8; INFO_WORD_BYTES];
    bytes[..12].copy_from_slice(element.as_bytes());
    bytes[12..].copy_from_slice(&word.to_le_bytes());
    bytes
}

/// What a guest writes before its frame: VLAN first, then segmentation or checksum, as Linux orders them.
pub fn emit_guest_header(frame_bytes: usize, requests: &FrameRequests) -> Vec<u8> {
    let mut elements = Vec::new();
    if let Some(tag) = requests.vlan {
        let tag = u32::from(tag);
        let word = (tag >> 13) | ((tag >> 12) & 1) << 3 | (tag & 0xFFF) << 4;
        elements.extend_from_slice(&info_word(info::VLAN, word));
    }
    if let Some(segment) = requests.segment {
        let word = segment.segment_bytes & 0xF_FFFF | u32::from(segment.transport_offset) << 20 | 1 << 30;
        elements.extend_from_slice(&info_word(info::LARGE_SEND, word));
    }
    if let Some(checksum) = requests.checksum {
        let kind = match checksum.transport {
            None => 0,
            Some(Transport::Tcp) => 4,
            Some(Transport::Udp) => 8,
        };
        let word = kind | u32::from(checksum.ip_header) << 4 | u32::from(checksum.transport_offset) << 16;
        elements.extend_from_slice(&info_word(info::CHECKSUM, word));
    }
    let body_bytes = size_of::<PacketBody>();
    let body = PacketBody {
        data_offset: U32::new((body_bytes + elements.len()) as u32),
        data_length: U32::new(frame_bytes as u32),
        oob_data_offset: U32::ZERO,
        oob_data_length: U32::ZERO,
        num_oob_data_elements: U32::ZERO,
        per_packet_info_offset: U32::new(if elements.is_empty() { 0 } else { body_bytes as u32 }),
        per_packet_info_length: U32::new(elements.len() as u32),
        vc_handle: U32::ZERO,
        reserved: U32::ZERO,
    };
    let header = MessageHeader {
        message_type: U32::new(number::PACKET),
        message_length: U32::new((PACKET_HEADER_BYTES + elements.len() + frame_bytes) as u32),
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body.as_bytes());
    bytes.extend_from_slice(&elements);
    bytes
}

/// A guest's view of a message of ours: the frame's place and what is vouched for. `None` if Linux would drop it.
pub fn parse_to_guest(message: &[u8]) -> Option<(std::ops::Range<usize>, u32)> {
    let (header, rest) = MessageHeader::read_from_prefix(message).ok()?;
    let (body, _) = PacketBody::read_from_prefix(rest).ok()?;
    if header.message_type.get() != number::PACKET || header.message_length.get() as usize > message.len() {
        return None;
    }
    let start = HEADER_BYTES.checked_add(body.data_offset.get() as usize)?;
    let end = start.checked_add(body.data_length.get() as usize)?;
    if end > header.message_length.get() as usize {
        return None;
    }
    let word = match body.per_packet_info_length.get() as usize {
        0 => 0,
        length => {
            let offset = HEADER_BYTES.checked_add(body.per_packet_info_offset.get() as usize)?;
            let element = message.get(offset..offset.checked_add(length)?)?;
            u32::from_le_bytes(*element.get(12..)?.first_chunk()?)
        }
    };
    Some((start..end, word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(requests: &FrameRequests, frame: &[u8]) -> Vec<u8> {
        let mut bytes = emit_guest_header(frame.len(), requests);
        bytes.extend_from_slice(frame);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<OutgoingPacket, RndisFault> {
        OutgoingPacket::parse(&bytes[..bytes.len().min(WINDOW_BYTES)], bytes.len())
    }

    fn rich() -> FrameRequests {
        FrameRequests {
            vlan: Some(0xA123),
            checksum: Some(ChecksumRequest {
                ip_header: false,
                transport: Some(Transport::Tcp),
                transport_offset: 34,
            }),
            segment: Some(SegmentRequest {
                segment_bytes: 1448,
                transport_offset: 34,
            }),
        }
    }

    #[test]
    fn the_frame_is_found_behind_the_information() {
        let bytes = message(&rich(), &[7; 60]);
        let packet = parse(&bytes).expect("well-formed");
        assert_eq!(packet.requests, rich());
        assert_eq!(packet.message_bytes, 44 + 3 * 16 + 60);
        assert_eq!(packet.frame_offset, 44 + 3 * 16);
        assert_eq!(packet.frame_bytes, 60);
    }

    #[test]
    fn linux_checksum_words_are_understood() {
        // is_ipv4, tcp_checksum, header offset 34.
        assert_eq!(
            checksum_request(1 | 4 | 34 << 16),
            ChecksumRequest {
                ip_header: false,
                transport: Some(Transport::Tcp),
                transport_offset: 34
            }
        );
        assert_eq!(tag_control(5 | 1 << 3 | 0x123 << 4), 0xB123);
    }

    #[test]
    fn a_header_without_vouching_has_no_information_at_all() {
        let (bytes, length) = emit_header(60, Verified::default());
        assert_eq!(length, 44);
        let words: Vec<u32> = bytes[..44]
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        assert_eq!(words, [1, 104, 36, 60, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_vouched_frame_carries_one_element_of_sixteen_bytes() {
        let (bytes, length) = emit_header(
            100,
            Verified {
                transport: Some(Transport::Tcp),
                ip_header: true,
            },
        );
        assert_eq!(length, 60);
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        assert_eq!(words, [1, 160, 52, 100, 0, 0, 0, 36, 16, 0, 0, 16, 0, 12, 0x28]);
    }

    #[test]
    fn element_loops_and_overruns_are_faults() {
        let good = message(&rich(), &[0; 60]);
        for (offset, value) in [
            (44usize, 0u32),
            (44, 11),
            (44, 49),
            (52, 16),
            (52, 13),
            (52, u32::MAX),
        ] {
            let mut bytes = good.clone();
            bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
            assert!(
                matches!(parse(&bytes), Err(RndisFault::PacketInfoMalformed { .. })),
                "{offset} {value}: {:?}",
                parse(&bytes)
            );
        }
    }

    #[test]
    fn frames_outside_their_message_or_without_header_are_faults() {
        let good = message(&FrameRequests::default(), &[0; 60]);
        for (offset, value, name) in [
            (8usize, 37u32, "offset"),
            (12, 61, "length"),
            (12, 13, "runt"),
            (4, 105, "message"),
            (4, 43, "short"),
        ] {
            let mut bytes = good.clone();
            bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
            assert!(parse(&bytes).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_lies_inside(mut bytes in prop::collection::vec(any::<u8>(), 0..400),
                                       patches in prop::collection::vec((0usize..24, 0u32..300), 0..12)) {
            for (word, value) in patches {
                if let Some(place) = bytes.get_mut(word * 4..word * 4 + 4) {
                    place.copy_from_slice(&value.to_le_bytes());
                }
            }
            if bytes.len() >= 4 { bytes[..4].copy_from_slice(&[1, 0, 0, 0]); }
            if let Ok(packet) = parse(&bytes) {
                prop_assert!(packet.message_bytes >= PACKET_HEADER_BYTES);
                prop_assert!(packet.message_bytes <= bytes.len());
                prop_assert!(packet.frame_offset + packet.frame_bytes <= packet.message_bytes);
            }
        }

        #[test]
        fn requests_round_trip(vlan in prop::option::of(any::<u16>()), mss in prop::option::of(0u32..1 << 20), offset in 0u16..1024) {
            let requests = FrameRequests {
                vlan,
                checksum: None,
                segment: mss.map(|segment_bytes| SegmentRequest { segment_bytes, transport_offset: offset }),
            };
            prop_assert_eq!(parse(&message(&requests, &[0; 64])).map(|packet| packet.requests), Ok(requests));
        }
    }
}
