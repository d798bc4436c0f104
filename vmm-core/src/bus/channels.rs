#![forbid(unsafe_code)]
//! One channel: what the guest did with it, and what its server still has to let go of.
//!
//! ```text
//!              OPEN                CLOSE, a server may touch the rings
//!   Closed ──────────▶ Open ─────────────────────────────────────────▶ Closing ──┐ OPEN: answered at once,
//!     ▲ ▲               │ CLOSE, no server                               │  ▲    │ kept as `reopen` until
//!     │ └───────────────┘                                                │  └────┘ the server has let go
//!     └──────────────── the server acknowledged, or is gone ─────────────┘
//!                        (with a `reopen`: to Open)
//! ```
//!
//! Beside it stands what became of the offer: `Offered`, then (sub-channels, when their primary closes)
//! `Rescinded`, then `Released` when the guest gave the relid back. A released channel stays in the table until
//! its server has let go, so that its relid is not given to another.

use super::action::{ChannelId, DeadlineId, DeviceId};
use super::gpadls::{Gpadl, GpadlState};
use vmbus::mem::PAGE_BYTES;

/// A channel that was offered and not yet given back.
#[derive(Clone, Debug)]
pub struct Channel {
    pub device: DeviceId,
    /// 0: the primary.
    pub sub_index: u16,
    pub standing: Standing,
    pub state: ChannelState,
}

/// What became of the offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The guest may open it.
    Offered,
    /// We took the offer back; the guest has not yet given the relid back.
    Rescinded,
    /// The guest gave the relid back, and the server has not yet let go of what belonged to it.
    Released,
}

/// See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    /// The guest has not opened it, or closed it and nobody touches its rings.
    Closed,
    /// The guest has opened it and was told so.
    Open(Opening),
    /// The guest has closed it, and a server may still touch its rings.
    Closing {
        open_epoch: u32,
        /// `None`: only the end of the server is waited for.
        deadline: Option<DeadlineId>,
        /// The guest has opened it again meanwhile and was told so. No server has heard of it.
        reopen: Option<Opening>,
    },
}

/// One opening of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Never the same for two openings of a VM.
    pub open_epoch: u32,
    pub ring_gpadl: u32,
    pub downstream_page_offset: u32,
    pub target_vp: u16,
    pub seen: Seen,
}

/// Which servers have heard of an opening. The first one starts afresh, the later ones recover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    ByNone,
    ByServer,
    /// A server gave it up because the guest broke the rules. It stays open until the guest closes it.
    Broken,
}

/// Why an OPENCHANNEL is refused. The guest's fault, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenFault {
    #[error("channel {0} is not offered")]
    NotOffered(ChannelId),
    #[error("channel {0} is open already")]
    AlreadyOpen(ChannelId),
    #[error("ring GPADL {0:#x} does not exist, is incomplete or belongs to another channel")]
    RingGpadl(u32),
    #[error("ring GPADL {0:#x} is not a whole number of pages")]
    RingNotPages(u32),
    #[error("rings of {pages} pages cannot be cut at page {downstream_page_offset}")]
    DownstreamOffset {
        pages: usize,
        downstream_page_offset: u32,
    },
    #[error("there is no VP {0}")]
    NoSuchVp(u32),
    #[error("{0} channels are open, and no more can be")]
    TooMany(usize),
}

/// What an OPENCHANNEL asks for.
#[derive(Clone, Copy, Debug)]
pub struct OpenClaim {
    pub ring_gpadl: u32,
    pub downstream_page_offset: u32,
    pub target_vp: u32,
}

impl Channel {
    /// The opening that the guest believes in.
    pub fn opening(&self) -> Option<&Opening> {
        match &self.state {
            ChannelState::Open(opening) => Some(opening),
            ChannelState::Closing { reopen, .. } => reopen.as_ref(),
            ChannelState::Closed => None,
        }
    }

    pub fn opening_mut(&mut self) -> Option<&mut Opening> {
        match &mut self.state {
            ChannelState::Open(opening) => Some(opening),
            ChannelState::Closing { reopen, .. } => reopen.as_mut(),
            ChannelState::Closed => None,
        }
    }
}

