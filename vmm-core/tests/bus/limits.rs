//! As much as a guest can ask for, and as much as a server that was taken over can do to the others of its VM.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{read, write};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmbus::channel::{MAX_GPADLS, Port, PortEvent};
use vmbus::journal;
use vmbus::wire::{ChannelId, GpadlHeader, GpadlId, GuestToHost, HostToGuest, OpenChannel};
use vmm_core::bus::offers::MAX_OPEN_CHANNELS;

use super::*;

/// The guest's end, and what `bulkhead-vcpu` has been given for it.
struct Guest {
    scene: Scene,
    /// Kicks of the channels that are bound.
    kicks: BTreeMap<u32, OwnedFd>,
    interrupts: BTreeMap<u32, OwnedFd>,
    /// Messages to the guest that nobody has asked for yet.
    heard: Vec<HostToGuest>,
    posted: usize,
    next_gpadl: u32,
}

impl Guest {
    /// Which has made contact and asked for offers.
    fn boot(scene: Scene) -> Self {
        let mut guest = Self {
            scene,
            kicks: BTreeMap::new(),
            interrupts: BTreeMap::new(),
            heard: Vec::new(),
            posted: 0,
            next_gpadl: 1,
        };
        guest.post(&contact());
        guest.post(&REQUEST);
        guest
    }

    /// Hears one message to `bulkhead-vcpu`.
    fn hear(&mut self) {
        let (message, fds) = hear::<BusToVcpu>(&mut self.scene.vcpu);
        let mut fds = fds.into_iter();
        let mut fd = || fds.next().expect("it comes with an eventfd");
        match message {
            BusToVcpu::Posted => self.posted += 1,
            BusToVcpu::PostToGuest { payload, .. } => {
                let message = HostToGuest::parse(&payload).expect("well-formed");
                self.heard.push(message);
            }
            BusToVcpu::BindSignal { channel } => assert!(self.kicks.insert(channel, fd()).is_none()),
            BusToVcpu::BindInterrupt { channel, .. } => {
                assert!(self.interrupts.insert(channel, fd()).is_none());
            }
            BusToVcpu::UnbindSignal { channel } => assert!(self.kicks.remove(&channel).is_some()),
            BusToVcpu::UnbindInterrupt { channel } => assert!(self.interrupts.remove(&channel).is_some()),
            BusToVcpu::RebindInterrupt { .. }
            | BusToVcpu::RaiseInterrupt { .. }
            | BusToVcpu::QuiesceDone { .. } => {}
        }
    }

    /// Posts, and hears up to `Posted`.
    fn post(&mut self, payload: &[u8]) {
        self.scene.say(payload);
        let after = self.posted + 1;
        while self.posted < after {
            self.hear();
        }
    }

    /// The oldest message to the guest for which `wanted` finds something.
    fn find<T>(&mut self, wanted: impl Fn(&HostToGuest) -> Option<T>) -> T {
        loop {
            if let Some(at) = self.heard.iter().position(|message| wanted(message).is_some()) {
                return wanted(&self.heard.remove(at)).expect("found just now");
            }
            self.hear();
        }
    }

    /// The channel of the next offer.
    fn offer(&mut self) -> ChannelId {
        self.find(|message| match message {
            HostToGuest::OfferChannel(offer) => Some(offer.channel),
            _ => None,
        })
    }

    /// Makes a GPADL of four pages; its handle, or `None` if it is refused.
    fn gpadl(&mut self, channel: ChannelId) -> Option<GpadlId> {
        let gpadl = GpadlId(self.next_gpadl);
        self.next_gpadl += 1;
        let mut ranges = (4 * 4096u64).to_le_bytes().to_vec();
        ranges.extend((8..12u64).flat_map(u64::to_le_bytes));
        let header = GpadlHeader {
            channel,
            gpadl,
            range_bytes: ranges.len() as u16,
            range_count: 1,
            ranges: &ranges,
        };
        self.post(GuestToHost::GpadlHeader(header).emit().as_bytes());
        let status = self.find(|message| match message {
            HostToGuest::GpadlCreated {
                gpadl: said, status, ..
            } if *said == gpadl => Some(*status),
            _ => None,
        });
        (status == 0).then_some(gpadl)
    }

