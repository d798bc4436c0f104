//! The header that a TAP with IFF_VNET_HDR puts before each frame (`struct virtio_net_hdr`, Linux 6.1
//! include/uapi/linux/virtio_net.h; virtio 1.2 section 5.1.6).

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Checksum from `csum_start` on is to be put at `csum_offset` behind it.
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// The checksum was verified.
pub const FLAG_DATA_VALID: u8 = 2;
pub const GSO_NONE: u8 = 0;
pub const GSO_TCPV4: u8 = 1;
pub const GSO_TCPV6: u8 = 4;
pub const GSO_ECN: u8 = 0x80;

/// Length of the header on the descriptor: the form without `num_buffers`, which is the kernel's default.
pub const VNET_BYTES: usize = 10;

/// Host byte order on the descriptor, which on x86-64 is little endian.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VnetHeader {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: U16,
    pub gso_size: U16,
    pub csum_start: U16,
    pub csum_offset: U16,
}
const _: () = assert!(size_of::<VnetHeader>() == VNET_BYTES);
