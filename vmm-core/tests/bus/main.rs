#![forbid(unsafe_code)]
//! The real `bulkhead-bus` in its sandbox, between a played supervisor, a played `bulkhead-vcpu` and a played server.

mod limits;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use sandbox::profile::Profile;
use sandbox::{Child, ExitCause, Identity, Namespaces, Spawn};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{
    BusToServer, BusToSupervisor, BusToVcpu, Message, PeerFault, ServerToBus, Socket, SupervisorToBus,
    VcpuToBus, pair,
};
use vmbus::mem::{RamLayout, sealed_memfd};
use vmbus::wire::Guid;

/// Limit: for everything that a test waits for.
const PATIENCE: Duration = Duration::from_secs(30);

const RAM_BYTES: u64 = 4 << 20;

/// The process, and who talks with it.
struct Scene {
    child: Child,
    supervisor: Socket,
    vcpu: Socket,
    report: String,
}

impl Scene {
    fn new() -> Self {
        Self::with_profile(sandbox::profile::bus())
    }

    fn with_profile(profile: Profile) -> Self {
        let (ours, control) = pair().expect("a pair");
        let child = sandbox::spawn(Spawn {
            program: env!("CARGO_BIN_EXE_bulkhead-bus").into(),
            file: None,
            args: Vec::new(),
            env: Vec::new(),
            fds: vec![(control, sandbox::sys::fds::CONTROL)],
            namespaces: Namespaces::all(),
            lasting: None,
            stderr: None,
            identity: Identity::own(1),
            jail: Some((profile, sandbox::Options::default())),
        });
        let (vcpu, theirs) = pair().expect("a pair");
        let mut supervisor = Socket::new(ours);
        let start = SupervisorToBus::Start {
            protocol: PROTOCOL,
            log: "error".to_owned(),
        };
        supervisor.send(&start, &[theirs.as_fd()]).expect("sent");
        let (BusToSupervisor::Ready { report }, _) = hear(&mut supervisor) else {
            panic!("not ready")
        };
        let mut vcpu = Socket::new(vcpu);
        let memfd = |name| sealed_memfd(name, RAM_BYTES).expect("a memfd");
        let (ram, siefp) = (memfd("ram"), memfd("siefp"));
        let machine = VcpuToBus::Machine {
            protocol: PROTOCOL,
            ram: RamLayout::for_size(RAM_BYTES),
            vp_count: 1,
        };
        vcpu.send(&machine, &[ram.as_fd(), siefp.as_fd()]).expect("sent");
        Self {
            child: child.expect("started"),
            supervisor,
            vcpu,
            report,
        }
    }

    /// A server of a device with this number; it has said hello.
    fn add_server(&mut self, device: u32) -> Socket {
        self.add_server_with(device, 3)
    }

    fn add_server_with(&mut self, device: u32, max_sub_channels: u16) -> Socket {
        let (ours, theirs) = pair().expect("a pair");
        self.add_device(device, max_sub_channels, &theirs);
        let mut server = Socket::new(ours);
        let hello = ServerToBus::Hello {
            protocol: PROTOCOL,
            generation: 1,
        };
        server.send(&hello, &[]).expect("sent");
        server
    }

    /// Devices whose servers never say hello. What is returned keeps them from being lost.
    fn add_silent_devices(&mut self, count: u32) -> OwnedFd {
        let (ours, theirs) = pair().expect("a pair");
        for device in 0..count {
            self.add_device(device, 3, &theirs);
            let name = self.inspect(&format!("device.{device}.name"));
            assert!(name.is_some(), "device {device} is there");
        }
        ours
    }

    fn add_device(&mut self, device: u32, max_sub_channels: u16, server: &OwnedFd) {
        let add = SupervisorToBus::AddDevice {
            device,
            name: format!("played{device}"),
            interface: Guid::from_fields(1, 2, 3, [4; 8]),
            instance: Guid::from_fields(device, 0, 0, [0; 8]),
            max_sub_channels,
        };
        self.supervisor.send(&add, &[server.as_fd()]).expect("sent");
    }

    /// Posts.
    fn say(&mut self, payload: &[u8]) {
        let post = VcpuToBus::Post {
            connection_id: 4,
            message_type: 1,
            payload: payload.to_vec(),
        };
        self.vcpu.send(&post, &[]).expect("sent");
    }

    /// Posts, and returns what is said up to `Posted`.
    fn post(&mut self, payload: &[u8]) -> Vec<BusToVcpu> {
        self.say(payload);
        let mut said = Vec::new();
        loop {
            match hear(&mut self.vcpu).0 {
                BusToVcpu::Posted => return said,
                other => said.push(other),
            }
        }
    }

    /// One value of what the process says of itself.
    fn inspect(&mut self, path: &str) -> Option<String> {
        self.supervisor
            .send(&SupervisorToBus::Inspect, &[])
            .expect("sent");
        loop {
            if let (BusToSupervisor::Inspect { entries }, _) = hear(&mut self.supervisor) {
                return entries
                    .into_iter()
                    .find(|(name, _)| name == path)
                    .map(|(_, value)| value);
            }
        }
    }
}

