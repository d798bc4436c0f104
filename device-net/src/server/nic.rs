//! The NIC itself: what all of its channels share, and what is done in a round.

use super::ServerError;
use super::channel::Channel;
use super::control::Response;
use super::inspect::{Counters, Faults};
use super::recover::abandon_all;
use super::saved::{Saved, State};
use super::transmit::{Hearing, Transmission, Work};
use crate::backend::{Backend, Gone};
use crate::config::NicConfig;
use crate::netvsp::buffers::SendBuffer;
use crate::netvsp::receive::{Credits, ReceiveBuffer};
use crate::rndis::control::Traits;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;
use vmbus::channel::{Endpoint, Port, Recovered};
use vmbus::mem::{GuestRam, GuestSpans, PagedArea};
use vmbus::ring::PacketBuf;

/// The NIC without its sockets to our own processes.
pub struct Nic {
    pub(super) traits: Traits,
    /// `None` after the other side is gone: the link is down.
    pub(super) backend: Option<Box<dyn Backend>>,
    /// The backend may have frames that were not read.
    pub(super) backend_readable: bool,
    /// Frames came while nobody wanted any; they are thrown away before the first that is wanted.
    pub(super) backlog_stale: bool,
    pub(super) ram: Option<GuestRam>,
    /// Names the opening of the primary channel.
    pub(super) primary_epoch: Option<u32>,
    pub(super) state: State,
    pub(super) channels: BTreeMap<u16, Channel>,
    pub(super) receive_buffer: Option<(ReceiveBuffer, PagedArea)>,
    pub(super) send_buffer: Option<(SendBuffer, PagedArea)>,
    pub(super) credits: Credits,
    /// Sub-channels that a predecessor had open and that were not handed over yet.
    pub(super) awaited: BTreeSet<u16>,
    /// Sub-channels that were handed over before their primary.
    pub(super) early: Vec<(Box<Endpoint>, Recovered)>,
    /// Packets of the channel that is being read.
    pub(super) batch: VecDeque<Work>,
    /// Packets whose frames the backend has not taken.
    pub(super) queued: VecDeque<Transmission>,
    /// Responses that wait for a sub-allocation or for room in the ring.
    pub(super) responses: VecDeque<Response>,
    pub(super) hearing: Hearing,
    /// Sub-channels to be offered once the answer that grants them is published.
    pub(super) offer: Option<u16>,
    /// Told to stop: neither rings nor backend are read any more.
    pub(super) stops: bool,
    pub(super) events: Vec<String>,
    pub(super) packet_buf: PacketBuf,
    pub(super) window: Vec<u8>,
    pub(super) head: Vec<u8>,
    pub(super) spare_spans: Vec<GuestSpans>,
    pub(super) counters: Counters,
    pub(super) faults: Faults,
}

impl Nic {
    pub fn new(config: &NicConfig, backend: Box<dyn Backend>) -> Self {
        Self {
            traits: Traits {
                mac: config.mac,
                mtu_bytes: config.mtu,
                link_up: true,
                offloads: true,
                queues: config.max_queues,
            },
            backend: Some(backend),
            backend_readable: true,
            backlog_stale: false,
            ram: None,
            primary_epoch: None,
            state: State::default(),
            channels: BTreeMap::new(),
            receive_buffer: None,
            send_buffer: None,
            credits: Credits::default(),
            awaited: BTreeSet::new(),
            early: Vec::new(),
            batch: VecDeque::new(),
            queued: VecDeque::new(),
            responses: VecDeque::new(),
            hearing: Hearing::default(),
            offer: None,
            stops: false,
            events: Vec::new(),
            packet_buf: PacketBuf::new(),
            window: Vec::new(),
            head: Vec::new(),
            spare_spans: Vec::new(),
            counters: Counters::default(),
            faults: Faults::default(),
        }
    }

    /// Does everything that can be done now, in bounded portions. True if there may be more.
    pub fn round(&mut self, port: &Port) -> Result<bool, ServerError> {
        let mut busy = false;
        if !self.stops {
            for index in self.open_channels() {
                busy |= self.serve_channel(port, index)?;
                // The guest goes on with these while the next channel is served. Not with the answer that it gets frames from
                // now on: what is on its way before that is thrown away first.
                if let Some(channel) = self.channels.get_mut(&index)
                    && !self.backlog_stale
                {
                    let published = channel.endpoint.publish();
                    channel.check(published);
                }
            }
            self.send_responses();
            busy |= self.receive_frames(port);
        }
        for channel in self.channels.values_mut() {
            let published = channel.endpoint.publish();
            channel.check(published);
        }
        Ok(busy)
    }