/// Checks an OPENCHANNEL of `channel`, whose ring GPADL is `gpadl` if there is one of that handle.
///
/// The pages of each ring: one of control and at least one of data.
pub fn check_open(
    channel: ChannelId,
    claim: OpenClaim,
    gpadl: Option<&Gpadl>,
    vp_count: u16,
) -> Result<u16, OpenFault> {
    let gpadl = gpadl
        .filter(|gpadl| gpadl.channel == channel && gpadl.state == GpadlState::Ready)
        .ok_or(OpenFault::RingGpadl(claim.ring_gpadl))?;
    if gpadl.byte_offset != 0 || u64::from(gpadl.byte_count) % PAGE_BYTES != 0 {
        return Err(OpenFault::RingNotPages(claim.ring_gpadl));
    }
    let pages = gpadl.pages.len();
    let to_host_pages = usize::try_from(claim.downstream_page_offset).ok();
    let to_guest_pages = to_host_pages.and_then(|to_host| pages.checked_sub(to_host));
    if to_host_pages.is_none_or(|pages| pages < 2) || to_guest_pages.is_none_or(|pages| pages < 2) {
        return Err(OpenFault::DownstreamOffset {
            pages,
            downstream_page_offset: claim.downstream_page_offset,
        });
    }
    u16::try_from(claim.target_vp)
        .ok()
        .filter(|&vp| vp < vp_count)
        .ok_or(OpenFault::NoSuchVp(claim.target_vp))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(pages: u32) -> Gpadl {
        Gpadl {
            channel: ChannelId(1),
            byte_count: pages * 4096,
            byte_offset: 0,
            pages: (0..u64::from(pages)).collect(),
            state: GpadlState::Ready,
        }
    }

    fn claim(downstream_page_offset: u32) -> OpenClaim {
        OpenClaim {
            ring_gpadl: 7,
            downstream_page_offset,
            target_vp: 0,
        }
    }

    #[test]
    fn each_ring_has_a_control_page_and_a_page_of_data() {
        let check = |pages, cut| check_open(ChannelId(1), claim(cut), Some(&ring(pages)), 1).is_ok();
        assert!(check(4, 2));
        assert!(check(9, 7));
        for (pages, cut) in [
            (4, 0),
            (4, 1),
            (4, 3),
            (4, 4),
            (4, 5),
            (4, u32::MAX),
            (3, 2),
            (1, 0),
            (2, 1),
        ] {
            assert!(!check(pages, cut), "{pages} pages cut at {cut}");
        }
    }

    #[test]
    fn the_ring_gpadl_is_ready_and_of_this_channel() {
        let open = |gpadl: &Gpadl| check_open(ChannelId(1), claim(2), Some(gpadl), 1);
        let good = ring(4);
        assert_eq!(open(&good), Ok(0));
        assert_eq!(
            check_open(ChannelId(1), claim(2), None, 1),
            Err(OpenFault::RingGpadl(7))
        );
        let other = Gpadl {
            channel: ChannelId(2),
            ..good.clone()
        };
        assert_eq!(open(&other), Err(OpenFault::RingGpadl(7)));
        for state in [
            GpadlState::Assembling { page_count: 4 },
            GpadlState::Doomed,
            GpadlState::Releasing {
                deadline: None,
                answer: true,
            },
        ] {
            assert_eq!(
                open(&Gpadl {
                    state,
                    ..good.clone()
                }),
                Err(OpenFault::RingGpadl(7))
            );
        }
        let odd = Gpadl {
            byte_count: 4096 * 3 + 1,
            ..good.clone()
        };
        assert_eq!(open(&odd), Err(OpenFault::RingNotPages(7)));
        let shifted = Gpadl {
            byte_offset: 8,
            byte_count: 4096 * 3,
            ..good
        };
        assert_eq!(open(&shifted), Err(OpenFault::RingNotPages(7)));
    }

    #[test]
    fn the_target_exists() {
        for target_vp in [4, 65536, u32::MAX] {
            let claim = OpenClaim {
                target_vp,
                ..claim(2)
            };
            assert_eq!(
                check_open(ChannelId(1), claim, Some(&ring(4)), 4),
                Err(OpenFault::NoSuchVp(target_vp))
            );
        }
        let last = OpenClaim {
            target_vp: 3,
            ..claim(2)
        };
        assert_eq!(check_open(ChannelId(1), last, Some(&ring(4)), 4), Ok(3));
    }
}