    /// Opens a channel on that GPADL; whether it is open.
    fn open(&mut self, channel: ChannelId, ring_gpadl: GpadlId) -> bool {
        let open = OpenChannel {
            channel,
            open_id: channel.0,
            ring_gpadl,
            target_vp: 0,
            downstream_page_offset: 2,
            user_data: [0; 120],
        };
        self.post(GuestToHost::OpenChannel(open).emit().as_bytes());
        let status = self.find(|message| match message {
            HostToGuest::OpenChannelResult {
                channel: said,
                status,
                ..
            } if *said == channel => Some(*status),
            _ => None,
        });
        status == 0
    }

    fn close(&mut self, channel: ChannelId) {
        self.post(GuestToHost::CloseChannel { channel }.emit().as_bytes());
    }

    /// Opens the primary channel of a device and has its server offer so many sub-channels; all their numbers.
    fn open_primary(&mut self, device: u32, server: &mut Socket, sub_channels: u16) -> Vec<ChannelId> {
        let primary = ChannelId(device + 1);
        let ring = self.gpadl(primary).expect("there is room");
        assert!(self.open(primary, ring));
        while hear::<BusToServer>(server).0.name() != "OpenChannel" {}
        let offer = ServerToBus::OfferSubChannels { count: sub_channels };
        server.send(&offer, &[]).expect("sent");
        let sub_channels = (0..sub_channels).map(|_| self.offer());
        std::iter::once(primary).chain(sub_channels).collect()
    }
}

/// Devices with a server each, and the primary channels of all are offered.
fn boot(mut scene: Scene, devices: u32, sub_channels: u16) -> (Guest, Vec<Socket>) {
    let mut servers: Vec<Socket> = (0..devices)
        .map(|device| scene.add_server_with(device, sub_channels))
        .collect();
    for server in &mut servers {
        assert_eq!(hear::<BusToServer>(server).0.name(), "Attach");
    }
    let mut guest = Guest::boot(scene);
    for device in 0..devices {
        assert_eq!(guest.offer(), ChannelId(device + 1));
    }
    (guest, servers)
}

/// Whether this process may have so many descriptors; if not, that is said.
fn may_have(descriptors: u64) -> bool {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if maximum.is_some_and(|most| most < descriptors) {
        // Past the harness's capture, as `cargo xtask test` counts it.
        let line =
            format!("\nSKIP limits: this host lets a process have fewer than {descriptors} open files\n");
        let said = std::io::stderr().write_all(line.as_bytes());
        said.expect("standard error is open");
        return false;
    }
    if current.is_some_and(|now| now < descriptors) {
        let current = Some(descriptors);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("below the hard limit");
    }
    true
}

#[test]
fn as_many_channels_as_a_vm_may_have_are_open_at_once_each_with_eventfds_of_its_own() {
    if !may_have(6 * MAX_OPEN_CHANNELS as u64) {
        return;
    }
    // As many devices as a VM may have; and network devices with as many queues as they may have.
    for devices in [64, NICS] {
        open_all_channels(devices);
    }
}

/// Network devices for whose most queues, 64, and two buffers each there is room at once.
const NICS: u32 = 16;