    /// Arranges for kicks. True: do not sleep, there is something to do already.
    pub fn prepare_sleep(&mut self) -> bool {
        let mut busy = false;
        if self.stops {
            return busy;
        }
        for channel in self.channels.values_mut() {
            let more = channel.endpoint.prepare_sleep();
            busy |= channel.check(more).unwrap_or(false);
        }
        busy
    }

    /// From now on packets and frames stay where they are.
    pub fn stop_reading(&mut self) {
        self.stops = true;
        self.retry_queued();
    }

    /// Before a polite stop: what the backend has not taken is dropped, so that the successor has nothing to replay.
    pub fn settle(&mut self) {
        for transmission in std::mem::take(&mut self.queued) {
            self.counters.sent_overflow += 1;
            self.finish(transmission);
        }
        for channel in self.channels.values_mut() {
            let published = channel.endpoint.publish();
            channel.check(published);
        }
    }

    /// The process ends: what was taken and not answered is the successor's.
    pub fn leave_to_successor(&mut self) {
        let responses = self.responses.drain(..).filter_map(|response| response.token);
        let queued = self
            .queued
            .drain(..)
            .filter_map(|transmission| transmission.token);
        let batch = self.batch.drain(..).filter_map(Work::into_token);
        for token in responses.chain(queued).chain(batch) {
            token.abandon();
        }
        for (_, recovered) in self.early.drain(..) {
            abandon_all(recovered);
        }
    }

    pub fn on_backend_ready(&mut self) {
        self.backend_readable = true;
        self.retry_queued();
    }

    pub fn backend_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.as_ref().map(|backend| backend.as_fd())
    }

    /// Whether the backend is to be watched for room.
    pub fn wants_room(&self) -> bool {
        self.backend
            .as_ref()
            .is_some_and(|backend| backend.is_behind() || !self.queued.is_empty())
    }

    pub fn take_offer(&mut self) -> Option<u16> {
        self.offer.take()
    }

    pub fn take_events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.events)
    }

    pub fn open_channels(&self) -> Vec<u16> {
        self.channels.keys().copied().collect()
    }

    /// Channels that are not served any more, and why.
    pub fn broken_channels(&self) -> Vec<(u16, String)> {
        self.channels
            .iter()
            .filter_map(|(index, channel)| Some((*index, channel.broken.clone()?)))
            .collect()
    }

    pub fn retarget(&mut self, index: u16, target_vp: u16) {
        if let Some(channel) = self.channels.get_mut(&index) {
            channel.endpoint.retarget(target_vp);
        }
    }

    /// The other side of the backend is gone: the link goes down, frames are dropped from now on.
    pub(super) fn backend_gone(&mut self, gone: &Gone) {
        tracing::error!("the link is down: {gone}");
        self.events.push(format!("the link is down: {gone}"));
        self.backend = None;
        self.traits.link_up = false;
        for transmission in std::mem::take(&mut self.queued) {
            self.counters.sent_dropped += 1;
            self.finish(transmission);
        }
        if let Some(message) = self.state.adapter.on_link(false) {
            self.responses.push_back(Response { token: None, message });
            self.send_responses();
        }
    }

    /// Saves the state for a successor. Without a primary channel there is nothing to inherit.
    pub(super) fn save(&self, port: &Port) -> Result<(), ServerError> {
        match self.primary_epoch {
            Some(epoch) => Ok(port.save_state(epoch, &Saved(self.state.clone()))?),
            None => Ok(()),
        }
    }

    /// An empty list of guest memory.
    pub(super) fn spans(&mut self) -> Option<GuestSpans> {
        match self.spare_spans.pop() {
            Some(spans) => Some(spans),
            None => self.ram.as_ref().map(GuestRam::spans),
        }
    }

    pub(super) fn keep_spans(&mut self, mut spans: GuestSpans) {
        spans.clear();
        self.spare_spans.push(spans);
    }
}
