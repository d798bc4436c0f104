#![forbid(unsafe_code)]
//! The control thread: everything that arrives by descriptor, and the life of the VM.
//!
//! ```text
//!               Run              guest or supervisor wants an end        all vCPU threads stopped
//!   Prepared ─────────▶ Running ──────────────────────────────▶ Stopping ─────┬──▶ off, fault: report, exit
//!                        ▲                                                    │
//!                        │   QuiesceDone: wipe RAM, power on                  ▼ reset
//!                        └────────────────────────────────────────────── Quiescing
//! ```
//!
//! A reset stops the processors first, then lets every server drop its channels and pages, and only then touches
//! guest RAM: nobody writes into the next kernel.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use vmbus::ipc::{ExitCause, Message, OnReset, PeerFault, SupervisorToVcpu, VcpuToSupervisor};

use super::console::{Input, Writer};
use super::gate::Wanted;
use super::links::Source;
use super::power::Hardware;
use super::processor::{self, Ending, Shared};
use crate::bus::{DeviceId, DeviceOffer, FIRST_GENERATION};
use crate::kvm::{Event, Kick, Vcpu};

/// Events that one wake-up takes from the kernel.
const EVENTS_PER_WAKE: usize = 16;
/// Limit: messages of one server before others get their turn.
const MESSAGES_PER_TURN: usize = 64;

enum State {
    Prepared(Vec<Vcpu>),
    Running,
    Stopping(Ending),
    Quiescing { token: u64 },
}

/// The thread's own things.
pub struct Control {
    pub shared: Arc<Shared>,
    pub epoll: Arc<Epoll>,
    pub hardware: Hardware,
    pub input: Input,
    pub writer: Writer,
    pub console_room: Event,
    pub on_reset: OnReset,
    /// How guest RAM gets its pages.
    pub ram_pages: &'static str,
    processors: Vec<(Sender<Vcpu>, JoinHandle<()>)>,
    state: State,
    paused: bool,
    resets: u32,
    device_names: Vec<(DeviceId, String)>,
}

/// What [`Control`] is made of.
pub struct Parts {
    pub shared: Arc<Shared>,
    pub epoll: Arc<Epoll>,
    pub hardware: Hardware,
    pub input: Input,
    pub writer: Writer,
    pub console_room: Event,
    pub on_reset: OnReset,
    pub ram_pages: &'static str,
}

impl Control {
    /// Starts the vCPU threads, which wait.
    pub fn new(parts: Parts, vcpus: Vec<Vcpu>) -> std::io::Result<Self> {
        let Parts {
            shared,
            epoll,
            hardware,
            input,
            writer,
            console_room,
            on_reset,
            ram_pages,
        } = parts;
        let mut processors = Vec::new();
        for vcpu in &vcpus {
            let (sender, receiver) = channel();
            let shared = shared.clone();
            let thread = thread::Builder::new().name(format!("vcpu{}", vcpu.index()));
            processors.push((sender, thread.spawn(move || processor::run(&shared, &receiver))?));
        }
        Ok(Self {
            shared,
            epoll,
            hardware,
            input,
            writer,
            console_room,
            on_reset,
            ram_pages,
            processors,
            state: State::Prepared(vcpus),
            paused: false,
            resets: 0,
            device_names: Vec::new(),
        })
    }

