//! The server: one thread, one wait, and between two waits everything that is to be done.
//!
//! ```text
//!   wait ──▶ events: kick, backend, port, control       (all edge-triggered or read to their end)
//!        ──▶ per channel: read a batch, commit the take, send its frames, stage its completions   transmit.rs
//!                         control messages in their place                                         control.rs
//!        ──▶ frames from the backend into the receive buffer, packets staged                      receive.rs
//!        ──▶ publish each channel once: completions and received frames with one interrupt at most
//!        ──▶ nothing done? unmask, look once more, wait
//! ```
//! An idle server is in one system call and has no timer.
//!
//! # Nothing waits for the backend
//! A frame that the backend does not take waits in a short queue with its token; beyond that, frames are dropped and
//! their packets completed, so the ring from the guest (with the completions that give credits back) is always
//! read. In the other direction a backend that has more than the guest has room for is simply not read.
//!
//! # What a network may lose
//! Each packet of the guest's is completed once and each sub-allocation is in one hand, whatever happens. Frames may be
//! lost, as any network card loses them when its queue is full; none is torn, and none is handed on twice:
//! | end of the server | from the guest | to the guest |
//! | --- | --- | --- |
//! | killed | what was taken and not sent: at most 64 packets of one channel, and the queue | what was read from the backend and not published: at most what one round reads, or one stalled packet |
//! | told to stop | the queue, if the backend does not take it within [`LAST_FRAMES_DEADLINE`] | a stalled packet: the guest had no room for it |
//!
//! Reading a frame from the backend takes it away there, so it cannot be read again by a successor; a round reads no more
//! than there is room for, and publishes before it waits.
//!
//! # What a successor relies on
//! | event | order of stores |
//! | --- | --- |
//! | packet of frames | slot, take, frames to the backend, completion |
//! | control message with completion | slot with its bytes, take, state saved, completion (and response) in one publication |
//! | control message without | state saved, take |
//! | received frames | numbers of sub-allocations in a held slot, publication |
//! | guest's completion of them | release with the take; only then may the sub-allocations be used again |

mod channel;
mod control;
mod inspect;
mod nic;
mod receive;
mod recover;
pub mod saved;
#[cfg(test)]
mod tests;
mod transmit;

use crate::backend::Backend;
use crate::config::NicConfig;
use nic::Nic;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use saved::Saved;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use thiserror::Error;
use vmbus::channel::{Endpoint, Port, PortEvent};
use vmbus::ipc::server_start::{Control, ControlRequest};
use vmbus::ipc::{PeerFault, SendError};
use vmbus::journal::{SaveError, StateFault, Step};
use vmbus::mem::HostError;

/// Names of descriptors in epoll. Kicks are [`KICK`] plus the sub-channel index.
const CONTROL: u64 = 0;
const PORT: u64 = 1;
const BACKEND: u64 = 2;
const KICK: u64 = 16;
/// Limit: events taken from one wait. More are told by the next.
const EVENTS_PER_WAIT: usize = 32;

/// Limit: how long a server that was told to stop waits for the backend to take what the guest sent before. A network that
/// reads takes it in far less. One that does not read loses it, as it would lose what comes when the queue is full: the
/// guest's new packets, and those for the guest, wait for the successor meanwhile, and should not wait long for that.
const LAST_FRAMES_DEADLINE: Duration = Duration::from_millis(50);

