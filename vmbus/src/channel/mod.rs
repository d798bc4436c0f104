//! What a device server holds of a VM: a [`Port`] to `bulkhead-bus`, and one [`Endpoint`] for each open channel.
//!
//! ```text
//!   bulkhead-bus ══ socket ══ Port ── PortEvent ──▶ the device's session
//!                                │ ChannelOpened             │ receive, take, complete, publish
//!                                ▼                           ▼
//!   guest ══ two rings in RAM ══ Endpoint: reader, writer, journal, kick, interrupt
//! ```
//!
//! # The loop of a server
//! ```text
//!   on a kick, after ChannelOpened, and after each completion of the backend:
//!     while endpoint.can_answer(bytes) && let Some(packet) = endpoint.receive(&mut buf)? {
//!         token = endpoint.take(kind, packet.transaction_id, &[what a replay needs])   or put_back() and stop
//!         …start the work; keep the token…
//!     }
//!     for each finished piece of work: endpoint.complete(token, answer)?
//!     if endpoint.prepare_sleep()? { do not sleep, go round again }
//! ```
//! `prepare_sleep` publishes everything. All completions that are at hand go out with one publication, and one
//! publication causes at most one interrupt: collect first, publish then.
//!
//! # Taking only what can be answered
//! A request leaves the ring only if there is a journal slot for it and room for its answer in the ring to the
//! guest. So a guest that does not read its completions stops its own requests, and nothing grows here.
//!
//! # Opening and re-attaching
//! There is one path. `OpenChannel` says whether the guest opened the channel just now. If not, the journal says
//! what is in flight, and [`Recovered`] hands it over as tokens. The device treats a recovered request as if it had
//! just been received. After `ChannelOpened` it looks at the ring whether or not a kick came.
//!
//! # Who writes what in guest memory
//! | word | by | when |
//! | --- | --- | --- |
//! | `to_host` read index, interrupt mask; `to_guest` write index, pending send bytes | [`Endpoint`] | as in `ring/` |
//! | event flag `relid` of the target VP | [`Endpoint`], atomically; the guest clears it | before each interrupt |
//!
//! # Blame
//! A ring or packet against the rules is a [`GuestFault`](crate::fault::GuestFault): the endpoint does not touch the
//! ring any more, every call repeats the fault, and the server reports the channel broken
//! ([`Port::channel_broken`]). A message against the rules is a [`PeerFault`](crate::ipc::PeerFault): the
//! server exits. Everything in a message is validated here as if the sender were hostile, even what
//! `bulkhead-bus` has validated before.
#![forbid(unsafe_code)]

#[cfg(test)]
mod crash_tests;
mod endpoint;
mod interrupt;
mod port;
#[cfg(test)]
mod tests;
mod token;

pub use crate::journal::MAX_CHANNELS;
pub use endpoint::{Endpoint, EndpointCounters};
pub(crate) use interrupt::flag_offset;
pub use port::{MAX_GPADL_PAGES, MAX_GPADLS, MAX_VPS, Port, PortError, PortEvent};
pub use token::{HeldToken, NotTaken, Recovered, RecoveredHeld, RecoveredRequest, Token};

/// Limit: a VP's event-flags page has 2048 flags for each SINT (TLFS section 11.9), 0 is not used by Linux.
pub const MAX_RELID: u32 = 2047;

/// The synthetic interrupt source that VMBus uses (`VMBUS_MESSAGE_SINT`, Linux 6.1 drivers/hv/hyperv_vmbus.h).
pub const VMBUS_SINT: u32 = 2;
