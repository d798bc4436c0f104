//! The messages, one enum for each direction. Their order of declaration is the wire format: add at the end,
//! and raise [`super::hello::PROTOCOL`] with every other change.
//!
//! Generations: the supervisor numbers the processes that serve one device 1, 2, 3, …. A message about a
//! generation that is not the present one is dropped and counted by its receiver.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use strum::IntoStaticStr;

use crate::mem::RamLayout;
use crate::wire::Guid;

/// What [`super::Socket`] can carry.
pub trait Message: Serialize + DeserializeOwned {
    /// The variant's name, for reports. Never contains a value.
    fn name(&self) -> &'static str;

    /// How many descriptors belong to this very message.
    fn descriptor_count(&self) -> usize {
        0
    }
}

/// Supervisor to device server, over the server's fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum SupervisorToServer {
    /// The first message. Comes with one descriptor for each entry of `fds`, in that order.
    Start {
        /// [`super::hello::PROTOCOL`] of the supervisor.
        protocol: u32,
        /// Number of this process among those that served this device; from 1.
        generation: u32,
        /// Name of the device in logs, for example `disk0`.
        name: String,
        /// The device crate's own configuration type, as JSON with unknown fields denied.
        config: String,
        /// What to log, for example `info` or `info,storvsp=debug`.
        log: String,
        /// What each descriptor is: `bus` (socket to `bulkhead-bus`), `journal` (sealed memfd), `recorder`
        /// (sealed memfd of [`crate::record`], optional), and the device's own (`disk`, `tap`, …). No name twice.
        fds: Vec<String>,
    },
    /// Stop at a packet boundary, answer with `Released` and exit with status 0. What was taken and not completed is
    /// the successor's.
    Stop,
    /// Answer with `Pong` and the same token. Proves that the server's loop turns.
    Ping { token: u64 },
    /// Answer with `Inspect`.
    Inspect,
}

/// Device server to supervisor, over the server's fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum ServerToSupervisor {
    /// The sandbox is complete and the server is about to say hello to `bulkhead-bus`.
    Ready {
        /// The sandbox's report, as JSON.
        report: String,
    },
    /// The server cannot serve and exits. One sentence for the operator.
    Failed { message: String },
    /// The answer to `Ping`.
    Pong { token: u64 },
    /// The answer to `Inspect`: `path = value` pairs.
    Inspect { entries: Vec<(String, String)> },
    /// Something that the operator may want to know. One sentence.
    Event { text: String },
    /// Guest memory is mapped, and everything is done that can be done before `Serve`.
    Warm,
    /// The answer to `Stop`, after which the process exits: it does not touch guest memory, rings, journal and back end
    /// any more, and none of its I/O is under way. From here on a successor may serve.
    Released,
}

/// Supervisor to `bulkhead-vcpu`, over its fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum SupervisorToVcpu {
    /// The first message. Comes with one descriptor for each entry of `fds`, in that order.
    Start {
        /// [`super::hello::PROTOCOL`] of the supervisor.
        protocol: u32,
        config: VcpuConfig,
        /// What each descriptor is: `kvm`, `bus` (socket to `bulkhead-bus`), `boot0`, `boot1`, … (files of the boot plan),
        /// `console-in`, `console-out`.
        fds: Vec<String>,
    },
    /// Let the vCPUs run.
    Run,
    /// Stop all vCPUs between two instructions. Repeating it changes nothing.
    Pause,
    /// Let them go on.
    Resume,
    /// Power-cycle the guest.
    Reset,
    /// Press the ACPI power button.
    PowerButton,
    /// End the VM now.
    Quit,
    /// Answer with `Inspect`.
    Inspect,
}

/// The machine, as far as `bulkhead-vcpu` knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuConfig {
    /// Virtual processors, 1 to 64.
    pub vcpus: u16,
    /// Guest RAM, a multiple of 2 MiB.
    pub memory_bytes: u64,
    pub boot: BootPlan,
    /// What to log, for example `info`.
    pub log: String,
    /// Whether to fault guest RAM in before the start.
    pub populate: Populate,
    /// What a reset by the guest does.
    pub on_reset: OnReset,
}