fn hear<M: Message>(socket: &mut Socket) -> (M, Vec<OwnedFd>) {
    try_hear(socket).expect("the peer behaves")
}

fn try_hear<M: Message>(socket: &mut Socket) -> Result<(M, Vec<OwnedFd>), PeerFault> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(received) = socket.recv()? {
            return Ok(received);
        }
        assert!(Instant::now() < end, "nothing was heard in time");
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1000u16)).expect("polled");
    }
}

/// INITIATE_CONTACT for version 5.3, SINT 2.
fn contact() -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[0..4].copy_from_slice(&14u32.to_le_bytes());
    bytes[8..12].copy_from_slice(&0x0005_0003u32.to_le_bytes());
    bytes[16] = 2;
    bytes
}

/// The type of a channel message to the guest.
fn kind(message: &BusToVcpu) -> u32 {
    let BusToVcpu::PostToGuest { payload, .. } = message else {
        panic!("{message:?}")
    };
    u32::from_le_bytes(payload[..4].try_into().expect("four bytes"))
}

const VERSION_RESPONSE: u32 = 15;
const OFFER: u32 = 1;
const ALL_OFFERS: u32 = 4;
/// REQUESTOFFERS.
const REQUEST: [u8; 8] = [3, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn a_guest_is_answered_and_a_server_gets_the_machine() {
    let mut scene = Scene::new();
    assert!(scene.report.contains("bulkhead-bus"), "{}", scene.report);
    let mut server = scene.add_server(0);
    let (attach, fds) = hear::<BusToServer>(&mut server);
    let BusToServer::Attach { ram, vp_count, .. } = attach else {
        panic!("{attach:?}")
    };
    assert_eq!((ram.total_bytes(), vp_count, fds.len()), (RAM_BYTES, 1, 2));
    let answers: Vec<u32> = scene.post(&contact()).iter().map(kind).collect();
    assert_eq!(answers, [VERSION_RESPONSE]);
    let answers: Vec<u32> = scene.post(&REQUEST).iter().map(kind).collect();
    assert_eq!(answers, [OFFER, ALL_OFFERS]);
    assert_eq!(scene.inspect("device.0.name").as_deref(), Some("played0"));
}

#[test]
fn it_ends_with_the_vcpu_process() {
    let Scene {
        mut child,
        supervisor,
        vcpu,
        ..
    } = Scene::new();
    drop(vcpu);
    let ended = child.wait_at_most(PATIENCE).expect("waited");
    assert_eq!(ended, Some(ExitCause::Exited(0)));
    drop(supervisor);
}

#[test]
fn a_reset_is_done_when_the_last_server_has_let_go() {
    let mut scene = Scene::new();
    let mut server = scene.add_server(0);
    assert_eq!(hear::<BusToServer>(&mut server).0.name(), "Attach");
    scene.post(&contact());
    scene.post(&REQUEST);
    // A GPADL of one page, so that there is something to let go of.
    let mut gpadl = [0; 44];
    for (at, value) in [(0, 8u32), (8, 1), (12, 0xE1E10), (20, 4096)] {
        gpadl[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    gpadl[16..18].copy_from_slice(&16u16.to_le_bytes());
    gpadl[18..20].copy_from_slice(&1u16.to_le_bytes());
    gpadl[28..36].copy_from_slice(&5u64.to_le_bytes());
    assert_eq!(
        scene.post(&gpadl[..36]).iter().map(kind).collect::<Vec<_>>(),
        [10]
    );
    scene
        .vcpu
        .send(&VcpuToBus::Reset { token: 7 }, &[])
        .expect("sent");
    let token = loop {
        if let BusToServer::Quiesce { token } = hear(&mut server).0 {
            break token;
        }
    };
    assert!(matches!(scene.vcpu.recv::<BusToVcpu>(), Ok(None)), "too early");
    server.send(&ServerToBus::Quiesced { token }, &[]).expect("sent");
    assert_eq!(
        hear::<BusToVcpu>(&mut scene.vcpu).0,
        BusToVcpu::QuiesceDone { token: 7 }
    );
}

#[test]
fn whatever_the_guest_posts_is_dealt_with_and_harms_nobody() {
    let mut scene = Scene::new();
    let mut server = scene.add_server(0);
    assert_eq!(hear::<BusToServer>(&mut server).0.name(), "Attach");
    let mut runner = TestRunner::deterministic();
    let any = proptest::collection::vec(proptest::num::u8::ANY, 0..240);
    for round in 0..2000u32 {
        let mut bytes = any.new_tree(&mut runner).expect("bytes").current();
        // Most begin with a type that means something.
        if let (true, Some(first)) = (round % 8 != 0, bytes.get_mut(..8)) {
            first.copy_from_slice(&u64::from(round % 26).to_le_bytes());
        }
        scene.post(&bytes);
        while let Ok(Some(_)) = server.recv::<BusToServer>() {}
        if round % 100 == 0 {
            scene.post(&contact());
            scene.post(&REQUEST);
        }
    }
    assert!(scene.inspect("connection").is_some(), "it still answers");
}

#[test]
fn what_a_guest_makes_it_say_to_a_vcpu_process_that_does_not_read_is_bounded_and_nothing_of_it_is_lost() {
    // As many as `bulkhead-vcpu` lets be under way. Taken at once, they would make twice as many messages as may wait.
    const ROUNDS: usize = 32;
    const DEVICES: u32 = 255;
    let mut scene = Scene::new();
    let _servers = scene.add_silent_devices(DEVICES);
    for _ in 0..ROUNDS {
        scene.say(&contact());
        scene.say(&REQUEST);
    }
    // Each answer takes another turn of its loop, in one of which it has seen all that the guest said.
    for _ in 0..3 {
        scene.supervisor.send(&SupervisorToBus::Ping, &[]).expect("sent");
        let (answer, _) = hear::<BusToSupervisor>(&mut scene.supervisor);
        assert_eq!(answer, BusToSupervisor::Pong, "it lives");
    }
    let mut answers = std::collections::BTreeMap::new();
    let mut posted = 0;
    while posted < 2 * ROUNDS {
        match hear(&mut scene.vcpu).0 {
            BusToVcpu::Posted => posted += 1,
            other => *answers.entry(kind(&other)).or_insert(0) += 1,
        }
    }
    let expected = [
        (OFFER, ROUNDS * DEVICES as usize),
        (ALL_OFFERS, ROUNDS),
        (VERSION_RESPONSE, ROUNDS),
    ];
    assert_eq!(answers, expected.into());
    assert_eq!(scene.post(&contact()).len(), 1, "it goes on");
}

#[test]
fn it_ends_with_a_vcpu_process_that_has_not_read_what_was_said_to_it() {
    let mut scene = Scene::new();
    let _servers = scene.add_silent_devices(255);
    for _ in 0..8 {
        scene.say(&contact());
        scene.say(&REQUEST);
    }
    for _ in 0..3 {
        assert!(scene.inspect("connection").is_some());
    }
    let Scene {
        mut child,
        supervisor,
        vcpu,
        ..
    } = scene;
    drop(vcpu);
    let ended = child.wait_at_most(PATIENCE).expect("waited");
    assert_eq!(ended, Some(ExitCause::Exited(0)));
    drop(supervisor);
}

#[test]
fn what_it_says_of_a_bad_server_it_says_again_at_each_ping_until_that_server_is_gone() {
    let mut scene = Scene::new();
    let (mut bad, mut good) = (scene.add_server(0), scene.add_server(1));
    assert_eq!(hear::<BusToServer>(&mut bad).0.name(), "Attach");
    nix::unistd::write(&bad, b"nonsense").expect("written");
    let (accusation, _) = hear::<BusToSupervisor>(&mut scene.supervisor);
    assert_eq!(accusation.name(), "ServerMisbehaves");
    for _ in 0..3 {
        scene.supervisor.send(&SupervisorToBus::Ping, &[]).expect("sent");
        let again = [(); 2].map(|()| hear::<BusToSupervisor>(&mut scene.supervisor).0);
        assert_eq!(again, [accusation.clone(), BusToSupervisor::Pong]);
    }
    let gone = SupervisorToBus::ServerGone {
        device: 0,
        generation: 1,
    };
    scene.supervisor.send(&gone, &[]).expect("sent");
    scene.supervisor.send(&SupervisorToBus::Ping, &[]).expect("sent");
    let (answer, _) = hear::<BusToSupervisor>(&mut scene.supervisor);
    assert_eq!(answer, BusToSupervisor::Pong, "nothing of one that is gone");
    assert_eq!(hear::<BusToServer>(&mut good).0.name(), "Attach");
}

#[test]
fn a_server_that_talks_nonsense_is_dropped_and_told_of_and_another_is_served() {
    let mut scene = Scene::new();
    let (mut bad, mut good) = (scene.add_server(0), scene.add_server(1));
    assert_eq!(hear::<BusToServer>(&mut bad).0.name(), "Attach");
    nix::unistd::write(&bad, b"nonsense").expect("written");
    let (accusation, _) = hear::<BusToSupervisor>(&mut scene.supervisor);
    assert!(
        matches!(
            accusation,
            BusToSupervisor::ServerMisbehaves {
                device: 0,
                generation: 1,
                ..
            }
        ),
        "{accusation:?}"
    );
    assert_eq!(hear::<BusToServer>(&mut good).0.name(), "Attach");
    while let Ok((_, _)) = try_hear::<BusToServer>(&mut bad) {}
    // A contact promises that nobody touches the guest's pages, so that it waits for the dead one's end.
    assert_eq!(scene.post(&contact()), []);
    let gone = SupervisorToBus::ServerGone {
        device: 0,
        generation: 1,
    };
    scene.supervisor.send(&gone, &[]).expect("sent");
    assert_eq!(kind(&hear(&mut scene.vcpu).0), VERSION_RESPONSE);
    let answers: Vec<u32> = scene.post(&contact()).iter().map(kind).collect();
    assert_eq!(answers, [VERSION_RESPONSE]);
}
