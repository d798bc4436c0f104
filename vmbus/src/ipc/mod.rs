//! The control protocol between our own processes.
//!
//! `SOCK_SEQPACKET` socket pairs, all made by the supervisor:
//!
//! ```text
//!   bulkhead (supervisor) ── SupervisorToServer / ServerToSupervisor ── device server      (fd 3 there)
//!            │
//!            ├── SupervisorToVcpu / VcpuToSupervisor ── bulkhead-vcpu                      (fd 3 there)
//!            │                                             │ VcpuToBus / BusToVcpu         (fd "bus" there)
//!            └── SupervisorToBus / BusToSupervisor ──── bulkhead-bus                       (fd 3 there)
//!                                                          │
//!   device server ── ServerToBus / BusToServer ──────────┘                               (fd "bus")
//! ```
//!
//! One datagram is one message: a serde enum encoded by [`codec`], at most [`codec::MAX_MESSAGE_BYTES`] long,
//! with at most [`socket::MAX_DESCRIPTORS`] descriptors beside it. The direction is in the type, so that a
//! decoder of one side cannot yield what only the other side may say. How many descriptors belong to a message
//! is a function of the message ([`messages::Message::descriptor_count`]); any other number is the sender's
//! fault.
//!
//! Every message is from a hostile peer until checked. This module checks that it decodes, whole and without
//! a rest, and that its descriptors are complete; it knows no more. Whether the *values* make sense (an id in
//! range, a message in turn) is checked where they are used: `channel::Port` in a device server, the bus in
//! `bulkhead-bus`, `bulkhead-vcpu`, the supervisor.
//!
//! Nobody waits. Sending never blocks: what the kernel does not take at once waits in a bounded queue, and a
//! peer that lets the queue run over loses its connection. Receiving returns "nothing now".
//!
//! [`hello`] says which version of all this is spoken; [`server_start`] is the part of a device server's
//! `main` that all of them share.
#![forbid(unsafe_code)]

pub mod codec;
pub mod hello;
pub mod messages;
pub mod named_fds;
pub mod server_start;
pub mod socket;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
mod wire_tests;

use nix::errno::Errno;

pub use codec::{DecodeError, EncodeError};
pub use messages::{
    BootPlan, BootSegment, BusToServer, BusToSupervisor, BusToVcpu, ExitCause, Message, OnReset, Populate,
    ServerToBus, ServerToSupervisor, SupervisorToBus, SupervisorToServer, SupervisorToVcpu, VcpuConfig,
    VcpuToBus, VcpuToSupervisor,
};
pub use socket::{SendError, Socket, pair};

/// Whether an error is just this: a peer has closed its end, or died.
pub fn is_end_of_peer(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(PeerFault::Eof))
        || matches!(error.downcast_ref(), Some(SendError::Disconnected))
}

/// What another process of ours did wrong. The reaction is always the same: drop the connection to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// The peer closed its end or died. The one variant that may be no misbehaviour at all.
    #[error("the peer closed the connection")]
    Eof,
    /// A datagram longer than [`codec::MAX_MESSAGE_BYTES`].
    #[error("a message is longer than {} bytes", codec::MAX_MESSAGE_BYTES)]
    MessageTooLong,
    /// More descriptors than [`socket::MAX_DESCRIPTORS`], or more than this process may hold.
    #[error("more descriptors came with a message than may be received")]
    DescriptorsTruncated,
    /// The number of descriptors does not match the message.
    #[error("{message} came with {received} descriptors instead of {expected}")]
    DescriptorCount {
        message: &'static str,
        expected: usize,
        received: usize,
    },
    /// The bytes are no message of the expected direction.
    #[error("not a message: {0}")]
    Malformed(#[from] codec::DecodeError),
    /// Both sides were built from different versions of the protocol.
    #[error("the peer speaks protocol {theirs}, this process {}", hello::PROTOCOL)]
    Protocol { theirs: u32 },
    /// The message is well formed, but must not come now.
    #[error("{message} came out of turn: {why}")]
    OutOfTurn {
        message: &'static str,
        why: &'static str,
    },
    /// A value in a message is outside of what the protocol allows.
    #[error("{what} is {value}, which is not allowed")]
    BadValue { what: &'static str, value: u64 },
    /// A message names something that does not exist.
    #[error("there is no {what} {id}")]
    Unknown { what: &'static str, id: u32 },
    /// A message would create something whose id is taken.
    #[error("{what} {id} exists already")]
    Duplicate { what: &'static str, id: u32 },
    /// More of something than is allowed at a time.
    #[error("more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },
    /// A descriptor that came with a message is not what it should be (size, seals, kind).
    #[error("the descriptor for {what} is unfit: {why}")]
    UnfitDescriptor { what: &'static str, why: String },
    /// Reading the socket failed for a reason that is not the peer's end.
    #[error("receive failed: {0}")]
    Receive(Errno),
    /// The peer does not take our messages any more.
    #[error("cannot send: {0}")]
    Send(#[from] SendError),
}
