#![forbid(unsafe_code)]
//! The sockets to the supervisor and to the device servers, on one epoll.
//!
//! Any thread may send (a vCPU thread, when the guest's message makes the bus talk to a server): sending never
//! blocks. What the kernel does not take waits in the socket's bounded queue, and the control thread is told to
//! flush it when there is room. Only the control thread receives.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use vmbus::ipc::{
    Message, PeerFault, SendError, ServerToVcpu, Socket, SupervisorToVcpu, VcpuToServer, VcpuToSupervisor,
};

use crate::bus::DeviceId;

/// What woke the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Supervisor,
    Timer,
    /// vCPU threads have something to say.
    Attention,
    ConsoleInput,
    /// The console's input queue has room again.
    ConsoleRoom,
    Server(DeviceId, u32),
}

impl Source {
    /// Devices come after everything else.
    const FIRST_DEVICE: u64 = 16;

    pub fn token(self) -> u64 {
        match self {
            Source::Supervisor => 0,
            Source::Timer => 1,
            Source::Attention => 2,
            Source::ConsoleInput => 3,
            Source::ConsoleRoom => 4,
            // The generation in the upper half; the bus takes only small numbers of devices.
            Source::Server(DeviceId(device), generation) => {
                (u64::from(generation) << 32) | (Self::FIRST_DEVICE + u64::from(device & 0xffff))
            }
        }
    }

    pub fn from_token(token: u64) -> Option<Self> {
        match token {
            0 => Some(Source::Supervisor),
            1 => Some(Source::Timer),
            2 => Some(Source::Attention),
            3 => Some(Source::ConsoleInput),
            4 => Some(Source::ConsoleRoom),
            device => {
                let generation = u32::try_from(device >> 32).ok()?;
                let device = (device & 0xffff_ffff).checked_sub(Self::FIRST_DEVICE)?;
                Some(Source::Server(DeviceId(u32::try_from(device).ok()?), generation))
            }
        }
    }
}

/// A socket on the epoll. Dropping it takes it off.
#[derive(Debug)]
struct Link {
    socket: Socket,
    source: Source,
    epoll: Arc<Epoll>,
    waits_for_room: bool,
}

impl Link {
    fn new(fd: OwnedFd, source: Source, epoll: &Arc<Epoll>) -> nix::Result<Self> {
        let socket = Socket::new(fd);
        epoll.add(
            socket.as_fd(),
            EpollEvent::new(EpollFlags::EPOLLIN, source.token()),
        )?;
        Ok(Self {
            socket,
            source,
            epoll: epoll.clone(),
            waits_for_room: false,
        })
    }

    fn send<M: Message>(&mut self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        self.socket.send(message, fds)?;
        self.watch_room()
    }

    fn flush(&mut self) -> Result<(), SendError> {
        self.socket.flush()?;
        self.watch_room()
    }

    fn watch_room(&mut self) -> Result<(), SendError> {
        let wanted = self.socket.has_queued();
        if wanted != self.waits_for_room {
            let room = if wanted {
                EpollFlags::EPOLLOUT
            } else {
                EpollFlags::empty()
            };
            let mut event = EpollEvent::new(EpollFlags::EPOLLIN | room, self.source.token());
            self.epoll
                .modify(self.socket.as_fd(), &mut event)
                .map_err(SendError::Send)?;
            self.waits_for_room = wanted;
        }
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Duplicates of the descriptor may live on in the sender, and would keep the entry alive.
        self.epoll.delete(self.socket.as_fd()).ok();
    }
}

/// All links of the process.
#[derive(Debug)]
pub struct Links {
    epoll: Arc<Epoll>,
    supervisor: Link,
    servers: BTreeMap<(DeviceId, u32), Link>,
}

impl Links {
    pub fn new(supervisor: OwnedFd, epoll: Arc<Epoll>) -> nix::Result<Self> {
        let supervisor = Link::new(supervisor, Source::Supervisor, &epoll)?;
        Ok(Self {
            epoll,
            supervisor,
            servers: BTreeMap::new(),
        })
    }

    /// Tells the supervisor. If it is gone the control thread notices, and ends the VM.
    pub fn report(&mut self, message: &VcpuToSupervisor) {
        if let Err(error) = self.supervisor.send(message, &[]) {
            tracing::debug!("report to the supervisor: {error}");
        }
    }

    /// Receives from the supervisor.
    pub fn receive(&mut self) -> Result<Option<(SupervisorToVcpu, Vec<OwnedFd>)>, PeerFault> {
        self.supervisor.flush()?;
        self.supervisor.socket.recv()
    }

    /// Connects a server of a device.
    pub fn connect(&mut self, device: DeviceId, generation: u32, fd: OwnedFd) -> nix::Result<()> {
        let link = Link::new(fd, Source::Server(device, generation), &self.epoll)?;
        self.servers.insert((device, generation), link);
        Ok(())
    }

    /// Drops the connection to a server.
    pub fn disconnect(&mut self, device: DeviceId, generation: u32) {
        self.servers.remove(&(device, generation));
    }

    /// Sends to a server of a device.
    pub fn send(
        &mut self,
        device: DeviceId,
        generation: u32,
        message: &VcpuToServer,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        match self.servers.get_mut(&(device, generation)) {
            Some(link) => link.send(message, fds),
            // It was lost a moment ago, and the bus has been told.
            None => Ok(()),
        }
    }

    /// Receives from a server of a device, and flushes what waits for it.
    pub fn receive_from(
        &mut self,
        device: DeviceId,
        generation: u32,
    ) -> Result<Option<ServerToVcpu>, PeerFault> {
        let Some(link) = self.servers.get_mut(&(device, generation)) else {
            return Ok(None);
        };
        link.flush()?;
        // No message of a server carries descriptors, which `recv` has checked.
        let received = link.socket.recv()?;
        Ok(received.map(|(message, _)| message))
    }
}
