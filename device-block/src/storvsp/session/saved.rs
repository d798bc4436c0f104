//! The conversation as it is left to a successor. What stands here was released: it never changes, and a later version
//! adds a type of its own (see `vmbus::journal`).
//!
//! | version | has added |
//! | --- | --- |
//! | 1 | [`Base`] |
//! | 2 | [`Promises`] |

use super::{Answered, MAX_TRANSFER_BYTES, Session, State};
use serde::{Deserialize, Serialize};
use vmbus::ipc::EncodeError;
use vmbus::journal::{Parts, SavedState, StateFault};

#[derive(Serialize, Deserialize)]
struct Base {
    state: BaseState,
    max_sub_channels: u16,
    last: Option<BaseAnswered>,
}

#[derive(Serialize, Deserialize)]
enum BaseState {
    Closed,
    Began,
    Agreed { version: u16 },
    Described { version: u16, sub_channels: Option<u16> },
    Ready { version: u16, sub_channels: Option<u16> },
}

#[derive(Serialize, Deserialize)]
struct BaseAnswered {
    transaction_id: u64,
    request: Vec<u8>,
    reply: Vec<u8>,
}

/// What the guest was told and holds us to.
#[derive(Serialize, Deserialize)]
struct Promises {
    max_transfer_bytes: u32,
}

impl Default for Promises {
    /// What servers of version 1 tell.
    fn default() -> Self {
        Self {
            max_transfer_bytes: 1 << 20,
        }
    }
}

impl SavedState for Session {
    const DEVICE: [u8; 8] = *b"storvsp\0";
    const VERSION: u32 = 2;
    const OLDEST_READER: u32 = 1;
    const OLDEST_READABLE: u32 = 1;

    fn emit(&self) -> Result<Parts, EncodeError> {
        let base = Base {
            state: match self.state {
                State::Closed => BaseState::Closed,
                State::Began => BaseState::Began,
                State::Agreed { version } => BaseState::Agreed { version },
                State::Described {
                    version,
                    sub_channels,
                } => BaseState::Described {
                    version,
                    sub_channels,
                },
                State::Ready {
                    version,
                    sub_channels,
                } => BaseState::Ready {
                    version,
                    sub_channels,
                },
            },
            max_sub_channels: self.max_sub_channels,
            last: self.last.as_ref().map(|last| BaseAnswered {
                transaction_id: last.transaction_id,
                request: last.request.clone(),
                reply: last.reply.clone(),
            }),
        };
        let promises = Promises {
            max_transfer_bytes: self.max_transfer_bytes,
        };
        Parts::new(&base)?.add(2, &promises)
    }

    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        let Base {
            state,
            max_sub_channels,
            last,
        } = parts.base()?;
        let Promises { max_transfer_bytes } = parts.addition(2)?;
        let refuse = |what, promised: u64, limit: u64| StateFault::Promise {
            what,
            promised,
            limit,
        };
        if max_transfer_bytes > MAX_TRANSFER_BYTES {
            let (promised, limit) = (u64::from(max_transfer_bytes), u64::from(MAX_TRANSFER_BYTES));
            return Err(refuse("a transfer length", promised, limit));
        }
        if max_sub_channels > crate::config::MAX_SUB_CHANNELS {
            let limit = u64::from(crate::config::MAX_SUB_CHANNELS);
            return Err(refuse(
                "a number of sub-channels",
                u64::from(max_sub_channels),
                limit,
            ));
        }
        let state = match state {
            BaseState::Closed => State::Closed,
            BaseState::Began => State::Began,
            BaseState::Agreed { version } => State::Agreed { version },
            BaseState::Described {
                version,
                sub_channels,
            } => State::Described {
                version,
                sub_channels,
            },
            BaseState::Ready {
                version,
                sub_channels,
            } => State::Ready {
                version,
                sub_channels,
            },
        };
        if let State::Described { sub_channels, .. } | State::Ready { sub_channels, .. } = state
            && let Some(count) = sub_channels.filter(|&count| count > max_sub_channels)
        {
            let limit = u64::from(max_sub_channels);
            return Err(refuse("a number of sub-channels", u64::from(count), limit));
        }
        Ok(Self {
            state,
            max_sub_channels,
            max_transfer_bytes,
            last: last.map(|last| Answered {
                transaction_id: last.transaction_id,
                request: last.request,
                reply: last.reply,
            }),
        })
    }
}
