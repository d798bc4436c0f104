//! Servers whose VM ends before they serve.
#![forbid(unsafe_code)]

use bulkhead_tests::tier;
use device_block::config::{ControllerConfig, DiskConfig, DiskKind};
use device_net::config::NicConfig;
use sandbox::{ExitCause, Identity, Namespaces, Options, Profile, Spawn, profile};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vmbus::mem::sealed_memfd;
use vmbus::vsc::{PlayedSupervisor, StartOptions};

/// Limit: for a server's end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who is not there any more, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    Bus,
    SupervisorBeforeStart,
    SupervisorAfterStart,
}

struct Server {
    program: &'static str,
    profile: Profile,
    config: String,
    backend: OwnedFd,
}

fn block() -> Server {
    let disk = DiskConfig {
        lun: 0,
        fd: "backend".to_owned(),
        read_only: false,
        kind: DiskKind::Memory,
        bytes: None,
        serial: None,
        cache: Default::default(),
        direct: false,
    };
    let config = ControllerConfig {
        instance: Default::default(),
        disks: vec![disk],
        max_sub_channels: 0,
    };
    Server {
        program: "bulkhead-block",
        profile: profile::block(),
        config: serde_json::to_string(&config).expect("JSON"),
        backend: sealed_memfd("disk", 1 << 20).expect("a memfd"),
    }
}

fn net() -> Server {
    let config = r#"{"mac":"02:00:00:00:00:01","backend":"stream","fd":"backend"}"#;
    NicConfig::parse(config).expect("a configuration");
    let (backend, network) = UnixStream::pair().expect("a pair");
    // Nobody is there: what the server says of that would come later.
    drop(network);
    Server {
        program: "bulkhead-net",
        profile: profile::net(),
        config: config.to_owned(),
        backend: backend.into(),
    }
}

/// How it ends, and what it says.
fn end_of(server: Server, gone: Gone) -> Option<(ExitCause, String)> {
    let programs = tier::programs()?;
    let (control, child_control) = vmbus::ipc::pair().expect("a pair");
    let (bus, child_bus) = vmbus::ipc::pair().expect("a pair");
    let (said, stderr) = nix::unistd::pipe().expect("a pipe");
    let journal = PlayedSupervisor::new_journal().expect("a journal");
    let mut supervisor = PlayedSupervisor::new(control);
    let mut child = sandbox::spawn(Spawn {
        program: programs.join(server.program),
        file: None,
        args: Vec::new(),
        env: Vec::new(),
        fds: vec![(child_control, sandbox::sys::fds::CONTROL)],
        namespaces: Namespaces::all(),
        lasting: None,
        stderr: Some(stderr),
        identity: Identity::own(0),
        jail: Some((server.profile, Options::default())),
    })
    .expect("it starts");
    let _bus = (gone != Gone::Bus).then_some(bus);
    if gone != Gone::SupervisorBeforeStart {
        let fds = [
            ("bus", child_bus.as_fd()),
            ("journal", journal.as_fd()),
            ("backend", server.backend.as_fd()),
        ];
        let start = StartOptions::new("device", &server.config);
        supervisor.start(&start, &fds).expect("it takes Start");
    }
    let _supervisor = (gone == Gone::Bus).then_some(supervisor);
    let cause = child.wait_at_most(PATIENCE).expect("ours").expect("it ends");
    let mut text = String::new();
    File::from(said).read_to_string(&mut text).expect("text");
    Some((cause, text))
}

#[test]
fn a_server_whose_vm_ends_before_it_serves_ends_without_a_word() {
    for server in [block, net] {
        for gone in [Gone::Bus, Gone::SupervisorBeforeStart, Gone::SupervisorAfterStart] {
            if let Some((cause, said)) = end_of(server(), gone) {
                assert_eq!((cause, said.as_str()), (ExitCause::Exited(0), ""), "{gone:?}");
            }
        }
    }
}
