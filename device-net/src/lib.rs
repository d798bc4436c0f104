//! bulkhead-net: a synthetic NIC (netvsp) as a process of its own.
#![forbid(unsafe_code)]

pub mod frame;
pub mod netvsp;
pub mod rndis;
