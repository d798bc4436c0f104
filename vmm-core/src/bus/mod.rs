#![forbid(unsafe_code)]
//! The VMBus control plane: which channels exist, who has them open, and who must let go of what. Pure.
//!
//! ```text
//!   guest ── HvPostMessage ──▶ on_post_message ─┐                     ┌─▶ PostToGuest       SynIC
//!   server ── its socket ────▶ on_server_message│    ┌─────────────┐  ├─▶ SendToServer      sockets
//!   supervisor ──────────────▶ server_attached, ├──▶ │     Bus     │ ─┼─▶ Bind*, Unbind*    KVM eventfds
//!                              server_gone      │    └─────────────┘  ├─▶ Set-, ClearDeadline
//!   clock ───────────────────▶ on_deadline      ┘                     └─▶ Misbehaves, …     supervisor
//! ```
//!
//! Input in, a list of actions out, to be done in order: no descriptor, clock or system call in here. The Bus
//! owns the truth about offers, GPADLs, openings and targets for the whole life of the VM; servers come and go,
//! and each is told all of it when it says hello ([`servers`]).
//!
//! # Who waits for whom
//!
//! The guest waits without a limit for VERSION_RESPONSE, OPENCHANNEL_RESULT, GPADL_CREATED, GPADL_TORNDOWN,
//! MODIFYCHANNEL_RESPONSE and UNLOAD_RESPONSE. All are answered here and now, whether a server is attached or
//! not, with one exception: TORNDOWN, UNLOAD_RESPONSE and the VERSION_RESPONSE of a new contact promise that nobody
//! touches the guest's pages any more. They wait for the server's acknowledgement or its end. The supervisor
//! brings the end about when the deadline passes (`ReportSlow`).
//!
//! # What is not checked here
//!
//! Memory contents: rings and packets are the server's business. Message length and type: `vmbus::wire::control`
//! parses. The rate of messages: the SynIC's queue refuses with status 0x13 while it is full; one message of the
//! guest makes at most [`MAX_POSTS_PER_MESSAGE`] messages to it.
//!
//! A malformed or impossible message is counted, logged at a falling rate ([`tally`]), and answered as Hyper-V would
//! where the guest waits for an answer.

pub mod action;
pub mod channels;
pub mod connection;
mod debts;
pub mod gpadls;
mod guest;
pub mod offers;
pub mod servers;
mod tally;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use action::{Action, ChannelId, DeadlineId, DeviceId, LogLevel, PostStatus};
pub use offers::{AddDeviceError, DeviceOffer};

use vmbus::mem::RamLayout;

use channels::ChannelState;
use connection::{AfterUnload, Connection, OffersAsked};
use debts::Wait;
use gpadls::Gpadls;
use offers::{Channels, Device, MAX_DEVICES, MAX_OPEN_CHANNELS, MAX_SUB_CHANNELS};
use servers::Server;
use tally::Tally;

/// Limit: what the SynIC's queue must be able to take beyond the mark at which it refuses messages of the guest:
/// an offer for each device and the word that these were all.
pub const MAX_POSTS_PER_MESSAGE: usize = MAX_DEVICES + 1;

const _: () = assert!(MAX_SUB_CHANNELS as usize + 1 < MAX_POSTS_PER_MESSAGE);

/// The generation of the first server of a device; the supervisor counts from here.
pub const FIRST_GENERATION: u32 = 1;

/// Numbers of openings begin here.
const FIRST_OPEN_EPOCH: u32 = 1;

/// The control plane of one VM.
#[derive(Debug)]
pub struct Bus {
    vp_count: u16,
    ram: RamLayout,
    max_open: usize,
    connection: Connection,
    devices: BTreeMap<DeviceId, Device>,
    channels: Channels,
    gpadls: Gpadls,
    /// Every debt that has a deadline.
    waits: BTreeMap<DeadlineId, Wait>,
    next_deadline: u64,
    next_token: u64,
    next_epoch: u32,
    /// Of faults.
    tally: Tally,
    /// Of what is no fault, but can be had as often as one likes.
    news: Tally,
    /// Of the input that is being handled.
    out: Vec<Action>,
}

impl Bus {
    /// The bus of a VM with so many processors and this RAM, without devices.
    pub fn new(vp_count: u16, ram: RamLayout) -> Self {
        Self {
            vp_count,
            ram,
            max_open: MAX_OPEN_CHANNELS,
            connection: Connection::Disconnected,
            devices: BTreeMap::new(),
            channels: Channels::default(),
            gpadls: Gpadls::default(),
            waits: BTreeMap::new(),
            next_deadline: 1,
            next_token: 1,
            next_epoch: FIRST_OPEN_EPOCH,
            tally: Tally::default(),
            news: Tally::default(),
            out: Vec::new(),
        }
    }

