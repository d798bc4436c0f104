//! The harness as `bulkhead-vcpu` and `bulkhead-bus`: what the supervisor says, and which server the guest has.

#![forbid(unsafe_code)]

use super::PATIENCE;
use super::faults::{Fault, Faults};
use super::played::wait_any;
use super::timeline::Timeline;
use super::vm::Sockets;
use anyhow::{Context, Result, bail, ensure};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmbus::ipc::{
    BusToSupervisor, ExitCause, Message, ServerToBus, SupervisorToBus, SupervisorToVcpu, VcpuToSupervisor,
};
use vmbus::vsc::{GuestOptions, SyntheticGuest, VscError};

/// How often the server's socket and the wish to stop are looked at. Nothing waits for it but the end.
const LOOK: Duration = Duration::from_millis(20);

/// Plays both for a VM with one device.
pub struct Host<'a> {
    supervisor: Sockets,
    timeline: &'a Timeline,
    /// Memory and channels.
    pub guest: SyntheticGuest,
    /// Of the server that serves, or did last.
    generation: u32,
    /// It is gone.
    gone: bool,
    /// Of the server that waits for that.
    waiting: Option<u32>,
    /// Supervisors are killed, too: what follows them may kill a server of which the guest might not have heard.
    pub adopted: bool,
    /// Generations of servers that somebody else has killed than whoever kills here.
    pub unexplained: Vec<u32>,
    /// The guest does.
    runs: bool,
}

impl<'a> Host<'a> {
    /// Goes from the supervisor's `Start`s, which [`super::played`] has read, to `Run`.
    pub fn start(
        supervisor: Sockets,
        options: GuestOptions,
        (faults, timeline): (&Faults, &'a Timeline),
    ) -> Result<Self> {
        let mut this = Self {
            supervisor,
            timeline,
            guest: SyntheticGuest::new(options)?,
            generation: 0,
            gone: true,
            waiting: None,
            adopted: false,
            unexplained: Vec::new(),
            runs: false,
        };
        let report = r#"{"program":"played"}"#.to_owned();
        let ready = BusToSupervisor::Ready {
            report: report.clone(),
        };
        this.supervisor.bus.send(&ready, &[])?;
        this.supervisor
            .vcpu
            .send(&VcpuToSupervisor::Ready { report }, &[])?;
        let deadline = Instant::now() + PATIENCE;
        while !this.runs {
            ensure!(Instant::now() < deadline, "nothing was heard in time");
            this.hear(faults)?;
        }
        Ok(this)
    }

    /// Serves until `stop` is set. A fault of the server's is counted.
    pub fn serve(&mut self, stop: &AtomicBool, faults: &Faults) -> Result<()> {
        // Ordering: a flag; what it says needs nothing else to be seen.
        while !stop.load(Ordering::Relaxed) {
            self.turn(faults)?;
        }
        Ok(())
    }

    /// Hears what was said, or waits a moment.
    pub fn turn(&mut self, faults: &Faults) -> Result<()> {
        self.hear(faults)?;
        // A server that is dead says nothing more; that it is, the supervisor says.
        while let Ok(Some(message)) = self.guest.next_message() {
            if let ServerToBus::ChannelBroken { channel, why, .. } = message {
                faults.count(Fault::Wrong, format_args!("channel {channel} is broken: {why}"));
            }
        }
        Ok(())
    }

    fn hear(&mut self, faults: &Faults) -> Result<()> {
        let Sockets { vcpu, bus } = &self.supervisor;
        wait_any([bus, vcpu], Instant::now() + LOOK)?;
        while let Some((message, fds)) = self.supervisor.bus.recv::<SupervisorToBus>()? {
            self.on_message(message, fds, faults)?;
        }
        while let Some((message, _)) = self.supervisor.vcpu.recv::<SupervisorToVcpu>()? {
            match message {
                SupervisorToVcpu::Run => {
                    self.supervisor.vcpu.send(&VcpuToSupervisor::Started, &[])?;
                    self.runs = true;
                }
                SupervisorToVcpu::Inspect => {
                    let nothing = VcpuToSupervisor::Inspect { entries: Vec::new() };
                    self.supervisor.vcpu.send(&nothing, &[])?;
                }
                other => bail!("the supervisor says {} to a VM that runs", other.name()),
            }
        }
        Ok(())
    }

    /// The guest has switched itself off.
    pub fn power_off(mut self) -> Result<()> {
        for message in [
            VcpuToSupervisor::GuestPowerOff,
            VcpuToSupervisor::Exited {
                cause: ExitCause::PowerOff,
            },
        ] {
            self.supervisor.vcpu.send(&message, &[])?;
        }
        Ok(())
    }

    fn on_message(&mut self, message: SupervisorToBus, mut fds: Vec<OwnedFd>, faults: &Faults) -> Result<()> {
        match message {
            SupervisorToBus::AddDevice { device: 0, .. } => {
                let link = fds.pop().context("no socket to a server")?;
                self.attach(link, 1)
            }
            SupervisorToBus::ServerAttached {
                device: 0,
                generation,
            } => {
                self.timeline.phase(1);
                let link = fds.pop().context("no socket to a server")?;
                self.attach(link, generation)
            }
            SupervisorToBus::ServerGone {
                device: 0,
                generation,
            } => {
                // An adopter says again what its predecessor may have said.
                if self.adopted && self.gone && self.generation == generation {
                    return Ok(());
                }
                let was_killed = self.timeline.gone(generation);
                if self.generation != generation {
                    self.waiting.take_if(|waiting| *waiting == generation);
                    return Ok(());
                }
                if !was_killed {
                    self.on_unexplained(generation, faults);
                }
                self.guest.server_gone();
                self.gone = true;
                self.promote()
            }
            SupervisorToBus::Inspect => {
                let nothing = BusToSupervisor::Inspect { entries: Vec::new() };
                Ok(self.supervisor.bus.send(&nothing, &[])?)
            }
            SupervisorToBus::Ping => Ok(self.supervisor.bus.send(&BusToSupervisor::Pong, &[])?),
            other => bail!("the supervisor says {} to a VM with one device", other.name()),
        }
    }

    fn attach(&mut self, link: OwnedFd, generation: u32) -> Result<()> {
        match self.guest.attach_waiting(link, Instant::now() + PATIENCE) {
            Ok(said) if said == generation => {
                self.timeline.phase(2);
                self.waiting = Some(generation);
                self.promote()
            }
            Ok(said) => bail!("server {said} says hello instead of {generation}"),
            // It was killed before it could say hello, or before it was told all; the supervisor will say so.
            Err(VscError::Server(_) | VscError::Send(_)) => {
                if self.gone {
                    (self.generation, self.gone) = (generation, false);
                }
                Ok(())
            }
            Err(error) => Err(error).context("a server cannot be attached"),
        }
    }

    fn on_unexplained(&mut self, generation: u32, faults: &Faults) {
        if self.adopted {
            // An adopter may have done it, and says so.
            self.unexplained.push(generation);
        } else {
            faults.count(Fault::Wrong, format_args!("a server died that nobody had killed"));
        }
    }

    /// If nobody serves any more, and somebody waits for that, he does.
    fn promote(&mut self) -> Result<()> {
        if !self.gone {
            return Ok(());
        }
        let Some(generation) = self.waiting.take() else {
            return Ok(());
        };
        (self.generation, self.gone) = (generation, false);
        match self.guest.promote() {
            Err(VscError::Send(_)) => {
                self.guest.server_gone();
                Ok(())
            }
            other => other.context("a server cannot be told to serve"),
        }
    }
}
