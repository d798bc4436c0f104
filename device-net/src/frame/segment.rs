//! A frame with the header that a TAP gives it, turned into frames that a guest (or a plain link) takes as they are:
//! checksums complete, none longer than the link allows.

use super::headers::{Headers, Network, checksum_field_offset, word_at, write_word};
use super::outgoing::{FrameFault, TCP_FLAG_CWR, complete_checksum};
use super::vnet::{FLAG_DATA_VALID, FLAG_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VnetHeader};
use crate::rndis::packet::{Transport, Verified};

const TCP_FLAG_FIN: u8 = 0x01;
const TCP_FLAG_PSH: u8 = 0x08;

/// The frames that come out of one.
pub struct Pieces<'a> {
    frame: &'a [u8],
    verified: Verified,
    plan: Plan,
}

enum Plan {
    Whole,
    Done,
    Segments {
        headers: Headers,
        header_bytes: usize,
        segment_bytes: usize,
        next: usize,
        index: u16,
    },
}

/// One frame: a head of our making (in the caller's buffer), then bytes of the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub rest: &'a [u8],
    pub verified: Verified,
}

/// Looks at a private copy of a frame; completes its checksum in place if it is one frame.
pub fn pieces<'a>(frame: &'a mut [u8], vnet: &VnetHeader) -> Result<Pieces<'a>, FrameFault> {
    let headers = Headers::parse(frame);
    let transport = headers.and_then(|headers| headers.transport);
    if vnet.gso_type == GSO_NONE {
        let mut verified = Verified::default();
        if vnet.flags & FLAG_NEEDS_CSUM != 0 {
            complete_checksum(frame, vnet)?;
            // Only what the header asked for is known to be right now.
            let start = usize::from(vnet.csum_start.get());
            verified.transport =
                transport.filter(|_| headers.is_some_and(|headers| headers.transport_offset == start));
        } else if vnet.flags & FLAG_DATA_VALID != 0 {
            verified.transport = transport;
        }
        return Ok(Pieces {
            frame,
            verified,
            plan: Plan::Whole,
        });
    }
    if !matches!(vnet.gso_type & !GSO_ECN, GSO_TCPV4 | GSO_TCPV6) {
        return Err(FrameFault::NotSegmentable);
    }
    let headers = headers
        .filter(|_| transport == Some(Transport::Tcp))
        .ok_or(FrameFault::NotSegmentable)?;
    let header_bytes = headers.transport_offset
        + headers
            .tcp_header_bytes(frame)
            .ok_or(FrameFault::NotSegmentable)?;
    let segment_bytes = usize::from(vnet.gso_size.get());
    if segment_bytes == 0 {
        return Err(FrameFault::EmptySegments);
    }
    if frame.len() > usize::from(u16::MAX) {
        return Err(FrameFault::NotSegmentable);
    }
    let verified = Verified {
        transport: Some(Transport::Tcp),
        ip_header: headers.network == Network::V4,
    };
    let plan = Plan::Segments {
        headers,
        header_bytes,
        segment_bytes,
        next: header_bytes,
        index: 0,
    };
    Ok(Pieces {
        frame,
        verified,
        plan,
    })
}

impl<'a> Pieces<'a> {
    /// How many frames are left.
    pub fn remaining(&self) -> usize {
        match &self.plan {
            Plan::Whole => 1,
            Plan::Done => 0,
            Plan::Segments {
                segment_bytes, next, ..
            } => (self.frame.len() - next).div_ceil(*segment_bytes).max(1),
        }
    }

    /// The next frame; its head is put into `head`, which is overwritten.
    pub fn next(&mut self, head: &mut Vec<u8>) -> Option<Piece<'a>> {
        head.clear();
        let frame = self.frame;
        let verified = self.verified;
        match &mut self.plan {
            Plan::Done => None,
            Plan::Whole => {
                self.plan = Plan::Done;
                Some(Piece {
                    rest: frame,
                    verified,
                })
            }
            Plan::Segments {
                headers,
                header_bytes,
                segment_bytes,
                next,
                index,
            } => {
                let end = (*next + *segment_bytes).min(frame.len());
                let payload = &frame[*next..end];
                let is_last = end == frame.len();
                head.extend_from_slice(&frame[..*header_bytes]);
                write_headers(
                    head,
                    headers,
                    *header_bytes,
                    *next - *header_bytes,
                    *index,
                    is_last,
                    payload,
                );
                *next = end;
                *index = index.wrapping_add(1);
                if is_last {
                    self.plan = Plan::Done;
                }
                Some(Piece {
                    rest: payload,
                    verified,
                })
            }
        }
    }
}

