#![forbid(unsafe_code)]
//! From the description of a VM to its processes: who runs, as what, with which device. Pure.
//!
//! A *room* is what one device needs: a program, a configuration, a backend, and the identity under which the guest
//! knows it. All that a room contains is decided here once; each server that ever lives in it gets the same.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmbus::ipc::{BootPlan, VcpuConfig};
use vmbus::wire::Guid;

use crate::spec::{CacheMode, DiskSource, DiskSpec, Mac, Name, NetBackend, NetSpec, VmSpec};

/// Linux 6.1 include/linux/hyperv.h HV_SCSI_GUID: ba6163d9-04a1-4d29-b605-72e2ffb1dc7f, in wire order.
const SCSI_INTERFACE: Guid = Guid([
    0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d, 0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f,
]);

/// Linux 6.1 include/linux/hyperv.h HV_NIC_GUID: f8615163-df3e-46c5-913f-f2d2f965ed0e, in wire order.
const NIC_INTERFACE: Guid = Guid([
    0x63, 0x51, 0x61, 0xf8, 0x3e, 0xdf, 0xc5, 0x46, 0x91, 0x3f, 0xf2, 0xd2, 0xf9, 0x65, 0xed, 0x0e,
]);

/// Limit: sub-channels of a disk. Linux asks for one for each four processors.
const MAX_DISK_SUB_CHANNELS: u16 = 15;

/// Limit: queues of a network interface that is not told how many. What Linux 6.1 netvsc takes by itself.
const DEFAULT_QUEUES: u16 = 8;

/// All device servers of a VM.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rooms: Vec<Room>,
}

/// What a device needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Room {
    /// The device's number between supervisor and `bulkhead-bus`.
    pub device: u32,
    /// In logs and reports, for example `disk0`.
    pub name: String,
    pub program: Program,
    pub interface: Guid,
    pub instance: Guid,
    pub max_sub_channels: u16,
    /// JSON, in the program's own format.
    pub config: String,
    pub backend: Backend,
    /// A second server is kept waiting.
    pub standby: bool,
}

/// A program that serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    Block,
    Net,
}

/// What a server stores to or sends through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    File { path: PathBuf, read_only: bool },
    Memory { bytes: u64 },
    Tap { name: String },
    TapFd(i32),
    Passt,
}

impl Program {
    /// Its file beside `bulkhead`.
    pub fn file_name(self) -> &'static str {
        match self {
            Program::Block => "bulkhead-block",
            Program::Net => "bulkhead-net",
        }
    }

    /// Its sandbox.
    pub fn profile(self) -> sandbox::Profile {
        match self {
            Program::Block => sandbox::profile::block(),
            Program::Net => sandbox::profile::net(),
        }
    }

    /// For a person and for scripts.
    pub fn kind(self) -> &'static str {
        match self {
            Program::Block => "block",
            Program::Net => "net",
        }
    }
}

impl Backend {
    /// The descriptor's name in the server's `Start`, as its configuration has it.
    pub fn fd_name(&self) -> &'static str {
        match self {
            Backend::File { .. } | Backend::Memory { .. } => DISK_FD,
            Backend::Tap { .. } | Backend::TapFd(_) | Backend::Passt => NET_FD,
        }
    }
}

const DISK_FD: &str = "disk";
const NET_FD: &str = "net";

/// The configuration of `bulkhead-block`.
#[derive(Serialize)]
struct ControllerConfig<'a> {
    instance: String,
    disks: [DiskConfig<'a>; 1],
    max_sub_channels: u16,
}

#[derive(Serialize)]
struct DiskConfig<'a> {
    lun: u8,
    fd: &'a str,
    read_only: bool,
    kind: &'a str,
    bytes: Option<u64>,
    serial: Option<&'a str>,
    cache: CacheMode,
    direct: bool,
}

/// The configuration of `bulkhead-net`.
#[derive(Serialize)]
struct NicConfig<'a> {
    mac: String,
    backend: &'a str,
    fd: &'a str,
    mtu: u16,
    max_queues: u16,
}

