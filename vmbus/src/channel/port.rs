//! A server's end of the socket to `bulkhead-bus`: what is said there becomes checked objects and events.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;

use super::endpoint::{ChannelName, ChannelParts, Endpoint, OpenFault};
use super::interrupt::NO_VP;
use super::token::Recovered;
use super::{MAX_CHANNELS, MAX_RELID};
use crate::ipc::hello::{PROTOCOL, check_protocol};
use crate::ipc::{BusToServer, Message, PeerFault, SendError, ServerToBus, Socket};
use crate::journal::{ChannelJournal, Journal, JournalError, SaveError, SavedState, StateFault};
use crate::mem::{Access, Gpn, GuestRam, PAGE_BYTES, PagedArea, RamLayout, SharedMap};
use crate::record::{EventKind, Recorder};
use crate::ring::split_channel;

/// Limit: GPADLs of one device. Each channel has one for its rings, netvsp two more for its buffers.
pub const MAX_GPADLS: usize = 256;

/// Limit: what the `u16` byte count of a GPADL range allows (vmbus-protocol, GPADL_HEADER).
pub const MAX_GPADL_PAGES: usize = 8190;

/// Limit: virtual processors of a VM.
pub const MAX_VPS: u16 = 64;

/// Why a port cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot say hello: {0}")]
    Send(#[from] SendError),
}

/// What a server has to react to.
#[derive(Debug)]
pub enum PortEvent {
    /// Guest RAM is there ([`Port::ram`]). Comes once, before everything else. A predecessor may still be serving:
    /// touch nothing that is its own, and wait.
    Attached,
    /// Journal, rings and back end are this server's, once it has made sure that its predecessor's I/O is over. Comes
    /// once.
    Serve,
    /// Every channel that a predecessor served and that is still open has come. Comes once, after [`PortEvent::Serve`].
    HandedOver,
    /// A channel is open: look at its ring now. Boxed for its size.
    ChannelOpened(Box<Endpoint>, Recovered),
    /// Stop serving the channel, finish or cancel all I/O for it, then call [`Port::channel_closed`].
    ChannelClosing { channel: u32, sub_index: u16 },
    /// Call [`Endpoint::retarget`].
    Retargeted {
        channel: u32,
        sub_index: u16,
        target_vp: u16,
    },
    /// The guest has named pages for this device. [`Port::gpadl`] has the area, too.
    GpadlAdded { gpadl: u32, area: PagedArea },
    /// Stop using the area, finish or cancel all I/O on it, then call [`Port::gpadl_released`].
    GpadlTeardown { gpadl: u32 },
    /// Stop everything, finish or cancel all I/O, then call [`Port::quiesced`] with all endpoints.
    Quiesce { token: u64 },
}

/// Guest memory and event flags, since `Attach`.
#[derive(Debug)]
struct Attached {
    ram: GuestRam,
    event_flags: Arc<SharedMap>,
    vp_count: u16,
}

#[derive(Debug)]
struct Gpadl {
    area: PagedArea,
    /// Whether the area begins and ends with a page: what a ring needs.
    whole_pages: bool,
    /// The device has let go of it, but a ring lies in it.
    released: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChannelState {
    /// The server has its endpoint.
    Served,
    /// The same, and the guest waits for it to be given up.
    Closing,
    /// Given up because of a fault of the guest; the guest has not closed it yet.
    Broken,
}

#[derive(Debug)]
struct Channel {
    name: ChannelName,
    ring_gpadl: u32,
    state: ChannelState,
}

/// A server's connection to the VM.
#[derive(Debug)]
pub struct Port {
    socket: Socket,
    journal: Journal,
    attached: Option<Attached>,
    serves: bool,
    gpadls: BTreeMap<u32, Gpadl>,
    channels: BTreeMap<u32, Channel>,
    recorder: Option<Arc<Recorder>>,
}

impl Port {
    /// Maps the journal and says hello. `generation` is the supervisor's number for this process.
    pub fn new(socket: OwnedFd, journal: OwnedFd, generation: u32) -> Result<Self, PortError> {
        Self::with_journal(socket, Journal::map(journal.as_fd())?, generation)
    }

    /// Says hello.
    pub fn with_journal(socket: OwnedFd, journal: Journal, generation: u32) -> Result<Self, PortError> {
        let mut socket = Socket::new(socket);
        socket.send(
            &ServerToBus::Hello {
                protocol: PROTOCOL,
                generation,
            },
            &[],
        )?;
        Ok(Self {
            socket,
            journal,
            attached: None,
            serves: false,
            gpadls: BTreeMap::new(),
            channels: BTreeMap::new(),
            recorder: None,
        })
    }

    /// Records what the endpoints do. To be called before the first one is opened.
    pub fn set_recorder(&mut self, recorder: Arc<Recorder>) {
        self.recorder = Some(recorder);
    }

    /// Guest RAM; `None` before [`PortEvent::Attached`].
    pub fn ram(&self) -> Option<&GuestRam> {
        self.attached.as_ref().map(|attached| &attached.ram)
    }

    /// The area of a GPADL, if there is one with that number. The number is the guest's claim.
    pub fn gpadl(&self, gpadl: u32) -> Option<PagedArea> {
        self.gpadls
            .get(&gpadl)
            .filter(|gpadl| !gpadl.released)
            .map(|gpadl| gpadl.area.clone())
    }