/// What distinguishes segment `index` from the original's headers.
fn write_headers(
    head: &mut [u8],
    headers: &Headers,
    header_bytes: usize,
    payload_offset: usize,
    index: u16,
    is_last: bool,
    payload: &[u8],
) {
    if headers.network == Network::V4 {
        let at = headers.network_offset + 4;
        let identification = word_at(head, at).unwrap_or(0).wrapping_add(index);
        write_word(head, at, identification);
    }
    headers.write_network_lengths(head, header_bytes + payload.len());
    let tcp = headers.transport_offset;
    let sequence = match head.get(tcp + 4..).and_then(|rest| rest.first_chunk()) {
        Some(bytes) => u32::from_be_bytes(*bytes).wrapping_add(payload_offset as u32),
        None => return,
    };
    write_word(head, tcp + 4, (sequence >> 16) as u16);
    write_word(head, tcp + 6, sequence as u16);
    if let Some(flags) = head.get_mut(tcp + 13) {
        if !is_last {
            *flags &= !(TCP_FLAG_FIN | TCP_FLAG_PSH);
        }
        if index != 0 {
            *flags &= !TCP_FLAG_CWR;
        }
    }
    let field = tcp + checksum_field_offset(Transport::Tcp);
    write_word(head, field, 0);
    // The TCP header's length is a multiple of 4, so the sum may be taken in two pieces.
    let checksum = headers
        .pseudo_header(head, header_bytes - tcp + payload.len())
        .add_bytes(&head[tcp..header_bytes])
        .add_bytes(payload)
        .finish();
    write_word(head, field, checksum);
}

#[cfg(test)]
mod tests {
    use super::super::headers::tests::{is_sound, tcp4, tcp6};
    use super::*;
    use proptest::prelude::*;
    use zerocopy::little_endian::U16;

    fn all(frame: &mut [u8], vnet: &VnetHeader) -> Vec<(Vec<u8>, Verified)> {
        let mut pieces = pieces(frame, vnet).expect("segmentable");
        let mut head = Vec::new();
        let mut frames = Vec::new();
        while let Some(piece) = pieces.next(&mut head) {
            frames.push(([&head[..], piece.rest].concat(), piece.verified));
        }
        frames
    }

    fn large(gso_type: u8, size: u16) -> VnetHeader {
        VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type,
            gso_size: U16::new(size),
            ..VnetHeader::default()
        }
    }

    #[test]
    fn segments_are_sound_and_their_data_are_the_original() {
        let data: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        for (mut frame, gso, header) in [(tcp4(&data), GSO_TCPV4, 54), (tcp6(&data), GSO_TCPV6, 74)] {
            let frames = all(&mut frame, &large(gso, 1448));
            assert_eq!(frames.len(), 4);
            let mut rejoined = Vec::new();
            for (index, (frame, verified)) in frames.iter().enumerate() {
                assert!(is_sound(frame), "segment {index}");
                assert_eq!(verified.transport, Some(Transport::Tcp));
                assert!(frame.len() <= header + 1448);
                let sequence = u32::from_be_bytes([
                    frame[header - 16],
                    frame[header - 15],
                    frame[header - 14],
                    frame[header - 13],
                ]);
                assert_eq!(sequence as usize, 0x1000 + rejoined.len());
                assert_eq!(frame[header - 7] & TCP_FLAG_PSH != 0, index == 3);
                rejoined.extend_from_slice(&frame[header..]);
            }
            assert_eq!(rejoined, data);
        }
    }

    #[test]
    fn a_verified_frame_passes_unchanged() {
        let mut frame = tcp4(b"data");
        let original = frame.clone();
        let vnet = VnetHeader {
            flags: FLAG_DATA_VALID,
            ..VnetHeader::default()
        };
        let frames = all(&mut frame, &vnet);
        assert_eq!(
            frames,
            [(
                original,
                Verified {
                    transport: Some(Transport::Tcp),
                    ip_header: false
                }
            )]
        );
    }

    #[test]
    fn an_unknown_frame_is_vouched_for_by_nobody() {
        let mut frame = vec![0xFFu8; 60];
        let frames = all(&mut frame, &VnetHeader::default());
        assert_eq!(frames, [(vec![0xFF; 60], Verified::default())]);
    }

    #[test]
    fn udp_fragmentation_and_zero_sizes_are_refused() {
        assert!(pieces(&mut tcp4(&[0; 3000]), &large(3, 1000)).is_err());
        assert!(pieces(&mut tcp4(&[0; 3000]), &large(GSO_TCPV4, 0)).is_err());
        assert!(pieces(&mut [0; 60], &large(GSO_TCPV4, 100)).is_err());
    }

    proptest! {
        #[test]
        fn any_length_and_size_rejoins(length in 0usize..9000, size in 1u16..3000) {
            let data: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
            let mut frame = tcp4(&data);
            let expected = { pieces(&mut frame.clone(), &large(GSO_TCPV4, size)).expect("fine").remaining() };
            let frames = all(&mut frame, &large(GSO_TCPV4, size));
            prop_assert_eq!(frames.len(), expected);
            prop_assert!(frames.iter().all(|(frame, _)| is_sound(frame)));
            let rejoined: Vec<u8> = frames.iter().flat_map(|(frame, _)| frame[54..].to_vec()).collect();
            prop_assert_eq!(rejoined, data);
        }

        #[test]
        fn any_header_over_any_bytes_is_survived(mut frame in prop::collection::vec(any::<u8>(), 0..300), header in prop::array::uniform10(any::<u8>()), like_ip in any::<bool>()) {
            if like_ip && frame.len() >= 60 { frame[..40].copy_from_slice(&tcp4(&[])[..40]); }
            let vnet: VnetHeader = zerocopy::transmute!(header);
            if let Ok(mut pieces) = pieces(&mut frame, &vnet) {
                let mut head = Vec::new();
                while pieces.next(&mut head).is_some() {}
            }
        }
    }
}
