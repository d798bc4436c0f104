#![forbid(unsafe_code)]
//! The program `bulkhead-bus`: the VMBus control plane of one VM, between `bulkhead-vcpu` and the device servers.
//!
//! ```text
//!   guest ── HvPostMessage ──▶ bulkhead-vcpu ── Post ──▶ bulkhead-bus ── Gpadl, OpenChannel, … ──▶ device server
//!   guest ◀── message slot ─── bulkhead-vcpu ◀─ PostToGuest, Bind… ──┘ ◀── OfferSubChannels, … ─── device server
//! ```
//!
//! What the guest says on VMBus is parsed here, in a process that has neither /dev/kvm nor a mapping of guest memory, and
//! not in the one that runs the guest's processors. [`crate::bus::Bus`] decides; this file and `control_plane/` carry out:
//! one thread, one epoll, no path, nothing that waits. No request of a device passes through here.
//!
//! A post of the guest may make thousands of messages to `bulkhead-vcpu`. While some of those wait for it to read, the guest's
//! next posts are left in the socket, and `bulkhead-vcpu` refuses more for lack of buffers, as a hypervisor does: so what
//! waits is bounded by what comes of one post. `bulkhead-vcpu` itself always reads, so that nobody waits for ever.
//!
//! It makes each channel's eventfds, and gives one duplicate to `bulkhead-vcpu`, which binds them to KVM, and one to each
//! server of the device. So that no guest opens more channels than there is room for descriptors, it learns at its start how
//! many files it may have open, and refuses the guest what would be too much. It ends with `bulkhead-vcpu`. If it ends
//! before, the supervisor ends the VM.

mod eventfds;
mod timers;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustix::process::{Resource, getrlimit};
use sandbox::Jail;
use vmbus::ipc::codec::MAX_MESSAGE_BYTES;
use vmbus::ipc::hello::check_protocol;
use vmbus::ipc::socket::MAX_QUEUED_MESSAGES;
use vmbus::ipc::{
    BusToServer, BusToSupervisor, BusToVcpu, Message, PeerFault, SendError, ServerToBus, Socket,
    SupervisorToBus, VcpuToBus,
};

use self::eventfds::EventFds;
use self::timers::Timers;
use crate::bus::gpadls::MAX_GPADLS;
use crate::bus::offers::{FIRST_SUB_RELID, MAX_CHANNELS, MAX_OPEN_CHANNELS};
use crate::bus::{Action, Bus, DeviceId, DeviceOffer, FIRST_GENERATION, LogLevel};
use crate::child::{Link, init_logging, wait_for};

/// Events that one wake-up takes from the kernel.
const EVENTS_PER_WAKE: usize = 16;
/// Limit: messages of one peer before others get their turn.
const MESSAGES_PER_TURN: usize = 64;
/// What may wait for `bulkhead-vcpu` when one post of the guest closes every channel: two messages for each that is open, which
/// has a GPADL to itself; and what servers have made of earlier posts: one for each other GPADL, and an offer for each
/// sub-channel. (The few besides are in the socket itself.)
const WAITING_FOR_VCPU: usize =
    MAX_OPEN_CHANNELS + MAX_GPADLS + (MAX_CHANNELS - FIRST_SUB_RELID + 1) as usize;
const _: () = assert!(WAITING_FOR_VCPU <= MAX_QUEUED_MESSAGES);
/// Descriptors of an open channel: its two eventfds, and their duplicates while they wait for a server to read.
const DESCRIPTORS_PER_CHANNEL: u64 = 4;
/// Limit: descriptors that belong to no channel. Sockets of 64 devices with a successor each, two descriptors of guest memory
/// that wait for each of 64 servers, and some dozens.
const OTHER_DESCRIPTORS: u64 = 384;
/// Limit: bytes of the pairs of an inspection; a message has some more. Each pair has two lengths of 8 bytes.
const INSPECT_BYTES: usize = MAX_MESSAGE_BYTES - 1024;

