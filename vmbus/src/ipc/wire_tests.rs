//! The bytes of messages, and what happens to bytes that are no messages.
#![forbid(unsafe_code)]

use std::fmt::Debug;

use proptest::prelude::*;

use super::codec::{self, MAX_MESSAGE_BYTES};
use super::*;
use crate::mem::RamLayout;
use crate::wire::Guid;

/// One message of each variant of a direction that device servers and `bulkhead-bus` exchange.
fn bus_to_server() -> Vec<BusToServer> {
    vec![
        BusToServer::Attach {
            protocol: 1,
            ram: RamLayout::for_size(4 << 30),
            vp_count: 4,
        },
        BusToServer::Gpadl {
            channel: 5,
            gpadl: 0xE1E10,
            pages: vec![7, 9],
            byte_count: 8192,
            byte_offset: 0,
        },
        BusToServer::OpenChannel {
            channel: 5,
            sub_index: 0,
            open_epoch: 3,
            ring_gpadl: 0xE1E10,
            downstream_page_offset: 1,
            target_vp: 2,
            fresh: true,
        },
        BusToServer::Retarget {
            channel: 5,
            open_epoch: 3,
            target_vp: 1,
        },
        BusToServer::CloseChannel {
            channel: 5,
            open_epoch: 3,
        },
        BusToServer::TeardownGpadl { gpadl: 0xE1E10 },
        BusToServer::Quiesce {
            token: 0x1122_3344_5566_7788,
        },
        BusToServer::Serve,
        BusToServer::HandedOver,
    ]
}

fn server_to_bus() -> Vec<ServerToBus> {
    vec![
        ServerToBus::Hello {
            protocol: 1,
            generation: 2,
        },
        ServerToBus::OfferSubChannels { count: 3 },
        ServerToBus::ChannelClosed {
            channel: 5,
            open_epoch: 3,
        },
        ServerToBus::GpadlReleased { gpadl: 0xE1E10 },
        ServerToBus::Quiesced { token: 9 },
        ServerToBus::ChannelBroken {
            channel: 5,
            open_epoch: 3,
            why: "index".to_owned(),
        },
    ]
}

fn server_to_supervisor() -> Vec<ServerToSupervisor> {
    vec![
        ServerToSupervisor::Ready {
            report: "{}".to_owned(),
        },
        ServerToSupervisor::Failed {
            message: "no disk".to_owned(),
        },
        ServerToSupervisor::Pong { token: 1 },
        ServerToSupervisor::Inspect {
            entries: vec![("a".to_owned(), "b".to_owned())],
        },
        ServerToSupervisor::Event {
            text: "warm".to_owned(),
        },
        ServerToSupervisor::Warm,
        ServerToSupervisor::Released,
    ]
}

fn supervisor_to_server() -> Vec<SupervisorToServer> {
    vec![
        SupervisorToServer::Start {
            protocol: 1,
            generation: 1,
            name: "disk0".to_owned(),
            config: "{}".to_owned(),
            log: "info".to_owned(),
            fds: vec!["bus".to_owned(), "journal".to_owned()],
        },
        SupervisorToServer::Stop,
        SupervisorToServer::Ping { token: 1 },
        SupervisorToServer::Inspect,
    ]
}

fn supervisor_to_vcpu() -> Vec<SupervisorToVcpu> {
    let config = VcpuConfig {
        vcpus: 2,
        memory_bytes: 1 << 30,
        boot: BootPlan {
            segments: vec![BootSegment {
                file: 1,
                offset: 512,
                gpa: 1 << 20,
                bytes: 4096,
            }],
            seed_gpa: 0x8010,
            rip: 0x100_0200,
            rsi: 0x7000,
        },
        log: "info".to_owned(),
        populate: Populate::Never,
        on_reset: OnReset::Reset,
    };
    vec![
        SupervisorToVcpu::Start {
            protocol: 1,
            config,
            fds: vec!["kvm".to_owned()],
        },
        SupervisorToVcpu::Run,
        SupervisorToVcpu::Quit,
    ]
}

fn supervisor_to_bus() -> Vec<SupervisorToBus> {
    vec![
        SupervisorToBus::Start {
            protocol: 1,
            log: "info".to_owned(),
        },
        SupervisorToBus::AddDevice {
            device: 0,
            name: "disk0".to_owned(),
            interface: Guid::from_fields(1, 2, 3, [4; 8]),
            instance: Guid::ZERO,
            max_sub_channels: 3,
        },
        SupervisorToBus::ServerAttached {
            device: 0,
            generation: 2,
        },
        SupervisorToBus::ServerGone {
            device: 0,
            generation: 1,
        },
        SupervisorToBus::Inspect,
        SupervisorToBus::Ping,
    ]
}

fn vcpu_to_bus() -> Vec<VcpuToBus> {
    vec![
        VcpuToBus::Machine {
            protocol: 1,
            ram: RamLayout::for_size(4 << 30),
            vp_count: 4,
        },
        VcpuToBus::Post {
            connection_id: 4,
            message_type: 1,
            payload: vec![14, 0, 0, 0],
        },
        VcpuToBus::Reset { token: 1 },
    ]
}