    /// Lets no more channels than these be open at once: the guest's next OPENCHANNEL is refused. Every one of them takes
    /// descriptors in several processes.
    pub fn limit_open_channels(&mut self, most: usize) {
        self.max_open = most.min(MAX_OPEN_CHANNELS);
    }

    /// Adds a device, which is offered at once if the guest has asked for offers already (hot-added).
    ///
    /// Its first server is announced by [`Self::server_attached`] with [`FIRST_GENERATION`].
    pub fn add_device(
        &mut self,
        device: DeviceId,
        offer: DeviceOffer,
    ) -> Result<Vec<Action>, AddDeviceError> {
        if usize::try_from(device.0).is_ok_and(|number| number >= MAX_DEVICES) {
            return Err(AddDeviceError::TooManyDevices);
        }
        if self.devices.contains_key(&device) {
            return Err(AddDeviceError::IndexInUse(device));
        }
        let twin = self
            .devices
            .iter()
            .find(|(_, entry)| entry.offer.instance == offer.instance);
        if let Some((&twin, _)) = twin {
            return Err(AddDeviceError::InstanceInUse(twin));
        }
        if offer.max_sub_channels > MAX_SUB_CHANNELS {
            return Err(AddDeviceError::TooManySubChannels);
        }
        let entry = Device {
            offer,
            server: Server::None,
            waiting: Server::None,
            wanted_sub_channels: 0,
        };
        self.devices.insert(device, entry);
        self.offer_primary(device);
        Ok(self.take_actions())
    }

    /// Ends the connection for a reset of the VM, whose processors stand still. `QuiesceDone` with `token` follows,
    /// at once or when the last server has let go.
    pub fn reset(&mut self, token: u64) -> Vec<Action> {
        self.disconnect(AfterUnload::Reset { token });
        self.take_actions()
    }

    /// Everything that is known, as `path = value` pairs; what there may be thousands of comes last.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let mut entries = vec![("connection".to_owned(), self.describe_connection())];
        let mut add = |path: String, value: String| entries.push((path, value));
        for (device, entry) in &self.devices {
            let path = format!("device.{device}");
            add(format!("{path}.instance"), entry.offer.instance.to_string());
            add(format!("{path}.server"), format!("{:?}", entry.server));
            add(format!("{path}.waiting"), format!("{:?}", entry.waiting));
            add(
                format!("{path}.sub_channels"),
                format!(
                    "{} wanted, {} allowed",
                    entry.wanted_sub_channels, entry.offer.max_sub_channels
                ),
            );
        }
        add("gpadls".to_owned(), self.gpadls.count().to_string());
        add("gpadl_pages".to_owned(), self.gpadls.page_count().to_string());
        add("waits".to_owned(), self.waits.len().to_string());
        for (what, count) in self.tally.counts() {
            add(format!("fault.{}", what.replace(' ', "_")), count.to_string());
        }
        for (channel, entry) in self.channels.iter() {
            let path = format!("channel.{channel}");
            add(
                format!("{path}.device"),
                format!("{} index {}", entry.device, entry.sub_index),
            );
            add(format!("{path}.standing"), format!("{:?}", entry.standing));
            let state = match &entry.state {
                ChannelState::Closed => "Closed".to_owned(),
                ChannelState::Open(opening) => format!("{opening:?}"),
                ChannelState::Closing {
                    open_epoch, reopen, ..
                } => {
                    format!("Closing, epoch {open_epoch}, then {reopen:?}")
                }
            };
            add(format!("{path}.state"), state);
        }
        entries
    }

    fn describe_connection(&self) -> String {
        match self.connection {
            Connection::Disconnected => "disconnected".to_owned(),
            Connection::Unloading { then } => format!("unloading, then {then:?}"),
            Connection::Connected(connected) => {
                let offers = match connected.offers {
                    OffersAsked::NotYet => "offers not asked for",
                    OffersAsked::Asked => "offers made",
                };
                format!(
                    "version {}, messages to VP {}, {offers}",
                    connected.version, connected.target_vp
                )
            }
        }
    }

    fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.out)
    }

    fn log(&mut self, level: LogLevel, text: std::fmt::Arguments<'_>) {
        self.out.push(Action::Log {
            level,
            text: text.to_string(),
        });
    }

    /// Tells of what the guest may do any number of times; ever more rarely, as with faults.
    fn news(&mut self, what: &'static str, detail: std::fmt::Arguments<'_>) {
        match self.news.count(what) {
            Some(1) => self.log(LogLevel::Info, format_args!("{what}{detail}")),
            Some(count) => self.log(
                LogLevel::Info,
                format_args!("{what}{detail}, {count} times so far"),
            ),
            None => {}
        }
    }

    /// Counts a fault of guest or server; says so the first time, and then ever more rarely.
    fn fault(&mut self, what: &'static str, detail: std::fmt::Arguments<'_>) {
        if let Some(count) = self.tally.count(what) {
            self.log(LogLevel::Warn, format_args!("{what} ({detail}); {count} so far"));
        }
    }
}
