//! Any value as a device's state, for tests.
#![forbid(unsafe_code)]

use serde::{Serialize, de::DeserializeOwned};

use super::{Parts, SavedState, StateFault};
use crate::ipc::codec::EncodeError;

/// Saved in version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plain<T>(pub T);

impl<T: Serialize + DeserializeOwned> SavedState for Plain<T> {
    const DEVICE: [u8; 8] = *b"plain\0\0\0";
    const VERSION: u32 = 1;
    const OLDEST_READER: u32 = 1;
    const OLDEST_READABLE: u32 = 1;

    fn emit(&self) -> Result<Parts, EncodeError> {
        Parts::new(&self.0)
    }

    fn parse(parts: &Parts) -> Result<Self, StateFault> {
        Ok(Self(parts.base()?))
    }
}
