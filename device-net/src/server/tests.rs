//! The server, its guest and its network in one thread, so that a test decides what comes before what.

use super::Server;
use crate::backend::stream::Stream;
use crate::config::{BackendKind, NicConfig};
use crate::netvsp::wire::{GuestMessage, HostMessage, NvspStatus, NvspVersion, RECEIVE_BUFFER_ID};
use nix::sys::epoll::EpollTimeout;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmbus::channel::Port;
use vmbus::ipc::server_start::Start;
use vmbus::ring::PacketBuf;
use vmbus::vsc::{
    ChannelOptions, GuestChannel, GuestOptions, PlayedSupervisor, StartOptions, SyntheticGuest,
};
use vmbus::wire::PacketKind;

const BUFFER_PAGES: usize = 256;

fn config() -> NicConfig {
    NicConfig {
        mac: [2, 0, 0, 0, 0, 9],
        backend: BackendKind::Stream,
        fd: "net".to_owned(),
        mtu: 1500,
        max_queues: 4,
    }
}

/// Longer than any test takes: whatever is waited for is there already.
fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A server that turns when it is told to.
struct Scene {
    guest: SyntheticGuest,
    journal: OwnedFd,
    net: UnixStream,
    _network: UnixStream,
    _supervisor: PlayedSupervisor,
    server: Server,
}

impl Scene {
    fn new() -> Self {
        let guest = GuestOptions {
            ram_bytes: 32 << 20,
            vp_count: 1,
        };
        let mut guest = SyntheticGuest::new(guest).expect("a guest");
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let (net, network) = UnixStream::pair().expect("a pair");
        let (supervisor, server) = server(&mut guest, &journal, &net, 1);
        Self {
            guest,
            journal,
            net,
            _network: network,
            _supervisor: supervisor,
            server,
        }
    }

    /// Turns until there is nothing to do.
    fn turn(&mut self) {
        for _ in 0..8 {
            assert!(self.server.turn(EpollTimeout::ZERO).expect("it serves"));
        }
    }

    fn replace(&mut self, generation: u32) {
        self.server.nic.leave_to_successor();
        self.guest.server_gone();
        let (supervisor, server) = server(&mut self.guest, &self.journal, &self.net, generation);
        (self._supervisor, self.server) = (supervisor, server);
    }

    fn primary(&mut self) -> GuestChannel {
        let options = ChannelOptions::default();
        self.guest.open_channel(options).expect("a channel")
    }
}

fn server(
    guest: &mut SyntheticGuest,
    journal: &OwnedFd,
    net: &UnixStream,
    generation: u32,
) -> (PlayedSupervisor, Server) {
    let (ours, theirs) = vmbus::ipc::pair().expect("a pair");
    let mut supervisor = PlayedSupervisor::new(ours);
    let mut options = StartOptions::new("net0", "{}");
    options.generation = generation;
    supervisor.start(&options, &[]).expect("sent");
    let start = Start::receive(theirs).expect("a start");
    let control = start.ready(String::new()).expect("sent");
    let (bus, ours) = vmbus::ipc::pair().expect("a pair");
    let journal = journal.as_fd().try_clone_to_owned().expect("a duplicate");
    let port = Port::new(ours, journal, generation).expect("a port");
    let stream = Stream::new(net.try_clone().expect("a duplicate").into()).expect("a stream");
    let mut server = Server::new(control, port, &config(), Box::new(stream)).expect("a server");
    guest.attach(bus, deadline()).expect("attached");
    for _ in 0..4 {
        assert!(server.turn(EpollTimeout::ZERO).expect("it serves"));
    }
    (supervisor, server)
}

fn ask(channel: &mut GuestChannel, message: GuestMessage) -> u64 {
    let id = channel.new_transaction_id();
    channel
        .send_in_band(id, true, &[&message.emit()])
        .expect("staged");
    channel.flush().expect("flushed");
    id
}

