//! Packets in a ring.
//!
//! ```text
//! 0      descriptor, 16 bytes
//! 16     type-specific header            <- offset8 * 8 bytes in all up to here
//!        payload, zero-padded to 8       <- length8 * 8 bytes in all up to here
//!        trailer, 8 bytes: u32 0, u32 start offset of this packet in the ring
//! ```
//! The real length of the payload is not transmitted; each protocol knows its own.

use super::{GpaDirect, GuestFault};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of [`PacketDescriptor`].
pub const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of the trailer after each packet.
pub const TRAILER_BYTES: usize = 8;

/// The first 16 bytes of each packet: `struct vmpacket_descriptor`, Linux 6.1 include/linux/hyperv.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PacketDescriptor {
    /// [`PacketKind`].
    pub packet_type: U16,
    /// Header length, this descriptor included, in 8-byte units: where the payload begins.
    pub offset8: U16,
    /// Packet length without the trailer in 8-byte units.
    pub length8: U16,
    /// Bit 0: a completion packet is wanted.
    pub flags: U16,
    /// Opaque to the receiver; a completion echoes it bit for bit.
    pub transaction_id: U64,
}
const _: () = assert!(size_of::<PacketDescriptor>() == DESCRIPTOR_BYTES);

/// Limit: what 16 bits of 8-byte units can say.
const MAX_PACKET_BYTES: usize = 0xFFFF * 8;

/// Bit 0 of the descriptor's flags: `VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED`.
const COMPLETION_REQUESTED: u16 = 1;

/// Packet type number: `enum vmbus_packet_type`, Linux 6.1 include/linux/hyperv.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketKind(pub u16);

impl PacketKind {
    /// Data in the packet itself.
    pub const IN_BAND: PacketKind = PacketKind(6);
    /// Data in ranges of a buffer that both sides know.
    pub const TRANSFER_PAGES: PacketKind = PacketKind(7);
    /// Data in guest pages named by number.
    pub const GPA_DIRECT: PacketKind = PacketKind(9);
    /// Cancels a request. Not sent by Linux.
    pub const CANCEL: PacketKind = PacketKind(0xA);
    /// Answers a packet that asked for it.
    pub const COMPLETION: PacketKind = PacketKind(0xB);
}

/// Bytes after the descriptor and before the ranges: `reserved`, `range_count` (`struct vmbus_channel_packet_page_buffer`).
pub(super) const GPA_DIRECT_FIXED_BYTES: usize = 8;

/// After the descriptor of a transfer-page packet: `struct vmtransfer_page_packet_header`, Linux 6.1 include/linux/hyperv.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TransferPagesFixed {
    page_set_id: U16,
    sender_owns_set: u8,
    reserved: u8,
    range_count: U32,
}
const _: () = assert!(size_of::<TransferPagesFixed>() == 8);

/// One range of a transfer-page packet: `struct vmtransfer_page_range`, Linux 6.1 include/linux/hyperv.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TransferRangeLayout {
    byte_count: U32,
    byte_offset: U32,
}
const _: () = assert!(size_of::<TransferRangeLayout>() == 8);