/// What guest memory, zero otherwise, and the boot processor hold at each power-on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPlan {
    /// To be copied in this order.
    pub segments: Vec<BootSegment>,
    /// Where each power-on puts [`Self::SEED_BYTES`] fresh random bytes: the guest has no disk noise and perhaps no
    /// RDRAND at that moment.
    pub seed_gpa: u64,
    /// First instruction, and the register that says where boot_params are.
    pub rip: u64,
    pub rsi: u64,
}

impl BootPlan {
    /// Length of the seed.
    pub const SEED_BYTES: usize = 48;
}

/// Part of a file that goes into guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSegment {
    /// Number of the file, in the order of the descriptors named `boot…`.
    pub file: u8,
    /// First byte in the file.
    pub offset: u64,
    /// Guest-physical address.
    pub gpa: u64,
    pub bytes: u64,
}

/// Whether to fault in guest RAM before the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Populate {
    /// Where huge pages for shared memory are not to be had and page faults are expensive.
    #[default]
    Auto,
    Never,
    Always,
}

/// What happens when the guest resets itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OnReset {
    /// It boots again.
    #[default]
    Reset,
    /// The VM ends.
    Exit,
}

/// `bulkhead-vcpu` to supervisor, over its fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum VcpuToSupervisor {
    /// The VM exists, the sandbox is complete. Devices and `Run` may come.
    Ready {
        /// The sandbox's report, as JSON.
        report: String,
    },
    /// The vCPUs run.
    Started,
    /// The VM cannot be started or go on; the process exits. One sentence for the operator.
    Failed { message: String },
    /// The guest switched itself off. `Exited` follows.
    GuestPowerOff,
    /// The guest reset itself, `count` times by now.
    GuestReset { count: u32 },
    /// The guest's kernel reported a crash (TLFS, guest crash enlightenment MSRs P0 to P4 and its text).
    GuestCrash {
        parameters: [u64; 5],
        text: Option<String>,
    },
    /// The VM is over; the process exits after this message.
    Exited { cause: ExitCause },
    /// The answer to `Inspect`: `path = value` pairs.
    Inspect { entries: Vec<(String, String)> },
}

/// Why a VM is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitCause {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, and the VM was started with [`OnReset::Exit`].
    Reset,
    /// The supervisor said `Quit`, or its socket is gone.
    Quit,
    /// The person at the console typed the escape.
    Console,
    /// The vCPU cannot go on; one sentence.
    Fault { message: String },
}

/// Supervisor to `bulkhead-bus`, over its fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum SupervisorToBus {
    /// The first message. Comes with one descriptor: the socket to `bulkhead-vcpu`.
    Start {
        /// [`super::hello::PROTOCOL`] of the supervisor.
        protocol: u32,
        /// What to log, for example `info`.
        log: String,
    },
    /// There is a device. Before `Run`: part of the machine at power-on; after it: hot-added. Comes with one
    /// descriptor: the socket to the first server of the device.
    AddDevice {
        /// The supervisor's number for the device; the key of all later messages about it.
        device: u32,
        /// Name of the device in logs.
        name: String,
        /// Class of the device: the interface GUID that the guest's driver binds to.
        interface: Guid,
        /// Which device of the class; must be stable over reboots and unique in the VM.
        instance: Guid,
        /// Most sub-channels that a server of this device may ask to be offered.
        max_sub_channels: u16,
    },
    /// A successor is there. Comes with one descriptor: the socket to it. While its predecessor is there, too, it waits: it
    /// is let serve by the `ServerGone` of that one. At most one waits.
    ServerAttached { device: u32, generation: u32 },
    /// The server process was reaped or has said `Released`, and its asynchronous I/O is over: nothing of it touches
    /// guest memory any more.
    ServerGone { device: u32, generation: u32 },
    /// Answer with `Inspect`.
    Inspect,
    /// Answer with `Pong`. Proves that the control plane's loop turns. Before the `Pong` stands again every `ServerMisbehaves`
    /// and `ServerSlow` of a server that is not told as gone: a supervisor that was killed may have read it and done nothing.
    Ping,
}

