//! Where the headers of a frame are.

use super::checksum::Sum;
use crate::rndis::packet::Transport;

const ETHERNET_BYTES: usize = 14;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86DD;
/// 802.1Q and 802.1ad tags.
const TYPES_VLAN: [u16; 2] = [0x8100, 0x88A8];
/// Limit: tags before we stop looking; two is what 802.1ad allows.
const VLAN_TAGS_MAX: usize = 2;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// Extension headers of IPv6 that have the common form (RFC 8200 section 4): hop-by-hop, routing, destination.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// Limit: extension headers before we stop looking.
const EXTENSIONS_MAX: usize = 8;

pub const TCP_BYTES_MIN: usize = 20;
pub const UDP_BYTES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    V4,
    V6,
}

/// A frame with IP inside. All offsets from the frame's start, all inside the bytes that were parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    pub network: Network,
    pub network_offset: usize,
    /// Of the header after IP's.
    pub transport_offset: usize,
    /// Of a first fragment or an unfragmented packet only.
    pub transport: Option<Transport>,
}

impl Headers {
    /// `None`: not IP, or cut off.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let mut network_offset = ETHERNET_BYTES;
        let mut ether_type = word_at(frame, 12)?;
        for _ in 0..VLAN_TAGS_MAX {
            if !TYPES_VLAN.contains(&ether_type) {
                break;
            }
            ether_type = word_at(frame, network_offset + 2)?;
            network_offset += 4;
        }
        match ether_type {
            TYPE_IPV4 => parse_v4(frame, network_offset),
            TYPE_IPV6 => parse_v6(frame, network_offset),
            _ => None,
        }
    }

    /// Length of the TCP header, if it lies inside the frame.
    pub fn tcp_header_bytes(&self, frame: &[u8]) -> Option<usize> {
        let bytes = usize::from(frame.get(self.transport_offset + 12)? >> 4) * 4;
        (bytes >= TCP_BYTES_MIN && frame.len() >= self.transport_offset + bytes).then_some(bytes)
    }

    /// The sum over the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) for a transport part of this length.
    pub fn pseudo_header(&self, frame: &[u8], transport_bytes: usize) -> Sum {
        let addresses = match self.network {
            Network::V4 => self.network_offset + 12..self.network_offset + 20,
            Network::V6 => self.network_offset + 8..self.network_offset + 40,
        };
        let protocol = match self.transport {
            Some(Transport::Udp) => PROTOCOL_UDP,
            Some(Transport::Tcp) | None => PROTOCOL_TCP,
        };
        Sum::default()
            .add_bytes(frame.get(addresses).unwrap_or(&[]))
            .add_word(u16::from(protocol))
            .add_word((transport_bytes >> 16) as u16)
            .add_word(transport_bytes as u16)
    }

    /// The input of the RSS hash: addresses, then ports of TCP (NDIS documentation, "RSS hashing types"). Returns the
    /// bytes and how many of them count.
    pub fn flow(&self, frame: &[u8]) -> ([u8; 36], usize) {
        let addresses = match self.network {
            Network::V4 => self.network_offset + 12..self.network_offset + 20,
            Network::V6 => self.network_offset + 8..self.network_offset + 40,
        };
        let ports = match self.transport {
            Some(Transport::Tcp) => self.transport_offset..self.transport_offset + 4,
            Some(Transport::Udp) | None => 0..0,
        };
        let mut flow = [0u8; 36];
        let mut bytes = 0;
        for part in [frame.get(addresses), frame.get(ports)].into_iter().flatten() {
            flow[bytes..bytes + part.len()].copy_from_slice(part);
            bytes += part.len();
        }
        (flow, bytes)
    }

    /// Length of the transport part (header and data) according to the IP header, if the frame is that long.
    pub fn transport_bytes(&self, frame: &[u8]) -> Option<usize> {
        let end = match self.network {
            Network::V4 => self.network_offset + usize::from(word_at(frame, self.network_offset + 2)?),
            Network::V6 => self.network_offset + 40 + usize::from(word_at(frame, self.network_offset + 4)?),
        };
        if end > frame.len() {
            return None;
        }
        end.checked_sub(self.transport_offset)
    }

    /// Writes the length fields of IP for a frame that ends where `frame` ends, and IPv4's checksum.
    pub fn write_network_lengths(&self, frame_head: &mut [u8], frame_bytes: usize) {
        let packet_bytes = frame_bytes - self.network_offset;
        match self.network {
            Network::V4 => {
                write_word(frame_head, self.network_offset + 2, packet_bytes as u16);
                self.write_ip_checksum(frame_head);
            }
            Network::V6 => write_word(frame_head, self.network_offset + 4, (packet_bytes - 40) as u16),
        }
    }

    /// IPv4's header checksum; nothing for IPv6.
    pub fn write_ip_checksum(&self, frame_head: &mut [u8]) {
        if self.network == Network::V4 {
            write_word(frame_head, self.network_offset + 10, 0);
            let header = frame_head
                .get(self.network_offset..self.transport_offset)
                .unwrap_or(&[]);
            let checksum = Sum::default().add_bytes(header).finish();
            write_word(frame_head, self.network_offset + 10, checksum);
        }
    }
}

