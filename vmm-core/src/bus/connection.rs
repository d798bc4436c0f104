#![forbid(unsafe_code)]
//! The guest's connection: version, where messages to it go, and what comes after everyone has let go.
//!
//! ```text
//!   Disconnected ──contact, accepted──▶ Connected { offers not asked } ──REQUESTOFFERS──▶ Connected { asked }
//!        ▲                                   │ contact, UNLOAD, reset                        │
//!        └── last server let go: answer ── Unloading { then } ◀──────────────────────────────┘
//! ```
//!
//! A contact on a live connection (kexec without UNLOAD, a crash kernel, a driver that is loaded again) implies
//! an UNLOAD. Whatever ends a connection goes through `Unloading`: nothing is answered before every server has
//! acknowledged that it touches the guest's memory no more, or is gone. A later message replaces what was to be
//! answered: it comes from a kernel that no longer knows of the earlier one.

use vmbus::wire::{InitiateContact, Version};

use crate::hyperv::hypercall::MESSAGE_CONNECTIONS;

/// The port that VERSION_RESPONSE names (and that kernels before version 5.0 use throughout). Port 4 is the one for
/// INITIATE_CONTACT from version 5.0 on; a kernel that was started by kexec uses it again at any time.
pub const MESSAGE_CONNECTION_ID: u32 = MESSAGE_CONNECTIONS[0];

/// The SINT of VMBus (Linux 6.1 include/linux/hyperv.h VMBUS_MESSAGE_SINT).
pub const VMBUS_SINT: u8 = 2;

/// The state of the connection. See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    Disconnected,
    Unloading { then: AfterUnload },
    Connected(Connected),
}

/// A live connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    pub version: Version,
    /// Where messages to the guest go; below the VP count.
    pub target_vp: u16,
    pub offers: OffersAsked,
}

/// Whether the guest has sent REQUESTOFFERS. Nothing is offered before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffersAsked {
    NotYet,
    Asked,
}

/// What is owed when every server has let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterUnload {
    /// UNLOAD_RESPONSE.
    Unloaded { target_vp: u16 },
    /// VERSION_RESPONSE.
    Contact(Answer),
    /// Word to the shell, which may then reset memory and processors.
    Reset { token: u64 },
}

/// The answer to an INITIATE_CONTACT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub target_vp: u16,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted(Version),
    Refused(Version),
}

/// Judges an INITIATE_CONTACT.
///
/// Version 6.0 is refused: its patches make Linux ask for what needs a paravisor, and a kernel that knows it goes down
/// to 5.3. A target VP that does not exist is refused on VP 0: an answer must go somewhere.
pub fn judge(contact: &InitiateContact, vp_count: u16) -> Answer {
    let target_vp = u16::try_from(contact.target_vp).ok().filter(|&vp| vp < vp_count);
    let elsewhere = contact
        .target_sint()
        .is_some_and(|target| target != (VMBUS_SINT, 0));
    let verdict = if contact.version.is_supported() && target_vp.is_some() && !elsewhere {
        Verdict::Accepted(contact.version)
    } else {
        Verdict::Refused(contact.version)
    };
    Answer {
        target_vp: target_vp.unwrap_or(0),
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contact(version: Version) -> InitiateContact {
        InitiateContact {
            version,
            target_vp: 1,
            interrupt_page_or_target: 2,
            parent_to_child_monitor: 0,
            child_to_parent_monitor: 0,
        }
    }

    #[test]
    fn versions_4_0_to_5_3_are_accepted_and_no_others() {
        for number in [0x40000, 0x40001, 0x50000, 0x50001, 0x50002, 0x50003] {
            let answer = judge(&contact(Version(number)), 2);
            assert_eq!(answer.verdict, Verdict::Accepted(Version(number)));
            assert_eq!(answer.target_vp, 1);
        }
        for number in [
            0,
            0xd,
            0x10001,
            0x20004,
            0x30000,
            0x40002,
            0x50004,
            0x60000,
            u32::MAX,
        ] {
            let answer = judge(&contact(Version(number)), 2);
            assert_eq!(answer.verdict, Verdict::Refused(Version(number)));
        }
    }

    #[test]
    fn a_target_that_does_not_exist_is_refused_on_the_first_processor() {
        for target_vp in [2, 64, 65536, u32::MAX] {
            let contact = InitiateContact {
                target_vp,
                ..contact(Version::V5_3)
            };
            let refused = Verdict::Refused(Version::V5_3);
            assert_eq!(
                judge(&contact, 2),
                Answer {
                    target_vp: 0,
                    verdict: refused
                }
            );
        }
    }

    #[test]
    fn another_sint_or_trust_level_is_refused_where_the_fields_mean_that() {
        let judge_target = |version, interrupt_page_or_target| {
            let contact = InitiateContact {
                interrupt_page_or_target,
                ..contact(version)
            };
            judge(&contact, 2).verdict
        };
        assert_eq!(judge_target(Version::V5_0, 7), Verdict::Refused(Version::V5_0));
        assert_eq!(
            judge_target(Version::V5_3, 0x202),
            Verdict::Refused(Version::V5_3)
        );
        assert_eq!(
            judge_target(Version::V4_1, 0x1000),
            Verdict::Accepted(Version::V4_1)
        );
    }
}
