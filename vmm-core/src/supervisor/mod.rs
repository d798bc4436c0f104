#![forbid(unsafe_code)]
//! The supervisor of one VM: starts its processes, watches them, replaces servers that died, ends all together.
//!
//! ```text
//!   plan ──▶ open what has a path ──▶ start bulkhead-vcpu and all servers ──▶ every Ready ──▶ Run ──▶ … ──▶ end
//!                                          (in parallel: nobody is waited for in turn)
//!
//!   a server:  Running ──dies──▶ Fencing ──its I/O is over──▶ Pausing ──▶ Running, next generation
//!                                   │ ServerGone to vcpu                       ServerAttached to vcpu
//!                                   └── dies again and again ──▶ Held
//! ```
//!
//! One thread, one loop over `poll(2)`. It waits for no child: each answer that is expected has a deadline, which is an
//! event like any other ([`timers`]). It believes no child: messages are decoded by `vmbus::ipc`, log lines are cut and
//! cleaned, and a child that says nonsense is killed. It maps no guest memory.
//!
//! *Fencing*: a process's end does not end the I/O that the kernel does on its behalf. A server that has such I/O holds
//! a lock on its journal by a descriptor that its io_uring holds, too; so whoever gets that lock knows that the last
//! request is over. Only then is `bulkhead-vcpu` told that the server is gone, and a successor started.
//!
//! | file | what |
//! | --- | --- |
//! | `plan.rs` | description to processes, pure |
//! | `policy.rs` | death to restart or hold, pure |
//! | `backend.rs` | the one place where paths are opened |
//! | `process.rs` | a running child |
//! | `room.rs` | a device and its servers |
//! | `console.rs` | the person's terminal |
//! | `folder.rs`, `control.rs` | the VM's folder, and the socket in it |
//! | `report.rs` | sentences and exit status |

pub mod backend;
pub mod console;
pub mod control;
pub mod folder;
mod input;
mod inspection;
pub mod plan;
pub mod policy;
pub mod process;
pub mod report;
mod room;
mod timers;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{
    ExitCause as VmExit, OnReset, PeerFault, ServerToSupervisor, SupervisorToVcpu, VcpuToSupervisor,
};

use crate::spec::{Console, OnCrash, VmSpec};
use console::Command;
use control::{Listener, MAX_CLIENTS, Reply, Request};
use folder::Folder;
use input::Input;
use inspection::{Client, Inspection};
use process::Process;
use report::{Outcome, say};
use room::{RoomState, Server};
use timers::{Timer, Timers};

/// Limit: from the first process to the last Ready. A loaded machine that emulates processors takes seconds.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Limit: what the vCPU process, and then the servers, may take to end when asked to.
const END_DEADLINE: Duration = Duration::from_secs(3);

/// Limit: messages of one child that are handled before the others have their turn.
const MESSAGES_PER_TURN: usize = 64;

/// What the caller decides besides the description.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where `bulkhead-vcpu` and the servers' programs are.
    pub programs: PathBuf,
    /// Where the folders of running VMs are.
    pub base: PathBuf,
}

/// Runs a VM to its end.
pub fn run(spec: &VmSpec, options: &Options) -> Outcome {
    let mut supervisor = match Supervisor::start(spec, options) {
        Ok(supervisor) => supervisor,
        Err(error) => return Outcome::Setup(format!("{error:#}")),
    };
    loop {
        if let Some(outcome) = supervisor.finished() {
            return outcome;
        }
        if let Err(error) = supervisor.turn() {
            return Outcome::VcpuDied(format!("the supervisor cannot go on: {error:#}"));
        }
    }
}

/// Where the VM is in its life.
#[derive(Debug)]
enum Phase {
    /// Not all are ready.
    Starting {
        reports: Vec<String>,
        vcpu_ready: bool,
    },
    Running,
    /// The vCPU process is asked to end.
    EndingVcpu(Outcome),
    /// The servers are asked to end.
    EndingServers(Outcome),
    Over(Outcome),
}

