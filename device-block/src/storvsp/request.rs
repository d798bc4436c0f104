//! A request as it is kept in the journal, and a SCSI result as the guest sees it.
//!
//! ```text
//! kept:  64 bytes  the storvsp packet
//!         8 bytes  reserved, range count   \  of GPA-direct packets only: the VMBus header after the
//!         n bytes  the page ranges         /  descriptor, cut after the last range
//! ```
//!
//! A request that was just received and one that a successor finds in the journal are parsed by the same code: what
//! a dead process has written is believed no more than what a guest writes.

use super::wire::{
    Operation, PACKET_BYTES, PacketStatus, SCSI_STATUS_CHECK_CONDITION, SRB_STATUS_AUTOSENSE_VALID,
    ScsiRequest, SrbStatus, VstorPacket, WireFault,
};
use crate::scsi::sense::Sense;
use vmbus::mem::{GuestRam, GuestSpans};
use vmbus::wire::{GuestFault, Packet, PacketKind, RangeList};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

/// The journal's mark for a storvsp request.
pub const JOURNAL_KIND: u8 = 1;

/// Bytes before the first range in the header of a GPA-direct packet: reserved, range count (Linux 6.1
/// include/linux/hyperv.h `struct vmbus_channel_packet_page_buffer`).
const FIXED_BYTES: usize = 8;
/// Bytes before the page numbers of a range: length, offset.
const RANGE_FIXED_BYTES: usize = 8;

/// Why a packet is no request. The guest's fault each; its channel is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// Not what VMBus allows.
    #[error(transparent)]
    Packet(#[from] GuestFault),
    /// Not what storvsp allows.
    #[error(transparent)]
    Wire(#[from] WireFault),
    /// A VMBus packet of a kind that storvsp does not use.
    #[error("a VMBus packet of type {0} on a storvsp channel")]
    PacketKind(u16),
}

/// A request with its claims on guest memory, not yet looked up.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The storvsp packet.
    pub packet: VstorPacket,
    header: &'a [u8],
    ranges: Option<RangeList<'a>>,
}

impl<'a> Request<'a> {
    /// Takes a VMBus packet apart.
    pub fn from_packet(packet: &Packet<'a>) -> Result<Self, RequestFault> {
        let (header, ranges) = match packet.kind {
            PacketKind::IN_BAND => (&[][..], None),
            PacketKind::GPA_DIRECT => {
                let ranges = packet.gpa_direct()?.ranges;
                // Quirk(Linux before 6.1 storvsc): the header has room for the greatest request, and what lies
                // beyond the last range is not worth keeping.
                let used: usize = FIXED_BYTES
                    + ranges
                        .iter()
                        .map(|range| RANGE_FIXED_BYTES + range.page_count() * 8)
                        .sum::<usize>();
                (
                    packet.extra_header().get(..used).unwrap_or_default(),
                    Some(ranges),
                )
            }
            PacketKind(other) => return Err(RequestFault::PacketKind(other)),
        };
        Ok(Self {
            packet: VstorPacket::parse(packet.payload)?,
            header,
            ranges,
        })
    }

    /// Takes apart what [`Request::kept`] gave.
    pub fn from_kept(kept: &'a [u8]) -> Result<Self, RequestFault> {
        let Some((packet, header)) = kept.split_at_checked(PACKET_BYTES) else {
            return Err(WireFault::PacketTooShort(kept.len()).into());
        };
        let ranges = match header.split_first_chunk::<FIXED_BYTES>() {
            Some(([_, _, _, _, count @ ..], ranges)) => {
                Some(RangeList::parse(u32::from_le_bytes(*count), ranges)?)
            }
            None => None,
        };
        Ok(Self {
            packet: VstorPacket::parse(packet)?,
            header,
            ranges,
        })
    }

    /// What a successor needs to execute the request again, in parts.
    pub fn kept(&self) -> [&[u8]; 2] {
        [self.packet.as_bytes(), self.header]
    }

