//! A guest's frame on its way out: what stands in the guest's memory, and what has to go before or instead of it.

use super::headers::{Headers, Network, checksum_field_offset, word_at, write_word};
use super::vnet::{FLAG_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, GSO_TCPV6, VnetHeader};
use crate::rndis::packet::{ChecksumRequest, FrameRequests, SegmentRequest, Transport};
use thiserror::Error;
use zerocopy::little_endian::U16;

/// The MAC addresses, behind which an 802.1Q tag goes.
const TAG_OFFSET: usize = 12;
const TAG_BYTES: usize = 4;
/// TPID of 802.1Q.
const TAG_TYPE: u16 = 0x8100;
/// CWR, which only the first segment of a frame keeps (RFC 3168 section 6.1.2).
pub const TCP_FLAG_CWR: u8 = 0x80;

/// Why a frame cannot be sent as asked.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameFault {
    #[error("checksum at {start}+{offset} of a frame of {bytes} bytes")]
    ChecksumOutside {
        start: usize,
        offset: usize,
        bytes: usize,
    },
    #[error("segmentation into pieces of 0 bytes")]
    EmptySegments,
    #[error("segmentation of a frame that is not TCP over IP, or whose headers are cut off or too long")]
    NotSegmentable,
    #[error("checksum of a frame that is not IP")]
    NotIp,
}

/// How to send a frame: `head` (filled by [`prepare`]) in place of its first `replaces` bytes, with this header to tell
/// the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prepared {
    pub vnet: VnetHeader,
    pub replaces: usize,
}

/// Decides from the first bytes of a frame (`window`, a private copy) and what the guest asks for. `head` is
/// overwritten.
pub fn prepare(
    window: &[u8],
    frame_bytes: usize,
    requests: &FrameRequests,
    head: &mut Vec<u8>,
) -> Result<Prepared, FrameFault> {
    head.clear();
    let mut prepared = Prepared::default();
    if let Some(request) = requests.segment {
        prepared = segment(window, frame_bytes, request, head)?;
    } else if let Some(request) = requests.checksum {
        prepared = checksum(window, frame_bytes, request, head)?;
    }
    if let Some(tag) = requests.vlan {
        insert_tag(window, tag, head, &mut prepared)?;
    }
    Ok(prepared)
}

/// Checksums of TCP and UDP: the guest has put the pseudo header's sum in place, so all that is needed is where.
fn checksum(
    window: &[u8],
    frame_bytes: usize,
    request: ChecksumRequest,
    head: &mut Vec<u8>,
) -> Result<Prepared, FrameFault> {
    let mut prepared = Prepared::default();
    if request.ip_header {
        let headers = Headers::parse(window).ok_or(FrameFault::NotIp)?;
        head.extend_from_slice(&window[..headers.transport_offset]);
        headers.write_ip_checksum(head);
        prepared.replaces = headers.transport_offset;
    }
    if let Some(transport) = request.transport {
        let start = match request.transport_offset {
            0 => Headers::parse(window).ok_or(FrameFault::NotIp)?.transport_offset,
            offset => usize::from(offset),
        };
        let offset = checksum_field_offset(transport);
        if start + offset + 2 > frame_bytes {
            return Err(FrameFault::ChecksumOutside {
                start,
                offset,
                bytes: frame_bytes,
            });
        }
        prepared.vnet.flags = FLAG_NEEDS_CSUM;
        prepared.vnet.csum_start = U16::new(start as u16);
        prepared.vnet.csum_offset = U16::new(offset as u16);
    }
    Ok(prepared)
}

/// The guest leaves IP's length and checksum 0 and the pseudo header without length (Linux 6.1 netvsc_drv.c
/// netvsc_xmit): all three are put right in a copy of the headers.
fn segment(
    window: &[u8],
    frame_bytes: usize,
    request: SegmentRequest,
    head: &mut Vec<u8>,
) -> Result<Prepared, FrameFault> {
    if request.segment_bytes == 0 {
        return Err(FrameFault::EmptySegments);
    }
    let headers = Headers::parse(window)
        .filter(|headers| headers.transport == Some(Transport::Tcp))
        .ok_or(FrameFault::NotSegmentable)?;
    let tcp_bytes = headers
        .tcp_header_bytes(window)
        .ok_or(FrameFault::NotSegmentable)?;
    let header_bytes = headers.transport_offset + tcp_bytes;
    if frame_bytes < header_bytes {
        return Err(FrameFault::NotSegmentable);
    }
    head.extend_from_slice(&window[..header_bytes]);
    headers.write_network_lengths(head, frame_bytes);
    let pseudo = headers.pseudo_header(head, frame_bytes - headers.transport_offset);
    let field = checksum_field_offset(Transport::Tcp);
    write_word(head, headers.transport_offset + field, pseudo.value());

    let mut vnet = VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        csum_start: U16::new(headers.transport_offset as u16),
        csum_offset: U16::new(field as u16),
        ..VnetHeader::default()
    };
    if frame_bytes - header_bytes > request.segment_bytes as usize {
        let has_cwr = window
            .get(headers.transport_offset + 13)
            .is_some_and(|flags| flags & TCP_FLAG_CWR != 0);
        vnet.gso_type = match headers.network {
            Network::V4 => GSO_TCPV4,
            Network::V6 => GSO_TCPV6,
        } | if has_cwr { GSO_ECN } else { 0 };
        // Below the frame's length, which is below 2^16.
        vnet.gso_size = U16::new(request.segment_bytes as u16);
        vnet.hdr_len = U16::new(header_bytes as u16);
    }
    Ok(Prepared {
        vnet,
        replaces: header_bytes,
    })
}

