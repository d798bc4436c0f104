#![forbid(unsafe_code)]
//! The supervisor of one VM: starts its processes, watches them, replaces servers that died, ends all together.
//!
//! ```text
//!   plan ──▶ open what has a path ──▶ start bulkhead-vcpu, -bus and all servers ──▶ every Ready ──▶ Run ──▶ … ──▶ end
//!                                          (in parallel: nobody is waited for in turn)
//!
//!   a server:  Running ──dies──▶ Fencing ──its I/O is over, ServerGone to bus──▶ Running, next generation
//!                                   │ if there is to be no pause, the next one is started here and waits
//!                                   ├── dies again ──▶ Pausing ──▶ Running, next generation
//!                                   └── dies again and again ──▶ Held
//!
//!   a planned replacement: the successor is started beside it and gets warm; Running ──told to stop, Released──▶ Fencing
//!   ──▶ Running, the successor. One that waits already takes over in the same way from a server that died.
//! ```
//!
//! One thread, one loop over `ppoll(2)`. It waits for no child: each answer that is expected has a deadline, which is an
//! event like any other ([`timers`]). It believes no child: messages are decoded by `vmbus::ipc`, log lines are cut and
//! cleaned, and a child that says nonsense is killed. It maps no guest memory.
//!
//! *Fencing*: a process's end does not end the I/O that the kernel does on its behalf. A server that has such I/O holds
//! locks on its disks' descriptions, which each generation has for itself and which requests in flight keep open, and one on
//! its journal; so whoever finds them free knows that the last request is over. Only then is `bulkhead-bus` told that the
//! server is gone, and lets the next one serve. A lock of the supervisor's own keeps other VMs away from the disk all the time.
//!
//! | file | what |
//! | --- | --- |
//! | `plan.rs` | description to processes, pure |
//! | `policy.rs` | death to restart or hold, pure |
//! | `backend.rs` | the one place where paths are opened |
//! | `boot_plan.rs` | what goes into guest memory at power-on |
//! | `process.rs` | a running child |
//! | `program.rs` | what servers are started from |
//! | `room.rs` | a device and its servers |
//! | `events.rs` | the loop |
//! | `successor.rs`, `swap.rs`, `standby.rs` | servers that wait, planned replacement, and standbys |
//! | `fallback.rs` | going back to the program before a planned replacement |
//! | `machine.rs`, `control_plane.rs`, `servers.rs`, `person.rs` | what `bulkhead-vcpu`, `bulkhead-bus`, the servers and a person say |
//! | `ending.rs` | the end |
//! | `console.rs` | the person's terminal |
//! | `keeper/`, `keep.rs`, `saved.rs` | the process that holds what the supervisor holds, and what that is |
//! | `adopt.rs`, `hand_on.rs` | becoming the supervisor of a VM that has lost its own, or having its own program do that |
//! | `folder.rs`, `control.rs` | the VM's folder, and the socket in it |
//! | `chronicle.rs`, `operator.rs` | what happened, for an operator and from one |
//! | `liveness.rs` | processes that hang |
//! | `crash_report.rs`, `oom.rs` | what is known of a process that died, and of the host's want of memory |
//! | `report.rs` | sentences and exit status |

pub mod adopt;
pub mod backend;
pub mod boot_plan;
pub mod chronicle;
mod clock;
pub mod console;
pub mod control;
mod control_plane;
pub mod crash_report;
mod ending;
mod events;
mod fallback;
pub mod folder;
mod hand_on;
mod input;
mod inspection;
mod keep;
pub mod keeper;
pub mod liveness;
mod machine;
pub mod oom;
mod operator;
mod person;
pub mod plan;
pub mod policy;
pub mod process;
mod program;
pub mod report;
mod room;
mod saved;
mod servers;
mod standby;
mod successor;
mod swap;
mod timers;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{ExitCause as VmExit, Message, OnReset, SendError, SupervisorToBus, SupervisorToVcpu, pair};

use crate::spec::{Console, OnCrash, VmSpec};
use chronicle::{Chronicle, Event};
use control::Listener;
use crash_report::CrashReport;
use folder::Folder;
use input::Input;
use inspection::{Client, Inspection};
use keeper::mirror::Keeper;
use oom::OomWatch;
use policy::History;
use process::{Budget, Process};
use report::{Outcome, say};
use room::{RoomState, ServerSettings};
use servers::Followed;
use timers::{Timer, Timers};

/// Limit: from the first process to the last Ready. A loaded machine that emulates processors takes seconds.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Limit: what the vCPU process, and then the servers, may take to end when asked to.
const END_DEADLINE: Duration = Duration::from_secs(3);

/// Tells `bulkhead-bus` from the VM's other processes, where 0 is `bulkhead-vcpu`; the last is the keeper's.
const BUS_INDEX: u32 = 14;

/// Limit: messages of one child that are handled before the others have their turn.
const MESSAGES_PER_TURN: usize = 64;

/// What the caller decides besides the description.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where our other programs are.
    pub programs: PathBuf,
    /// Where the folders of running VMs are.
    pub base: PathBuf,
}

