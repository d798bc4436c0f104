//! Versions of the channel protocol (Linux 6.1 include/linux/hyperv.h, `VERSION_WIN10` and others).

use serde::{Deserialize, Serialize};
use std::fmt;

/// Major version in the upper, minor in the lower 16 bits. Any number is representable; we speak [`Version::V4_0`] to
/// [`Version::V5_3`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u32);

impl Version {
    /// Windows 10.
    pub const V4_0: Version = Version(0x0004_0000);
    /// Windows 10 RS3: MODIFYCHANNEL.
    pub const V4_1: Version = Version(0x0004_0001);
    /// Message connection id in VERSION_RESPONSE.
    pub const V5_0: Version = Version(0x0005_0000);
    /// No new layout.
    pub const V5_1: Version = Version(0x0005_0001);
    /// No new layout; 56-byte TL_CONNECT_REQUEST.
    pub const V5_2: Version = Version(0x0005_0002);
    /// MODIFYCHANNEL_RESPONSE.
    pub const V5_3: Version = Version(0x0005_0003);

    /// The versions that we speak, newest first.
    pub const SUPPORTED: [Version; 6] = [
        Version::V5_3,
        Version::V5_2,
        Version::V5_1,
        Version::V5_0,
        Version::V4_1,
        Version::V4_0,
    ];

    /// Whether we speak this version.
    pub fn is_supported(self) -> bool {
        Self::SUPPORTED.contains(&self)
    }

    /// From 5.0 on VERSION_RESPONSE names a connection id for the guest's messages, and INITIATE_CONTACT a SINT.
    pub fn has_message_connection_id(self) -> bool {
        self >= Version::V5_0
    }

    /// From 4.1 on the guest may move a channel to another VP.
    pub fn has_modify_channel(self) -> bool {
        self >= Version::V4_1
    }

    /// From 5.3 on the guest waits for the answer to that.
    pub fn has_modify_channel_response(self) -> bool {
        self >= Version::V5_3
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xFFFF)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({self})")
    }
}