fn insert_tag(
    window: &[u8],
    tag: u16,
    head: &mut Vec<u8>,
    prepared: &mut Prepared,
) -> Result<(), FrameFault> {
    if prepared.replaces == 0 {
        head.extend_from_slice(window.get(..TAG_OFFSET).ok_or(FrameFault::NotIp)?);
        prepared.replaces = TAG_OFFSET;
    }
    let [type_high, type_low] = TAG_TYPE.to_be_bytes();
    let [tag_high, tag_low] = tag.to_be_bytes();
    head.splice(TAG_OFFSET..TAG_OFFSET, [type_high, type_low, tag_high, tag_low]);
    let vnet = &mut prepared.vnet;
    if vnet.flags & FLAG_NEEDS_CSUM != 0 {
        vnet.csum_start = U16::new(vnet.csum_start.get().saturating_add(TAG_BYTES as u16));
    }
    if vnet.hdr_len.get() != 0 {
        vnet.hdr_len = U16::new(vnet.hdr_len.get().saturating_add(TAG_BYTES as u16));
    }
    Ok(())
}

/// Completes the checksum that a header asks for, in a private copy of the whole frame.
pub fn complete_checksum(frame: &mut [u8], vnet: &VnetHeader) -> Result<(), FrameFault> {
    let (start, offset) = (
        usize::from(vnet.csum_start.get()),
        usize::from(vnet.csum_offset.get()),
    );
    let outside = FrameFault::ChecksumOutside {
        start,
        offset,
        bytes: frame.len(),
    };
    let part = frame.get(start..).ok_or(outside)?;
    if word_at(part, offset).is_none() {
        return Err(outside);
    }
    let mut checksum = super::checksum::Sum::default().add_bytes(part).finish();
    // A UDP checksum of 0 means "none" (RFC 768); for TCP both forms of zero are as good.
    if checksum == 0 {
        checksum = 0xFFFF;
    }
    write_word(frame, start + offset, checksum);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::headers::tests::{is_sound, tcp4, tcp6};
    use super::*;
    use proptest::prelude::*;

    fn assemble(frame: &[u8], prepared: &Prepared, head: &[u8]) -> Vec<u8> {
        [head, &frame[prepared.replaces..]].concat()
    }

    /// As a guest leaves it: only the pseudo header's sum in the checksum field.
    fn partial(frame: &mut [u8]) {
        let headers = Headers::parse(frame).expect("IP");
        let sum = headers
            .pseudo_header(frame, frame.len() - headers.transport_offset)
            .value();
        write_word(frame, headers.transport_offset + 16, sum);
    }

    const CHECKSUM: FrameRequests = FrameRequests {
        vlan: None,
        checksum: Some(ChecksumRequest {
            ip_header: false,
            transport: Some(Transport::Tcp),
            transport_offset: 34,
        }),
        segment: None,
    };

    #[test]
    fn a_plain_frame_goes_as_it_is() {
        let mut head = vec![1, 2, 3];
        let prepared = prepare(&tcp4(b"x"), 55, &FrameRequests::default(), &mut head).expect("fine");
        assert_eq!(prepared, Prepared::default());
        assert!(head.is_empty());
    }

    #[test]
    fn a_checksum_is_left_to_the_tap_and_can_be_completed_here() {
        let mut frame = tcp4(b"some data");
        let sound = frame.clone();
        partial(&mut frame);
        let mut head = Vec::new();
        let prepared = prepare(&frame, frame.len(), &CHECKSUM, &mut head).expect("fine");
        assert_eq!(
            (prepared.vnet.csum_start.get(), prepared.vnet.csum_offset.get()),
            (34, 16)
        );
        complete_checksum(&mut frame, &prepared.vnet).expect("inside");
        assert_eq!(frame, sound);
    }

    #[test]
    fn a_tag_is_inserted_and_moves_the_checksum() {
        let mut frame = tcp4(b"some data");
        partial(&mut frame);
        let mut head = Vec::new();
        let requests = FrameRequests {
            vlan: Some(0x2005),
            ..CHECKSUM
        };
        let prepared = prepare(&frame, frame.len(), &requests, &mut head).expect("fine");
        let mut tagged = assemble(&frame, &prepared, &head);
        assert_eq!(tagged[12..18], [0x81, 0, 0x20, 5, 8, 0]);
        assert_eq!(tagged.len(), frame.len() + 4);
        complete_checksum(&mut tagged, &prepared.vnet).expect("inside");
        assert!(is_sound(&tagged));
    }

    #[test]
    fn linux_segmentation_headers_are_completed() {
        for mut frame in [tcp4(&[7; 4000]), tcp6(&[7; 4000])] {
            let headers = Headers::parse(&frame).expect("IP");
            let length_at = headers.network_offset + if headers.network == Network::V4 { 2 } else { 4 };
            write_word(&mut frame, length_at, 0);
            write_word(&mut frame, headers.transport_offset + 16, 0x1111);
            let requests = FrameRequests {
                segment: Some(SegmentRequest {
                    segment_bytes: 1448,
                    transport_offset: 34,
                }),
                ..FrameRequests::default()
            };
            let mut head = Vec::new();
            let prepared = prepare(&frame[..128], frame.len(), &requests, &mut head).expect("fine");
            assert_eq!(prepared.vnet.gso_size.get(), 1448);
            assert_eq!(
                usize::from(prepared.vnet.hdr_len.get()),
                headers.transport_offset + 20
            );
            let mut whole = assemble(&frame, &prepared, &head);
            complete_checksum(&mut whole, &prepared.vnet).expect("inside");
            assert!(is_sound(&whole));
        }
    }

    #[test]
    fn a_frame_of_one_segment_is_not_segmented() {
        let requests = FrameRequests {
            segment: Some(SegmentRequest {
                segment_bytes: 1448,
                transport_offset: 34,
            }),
            ..FrameRequests::default()
        };
        let frame = tcp4(&[7; 1448]);
        let prepared = prepare(&frame, frame.len(), &requests, &mut Vec::new()).expect("fine");
        assert_eq!(prepared.vnet.gso_type, 0);
        assert_eq!(prepared.vnet.flags, FLAG_NEEDS_CSUM);
    }

    #[test]
    fn impossible_requests_are_faults() {
        let frame = tcp4(&[7; 100]);
        let mut head = Vec::new();
        let mut ask = |segment_bytes, frame: &[u8]| {
            let segment = Some(SegmentRequest {
                segment_bytes,
                transport_offset: 34,
            });
            prepare(
                frame,
                frame.len(),
                &FrameRequests {
                    segment,
                    ..FrameRequests::default()
                },
                &mut head,
            )
        };
        assert_eq!(ask(0, &frame), Err(FrameFault::EmptySegments));
        assert_eq!(ask(10, &[0; 100]), Err(FrameFault::NotSegmentable));
        assert_eq!(ask(10, &frame[..50]), Err(FrameFault::NotSegmentable));
        let outside = FrameRequests {
            checksum: Some(ChecksumRequest {
                ip_header: false,
                transport: Some(Transport::Tcp),
                transport_offset: 137,
            }),
            ..FrameRequests::default()
        };
        assert!(matches!(
            prepare(&frame, frame.len(), &outside, &mut Vec::new()),
            Err(FrameFault::ChecksumOutside { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_window_and_request_is_survived(mut frame in prop::collection::vec(any::<u8>(), 14..300), like_ip in 0usize..3,
            vlan in prop::option::of(any::<u16>()), transport_offset in 0u16..1024, ip_header in any::<bool>(), udp in prop::option::of(any::<bool>()),
            segment in prop::option::of(0u32..3000)) {
            if like_ip < 2 {
                let template = if like_ip == 0 { tcp4(&[]) } else { tcp6(&[]) };
                let shared = template.len().min(frame.len()).min(30);
                frame[..shared].copy_from_slice(&template[..shared]);
            }
            let transport = udp.map(|udp| if udp { Transport::Udp } else { Transport::Tcp });
            let requests = FrameRequests {
                vlan,
                checksum: Some(ChecksumRequest { ip_header, transport, transport_offset }),
                segment: segment.map(|segment_bytes| SegmentRequest { segment_bytes, transport_offset }),
            };
            let mut head = Vec::new();
            if let Ok(prepared) = prepare(&frame[..frame.len().min(212)], frame.len(), &requests, &mut head) {
                prop_assert!(prepared.replaces <= frame.len());
                let mut whole = assemble(&frame, &prepared, &head);
                prop_assert_eq!(whole.len(), frame.len() + if vlan.is_some() { 4 } else { 0 });
                if prepared.vnet.flags != 0 {
                    prop_assert!(complete_checksum(&mut whole, &prepared.vnet).is_ok());
                }
            }
        }
    }
}