/// Draws up the plan. Disks come before network interfaces, each in the order in which they were given.
pub fn plan(spec: &VmSpec) -> Plan {
    let mut rooms = Vec::new();
    for (index, disk) in spec.disks.iter().enumerate() {
        rooms.push(disk_room(spec, index, disk, number(rooms.len())));
    }
    for (index, net) in spec.nets.iter().enumerate() {
        rooms.push(net_room(spec, index, net, number(rooms.len())));
    }
    Plan { rooms }
}

/// What `bulkhead-vcpu` is to be.
pub fn vcpu(spec: &VmSpec, boot: BootPlan) -> VcpuConfig {
    VcpuConfig {
        vcpus: spec.vcpus.get(),
        memory_bytes: spec.memory.0,
        boot,
        log: spec.log.clone(),
        populate: spec.populate,
        on_reset: spec.on_reset,
    }
}

fn number(length: usize) -> u32 {
    u32::try_from(length).expect("a spec has at most 64 devices")
}

fn disk_room(spec: &VmSpec, index: usize, disk: &DiskSpec, device: u32) -> Room {
    let instance = instance(&spec.name, "disk", index);
    let max_sub_channels = (spec.vcpus.get() - 1).min(MAX_DISK_SUB_CHANNELS);
    let (kind, backend) = match &disk.source {
        DiskSource::Path(path) => (
            "file",
            Backend::File {
                path: path.clone(),
                read_only: disk.read_only,
            },
        ),
        DiskSource::Memory(size) => ("memory", Backend::Memory { bytes: size.0 }),
    };
    let config = ControllerConfig {
        instance: instance.to_string(),
        disks: [DiskConfig {
            lun: 0,
            fd: DISK_FD,
            read_only: disk.read_only,
            kind,
            bytes: None,
            serial: disk.serial.as_deref(),
            cache: disk.cache,
            direct: disk.direct,
        }],
        max_sub_channels,
    };
    Room {
        device,
        name: format!("disk{index}"),
        program: Program::Block,
        interface: SCSI_INTERFACE,
        instance,
        max_sub_channels,
        config: to_json(&config),
        backend,
        standby: disk.standby,
    }
}

fn net_room(spec: &VmSpec, index: usize, net: &NetSpec, device: u32) -> Room {
    let max_queues = net.queues.unwrap_or_else(|| spec.vcpus.get().min(DEFAULT_QUEUES));
    let (kind, backend) = match &net.backend {
        NetBackend::Tap(name) => ("tap", Backend::Tap { name: name.clone() }),
        NetBackend::TapFd(fd) => ("tap", Backend::TapFd(*fd)),
        NetBackend::User => ("stream", Backend::Passt),
    };
    let config = NicConfig {
        mac: net.mac.unwrap_or_else(|| mac(&spec.name, index)).to_string(),
        backend: kind,
        fd: NET_FD,
        mtu: net.mtu,
        max_queues,
    };
    Room {
        device,
        name: format!("net{index}"),
        program: Program::Net,
        interface: NIC_INTERFACE,
        instance: instance(&spec.name, "net", index),
        max_sub_channels: max_queues - 1,
        config: to_json(&config),
        backend,
        standby: net.standby,
    }
}

fn to_json(config: &impl Serialize) -> String {
    serde_json::to_string(config).expect("text and numbers always have a JSON form")
}

/// An instance GUID that stays the same for the same device of a VM of the same name.
fn instance(name: &Name, kind: &str, index: usize) -> Guid {
    let mut bytes = [0; 16];
    let (first, second) = bytes.split_at_mut(8);
    first.copy_from_slice(&hash(name, kind, index, 1).to_le_bytes());
    second.copy_from_slice(&hash(name, kind, index, 2).to_le_bytes());
    Guid(bytes)
}

/// A MAC address that stays the same likewise. 52:54:00 is the locally administered prefix that virtual machines use.
fn mac(name: &Name, index: usize) -> Mac {
    let [a, b, c, ..] = hash(name, "mac", index, 3).to_le_bytes();
    Mac([0x52, 0x54, 0x00, a, b, c])
}

