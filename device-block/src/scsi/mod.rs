//! A SCSI target with direct-access logical units, as far as Linux's `sd` and Windows's `disk` want it.
//!
//! Pure: bytes of a CDB in, [`disk::Action`] out. Whoever calls does the I/O and moves the data.
//!
//! ```text
//!  CDB bytes --cdb.rs--> Command --disk.rs--> Action::Read { range }            the backend's business
//!                                             Action::Data(bytes)               INQUIRY and the like
//!                                             Action::Parameters                UNMAP: fetch the list, ask again
//!                                             Action::Check(sense)              refused
//! ```
//!
//! - [`cdb`] turns a CDB into a [`cdb::Command`]: the only file that reads CDB bytes.
//! - [`disk`] decides what a command means for one logical unit: bounds, write protection, block limits.
//! - [`inquiry`] and [`mode`] build the data of INQUIRY, MODE SENSE, READ CAPACITY.
//! - [`target`] knows which logical units exist and answers for those that do not.
//! - [`sense`] is sense data, and which sense a host's errno becomes.
//!
//! Everything is big-endian. Sources: SPC-4 (r37), SBC-3 (r36), SAM-5.
//!
//! Not checked here: lengths of the SRB (`storvsp::request`), and that guest memory exists (`vmbus::mem`).

pub mod cdb;
pub mod disk;
pub mod inquiry;
pub mod mode;
pub mod sense;
pub mod target;
