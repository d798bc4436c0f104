//! Object identifiers: what QUERY answers and what SET changes (MS-RNDIS 2.2; include/linux/rndis.h).

use super::control::{Adapter, PacketFilter, Traits};
use super::offload::{self, OffloadParameters};
use super::rss::{self, Steering};
use super::wire::RndisStatus;

pub const GEN_SUPPORTED_LIST: u32 = 0x0001_0101;
pub const GEN_HARDWARE_STATUS: u32 = 0x0001_0102;
pub const GEN_MEDIA_SUPPORTED: u32 = 0x0001_0103;
pub const GEN_MEDIA_IN_USE: u32 = 0x0001_0104;
pub const GEN_MAXIMUM_FRAME_SIZE: u32 = 0x0001_0106;
pub const GEN_LINK_SPEED: u32 = 0x0001_0107;
pub const GEN_VENDOR_DESCRIPTION: u32 = 0x0001_010D;
pub const GEN_CURRENT_PACKET_FILTER: u32 = 0x0001_010E;
pub const GEN_MAXIMUM_TOTAL_SIZE: u32 = 0x0001_0111;
pub const GEN_MEDIA_CONNECT_STATUS: u32 = 0x0001_0114;
pub const GEN_RECEIVE_SCALE_CAPABILITIES: u32 = 0x0001_0203;
pub const GEN_RECEIVE_SCALE_PARAMETERS: u32 = 0x0001_0204;
pub const GEN_FRIENDLY_NAME: u32 = 0x0002_0216;
pub const PERMANENT_ADDRESS: u32 = 0x0101_0101;
pub const CURRENT_ADDRESS: u32 = 0x0101_0102;
pub const TCP_OFFLOAD_PARAMETERS: u32 = 0xFC01_020C;
pub const TCP_OFFLOAD_HARDWARE_CAPABILITIES: u32 = 0xFC01_020D;

const SUPPORTED: [u32; 17] = [
    GEN_SUPPORTED_LIST,
    GEN_HARDWARE_STATUS,
    GEN_MEDIA_SUPPORTED,
    GEN_MEDIA_IN_USE,
    GEN_MAXIMUM_FRAME_SIZE,
    GEN_LINK_SPEED,
    GEN_VENDOR_DESCRIPTION,
    GEN_CURRENT_PACKET_FILTER,
    GEN_MAXIMUM_TOTAL_SIZE,
    GEN_MEDIA_CONNECT_STATUS,
    GEN_RECEIVE_SCALE_CAPABILITIES,
    GEN_RECEIVE_SCALE_PARAMETERS,
    GEN_FRIENDLY_NAME,
    PERMANENT_ADDRESS,
    CURRENT_ADDRESS,
    TCP_OFFLOAD_PARAMETERS,
    TCP_OFFLOAD_HARDWARE_CAPABILITIES,
];

/// 10 Gbit/s in units of 100 bit/s: what Hyper-V's own switch reports.
const LINK_SPEED: u32 = 100_000_000;
/// Becomes the interface's alias in Linux.
const FRIENDLY_NAME: &str = "bulkhead";
const VENDOR_DESCRIPTION: &[u8] = b"bulkhead netvsp\0";

