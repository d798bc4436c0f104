//! VMs of the programs that are shipped, with their real sandboxes, and a guest that does nothing.
#![forbid(unsafe_code)]

mod alone;
mod forbidden;
mod lacking;
mod place;
