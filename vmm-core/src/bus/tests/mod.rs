#![forbid(unsafe_code)]
//! A shell for the tests: it does every action of the bus on a model of guest, servers and KVM, and asserts what must
//! hold after each step, whatever guest and servers do.

mod conversations;
mod floods;
mod ports;
mod random;
mod servers;
mod table;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::messages::{BusToServer, ServerToBus};
use vmbus::mem::RamLayout;
use vmbus::wire::{
    ChannelId, GpadlBody, GpadlHeader, GpadlId, GuestToHost, Guid, HostToGuest, InitiateContact, Offer,
    OpenChannel, Version,
};

use super::{Action, Bus, DeadlineId, DeviceId, DeviceOffer, PostStatus};

const DISK: DeviceId = DeviceId(0);
const NIC: DeviceId = DeviceId(1);
const VPS: u16 = 4;
const RAM_BYTES: u64 = 64 << 20;

/// What one server process knows, by what it was told.
#[derive(Debug, Default)]
struct ServerModel {
    generation: u32,
    attached: bool,
    gpadls: BTreeSet<u32>,
    /// Channel to open epoch.
    open: BTreeMap<u32, u32>,
    inbox: VecDeque<BusToServer>,
}

/// The world around the bus.
struct World {
    bus: Bus,
    servers: BTreeMap<DeviceId, ServerModel>,
    waiting: BTreeMap<DeviceId, ServerModel>,
    last_generation: BTreeMap<DeviceId, u32>,
    posted: Vec<(u16, HostToGuest)>,
    kicks: BTreeSet<u32>,
    interrupts: BTreeMap<u32, u16>,
    raised: Vec<(u32, u16)>,
    deadlines: BTreeSet<DeadlineId>,
    offered: BTreeMap<u32, Offer>,
    rescinded: BTreeSet<u32>,
    epochs: BTreeSet<u32>,
    slow: Vec<(DeviceId, String)>,
    misbehaved: Vec<(DeviceId, String)>,
    quiesced: Vec<u64>,
    log_lines: usize,
    /// What the guest asked and was not answered yet: message type and key to number of requests.
    owed: BTreeMap<(u32, u32), u32>,
}

fn instance(device: DeviceId) -> Guid {
    Guid([u8::try_from(device.0).unwrap_or(0xFF); 16])
}

fn offer_of(device: DeviceId, max_sub_channels: u16) -> DeviceOffer {
    DeviceOffer {
        interface: Guid([0xAB; 16]),
        instance: instance(device),
        max_sub_channels,
    }
}

impl World {
    /// A VM with a disk and a NIC, whose servers have said hello; the guest has not booted.
    fn new() -> Self {
        let mut world = Self::without_servers();
        world.attach(DISK);
        world.attach(NIC);
        world
    }

    fn without_servers() -> Self {
        let mut world = World {
            bus: Bus::new(VPS, RamLayout::for_size(RAM_BYTES)),
            servers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            last_generation: BTreeMap::new(),
            posted: Vec::new(),
            kicks: BTreeSet::new(),
            interrupts: BTreeMap::new(),
            raised: Vec::new(),
            deadlines: BTreeSet::new(),
            offered: BTreeMap::new(),
            rescinded: BTreeSet::new(),
            epochs: BTreeSet::new(),
            slow: Vec::new(),
            misbehaved: Vec::new(),
            quiesced: Vec::new(),
            log_lines: 0,
            owed: BTreeMap::new(),
        };
        for device in [DISK, NIC] {
            let actions = world
                .bus
                .add_device(device, offer_of(device, 3))
                .expect("a good device");
            world.act(actions);
        }
        world
    }

    /// A world in which the guest has made contact and asked for offers.
    fn booted() -> Self {
        let mut world = Self::new();
        world.boot();
        world
    }

    fn boot(&mut self) {
        self.contact(Version::V5_3, 0);
        self.guest(GuestToHost::RequestOffers);
    }