/// The program. `control` is the socket to the supervisor.
pub fn main(control: OwnedFd, jail: Jail) -> ExitCode {
    let mut supervisor = Socket::new(control);
    let result = begin(&mut supervisor, jail).and_then(|plane| match plane {
        Some(plane) => plane.run(),
        None => Ok(()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let message = format!("{error:#}");
            // The supervisor says it to the person; if that is gone, too, the exit status does.
            supervisor.send(&BusToSupervisor::Failed { message }, &[]).ok();
            ExitCode::FAILURE
        }
    }
}

/// Locks the process in, says ready, and hears what machine it is. `None`: `bulkhead-vcpu` has not come that far.
fn begin(supervisor: &mut Socket, jail: Jail) -> anyhow::Result<Option<ControlPlane>> {
    let (message, fds) = wait_for::<SupervisorToBus>(supervisor)?;
    let SupervisorToBus::Start { protocol, log } = message else {
        bail!("Start comes first, not {}", message.name());
    };
    check_protocol(protocol)?;
    init_logging(&log)?;
    // Ours alone to know: the sandbox does not let us ask.
    let open_files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let report = jail.lock_in()?;
    let report = serde_json::to_string(&report)?;
    supervisor.send(&BusToSupervisor::Ready { report }, &[])?;

    let vcpu = fds
        .into_iter()
        .next()
        .context("no socket to bulkhead-vcpu came")?;
    let mut vcpu = Socket::new(vcpu);
    let (machine, fds) = match wait_for::<VcpuToBus>(&mut vcpu) {
        Err(error) if error.downcast_ref() == Some(&PeerFault::Eof) => return Ok(None),
        received => received?,
    };
    let VcpuToBus::Machine {
        protocol,
        ram,
        vp_count,
    } = machine
    else {
        bail!("Machine comes first, not {}", machine.name());
    };
    check_protocol(protocol)?;
    let mut bus = Bus::new(vp_count, ram);
    bus.limit_open_channels(channels_for(open_files));
    let [ram_fd, siefp]: [OwnedFd; 2] = fds.try_into().ok().context("two descriptors come with Machine")?;

    let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
    let timers = Timers::new()?;
    epoll.add(
        timers.as_fd(),
        EpollEvent::new(EpollFlags::EPOLLIN, Source::Timer.token()),
    )?;
    let link = |socket: &Socket, source: Source| {
        Link::new(socket.as_fd().try_clone_to_owned()?, source.token(), &epoll).map_err(std::io::Error::from)
    };
    let mut vcpu = link(&vcpu, Source::Vcpu)?;
    vcpu.take_turns();
    Ok(Some(ControlPlane {
        supervisor: link(supervisor, Source::Supervisor)?,
        vcpu,
        servers: BTreeMap::new(),
        epoll,
        bus,
        timers,
        eventfds: EventFds::default(),
        ram: ram_fd,
        siefp,
        names: BTreeMap::new(),
        blamed: BTreeMap::new(),
    }))
}

/// How many channels can be open in a process that may have so many descriptors.
fn channels_for(open_files: u64) -> usize {
    let channels = open_files.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_PER_CHANNEL;
    usize::try_from(channels).unwrap_or(usize::MAX)
}

/// As many of the pairs as a message holds, and how many are left out.
fn fit(entries: Vec<(String, String)>) -> Vec<(String, String)> {
    let count = entries.len();
    let mut bytes = 0;
    let mut fitting: Vec<_> = entries
        .into_iter()
        .take_while(|(path, value)| {
            bytes += path.len() + value.len() + 16;
            bytes <= INSPECT_BYTES
        })
        .collect();
    if fitting.len() < count {
        let left_out = count - fitting.len();
        fitting.push(("left_out".to_owned(), left_out.to_string()));
    }
    fitting
}

/// What woke the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Supervisor,
    Vcpu,
    Timer,
    Server(DeviceId, u32),
}

impl Source {
    /// Devices come after everything else.
    const FIRST_DEVICE: u64 = 3;