struct Supervisor {
    phase: Phase,
    on_crash: OnCrash,
    on_reset: OnReset,
    require_full_sandbox: bool,
    programs: PathBuf,
    log: String,
    /// The guest's kernel reported a crash and has not reset since.
    crashed: bool,
    /// What `bulkhead-vcpu` said that the end is, or why it failed.
    vcpu_said: Option<VmExit>,
    vcpu_failed: Option<String>,
    vcpu: Process,
    rooms: Vec<RoomState>,
    input: Input,
    signals: SignalFd,
    listener: Listener,
    clients: Vec<Client>,
    inspection: Option<Inspection>,
    timers: Timers,
    /// Last: removed when nothing of the VM is left.
    folder: Folder,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Signals,
    Typed,
    InputPipe,
    Listener,
    Client(usize),
    Vcpu(Part),
    Server(usize, Part),
    Passt(usize, Part),
}

/// What of a process an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    End,
    Control,
    Log,
}

/// Starting.
impl Supervisor {
    fn start(spec: &VmSpec, options: &Options) -> Result<Self> {
        let signals = take_signals().context("cannot take signals")?;
        let plan = plan::plan(spec);
        let folder = Folder::take(&options.base, &spec.name)?;
        let listener = Listener::bind(&folder.path().join("control"))?;

        // Everything that can be a person's mistake comes before the first process.
        backend::check_memory(spec.memory)?;
        let mut machine = backend::open_machine(&plan.kernel, plan.initrd.as_deref())?;
        let mut rooms = room::open(&plan, spec)?;
        let (input, console_in) = Input::new(&spec.console).context("cannot set up the console")?;
        machine.push(("console-in", console_in));
        machine.push(("console-out", console_out(&spec.console)?));

        // The vCPU process first: it has the most to do, and does it while the servers start.
        let mut vcpu = Process::start(&options.programs.join("bulkhead-vcpu"), 0)?;
        let names = machine.iter().map(|(name, _)| (*name).to_owned()).collect();
        let fds: Vec<BorrowedFd<'_>> = machine.iter().map(|(_, fd)| fd.as_fd()).collect();
        let start = SupervisorToVcpu::Start {
            protocol: PROTOCOL,
            config: plan.vcpu.clone(),
            fds: names,
        };
        tell_vcpu(&mut vcpu, &start, &fds)?;
        for room in &mut rooms {
            room.start_passt()?;
            let link = room.start_server(&options.programs, &spec.log, spec.require_full_sandbox)?;
            tell_vcpu(&mut vcpu, &room.introduction(), &[link.as_fd()])?;
        }
        let mut timers = Timers::default();
        timers.set(Instant::now() + START_DEADLINE, Timer::StartOverdue);
        Ok(Supervisor {
            phase: Phase::Starting {
                reports: Vec::new(),
                vcpu_ready: false,
            },
            on_crash: spec.on_crash,
            on_reset: spec.on_reset,
            require_full_sandbox: spec.require_full_sandbox,
            programs: options.programs.clone(),
            log: spec.log.clone(),
            crashed: false,
            vcpu_said: None,
            vcpu_failed: None,
            vcpu,
            rooms,
            input,
            signals,
            listener,
            clients: Vec::new(),
            inspection: None,
            timers,
            folder,
        })
    }

    fn on_ready(&mut self, report: String, is_vcpu: bool) {
        if let Phase::Starting { reports, vcpu_ready } = &mut self.phase {
            reports.push(report);
            *vcpu_ready |= is_vcpu;
        }
        self.run_if_ready();
    }

    fn run_if_ready(&mut self) {
        let Phase::Starting {
            reports,
            vcpu_ready: true,
        } = &self.phase
        else {
            return;
        };
        if !self.rooms.iter().all(|room| room.server.is_ready()) {
            return;
        }
        let lacking = report::lacking(reports.iter().map(String::as_str));
        if !lacking.is_empty() {
            let lacking = lacking.join("; ");
            if self.require_full_sandbox {
                return self.fail_start(format!(
                    "a full sandbox was asked for, and this host lacks: {lacking}"
                ));
            }
            say(&format!("this host lacks what a full sandbox needs: {lacking}"));
        }
        if let Err(error) = self.input.make_raw() {
            return self.fail_start(format!("cannot set up the terminal: {error}"));
        }
        self.timers.clear(Timer::StartOverdue);
        self.phase = Phase::Running;
        self.send_to_vcpu(&SupervisorToVcpu::Run, &[]);
    }

    /// The VM cannot be started; everything that runs is ended by its drop.
    fn fail_start(&mut self, why: String) {
        self.over(Outcome::Setup(why));
    }
}