/// The information that answers a QUERY. `asked` is what the request carried.
pub fn query(
    adapter: &Adapter,
    oid: u32,
    asked: &[u8],
    traits: &Traits,
    negotiated_mtu: u32,
) -> Result<Vec<u8>, RndisStatus> {
    let mtu = negotiated_mtu.min(traits.mtu_bytes);
    Ok(match oid {
        GEN_SUPPORTED_LIST => SUPPORTED.iter().flat_map(|oid| oid.to_le_bytes()).collect(),
        // NdisHardwareStatusReady, NdisMedium802_3
        GEN_HARDWARE_STATUS | GEN_MEDIA_SUPPORTED | GEN_MEDIA_IN_USE => number(0),
        GEN_MAXIMUM_FRAME_SIZE => number(mtu),
        GEN_MAXIMUM_TOTAL_SIZE => number(mtu.saturating_add(crate::netvsp::session::ETHERNET_HEADER_BYTES)),
        GEN_LINK_SPEED => number(LINK_SPEED),
        GEN_VENDOR_DESCRIPTION => VENDOR_DESCRIPTION.to_vec(),
        GEN_CURRENT_PACKET_FILTER => number(adapter.filter.0),
        // NdisMediaStateConnected is 0.
        GEN_MEDIA_CONNECT_STATUS => number(u32::from(!traits.link_up)),
        GEN_RECEIVE_SCALE_CAPABILITIES => rss::emit_capabilities(traits.queues),
        GEN_FRIENDLY_NAME => FRIENDLY_NAME.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        PERMANENT_ADDRESS | CURRENT_ADDRESS => traits.mac.to_vec(),
        TCP_OFFLOAD_HARDWARE_CAPABILITIES => {
            offload::emit_capabilities(traits.offloads, asked).ok_or(RndisStatus::INVALID_DATA)?
        }
        _ => return Err(RndisStatus::NOT_SUPPORTED),
    })
}

/// Carries out a SET.
pub fn set(adapter: &mut Adapter, oid: u32, info: &[u8], traits: &Traits) -> RndisStatus {
    match oid {
        GEN_CURRENT_PACKET_FILTER => match info.first_chunk() {
            Some(bits) => {
                adapter.filter = PacketFilter(u32::from_le_bytes(*bits));
                RndisStatus::SUCCESS
            }
            None => RndisStatus::INVALID_DATA,
        },
        TCP_OFFLOAD_PARAMETERS => match OffloadParameters::parse(info) {
            Some(parameters) => {
                adapter.offload.change(parameters);
                RndisStatus::SUCCESS
            }
            None => RndisStatus::INVALID_DATA,
        },
        GEN_RECEIVE_SCALE_PARAMETERS => match Steering::parse(info, traits.queues) {
            Some(steering) => {
                adapter.steering.change(steering);
                RndisStatus::SUCCESS
            }
            None => RndisStatus::INVALID_DATA,
        },
        _ => RndisStatus::NOT_SUPPORTED,
    }
}

fn number(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::super::control::tests::{initialized, traits};
    use super::*;

    fn ask(oid: u32) -> Vec<u8> {
        query(&initialized(), oid, &[], &traits(), 1500).expect("answered")
    }

    #[test]
    fn linux_start_up_questions_have_answers_of_the_expected_size() {
        assert_eq!(ask(GEN_MAXIMUM_FRAME_SIZE), 1500u32.to_le_bytes());
        assert_eq!(ask(PERMANENT_ADDRESS), traits().mac);
        assert_eq!(ask(GEN_MEDIA_CONNECT_STATUS), [0; 4]);
        assert_eq!(ask(GEN_LINK_SPEED).len(), 4);
        assert_eq!(ask(GEN_RECEIVE_SCALE_CAPABILITIES).len(), 18);
        assert_eq!(&ask(GEN_FRIENDLY_NAME)[..4], b"b\0u\0");
    }

    #[test]
    fn the_mtu_is_the_smaller_of_guest_and_backend() {
        let small = query(&initialized(), GEN_MAXIMUM_FRAME_SIZE, &[], &traits(), 1280);
        assert_eq!(small, Ok(1280u32.to_le_bytes().to_vec()));
        let large = query(&initialized(), GEN_MAXIMUM_FRAME_SIZE, &[], &traits(), 9000);
        assert_eq!(large, Ok(1500u32.to_le_bytes().to_vec()));
    }

    #[test]
    fn a_filter_of_three_bytes_is_invalid() {
        assert_eq!(
            set(
                &mut initialized(),
                GEN_CURRENT_PACKET_FILTER,
                &[1, 0, 0],
                &traits()
            ),
            RndisStatus::INVALID_DATA
        );
    }

    #[test]
    fn the_guest_may_not_change_its_permanent_address() {
        assert_eq!(
            set(&mut initialized(), 0x0001_021B, &[0; 64], &traits()),
            RndisStatus::NOT_SUPPORTED
        );
    }
}
