//! What a successor must know besides the journal's slots: the device's own state, saved at each change.

use crate::netvsp::session::Session;
use crate::rndis::control::Adapter;
use serde::{Deserialize, Serialize};

/// Kinds of journal slots.
pub mod slot {
    /// A packet of frames from the guest. Nothing is kept of it: on replay its frames are lost, as networks may, and its
    /// completion is not.
    pub const FRAMES: u8 = 1;
    /// An NVSP control message; its bytes are kept.
    pub const NVSP: u8 = 2;
    /// An RNDIS control message; its bytes are kept.
    pub const RNDIS: u8 = 3;
    /// A packet to the guest; the numbers of its sub-allocations are kept, two bytes each.
    pub const RECEIVED: u8 = 4;
}

/// The saved state, one variant for each version of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Saved {
    V1(State),
}

/// Everything that was agreed with the guest since its primary channel was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub session: Session,
    pub adapter: Adapter,
    /// Sub-channels that are open. Until a successor has seen them all it does not know which parts of the receive buffer
    /// the guest holds.
    pub open_sub_channels: Vec<u16>,
}

/// The numbers of sub-allocations as a slot keeps them.
pub fn emit_suballocations(numbers: &[u16]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// `None`: no server of ours wrote this.
pub fn parse_suballocations(bytes: &[u8]) -> Option<Vec<u16>> {
    let (numbers, rest) = bytes.as_chunks::<2>();
    (rest.is_empty() && !numbers.is_empty())
        .then(|| numbers.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suballocations_round_trip_and_odd_bytes_are_refused() {
        assert_eq!(
            parse_suballocations(&emit_suballocations(&[1, 0x203, 9038])),
            Some(vec![1, 0x203, 9038])
        );
        assert_eq!(parse_suballocations(&[1]), None);
        assert_eq!(parse_suballocations(&[]), None);
    }
}
