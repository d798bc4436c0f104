#![forbid(unsafe_code)]
//! What `bulkhead-vcpu` and `bulkhead-bus` share as children of the supervisor: the first message, the log, and sockets on
//! an epoll.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use vmbus::ipc::{Message, PeerFault, SendError, Socket};

/// Waits for a message. Only for the first ones of a connection, when a process has nothing else to do.
pub fn wait_for<M: Message>(socket: &mut Socket) -> anyhow::Result<(M, Vec<OwnedFd>)> {
    loop {
        match socket.recv()? {
            Some(received) => return Ok(received),
            None => wait_readable(socket)?,
        }
    }
}

/// Starts logging to standard error.
pub fn init_logging(filter: &str) -> anyhow::Result<()> {
    let targets: Targets = filter
        .parse()
        .map_err(|error| anyhow::anyhow!("log filter \"{filter}\": {error}"))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time();
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .try_init()?;
    Ok(())
}

fn wait_readable(socket: &Socket) -> nix::Result<()> {
    match poll(
        &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    ) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A socket on an epoll. Any thread may send, which never blocks: what the kernel does not take waits in the socket's
/// bounded queue, and whoever waits on the epoll, and receives, sends it when there is room. Dropping it takes it off.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    token: u64,
    epoll: Arc<Epoll>,
    interest: EpollFlags,
    takes_turns: bool,
}

impl Link {
    /// Watches the socket; its events carry `token`.
    pub fn new(fd: OwnedFd, token: u64, epoll: &Arc<Epoll>) -> nix::Result<Self> {
        let socket = Socket::new(fd);
        epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        Ok(Self {
            socket,
            token,
            epoll: epoll.clone(),
            interest: EpollFlags::EPOLLIN,
            takes_turns: false,
        })
    }

    /// From now on hears nothing from a peer that has not taken what was said to it. At one end only: two that take turns
    /// could wait for each other.
    pub fn take_turns(&mut self) {
        self.takes_turns = true;
    }

    /// Sends, or queues.
    pub fn send<M: Message>(&mut self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        self.socket.send(message, fds)?;
        self.watch_room()
    }

    /// Receives, and sends what waits.
    pub fn receive<M: Message>(&mut self) -> Result<Option<(M, Vec<OwnedFd>)>, PeerFault> {
        self.socket.flush()?;
        self.watch_room()?;
        if !self.interest.contains(EpollFlags::EPOLLIN) {
            return Ok(None);
        }
        self.socket.recv()
    }

    /// Whether messages wait for the peer.
    pub fn has_queued(&self) -> bool {
        self.socket.has_queued()
    }

    /// For the last words: waits until the peer has taken what waits for it, but not longer than that.
    pub fn drain(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.socket.flush().is_ok() && self.socket.has_queued() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let room = poll(
                &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)],
                timeout,
            );
            if room == Ok(0) {
                return;
            }
        }
    }

    fn watch_room(&mut self) -> Result<(), SendError> {
        let interest = match (self.socket.has_queued(), self.takes_turns) {
            (false, _) => EpollFlags::EPOLLIN,
            (true, false) => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
            (true, true) => EpollFlags::EPOLLOUT,
        };
        if interest != self.interest {
            let mut event = EpollEvent::new(interest, self.token);
            self.epoll
                .modify(self.socket.as_fd(), &mut event)
                .map_err(SendError::Send)?;
            self.interest = interest;
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
