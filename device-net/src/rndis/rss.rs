//! Receive-side scaling: which channel a received frame goes to (`struct ndis_recv_scale_cap`,
//! `struct ndis_recv_scale_param`, Linux 6.1 drivers/net/hyperv/hyperv_net.h; the Toeplitz hash of the NDIS
//! documentation, "RSS hashing functions").

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NDIS_OBJECT_TYPE_RSS_CAPABILITIES`, revision 2, 18 bytes.
const OBJECT_CAPABILITIES: u8 = 0x88;
/// `NDIS_OBJECT_TYPE_RSS_PARAMETERS`
const OBJECT_PARAMETERS: u8 = 0x89;
const REVISION: u8 = 2;
/// Entries of the indirection table that we offer (Linux's default).
const TABLE_ENTRIES: u16 = 128;
/// Limit: entries that a guest may set (`ITAB_NUM_MAX`).
const TABLE_ENTRIES_MAX: usize = 256;
/// `NETVSC_HASH_KEYLEN`
pub const KEY_BYTES: usize = 40;
/// `NDIS_RSS_PARAM_FLAG_*`
const FLAG_TABLE_UNCHANGED: u16 = 4;
const FLAG_KEY_UNCHANGED: u16 = 8;
const FLAG_DISABLE: u16 = 16;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReceiveScaleCapabilities {
    object_type: u8,
    revision: u8,
    size: U16,
    capabilities: U32,
    interrupt_messages: U32,
    receive_queues: U32,
    indirection_entries: U16,
}
const _: () = assert!(size_of::<ReceiveScaleCapabilities>() == 18);

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReceiveScaleParameters {
    object_type: u8,
    revision: u8,
    size: U16,
    flags: U16,
    base_processor: U16,
    hash_information: U32,
    table_bytes: U16,
    reserved: U16,
    table_offset: U32,
    key_bytes: U16,
    reserved2: U16,
    key_offset: U32,
}
const _: () = assert!(size_of::<ReceiveScaleParameters>() == 28);

/// The answer to OID_GEN_RECEIVE_SCALE_CAPABILITIES. Fewer than two queues: the guest stays with one.
pub fn emit_capabilities(queues: u16) -> Vec<u8> {
    /// Toeplitz, and hashes over IPv4, IPv6, TCP (`NDIS_RSS_CAPS_*`, as Hyper-V reports them)
    const CAPABILITIES: u32 = 0x0100_0301;
    ReceiveScaleCapabilities {
        object_type: OBJECT_CAPABILITIES,
        revision: REVISION,
        size: U16::new(size_of::<ReceiveScaleCapabilities>() as u16),
        capabilities: U32::new(CAPABILITIES),
        interrupt_messages: U32::new(u32::from(queues)),
        receive_queues: U32::new(u32::from(queues)),
        indirection_entries: U16::new(TABLE_ENTRIES),
    }
    .as_bytes()
    .to_vec()
}

/// How received frames are spread over channels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steering {
    enabled: bool,
    table: Vec<u16>,
    key: Vec<u8>,
}

/// A SET, read.
pub struct SteeringChange {
    enabled: bool,
    table: Option<Vec<u16>>,
    key: Option<Vec<u8>>,
}

impl Steering {
    /// Reads RSS parameters. `None`: malformed, or a queue that does not exist.
    pub fn parse(info: &[u8], queues: u16) -> Option<SteeringChange> {
        let (header, _) = ReceiveScaleParameters::read_from_prefix(info).ok()?;
        if header.object_type != OBJECT_PARAMETERS {
            return None;
        }
        let flags = header.flags.get();
        let part = |offset: U32, bytes: U16| {
            let start = offset.get() as usize;
            info.get(start..start.checked_add(usize::from(bytes.get()))?)
        };
        let table = if flags & FLAG_TABLE_UNCHANGED != 0 || header.table_bytes.get() == 0 {
            None
        } else {
            let bytes = part(header.table_offset, header.table_bytes)?;
            if bytes.len() / 4 > TABLE_ENTRIES_MAX {
                return None;
            }
            let entries: Option<Vec<u16>> = bytes
                .chunks_exact(4)
                .map(|entry| {
                    let queue = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                    u16::try_from(queue).ok().filter(|&queue| queue < queues.max(1))
                })
                .collect();
            Some(entries?)
        };
        let key = if flags & FLAG_KEY_UNCHANGED != 0 || header.key_bytes.get() == 0 {
            None
        } else {
            let key = part(header.key_offset, header.key_bytes)?;
            if key.len() != KEY_BYTES {
                return None;
            }
            Some(key.to_vec())
        };
        Some(SteeringChange {
            enabled: flags & FLAG_DISABLE == 0,
            table,
            key,
        })
    }

    pub fn change(&mut self, to: SteeringChange) {
        self.enabled = to.enabled;
        if let Some(table) = to.table {
            self.table = table;
        }
        if let Some(key) = to.key {
            self.key = key;
        }
    }

    /// The queue for a frame with this hash input, and the hash; queue 0 while RSS is off.
    pub fn queue_for(&self, flow: &[u8]) -> u16 {
        if !self.enabled || self.table.is_empty() || self.key.len() != KEY_BYTES || flow.is_empty() {
            return 0;
        }
        let hash = toeplitz(&self.key, flow) as usize;
        self.table.get(hash % self.table.len()).copied().unwrap_or(0)
    }

    pub fn is_enabled(&self) -> bool {
        self.enabled && !self.table.is_empty()
    }
}

/// The Toeplitz hash of `input` (at most 36 bytes with a 40-byte key).
pub fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let mut window: u64 = key
        .iter()
        .take(8)
        .fold(0, |window, &byte| (window << 8) | u64::from(byte));
    let mut rest = key.iter().skip(8);
    let mut hash = 0u32;
    for &byte in input {
        for bit in (0..8).rev() {
            if byte & (1 << bit) != 0 {
                hash ^= (window >> 32) as u32;
            }
            window <<= 1;
        }
        window |= u64::from(rest.next().copied().unwrap_or(0));
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key and vectors of the NDIS documentation, "Verifying the RSS hash calculation".
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    #[test]
    fn the_hash_agrees_with_the_published_vectors() {
        // 66.9.149.187:2794 -> 161.142.100.80:1766
        let addresses = [66, 9, 149, 187, 161, 142, 100, 80];
        assert_eq!(toeplitz(&KEY, &addresses), 0x323e_8fc2);
        let mut flow = addresses.to_vec();
        flow.extend_from_slice(&2794u16.to_be_bytes());
        flow.extend_from_slice(&1766u16.to_be_bytes());
        assert_eq!(toeplitz(&KEY, &flow), 0x51cc_c178);
    }

    fn parameters(flags: u16, table: &[u32]) -> Vec<u8> {
        let mut info = ReceiveScaleParameters {
            object_type: OBJECT_PARAMETERS,
            revision: 2,
            size: U16::new(40),
            flags: U16::new(flags),
            base_processor: U16::ZERO,
            hash_information: U32::new(0x1701),
            table_bytes: U16::new(table.len() as u16 * 4),
            reserved: U16::ZERO,
            table_offset: U32::new(40),
            key_bytes: U16::new(40),
            reserved2: U16::ZERO,
            key_offset: U32::new(40 + table.len() as u32 * 4),
        }
        .as_bytes()
        .to_vec();
        info.resize(40, 0);
        info.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
        info.extend_from_slice(&KEY);
        info
    }

    #[test]
    fn frames_follow_the_table_once_rss_is_enabled() {
        let mut steering = Steering::default();
        steering.change(Steering::parse(&parameters(FLAG_DISABLE, &[1; 128]), 2).expect("well-formed"));
        assert_eq!(steering.queue_for(&[1, 2, 3]), 0);
        steering.change(Steering::parse(&parameters(0, &[1; 128]), 2).expect("well-formed"));
        assert_eq!(steering.queue_for(&[1, 2, 3]), 1);
        let keep = parameters(FLAG_TABLE_UNCHANGED | FLAG_KEY_UNCHANGED, &[0; 128]);
        steering.change(Steering::parse(&keep, 2).expect("well-formed"));
        assert_eq!(steering.queue_for(&[1, 2, 3]), 1);
    }

    #[test]
    fn a_queue_that_does_not_exist_or_an_offset_outside_is_refused() {
        assert!(Steering::parse(&parameters(0, &[2; 128]), 2).is_none());
        assert!(Steering::parse(&parameters(0, &[0; 300]), 2).is_none());
        let mut outside = parameters(0, &[0; 128]);
        outside[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Steering::parse(&outside, 2).is_none());
        assert!(Steering::parse(&outside[..27], 2).is_none());
    }
}