/// Runs a VM to its end.
pub fn run(spec: &VmSpec, options: &Options) -> Outcome {
    let supervisor = match Supervisor::start(spec, options) {
        Ok(supervisor) => supervisor,
        Err(error) => return Outcome::Setup(format!("{error:#}")),
    };
    supervise(supervisor)
}

fn supervise(mut supervisor: Supervisor) -> Outcome {
    loop {
        if let Some(outcome) = supervisor.finished() {
            supervisor.tell_of_reports();
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
        bus_ready: bool,
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
    /// The VM's.
    name: String,
    on_crash: OnCrash,
    on_reset: OnReset,
    settings: ServerSettings,
    /// The guest's kernel reported a crash and has not reset since.
    crashed: bool,
    /// For what the guest does to itself, which it can do without end.
    guest_budget: Budget,
    /// What `bulkhead-vcpu` said that the end is, or why it failed.
    vcpu_said: Option<VmExit>,
    vcpu_failed: Option<String>,
    vcpu: Process,
    bus: Process,
    /// Its end was handled.
    bus_ended: bool,
    /// Why it failed, as it said itself.
    bus_failed: Option<String>,
    /// At which look it was asked whether it still turns, if it has not answered since.
    bus_asked: Option<u32>,
    rooms: Vec<RoomState>,
    input: Input,
    signals: SignalFd,
    listener: Listener,
    clients: Vec<Client>,
    inspection: Option<Inspection>,
    timers: Timers,
    chronicle: Chronicle,
    /// Crash reports to be stored once nothing is more urgent, with their numbers.
    reports: Vec<(u64, CrashReport)>,
    /// What is left to do when a moment is over, or something else comes.
    followed: Vec<Followed>,
    next_report: u64,
    /// The first one of this VM; those before are of earlier ones of its name.
    first_report: u64,
    oom: OomWatch,
    /// How long a server, or the control plane, may owe an answer; `None`: it is not asked.
    patience: Option<Duration>,
    /// How often it was looked whether they have answered.
    looks: u32,
    next_token: u64,
    /// The terminal that the guest's console is on, by its device number.
    terminal: Option<u64>,
    /// At it a keeper hears who wants to adopt the VM.
    adopt_listener: Listener,
    /// `None`: it has ended, and a timer runs for the next; or all is over.
    keeper: Option<Keeper>,
    keeper_history: History,
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
    Bus(Part),
    Keeper(Part),
    Server(usize, Part),
    Successor(usize, Part),
    /// A server that serves no more, by its generation.
    Leaving(usize, u32, Part),
    Passt(usize, Part),
}

/// Who says that it is locked in and ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reporter {
    Vcpu,
    Bus,
    /// A server, or the keeper.
    Other,
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
        let adopt_listener = Listener::bind(&folder.path().join(keeper::LISTENER))?;

        // Everything that can be a person's mistake comes before the first process.
        backend::check_memory(spec.memory)?;
        let (boot, mut machine) = boot_plan::draw_up(
            backend::open_image("kernel", &spec.kernel)?,
            spec.initrd
                .as_deref()
                .map(|initrd| backend::open_image("initrd", initrd))
                .transpose()?,
            &spec.cmdline,
            spec.vcpus.get(),
            spec.memory.0,
        )
        .with_context(|| format!("cannot boot {}", spec.kernel.display()))?;
        machine.push(("kvm", backend::open_kvm()?));
        let (to_bus, to_vcpu) = pair().context("cannot make a socket pair")?;
        machine.push(("bus", to_bus));
        let mut rooms = room::open(&plan, spec, &options.programs)?;
        let (input, console_in) = Input::new(&spec.console).context("cannot set up the console")?;
        machine.push(("console-in", console_in));
        let disks = rooms.iter().flat_map(room::RoomState::held).map(|(_, fd)| fd);
        let others = machine.iter().map(|(_, fd)| fd.as_fd()).chain(disks);
        let console_out = console_out(&spec.console, others)?;
        machine.push(("console-out", console_out));

        let keeper = Keeper::start(spec.name.as_str())?;
        // Then the vCPU process: it has the most to do, and does it while the servers start.
        let strictness = sandbox::Options {
            require_full: spec.require_full_sandbox,
        };
        let jail = (sandbox::profile::vcpu(), strictness);
        let mut vcpu = Process::start(&options.programs.join("bulkhead-vcpu"), jail, 0)?;
        let names = machine.iter().map(|(name, _)| (*name).to_owned()).collect();
        let fds: Vec<BorrowedFd<'_>> = machine.iter().map(|(_, fd)| fd.as_fd()).collect();
        let start = SupervisorToVcpu::Start {
            protocol: PROTOCOL,
            config: plan::vcpu(spec, boot),
            fds: names,
        };
        introduce("bulkhead-vcpu", &mut vcpu, &start, &fds)?;
        let jail = (sandbox::profile::bus(), strictness);
        let mut bus = Process::start(&options.programs.join("bulkhead-bus"), jail, BUS_INDEX)?;
        let start = SupervisorToBus::Start {
            protocol: PROTOCOL,
            log: spec.log.clone(),
        };
        introduce("bulkhead-bus", &mut bus, &start, &[to_vcpu.as_fd()])?;
        let settings = ServerSettings {
            programs: options.programs.clone(),
            log: spec.log.clone(),
            strictness,
        };
        for room in &mut rooms {
            room.start_passt()?;
            let link = room.start_server(&settings)?;
            introduce("bulkhead-bus", &mut bus, &room.introduction(), &[link.as_fd()])?;
            room.introduced(room.generation);
        }
        let mut timers = Timers::default();
        timers.set(Instant::now() + START_DEADLINE, Timer::StartOverdue);
        let first_report = crash_report::next_number(folder.path());
        Ok(Supervisor {
            phase: Phase::Starting {
                reports: Vec::new(),
                vcpu_ready: false,
                bus_ready: false,
            },
            name: spec.name.to_string(),
            on_crash: spec.on_crash,
            on_reset: spec.on_reset,
            settings,
            crashed: false,
            guest_budget: machine::guest_budget(),
            vcpu_said: None,
            vcpu_failed: None,
            vcpu,
            bus,
            bus_ended: false,
            bus_failed: None,
            bus_asked: None,
            rooms,
            input,
            signals,
            listener,
            clients: Vec::new(),
            inspection: None,
            timers,
            chronicle: Chronicle::open(folder.path()),
            reports: Vec::new(),
            followed: Vec::new(),
            next_report: first_report,
            first_report,
            oom: OomWatch::new(),
            patience: liveness::patience(spec),
            looks: 0,
            next_token: 0,
            terminal: match spec.console {
                Console::Stdio => input::terminal_of(std::io::stdout().as_fd()),
                Console::None | Console::File(_) => None,
            },
            adopt_listener,
            keeper: Some(keeper),
            keeper_history: History::default(),
            folder,
        })
    }

    pub(super) fn on_ready(&mut self, report: String, reporter: Reporter) {
        if let Phase::Starting {
            reports,
            vcpu_ready,
            bus_ready,
        } = &mut self.phase
        {
            reports.push(report);
            *vcpu_ready |= reporter == Reporter::Vcpu;
            *bus_ready |= reporter == Reporter::Bus;
        }
        self.run_if_ready();
    }

    fn run_if_ready(&mut self) {
        let Phase::Starting {
            reports,
            vcpu_ready: true,
            bus_ready: true,
        } = &self.phase
        else {
            return;
        };
        let all_ready = self.rooms.iter().all(|room| room.server.is_ready());
        if !all_ready || self.waits_for_keeper() {
            return;
        }
        let lacking = report::lacking(reports.iter().map(String::as_str));
        if !lacking.is_empty() {
            let lacking = lacking.join("; ");
            if self.settings.strictness.require_full {
                return self.fail_start(format!(
                    "a full sandbox was asked for, and this host lacks: {lacking}"
                ));
            }
            say(&format!("this host lacks what a full sandbox needs: {lacking}"));
        }
        if let Err(error) = self.input.make_raw() {
            return self.fail_start(format!("cannot set up the terminal: {error}"));
        }
        // Ctrl-C is the guest's from here on; who has never been told does not get out.
        if self.input.raw_terminal().is_some() {
            say(console::HELP);
        }
        self.timers.clear(Timer::StartOverdue);
        self.phase = Phase::Running;
        self.send_to_vcpu(&SupervisorToVcpu::Run);
        for index in 0..self.rooms.len() {
            self.want_standby(index);
        }
        self.note(Event::Started {
            supervisor: std::process::id(),
        });
        self.begin_probing();
    }

    /// The VM cannot be started; everything that runs is ended by its drop.
    pub(super) fn fail_start(&mut self, why: String) {
        self.over(Outcome::Setup(why));
    }
}

fn console_out<'a>(console: &Console, others: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<OwnedFd> {
    match console {
        Console::Stdio => console::output().context("cannot duplicate standard output"),
        Console::None => Ok(std::fs::OpenOptions::new().write(true).open("/dev/null")?.into()),
        Console::File(path) => Ok(backend::open_console(path, others)?.into()),
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

fn tell<M: Message>(program: &str, process: &mut Process, message: &M, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let socket = process.control.as_mut();
    socket
        .ok_or_else(|| anyhow!("{program} does not listen"))?
        .send(message, fds)
        .map_err(|error| anyhow!("cannot talk to {program}: {error}"))
}

/// The same to a process that was just started: one that has ended already is found at its end, which says why.
fn introduce<M: Message>(
    program: &str,
    process: &mut Process,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let socket = process.control.as_mut();
    match socket.map(|socket| socket.send(message, fds)) {
        None | Some(Ok(()) | Err(SendError::Disconnected)) => Ok(()),
        Some(Err(error)) => Err(anyhow!("cannot talk to {program}: {error}")),
    }
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}
