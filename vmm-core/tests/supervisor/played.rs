#![forbid(unsafe_code)]
//! The played children. What they do is said by the kernel's command line (`bulkhead-vcpu`), and by the disk's serial
//! number (`bulkhead-block`) or the name of the program (one that it is swapped for).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use vmbus::ipc::server_start::NamedFds;
use vmbus::ipc::{
    BootPlan, BusToSupervisor, ExitCause, Message, PeerFault, ServerToSupervisor, Socket, SupervisorToBus,
    SupervisorToServer, SupervisorToVcpu, VcpuToSupervisor,
};
use vmm_core::pc::memory_map::COMMAND_LINE;

/// What the names of programs begin with that servers are swapped for; their play follows.
pub const SWAPPED: &str = "swapped-";

/// The next message; `None` at the end of the connection.
fn next<M: Message>(socket: &mut Socket) -> Option<(M, Vec<OwnedFd>)> {
    loop {
        match socket.recv::<M>() {
            Ok(Some(received)) => return Some(received),
            Ok(None) => {
                poll(
                    &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                )
                .expect("polled");
            }
            Err(PeerFault::Eof) => return None,
            Err(fault) => panic!("{fault}"),
        }
    }
}

fn report(missing: &[&str]) -> String {
    let missing = serde_json::to_string(missing).expect("JSON");
    format!(
        r#"{{"program":"played","namespaces":{},"root":"Host","uid":1,"gid":1,"nested_users_forbidden":false,"landlock":"Absent","seccomp":"Absent","missing":{missing}}}"#,
        serde_json::to_string(&sandbox::Namespaces::none()).expect("JSON"),
    )
}

fn control() -> Socket {
    Socket::new(sandbox::inherited_control_fd().expect("started by a supervisor"))
}

/// What the guest's kernel would be told.
fn command_line(plan: &BootPlan, fds: &mut NamedFds) -> String {
    let mut segments = plan.segments.iter();
    let line = segments.find(|segment| segment.gpa == COMMAND_LINE);
    let line = line.expect("a command line");
    let file = File::from(fds.take(&format!("boot{}", line.file)).expect("there"));
    let mut text = vec![0; line.bytes as usize];
    file.read_exact_at(&mut text, line.offset).expect("there");
    String::from_utf8(text).expect("text")
}

/// What the played `bulkhead-bus` says to the played `bulkhead-vcpu`: its socket to the supervisor, because one of them
/// plays for both.
#[derive(Serialize, Deserialize)]
struct Handover {
    /// Of a kind that a decoder can tell from nothing at all.
    mark: u32,
}

impl Message for Handover {
    fn name(&self) -> &'static str {
        "Handover"
    }

    fn descriptor_count(&self) -> usize {
        1
    }
}

pub fn bus() -> ExitCode {
    let mut socket = control();
    let Some((SupervisorToBus::Start { .. }, mut fds)) = next(&mut socket) else {
        return ExitCode::FAILURE;
    };
    let mut vcpu = Socket::new(fds.pop().expect("a socket"));
    let ready = BusToSupervisor::Ready { report: report(&[]) };
    // The supervisor may be gone, and the vCPU process, too; then there is nobody to play for.
    socket.send(&ready, &[]).ok();
    vcpu.send(&Handover { mark: 1 }, &[socket.as_fd()]).ok();
    drop(socket);
    match next::<Handover>(&mut vcpu) {
        None => ExitCode::SUCCESS,
        Some(_) => std::process::abort(),
    }
}

/// What one who plays for both hears.
enum Heard {
    Vcpu(SupervisorToVcpu),
    Bus(SupervisorToBus, Vec<OwnedFd>),
}

impl Heard {
    fn name(&self) -> &'static str {
        match self {
            Heard::Vcpu(message) => message.name(),
            Heard::Bus(message, _) => message.name(),
        }
    }
}

/// Accuses who serves of lying, at SIGUSR1, and says so at each Ping until that one is gone.
struct Accuser {
    sign: SignalFd,
    accused: Option<u32>,
}

impl Accuser {
    fn new() -> Self {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGUSR1);
        signals.thread_block().expect("blocked");
        Accuser {
            sign: SignalFd::new(&signals).expect("a signalfd"),
            accused: None,
        }
    }

    fn say(&self, bus: &mut Socket) {
        if let Some(generation) = self.accused {
            let accusation = BusToSupervisor::ServerMisbehaves {
                device: 0,
                generation,
                why: "lied".to_owned(),
            };
            // Nobody may be there to hear it.
            bus.send(&accusation, &[]).ok();
        }
    }
}

