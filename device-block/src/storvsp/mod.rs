//! storvsp: SCSI over a VMBus channel, the protocol that Linux's `hv_storvsc` and Windows's `storvsc` speak.
//!
//! The guest sends 64-byte packets; each wants exactly one answer of the same size, on the channel on which
//! it came. On the primary channel a short conversation comes first:
//!
//! ```text
//! guest                          us
//! BEGIN_INITIALIZATION      ->   COMPLETE_IO
//! QUERY_PROTOCOL_VERSION    ->   COMPLETE_IO, status 0, or a refusal and the guest asks for an older one
//! QUERY_PROPERTIES          ->   COMPLETE_IO + ChannelProperties
//! END_INITIALIZATION        ->   COMPLETE_IO              (Linux; Windows asks for sub-channels before it)
//! CREATE_SUB_CHANNELS(n)    ->   COMPLETE_IO, then n sub-channels are offered
//! EXECUTE_SRB ...           ->   COMPLETE_IO + ScsiRequest with status and sense, in any order
//! ```
//!
//! Sub-channels have no conversation: they carry EXECUTE_SRB at once.
//!
//! - [`wire`] is the layout of the bytes: the only file that reads a packet's bytes.
//! - [`session`] is the conversation as a state machine without any I/O; it can be saved and continued by a
//!   successor of this process.
//! - [`request`] is what is kept of a packet in the journal, and how a SCSI result becomes a completion.
//!
//! Not checked here: that packets are well formed as VMBus packets and that page numbers lie in guest RAM
//! (`vmbus::wire`, `vmbus::mem`), and what a CDB means (`crate::scsi`).

pub mod request;
pub mod session;
pub mod wire;
