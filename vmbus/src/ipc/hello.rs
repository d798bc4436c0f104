//! Which version of the control protocol is spoken.
//!
//! `Start` (supervisor to child), `Hello` (server to bus) and `Attach` (bus to server) are the first messages
//! of their directions, and begin with the protocol number. There is no negotiation: all programs of one
//! release speak the same protocol, and a server of a release with another one cannot take over a device
//! from a running one. The number exists so that a mixture is reported and not misread.
#![forbid(unsafe_code)]

use super::PeerFault;

/// The version that this build speaks. Raised when a message changes its layout or meaning.
pub const PROTOCOL: u32 = 5;

/// Checks the number in a peer's first message.
pub fn check_protocol(theirs: u32) -> Result<(), PeerFault> {
    if theirs == PROTOCOL {
        Ok(())
    } else {
        Err(PeerFault::Protocol { theirs })
    }
}