    // --- the guest ---

    fn contact(&mut self, version: Version, target_vp: u32) {
        self.guest(GuestToHost::InitiateContact(InitiateContact {
            version,
            target_vp,
            interrupt_page_or_target: 2,
            parent_to_child_monitor: 0,
            child_to_parent_monitor: 0,
        }));
    }

    fn guest(&mut self, message: GuestToHost<'_>) {
        self.note_owed(&message);
        self.post_bytes(message.emit().as_bytes());
    }

    fn post_bytes(&mut self, bytes: &[u8]) {
        let (status, actions) = self.bus.on_post_message(1, 1, bytes);
        assert_eq!(status, PostStatus::Success);
        self.act(actions);
    }

    /// Makes a GPADL as Linux does: up to 26 pages in the header, up to 28 in each body.
    fn gpadl(&mut self, channel: ChannelId, gpadl: u32, pages: u32) {
        let mut bytes = Vec::new();
        bytes.extend((pages * 4096).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        for page in 0..u64::from(pages) {
            bytes.extend((page + 16).to_le_bytes());
        }
        let (first, rest) = bytes.split_at(bytes.len().min(8 + 26 * 8));
        self.guest(GuestToHost::GpadlHeader(GpadlHeader {
            channel,
            gpadl: GpadlId(gpadl),
            range_bytes: u16::try_from(bytes.len()).expect("few pages"),
            range_count: 1,
            ranges: first,
        }));
        for ranges in rest.chunks(28 * 8) {
            self.guest(GuestToHost::GpadlBody(GpadlBody {
                message_number: 0,
                gpadl: GpadlId(gpadl),
                ranges,
            }));
        }
    }

    fn open(&mut self, channel: ChannelId, gpadl: u32, target_vp: u32) {
        self.guest(GuestToHost::OpenChannel(OpenChannel {
            channel,
            open_id: channel.0,
            ring_gpadl: GpadlId(gpadl),
            target_vp,
            downstream_page_offset: 4,
            user_data: [0; 120],
        }));
    }

    fn gpadl_and_open(&mut self, channel: ChannelId, gpadl: u32) {
        self.gpadl(channel, gpadl, 8);
        self.open(channel, gpadl, 0);
    }

    fn close(&mut self, channel: ChannelId) {
        self.guest(GuestToHost::CloseChannel { channel });
    }

    fn teardown(&mut self, channel: ChannelId, gpadl: u32) {
        self.guest(GuestToHost::GpadlTeardown {
            channel,
            gpadl: GpadlId(gpadl),
        });
    }

    fn release(&mut self, channel: ChannelId) {
        self.guest(GuestToHost::RelidReleased { channel });
    }

    // --- servers ---

    /// A new server process connects and says hello.
    fn attach(&mut self, device: DeviceId) {
        let generation = self.connect(device);
        self.say(
            device,
            ServerToBus::Hello {
                protocol: PROTOCOL,
                generation,
            },
        );
    }

    fn connect(&mut self, device: DeviceId) -> u32 {
        let last = self.last_generation.entry(device).or_insert(0);
        *last += 1;
        let generation = *last;
        let model = ServerModel {
            generation,
            ..ServerModel::default()
        };
        self.servers.insert(device, model);
        let actions = self.bus.server_attached(device, generation);
        self.act(actions);
        generation
    }

    fn say(&mut self, device: DeviceId, message: ServerToBus) {
        let Some(server) = self.servers.get_mut(&device) else {
            return;
        };
        match message {
            ServerToBus::Hello { .. } => server.attached = true,
            ServerToBus::GpadlReleased { gpadl } => {
                server.gpadls.remove(&gpadl);
            }
            ServerToBus::ChannelClosed { channel, open_epoch } => {
                if server.open.get(&channel) == Some(&open_epoch) {
                    server.open.remove(&channel);
                }
            }
            ServerToBus::Quiesced { .. } => {
                server.gpadls.clear();
                server.open.clear();
            }
            ServerToBus::OfferSubChannels { .. } | ServerToBus::ChannelBroken { .. } => {}
        }
        let generation = server.generation;
        let actions = self.bus.on_server_message(device, generation, message);
        self.act(actions);
    }

    /// The server answers the oldest message that wants an answer; whether there was one.
    fn serve_one(&mut self, device: DeviceId) -> bool {
        let Some(server) = self.servers.get_mut(&device) else {
            return false;
        };
        while let Some(message) = server.inbox.pop_front() {
            let answer = match message {
                BusToServer::CloseChannel { channel, open_epoch } => {
                    ServerToBus::ChannelClosed { channel, open_epoch }
                }
                BusToServer::TeardownGpadl { gpadl } => ServerToBus::GpadlReleased { gpadl },
                BusToServer::Quiesce { token } => ServerToBus::Quiesced { token },
                BusToServer::Attach { .. }
                | BusToServer::Serve
                | BusToServer::HandedOver
                | BusToServer::Gpadl { .. }
                | BusToServer::OpenChannel { .. }
                | BusToServer::Retarget { .. } => continue,
            };
            self.say(device, answer);
            return true;
        }
        false
    }

    fn serve(&mut self, device: DeviceId) {
        while self.serve_one(device) {}
    }

    /// A successor connects while a server is there.
    fn connect_waiting(&mut self, device: DeviceId) -> u32 {
        let last = self.last_generation.entry(device).or_insert(0);
        *last += 1;
        let generation = *last;
        let model = ServerModel {
            generation,
            ..ServerModel::default()
        };
        self.waiting.insert(device, model);
        let actions = self.bus.server_attached(device, generation);
        self.act(actions);
        generation
    }

    /// The successor speaks.
    fn say_waiting(&mut self, device: DeviceId, message: ServerToBus) {
        let Some(server) = self.waiting.get_mut(&device) else {
            return;
        };
        server.attached |= matches!(message, ServerToBus::Hello { .. });
        let generation = server.generation;
        let actions = self.bus.on_server_message(device, generation, message);
        self.act(actions);
    }

    /// A successor connects and says hello.
    fn attach_waiting(&mut self, device: DeviceId) {
        let generation = self.connect_waiting(device);
        let protocol = PROTOCOL;
        self.say_waiting(device, ServerToBus::Hello { protocol, generation });
    }

    /// The process of the successor dies and is reaped.
    fn die_waiting(&mut self, device: DeviceId) {
        if let Some(server) = self.waiting.remove(&device) {
            let actions = self.bus.server_gone(device, server.generation);
            self.act(actions);
        }
    }

    /// The process dies and is reaped; a successor that waits takes its place.
    fn die(&mut self, device: DeviceId) {
        if let Some(server) = self.servers.remove(&device) {
            if let Some(successor) = self.waiting.remove(&device) {
                self.servers.insert(device, successor);
            }
            let actions = self.bus.server_gone(device, server.generation);
            self.act(actions);
        }
    }

    // --- what came of it ---

    /// The messages to the guest since the last call.
    fn heard(&mut self) -> Vec<HostToGuest> {
        std::mem::take(&mut self.posted)
            .into_iter()
            .map(|(_, message)| message)
            .collect()
    }

    fn inbox(&self, device: DeviceId) -> Vec<BusToServer> {
        self.servers
            .get(&device)
            .map(|server| server.inbox.iter().cloned().collect())
            .unwrap_or_default()
    }

    /// The living offer of a device with this index.
    fn channel(&self, device: DeviceId, sub_index: u16) -> ChannelId {
        let found = self.offered.values().find(|offer| {
            offer.instance == instance(device)
                && offer.sub_channel_index == sub_index
                && !self.rescinded.contains(&offer.channel.0)
        });
        found.expect("it is offered").channel
    }

    fn faults(&self) -> u64 {
        self.bus.tally.counts().map(|(_, count)| count).sum()
    }

    /// Whether any server may touch guest memory, by what it was told and has not let go of.
    fn anyone_holds(&self) -> bool {
        self.servers
            .values()
            .any(|server| !server.gpadls.is_empty() || !server.open.is_empty())
    }

    fn note_owed(&mut self, message: &GuestToHost<'_>) {
        let key = match message {
            GuestToHost::OpenChannel(open) => (6, open.channel.0),
            GuestToHost::GpadlHeader(header) => (10, header.gpadl.0),
            GuestToHost::GpadlTeardown { gpadl, .. } => (12, gpadl.0),
            GuestToHost::ModifyChannel { channel, .. } => (24, channel.0),
            GuestToHost::InitiateContact(_) => (15, 0),
            GuestToHost::Unload => (17, 0),
            GuestToHost::RelidReleased { channel } => {
                if self.rescinded.remove(&channel.0) {
                    self.offered.remove(&channel.0);
                }
                return;
            }
            _ => return,
        };
        *self.owed.entry(key).or_insert(0) += 1;
    }

    fn pay(&mut self, message: &HostToGuest) {
        let key = match message {
            HostToGuest::OpenChannelResult { channel, .. } => (6, channel.0),
            HostToGuest::GpadlCreated { gpadl, .. } => (10, gpadl.0),
            HostToGuest::GpadlTorndown { gpadl } => (12, gpadl.0),
            HostToGuest::ModifyChannelResponse { channel, .. } => (24, channel.0),
            HostToGuest::VersionResponse(_) => (15, 0),
            HostToGuest::UnloadResponse => (17, 0),
            _ => return,
        };
        let owed = self.owed.get_mut(&key);
        assert!(
            owed.as_ref().is_some_and(|owed| **owed > 0),
            "answered unasked: {message:?}"
        );
        if let Some(owed) = owed {
            *owed -= 1;
        }
    }

    /// Does the actions, and asserts that each is right at its moment.
    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act_one(action);
        }
        let waits: BTreeSet<DeadlineId> = self.bus.waits.keys().copied().collect();
        assert_eq!(
            waits, self.deadlines,
            "the shell keeps exactly the deadlines that the bus knows"
        );
        assert!(self.bus.out.is_empty());
    }

    fn act_one(&mut self, action: Action) {
        match action {
            Action::PostToGuest { vp, message } => self.on_post(vp, message),
            Action::BindSignal { channel } => assert!(self.kicks.insert(channel.0), "bound twice"),
            Action::UnbindSignal { channel } => assert!(self.kicks.remove(&channel.0), "unbound twice"),
            Action::BindInterrupt { channel, vp } => {
                assert!(vp < VPS);
                assert!(self.interrupts.insert(channel.0, vp).is_none(), "bound twice");
            }
            Action::RebindInterrupt { channel, vp } => {
                assert!(vp < VPS);
                assert!(
                    self.interrupts.insert(channel.0, vp).is_some(),
                    "moved before bound"
                );
            }
            Action::UnbindInterrupt { channel } => {
                assert!(self.interrupts.remove(&channel.0).is_some(), "unbound twice");
            }
            Action::RaiseInterrupt { channel, vp } => {
                assert_eq!(self.interrupts.get(&channel.0), Some(&vp));
                self.raised.push((channel.0, vp));
            }
            Action::SendToServer {
                device,
                generation,
                message,
            } => self.on_send(device, generation, message),
            Action::SetDeadline { id, ms } => {
                assert!(ms > 0);
                assert!(self.deadlines.insert(id), "set twice");
            }
            Action::ClearDeadline { id } => assert!(self.deadlines.remove(&id), "cleared twice"),
            Action::ReportSlow {
                device, waiting_for, ..
            } => self.slow.push((device, waiting_for)),
            Action::Misbehaves { device, why, .. } => self.misbehaved.push((device, why)),
            Action::QuiesceDone { token } => {
                assert!(!self.anyone_holds(), "a reset while a server may touch memory");
                self.quiesced.push(token);
            }
            Action::Log { .. } => self.log_lines += 1,
        }
    }

    fn on_post(&mut self, vp: u16, message: HostToGuest) {
        assert!(vp < VPS);
        self.pay(&message);
        match &message {
            HostToGuest::OfferChannel(offer) => {
                assert!((1..=2047).contains(&offer.channel.0));
                assert!(offer.dedicated_interrupt && !offer.monitor_allocated);
                let twin = self.offered.values().find(|other| {
                    other.instance == offer.instance && other.sub_channel_index == offer.sub_channel_index
                });
                assert_eq!(twin, None, "offered again before it was given back");
                assert!(
                    self.offered.insert(offer.channel.0, *offer).is_none(),
                    "relid in use"
                );
            }
            HostToGuest::RescindChannelOffer { channel } => {
                assert!(self.offered.contains_key(&channel.0));
                assert!(self.rescinded.insert(channel.0), "rescinded twice");
            }
            HostToGuest::GpadlTorndown { gpadl } => {
                let holder = self
                    .servers
                    .values()
                    .find(|server| server.gpadls.contains(&gpadl.0));
                assert!(holder.is_none(), "torn down while {holder:?} may touch it");
            }
            HostToGuest::UnloadResponse | HostToGuest::VersionResponse(_) => {
                assert!(!self.anyone_holds(), "answered while a server may touch memory");
                self.offered.clear();
                self.rescinded.clear();
                assert!(self.kicks.is_empty() && self.interrupts.is_empty());
            }
            _ => {}
        }
        self.posted.push((vp, message));
    }

    fn on_send(&mut self, device: DeviceId, generation: u32, message: BusToServer) {
        if let Some(waiting) = self.waiting.get_mut(&device)
            && waiting.generation == generation
        {
            assert!(waiting.attached, "only after its hello");
            assert!(
                matches!(message, BusToServer::Attach { .. }),
                "told {message:?} while it waits"
            );
            waiting.inbox.push_back(message);
            return;
        }
        let server = self
            .servers
            .get_mut(&device)
            .expect("only to a server that is there");
        assert_eq!(server.generation, generation);
        assert!(server.attached, "only after its hello");
        match &message {
            BusToServer::Attach { vp_count, .. } => {
                assert_eq!(*vp_count, VPS);
                assert!(server.inbox.is_empty(), "Attach comes first");
            }
            BusToServer::Gpadl { gpadl, pages, .. } => {
                assert!(server.gpadls.insert(*gpadl), "told twice");
                assert!(pages.iter().all(|page| *page < RAM_BYTES / 4096));
            }
            BusToServer::OpenChannel {
                channel,
                open_epoch,
                ring_gpadl,
                fresh,
                target_vp,
                ..
            } => {
                assert!(server.gpadls.contains(ring_gpadl), "its ring is known");
                assert!(
                    server.open.insert(*channel, *open_epoch).is_none(),
                    "opened while open"
                );
                assert_eq!(
                    self.epochs.insert(*open_epoch),
                    *fresh,
                    "fresh the first time only"
                );
                assert!(self.kicks.contains(channel));
                assert_eq!(self.interrupts.get(channel), Some(target_vp));
            }
            BusToServer::Retarget {
                channel, open_epoch, ..
            }
            | BusToServer::CloseChannel { channel, open_epoch } => {
                assert_eq!(server.open.get(channel), Some(open_epoch));
            }
            BusToServer::TeardownGpadl { gpadl } => assert!(server.gpadls.contains(gpadl)),
            BusToServer::Quiesce { .. } | BusToServer::Serve | BusToServer::HandedOver => {}
        }
        server.inbox.push_back(message);
    }
}