fn answer(channel: &mut GuestChannel) -> Option<(u64, HostMessage)> {
    let mut buf = PacketBuf::new();
    let packet = channel.receive(&mut buf).expect("well-behaved")?;
    assert_eq!(packet.kind, PacketKind::COMPLETION);
    let answer = (
        packet.transaction_id,
        HostMessage::parse(packet.payload).expect("a message"),
    );
    channel.give_back().expect("given back");
    Some(answer)
}

fn initialized(scene: &mut Scene) -> GuestChannel {
    let mut primary = scene.primary();
    let version = NvspVersion::V6_1;
    ask(
        &mut primary,
        GuestMessage::Init {
            min: version,
            max: version,
        },
    );
    scene.turn();
    answer(&mut primary).expect("answered");
    primary
}

fn receive_status(message: HostMessage) -> NvspStatus {
    match message {
        HostMessage::ReceiveBufferComplete { status, .. } => status,
        other => panic!("{other:?}"),
    }
}

/// The socket was read, then `bulkhead-bus` speaks and the guest goes on, then the ring is read.
#[test]
fn a_packet_that_names_a_gpadl_is_not_judged_before_the_news_of_the_gpadl_was_read() {
    let mut scene = Scene::new();
    let mut primary = initialized(&mut scene);
    let pages = scene.guest.allocate(BUFFER_PAGES).expect("memory");
    for again in 0..3 {
        let relid = primary.channel_id();
        let gpadl = scene
            .guest
            .add_gpadl_at(relid, pages, BUFFER_PAGES)
            .expect("a GPADL");
        let id = RECEIVE_BUFFER_ID;
        let asked = ask(&mut primary, GuestMessage::ReceiveBuffer { gpadl, id });
        // A turn reads the ring first. Nothing has told the server to read the socket in this turn.
        assert!(scene.server.turn(EpollTimeout::ZERO).expect("it serves"));
        scene.turn();
        let (answered, message) = answer(&mut primary).expect("answered");
        assert_eq!(
            (answered, receive_status(message)),
            (asked, NvspStatus::SUCCESS),
            "{again}"
        );
        let id = primary.new_transaction_id();
        let revoke = GuestMessage::RevokeReceiveBuffer {
            id: RECEIVE_BUFFER_ID,
        };
        primary
            .send_in_band(id, false, &[&revoke.emit()])
            .expect("staged");
        primary.flush().expect("flushed");
        scene.turn();
    }
    assert_eq!(scene.server.nic.faults.count, 0);
}

#[test]
fn a_gpadl_that_does_not_exist_is_refused_after_the_socket_was_read_once_more() {
    let mut scene = Scene::new();
    let mut primary = initialized(&mut scene);
    for round in 1..=3 {
        let id = RECEIVE_BUFFER_ID;
        let asked = ask(&mut primary, GuestMessage::ReceiveBuffer { gpadl: 0x777, id });
        scene.turn();
        let (answered, message) = answer(&mut primary).expect("answered");
        assert_eq!((answered, receive_status(message)), (asked, NvspStatus::FAIL));
        assert_eq!(scene.server.nic.faults.count, round);
        assert!(answer(&mut primary).is_none(), "answered once");
    }
}

#[test]
fn a_packet_that_was_left_in_the_ring_for_a_gpadl_is_answered_once_by_the_successor() {
    let mut scene = Scene::new();
    let mut primary = initialized(&mut scene);
    let pages = scene.guest.allocate(BUFFER_PAGES).expect("memory");
    let relid = primary.channel_id();
    let gpadl = scene
        .guest
        .add_gpadl_at(relid, pages, BUFFER_PAGES)
        .expect("a GPADL");
    let id = RECEIVE_BUFFER_ID;
    let asked = ask(&mut primary, GuestMessage::ReceiveBuffer { gpadl, id });
    // It reads the ring, and dies before it reads the socket.
    assert!(scene.server.nic.round(&scene.server.port).expect("it serves"));
    assert!(scene.server.nic.wants_to_hear());
    scene.replace(2);
    scene.turn();
    let (answered, message) = answer(&mut primary).expect("answered");
    assert_eq!((answered, receive_status(message)), (asked, NvspStatus::SUCCESS));
    assert!(answer(&mut primary).is_none(), "answered once");
}
