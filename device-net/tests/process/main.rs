//! The real `bulkhead-net` in its sandbox, driven by a synthetic guest over real rings.
#![forbid(unsafe_code)]

mod control;
mod crash;
mod frames;
mod frozen;
mod hostile;
mod kills;
mod network;
mod spoiled;
mod tap;