/// Where the checksum stands in a transport header.
pub fn checksum_field_offset(transport: Transport) -> usize {
    match transport {
        Transport::Tcp => 16,
        Transport::Udp => 6,
    }
}

fn parse_v4(frame: &[u8], network_offset: usize) -> Option<Headers> {
    let first = *frame.get(network_offset)?;
    let header_bytes = usize::from(first & 0xF) * 4;
    if first >> 4 != 4 || header_bytes < 20 || frame.len() < network_offset + header_bytes {
        return None;
    }
    let fragment_offset = word_at(frame, network_offset + 6)? & 0x1FFF;
    let more_fragments = word_at(frame, network_offset + 6)? & 0x2000 != 0;
    let transport_offset = network_offset + header_bytes;
    let protocol = *frame.get(network_offset + 9)?;
    let whole = fragment_offset == 0 && !more_fragments;
    Some(Headers {
        network: Network::V4,
        network_offset,
        transport_offset,
        transport: if whole {
            transport_of(protocol, frame, transport_offset)
        } else {
            None
        },
    })
}

fn parse_v6(frame: &[u8], network_offset: usize) -> Option<Headers> {
    if *frame.get(network_offset)? >> 4 != 6 || frame.len() < network_offset + 40 {
        return None;
    }
    let mut next = *frame.get(network_offset + 6)?;
    let mut transport_offset = network_offset + 40;
    for _ in 0..EXTENSIONS_MAX {
        if !EXTENSIONS.contains(&next) {
            break;
        }
        let following = *frame.get(transport_offset)?;
        let bytes = (usize::from(*frame.get(transport_offset + 1)?) + 1) * 8;
        transport_offset += bytes;
        next = following;
    }
    if frame.len() < transport_offset {
        return None;
    }
    Some(Headers {
        network: Network::V6,
        network_offset,
        transport_offset,
        transport: transport_of(next, frame, transport_offset),
    })
}

fn transport_of(protocol: u8, frame: &[u8], offset: usize) -> Option<Transport> {
    match protocol {
        PROTOCOL_TCP if frame.len() >= offset + TCP_BYTES_MIN => Some(Transport::Tcp),
        PROTOCOL_UDP if frame.len() >= offset + UDP_BYTES => Some(Transport::Udp),
        _ => None,
    }
}

pub fn word_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|word| u16::from_be_bytes(*word))
}