/// A private copy of one packet, cut into its parts. Nothing in it refers to the ring any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Type number.
    pub kind: PacketKind,
    /// The sender's number for it.
    pub transaction_id: u64,
    /// Whether a completion is wanted. Never complete a packet that does not want one.
    pub completion_requested: bool,
    extra_header: &'a [u8],
    /// What follows the header, zero-padded to a multiple of 8.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Cuts `length8 * 8` private bytes; `None` if the descriptor's lengths do not hold within them. (The ring reader
    /// has checked them and blames the peer with more detail.)
    pub fn parse(bytes: &'a [u8]) -> Option<Packet<'a>> {
        let (descriptor, rest) = PacketDescriptor::read_from_prefix(bytes).ok()?;
        let packet_bytes = usize::from(descriptor.length8.get()) * 8;
        Self::from_parts(
            &descriptor,
            rest.get(..packet_bytes.checked_sub(DESCRIPTOR_BYTES)?)?,
        )
    }

    /// A packet from a descriptor and what follows it up to `length8 * 8`; `None` if the header is shorter than the descriptor
    /// or longer than the packet.
    #[inline]
    pub(crate) fn from_parts(descriptor: &PacketDescriptor, rest: &'a [u8]) -> Option<Packet<'a>> {
        let extra_bytes = (usize::from(descriptor.offset8.get()) * 8).checked_sub(DESCRIPTOR_BYTES)?;
        let (extra_header, payload) = rest.split_at_checked(extra_bytes)?;
        Some(Packet {
            kind: PacketKind(descriptor.packet_type.get()),
            transaction_id: descriptor.transaction_id.get(),
            completion_requested: descriptor.flags.get() & COMPLETION_REQUESTED != 0,
            extra_header,
            payload,
        })
    }

    /// The type-specific header after the descriptor.
    pub fn extra_header(&self) -> &'a [u8] {
        self.extra_header
    }

    /// The claims of a GPA-direct packet.
    pub fn gpa_direct(&self) -> Result<GpaDirect<'a>, GuestFault> {
        GpaDirect::parse(self)
    }

    /// The ranges of a transfer-page packet.
    pub fn transfer_pages(&self) -> Result<TransferPages<'a>, GuestFault> {
        TransferPages::parse(self)
    }

    pub(super) fn header_too_short(&self, needed: usize) -> GuestFault {
        GuestFault::PacketHeaderTooShort {
            packet_type: self.kind.0,
            len: DESCRIPTOR_BYTES + self.extra_header.len(),
            needed: DESCRIPTOR_BYTES + needed,
        }
    }
}

/// A range of the shared buffer that a transfer-page packet speaks of. A claim: check it against the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferRange {
    /// Length in bytes.
    pub byte_count: u32,
    /// Offset in the buffer in bytes.
    pub byte_offset: u32,
}

/// The type-specific header of a transfer-page packet (type 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferPages<'a> {
    /// Names the buffer.
    pub page_set_id: u16,
    /// 0 or 1, passed on as it is.
    pub sender_owns_set: u8,
    ranges: &'a [u8],
}

impl<'a> TransferPages<'a> {
    fn parse(packet: &Packet<'a>) -> Result<Self, GuestFault> {
        if packet.kind != PacketKind::TRANSFER_PAGES {
            return Err(GuestFault::PacketType {
                packet_type: packet.kind.0,
            });
        }
        let (fixed, rest) = TransferPagesFixed::read_from_prefix(packet.extra_header)
            .map_err(|_| packet.header_too_short(size_of::<TransferPagesFixed>()))?;
        let range_count = fixed.range_count.get();
        let ranges = usize::try_from(range_count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<TransferRangeLayout>()))
            .and_then(|len| rest.get(..len))
            .ok_or(GuestFault::RangeListTooShort {
                range_count,
                len: rest.len(),
            })?;
        Ok(Self {
            page_set_id: fixed.page_set_id.get(),
            sender_owns_set: fixed.sender_owns_set,
            ranges,
        })
    }

    /// The ranges in order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = TransferRange> + use<'a> {
        self.ranges
            .chunks_exact(size_of::<TransferRangeLayout>())
            .map(|range| TransferRange {
                byte_count: le_u32(&range[..4]),
                byte_offset: le_u32(&range[4..]),
            })
    }
}

/// Builds the type-specific header of a transfer-page packet into `header`, which is cleared first and may be re-used.
pub fn transfer_pages_header(page_set_id: u16, ranges: &[TransferRange], header: &mut Vec<u8>) {
    header.clear();
    let fixed = TransferPagesFixed {
        page_set_id: page_set_id.into(),
        sender_owns_set: 0,
        reserved: 0,
        range_count: (ranges.len() as u32).into(),
    };
    header.extend_from_slice(fixed.as_bytes());
    for range in ranges {
        let layout = TransferRangeLayout {
            byte_count: range.byte_count.into(),
            byte_offset: range.byte_offset.into(),
        };
        header.extend_from_slice(layout.as_bytes());
    }
}

