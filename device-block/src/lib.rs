#![forbid(unsafe_code)]
pub mod scsi;
pub mod storvsp;
