//! Requests that were taken and not answered yet.
#![forbid(unsafe_code)]

/// A request of the guest that this server has taken: the duty to answer it exactly once.
///
/// Not `Clone`. Its exits are [`complete`](super::Endpoint::complete), [`cancel`](super::Endpoint::cancel) and
/// [`Token::abandon`]; dropping it is a bug and asserts in debug builds. A server that dies with it leaves it to its
/// successor.
#[derive(Debug)]
#[must_use = "a request that is not answered hangs the guest"]
pub struct Token {
    slot: u16,
    kind: u8,
    transaction_id: u64,
    channel: u32,
    open_epoch: u32,
}

impl Token {
    pub(super) fn new(slot: u16, kind: u8, transaction_id: u64, channel: u32, open_epoch: u32) -> Self {
        Self {
            slot,
            kind,
            transaction_id,
            channel,
            open_epoch,
        }
    }

    /// The guest's number for the request.
    pub fn transaction_id(&self) -> u64 {
        self.transaction_id
    }

    /// What the device said that it is when it took it.
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// Forgets the request without an answer. Legitimate only if its channel is closed, broken or quiesced: then
    /// nobody waits, and [`super::Port`] clears the journal when it gets the endpoint back.
    pub fn abandon(self) {
        self.into_slot();
    }

    /// The one way out of the destructor.
    pub(super) fn into_slot(self) -> u16 {
        let slot = self.slot;
        std::mem::forget(self);
        slot
    }

    pub(super) fn is_of(&self, channel: u32, open_epoch: u32) -> bool {
        (self.channel, self.open_epoch) == (channel, open_epoch)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        debug_assert!(
            std::thread::panicking(),
            "a request was dropped without an answer: {self:?}"
        );
    }
}

/// A packet of ours that the guest owes an answer to, and whose space it owns until then.
///
/// Given back to [`release`](super::Endpoint::release) when the answer was received. May be dropped when the channel
/// is closed.
#[derive(Debug)]
#[must_use = "without it the guest's answer cannot be accounted for"]
pub struct HeldToken {
    pub(super) slot: u16,
    pub(super) kind: u8,
    pub(super) transaction_id: u64,
    pub(super) channel: u32,
    pub(super) open_epoch: u32,
    /// Not yet seen by the guest below this number.
    pub(super) publish_seq: u64,
}

impl HeldToken {
    /// Our number for the packet; the guest's answer echoes it.
    pub fn transaction_id(&self) -> u64 {
        self.transaction_id
    }

    /// What the device said that it is when it sent it.
    pub fn kind(&self) -> u8 {
        self.kind
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// As many requests are in flight as the journal holds. Put the packet back and stop reading until one is done.
    #[error("no journal slot is free")]
    NoFreeSlot,
    /// What must be remembered of the request is longer than a slot. The guest's fault: refuse the request.
    #[error("{bytes} bytes are too many for a journal slot")]
    TooLong { bytes: usize },
}

/// A request that a predecessor had taken and not answered.
#[derive(Debug)]
pub struct RecoveredRequest {
    /// As if it had been taken just now.
    pub token: Token,
    /// What the predecessor kept of it. Validate it like the guest's bytes.
    pub payload: Vec<u8>,
}

/// A packet that a predecessor had sent and the guest has not answered.
#[derive(Debug)]
pub struct RecoveredHeld {
    pub token: HeldToken,
    /// What the predecessor kept of it. Validate it.
    pub payload: Vec<u8>,
}

/// What was in flight when a channel was handed over.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Whether the guest opened the channel just now; then everything else is empty, and the protocol begins anew.
    pub fresh: bool,
    /// In the order in which they were taken.
    pub requests: Vec<RecoveredRequest>,
    /// In the order in which they were sent.
    pub held: Vec<RecoveredHeld>,
}
