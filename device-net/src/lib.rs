//! bulkhead-net: a synthetic NIC (netvsp), served over VMBus.
//!
//! A process of its own, locked into a sandbox, that holds one descriptor for its frames and maps guest memory. What it
//! believes of whom:
//!
//! | from | what | checked in |
//! | --- | --- | --- |
//! | guest | rings, packets, page numbers | `vmbus` |
//! | guest | NVSP messages and their order, sections, completions | [`netvsp`] |
//! | guest | RNDIS messages, per-packet information, offload requests | [`rndis`], [`frame::outgoing`] |
//! | outside | frames, their headers, lengths on a stream | [`backend`], [`frame::segment`] |
//! | predecessor | the journal and the saved state | `vmbus::journal`, [`server`] |
//!
//! ```text
//!   server/      the loop: rings, tokens, backend
//!     netvsp/      what travels in packets, and the shared buffers      pure
//!     rndis/       the Ethernet device inside                           pure
//!     frame/       checksums, segments, tags                            pure
//!     backend/     TAP or stream
//! ```
//! [`vsc`] is the guest's side, for tests and benchmarks.
#![forbid(unsafe_code)]

pub mod backend;
pub mod config;
pub mod frame;
pub mod netvsp;
pub mod rndis;
pub mod server;
pub mod vsc;