fn bus_to_vcpu() -> Vec<BusToVcpu> {
    let (channel, vp) = (5, 2);
    vec![
        BusToVcpu::Posted,
        BusToVcpu::PostToGuest {
            vp,
            payload: vec![15, 0, 0, 0],
        },
        BusToVcpu::BindSignal { channel },
        BusToVcpu::UnbindSignal { channel },
        BusToVcpu::BindInterrupt { channel, vp },
        BusToVcpu::RebindInterrupt { channel, vp },
        BusToVcpu::UnbindInterrupt { channel },
        BusToVcpu::RaiseInterrupt { channel, vp },
        BusToVcpu::QuiesceDone { token: 9 },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn messages_have_these_bytes() {
    // The variant as u32; then each field at its width; a sequence as a u64 length and its elements.
    let golden = [
        "00000000 01000000 0200000000000000 \
         0000000000000000 000000c000000000 0000000000000000 \
         0000000001000000 0000004000000000 000000c000000000 0400",
        "01000000 05000000 101e0e00 0200000000000000 0700000000000000 0900000000000000 00200000 00000000",
        "02000000 05000000 0000 03000000 101e0e00 01000000 0200 01",
        "03000000 05000000 03000000 0100",
        "04000000 05000000 03000000",
        "05000000 101e0e00",
        "06000000 8877665544332211",
        "07000000",
    ];
    for (message, golden) in bus_to_server().iter().zip(golden) {
        assert_eq!(
            hex(&codec::encode(message).expect("encodes")),
            golden.replace(' ', ""),
            "{message:?}"
        );
    }
    let broken = codec::encode(&server_to_bus()[5]).expect("encodes");
    assert_eq!(hex(&broken), "0500000005000000030000000500000000000000696e646578");
    for (number, message) in server_to_supervisor().iter().enumerate() {
        let bytes = codec::encode(message).expect("encodes");
        assert_eq!(bytes[..4], [number as u8, 0, 0, 0], "{message:?}");
    }
    assert_eq!(
        codec::encode(&ServerToSupervisor::Released)
            .expect("encodes")
            .len(),
        4
    );
    let guid = codec::encode(&Guid::from_fields(1, 2, 3, [4; 8])).expect("encodes");
    assert_eq!(hex(&guid), "01000000020003000404040404040404");
}

/// Decoding any damaged form of a message gives an error or another message, and encodes back to what it was.
fn damage<M: Message + Debug + PartialEq>(messages: &[M]) {
    for message in messages {
        let bytes = codec::encode(message).expect("encodes");
        assert_eq!(codec::decode::<M>(&bytes).as_ref(), Ok(message));
        for length in 0..bytes.len() {
            assert!(
                codec::decode::<M>(&bytes[..length]).is_err(),
                "{message:?} cut to {length} bytes"
            );
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(
            codec::decode::<M>(&longer).is_err(),
            "{message:?} with a byte behind it"
        );
        let mut damaged = bytes.clone();
        for position in 0..bytes.len() {
            for value in 0..=u8::MAX {
                damaged[position] = value;
                if let Ok(other) = codec::decode::<M>(&damaged) {
                    assert_eq!(codec::encode(&other).expect("encodes"), damaged);
                }
            }
            damaged[position] = bytes[position];
        }
    }
}

#[test]
fn every_prefix_and_every_damaged_byte_is_refused_or_means_something_else() {
    damage(&bus_to_server());
    damage(&server_to_bus());
    damage(&supervisor_to_server());
    damage(&server_to_supervisor());
    damage(&supervisor_to_vcpu());
    damage(&supervisor_to_bus());
    damage(&vcpu_to_bus());
    damage(&bus_to_vcpu());
}

#[test]
fn a_claimed_length_is_not_allocated() {
    // A GPADL with 2^60 pages in a message of 24 bytes: an allocation of that size would abort the process.
    let mut bytes = codec::encode(&bus_to_server()[1]).expect("encodes");
    bytes[12..20].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(codec::decode::<BusToServer>(&bytes).is_err());
}

#[test]
fn a_message_longer_than_the_limit_is_not_encoded() {
    let message = ServerToSupervisor::Event {
        text: "x".repeat(MAX_MESSAGE_BYTES),
    };
    assert!(codec::encode(&message).is_err());
    let largest_gpadl = BusToServer::Gpadl {
        channel: 1,
        gpadl: 1,
        pages: vec![0; 8190],
        byte_count: 0,
        byte_offset: 0,
    };
    assert!(codec::encode(&largest_gpadl).is_ok());
}

proptest! {
    #[test]
    fn any_bytes_decode_to_an_error_or_to_what_encodes_back(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(message) = codec::decode::<BusToServer>(&bytes) {
            prop_assert_eq!(codec::encode(&message).expect("encodes"), bytes.clone());
        }
        if let Ok(message) = codec::decode::<ServerToBus>(&bytes) {
            prop_assert_eq!(codec::encode(&message).expect("encodes"), bytes.clone());
        }
        if let Ok(message) = codec::decode::<SupervisorToServer>(&bytes) {
            prop_assert_eq!(codec::encode(&message).expect("encodes"), bytes.clone());
        }
        if let Ok(message) = codec::decode::<BusToVcpu>(&bytes) {
            prop_assert_eq!(codec::encode(&message).expect("encodes"), bytes);
        }
    }
}
