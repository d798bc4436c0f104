#![forbid(unsafe_code)]
//! What the control plane wants done, as data.
//!
//! [`super::Bus`] decides; the shell ([`crate::control_plane`]) does. A list of actions is executed in order and as a whole: the
//! order is part of the protocol (a signal is bound before the guest is told that its channel is open; a server
//! hears of a GPADL before it hears of the channel whose ring lies in it).
//!
//! Descriptors are not named here. Which ones travel with a message follows from the message:
//! `Attach` takes the guest RAM memfd and the SIEFP memfd, `OpenChannel` takes the kick and the interrupt eventfd
//! of that channel, all others take none.

use std::fmt;

use vmbus::ipc::messages::BusToServer;
pub use vmbus::wire::ChannelId;
use vmbus::wire::HostToGuest;

/// A device of this VM: its index in the order in which the supervisor added it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// Names a deadline that the shell keeps for the bus. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeadlineId(pub u64);

/// The result of HvPostMessage, for the guest's RAX (TLFS 6.0b appendix B, hypercall status codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostStatus {
    /// Taken (which says nothing about the answer).
    Success,
    /// No such message port.
    InvalidConnectionId,
}

impl PostStatus {
    /// The 16-bit status code.
    pub fn code(self) -> u16 {
        match self {
            PostStatus::Success => 0x00,
            PostStatus::InvalidConnectionId => 0x12,
        }
    }
}

/// One thing for the shell to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Queue a channel message for SINT 2 of a VP. `vp` is below the VP count.
    PostToGuest { vp: u16, message: HostToGuest },
    /// Make a fresh kick eventfd for the channel and let the guest's HvSignalEvent for it write it.
    /// The channel has no kick at this moment.
    BindSignal { channel: ChannelId },
    /// Drop the channel's kick: no signal reaches a server through it any more.
    UnbindSignal { channel: ChannelId },
    /// Make a fresh interrupt eventfd for the channel and let it raise SINT 2 of `vp`.
    BindInterrupt { channel: ChannelId, vp: u16 },
    /// From now on the channel's interrupt eventfd raises SINT 2 of `vp`, and no other.
    RebindInterrupt { channel: ChannelId, vp: u16 },
    /// Drop the channel's interrupt eventfd: whoever still holds it can no longer interrupt the guest.
    UnbindInterrupt { channel: ChannelId },
    /// Set the channel's event flag on `vp` and raise SINT 2 there, once. A spurious one is harmless.
    RaiseInterrupt { channel: ChannelId, vp: u16 },
    /// Send to the server of that generation; if the socket refuses, call [`super::Bus::server_lost`].
    SendToServer {
        device: DeviceId,
        generation: u32,
        message: BusToServer,
    },
    /// Call [`super::Bus::on_deadline`] with `id` after `ms` milliseconds, unless cleared before.
    SetDeadline { id: DeadlineId, ms: u32 },
    /// Forget the deadline. Clearing one that has just fired is harmless.
    ClearDeadline { id: DeadlineId },
    /// An acknowledgement is overdue: ask the supervisor to end this server.
    ReportSlow {
        device: DeviceId,
        generation: u32,
        waiting_for: String,
    },
    /// The server broke the protocol and is not listened to any more: ask the supervisor to replace it.
    Misbehaves {
        device: DeviceId,
        generation: u32,
        why: String,
    },
    /// Every server has let go of the guest's memory: the reset that was asked for with this token may go on.
    QuiesceDone { token: u64 },
    /// A line for the log. Already limited in rate: print it.
    Log { level: LogLevel, text: String },
}

/// See the log levels of the house: a guest or server that misbehaves is a warning, channel life is information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Warn,
    Info,
    Debug,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
