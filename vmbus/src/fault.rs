//! What went wrong, sorted by who is to blame.
//!
//! The blame decides the reaction, in one place of each program: a [`GuestFault`] is answered by the protocol's own
//! error or closes one channel; a [`HostError`] fails a request or the process; our own mistakes assert.
#![forbid(unsafe_code)]

use nix::errno::Errno;

/// The host's kernel refused something that we asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{attempted}: {errno}")]
pub struct HostError {
    /// What we tried, as the continuation of "cannot": for example "map shared memory".
    pub attempted: &'static str,
    /// The kernel's answer.
    pub errno: Errno,
}

impl HostError {
    /// An error with a known errno.
    pub fn new(attempted: &'static str, errno: Errno) -> Self {
        Self { attempted, errno }
    }

    /// An error with the calling thread's current errno.
    pub fn last(attempted: &'static str) -> Self {
        Self {
            attempted,
            errno: Errno::last(),
        }
    }

    /// An error from the standard library's I/O error; EIO if that one carries no errno.
    pub fn from_io(attempted: &'static str, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        Self { attempted, errno }
    }
}

impl From<HostError> for std::io::Error {
    fn from(error: HostError) -> Self {
        std::io::Error::from_raw_os_error(error.errno as i32)
    }
}

/// An access does not lie within the memory it names. Who is to blame depends on who chose the offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {offset:#x} do not lie within (or are not aligned in) {limit:#x} bytes")]
pub struct OutOfRange {
    /// First byte of the access.
    pub offset: u64,
    /// Length of the access in bytes.
    pub len: u64,
    /// Length of the memory in bytes.
    pub limit: u64,
}

/// A ring's other side broke a rule of the ring. The channel cannot be used any more; nothing else is affected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// An index is not a multiple of 8 below the data size.
    #[error("ring index {index:#x} is not a multiple of 8 below {data_bytes:#x}")]
    IndexOutsideRing {
        /// The index as read.
        index: u32,
        /// Size of the ring's data area in bytes.
        data_bytes: u32,
    },
    /// The header length is below 16 bytes or above the packet length.
    #[error("packet header of {offset8}*8 bytes in a packet of {length8}*8 bytes")]
    PacketHeaderLength {
        /// Header length in 8-byte units.
        offset8: u16,
        /// Packet length in 8-byte units.
        length8: u16,
    },
    /// The packet and its trailer reach beyond what the writer has published.
    #[error("packet of {packet_bytes} bytes and its trailer in {available_bytes} published bytes")]
    PacketBeyondWriteIndex {
        /// Packet length in bytes without the trailer.
        packet_bytes: u32,
        /// Bytes between the read and the write index.
        available_bytes: u32,
    },
    /// The ring's halves do not have at least one control and one data page each.
    #[error("a channel of {area_bytes} bytes cannot be cut at page {downstream_page_offset}")]
    RingSize {
        /// Length of both rings in bytes.
        area_bytes: u64,
        /// Where the second ring begins, in pages.
        downstream_page_offset: u32,
    },
}

/// The guest (or whoever plays it) sent something malformed or against protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    /// A channel message is shorter than its type demands.
    #[error("channel message of type {message_type} with {len} bytes, needs {needed}")]
    MessageTooShort {
        /// Type number, 0 if not even that is present.
        message_type: u32,
        /// Bytes received.
        len: usize,
        /// Bytes that this type needs.
        needed: usize,
    },
    /// A message or packet has more ranges, or longer ones, than bytes.
    #[error("range list of {range_count} ranges does not fit in {len} bytes")]
    RangeListTooShort {
        /// The number of ranges claimed.
        range_count: u32,
        /// The bytes present.
        len: usize,
    },
    /// A packet's type-specific header is shorter than its type demands.
    #[error("packet of type {packet_type} with a header of {len} bytes, needs {needed}")]
    PacketHeaderTooShort {
        /// The packet type.
        packet_type: u16,
        /// Bytes of header present, descriptor included.
        len: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// The packet is not of the type that the protocol asks for here.
    #[error("packet of type {packet_type} where another type is needed")]
    PacketType {
        /// The packet type found.
        packet_type: u16,
    },
    /// A claimed range of guest memory is not RAM.
    #[error("guest memory {gpa:#x}, {len} bytes, is not RAM")]
    NotRam {
        /// First byte.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A range's byte count and offset overflow, or reach beyond its pages.
    #[error("{len} bytes at {offset} do not lie within the {limit} bytes given")]
    RangeOutside {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Bytes there are.
        limit: u64,
    },
    /// The ring rules were broken.
    #[error(transparent)]
    Ring(#[from] RingFault),
}

impl From<OutOfRange> for GuestFault {
    fn from(fault: OutOfRange) -> Self {
        GuestFault::RangeOutside {
            offset: fault.offset,
            len: fault.len,
            limit: fault.limit,
        }
    }
}