    fn token(self) -> u64 {
        match self {
            Source::Supervisor => 0,
            Source::Vcpu => 1,
            Source::Timer => 2,
            // The generation in the upper half; the bus takes only small numbers of devices.
            Source::Server(DeviceId(device), generation) => {
                (u64::from(generation) << 32) | (Self::FIRST_DEVICE + u64::from(device & 0xffff))
            }
        }
    }

    fn from_token(token: u64) -> Option<Self> {
        match token {
            0 => Some(Source::Supervisor),
            1 => Some(Source::Vcpu),
            2 => Some(Source::Timer),
            device => {
                let generation = u32::try_from(device >> 32).ok()?;
                let device = (device & 0xffff_ffff).checked_sub(Self::FIRST_DEVICE)?;
                Some(Source::Server(DeviceId(u32::try_from(device).ok()?), generation))
            }
        }
    }
}

/// Whether there is anybody left to work for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

/// See the module.
#[derive(Debug)]
struct ControlPlane {
    epoll: Arc<Epoll>,
    supervisor: Link,
    vcpu: Link,
    servers: BTreeMap<(DeviceId, u32), Link>,
    bus: Bus,
    timers: Timers,
    eventfds: EventFds,
    /// Guest memory and event flags, for servers.
    ram: OwnedFd,
    siefp: OwnedFd,
    names: BTreeMap<DeviceId, String>,
    /// What was reported of servers that are not gone yet: at most of two of each device, as the bus knows no more. Said again
    /// at each Ping, because a supervisor that is killed may have read it and not have done anything.
    blamed: BTreeMap<(DeviceId, u32), BusToSupervisor>,
}