fn console_out(console: &Console) -> Result<OwnedFd> {
    match console {
        Console::Stdio => console::output().context("cannot duplicate standard output"),
        Console::None => Ok(std::fs::OpenOptions::new().write(true).open("/dev/null")?.into()),
        Console::File(path) => {
            let file = std::fs::File::create(path);
            let file = file.with_context(|| format!("cannot write the console to {}", path.display()))?;
            Ok(file.into())
        }
    }
}

/// Blocks the signals that end or stop the VM, and reads them as events.
fn take_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGTSTP,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

fn tell_vcpu(vcpu: &mut Process, message: &SupervisorToVcpu, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let socket = vcpu
        .control
        .as_mut()
        .ok_or_else(|| anyhow!("bulkhead-vcpu does not listen"))?;
    socket
        .send(message, fds)
        .map_err(|error| anyhow!("cannot talk to bulkhead-vcpu: {error}"))
}

/// The loop.
impl Supervisor {
    /// Waits for events and handles them.
    fn turn(&mut self) -> Result<()> {
        let events = self.wait()?;
        // The order in a list of events does not matter but for one: what a process said comes before its end.
        for (source, flags) in events {
            self.on_event(source, flags);
        }
        for timer in self.timers.due(Instant::now()) {
            self.on_timer(timer);
        }
        Ok(())
    }

    fn wait(&self) -> Result<Vec<(Source, PollFlags)>> {
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = self.sources().into_iter().unzip();
        let timeout = match self.timers.next() {
            None => PollTimeout::NONE,
            Some(next) => {
                let left = next.saturating_duration_since(Instant::now());
                // Rounded up: a timer that is not quite due would make the loop spin.
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => bail!("poll failed: {}", errno.desc()),
        }
        let flags = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(sources
            .into_iter()
            .zip(flags)
            .filter(|(_, flags)| !flags.is_empty())
            .collect())
    }

    fn sources(&self) -> Vec<(Source, PollFd<'_>)> {
        let mut list = vec![
            (
                Source::Signals,
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ),
            (
                Source::Listener,
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ),
        ];
        if let Some(stdin) = self.input.wants_typed() {
            list.push((Source::Typed, PollFd::new(stdin, PollFlags::POLLIN)));
        }
        if let Some(pipe) = self.input.wants_pipe() {
            list.push((Source::InputPipe, PollFd::new(pipe, PollFlags::POLLOUT)));
        }
        for (index, client) in self.clients.iter().enumerate() {
            list.push((
                Source::Client(index),
                PollFd::new(client.socket.as_fd(), interest(client.socket.has_queued())),
            ));
        }
        add_process(&mut list, &self.vcpu, Source::Vcpu);
        for (index, room) in self.rooms.iter().enumerate() {
            if let Server::Running { process, .. } = &room.server {
                add_process(&mut list, process, |part| Source::Server(index, part));
            }
            if let Some(passt) = &room.passt {
                add_process(&mut list, passt, |part| Source::Passt(index, part));
            }
        }
        list
    }

    fn on_event(&mut self, source: Source, flags: PollFlags) {
        match source {
            Source::Signals => self.on_signals(),
            Source::Typed => self.on_typed(),
            Source::InputPipe => self.input.flush(),
            Source::Listener => self.on_new_client(),
            Source::Client(index) => self.on_client(index),
            Source::Vcpu(Part::Control) => self.on_vcpu_control(),
            Source::Vcpu(Part::Log) => show_lines("vcpu", &mut self.vcpu),
            Source::Vcpu(Part::End) => self.on_vcpu_end(),
            Source::Server(index, Part::Control) => self.on_server_control(index),
            Source::Server(index, Part::Log) => {
                if let Some(room) = self.rooms.get_mut(index)
                    && let Server::Running { process, .. } = &mut room.server
                {
                    show_lines(&room.plan.name, process);
                }
            }
            Source::Server(index, Part::End) => self.on_server_end(index),
            Source::Passt(index, Part::End) => self.on_passt_end(index),
            Source::Passt(index, Part::Control | Part::Log) => {
                if let Some(RoomState {
                    passt: Some(passt),
                    plan,
                    ..
                }) = self.rooms.get_mut(index)
                {
                    show_lines(&format!("{} passt", plan.name), passt);
                }
            }
        }
        // Nothing is asked of a descriptor that only says that it is broken; its owner has just seen that, too.
        debug_assert!(!flags.is_empty());
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::StartOverdue => self.on_start_overdue(),
            Timer::ReadyOverdue { room, generation } => {
                self.kill_server(room, generation, "did not get ready in time")
            }
            Timer::Fence { room } => self.try_fence(room),
            Timer::Restart { room } => self.restart_server(room),
            Timer::EndOverdue => self.on_end_overdue(),
            Timer::InspectOverdue => self.finish_inspection(),
        }
    }

