//! What bulkhead's tests stand on, and what `cargo xtask` is made of.
//!
//! - [`rig`] boots an emulated machine with AMD SVM and runs a command in it, so that Linux guests can be tested
//!   where there is no hardware virtualization.
//! - [`xtask`] holds the developer's commands; `src/main.rs` only parses the command line.
#![forbid(unsafe_code)]

pub mod rig;
pub mod xtask;