/// Writes a word where there is room for it.
pub fn write_word(bytes: &mut [u8], offset: usize, word: u16) {
    if let Some(place) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *place = word.to_be_bytes();
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An IPv4 TCP frame with correct lengths and checksums, `payload` behind 20 bytes of TCP header.
    pub fn tcp4(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 8, 0];
        let total = 40 + payload.len();
        frame.extend_from_slice(&[0x45, 0]);
        frame.extend_from_slice(&(total as u16).to_be_bytes());
        frame.extend_from_slice(&[0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend_from_slice(&[
            0x30, 0x39, 0, 80, 0, 0, 0x10, 0, 0, 0, 0, 9, 0x50, 0x18, 0xFF, 0xFF, 0, 0, 0, 0,
        ]);
        frame.extend_from_slice(payload);
        complete(&mut frame);
        frame
    }

    pub fn tcp6(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![
            0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 0x86, 0xDD, 0x60, 0, 0, 0,
        ];
        frame.extend_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
        frame.extend_from_slice(&[6, 64]);
        frame.extend_from_slice(&[0xFD; 32]);
        frame.extend_from_slice(&[
            0x30, 0x39, 0, 80, 0, 0, 0x10, 0, 0, 0, 0, 9, 0x50, 0x18, 0xFF, 0xFF, 0, 0, 0, 0,
        ]);
        frame.extend_from_slice(payload);
        complete(&mut frame);
        frame
    }

    pub fn complete(frame: &mut [u8]) {
        let headers = Headers::parse(frame).expect("IP");
        headers.write_ip_checksum(frame);
        let field = headers.transport_offset + checksum_field_offset(headers.transport.expect("TCP or UDP"));
        write_word(frame, field, 0);
        let bytes = frame.len() - headers.transport_offset;
        let checksum = headers
            .pseudo_header(frame, bytes)
            .add_bytes(&frame[headers.transport_offset..])
            .finish();
        write_word(frame, field, checksum);
    }

    /// Both checksums of a TCP or UDP frame are right.
    pub fn is_sound(frame: &[u8]) -> bool {
        let Some(headers) = Headers::parse(frame) else {
            return false;
        };
        let ip = headers.network == Network::V6
            || Sum::default()
                .add_bytes(&frame[headers.network_offset..headers.transport_offset])
                .finish()
                == 0;
        let Some(bytes) = headers.transport_bytes(frame) else {
            return false;
        };
        let part = &frame[headers.transport_offset..headers.transport_offset + bytes];
        ip && headers.pseudo_header(frame, bytes).add_bytes(part).finish() == 0
    }

    #[test]
    fn a_plain_tcp_frame_has_its_headers_at_14_and_34() {
        let headers = Headers::parse(&tcp4(b"hello")).expect("IP");
        assert_eq!((headers.network_offset, headers.transport_offset), (14, 34));
        assert_eq!(headers.transport, Some(Transport::Tcp));
        assert_eq!(headers.transport_bytes(&tcp4(b"hello")), Some(25));
        assert!(is_sound(&tcp4(b"hello")) && is_sound(&tcp6(b"hello!")));
    }

    #[test]
    fn a_vlan_tag_moves_everything_by_four() {
        let mut frame = tcp4(b"");
        frame.splice(12..12, [0x81, 0, 0, 5]);
        let headers = Headers::parse(&frame).expect("IP");
        assert_eq!((headers.network_offset, headers.transport_offset), (18, 38));
    }

    #[test]
    fn a_later_fragment_has_no_transport_header() {
        let mut frame = tcp4(&[0; 40]);
        frame[20..22].copy_from_slice(&[0, 5]);
        assert_eq!(Headers::parse(&frame).expect("IP").transport, None);
    }

    proptest! {
        #[test]
        fn offsets_of_any_frame_lie_inside_it(mut frame in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..4) {
            let types: [[u8; 2]; 4] = [[8, 0], [0x86, 0xDD], [0x81, 0], [1, 2]];
            if frame.len() > 15 {
                frame[12..14].copy_from_slice(&types[kind]);
                frame[14] = if kind == 0 { 0x45 } else { 0x60 };
            }
            if let Some(headers) = Headers::parse(&frame) {
                prop_assert!(headers.network_offset < headers.transport_offset);
                prop_assert!(headers.transport_offset <= frame.len());
                if let Some(bytes) = headers.transport_bytes(&frame) {
                    prop_assert!(headers.transport_offset + bytes <= frame.len());
                }
                headers.write_ip_checksum(&mut frame);
            }
        }
    }
}