fn open_all_channels(devices: u32) {
    let of_device = MAX_OPEN_CHANNELS as u32 / devices;
    let sub_channels = (of_device - 1) as u16;
    let (mut guest, mut servers) = boot(Scene::new(), devices, sub_channels);
    let mut opened = BTreeMap::new();
    for (device, server) in (0..).zip(&mut servers) {
        let channels = guest.open_primary(device, server, sub_channels);
        for &channel in &channels[1..] {
            let ring = guest.gpadl(channel).expect("there is room");
            assert!(guest.open(channel, ring), "{channel}");
            let mut fds = loop {
                if let (BusToServer::OpenChannel { .. }, fds) = hear(server) {
                    break fds;
                }
            };
            opened.insert(channel.0, (fds.remove(0), fds.remove(0)));
        }
    }
    assert_eq!(opened.len(), MAX_OPEN_CHANNELS - devices as usize);
    assert_eq!(guest.kicks.len(), MAX_OPEN_CHANNELS);
    for (channel, (kick, interrupt)) in &opened {
        for (from, to, value) in [
            (&guest.kicks[channel], kick, u64::from(*channel)),
            (interrupt, &guest.interrupts[channel], u64::from(*channel) << 32),
        ] {
            write(from, &value.to_ne_bytes()).expect("written");
            let mut found = [0; 8];
            read(to, &mut found).expect("it is the same one");
            assert_eq!(u64::from_ne_bytes(found), value, "channel {channel}");
        }
    }
    let mut gpadls = MAX_OPEN_CHANNELS;
    for device in 0..NICS {
        for _ in ["to the guest", "from the guest"] {
            assert!(guest.gpadl(ChannelId(device + 1)).is_some(), "device {device}");
            gpadls += 1;
        }
    }
    let mut other = guest.scene.add_server(devices);
    assert_eq!(hear::<BusToServer>(&mut other).0.name(), "Attach");
    servers.push(other);
    let one_more = guest.offer();
    let ring = guest.gpadl(one_more).expect("there is room");
    assert!(!guest.open(one_more, ring), "one more channel is refused");
    gpadls += 1;
    while guest.gpadl(ChannelId(1)).is_some() {
        gpadls += 1;
    }
    assert_eq!(gpadls, vmm_core::bus::gpadls::MAX_GPADLS, "one more is refused");
    // What is known of so many does not fit into one message; what matters is there.
    assert_eq!(
        guest.scene.inspect("gpadls").as_deref(),
        Some(gpadls.to_string().as_str())
    );
    assert!(guest.scene.inspect("left_out").is_some());

    // A single post closes them all, while `bulkhead-vcpu` does not read.
    guest.heard.clear();
    guest.scene.say(&contact());
    for server in &mut servers {
        let token = loop {
            if let BusToServer::Quiesce { token } = hear(server).0 {
                break token;
            }
        };
        server.send(&ServerToBus::Quiesced { token }, &[]).expect("sent");
    }
    assert!(guest.scene.inspect("connection").is_some(), "it goes on");
    guest.find(|message| matches!(message, HostToGuest::VersionResponse(_)).then_some(()));
    assert!(guest.kicks.is_empty() && guest.interrupts.is_empty());
}

#[test]
fn a_guest_that_opens_more_channels_than_the_host_has_descriptors_for_is_refused_the_next_one() {
    const DEVICES: u32 = 4;
    let mut profile = sandbox::profile::bus();
    // Eventfds of all channels would be 512.
    profile.limits.open_files = 448;
    let (mut guest, mut servers) = boot(Scene::with_profile(profile), DEVICES, 63);
    let mut channels = Vec::new();
    let (mut opened, mut refused) = (Vec::new(), Vec::new());
    for (device, server) in (0..).zip(&mut servers) {
        channels.extend(guest.open_primary(device, server, 63).split_off(1));
    }
    for channel in channels {
        let ring = guest.gpadl(channel).expect("there is room");
        match guest.open(channel, ring) {
            true => opened.push(channel),
            false => refused.push((channel, ring)),
        }
    }
    assert!(!opened.is_empty() && !refused.is_empty());
    let (channel, ring) = refused[0];
    assert!(!guest.open(channel, ring), "still too many");
    guest.close(opened[0]);
    assert!(guest.open(channel, ring), "there is room for one");
    assert!(!guest.open(refused[1].0, refused[1].1), "and for no other");
}