/// `bulkhead-bus` to supervisor, over its fd 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum BusToSupervisor {
    /// The sandbox is complete.
    Ready {
        /// The sandbox's report, as JSON.
        report: String,
    },
    /// The control plane cannot go on; the process exits. One sentence for the operator.
    Failed { message: String },
    /// The server broke the protocol and its connection was dropped: kill it, and start another. May come again until
    /// `ServerGone` was said, see `Ping`.
    ServerMisbehaves {
        device: u32,
        generation: u32,
        why: String,
    },
    /// The server owes an acknowledgement that the guest waits for, for longer than the deadline: kill it, and
    /// say `ServerGone`. May come again, too.
    ServerSlow {
        device: u32,
        generation: u32,
        waiting_for: String,
    },
    /// The answer to `Inspect`: `path = value` pairs.
    Inspect { entries: Vec<(String, String)> },
    /// The answer to `Ping`.
    Pong,
}

/// `bulkhead-vcpu` to `bulkhead-bus`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum VcpuToBus {
    /// The first message. Comes with two descriptors, which `bulkhead-bus` maps not itself but hands on to servers: see
    /// [`BusToServer::Attach`].
    Machine {
        /// [`super::hello::PROTOCOL`] of `bulkhead-vcpu`.
        protocol: u32,
        ram: RamLayout,
        /// Virtual processors of the VM.
        vp_count: u16,
    },
    /// The guest's HvPostMessage to one of the connections of VMBus. Answered by `Posted`, before which stands what follows
    /// from it at once.
    Post {
        connection_id: u32,
        message_type: u32,
        /// At most 240 bytes.
        payload: Vec<u8>,
    },
    /// The processors stand still for a reset: let every server drop its channels and pages, then say `QuiesceDone`.
    Reset { token: u64 },
}

/// `bulkhead-bus` to `bulkhead-vcpu`. Carried out in order: a signal is bound before the guest hears that its channel is
/// open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum BusToVcpu {
    /// The oldest `Post` that is not answered has been dealt with.
    Posted,
    /// Queue a channel message of at most 240 bytes for SINT 2 of a VP.
    PostToGuest { vp: u16, payload: Vec<u8> },
    /// Let the guest's HvSignalEvent for the channel (a relid) write the eventfd that comes with this.
    BindSignal { channel: u32 },
    /// Forget that eventfd.
    UnbindSignal { channel: u32 },
    /// Let the eventfd that comes with this raise SINT 2 of `vp`.
    BindInterrupt { channel: u32, vp: u16 },
    /// From now on it raises SINT 2 of this `vp`, and no other.
    RebindInterrupt { channel: u32, vp: u16 },
    /// It raises nothing any more, whoever still holds it.
    UnbindInterrupt { channel: u32 },
    /// Set the channel's event flag on `vp` and raise SINT 2 there, once.
    RaiseInterrupt { channel: u32, vp: u16 },
    /// Every server has let go of the guest's memory: the reset with this token may go on.
    QuiesceDone { token: u64 },
}

/// Device server to `bulkhead-bus`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum ServerToBus {
    /// The first message. `Attach` and all that is open follows.
    Hello {
        /// [`super::hello::PROTOCOL`] of the server.
        protocol: u32,
        /// From the supervisor's `Start`.
        generation: u32,
    },
    /// Offer the sub-channels with index 1 to `count` under the primary. Repeating it changes nothing.
    OfferSubChannels { count: u16 },
    /// The answer to `CloseChannel`: the server touches the rings of that opening no more.
    ChannelClosed {
        /// relid.
        channel: u32,
        open_epoch: u32,
    },
    /// The answer to `TeardownGpadl`: the server touches these pages no more (unless another GPADL has them).
    GpadlReleased { gpadl: u32 },
    /// The answer to `Quiesce`: the server has no channel and no GPADL, and touches no guest memory.
    Quiesced { token: u64 },
    /// The guest broke the rules of this ring or protocol: the server does not serve this opening any more.
    ChannelBroken {
        /// relid.
        channel: u32,
        open_epoch: u32,
        /// One sentence for the log.
        why: String,
    },
}