    fn on_start_overdue(&mut self) {
        let Phase::Starting { vcpu_ready, .. } = self.phase else {
            return;
        };
        let mut waiting: Vec<&str> = Vec::new();
        if !vcpu_ready {
            waiting.push("vcpu");
        }
        waiting.extend(
            self.rooms
                .iter()
                .filter(|room| !room.server.is_ready())
                .map(|room| room.plan.name.as_str()),
        );
        let seconds = START_DEADLINE.as_secs();
        self.fail_start(format!(
            "not ready after {seconds} seconds: {}",
            waiting.join(", ")
        ));
    }
}

fn interest(queued: bool) -> PollFlags {
    if queued {
        PollFlags::POLLIN | PollFlags::POLLOUT
    } else {
        PollFlags::POLLIN
    }
}

fn add_process<'a>(
    list: &mut Vec<(Source, PollFd<'a>)>,
    process: &'a Process,
    source: impl Fn(Part) -> Source,
) {
    if let Some(control) = &process.control {
        list.push((
            source(Part::Control),
            PollFd::new(control.as_fd(), interest(control.has_queued())),
        ));
    }
    if let Some(log) = &process.log.fd {
        list.push((source(Part::Log), PollFd::new(log.as_fd(), PollFlags::POLLIN)));
    }
    list.push((
        source(Part::End),
        PollFd::new(process.child.as_fd(), PollFlags::POLLIN),
    ));
}

fn show_lines(name: &str, process: &mut Process) {
    for line in process.lines() {
        report::relay(name, &line);
    }
}

/// The person.
impl Supervisor {
    fn on_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if number == Signal::SIGTSTP as i32 {
                self.input.stop_and_go_on();
            } else if matches!(self.phase, Phase::EndingVcpu(_) | Phase::EndingServers(_)) {
                // Somebody is impatient.
                self.over(Outcome::Signal(number));
            } else {
                self.end(Outcome::Signal(number));
            }
        }
    }

    fn on_typed(&mut self) {
        match self.input.on_typed() {
            Some(Command::Quit) => self.end(Outcome::Stopped),
            Some(Command::Help) => say(console::HELP),
            None => {}
        }
    }

    fn on_new_client(&mut self) {
        // A listener that fails will fail again; the VM needs none.
        while let Ok(Some(socket)) = self.listener.accept() {
            if self.clients.len() < MAX_CLIENTS {
                self.clients.push(Client {
                    socket,
                    waits_for_inspection: false,
                });
            }
        }
    }

    /// A number may name another client than the one whose event it was, if one before it has just gone: it is only
    /// looked at then, and found to have said nothing.
    fn on_client(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        let request = match client.socket.flush().map(|()| client.socket.recv::<Request>()) {
            Ok(Ok(Some((request, _)))) => request,
            Ok(Ok(None)) => return,
            Ok(Err(_)) | Err(_) => {
                self.clients.remove(index);
                return;
            }
        };
        let replies = match request {
            Request::Status => vec![self.status()],
            Request::Inspect => {
                client.waits_for_inspection = true;
                self.begin_inspection();
                return;
            }
            Request::Stop => {
                self.end(Outcome::Stopped);
                vec![Reply::Done]
            }
            Request::PowerButton => {
                self.send_to_vcpu(&SupervisorToVcpu::PowerButton, &[]);
                vec![Reply::Done]
            }
        };
        self.answer_client(index, &replies);
    }

    fn answer_client(&mut self, index: usize, replies: &[Reply]) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        if replies
            .iter()
            .any(|reply| client.socket.send(reply, &[]).is_err())
        {
            self.clients.remove(index);
        }
    }

    fn status(&self) -> Reply {
        let mut processes = vec![("vcpu".to_owned(), self.vcpu.child.pid.as_raw())];
        for room in &self.rooms {
            if let Server::Running { process, .. } = &room.server {
                processes.push((room.plan.name.clone(), process.child.pid.as_raw()));
            }
            if let Some(passt) = &room.passt {
                processes.push((format!("{} passt", room.plan.name), passt.child.pid.as_raw()));
            }
        }
        Reply::Status {
            supervisor: nix::unistd::getpid().as_raw(),
            state: self.state().to_owned(),
            processes,
        }
    }

    fn state(&self) -> &'static str {
        match self.phase {
            Phase::Starting { .. } => "starting",
            Phase::Running if self.crashed => "crashed",
            Phase::Running => "running",
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => "ending",
        }
    }
}