    /// The guest's memory for the data of this request: at most as much as both the SRB and the ranges say.
    pub fn data(&self, ram: &GuestRam) -> Result<GuestSpans, GuestFault> {
        let mut spans = ram.spans();
        let Some(ranges) = &self.ranges else {
            return Ok(spans);
        };
        for range in ranges.iter() {
            range.resolve(ram, &mut spans)?;
        }
        let told = self.packet.scsi_request().data_transfer_length.get() as usize;
        if told < spans.len() {
            spans = spans.slice(0, told)?;
        }
        Ok(spans)
    }
}

/// How an SRB ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SrbResult {
    /// GOOD, with so many bytes moved.
    Good(u32),
    /// CHECK CONDITION.
    Check(Sense),
    /// There is no such logical unit.
    NoUnit,
    /// The SRB itself makes no sense.
    Invalid,
}

impl SrbResult {
    /// The packet that tells it to the guest, on the channel on which the request came.
    pub fn completion(self) -> VstorPacket {
        let mut srb = ScsiRequest::new_zeroed();
        // Linux reads neither; it is what Hyper-V sends.
        srb.length = U16::new(size_of::<ScsiRequest>() as u16);
        match self {
            Self::Good(bytes) => {
                srb.srb_status = SrbStatus::Success as u8;
                // Quirk(Linux 6.1 storvsc): the request counts as short by what is missing here.
                srb.data_transfer_length = U32::new(bytes);
            }
            Self::Check(sense) => {
                srb.srb_status = SrbStatus::Error as u8 | SRB_STATUS_AUTOSENSE_VALID;
                srb.scsi_status = SCSI_STATUS_CHECK_CONDITION;
                let data = sense.fixed_format();
                srb.sense_info_length = data.len() as u8;
                srb.payload[..data.len()].copy_from_slice(&data);
            }
            Self::NoUnit => srb.srb_status = SrbStatus::InvalidLun as u8,
            Self::Invalid => srb.srb_status = SrbStatus::InvalidRequest as u8,
        }
        let mut packet = VstorPacket::with_body(Operation::CompleteIo, srb.as_bytes());
        packet.header.status = U32::new(PacketStatus::Success as u32);
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use vmbus::mem::{Gpa, RamLayout, SharedMap};
    use vmbus::wire::{PacketDescriptor, gpa_direct_header};

    fn ram() -> GuestRam {
        let bytes = 1 << 20;
        GuestRam::new(
            Arc::new(SharedMap::anonymous("ram", bytes).unwrap()),
            RamLayout::for_size(bytes as u64),
        )
        .unwrap()
    }

    /// A private copy of a GPA-direct packet, as the ring reader gives it.
    fn gpa_direct(header: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut descriptor = PacketDescriptor::new_zeroed();
        descriptor.packet_type = 9.into();
        descriptor.offset8 = (((16 + header.len()) / 8) as u16).into();
        descriptor.length8 = (((16 + header.len() + payload.len()) / 8) as u16).into();
        descriptor.flags = 1.into();
        descriptor.transaction_id = 77.into();
        [descriptor.as_bytes(), header, payload].concat()
    }

    fn read_packet(transfer_bytes: u32) -> [u8; 64] {
        let mut srb = ScsiRequest::new_zeroed();
        srb.data_transfer_length = U32::new(transfer_bytes);
        srb.data_in = 1;
        let packet = VstorPacket::with_body(Operation::ExecuteSrb, srb.as_bytes());
        zerocopy::transmute!(packet)
    }

    #[test]
    fn a_request_is_the_same_after_it_was_kept() {
        let header = gpa_direct_header(&[(Gpa(0x3200), 8192)]);
        let bytes = gpa_direct(&header, &read_packet(8192));
        let packet = Packet::parse(&bytes).unwrap();
        let request = Request::from_packet(&packet).unwrap();
        let kept = request.kept().concat();
        let again = Request::from_kept(&kept).unwrap();
        assert_eq!(again.packet, request.packet);
        let pieces = |request: &Request<'_>| request.data(&ram()).unwrap().iter().collect::<Vec<_>>();
        assert_eq!(pieces(&request), vec![(0x3200, 8192)]);
        assert_eq!(pieces(&again), pieces(&request));
    }

    #[test]
    fn room_beyond_the_last_range_is_not_kept() {
        let mut header = gpa_direct_header(&[(Gpa(0x1000), 4096)]);
        let used = header.len();
        header.extend_from_slice(&[0xEE; 64]);
        let bytes = gpa_direct(&header, &read_packet(4096));
        let request = Request::from_packet(&Packet::parse(&bytes).unwrap()).unwrap();
        assert_eq!(request.kept()[1].len(), used);
    }

    #[test]
    fn the_smaller_of_two_lengths_is_believed() {
        let header = gpa_direct_header(&[(Gpa(0x1000), 4096)]);
        for (told, expected) in [(512, 512), (4096, 4096), (1 << 30, 4096), (0, 0)] {
            let bytes = gpa_direct(&header, &read_packet(told));
            let request = Request::from_packet(&Packet::parse(&bytes).unwrap()).unwrap();
            assert_eq!(request.data(&ram()).unwrap().len(), expected);
        }
    }

    #[test]
    fn memory_that_is_no_ram_is_a_fault_of_the_guest() {
        let header = gpa_direct_header(&[(Gpa(0xF_F000), 8192)]);
        let bytes = gpa_direct(&header, &read_packet(8192));
        let request = Request::from_packet(&Packet::parse(&bytes).unwrap()).unwrap();
        assert!(request.data(&ram()).is_err());
    }

    #[test]
    fn good_has_the_bytes_moved_and_nothing_else() {
        let mut expected = [0u8; 64];
        expected[0] = 1;
        expected[0x0C] = 0x34;
        expected[0x0E] = 0x01;
        expected[0x18..0x1C].copy_from_slice(&4096u32.to_le_bytes());
        assert_eq!(SrbResult::Good(4096).completion().as_bytes(), expected);
    }

    #[test]
    fn check_condition_has_autosense_where_linux_looks_for_it() {
        let mut expected = [0u8; 64];
        expected[0] = 1;
        expected[0x0C] = 0x34;
        expected[0x0E] = 0x84;
        expected[0x0F] = 2;
        expected[0x0C + 9] = 18;
        expected[0x1C] = 0x70;
        expected[0x1E] = 3;
        expected[0x1C + 7] = 0x0A;
        expected[0x1C + 12] = 0x11;
        assert_eq!(
            SrbResult::Check(Sense::UNRECOVERED_READ_ERROR)
                .completion()
                .as_bytes(),
            expected
        );
    }

    #[test]
    fn the_other_results_are_srb_statuses_alone() {
        assert_eq!(SrbResult::NoUnit.completion().scsi_request().srb_status, 0x20);
        assert_eq!(SrbResult::Invalid.completion().scsi_request().srb_status, 0x06);
    }

    proptest! {
        #[test]
        fn any_packet_parses_or_is_refused(
            kind in prop_oneof![Just(6u8), Just(9), any::<u8>()],
            header_words in 2u8..12,
            tail in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..400),
        ) {
            let mut bytes = vec![kind, 0, header_words, 0, 0, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8];
            bytes.extend_from_slice(&tail);
            bytes.truncate(bytes.len() / 8 * 8);
            bytes[4] = (bytes.len() / 8) as u8;
            let Some(packet) = Packet::parse(&bytes) else { return Ok(()) };
            if let Ok(request) = Request::from_packet(&packet) {
                let kept = request.kept().concat();
                let again = Request::from_kept(&kept).unwrap();
                prop_assert_eq!(again.packet, request.packet);
                let ram = ram();
                match (request.data(&ram), again.data(&ram)) {
                    (Ok(a), Ok(b)) => prop_assert_eq!(a.len(), b.len()),
                    (Err(_), Err(_)) => {}
                    (a, b) => prop_assert!(false, "{a:?} {b:?}"),
                }
            }
        }

        #[test]
        fn any_kept_bytes_parse_or_are_refused(kept in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(request) = Request::from_kept(&kept)
                && let Ok(data) = request.data(&ram())
            {
                prop_assert!(data.len() <= 1 << 20);
            }
        }
    }
}
