//! What bulkhead's tests stand on, and what `cargo xtask` is made of.
//!
//! - [`rig`] boots an emulated machine with AMD SVM and runs a command in it, so that Linux guests can be tested
//!   where there is no hardware virtualization.
//! - [`tier`] says what a test needs (our programs, /dev/kvm, the rig) and how it is skipped, loudly, without that.
//! - [`kill`] kills servers under load and counts what a guest would notice.
//! - [`release`] builds the programs as they are shipped.
//! - [`source`] reads our own source, for the house rules (`tests/tidy.rs`) and the line counts (`cargo xtask tcb`).
//! - [`xtask`] holds the developer's commands; `src/main.rs` only parses the command line.
#![forbid(unsafe_code)]

pub mod bench;
pub mod demo;
pub mod kill;
pub mod release;
pub mod rig;
pub mod source;
pub mod tier;
pub mod xtask;