/// `bulkhead-vcpu`.
impl Supervisor {
    /// Sends; a vCPU process that does not take messages is killed, which ends the VM.
    fn send_to_vcpu(&mut self, message: &SupervisorToVcpu, fds: &[BorrowedFd<'_>]) {
        if let Err(error) = tell_vcpu(&mut self.vcpu, message, fds)
            && self.vcpu_said.is_none()
        {
            self.vcpu_failed.get_or_insert(format!("{error:#}"));
            self.vcpu.kill();
        }
    }

    fn on_vcpu_control(&mut self) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(socket) = &mut self.vcpu.control else {
                return;
            };
            let received = match socket.flush() {
                Ok(()) => socket.recv::<VcpuToSupervisor>(),
                Err(_) => Err(PeerFault::Eof),
            };
            match received {
                Ok(Some((message, _))) => self.on_vcpu_message(message),
                Ok(None) => return,
                // Its end follows, and says why.
                Err(PeerFault::Eof) => self.vcpu.control = None,
                Err(fault) => {
                    self.vcpu.control = None;
                    self.vcpu_failed
                        .get_or_insert(format!("it does not speak our protocol: {fault}"));
                    self.vcpu.kill();
                }
            }
        }
    }

    fn on_vcpu_message(&mut self, message: VcpuToSupervisor) {
        match message {
            VcpuToSupervisor::Ready { report } => self.on_ready(report, true),
            VcpuToSupervisor::Started => {}
            VcpuToSupervisor::Failed { message } => self.vcpu_failed = Some(process::printable(&message)),
            VcpuToSupervisor::ServerMisbehaves {
                device,
                generation,
                why,
            } => self.kill_server_of(
                device,
                generation,
                &format!("broke the protocol: {}", process::printable(&why)),
            ),
            VcpuToSupervisor::ServerSlow {
                device,
                generation,
                waiting_for,
            } => {
                let why = format!("did not answer in time: {}", process::printable(&waiting_for));
                self.kill_server_of(device, generation, &why);
            }
            VcpuToSupervisor::GuestPowerOff => {}
            VcpuToSupervisor::GuestReset { count } => {
                if self.on_reset == OnReset::Reset {
                    self.crashed = false;
                }
                say(&format!("the guest reset itself ({count} so far)"));
            }
            VcpuToSupervisor::GuestCrash { parameters, text } => {
                self.crashed = true;
                say(&report::guest_crash(&parameters, text.as_deref()));
                if self.on_crash == OnCrash::Exit {
                    self.end(Outcome::GuestCrashed);
                }
            }
            VcpuToSupervisor::Exited { cause } => self.vcpu_said = Some(cause),
            VcpuToSupervisor::Inspect { entries } => self.on_inspected("vcpu", entries),
        }
    }

    fn on_vcpu_end(&mut self) {
        let Some(cause) = self.vcpu.ended() else {
            return;
        };
        // What it said last is still in the sockets.
        while self.vcpu.control.is_some() {
            self.on_vcpu_control();
            if let Some(socket) = &self.vcpu.control
                && !has_more(socket.as_fd())
            {
                break;
            }
        }
        show_lines("vcpu", &mut self.vcpu);
        let outcome = match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Starting { .. } => {
                let why = self.vcpu_failed.take().unwrap_or_else(|| self.last_words(cause));
                return self.fail_start(why);
            }
            Phase::EndingVcpu(outcome) => outcome,
            phase @ (Phase::EndingServers(_) | Phase::Over(_)) => {
                self.phase = phase;
                return;
            }
            Phase::Running => self.outcome_of(cause),
        };
        self.end_servers(outcome);
    }

    fn last_words(&self, cause: sandbox::ExitCause) -> String {
        let tail = self.vcpu.log.tail();
        let said = tail
            .last()
            .map(|line| format!("; its last words: {line:?}"))
            .unwrap_or_default();
        format!("bulkhead-vcpu {cause}{said}")
    }

    fn outcome_of(&mut self, cause: sandbox::ExitCause) -> Outcome {
        match self.vcpu_said.take() {
            Some(VmExit::PowerOff | VmExit::Reset) if self.crashed => Outcome::GuestCrashed,
            Some(VmExit::PowerOff | VmExit::Reset) => Outcome::PoweredOff,
            Some(VmExit::Console | VmExit::Quit) => Outcome::Stopped,
            Some(VmExit::Fault { message }) => Outcome::VcpuDied(process::printable(&message)),
            None => {
                let failed = self.vcpu_failed.take();
                let died = self.last_words(cause);
                Outcome::VcpuDied(failed.map_or(died.clone(), |why| format!("{died}; {why}")))
            }
        }
    }
}