impl ControlPlane {
    /// Serves until the VM is over.
    fn run(mut self) -> anyhow::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAKE];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("cannot wait for events"),
            };
            for event in events.iter().take(count) {
                if let Some(source) = Source::from_token(event.data())
                    && self.on_event(source)? == Next::End
                {
                    return Ok(());
                }
            }
        }
    }

    fn on_event(&mut self, source: Source) -> anyhow::Result<Next> {
        match source {
            Source::Supervisor => return self.on_supervisor(),
            Source::Vcpu => return self.on_vcpu(),
            Source::Timer => {
                for deadline in self.timers.take_due().context("cannot read the timer")? {
                    let actions = self.bus.on_deadline(deadline);
                    self.execute(actions)?;
                }
            }
            Source::Server(device, generation) => self.on_server(device, generation)?,
        }
        Ok(Next::GoOn)
    }

    fn on_supervisor(&mut self) -> anyhow::Result<Next> {
        loop {
            match self.supervisor.receive() {
                Ok(Some((message, fds))) => self.on_order(message, fds.into_iter().next())?,
                Ok(None) => return Ok(Next::GoOn),
                Err(PeerFault::Eof | PeerFault::Send(SendError::Disconnected)) => return Ok(Next::End),
                Err(fault) => bail!("the supervisor: {fault}"),
            }
        }
    }

    fn on_order(&mut self, message: SupervisorToBus, fd: Option<OwnedFd>) -> anyhow::Result<()> {
        match message {
            SupervisorToBus::Start { .. } => bail!("the supervisor said Start twice"),
            SupervisorToBus::AddDevice {
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
                let device = DeviceId(device);
                let added = self.bus.add_device(device, offer);
                let actions = added.with_context(|| format!("cannot add the device {name}"))?;
                self.names.insert(device, name);
                self.execute(actions)?;
                self.connect(device, FIRST_GENERATION, fd)
            }
            SupervisorToBus::ServerAttached { device, generation } => {
                self.connect(DeviceId(device), generation, fd)
            }
            SupervisorToBus::ServerGone { device, generation } => {
                let device = DeviceId(device);
                self.servers.remove(&(device, generation));
                self.blamed.remove(&(device, generation));
                let actions = self.bus.server_gone(device, generation);
                self.execute(actions)
            }
            SupervisorToBus::Inspect => {
                let names = self.names.iter();
                let names = names.map(|(device, name)| (format!("device.{device}.name"), name.clone()));
                let entries = fit(names.chain(self.bus.inspect()).collect());
                self.report(&BusToSupervisor::Inspect { entries });
                Ok(())
            }
            SupervisorToBus::Ping => {
                let again: Vec<BusToSupervisor> = self.blamed.values().cloned().collect();
                for message in again.iter().chain([&BusToSupervisor::Pong]) {
                    self.report(message);
                }
                Ok(())
            }
        }
    }

    fn connect(&mut self, device: DeviceId, generation: u32, fd: Option<OwnedFd>) -> anyhow::Result<()> {
        // The codec has checked that it is there.
        let Some(fd) = fd else { return Ok(()) };
        let token = Source::Server(device, generation).token();
        let link = Link::new(fd, token, &self.epoll).context("cannot watch the socket of a server")?;
        self.servers.insert((device, generation), link);
        let actions = self.bus.server_attached(device, generation);
        self.execute(actions)
    }

    fn on_vcpu(&mut self) -> anyhow::Result<Next> {
        for _ in 0..MESSAGES_PER_TURN {
            match self.vcpu.receive() {
                Ok(Some((message, _))) => self.on_guest(message)?,
                Ok(None) => break,
                Err(PeerFault::Eof | PeerFault::Send(SendError::Disconnected)) => return Ok(Next::End),
                Err(fault) => bail!("bulkhead-vcpu: {fault}"),
            }
        }
        Ok(Next::GoOn)
    }

    fn on_guest(&mut self, message: VcpuToBus) -> anyhow::Result<()> {
        match message {
            VcpuToBus::Machine { .. } => bail!("bulkhead-vcpu said Machine twice"),
            VcpuToBus::Post {
                connection_id,
                message_type,
                payload,
            } => {
                let (_, actions) = self.bus.on_post_message(connection_id, message_type, &payload);
                self.execute(actions)?;
                self.tell_vcpu(&BusToVcpu::Posted, &[])
            }
            VcpuToBus::Reset { token } => {
                let actions = self.bus.reset(token);
                self.execute(actions)
            }
        }
    }

    fn on_server(&mut self, device: DeviceId, generation: u32) -> anyhow::Result<()> {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(link) = self.servers.get_mut(&(device, generation)) else {
                break;
            };
            // No message of a server carries descriptors, which `receive` has checked.
            match link.receive::<ServerToBus>() {
                Ok(Some((message, _))) => {
                    tracing::debug!(device = device.0, generation, "{}", message.name());
                    let actions = self.bus.on_server_message(device, generation, message);
                    self.execute(actions)?;
                }
                Ok(None) => break,
                Err(fault) => {
                    let actions = self.lost(device, generation, &fault.to_string());
                    self.execute(actions)?;
                }
            }
        }
        Ok(())
    }

    fn lost(&mut self, device: DeviceId, generation: u32, why: &str) -> Vec<Action> {
        self.servers.remove(&(device, generation));
        self.bus.server_lost(device, generation, why)
    }

    /// Does what the bus decided, in order; what follows from a failure comes at the end.
    fn execute(&mut self, actions: Vec<Action>) -> anyhow::Result<()> {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            queue.extend(self.act(action)?);
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> anyhow::Result<Vec<Action>> {
        match action {
            Action::PostToGuest { vp, message } => {
                let payload = message.emit().as_bytes().to_vec();
                self.tell_vcpu(&BusToVcpu::PostToGuest { vp, payload }, &[])?;
            }
            Action::BindSignal { channel } => {
                let channel = channel.0;
                let fd = self.eventfds.make_kick(channel)?;
                tell(&mut self.vcpu, &BusToVcpu::BindSignal { channel }, &[fd])?;
            }
            Action::UnbindSignal { channel } => {
                let channel = channel.0;
                self.eventfds.drop_kick(channel);
                self.tell_vcpu(&BusToVcpu::UnbindSignal { channel }, &[])?;
            }
            Action::BindInterrupt { channel, vp } => {
                let channel = channel.0;
                let fd = self.eventfds.make_interrupt(channel)?;
                tell(&mut self.vcpu, &BusToVcpu::BindInterrupt { channel, vp }, &[fd])?;
            }
            Action::RebindInterrupt { channel, vp } => {
                let channel = channel.0;
                self.tell_vcpu(&BusToVcpu::RebindInterrupt { channel, vp }, &[])?;
            }
            Action::UnbindInterrupt { channel } => {
                let channel = channel.0;
                self.eventfds.drop_interrupt(channel);
                self.tell_vcpu(&BusToVcpu::UnbindInterrupt { channel }, &[])?;
            }
            Action::RaiseInterrupt { channel, vp } => {
                let channel = channel.0;
                self.tell_vcpu(&BusToVcpu::RaiseInterrupt { channel, vp }, &[])?;
            }
            Action::SendToServer {
                device,
                generation,
                message,
            } => return Ok(self.send(device, generation, &message)),
            Action::SetDeadline { id, ms } => {
                let after = Duration::from_millis(u64::from(ms));
                self.timers.set(id, after).context("cannot set a timer")?;
            }
            Action::ClearDeadline { id } => self.timers.clear(id).context("cannot set a timer")?,
            Action::ReportSlow {
                device,
                generation,
                waiting_for,
            } => {
                let said = BusToSupervisor::ServerSlow {
                    device: device.0,
                    generation,
                    waiting_for,
                };
                self.blame(device, generation, said);
            }
            Action::Misbehaves {
                device,
                generation,
                why,
            } => {
                self.servers.remove(&(device, generation));
                let said = BusToSupervisor::ServerMisbehaves {
                    device: device.0,
                    generation,
                    why,
                };
                self.blame(device, generation, said);
            }
            Action::QuiesceDone { token } => self.tell_vcpu(&BusToVcpu::QuiesceDone { token }, &[])?,
            Action::Log { level, text } => match level {
                LogLevel::Warn => tracing::warn!("{text}"),
                LogLevel::Info => tracing::info!("{text}"),
                LogLevel::Debug => tracing::debug!("{text}"),
            },
        }
        Ok(Vec::new())
    }

    fn send(&mut self, device: DeviceId, generation: u32, message: &BusToServer) -> Vec<Action> {
        // One that is not there was lost a moment ago, and the bus has been told.
        let Some(link) = self.servers.get_mut(&(device, generation)) else {
            return Vec::new();
        };
        let attach = [self.ram.as_fd(), self.siefp.as_fd()];
        let sent = match message {
            BusToServer::Attach { .. } => link.send(message, &attach),
            BusToServer::OpenChannel { channel, .. } => match self.eventfds.get(*channel) {
                Some(pair) => link.send(message, &pair),
                None => link.send(message, &[]),
            },
            _ => link.send(message, &[]),
        };
        match sent {
            Ok(()) => Vec::new(),
            Err(error) => self.lost(device, generation, &error.to_string()),
        }
    }

    /// Asks for the end of a server, now and until it is gone. What was said of it first is what is said again.
    fn blame(&mut self, device: DeviceId, generation: u32, said: BusToSupervisor) {
        self.report(&said);
        self.blamed.entry((device, generation)).or_insert(said);
    }

    /// Tells the supervisor. If it is gone, that is noticed where it is listened to.
    fn report(&mut self, message: &BusToSupervisor) {
        if let Err(error) = self.supervisor.send(message, &[]) {
            tracing::debug!("report to the supervisor: {error}");
        }
    }

    fn tell_vcpu(&mut self, message: &BusToVcpu, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        tell(&mut self.vcpu, message, fds)
    }
}

fn tell(vcpu: &mut Link, message: &BusToVcpu, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    match vcpu.send(message, fds) {
        // Its end is seen where it is listened to.
        Ok(()) | Err(SendError::Disconnected) => Ok(()),
        Err(error) => bail!("cannot talk to bulkhead-vcpu: {error}"),
    }
}