/// A packet to be written. Borrows its parts; the ring writer copies each once.
#[derive(Debug, Clone, Copy)]
pub struct OutPacket<'a> {
    /// Type number.
    pub kind: PacketKind,
    /// Ours for requests, the request's for completions.
    pub transaction_id: u64,
    /// Whether the other side shall complete it.
    pub completion_requested: bool,
    /// What stands between the descriptor and the payload; a multiple of 8 bytes.
    pub extra_header: &'a [u8],
    /// The payload's pieces, written one after the other and zero-padded to 8.
    pub payload: &'a [&'a [u8]],
}

impl<'a> OutPacket<'a> {
    /// A packet with its data in it.
    pub fn in_band(transaction_id: u64, completion_requested: bool, payload: &'a [&'a [u8]]) -> Self {
        Self {
            kind: PacketKind::IN_BAND,
            transaction_id,
            completion_requested,
            extra_header: &[],
            payload,
        }
    }

    /// The answer to a packet.
    pub fn completion(transaction_id: u64, payload: &'a [&'a [u8]]) -> Self {
        Self {
            kind: PacketKind::COMPLETION,
            transaction_id,
            completion_requested: false,
            extra_header: &[],
            payload,
        }
    }

    /// Bytes of payload before padding; `None` if they do not fit in a packet anyway.
    pub fn payload_bytes(&self) -> Option<usize> {
        self.payload
            .iter()
            .try_fold(0usize, |sum, part| sum.checked_add(part.len()))
    }

    /// The three lengths; `None` if the packet is longer than 16 bits of 8-byte units can say.
    #[inline]
    fn lengths(&self) -> Option<Lengths> {
        assert!(
            self.extra_header.len().is_multiple_of(8),
            "type-specific header of {} bytes",
            self.extra_header.len()
        );
        let payload = self
            .payload
            .iter()
            .fold(0usize, |sum, part| sum.saturating_add(part.len()));
        let header = self.extra_header.len().saturating_add(DESCRIPTOR_BYTES);
        let unpadded = header.saturating_add(payload);
        if unpadded > MAX_PACKET_BYTES {
            return None;
        }
        let packet = unpadded.next_multiple_of(8);
        // Both are at most MAX_PACKET_BYTES.
        Some(Lengths {
            offset8: (header / 8) as u16,
            length8: (packet / 8) as u16,
            padding_bytes: packet - unpadded,
        })
    }

    #[inline]
    fn flags(&self) -> u16 {
        if self.completion_requested {
            COMPLETION_REQUESTED
        } else {
            0
        }
    }

    /// The descriptor; `None` if a length does not fit in its 16 bits. `extra_header` must be a multiple of 8 long.
    pub fn descriptor(&self) -> Option<PacketDescriptor> {
        let lengths = self.lengths()?;
        Some(PacketDescriptor {
            packet_type: self.kind.0.into(),
            offset8: lengths.offset8.into(),
            length8: lengths.length8.into(),
            flags: self.flags().into(),
            transaction_id: self.transaction_id.into(),
        })
    }

    /// The descriptor as two little-endian words: the same as [`OutPacket::descriptor`], but put together in registers.
    /// (Built field by field in memory and copied as a whole it costs a stalled load, a fifth of the time that a small
    /// packet takes.)
    #[inline]
    pub(crate) fn encoded(&self) -> Option<([u64; 2], Lengths)> {
        let lengths = self.lengths()?;
        let first = u64::from(self.kind.0)
            | u64::from(lengths.offset8) << 16
            | u64::from(lengths.length8) << 32
            | u64::from(self.flags()) << 48;
        Some(([first, self.transaction_id], lengths))
    }
}

/// How long the parts of a packet are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lengths {
    offset8: u16,
    length8: u16,
    /// Zero bytes between payload and trailer.
    pub(crate) padding_bytes: usize,
}

impl Lengths {
    /// Bytes without the trailer.
    #[inline]
    pub(crate) fn packet_bytes(&self) -> u32 {
        u32::from(self.length8) * 8
    }
}

/// The first four bytes. The caller has cut at least four.
pub(super) fn le_u32(bytes: &[u8]) -> u32 {
    U32::read_from_prefix(bytes).map_or(0, |(value, _)| value.get())
}

/// The first eight bytes. The caller has cut at least eight.
pub(super) fn le_u64(bytes: &[u8]) -> u64 {
    U64::read_from_prefix(bytes).map_or(0, |(value, _)| value.get())
}