/// The next message of either; `None` at the end of one.
fn hear(vcpu: &mut Socket, bus: &mut Socket, accuser: &mut Accuser, place: &ServingPlace) -> Option<Heard> {
    loop {
        let ready = {
            let list = [bus.as_fd(), vcpu.as_fd(), accuser.sign.as_fd()];
            let mut list = list.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            poll(&mut list, PollTimeout::NONE).expect("polled");
            list.map(|fd| fd.any().unwrap_or(false))
        };
        if ready[2] {
            accuser.sign.read_signal().expect("a signal");
            accuser.accused = place.serving;
            accuser.say(bus);
            continue;
        }
        if ready[0] {
            let (message, fds) = next(bus)?;
            return Some(Heard::Bus(message, fds));
        }
        if ready[1] {
            return Some(Heard::Vcpu(next(vcpu)?.0));
        }
    }
}

pub fn vcpu() -> ExitCode {
    let mut accuser = Accuser::new();
    let mut socket = control();
    let Some((
        SupervisorToVcpu::Start {
            config, fds: names, ..
        },
        fds,
    )) = next(&mut socket)
    else {
        return ExitCode::FAILURE;
    };
    let mut fds = NamedFds::new(names, fds).expect("named");
    let mut console_in = File::from(fds.take("console-in").expect("there"));
    let mut console_out = File::from(fds.take("console-out").expect("there"));
    let play = command_line(&config.boot, &mut fds);
    let say = |socket: &mut Socket, message: VcpuToSupervisor| {
        // The supervisor may be gone; then there is nobody to play for.
        socket.send(&message, &[]).ok();
    };
    if play == "fail" {
        let message = "there are no processors today".to_owned();
        say(&mut socket, VcpuToSupervisor::Failed { message });
        return ExitCode::FAILURE;
    }
    if play == "die-early" {
        eprintln!("oh no");
        return ExitCode::from(7);
    }
    if play != "slow" {
        say(&mut socket, VcpuToSupervisor::Ready { report: report(&[]) });
    }
    let mut link = Socket::new(fds.take("bus").expect("there"));
    let Some((Handover { .. }, mut handed)) = next(&mut link) else {
        return ExitCode::FAILURE;
    };
    let mut bus = Socket::new(handed.pop().expect("a socket"));
    let mut links = Vec::new();
    let mut place = ServingPlace::default();
    let mut heard = Vec::new();
    let (mut runs, mut too_early) = (false, None);
    while let Some(mut message) = too_early
        .take()
        .or_else(|| hear(&mut socket, &mut bus, &mut accuser, &place))
    {
        if let Heard::Bus(SupervisorToBus::Ping, _) = message {
            accuser.say(&mut bus);
            if play != "deaf-bus" {
                bus.send(&BusToSupervisor::Pong, &[]).ok();
            }
            continue;
        }
        // A successor comes only after `Run`, which comes by the other socket.
        if let Heard::Bus(SupervisorToBus::ServerAttached { .. }, _) = message
            && !runs
        {
            let Some((first, _)) = next(&mut socket) else {
                break;
            };
            too_early = Some(message);
            message = Heard::Vcpu(first);
        }
        runs |= matches!(message, Heard::Vcpu(SupervisorToVcpu::Run));
        heard.push(message.name());
        if let (
            "watch" | "watch-loop" | "watch-serve",
            Heard::Bus(
                SupervisorToBus::ServerAttached { generation, .. }
                | SupervisorToBus::ServerGone { generation, .. },
                _,
            ),
        ) = (play.as_str(), &message)
        {
            writeln!(console_out, "{} {generation}", message.name()).expect("written");
        }
        if let Heard::Bus(SupervisorToBus::ServerGone { generation, .. }, _) = &message {
            accuser.accused.take_if(|accused| accused == generation);
        }
        let serves = place.on_message(&message);
        match message {
            Heard::Bus(
                SupervisorToBus::AddDevice { .. } | SupervisorToBus::ServerAttached { .. },
                mut fds,
            ) => {
                links.push(Socket::new(fds.pop().expect("a link")));
            }
            Heard::Bus(SupervisorToBus::Inspect, _) => {
                let entries = vec![("connection".to_owned(), "played".to_owned())];
                bus.send(&BusToSupervisor::Inspect { entries }, &[]).ok();
            }
            Heard::Vcpu(SupervisorToVcpu::Inspect) => {
                let entries = vec![("state".to_owned(), "played".to_owned())];
                say(&mut socket, VcpuToSupervisor::Inspect { entries });
            }
            // The first time bulkhead-bus believes that this process has ended, the second time it has.
            Heard::Vcpu(SupervisorToVcpu::PowerButton) => {
                let presses = heard.iter().filter(|name| **name == "PowerButton");
                if presses.count() > 1 {
                    return power_off(&mut socket);
                }
                link = Socket::new(vmbus::ipc::pair().expect("a pair").0);
            }
            Heard::Vcpu(SupervisorToVcpu::Quit) if play != "ignore-quit" => {
                say(
                    &mut socket,
                    VcpuToSupervisor::Exited {
                        cause: ExitCause::Quit,
                    },
                );
                return ExitCode::SUCCESS;
            }
            Heard::Vcpu(SupervisorToVcpu::Run) => {
                writeln!(console_out, "the guest runs").expect("written");
                match play.as_str() {
                    "poweroff" => return power_off(&mut socket),
                    "die" => std::process::abort(),
                    "garbage" => {
                        nix::unistd::write(&socket, b"garbage").expect("written");
                    }
                    "crash" | "crash-often" => {
                        let text = Some("Kernel panic - not syncing: \x1b[2Jplayed".to_owned());
                        let crash = VcpuToSupervisor::GuestCrash {
                            parameters: [1, 2, 3, 4, 5],
                            text,
                        };
                        // No more than its socket holds: it ends without waiting.
                        let count = if play == "crash" { 1 } else { 100 };
                        for _ in 0..count {
                            say(&mut socket, crash.clone());
                        }
                        say(
                            &mut socket,
                            VcpuToSupervisor::Exited {
                                cause: ExitCause::Reset,
                            },
                        );
                        return ExitCode::SUCCESS;
                    }
                    "echo" => {
                        let mut text = String::new();
                        console_in.read_to_string(&mut text).expect("read");
                        write!(console_out, "{text}").expect("written");
                        return power_off(&mut socket);
                    }
                    "accuse" => {
                        let accusation = BusToSupervisor::ServerMisbehaves {
                            device: 0,
                            generation: 1,
                            why: "lied".to_owned(),
                        };
                        bus.send(&accusation, &[]).expect("sent");
                    }
                    // Its sockets are closed as those of one that dies: that to the supervisor first, then those to
                    // servers. It ends when they have.
                    "end-bus" => {
                        let (ours, theirs) = vmbus::ipc::pair().expect("a pair");
                        bus = Socket::new(ours);
                        for server in links.drain(..) {
                            shutdown(server.as_fd().as_raw_fd(), Shutdown::Write).expect("told");
                            let mut end = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
                            poll(&mut end, PollTimeout::NONE).expect("polled");
                        }
                        links.push(Socket::new(theirs));
                        link.send(&Handover { mark: 1 }, &[socket.as_fd()]).expect("sent");
                    }
                    // The sign for the played bulkhead-bus to die.
                    "die-bus" => link.send(&Handover { mark: 1 }, &[socket.as_fd()]).expect("sent"),
                    "garbage-bus" => {
                        nix::unistd::write(&bus, b"garbage").expect("written");
                    }
                    // It believes that the vCPU process has ended.
                    "lose-bus" => {
                        let nobody = Socket::new(vmbus::ipc::pair().expect("a pair").0);
                        link = nobody;
                    }
                    // The sign for a played server to die.
                    "succeed" | "watch-loop" => {
                        nix::unistd::write(&links[0], b"die").expect("written");
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        if play == "watch-serve" && serves {
            // Nobody may be there any more.
            nix::unistd::write(links.last().expect("a link"), SERVE).ok();
        }
        if !play.starts_with("watch") && heard.ends_with(&["ServerGone", "ServerAttached"]) {
            writeln!(console_out, "a successor came").expect("written");
            return power_off(&mut socket);
        }
    }
    ExitCode::FAILURE
}

/// The sign for a played server that it serves now.
const SERVE: &[u8] = b"serve";

/// Who serves the one device, and who waits for that.
#[derive(Default)]
struct ServingPlace {
    serving: Option<u32>,
    waiting: Option<u32>,
}

impl ServingPlace {
    /// Whether the newest server serves from now on. (The first one does so by itself.)
    fn on_message(&mut self, message: &Heard) -> bool {
        let Heard::Bus(message, _) = message else {
            return false;
        };
        match message {
            SupervisorToBus::AddDevice { .. } => self.serving = Some(1),
            SupervisorToBus::ServerAttached { generation, .. } => self.waiting = Some(*generation),
            SupervisorToBus::ServerGone { generation, .. } => {
                self.serving.take_if(|serving| serving == generation);
                self.waiting.take_if(|waiting| waiting == generation);
            }
            _ => return false,
        }
        if self.serving.is_none() {
            self.serving = self.waiting.take();
            return self.serving.is_some();
        }
        false
    }
}

fn power_off(socket: &mut Socket) -> ExitCode {
    for message in [
        VcpuToSupervisor::GuestPowerOff,
        VcpuToSupervisor::Exited {
            cause: ExitCause::PowerOff,
        },
    ] {
        socket.send(&message, &[]).expect("sent");
    }
    ExitCode::SUCCESS
}

pub fn server(swapped: Option<&str>) -> ExitCode {
    if swapped == Some("quits") {
        eprintln!("a library is missing");
        return ExitCode::from(3);
    }
    let mut socket = control();
    let Some((
        SupervisorToServer::Start {
            config,
            generation,
            fds: names,
            ..
        },
        fds,
    )) = next(&mut socket)
    else {
        return ExitCode::FAILURE;
    };
    assert_eq!(names, ["bus", "journal", "disk", "recorder"]);
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let serial = config["disks"][0]["serial"].as_str().unwrap_or_default();
    let play = match swapped.unwrap_or(serial) {
        "as-filed" => super::replaced::filed_play("self"),
        play => play.to_owned(),
    };
    let missing: &[&str] = if play == "lacking" {
        &["a wall against the north"]
    } else {
        &[]
    };
    match play.as_str() {
        "fail" => {
            let message = "the disk is on fire".to_owned();
            socket
                .send(&ServerToSupervisor::Failed { message }, &[])
                .expect("sent");
            return ExitCode::FAILURE;
        }
        "noisy" => eprintln!("red \x1b[31m alert"),
        "mute" => {
            // To the end of the supervisor's patience, or of the supervisor.
            while next::<SupervisorToServer>(&mut socket).is_some() {}
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    socket
        .send(
            &ServerToSupervisor::Ready {
                report: report(missing),
            },
            &[],
        )
        .expect("sent");
    match play.as_str() {
        "cold" => {}
        "cold-and-says-so" => eprintln!("I am ready"),
        _ => socket.send(&ServerToSupervisor::Warm, &[]).expect("sent"),
    }
    // The first one does when the guest runs: a death before that is a start that failed.
    if play == "dies-at-work" && generation > 1 {
        std::process::abort();
    }
    let mut fds = fds.into_iter();
    let link = Socket::new(fds.next().expect("the link"));
    // Journal and disk: open to its end, as in a real one.
    let _others: Vec<OwnedFd> = fds.collect();
    loop {
        let ready = {
            let mut list = [
                PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(link.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut list, PollTimeout::NONE).expect("polled");
            list.map(|fd| fd.any().unwrap_or(false))
        };
        if ready[0] {
            match next::<SupervisorToServer>(&mut socket) {
                Some((SupervisorToServer::Stop, _)) if play == "dies-at-stop" => {
                    eprintln!("I will not");
                    std::process::abort();
                }
                Some((SupervisorToServer::Stop, _)) if play != "ignore-stop" => {
                    // The supervisor may be at its end, too.
                    socket.send(&ServerToSupervisor::Released, &[]).ok();
                    if play == "lingers" {
                        std::thread::park();
                    }
                    return ExitCode::SUCCESS;
                }
                Some((SupervisorToServer::Ping { token }, _)) if play != "deaf" => {
                    // The supervisor may be at its end.
                    socket.send(&ServerToSupervisor::Pong { token }, &[]).ok();
                }
                None if play != "ignore-stop" => return ExitCode::SUCCESS,
                Some((SupervisorToServer::Inspect, _)) => {
                    let entries = vec![("generation".to_owned(), generation.to_string())];
                    socket
                        .send(&ServerToSupervisor::Inspect { entries }, &[])
                        .expect("sent");
                }
                _ => {}
            }
        } else if ready[1] {
            let mut sign = [0; 8];
            if nix::unistd::read(&link, &mut sign) == Ok(0) {
                // The vCPU process is gone: so is the VM. One server waits to be told, another knows.
                if play == "quick" {
                    return ExitCode::SUCCESS;
                }
                poll(
                    &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                )
                .expect("polled");
                continue;
            }
            if sign.starts_with(SERVE) && play != "dies-serving" {
                continue;
            }
            match (play.as_str(), generation) {
                ("dies-serving", _) => std::process::abort(),
                ("nonsense", 1) => {
                    nix::unistd::write(&socket, b"nonsense").expect("written");
                    std::thread::park();
                }
                ("eats", 1) => {
                    // More than it can have: the kernel ends this.
                    std::hint::black_box(vec![1_u8; 1 << 30]);
                }
                (_, 1) => {
                    eprintln!("I cannot go on");
                    std::process::abort();
                }
                _ => std::thread::park(),
            }
        }
    }
}