    /// Serves until the VM is over.
    pub fn run(mut self) -> ExitCause {
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAKE];
        let cause = loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    break ExitCause::Fault {
                        message: format!("cannot wait for events: {error}"),
                    };
                }
            };
            let ended = events
                .iter()
                .take(count)
                .find_map(|event| Source::from_token(event.data()).and_then(|source| self.on_event(source)));
            if let Some(cause) = ended {
                break cause;
            }
        };
        self.stop_processors();
        self.shared
            .machine()
            .links
            .report(&VcpuToSupervisor::Exited { cause: cause.clone() });
        self.writer.finish();
        cause
    }

    fn on_event(&mut self, source: Source) -> Option<ExitCause> {
        match source {
            Source::Supervisor => return self.on_supervisor(),
            Source::Timer => {
                let mut machine = self.shared.machine();
                match machine.timers.take_due() {
                    Ok(due) => due.into_iter().for_each(|alarm| machine.on_alarm(alarm)),
                    Err(error) => machine.fail(&format!("cannot read the timer: {error}")),
                }
            }
            Source::Attention => {
                self.shared.attention.drain();
            }
            Source::ConsoleInput => self.input.on_readable(&self.shared, &self.epoll),
            Source::ConsoleRoom => {
                self.console_room.drain();
                self.input.on_room(&self.epoll);
            }
            Source::Server(device, generation) => self.on_server(device, generation),
        }
        self.advance()
    }

    /// Goes on with the VM's life as far as it can.
    fn advance(&mut self) -> Option<ExitCause> {
        let failure = self.shared.machine().failure.take();
        if let Some(failure) = failure {
            self.begin_end(Ending::Fault(failure));
        }
        if let Some(ending) = self.shared.take_ending() {
            self.begin_end(ending);
        }
        if matches!(self.state, State::Stopping(_)) && self.shared.gate.is_empty() {
            let State::Stopping(ending) = std::mem::replace(&mut self.state, State::Running) else {
                return None;
            };
            match ending {
                Ending::PowerOff => {
                    self.report(&VcpuToSupervisor::GuestPowerOff);
                    return Some(ExitCause::PowerOff);
                }
                Ending::Fault(message) => return Some(ExitCause::Fault { message }),
                Ending::Reset => {
                    self.resets = self.resets.saturating_add(1);
                    self.report(&VcpuToSupervisor::GuestReset { count: self.resets });
                    if self.on_reset == OnReset::Exit {
                        return Some(ExitCause::Reset);
                    }
                    let token = u64::from(self.resets);
                    self.state = State::Quiescing { token };
                    let mut machine = self.shared.machine();
                    let actions = machine.bus.reset(token);
                    machine.execute(actions);
                }
            }
        }
        if let State::Quiescing { token } = self.state
            && self.shared.machine().quiesced == Some(token)
            && let Err(error) = self.power_cycle()
        {
            return Some(ExitCause::Fault {
                message: format!("the guest cannot be started again: {error}"),
            });
        }
        None
    }

    /// Stops the processors, for a reason. The first reason counts, but a fault overrides a reset.
    fn begin_end(&mut self, ending: Ending) {
        match (&self.state, &ending) {
            (State::Running, _) | (State::Stopping(Ending::Reset), Ending::Fault(_) | Ending::PowerOff) => {
                self.state = State::Stopping(ending);
                self.stop_processors();
            }
            // No processor runs: nothing to wait for.
            (State::Prepared(_) | State::Quiescing { .. }, Ending::Fault(_)) => {
                self.state = State::Stopping(ending);
            }
            (State::Prepared(_) | State::Quiescing { .. } | State::Stopping(_), _) => {}
        }
    }

    fn stop_processors(&self) {
        self.shared.gate.set(Wanted::Stop);
        self.kick_all();
    }

    fn kick_all(&self) {
        self.processors.iter().for_each(|(_, thread)| thread.kick());
    }

    /// Gives each thread its vCPU and opens the gate.
    fn start_processors(&mut self, vcpus: Vec<Vcpu>) {
        self.shared.gate.expect(vcpus.len());
        self.shared
            .gate
            .set(if self.paused { Wanted::Pause } else { Wanted::Run });
        for (vcpu, (sender, _)) in vcpus.into_iter().zip(&self.processors) {
            if sender.send(vcpu).is_err() {
                self.shared.end(Ending::Fault("a vCPU thread is gone".to_owned()));
            }
        }
        self.state = State::Running;
    }

    /// All servers have let go: the next boot.
    fn power_cycle(&mut self) -> anyhow::Result<()> {
        let vcpus = {
            let mut machine = self.shared.machine();
            machine.quiesced = None;
            machine.partition.remove_overlays()?;
            self.hardware.memory.wipe()?;
            let on = self.hardware.power_on()?;
            machine.partition = on.partition;
            on.vcpus
        };
        self.shared.console().reset();
        self.start_processors(vcpus);
        Ok(())
    }

    fn on_server(&mut self, device: DeviceId, generation: u32) {
        let mut machine = self.shared.machine();
        for _ in 0..MESSAGES_PER_TURN {
            match machine.links.receive_from(device, generation) {
                Ok(Some(message)) => {
                    tracing::debug!(device = device.0, generation, "{}", message.name());
                    let actions = machine.bus.on_server_message(device, generation, message);
                    machine.execute(actions);
                }
                Err(fault) => {
                    machine.links.disconnect(device, generation);
                    let actions = machine.bus.server_lost(device, generation, &fault.to_string());
                    machine.execute(actions);
                    break;
                }
                Ok(None) => break,
            }
        }
    }

    fn on_supervisor(&mut self) -> Option<ExitCause> {
        loop {
            let received = self.shared.machine().links.receive();
            match received {
                Ok(Some((message, fds))) => {
                    if let Some(cause) = self.on_message(message, fds) {
                        return Some(cause);
                    }
                }
                Ok(None) => return self.advance(),
                // Without a supervisor nobody replaces a server, and nobody can end the VM.
                Err(PeerFault::Eof) => return Some(ExitCause::Quit),
                Err(fault) => {
                    return Some(ExitCause::Fault {
                        message: format!("the supervisor: {fault}"),
                    });
                }
            }
        }
    }

    fn on_message(&mut self, message: SupervisorToVcpu, fds: Vec<std::os::fd::OwnedFd>) -> Option<ExitCause> {
        let mut fds = fds.into_iter();
        match message {
            SupervisorToVcpu::Start { .. } => {
                return Some(ExitCause::Fault {
                    message: "the supervisor said Start twice".to_owned(),
                });
            }
            SupervisorToVcpu::AddDevice {
                device,
                name,
                interface,
                instance,
                max_sub_channels,
            } => {
                let offer = DeviceOffer {
                    interface,
                    instance,
                    max_sub_channels,
                };
                self.add_device(DeviceId(device), name, offer, fds.next());
            }
            SupervisorToVcpu::ServerAttached { device, generation } => {
                self.connect(DeviceId(device), generation, fds.next());
            }
            SupervisorToVcpu::ServerGone { device, generation } => {
                let mut machine = self.shared.machine();
                let device = DeviceId(device);
                machine.links.disconnect(device, generation);
                let actions = machine.bus.server_gone(device, generation);
                machine.execute(actions);
            }
            SupervisorToVcpu::Run => {
                if let State::Prepared(vcpus) = &mut self.state {
                    let vcpus = std::mem::take(vcpus);
                    self.start_processors(vcpus);
                    self.report(&VcpuToSupervisor::Started);
                }
            }
            SupervisorToVcpu::Pause => self.set_paused(true),
            SupervisorToVcpu::Resume => self.set_paused(false),
            SupervisorToVcpu::Reset => self.begin_end(Ending::Reset),
            SupervisorToVcpu::PowerButton => self.hardware.button.signal(),
            SupervisorToVcpu::Quit => return Some(ExitCause::Quit),
            SupervisorToVcpu::Inspect => {
                let entries = self.inspect();
                self.report(&VcpuToSupervisor::Inspect { entries });
            }
        }
        None
    }

    fn add_device(
        &mut self,
        device: DeviceId,
        name: String,
        offer: DeviceOffer,
        socket: Option<std::os::fd::OwnedFd>,
    ) {
        let mut machine = self.shared.machine();
        match machine.bus.add_device(device, offer) {
            Ok(actions) => {
                machine.execute(actions);
                drop(machine);
                self.device_names.push((device, name));
                self.connect(device, FIRST_GENERATION, socket);
            }
            Err(error) => machine.fail(&format!("cannot add the device {name}: {error}")),
        }
    }

    fn connect(&mut self, device: DeviceId, generation: u32, socket: Option<std::os::fd::OwnedFd>) {
        // The codec has checked that the descriptor is there.
        let Some(socket) = socket else { return };
        let mut machine = self.shared.machine();
        match machine.links.connect(device, generation, socket) {
            Ok(()) => {
                let actions = machine.bus.server_attached(device, generation);
                machine.execute(actions);
            }
            Err(error) => machine.fail(&format!("cannot watch the socket of a server: {error}")),
        }
    }

    fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        if matches!(self.state, State::Running) {
            self.shared
                .gate
                .set(if paused { Wanted::Pause } else { Wanted::Run });
            self.kick_all();
        }
    }

    fn report(&self, message: &VcpuToSupervisor) {
        self.shared.machine().links.report(message);
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let state = match &self.state {
            State::Prepared(_) => "prepared",
            State::Running if self.paused => "paused",
            State::Running => "running",
            State::Stopping(_) => "stopping",
            State::Quiescing { .. } => "quiescing",
        };
        let (written, dropped) = self.shared.console().output_counters();
        let mut entries = vec![
            ("state".to_owned(), state.to_owned()),
            ("resets".to_owned(), self.resets.to_string()),
            (
                "memory.bytes".to_owned(),
                self.hardware.memory.total_bytes().to_string(),
            ),
            ("memory.pages".to_owned(), self.ram_pages.to_owned()),
            ("console.written_bytes".to_owned(), written.to_string()),
            ("console.dropped_bytes".to_owned(), dropped.to_string()),
        ];
        for (index, counters) in self.shared.counters.iter().enumerate() {
            for (kind, count) in counters.iter() {
                entries.push((format!("vcpu.{index}.exits.{kind}"), count.to_string()));
            }
        }
        for (device, name) in &self.device_names {
            entries.push((format!("device.{}.name", device.0), name.clone()));
        }
        entries.extend(self.shared.machine().inspect());
        entries
    }
}