fn has_more(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// Servers.
impl Supervisor {
    fn on_server_control(&mut self, index: usize) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(room) = self.rooms.get_mut(index) else {
                return;
            };
            let generation = room.generation;
            match room.receive() {
                Ok(Some(message)) => self.on_server_message(index, message),
                Ok(None) => return,
                Err(fault) => {
                    self.kill_server(
                        index,
                        generation,
                        &format!("does not speak our protocol: {fault}"),
                    );
                    return;
                }
            }
        }
    }

    fn on_server_message(&mut self, index: usize, message: ServerToSupervisor) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let name = room.plan.name.clone();
        match message {
            ServerToSupervisor::Ready { report } => {
                let generation = room.generation;
                room.server.set_ready();
                self.timers.clear(Timer::ReadyOverdue {
                    room: index,
                    generation,
                });
                self.on_ready(report, false);
            }
            ServerToSupervisor::Failed { message } => room.server.blame(&process::printable(&message)),
            ServerToSupervisor::Pong { .. } => {}
            ServerToSupervisor::Inspect { entries } => self.on_inspected(&name, entries),
            ServerToSupervisor::Event { text } => report::relay(&name, &process::printable(&text)),
        }
    }

    /// Kills the server of a device if it is still of that generation.
    fn kill_server_of(&mut self, device: u32, generation: u32, why: &str) {
        if let Some(index) = self.rooms.iter().position(|room| room.plan.device == device) {
            self.kill_server(index, generation, why);
        }
    }

    fn kill_server(&mut self, index: usize, generation: u32, why: &str) {
        if let Some(room) = self.rooms.get_mut(index)
            && room.generation == generation
        {
            room.server.blame(why);
            room.server.kill();
        }
    }

    fn on_server_end(&mut self, index: usize) {
        // A last message (why it failed) may still be there.
        self.on_server_control(index);
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(death) = room.on_end() else {
            return;
        };
        match self.phase {
            Phase::Starting { .. } => self.fail_start(death.sentence),
            Phase::EndingServers(_) => self.finish_if_all_ended(),
            Phase::EndingVcpu(_) | Phase::Over(_) => {}
            Phase::Running => {
                say(&death.sentence);
                self.try_fence(index);
            }
        }
    }

    /// Once nothing of the dead server touches guest memory, tells the vCPU process and decides on a successor.
    fn try_fence(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Server::Fencing { started, since } = room.server else {
            return;
        };
        if !room.is_fenced() {
            let waited = since.elapsed();
            let pause = (waited / 4).clamp(Duration::from_millis(1), Duration::from_millis(100));
            self.timers
                .set(Instant::now() + pause, Timer::Fence { room: index });
            return;
        }
        let gone = SupervisorToVcpu::ServerGone {
            device: room.plan.device,
            generation: room.generation,
        };
        let now = self.timers.milliseconds(Instant::now());
        let name = room.plan.name.clone();
        match room.history.on_death(self.timers.milliseconds(started), now) {
            policy::Decision::Restart { after_ms } => {
                room.server = Server::Pausing;
                let at = Instant::now() + Duration::from_millis(after_ms);
                self.timers.set(at, Timer::Restart { room: index });
            }
            policy::Decision::Hold { deaths, within_ms } => {
                room.server = Server::Held;
                let seconds = within_ms / 1000;
                say(&format!(
                    "{name} died {deaths} times in {seconds} seconds and is left alone; the guest waits for it"
                ));
            }
        }
        self.send_to_vcpu(&gone, &[]);
    }

    fn restart_server(&mut self, index: usize) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let started = room
            .start_passt()
            .and_then(|()| room.start_server(&self.programs, &self.log, self.require_full_sandbox));
        match started {
            Ok(link) => {
                let generation = room.generation;
                let attached = SupervisorToVcpu::ServerAttached {
                    device: room.plan.device,
                    generation,
                };
                let deadline = Instant::now() + START_DEADLINE;
                self.timers.set(
                    deadline,
                    Timer::ReadyOverdue {
                        room: index,
                        generation,
                    },
                );
                self.send_to_vcpu(&attached, &[link.as_fd()]);
            }
            Err(error) => {
                say(&format!("{} has no successor: {error:#}", room.plan.name));
                let now = self.timers.milliseconds(Instant::now());
                match room.history.on_death(now, now) {
                    policy::Decision::Restart { after_ms } => {
                        let at = Instant::now() + Duration::from_millis(after_ms);
                        self.timers.set(at, Timer::Restart { room: index });
                    }
                    policy::Decision::Hold { .. } => room.server = Server::Held,
                }
            }
        }
    }

    /// passt is gone, and with it the far end of the server's stream: the next server gets a new one.
    fn on_passt_end(&mut self, index: usize) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(passt) = &mut room.passt else {
            return;
        };
        let name = format!("{} passt", room.plan.name);
        show_lines(&name, passt);
        let Some(cause) = passt.ended() else {
            return;
        };
        room.passt = None;
        let generation = room.generation;
        match self.phase {
            Phase::Starting { .. } => self.fail_start(format!("{name} {cause}")),
            Phase::Running => {
                say(&format!(
                    "{name} {cause}; it is started again, and connections through it are lost"
                ));
                self.kill_server(index, generation, "lost passt");
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }
}