/// `bulkhead-bus` to device server.
///
/// The order for any server: `Attach`; `Serve`, at once or when the predecessor is gone; every `Gpadl`, every
/// `OpenChannel`; then live updates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
pub enum BusToServer {
    /// The first message. Comes with two descriptors: guest RAM (sealed memfd) and the event flags (sealed
    /// memfd with one 4 KiB SIEFP page for each VP; the flags of SINT n are at 256 × n, TLFS section 11.9).
    Attach {
        /// [`super::hello::PROTOCOL`] of `bulkhead-vcpu`.
        protocol: u32,
        ram: RamLayout,
        /// Virtual processors of the VM.
        vp_count: u16,
    },
    /// A complete GPADL.
    Gpadl {
        /// relid of the channel for which the guest made it.
        channel: u32,
        gpadl: u32,
        /// Guest page numbers, in the order of the area.
        pages: Vec<u64>,
        /// Length of the area.
        byte_count: u32,
        /// Where in the first page it begins.
        byte_offset: u32,
    },
    /// The guest has the channel open. Comes with two descriptors: the kick (guest to server) and the
    /// interrupt (server to guest), both eventfds that outlive the server.
    OpenChannel {
        /// relid; also the number of the event flag.
        channel: u32,
        /// 0: the primary.
        sub_index: u16,
        /// Counts the openings of this channel, so that a late acknowledgement of an earlier one is known as
        /// such.
        open_epoch: u32,
        /// The GPADL that holds both rings.
        ring_gpadl: u32,
        /// First page of the `to_guest` ring in that GPADL.
        downstream_page_offset: u32,
        /// The VP whose flag is set.
        target_vp: u16,
        /// The guest opened it just now. Else it was open when this server attached, and its journal says
        /// what is in flight.
        fresh: bool,
    },
    /// From now on, set the flag of another VP.
    Retarget {
        channel: u32,
        open_epoch: u32,
        target_vp: u16,
    },
    /// The guest closed the channel. Answer with `ChannelClosed`.
    CloseChannel { channel: u32, open_epoch: u32 },
    /// The guest wants these pages back. Answer with `GpadlReleased`.
    TeardownGpadl { gpadl: u32 },
    /// The guest resets or unloads: drop all channels and GPADLs, then answer with `Quiesced`.
    Quiesce { token: u64 },
    /// There is no predecessor any more: journal, rings and back end are this server's. Every `Gpadl` and every
    /// `OpenChannel` follows, and then `HandedOver`.
    Serve,
    /// These were all the channels that are open: what a predecessor had open besides, the guest has closed since.
    HandedOver,
}

impl Message for SupervisorToServer {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::Start { fds, .. } => fds.len(),
            Self::Stop | Self::Ping { .. } | Self::Inspect => 0,
        }
    }
}

impl Message for ServerToSupervisor {
    fn name(&self) -> &'static str {
        self.into()
    }
}

impl Message for SupervisorToVcpu {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::Start { fds, .. } => fds.len(),
            Self::Run
            | Self::Pause
            | Self::Resume
            | Self::Reset
            | Self::PowerButton
            | Self::Quit
            | Self::Inspect => 0,
        }
    }
}

impl Message for VcpuToSupervisor {
    fn name(&self) -> &'static str {
        self.into()
    }
}

impl Message for SupervisorToBus {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::Start { .. } | Self::AddDevice { .. } | Self::ServerAttached { .. } => 1,
            Self::ServerGone { .. } | Self::Inspect | Self::Ping => 0,
        }
    }
}

impl Message for BusToSupervisor {
    fn name(&self) -> &'static str {
        self.into()
    }
}

impl Message for VcpuToBus {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::Machine { .. } => 2,
            Self::Post { .. } | Self::Reset { .. } => 0,
        }
    }
}

impl Message for BusToVcpu {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::BindSignal { .. } | Self::BindInterrupt { .. } => 1,
            Self::Posted
            | Self::PostToGuest { .. }
            | Self::UnbindSignal { .. }
            | Self::RebindInterrupt { .. }
            | Self::UnbindInterrupt { .. }
            | Self::RaiseInterrupt { .. }
            | Self::QuiesceDone { .. } => 0,
        }
    }
}

impl Message for ServerToBus {
    fn name(&self) -> &'static str {
        self.into()
    }
}

impl Message for BusToServer {
    fn name(&self) -> &'static str {
        self.into()
    }

    fn descriptor_count(&self) -> usize {
        match self {
            Self::Attach { .. } | Self::OpenChannel { .. } => 2,
            Self::Gpadl { .. }
            | Self::Retarget { .. }
            | Self::CloseChannel { .. }
            | Self::TeardownGpadl { .. }
            | Self::Quiesce { .. }
            | Self::Serve
            | Self::HandedOver => 0,
        }
    }
}
