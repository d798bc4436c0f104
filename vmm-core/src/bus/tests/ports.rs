#![forbid(unsafe_code)]
//! The bus and the end of its socket that every device server has, against any sequence of a guest's messages: a server ends
//! when it finds fault with what the bus says, so that a guest must not be able to bring that about.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use proptest::prelude::*;
use vmbus::channel::{Endpoint, Port, PortEvent};
use vmbus::ipc::{Socket, pair};
use vmbus::journal;
use vmbus::mem::sealed_memfd;

use super::random::{Step, apply, step};
use super::*;

/// The disk's server, which answers all that it is asked.
struct Served {
    port: Port,
    endpoints: BTreeMap<u32, Endpoint>,
    /// The bus's end.
    socket: Socket,
}

/// What outlives a server.
struct Files {
    journal: OwnedFd,
    ram: OwnedFd,
    event_flags: OwnedFd,
}

impl Files {
    fn new() -> Self {
        let memfd = |name, bytes| sealed_memfd(name, bytes).expect("a memfd");
        Self {
            journal: memfd("journal", journal::required_len()),
            ram: memfd("ram", RAM_BYTES),
            event_flags: memfd("siefp", u64::from(VPS) * 4096),
        }
    }

    /// A server of the disk that has said hello to nobody yet.
    fn serve(&self, generation: u32) -> Served {
        let (ours, theirs) = pair().expect("a pair");
        let journal = self.journal.try_clone().expect("a duplicate");
        Served {
            port: Port::new(theirs, journal, generation).expect("a port"),
            endpoints: BTreeMap::new(),
            socket: Socket::new(ours),
        }
    }
}

impl Served {
    /// Both say what they have to say, until neither has more.
    fn converse(&mut self, world: &mut World, files: &Files) {
        loop {
            while let Some(message) = world
                .servers
                .get_mut(&DISK)
                .and_then(|server| server.inbox.pop_front())
            {
                self.tell(&message, files);
            }
            while let Some(event) = self
                .port
                .next_event()
                .expect("the bus says nothing that it must not")
            {
                self.on_event(event);
            }
            let mut heard = false;
            while let Some((message, _)) = self.socket.recv::<ServerToBus>().expect("a server behaves") {
                world.say(DISK, message);
                heard = true;
            }
            if !heard {
                return;
            }
        }
    }

    fn tell(&mut self, message: &BusToServer, files: &Files) {
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let pair = (event(), event());
        let fds = match message {
            BusToServer::Attach { .. } => vec![files.ram.as_fd(), files.event_flags.as_fd()],
            BusToServer::OpenChannel { .. } => vec![pair.0.as_fd(), pair.1.as_fd()],
            _ => Vec::new(),
        };
        self.socket.send(message, &fds).expect("a server reads");
    }

    fn on_event(&mut self, event: PortEvent) {
        match event {
            PortEvent::ChannelOpened(endpoint, recovered) => {
                assert!(recovered.requests.is_empty());
                self.endpoints.insert(endpoint.channel_id(), *endpoint);
            }
            PortEvent::ChannelClosing { channel, .. } => {
                let endpoint = self.endpoints.remove(&channel).expect("it is open");
                self.port.channel_closed(endpoint).expect("the bus is there");
            }
            PortEvent::Retargeted {
                channel, target_vp, ..
            } => {
                let endpoint = self.endpoints.get_mut(&channel).expect("it is open");
                endpoint.retarget(target_vp);
            }
            PortEvent::GpadlTeardown { gpadl } => {
                self.port.gpadl_released(gpadl).expect("the bus is there");
            }
            PortEvent::Quiesce { token } => {
                let endpoints = std::mem::take(&mut self.endpoints).into_values();
                self.port.quiesced(token, endpoints).expect("the bus is there");
            }
            PortEvent::Attached | PortEvent::Serve | PortEvent::HandedOver | PortEvent::GpadlAdded { .. } => {
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    /// As a driver does it.
    Open { sub_index: u16 },
    /// Lets go of the ring, too.
    Close { sub_index: u16, with_ring: bool },
    /// The server comes to it; until then, what is said waits.
    Serve,
    /// A successor takes over at once.
    Die,
    /// Anything, said by the guest or done by the other server.
    Any(Step),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        10 => (0..4u16).prop_map(|sub_index| Act::Open { sub_index }),
        4 => (0..4u16, any::<bool>()).prop_map(|(sub_index, with_ring)| Act::Close { sub_index, with_ring }),
        10 => Just(Act::Serve),
        1 => Just(Act::Die),
        8 => step().prop_map(Act::Any),
    ]
}

/// What a played server of the disk would do or say: this one is real.
fn is_disks(step: &Step) -> bool {
    match step {
        Step::Serve { device }
        | Step::Die { device }
        | Step::Connect { device }
        | Step::Attach { device }
        | Step::AttachWaiting { device }
        | Step::DieWaiting { device }
        | Step::SpeakWaiting { device }
        | Step::Lost { device }
        | Step::Lie { device, .. } => DeviceId(*device) == DISK,
        _ => false,
    }
}

/// The channel of the disk that has this index now.
fn find(world: &World, sub_index: u16) -> Option<ChannelId> {
    world
        .bus
        .channels
        .find(DISK, sub_index)
        .map(|(channel, _)| channel)
}

fn disk_attaches(world: &mut World, files: &Files) -> Served {
    let generation = world.connect(DISK);
    files.serve(generation)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_guest_says_makes_a_server_find_fault_with_the_bus(acts in prop::collection::vec(act(), 0..150)) {
        let files = Files::new();
        let mut world = World::without_servers();
        let mut disk = disk_attaches(&mut world, &files);
        world.boot();
        for act in acts {
            match act {
                Act::Open { sub_index } => {
                    if let Some(channel) = find(&world, sub_index) {
                        world.gpadl_and_open(channel, 0x100 + channel.0);
                    }
                }
                Act::Close { sub_index, with_ring } => {
                    if let Some(channel) = find(&world, sub_index) {
                        world.close(channel);
                        if with_ring {
                            world.teardown(channel, 0x100 + channel.0);
                        }
                    }
                }
                Act::Serve => {
                    disk.converse(&mut world, &files);
                    if disk.endpoints.values().any(|endpoint| endpoint.sub_index() == 0) {
                        disk.port.offer_sub_channels(3).expect("the bus is there");
                    }
                }
                Act::Die => {
                    world.die(DISK);
                    disk = disk_attaches(&mut world, &files);
                }
                Act::Any(step) if is_disks(&step) => {}
                Act::Any(step) => apply(&mut world, step),
            }
        }
        disk.converse(&mut world, &files);
        prop_assert!(world.misbehaved.iter().all(|(device, _)| *device != DISK), "{:?}", world.misbehaved);
    }
}
