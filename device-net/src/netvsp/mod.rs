//! The NVSP half of the synthetic NIC: what travels in VMBus packets.
//!
//! ```text
//!  guest                                             this server
//!   INIT, NDIS_CONFIG, NDIS_VER           ---->  session.rs   versions, MTU
//!   SEND_RECV_BUF, SEND_SEND_BUF          ---->  session.rs   geometry of the two shared buffers
//!   SEND_RNDIS_PKT (section, pages, both) ---->  buffers.rs   which bytes are meant
//!   <----  SEND_RNDIS_PKT in transfer pages      receive.rs   which part of the receive buffer is whose
//!   SEND_RNDIS_PKT_COMPLETE               ---->  receive.rs   credits come back, each exactly once
//! ```
//!
//! Everything here is pure: no descriptor, no clock, no shared memory. Bytes come in as private copies and leave
//! as private buffers; [`crate::server`] moves them. What is *inside* a SEND_RNDIS_PKT is the business of
//! [`crate::rndis`].
//!
//! Who owns a sub-allocation of the receive buffer: the server until the packet that names it is published; the
//! guest from then on until its completion is taken; nobody else ever. [`receive::Credits`] keeps that in one place.

pub mod buffers;
pub mod receive;
pub mod session;
pub mod wire;
