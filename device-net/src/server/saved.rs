//! What a successor must know besides the journal's slots: the device's own state, saved at each change.

use crate::netvsp::receive::FRAME_BYTES_MAX;
use crate::netvsp::session::Session;
use crate::rndis::control::{Adapter, PACKETS_PER_MESSAGE};
use serde::{Deserialize, Serialize};
use vmbus::channel::MAX_CHANNELS;
use vmbus::ipc::EncodeError;
use vmbus::journal::{Parts, SavedState, StateFault};

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

/// What version 1 saved. It was released: it never changes, nor do the types in it; a later version adds a type of its
/// own (see `vmbus::journal`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Base {
    V1(State),
}

/// What version 2 has added: what the guest was told and holds us to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Promises {
    packets_per_message: u32,
}

impl Default for Promises {
    /// What servers of version 1 tell.
    fn default() -> Self {
        Self {
            packets_per_message: 8,
        }
    }
}

/// The state as it is left to a successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved(pub State);

impl SavedState for Saved {
    const DEVICE: [u8; 8] = *b"netvsp\0\0";
    const VERSION: u32 = 2;
    const OLDEST_READER: u32 = 1;
    const OLDEST_READABLE: u32 = 1;

    fn emit(&self) -> Result<Parts, EncodeError> {
        let promises = Promises {
            packets_per_message: PACKETS_PER_MESSAGE,
        };
        Parts::new(&Base::V1(self.0.clone()))?.add(2, &promises)
    }

    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        let Base::V1(state) = parts.base()?;
        let Promises { packets_per_message } = parts.addition(2)?;
        let check = |what, promised: u64, limit: u64| {
            if promised <= limit {
                return Ok(());
            }
            Err(StateFault::Promise {
                what,
                promised,
                limit,
            })
        };
        check(
            "a number of packets in a message",
            u64::from(packets_per_message),
            u64::from(PACKETS_PER_MESSAGE),
        )?;
        let most = u64::from(MAX_CHANNELS) - 1;
        let open = state.open_sub_channels.iter().copied().max().unwrap_or(0);
        check("a sub-channel", u64::from(open), most)?;
        if let Some(agreement) = state.session.agreement() {
            check(
                "a number of sub-channels",
                u64::from(agreement.sub_channels),
                most,
            )?;
            let frame_bytes = u64::from(agreement.frame_bytes);
            check("a frame length", frame_bytes, u64::from(FRAME_BYTES_MAX))?;
        }
        Ok(Self(state))
    }
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