/// Why a server ends other than by being told to.
#[derive(Debug, Error)]
pub enum ServerError {
    #[error("bulkhead-bus: {0}")]
    Bus(PeerFault),
    #[error("supervisor: {0}")]
    Supervisor(PeerFault),
    #[error("supervisor: {0}")]
    Send(#[from] SendError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    SavedState(#[from] StateFault),
}

/// A NIC being served.
pub struct Server {
    epoll: Epoll,
    control: Control,
    port: Port,
    nic: Nic,
    /// There is no predecessor any more.
    serves: bool,
    /// Which descriptors are watched for room to write: control, port, backend.
    watched_for_room: [bool; 3],
}

impl Server {
    pub fn new(
        control: Control,
        port: Port,
        config: &NicConfig,
        backend: Box<dyn Backend>,
    ) -> Result<Self, ServerError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| HostError::new("make an epoll", errno))?;
        watch(&epoll, control.as_fd(), CONTROL, EpollFlags::EPOLLIN)?;
        watch(&epoll, port.as_fd(), PORT, EpollFlags::EPOLLIN)?;
        Ok(Self {
            epoll,
            control,
            port,
            nic: Nic::new(config, backend),
            serves: false,
            watched_for_room: [false; 3],
        })
    }

    /// Serves until told to stop, or until the VM is over.
    pub fn run(mut self) -> Result<(), ServerError> {
        let result = self.serve();
        self.nic.leave_to_successor();
        if result.is_ok() {
            self.control.released()?;
            Control::linger();
        }
        result
    }

    fn serve(&mut self) -> Result<(), ServerError> {
        while self.turn(EpollTimeout::NONE)? {}
        self.send_last_frames()
    }

    /// Told to stop: gives the backend what was taken from the guest. No ring is read any more, nor the backend; what is
    /// in them is the successor's.
    fn send_last_frames(&mut self) -> Result<(), ServerError> {
        self.nic.stop_reading();
        let end = Instant::now() + LAST_FRAMES_DEADLINE;
        while self.nic.wants_room() {
            let left = end.saturating_duration_since(Instant::now());
            // A second Stop, or the supervisor's end, cuts it short.
            if left.is_zero() || !self.turn(EpollTimeout::try_from(left).unwrap_or(EpollTimeout::ZERO))? {
                break;
            }
        }
        self.nic.settle();
        Ok(())
    }

    /// One turn of the loop: does what can be done, then waits at most `patience` for something new. False: told to
    /// stop.
    fn turn(&mut self, patience: EpollTimeout) -> Result<bool, ServerError> {
        let mut busy = self.serves && self.nic.round(&self.port)?;
        if self.nic.wants_to_hear() {
            self.on_port()?;
            self.nic.heard();
        }
        self.carry_out()?;
        busy = busy || self.nic.prepare_sleep();
        busy |= self.give_up_broken()?;
        self.watch_for_room()?;
        let timeout = if busy { EpollTimeout::ZERO } else { patience };
        let mut events = [EpollEvent::empty(); EVENTS_PER_WAIT];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(HostError::new("wait for events", errno).into()),
        };
        for event in &events[..count] {
            match event.data() {
                CONTROL if !self.on_control()? => return Ok(false),
                CONTROL => {}
                PORT => self.on_port()?,
                BACKEND => self.nic.on_backend_ready(),
                // Kicks are edges, and every round looks at every ring.
                _ => {}
            }
        }
        Ok(true)
    }

    /// What a round decided and needs our own sockets for.
    fn carry_out(&mut self) -> Result<(), ServerError> {
        self.give_up_broken()?;
        if let Some(count) = self.nic.take_offer() {
            self.port.offer_sub_channels(count).map_err(ServerError::Bus)?;
        }
        for text in self.nic.take_events() {
            self.control.event(text)?;
        }
        Ok(())
    }

    /// Gives back channels whose guest broke the rules. True if there were any.
    fn give_up_broken(&mut self) -> Result<bool, ServerError> {
        let broken = self.nic.broken_channels();
        for (index, why) in &broken {
            if let Some(endpoint) = self.close(*index)? {
                self.port
                    .channel_broken(endpoint, why.clone())
                    .map_err(ServerError::Bus)?;
            }
        }
        Ok(!broken.is_empty())
    }

    /// Watches sockets for room to write while there is something to write.
    fn watch_for_room(&mut self) -> Result<(), ServerError> {
        let wanted = [
            self.control.wants_write(),
            self.port.wants_write(),
            self.nic.wants_room(),
        ];
        if wanted == self.watched_for_room {
            return Ok(());
        }
        let fds = [
            Some(self.control.as_fd()),
            Some(self.port.as_fd()),
            self.nic.backend_fd(),
        ];
        let edges = [EpollFlags::empty(), EpollFlags::empty(), EpollFlags::EPOLLET];
        for (place, fd) in fds.into_iter().enumerate() {
            if let Some(fd) = fd
                && wanted[place] != self.watched_for_room[place]
            {
                let room = if wanted[place] {
                    EpollFlags::EPOLLOUT
                } else {
                    EpollFlags::empty()
                };
                let mut event = EpollEvent::new(EpollFlags::EPOLLIN | edges[place] | room, place as u64);
                self.epoll
                    .modify(fd, &mut event)
                    .map_err(|errno| HostError::new("watch a descriptor for room", errno))?;
            }
        }
        self.watched_for_room = wanted;
        Ok(())
    }

    /// The supervisor has spoken. False: stop.
    fn on_control(&mut self) -> Result<bool, ServerError> {
        for request in self.control.on_readable().map_err(ServerError::Supervisor)? {
            match request {
                ControlRequest::Stop => return Ok(false),
                ControlRequest::Inspect => self.control.inspect(self.nic.inspect())?,
            }
        }
        Ok(true)
    }

    fn on_port(&mut self) -> Result<(), ServerError> {
        while let Some(event) = self.port.next_event().map_err(ServerError::Bus)? {
            self.on_port_event(event)?;
        }
        Ok(())
    }

    fn on_port_event(&mut self, event: PortEvent) -> Result<(), ServerError> {
        match event {
            PortEvent::Attached => {
                self.nic.on_attached(self.port.ram());
                self.control.warm()?;
            }
            // A waiting server is not woken by what arrives for its predecessor.
            PortEvent::Serve => {
                self.serves = true;
                self.port.journal().claim::<Saved>();
                self.port.journal().pass(Step::ServiceClaimed);
                if let Some(backend) = self.nic.backend_fd() {
                    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                    watch(&self.epoll, backend, BACKEND, flags)?;
                }
            }
            PortEvent::ChannelOpened(endpoint, recovered) => {
                let index = endpoint.sub_index();
                let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                watch(&self.epoll, endpoint.kick(), KICK + u64::from(index), flags)?;
                self.nic.on_channel_opened(&self.port, endpoint, recovered)?;
            }
            PortEvent::ChannelClosing { sub_index, .. } => {
                if let Some(endpoint) = self.close(sub_index)? {
                    self.port.channel_closed(endpoint).map_err(ServerError::Bus)?;
                }
            }
            PortEvent::Retargeted {
                sub_index, target_vp, ..
            } => self.nic.retarget(sub_index, target_vp),
            PortEvent::HandedOver => self.nic.on_handed_over(&self.port)?,
            PortEvent::GpadlAdded { .. } => {}
            PortEvent::GpadlTeardown { gpadl } => {
                self.nic.on_gpadl_teardown(&self.port, gpadl)?;
                self.port.gpadl_released(gpadl).map_err(ServerError::Bus)?;
            }
            PortEvent::Quiesce { token } => {
                let mut endpoints = Vec::new();
                for index in self.nic.open_channels() {
                    endpoints.extend(self.close(index)?);
                }
                self.nic.on_quiesced();
                self.port.quiesced(token, endpoints).map_err(ServerError::Bus)?;
            }
        }
        Ok(())
    }

    /// Ends serving a channel; its endpoint is to be given back to the port.
    fn close(&mut self, index: u16) -> Result<Option<Endpoint>, ServerError> {
        let Some(endpoint) = self.nic.close_channel(&self.port, index)? else {
            return Ok(None);
        };
        self.epoll
            .delete(endpoint.kick())
            .map_err(|errno| HostError::new("stop watching a kick", errno))?;
        Ok(Some(endpoint))
    }
}

fn watch(epoll: &Epoll, fd: BorrowedFd<'_>, name: u64, flags: EpollFlags) -> Result<(), HostError> {
    epoll
        .add(fd, EpollEvent::new(flags, name))
        .map_err(|errno| HostError::new("watch a descriptor", errno))
}