#[test]
fn a_guest_that_names_more_pages_than_a_server_takes_is_refused_and_the_server_lives() {
    let mut scene = Scene::new();
    let (ours, theirs) = pair().expect("a pair");
    scene.add_device(0, 0, &theirs);
    let journal = sealed_memfd("journal", journal::required_len()).expect("a memfd");
    let mut port = Port::new(ours, journal, 1).expect("a port");
    let mut guest = Guest::boot(scene);
    assert_eq!(guest.offer(), ChannelId(1));
    let mut heard = 0;
    let mut serve = || {
        for event in port.on_readable().expect("bulkhead-bus says what it may") {
            heard += usize::from(matches!(event, PortEvent::GpadlAdded { .. }));
        }
        heard
    };
    for number in 0..MAX_GPADLS + 10 {
        let gpadl = guest.gpadl(ChannelId(1));
        assert_eq!(gpadl.is_some(), number < MAX_GPADLS, "GPADL {number}");
        serve();
    }
    while serve() < MAX_GPADLS {}
    // Another device has room of its own.
    let mut other = guest.scene.add_server(1);
    assert_eq!(hear::<BusToServer>(&mut other).0.name(), "Attach");
    assert_eq!(guest.offer(), ChannelId(2));
    assert!(guest.gpadl(ChannelId(2)).is_some());
}

#[test]
fn what_a_server_says_without_end_does_not_keep_the_others_waiting_for_its_end() {
    // More than is taken from one peer before the others get their turn, and less than its socket holds.
    const SAID: usize = 200;
    let (mut guest, mut servers) = boot(Scene::new(), 2, 0);
    let [talker, server] = &mut servers[..] else {
        panic!("two servers")
    };
    let handles: Vec<GpadlId> = (0..SAID)
        .map(|_| guest.gpadl(ChannelId(1)).expect("there is room"))
        .collect();
    let other = guest.gpadl(ChannelId(2)).expect("there is room");
    let teardown = |gpadl, channel| GuestToHost::GpadlTeardown { channel, gpadl }.emit();
    for &gpadl in &handles {
        guest.post(teardown(gpadl, ChannelId(1)).as_bytes());
    }
    guest.post(teardown(other, ChannelId(2)).as_bytes());
    let bus = guest.scene.child.pid;
    kill(bus, Signal::SIGSTOP).expect("stopped");
    let stopped = waitid(Id::Pid(bus), WaitPidFlag::WSTOPPED).expect("waited");
    assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    for gpadl in handles.iter().chain([&other]) {
        let from = if *gpadl == other {
            &mut *server
        } else {
            &mut *talker
        };
        let released = ServerToBus::GpadlReleased { gpadl: gpadl.0 };
        from.send(&released, &[]).expect("sent");
        assert!(!from.has_queued(), "its socket holds that");
    }
    kill(bus, Signal::SIGCONT).expect("goes on");
    let torn_down = |message: &HostToGuest| match message {
        HostToGuest::GpadlTorndown { gpadl } => Some(*gpadl),
        _ => None,
    };
    let order: Vec<GpadlId> = (0..=SAID).map(|_| guest.find(torn_down)).collect();
    let before = order.iter().position(|gpadl| *gpadl == other);
    assert!(before.is_some_and(|before| before < SAID / 2), "{before:?}");
}

#[test]
fn a_server_that_answers_what_it_has_not_read_is_dropped_before_descriptors_run_out() {
    let (mut guest, mut servers) = boot(Scene::new(), 2, 0);
    let (mut deaf, mut server) = (servers.remove(0), servers.remove(0));
    let ring = guest.gpadl(ChannelId(1)).expect("there is room");
    // Two messages a round; so many are enough for any queue, and take more descriptors than the process may have.
    for open_epoch in 1..=10_000 {
        assert!(guest.open(ChannelId(1), ring));
        guest.close(ChannelId(1));
        let closed = ServerToBus::ChannelClosed {
            channel: 1,
            open_epoch,
        };
        if deaf.send(&closed, &[]).is_err() {
            break;
        }
        if let Ok(Some((said, _))) = guest.scene.supervisor.recv::<BusToSupervisor>() {
            assert!(
                matches!(said, BusToSupervisor::ServerMisbehaves { device: 0, .. }),
                "{said:?}"
            );
            break;
        }
        assert!(open_epoch < 10_000, "it is not dropped");
    }
    let ring = guest.gpadl(ChannelId(2)).expect("there is room");
    assert!(guest.open(ChannelId(2), ring));
    while hear::<BusToServer>(&mut server).0.name() != "OpenChannel" {}
}