/// The end.
impl Supervisor {
    /// Begins the end: the processors first, then the servers.
    fn end(&mut self, outcome: Outcome) {
        match self.phase {
            Phase::Starting { .. } => self.over(outcome),
            Phase::Running => {
                self.phase = Phase::EndingVcpu(outcome);
                self.timers.set(Instant::now() + END_DEADLINE, Timer::EndOverdue);
                self.send_to_vcpu(&SupervisorToVcpu::Quit, &[]);
            }
            Phase::EndingVcpu(_) | Phase::EndingServers(_) | Phase::Over(_) => {}
        }
    }

    fn end_servers(&mut self, outcome: Outcome) {
        self.phase = Phase::EndingServers(outcome);
        self.timers.clear(Timer::EndOverdue);
        self.timers.set(Instant::now() + END_DEADLINE, Timer::EndOverdue);
        for room in &mut self.rooms {
            room.ask_to_stop();
        }
        self.finish_if_all_ended();
    }

    fn finish_if_all_ended(&mut self) {
        let running = self
            .rooms
            .iter()
            .any(|room| matches!(room.server, Server::Running { .. }));
        if running {
            return;
        }
        if let Phase::EndingServers(outcome) = &self.phase {
            let outcome = outcome.clone();
            self.over(outcome);
        }
    }

    fn on_end_overdue(&mut self) {
        match &self.phase {
            Phase::EndingVcpu(_) => self.vcpu.kill(),
            Phase::EndingServers(outcome) => {
                let outcome = outcome.clone();
                self.over(outcome);
            }
            Phase::Starting { .. } | Phase::Running | Phase::Over(_) => {}
        }
    }

    /// Nothing more is waited for. Whatever still runs is killed, and its end seen: nothing is left behind.
    fn over(&mut self, outcome: Outcome) {
        let mut last: Vec<&mut Process> = vec![&mut self.vcpu];
        for room in &mut self.rooms {
            if let Server::Running { process, .. } = &mut room.server {
                last.push(process);
            }
            last.extend(room.passt.as_mut());
        }
        for process in &last {
            process.kill();
        }
        for process in last {
            // A killed process that does not end (it waits for a dead disk) is init's, then.
            let _ = process.child.wait_at_most(END_DEADLINE);
        }
        self.input.restore();
        self.phase = Phase::Over(outcome);
    }

    fn finished(&self) -> Option<Outcome> {
        match &self.phase {
            Phase::Over(outcome) => Some(outcome.clone()),
            Phase::Starting { .. } | Phase::Running | Phase::EndingVcpu(_) | Phase::EndingServers(_) => None,
        }
    }
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}
