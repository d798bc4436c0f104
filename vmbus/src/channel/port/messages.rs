//! What `bulkhead-bus` says, checked and carried out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;

use super::{Attached, Channel, ChannelState, Gpadl, MAX_GPADL_PAGES, MAX_GPADLS, MAX_VPS, Port, PortEvent};
use crate::channel::endpoint::{ChannelName, ChannelParts, Endpoint, OpenFault};
use crate::channel::interrupt::NO_VP;
use crate::channel::{MAX_CHANNELS, MAX_RELID};
use crate::ipc::hello::check_protocol;
use crate::ipc::{BusToServer, Message, PeerFault};
use crate::journal::ChannelJournal;
use crate::mem::{Access, Gpn, GuestRam, PAGE_BYTES, RamLayout, SharedMap};
use crate::ring::split_channel;

impl Port {
    pub(super) fn on_message(
        &mut self,
        message: BusToServer,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PortEvent>, PeerFault> {
        if !self.serves && !matches!(message, BusToServer::Attach { .. } | BusToServer::Serve) {
            return Err(PeerFault::OutOfTurn {
                message: message.name(),
                why: "Serve comes first",
            });
        }
        match message {
            BusToServer::Attach {
                protocol,
                ram,
                vp_count,
            } => {
                check_protocol(protocol)?;
                self.on_attach(ram, vp_count, fds).map(Some)
            }
            BusToServer::Gpadl {
                channel: _,
                gpadl,
                pages,
                byte_count,
                byte_offset,
            } => self.on_gpadl(gpadl, pages, byte_count, byte_offset).map(Some),
            BusToServer::OpenChannel {
                channel,
                sub_index,
                open_epoch,
                ring_gpadl,
                downstream_page_offset,
                target_vp,
                fresh,
            } => {
                let name = ChannelName {
                    channel,
                    sub_index,
                    open_epoch,
                };
                self.on_open(name, ring_gpadl, downstream_page_offset, target_vp, fresh, fds)
            }
            BusToServer::Retarget {
                channel,
                open_epoch,
                target_vp,
            } => {
                self.check_vp(target_vp)?;
                let Some(found) = self.channel(channel, open_epoch)? else {
                    return Ok(None);
                };
                let sub_index = found.name.sub_index;
                let event = PortEvent::Retargeted {
                    channel,
                    sub_index,
                    target_vp,
                };
                Ok((found.state == ChannelState::Served).then_some(event))
            }
            BusToServer::CloseChannel { channel, open_epoch } => self.on_close(channel, open_epoch),
            BusToServer::TeardownGpadl { gpadl } => match self.gpadls.contains_key(&gpadl) {
                true => Ok(Some(PortEvent::GpadlTeardown { gpadl })),
                false => Err(PeerFault::Unknown {
                    what: "GPADL",
                    id: gpadl,
                }),
            },
            BusToServer::Quiesce { token } => Ok(Some(PortEvent::Quiesce { token })),
            BusToServer::Serve => {
                self.attached("Serve")?;
                if std::mem::replace(&mut self.serves, true) {
                    return Err(PeerFault::OutOfTurn {
                        message: "Serve",
                        why: "serving already",
                    });
                }
                Ok(Some(PortEvent::Serve))
            }
            BusToServer::HandedOver => Ok(Some(PortEvent::HandedOver)),
        }
    }

    fn on_attach(
        &mut self,
        layout: RamLayout,
        vp_count: u16,
        fds: Vec<OwnedFd>,
    ) -> Result<PortEvent, PeerFault> {
        if self.attached.is_some() {
            return Err(PeerFault::OutOfTurn {
                message: "Attach",
                why: "attached already",
            });
        }
        let [ram, event_flags] = two(fds)?;
        if !(1..=MAX_VPS).contains(&vp_count) {
            return Err(PeerFault::BadValue {
                what: "the number of VPs",
                value: u64::from(vp_count),
            });
        }
        let flags_bytes = usize::from(vp_count) * PAGE_BYTES as usize;
        let unfit = |what, why: String| PeerFault::UnfitDescriptor { what, why };
        let event_flags = SharedMap::map(event_flags.as_fd(), flags_bytes, Access::ReadWrite)
            .map_err(|error| unfit("event flags", error.to_string()))?;
        let ram_bytes = file_length(ram.as_fd()).map_err(|why| unfit("guest RAM", why))?;
        // Before mapping, so that a layout which makes no sense costs nothing.
        layout
            .validate(ram_bytes as u64)
            .map_err(|fault| unfit("guest RAM", fault.to_string()))?;
        let map = SharedMap::map(ram.as_fd(), ram_bytes, Access::ReadWrite)
            .map_err(|error| unfit("guest RAM", error.to_string()))?;
        let ram =
            GuestRam::new(Arc::new(map), layout).map_err(|fault| unfit("guest RAM", fault.to_string()))?;
        self.attached = Some(Attached {
            ram,
            event_flags: Arc::new(event_flags),
            vp_count,
        });
        warm_heap();
        Ok(PortEvent::Attached)
    }

    fn attached(&self, message: &'static str) -> Result<&Attached, PeerFault> {
        self.attached.as_ref().ok_or(PeerFault::OutOfTurn {
            message,
            why: "Attach comes first",
        })
    }

    fn on_gpadl(
        &mut self,
        gpadl: u32,
        pages: Vec<u64>,
        byte_count: u32,
        byte_offset: u32,
    ) -> Result<PortEvent, PeerFault> {
        let ram = &self.attached("Gpadl")?.ram;
        if pages.is_empty() || pages.len() > MAX_GPADL_PAGES {
            return Err(PeerFault::BadValue {
                what: "the number of a GPADL's pages",
                value: pages.len() as u64,
            });
        }
        let pages: Vec<Gpn> = pages.into_iter().map(Gpn).collect();
        let area = ram
            .paged_area(&pages, byte_offset, byte_count)
            .map_err(|_| PeerFault::BadValue {
                what: "a GPADL with pages outside of RAM",
                value: u64::from(gpadl),
            })?;
        if self.gpadls.contains_key(&gpadl) {
            return Err(PeerFault::Duplicate {
                what: "GPADL",
                id: gpadl,
            });
        }
        if self.gpadls.len() >= MAX_GPADLS {
            return Err(PeerFault::TooMany {
                what: "GPADLs",
                limit: MAX_GPADLS,
            });
        }
        let whole_pages = byte_offset == 0 && u64::from(byte_count) % PAGE_BYTES == 0;
        self.gpadls.insert(
            gpadl,
            Gpadl {
                area: area.clone(),
                whole_pages,
                released: false,
            },
        );
        Ok(PortEvent::GpadlAdded { gpadl, area })
    }

    fn on_open(
        &mut self,
        name: ChannelName,
        ring_gpadl: u32,
        downstream_page_offset: u32,
        target_vp: u16,
        fresh: bool,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PortEvent>, PeerFault> {
        let event_flags = self.attached("OpenChannel")?.event_flags.clone();
        let [kick, interrupt] = two(fds)?;
        if !(1..=MAX_RELID).contains(&name.channel) {
            return Err(PeerFault::BadValue {
                what: "a channel id",
                value: u64::from(name.channel),
            });
        }
        if name.sub_index >= MAX_CHANNELS {
            return Err(PeerFault::BadValue {
                what: "a sub-channel index",
                value: u64::from(name.sub_index),
            });
        }
        self.check_vp(target_vp)?;
        // Each index is in use once, so that the number of channels is bounded, too.
        if self.channels.contains_key(&name.channel) {
            return Err(PeerFault::Duplicate {
                what: "channel",
                id: name.channel,
            });
        }
        if self
            .channels
            .values()
            .any(|other| other.name.sub_index == name.sub_index)
        {
            return Err(PeerFault::Duplicate {
                what: "channel with index",
                id: u32::from(name.sub_index),
            });
        }
        let unknown = PeerFault::Unknown {
            what: "GPADL",
            id: ring_gpadl,
        };
        let gpadl = self
            .gpadls
            .get(&ring_gpadl)
            .filter(|gpadl| !gpadl.released)
            .ok_or(unknown)?;
        // From here on it is the guest who is to blame: it has chosen the GPADL, the cut, and the ring's contents.
        let rings = match gpadl.whole_pages {
            true => split_channel(&gpadl.area, downstream_page_offset).map_err(|fault| fault.to_string()),
            false => Err("the rings are not made of whole pages".to_owned()),
        };
        let opened = rings.and_then(|(to_host, to_guest)| {
            let parts = ChannelParts {
                to_host,
                to_guest,
                kick,
                interrupt,
                event_flags,
                target_vp,
                recorder: self.recorder.clone(),
            };
            Endpoint::open(name, parts, &self.journal, fresh).map_err(|fault: OpenFault| fault.to_string())
        });
        let state = if opened.is_ok() {
            ChannelState::Served
        } else {
            ChannelState::Broken
        };
        self.channels.insert(
            name.channel,
            Channel {
                name,
                ring_gpadl,
                state,
            },
        );
        match opened {
            Ok((endpoint, recovered)) => Ok(Some(PortEvent::ChannelOpened(Box::new(endpoint), recovered))),
            Err(why) => {
                ChannelJournal::give_up(&self.journal, name.sub_index, name.open_epoch);
                self.report_broken(name, why)?;
                Ok(None)
            }
        }
    }

    fn on_close(&mut self, channel: u32, open_epoch: u32) -> Result<Option<PortEvent>, PeerFault> {
        let Some(found) = self.channel(channel, open_epoch)? else {
            return Ok(None);
        };
        let name = found.name;
        match found.state {
            ChannelState::Served => {
                found.state = ChannelState::Closing;
                Ok(Some(PortEvent::ChannelClosing {
                    channel,
                    sub_index: name.sub_index,
                }))
            }
            ChannelState::Closing => Ok(None),
            ChannelState::Broken => {
                self.forget(name)?;
                Ok(None)
            }
        }
    }

    /// The channel; `None` if the message speaks of another opening.
    fn channel(&mut self, channel: u32, open_epoch: u32) -> Result<Option<&mut Channel>, PeerFault> {
        let found = self.channels.get_mut(&channel);
        let found = found.ok_or(PeerFault::Unknown {
            what: "channel",
            id: channel,
        })?;
        Ok((found.name.open_epoch == open_epoch).then_some(found))
    }

    fn check_vp(&self, vp: u16) -> Result<(), PeerFault> {
        let vp_count = self.attached("OpenChannel or Retarget")?.vp_count;
        match vp < vp_count || vp == NO_VP {
            true => Ok(()),
            false => Err(PeerFault::BadValue {
                what: "a VP",
                value: u64::from(vp),
            }),
        }
    }
}

/// The codec's caller has checked the number.
/// What opening channels and serving their first packets takes of malloc's heap, page by page (by count of page faults:
/// about 45 at four channels).
const HEAP_WARM_BYTES: usize = 192 << 10;
/// Well below what malloc maps by itself.
const HEAP_PIECE_BYTES: usize = 16 << 10;

/// Touches heap that is going to be used, while there is time: a page fault for each 4 KiB would come while the guest
/// waits for us. malloc keeps what is freed as long as it is told to (sandbox `sys/process.rs`).
fn warm_heap() {
    let touched: Vec<Vec<u8>> = (0..HEAP_WARM_BYTES / HEAP_PIECE_BYTES)
        .map(|_| vec![1; HEAP_PIECE_BYTES])
        .collect();
    std::hint::black_box(touched);
}

fn two(fds: Vec<OwnedFd>) -> Result<[OwnedFd; 2], PeerFault> {
    let received = fds.len();
    let message = "a message with two descriptors";
    fds.try_into().map_err(|_| PeerFault::DescriptorCount {
        message,
        expected: 2,
        received,
    })
}

fn file_length(fd: BorrowedFd<'_>) -> Result<usize, String> {
    let stat = fstat(fd).map_err(|errno| errno.to_string())?;
    usize::try_from(stat.st_size).map_err(|_| "negative length".to_owned())
}
