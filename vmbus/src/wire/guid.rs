//! GUIDs as they stand on the wire.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A GUID in wire order: the first three fields of the text form are little-endian (as in Windows' `GUID`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Guid(pub [u8; 16]);

/// The text is not a GUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a GUID: {0:?}")]
pub struct GuidTextError(pub String);

impl Guid {
    /// All bytes zero.
    pub const ZERO: Guid = Guid([0; 16]);

    /// From the five groups of the usual text form: `ba6163d9-04a1-4d29-b605-72e2ffb1dc7f` is
    /// `Guid::from_fields(0xba6163d9, 0x04a1, 0x4d29, [0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f])`.
    pub const fn from_fields(d1: u32, d2: u16, d3: u16, d4: [u8; 8]) -> Self {
        let (a, b, c) = (d1.to_le_bytes(), d2.to_le_bytes(), d3.to_le_bytes());
        Guid([
            a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d4[0], d4[1], d4[2], d4[3], d4[4], d4[5], d4[6],
            d4[7],
        ])
    }

    /// A random (version 4) GUID.
    pub fn random() -> Self {
        Guid(uuid::Uuid::new_v4().to_bytes_le())
    }
}

impl From<uuid::Uuid> for Guid {
    fn from(uuid: uuid::Uuid) -> Self {
        Guid(uuid.to_bytes_le())
    }
}

impl From<Guid> for uuid::Uuid {
    fn from(guid: Guid) -> Self {
        uuid::Uuid::from_bytes_le(guid.0)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from(*self).hyphenated().fmt(f)
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Guid {
    type Err = GuidTextError;

    fn from_str(text: &str) -> Result<Self, GuidTextError> {
        text.parse::<uuid::Uuid>()
            .map(Guid::from)
            .map_err(|_| GuidTextError(text.chars().take(64).collect()))
    }
}

impl Serialize for Guid {
    /// As text for people's formats (JSON, TOML), as 16 bytes for bincode.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Guid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 16]>::deserialize(deserializer).map(Guid)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_fields_are_little_endian_on_the_wire() {
        let scsi: Guid = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f".parse().expect("a GUID");
        assert_eq!(
            scsi.0,
            [
                0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d, 0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc,
                0x7f
            ]
        );
        let fields = Guid::from_fields(
            0xba6163d9,
            0x04a1,
            0x4d29,
            [0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f],
        );
        assert_eq!(fields, scsi);
        assert_eq!(scsi.to_string(), "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
    }

    #[test]
    fn text_that_is_no_guid_is_refused_and_quoted() {
        let error = "ba6163d9".parse::<Guid>().expect_err("too short");
        assert!(error.to_string().contains("ba6163d9"));
    }
}
