//! Plays the supervisor's side of a server's control socket.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::{VscError, wait_until};
use crate::ipc::hello::PROTOCOL;
use crate::ipc::{ServerToSupervisor, Socket, SupervisorToServer};
use crate::journal;
use crate::mem::{HostError, sealed_memfd};

/// What a server is told at its start.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// Number of the process among those that serve the device; from 1.
    pub generation: u32,
    /// Name of the device in logs.
    pub name: String,
    /// The device crate's configuration, JSON.
    pub config: String,
    /// Log filter.
    pub log: String,
}

impl StartOptions {
    /// A first start with that configuration, warnings only.
    pub fn new(name: &str, config: &str) -> Self {
        Self {
            generation: 1,
            name: name.to_owned(),
            config: config.to_owned(),
            log: "warn".to_owned(),
        }
    }

    /// The same for the next process.
    pub fn successor(&self) -> Self {
        Self {
            generation: self.generation + 1,
            ..self.clone()
        }
    }
}

/// The supervisor's end of a server's control socket.
#[derive(Debug)]
pub struct PlayedSupervisor {
    socket: Socket,
}

impl PlayedSupervisor {
    /// Takes our end of the pair whose other end is the server's fd 3.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Socket::new(socket),
        }
    }

    /// An empty journal for one device; keep it for the successors.
    pub fn new_journal() -> Result<OwnedFd, HostError> {
        sealed_memfd("journal", journal::required_len())
    }

    /// Sends `Start` with these descriptors; `bus` and `journal` are among them.
    pub fn start(&mut self, options: &StartOptions, fds: &[(&str, BorrowedFd<'_>)]) -> Result<(), VscError> {
        let StartOptions {
            generation,
            name,
            config,
            log,
        } = options.clone();
        let (names, fds): (Vec<String>, Vec<BorrowedFd<'_>>) =
            fds.iter().map(|(name, fd)| ((*name).to_owned(), *fd)).unzip();
        let message = SupervisorToServer::Start {
            protocol: PROTOCOL,
            generation,
            name,
            config,
            log,
            fds: names,
        };
        Ok(self.socket.send(&message, &fds)?)
    }

    /// Waits until the server is ready; its sandbox report.
    pub fn wait_ready(&mut self, deadline: Instant) -> Result<String, VscError> {
        loop {
            match self.next(deadline, "Ready")? {
                ServerToSupervisor::Ready { report } => return Ok(report),
                ServerToSupervisor::Failed { message } => return Err(VscError::Failed(message)),
                _ => {}
            }
        }
    }

    /// Waits for the server's answer to a ping: its loop turns.
    pub fn ping(&mut self, token: u64, deadline: Instant) -> Result<(), VscError> {
        self.socket.send(&SupervisorToServer::Ping { token }, &[])?;
        while self.next(deadline, "Pong")? != (ServerToSupervisor::Pong { token }) {}
        Ok(())
    }

    /// Asks the server about its state.
    pub fn inspect(&mut self, deadline: Instant) -> Result<Vec<(String, String)>, VscError> {
        self.socket.send(&SupervisorToServer::Inspect, &[])?;
        loop {
            if let ServerToSupervisor::Inspect { entries } = self.next(deadline, "Inspect")? {
                return Ok(entries);
            }
        }
    }

    /// Asks the server to stop at a packet boundary and exit.
    pub fn stop(&mut self) -> Result<(), VscError> {
        Ok(self.socket.send(&SupervisorToServer::Stop, &[])?)
    }

    /// The next message of the server.
    pub fn next(&mut self, deadline: Instant, what: &'static str) -> Result<ServerToSupervisor, VscError> {
        loop {
            if let Some((message, _)) = self.socket.recv::<ServerToSupervisor>()? {
                return Ok(message);
            }
            if !wait_until(self.socket.as_fd(), deadline)? {
                return Err(VscError::Deadline(what));
            }
        }
    }
}
