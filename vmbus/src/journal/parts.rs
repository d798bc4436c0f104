//! A state as bytes: the base that version 1 wrote, and behind it what each later version has added.
//!
//! The tail, little endian, directly behind the base:
//! ```text
//!   0  u32 "BHT\1"      4  u32 CRC-32 of all the rest of the tail
//!   8  u64 generation of the copy
//!   16 u32 version that wrote it      20 u32 oldest version that understands it
//!   24 u32 length of the additions    28 u32 zero
//!   32 additions: u32 version, u32 length, bytes (ipc::codec), without padding, in ascending order
//! ```
//! A server of version 1 neither reads nor writes it. What it leaves behind is then a base with the tail of an
//! earlier save behind it, and that one names another generation: it is not taken for an addition.
#![forbid(unsafe_code)]

use serde::{Serialize, de::DeserializeOwned};

use crate::ipc::codec::{self, DecodeError, EncodeError};

const TAIL_MAGIC: u32 = u32::from_le_bytes(*b"BHT\x01");
const TAIL_HEADER_BYTES: usize = 32;

/// A state's bytes, by the version that has added them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// The version that wrote it.
    pub(super) version: u32,
    /// The oldest version that understands it.
    pub(super) oldest_reader: u32,
    base: Vec<u8>,
    additions: Vec<(u32, Vec<u8>)>,
}

impl Parts {
    /// A state whose base is `base`: a type that never changes once it was released.
    pub fn new<T: Serialize>(base: &T) -> Result<Self, EncodeError> {
        Ok(Self::version_1(codec::encode(base)?))
    }

    /// Appends what `version` has added: a type that never changes once it was released. In ascending order.
    pub fn add<T: Serialize>(mut self, version: u32, addition: &T) -> Result<Self, EncodeError> {
        self.additions.push((version, codec::encode(addition)?));
        Ok(self)
    }

    /// The base.
    pub fn base<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        codec::decode(&self.base)
    }

    /// What `version` has added; its default if the writer did not know of it.
    pub fn addition<T: DeserializeOwned + Default>(&self, version: u32) -> Result<T, DecodeError> {
        match self.additions.iter().find(|(found, _)| *found == version) {
            Some((_, bytes)) => codec::decode(bytes),
            None => Ok(T::default()),
        }
    }

    /// A state without additions.
    pub(super) fn version_1(base: Vec<u8>) -> Self {
        Self {
            version: 1,
            oldest_reader: 1,
            base,
            additions: Vec::new(),
        }
    }

    pub(super) fn base_bytes(&self) -> &[u8] {
        &self.base
    }

    /// The tail. Empty for version 1.
    pub(super) fn emit_tail(&self, generation: u64, version: u32, oldest_reader: u32) -> Vec<u8> {
        if version == 1 {
            return Vec::new();
        }
        let mut additions = Vec::new();
        for (version, bytes) in &self.additions {
            additions.extend_from_slice(&version.to_le_bytes());
            // The codec's limit is far below 4 GiB.
            additions.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            additions.extend_from_slice(bytes);
        }
        let mut rest = Vec::with_capacity(TAIL_HEADER_BYTES + additions.len());
        rest.extend_from_slice(&generation.to_le_bytes());
        rest.extend_from_slice(&version.to_le_bytes());
        rest.extend_from_slice(&oldest_reader.to_le_bytes());
        rest.extend_from_slice(&(additions.len() as u32).to_le_bytes());
        rest.extend_from_slice(&[0; 4]);
        rest.extend_from_slice(&additions);
        let mut tail = TAIL_MAGIC.to_le_bytes().to_vec();
        tail.extend_from_slice(&crc32fast::hash(&rest).to_le_bytes());
        tail.extend_from_slice(&rest);
        tail
    }
}

/// What stands behind a base. Any bytes may stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tail {
    /// Nothing that belongs to this copy.
    None,
    /// Additions; the base is to be filled in.
    Whole(Parts),
    /// It claims to belong to this copy, and does not hold together.
    Damaged,
}

impl Tail {
    pub(super) fn parse(bytes: &[u8], generation: u64) -> Self {
        let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if word(0) != Some(TAIL_MAGIC) || long(8) != Some(generation) {
            return Self::None;
        }
        let whole = || {
            let end = TAIL_HEADER_BYTES.checked_add(word(24)? as usize)?;
            let rest = bytes.get(8..end)?;
            if word(4)? != crc32fast::hash(rest) {
                return None;
            }
            Some(Parts {
                version: word(16)?,
                oldest_reader: word(20)?,
                base: Vec::new(),
                additions: additions(bytes.get(TAIL_HEADER_BYTES..end)?)?,
            })
        };
        whole().map_or(Self::Damaged, Self::Whole)
    }
}

impl Parts {
    pub(super) fn with_base(self, base: Vec<u8>) -> Self {
        Self { base, ..self }
    }
}

/// `None`: the lengths do not add up.
fn additions(mut bytes: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (version, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        found.push((u32::from_le_bytes(*version), rest.get(..length)?.to_vec()));
        bytes = &rest[length..];
    }
    Some(found)
}
