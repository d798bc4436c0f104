//! A server's end of the socket to `bulkhead-bus`: what is said there becomes checked objects and events.
#![forbid(unsafe_code)]

mod messages;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::MAX_CHANNELS;
use super::endpoint::{ChannelName, Endpoint};
use super::token::Recovered;
use crate::ipc::hello::PROTOCOL;
use crate::ipc::{BusToServer, PeerFault, SendError, ServerToBus, Socket};
use crate::journal::{Journal, JournalError, SaveError, SavedState, StateFault};
use crate::mem::{GuestRam, PagedArea, SharedMap};
use crate::record::{EventKind, Recorder};

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

    /// Whether to poll for writability, too, and then to call [`Self::next_event`].
    pub fn wants_write(&self) -> bool {
        self.socket.has_queued()
    }

    /// The next of what has arrived that a server has to react to. It does so before it asks again: what comes after
    /// [`PortEvent::Serve`] opens rings and journals, in which a predecessor must not be at work any more.
    ///
    /// After an error the server exits: `bulkhead-bus` is gone, or broken.
    pub fn next_event(&mut self) -> Result<Option<PortEvent>, PeerFault> {
        self.socket.flush()?;
        while let Some((message, fds)) = self.socket.recv::<BusToServer>()? {
            let event = self.on_message(message, fds)?;
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }

    /// Everything that has arrived, for whoever has no predecessor.
    pub fn on_readable(&mut self) -> Result<Vec<PortEvent>, PeerFault> {
        std::iter::from_fn(|| self.next_event().transpose()).collect()
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
