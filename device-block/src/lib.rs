//! bulkhead-block: a SCSI controller with disks, served over VMBus.
//!
//! A process of its own, locked into a sandbox, that holds the disks' descriptors and maps guest memory. What it
//! believes of whom:
//!
//! | from | what | checked in |
//! | --- | --- | --- |
//! | guest | rings, packets, page numbers | `vmbus` |
//! | guest | storvsp packets and SRBs | [`storvsp::wire`], [`storvsp::session`] |
//! | guest | CDBs, parameter lists | [`scsi::cdb`], [`scsi::disk`] |
//! | predecessor | the journal | `vmbus::journal`, [`storvsp::request`] |
//! | host | short reads, errors, files that shrink | [`backend::job`] |
//!
//! ```text
//!   server/         the loop: io_uring, rings, tokens, answers
//!     controller.rs   a request -> an answer, or work
//!       storvsp/        the protocol's bytes and its conversation      pure
//!       scsi/           commands and disks                             pure
//!       backend/        work -> io_uring
//! ```
//! A request goes down this list and its answer up again; no part calls one above it.
#![forbid(unsafe_code)]

pub mod backend;
pub mod config;
pub mod controller;
pub mod scsi;
pub mod server;
pub mod storvsp;
pub mod vsc;
