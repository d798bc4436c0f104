//! The developer's commands, one module each.
#![forbid(unsafe_code)]

pub mod guard;
pub mod rig;
pub mod tcb;
pub mod test;
pub mod without;
