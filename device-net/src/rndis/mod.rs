//! RNDIS: the Ethernet device inside SEND_RNDIS_PKT, as NDIS 6.30 and Linux's rndis_filter.c use it.
//!
//! - [`control`]: INITIALIZE, QUERY, SET, HALT, KEEPALIVE: one request in, at most one response out. The device's
//!   state is [`control::Adapter`].
//! - [`oid`]: what each object identifier answers.
//! - [`offload`], [`rss`]: the two larger structures that QUERY and SET carry.
//! - [`packet`]: frames with their per-packet information, both directions.
//!
//! All pure, all on private copies. Offsets inside RNDIS messages count from the start of the *body*, that is from
//! byte 8 of the message; only this folder knows that.

pub mod control;
pub mod offload;
pub mod oid;
pub mod packet;
pub mod rss;
pub mod wire;
