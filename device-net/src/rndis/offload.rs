//! Offload capabilities and parameters (NDIS_OFFLOAD and NDIS_OFFLOAD_PARAMETERS; `struct ndis_offload`,
//! `struct ndis_offload_params`, Linux 6.1 drivers/net/hyperv/hyperv_net.h).
//!
//! What we take over on the way out: TCP and UDP checksums over IPv4 and IPv6, and segmentation of TCP over both. A
//! TAP's kernel does the work; for other backends [`crate::frame`] does. On the way in we never leave a checksum to
//! the guest, and merge nothing.

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NDIS_OBJECT_TYPE_OFFLOAD`, revision 3 with NVSP 5 and later.
const OBJECT_OFFLOAD: u8 = 0xA7;
const REVISION: u8 = 3;
/// `NDIS_OFFLOAD_ENCAP_8023`
const ENCAPSULATION_8023: u32 = 2;
/// Largest frame that the guest may leave to us to segment. Limit: with Ethernet, VLAN and RNDIS headers it stays
/// below 64 KiB, which is what the kernel takes from a TAP in one write. Hyper-V says the same.
pub const SEGMENTATION_BYTES_MAX: u32 = 62 * 1024;
const SEGMENTS_MIN: u32 = 2;
/// `NDIS_TXCSUM_CAP_IP4OPT | TCP4OPT | TCP4 | UDP4` (0x1, 0x4, 0x10, 0x40)
const CHECKSUM_IP4: u32 = 0x55;
/// `NDIS_TXCSUM_CAP_IP6EXT | TCP6OPT | TCP6 | UDP6` (0x1, 0x4, 0x10, 0x40)
const CHECKSUM_IP6: u32 = 0x55;
/// `NDIS_LSOV2_CAP_IP6EXT | NDIS_LSOV2_CAP_TCP6OPT`
const SEGMENTATION_IP6: u32 = 0x5;

/// `struct ndis_offload`, revision 3.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NdisOffload {
    object_type: u8,
    revision: u8,
    size: U16,
    ip4_txenc: U32,
    ip4_txcsum: U32,
    ip4_rxenc: U32,
    ip4_rxcsum: U32,
    ip6_txenc: U32,
    ip6_txcsum: U32,
    ip6_rxenc: U32,
    ip6_rxcsum: U32,
    lso_v1: [U32; 4],
    ipsec_v1: [U32; 7],
    lso_v2_ip4_encap: U32,
    lso_v2_ip4_maxsz: U32,
    lso_v2_ip4_minsg: U32,
    lso_v2_ip6_encap: U32,
    lso_v2_ip6_maxsz: U32,
    lso_v2_ip6_minsg: U32,
    lso_v2_ip6_opts: U32,
    flags: U32,
    ipsec_v2: [U32; 8],
    rsc_ip4: u8,
    rsc_ip6: u8,
    rsc_pad: [u8; 2],
    encap_gre: [U32; 2],
}
const _: () = assert!(size_of::<NdisOffload>() == 156);

/// The capabilities, cut to the size that the guest's own header in `asked` has. `None`: that header is missing or
/// wrong.
pub fn emit_capabilities(offered: bool, asked: &[u8]) -> Option<Vec<u8>> {
    let (object_type, size) = match *asked.first_chunk::<4>()? {
        [object_type, _, low, high] => (object_type, usize::from(u16::from_le_bytes([low, high]))),
    };
    if object_type != OBJECT_OFFLOAD || size < size_of::<NdisOffload>() {
        return None;
    }
    let mut capabilities = NdisOffload {
        object_type: OBJECT_OFFLOAD,
        revision: REVISION,
        size: U16::new(size_of::<NdisOffload>() as u16),
        ..NdisOffload::default()
    };
    if offered {
        let encapsulation = U32::new(ENCAPSULATION_8023);
        capabilities.ip4_txenc = encapsulation;
        capabilities.ip4_txcsum = U32::new(CHECKSUM_IP4);
        capabilities.ip4_rxenc = encapsulation;
        capabilities.ip4_rxcsum = U32::new(CHECKSUM_IP4);
        capabilities.ip6_txenc = encapsulation;
        capabilities.ip6_txcsum = U32::new(CHECKSUM_IP6);
        capabilities.ip6_rxenc = encapsulation;
        capabilities.ip6_rxcsum = U32::new(CHECKSUM_IP6);
        capabilities.lso_v2_ip4_encap = encapsulation;
        capabilities.lso_v2_ip4_maxsz = U32::new(SEGMENTATION_BYTES_MAX);
        capabilities.lso_v2_ip4_minsg = U32::new(SEGMENTS_MIN);
        capabilities.lso_v2_ip6_encap = encapsulation;
        capabilities.lso_v2_ip6_maxsz = U32::new(SEGMENTATION_BYTES_MAX);
        capabilities.lso_v2_ip6_minsg = U32::new(SEGMENTS_MIN);
        capabilities.lso_v2_ip6_opts = U32::new(SEGMENTATION_IP6);
    }
    Some(capabilities.as_bytes().to_vec())
}

/// Which checksums of received frames the guest wants vouched for. The transmit side is asked for per packet, so
/// nothing need be remembered of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadParameters {
    pub ip4_checksum: u8,
    pub tcp4_checksum: u8,
    pub udp4_checksum: u8,
    pub tcp6_checksum: u8,
    pub udp6_checksum: u8,
    pub segmentation_ip4: u8,
    pub segmentation_ip6: u8,
}

impl OffloadParameters {
    /// Reads the structure from byte 4 to 12; all revisions agree that far (22 bytes and more).
    pub fn parse(info: &[u8]) -> Option<Self> {
        /// `NDIS_OBJECT_TYPE_DEFAULT`
        const OBJECT_DEFAULT: u8 = 0x80;
        const BYTES_MIN: usize = 20;
        let fields: &[u8; BYTES_MIN] = info.first_chunk()?;
        (fields[0] == OBJECT_DEFAULT).then_some(Self {
            ip4_checksum: fields[4],
            tcp4_checksum: fields[5],
            udp4_checksum: fields[6],
            tcp6_checksum: fields[7],
            udp6_checksum: fields[8],
            segmentation_ip4: fields[11],
            segmentation_ip6: fields[12],
        })
    }

    /// A zero means "no change".
    pub fn change(&mut self, to: Self) {
        let update = |now: &mut u8, new: u8| {
            if new != 0 {
                *now = new;
            }
        };
        update(&mut self.ip4_checksum, to.ip4_checksum);
        update(&mut self.tcp4_checksum, to.tcp4_checksum);
        update(&mut self.udp4_checksum, to.udp4_checksum);
        update(&mut self.tcp6_checksum, to.tcp6_checksum);
        update(&mut self.udp6_checksum, to.udp6_checksum);
        update(&mut self.segmentation_ip4, to.segmentation_ip4);
        update(&mut self.segmentation_ip6, to.segmentation_ip6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> [u8; 156] {
        let mut asked = [0u8; 156];
        asked[..4].copy_from_slice(&[0xA7, 3, 0x9C, 0]);
        asked
    }

    fn word(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes([
            bytes[offset],
            bytes[offset + 1],
            bytes[offset + 2],
            bytes[offset + 3],
        ])
    }

    #[test]
    fn capabilities_stand_where_linux_reads_them() {
        let bytes = emit_capabilities(true, &asked()).expect("well-formed");
        assert_eq!(bytes.len(), 0x9C);
        assert_eq!(bytes[..4], [0xA7, 3, 0x9C, 0]);
        assert_eq!(word(&bytes, 0x08) & 0x54, 0x54);
        assert_eq!(word(&bytes, 0x18) & 0x55, 0x55);
        assert_eq!(word(&bytes, 0x50), 2);
        assert_eq!(word(&bytes, 0x54), SEGMENTATION_BYTES_MAX);
        assert_eq!(word(&bytes, 0x5C), 2);
        assert_eq!(word(&bytes, 0x68), 5);
        assert_eq!(bytes[0x90..0x92], [0, 0]);
    }

    #[test]
    fn without_offloads_all_but_the_header_is_zero() {
        let bytes = emit_capabilities(false, &asked()).expect("well-formed");
        assert!(bytes[4..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_question_without_header_is_refused() {
        assert_eq!(emit_capabilities(true, &[]), None);
        assert_eq!(emit_capabilities(true, &[0xA7, 3, 0x20, 0]), None);
    }

    #[test]
    fn zero_leaves_a_parameter_as_it_was() {
        let mut info = [0u8; 28];
        info[0] = 0x80;
        info[5] = 4;
        let mut parameters = OffloadParameters::default();
        parameters.change(OffloadParameters::parse(&info).expect("well-formed"));
        assert_eq!(parameters.tcp4_checksum, 4);
        info[5] = 0;
        parameters.change(OffloadParameters::parse(&info).expect("well-formed"));
        assert_eq!(parameters.tcp4_checksum, 4);
        assert_eq!(OffloadParameters::parse(&info[..19]), None);
    }
}
