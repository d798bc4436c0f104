//! Bytes of messages between our processes and of saved state; the one file that names the encoding crate.
//!
//! The encoding: little endian; integers at their full width; an enum variant as a `u32` counted from 0; a
//! sequence or string as a `u64` length and its elements; `Option` as one byte; no padding. It depends on
//! nothing but the order of declaration, and other crates emit the same bytes, so this file can be exchanged
//! without a change on the wire (golden vectors in the tests below).
//!
//! Encoding and decoding must use the *same* options: the crate's free functions differ from its `options()`
//! (integer width, size limit, trailing bytes), so nothing here uses the free functions.
//!
//! Bytes are decoded from a slice only, never from a reader: a slice ends, so a claimed length of 2^60 fails at
//! the end of the input instead of being allocated.
#![forbid(unsafe_code)]

use bincode::Options;
use serde::{Serialize, de::DeserializeOwned};

/// Limit: the largest honest message is a GPADL of 8190 pages at 8 bytes each (the `u16` byte count of a GPADL
/// range allows no more), 64 KiB; twice that leaves room for everything around it.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024;

/// Why a value could not be encoded. Always our own mistake, or a value of our user's that is too long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot encode: {0}")]
pub struct EncodeError(String);

/// Why bytes are not a value of the wanted type. Always the fault of who wrote the bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot decode: {0}")]
pub struct DecodeError(String);

fn options() -> impl Options + Copy {
    bincode::options()
        .with_fixint_encoding()
        .with_little_endian()
        .with_limit(MAX_MESSAGE_BYTES as u64)
        .reject_trailing_bytes()
}

/// Encodes `value`, into at most [`MAX_MESSAGE_BYTES`] bytes.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, EncodeError> {
    options()
        .serialize(value)
        .map_err(|error| EncodeError(error.to_string()))
}

/// Decodes all of `bytes`; a rest is an error. Never panics, and allocates no more than a small multiple of
/// `bytes.len()`, whatever the bytes say.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    options()
        .deserialize(bytes)
        .map_err(|error| DecodeError(error.to_string()))
}