    /// The device's journal.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Saves the device's state, for the opening `open_epoch` of its primary channel.
    pub fn save_state<S: SavedState>(&self, open_epoch: u32, state: &S) -> Result<(), SaveError> {
        self.journal.save_state(open_epoch, state)
    }

    /// The state that was saved last in this opening of the primary channel.
    pub fn load_state<S: SavedState>(&self, open_epoch: u32) -> Result<Option<S>, StateFault> {
        self.journal.load_state(open_epoch)
    }

    /// Whether to poll for writability, too, and then to call [`Self::on_readable`].
    pub fn wants_write(&self) -> bool {
        self.socket.has_queued()
    }

    /// Handles everything that has arrived. After an error the server exits: `bulkhead-bus` is gone, or broken.
    pub fn on_readable(&mut self) -> Result<Vec<PortEvent>, PeerFault> {
        self.socket.flush()?;
        let mut events = Vec::new();
        while let Some((message, fds)) = self.socket.recv::<BusToServer>()? {
            if let Some(event) = self.on_message(message, fds)? {
                events.push(event);
            }
        }
        Ok(events)
    }

    fn on_message(
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

    /// Asks for sub-channels 1 to `count` to be offered; they open when the guest wants to. `count` is bounded by
    /// [`MAX_CHANNELS`], and by the device's plan in the supervisor.
    pub fn offer_sub_channels(&mut self, count: u16) -> Result<(), PeerFault> {
        let count = count.min(MAX_CHANNELS - 1);
        Ok(self.socket.send(&ServerToBus::OfferSubChannels { count }, &[])?)
    }

    /// The server has let go of the channel: nothing of it is in flight, in the backend or elsewhere.
    ///
    /// To be called after [`PortEvent::ChannelClosing`], and only then.
    pub fn channel_closed(&mut self, endpoint: Endpoint) -> Result<(), PeerFault> {
        let name = endpoint.close();
        self.forget(name)
    }

    /// The guest has broken the channel's rules; nothing of it is in flight any more. The other channels go on.
    pub fn channel_broken(&mut self, endpoint: Endpoint, why: String) -> Result<(), PeerFault> {
        let name = endpoint.give_up(&self.journal);
        match self.channels.get_mut(&name.channel) {
            Some(channel) if channel.state == ChannelState::Closing => self.forget(name),
            Some(channel) => {
                channel.state = ChannelState::Broken;
                self.report_broken(name, why)
            }
            None => Ok(()),
        }
    }

    fn report_broken(&mut self, name: ChannelName, why: String) -> Result<(), PeerFault> {
        tracing::warn!(channel = name.channel, why, "the guest broke a channel");
        if let Some(recorder) = &self.recorder {
            recorder.record(
                EventKind::ChannelBroken,
                name.sub_index,
                u64::from(name.open_epoch),
            );
        }
        let ChannelName {
            channel, open_epoch, ..
        } = name;
        Ok(self.socket.send(
            &ServerToBus::ChannelBroken {
                channel,
                open_epoch,
                why,
            },
            &[],
        )?)
    }

    /// Removes a channel, says so, and lets go of the GPADL that had to wait for it.
    fn forget(&mut self, name: ChannelName) -> Result<(), PeerFault> {
        let ChannelName {
            channel, open_epoch, ..
        } = name;
        let Some(removed) = self.channels.remove(&channel) else {
            return Ok(());
        };
        self.socket
            .send(&ServerToBus::ChannelClosed { channel, open_epoch }, &[])?;
        match self.gpadls.get(&removed.ring_gpadl) {
            Some(gpadl) if gpadl.released => self.gpadl_released(removed.ring_gpadl),
            _ => Ok(()),
        }
    }

    /// The server does not use the area any more. To be called after [`PortEvent::GpadlTeardown`], and only then.
    ///
    /// If a channel has its rings there, the guest is told when that channel is closed.
    pub fn gpadl_released(&mut self, gpadl: u32) -> Result<(), PeerFault> {
        if self.channels.values().any(|channel| channel.ring_gpadl == gpadl) {
            if let Some(gpadl) = self.gpadls.get_mut(&gpadl) {
                gpadl.released = true;
            }
            return Ok(());
        }
        if self.gpadls.remove(&gpadl).is_none() {
            return Ok(());
        }
        Ok(self.socket.send(&ServerToBus::GpadlReleased { gpadl }, &[])?)
    }

    /// The server has let go of everything: these were all its endpoints, and nothing is in flight.
    pub fn quiesced(
        &mut self,
        token: u64,
        endpoints: impl IntoIterator<Item = Endpoint>,
    ) -> Result<(), PeerFault> {
        for endpoint in endpoints {
            let name = endpoint.close();
            self.channels.remove(&name.channel);
        }
        let served = self
            .channels
            .values()
            .filter(|channel| channel.state != ChannelState::Broken)
            .count();
        assert!(served == 0, "quiesced with {served} endpoints left");
        self.channels.clear();
        self.gpadls.clear();
        Ok(self.socket.send(&ServerToBus::Quiesced { token }, &[])?)
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The codec's caller has checked the number.
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