/// 64-bit FNV-1a (RFC 9923), ended by the mixing steps of SplitMix64 so that near names give far numbers. Not for secrets:
/// it only has to stay what it is.
fn hash(name: &Name, kind: &str, index: usize, salt: u64) -> u64 {
    let text = format!("{name}/{kind}/{index}/{salt}");
    let folded = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mixed = (folded ^ (folded >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Draft;

    fn planned(vcpus: i64, disks: &[&str], nets: &[&str]) -> Plan {
        let draft = Draft {
            kernel: Some("vmlinuz".into()),
            vcpus: Some(vcpus.try_into().expect("a number of processors")),
            disks: disks.iter().map(|disk| disk.parse().expect("a disk")).collect(),
            nets: nets
                .iter()
                .map(|net| net.parse().expect("an interface"))
                .collect(),
            ..Draft::default()
        };
        plan(&draft.complete("vm".parse().expect("a name")).expect("complete"))
    }

    #[test]
    fn each_device_has_a_room_of_its_own() {
        let plan = planned(
            4,
            &["a.img", "memory=64M,readonly,serial=S"],
            &["user", "tap=t0,queues=2"],
        );
        let names: Vec<_> = plan
            .rooms
            .iter()
            .map(|room| (room.device, room.name.as_str()))
            .collect();
        assert_eq!(names, [(0, "disk0"), (1, "disk1"), (2, "net0"), (3, "net1")]);
        let channels: Vec<_> = plan.rooms.iter().map(|room| room.max_sub_channels).collect();
        assert_eq!(channels, [3, 3, 3, 1]);
        let instances: std::collections::BTreeSet<_> =
            plan.rooms.iter().map(|room| room.instance.0).collect();
        assert_eq!(instances.len(), 4);
    }

    #[test]
    fn one_processor_needs_no_sub_channels() {
        let plan = planned(1, &["a.img"], &["user"]);
        assert!(plan.rooms.iter().all(|room| room.max_sub_channels == 0));
    }

    #[test]
    fn configurations_are_what_the_programs_read() {
        let plan = planned(
            2,
            &["memory=64M,readonly,serial=S"],
            &["user,mac=52:54:00:00:00:01"],
        );
        let block: serde_json::Value = serde_json::from_str(&plan.rooms[0].config).expect("JSON");
        let disk = &block["disks"][0];
        assert_eq!(
            (
                disk["fd"].as_str(),
                disk["kind"].as_str(),
                disk["serial"].as_str(),
                disk["cache"].as_str()
            ),
            (Some("disk"), Some("memory"), Some("S"), Some("writeback"))
        );
        assert_eq!(
            (&disk["read_only"], &disk["direct"]),
            (&true.into(), &false.into())
        );
        assert_eq!(block["instance"], plan.rooms[0].instance.to_string());
        assert_eq!(
            plan.rooms[1].config,
            r#"{"mac":"52:54:00:00:00:01","backend":"stream","fd":"net","mtu":1500,"max_queues":2}"#
        );
    }

    #[test]
    fn what_the_guest_recognises_a_device_by_never_changes() {
        let plan = planned(1, &["a.img"], &["user"]);
        assert_eq!(
            plan.rooms[0].interface.to_string(),
            "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"
        );
        assert_eq!(
            plan.rooms[1].interface.to_string(),
            "f8615163-df3e-46c5-913f-f2d2f965ed0e"
        );
        let again = planned(8, &["b.img"], &["tap=x"]);
        assert_eq!(plan.rooms[0].instance, again.rooms[0].instance);
        let mac_of = |plan: &Plan| {
            let config: serde_json::Value = serde_json::from_str(&plan.rooms[1].config).expect("JSON");
            config["mac"].as_str().map(str::to_owned)
        };
        assert_eq!(mac_of(&plan), mac_of(&again));
        assert_eq!(
            hash(&"vm".parse().expect("a name"), "mac", 0, 3),
            0xd55f396be2c60a3f
        );
    }
}
