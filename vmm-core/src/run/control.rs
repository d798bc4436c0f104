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
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use vmbus::ipc::{ExitCause, OnReset, PeerFault, SupervisorToVcpu, VcpuToSupervisor};

use super::console::{Input, Writer};
use super::gate::Wanted;
use super::power::Hardware;
use super::processor::{self, Ending, Shared};
use crate::kvm::{Event, Kick, Vcpu};

/// Events that one wake-up takes from the kernel.
const EVENTS_PER_WAKE: usize = 16;
/// Limit: messages of `bulkhead-bus` before others get their turn.
const MESSAGES_PER_TURN: usize = 64;
/// Limit: for the supervisor, which we trust, to take our last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What woke the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Supervisor,
    Bus,
    Timer,
    /// vCPU threads have something to say.
    Attention,
    ConsoleInput,
    /// The console's input queue has room again.
    ConsoleRoom,
}

impl Source {
    const ALL: [Source; 6] = [
        Source::Supervisor,
        Source::Bus,
        Source::Timer,
        Source::Attention,
        Source::ConsoleInput,
        Source::ConsoleRoom,
    ];

    pub fn token(self) -> u64 {
        self as u64
    }

    pub fn from_token(token: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|source| source.token() == token)
    }
}

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
        self.report(&VcpuToSupervisor::Exited { cause: cause.clone() });
        self.shared.machine().supervisor.drain(LAST_WORDS);
        self.writer.finish();
        cause
    }

    fn on_event(&mut self, source: Source) -> Option<ExitCause> {
        match source {
            Source::Supervisor => return self.on_supervisor(),
            Source::Bus => self.shared.machine().on_bus(MESSAGES_PER_TURN),
            Source::Timer => self.shared.machine().on_slot_timer(),
            Source::Attention => {
                self.shared.attention.drain();
            }
            Source::ConsoleInput => self.input.on_readable(&self.shared, &self.epoll),
            Source::ConsoleRoom => {
                self.console_room.drain();
                self.input.on_room(&self.epoll);
            }
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
                    self.shared.machine().reset_bus(token);
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
            self.hardware.power_off(&machine.partition.vm)?;
            self.hardware.memory.wipe()?;
            let on = self.hardware.power_on()?;
            machine.partition = on.partition;
            on.vcpus
        };
        self.shared.console().reset();
        self.start_processors(vcpus);
        Ok(())
    }

    fn on_supervisor(&mut self) -> Option<ExitCause> {
        loop {
            let received = self.shared.machine().supervisor.receive();
            match received {
                Ok(Some((message, _))) => {
                    if let Some(cause) = self.on_message(message) {
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

    fn on_message(&mut self, message: SupervisorToVcpu) -> Option<ExitCause> {
        match message {
            SupervisorToVcpu::Start { .. } => {
                return Some(ExitCause::Fault {
                    message: "the supervisor said Start twice".to_owned(),
                });
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
        self.shared.machine().report(message);
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
        entries.extend(self.shared.machine().inspect());
        entries
    }
}
