#![forbid(unsafe_code)]
//! The control socket of a running VM: what `bulkhead list`, `inspect` and `stop` say to its supervisor.
//!
//! A SOCK_SEQPACKET socket in the VM's folder, which only its user may enter. The messages are encoded like those
//! between our processes. A client that does not read, or says something else, loses its connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use vmbus::ipc::{Message, Socket};

use super::chronicle::Entry;

/// Limit: people at the control socket at once.
pub const MAX_CLIENTS: usize = 8;

/// Limit: bytes of entries in one [`Reply::Entries`], well below what a message may be long.
const ENTRIES_BYTES: usize = 32 * 1024;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Who are you?
    Status,
    /// Everything that the VM's processes know about themselves.
    Inspect,
    /// End the VM now.
    Stop,
    /// Press its power button.
    PowerButton,
    /// The events with higher numbers than that; with `follow`, those to come, too.
    Events { after: u64, follow: bool },
    /// Start a server for a held device, of that program from now on.
    Resume {
        device: String,
        program: Option<PathBuf>,
    },
    /// Replace the server of a device that serves, by one of that program if one is named.
    Swap {
        device: String,
        program: Option<PathBuf>,
        /// Seconds that the new one may take until it is prepared.
        patience_s: u32,
    },
    /// What devices are there, and who serves them?
    Devices,
}

/// A device and its servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLine {
    /// For example `disk0`.
    pub name: String,
    /// `block` or `net`.
    pub kind: String,
    /// The servers' program.
    pub program: String,
    /// `starts`, `serves`, `stops`, `ended`, `held`.
    pub state: String,
    /// Of the server that is there, or was last.
    pub generation: u32,
    pub process: Option<i32>,
    /// The server that waits, if there is one: its state (`starts`, `waits`), generation and process.
    pub successor: Option<(String, u32, i32)>,
    /// The program that it was swapped to last, if that was given up.
    pub gave_up: Option<String>,
    /// Another file has the program's name by now, or none.
    pub replaced: bool,
}

/// What the supervisor answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Status {
        supervisor: i32,
        state: String,
        processes: Vec<(String, i32)>,
    },
    /// Some of the pairs; `Done` follows the last ones.
    Entries(Vec<(String, String)>),
    Done,
    Refused(String),
    /// Events, each a line of JSON; `Done` follows the last ones, unless more may come.
    Events(Vec<String>),
    /// The swap is done.
    Swapped {
        /// Generations.
        from: u32,
        to: u32,
        process: i32,
        /// From the moment at which the old server was told to stop, or died, until the new one was let serve.
        stall_us: u64,
        /// How the old server ended, if it did not stop as it was told to.
        mishap: Option<String>,
    },
    Devices(Vec<DeviceLine>),
}

impl std::fmt::Display for DeviceLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let DeviceLine {
            name,
            kind,
            program,
            state,
            generation,
            ..
        } = self;
        write!(f, "{name} {kind} {state} generation={generation}")?;
        if let Some(process) = self.process {
            write!(f, " process={process}")?;
        }
        match &self.successor {
            Some((state, generation, process)) => write!(
                f,
                " successor={state} successor-generation={generation} successor-process={process}"
            )?,
            None => f.write_str(" successor=none")?,
        }
        write!(f, " program={program}")?;
        if self.replaced {
            f.write_str(" replaced=yes")?;
        }
        match &self.gave_up {
            Some(program) => write!(f, " gave-up={program}"),
            None => Ok(()),
        }
    }
}

impl Message for Request {
    fn name(&self) -> &'static str {
        match self {
            Request::Status => "Status",
            Request::Inspect => "Inspect",
            Request::Stop => "Stop",
            Request::PowerButton => "PowerButton",
            Request::Events { .. } => "Events",
            Request::Resume { .. } => "Resume",
            Request::Swap { .. } => "Swap",
            Request::Devices => "Devices",
        }
    }
}

impl Message for Reply {
    fn name(&self) -> &'static str {
        match self {
            Reply::Status { .. } => "Status",
            Reply::Entries(_) => "Entries",
            Reply::Done => "Done",
            Reply::Refused(_) => "Refused",
            Reply::Events(_) => "Events",
            Reply::Swapped { .. } => "Swapped",
            Reply::Devices(_) => "Devices",
        }
    }
}

/// The listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Makes the socket at `path`, for this user only.
    pub fn bind(path: &Path) -> Result<Self> {
        let shown = path.display();
        let address =
            UnixAddr::new(path).with_context(|| format!("the path {shown} is too long for a socket"))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        // The process has one thread, so that nothing else is made under this mask.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(fd.as_raw_fd(), &address);
        umask(before);
        bound.with_context(|| format!("cannot make the socket {shown}"))?;
        listen(&fd, Backlog::new(4)?).with_context(|| format!("cannot listen at {shown}"))?;
        Ok(Listener { fd })
    }

    /// One that an earlier supervisor has made.
    pub fn adopt(fd: OwnedFd) -> Self {
        Listener { fd }
    }

    /// A client that waits, if there is one.
    pub fn accept(&self) -> io::Result<Option<Socket>> {
        accept(self.as_fd())
    }
}

/// A client that waits at a listening socket that does not block, if there is one.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<Socket>> {
    match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
        Ok(client) => Ok(Some(Socket::new(client))),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Connects to a VM's supervisor; `None` if none listens there.
pub fn connect_to(path: &Path) -> Result<Option<Socket>> {
    let address = UnixAddr::new(path)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    match connect(fd.as_raw_fd(), &address) {
        Ok(()) => Ok(Some(Socket::new(fd))),
        Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("cannot connect to {}", path.display())),
    }
}

/// Cuts events into messages that can be sent.
pub fn event_replies(entries: &[Entry], follow: bool) -> Vec<Reply> {
    let mut replies = Vec::new();
    let mut batch: Vec<String> = Vec::new();
    let mut bytes = 0_usize;
    for entry in entries {
        let line = serde_json::to_string(entry).expect("an entry is numbers and text");
        if bytes.saturating_add(line.len()) > ENTRIES_BYTES && !batch.is_empty() {
            replies.push(Reply::Events(std::mem::take(&mut batch)));
            bytes = 0;
        }
        bytes = bytes.saturating_add(line.len()).saturating_add(16);
        batch.push(line);
    }
    replies.push(Reply::Events(batch));
    if !follow {
        replies.push(Reply::Done);
    }
    replies
}

/// Cuts pairs into messages that can be sent.
pub fn replies(entries: Vec<(String, String)>) -> Vec<Reply> {
    let mut replies = Vec::new();
    let mut batch = Vec::new();
    let mut bytes = 0_usize;
    for (path, mut value) in entries {
        // Limit: one value. Nobody of ours says so much.
        let mut end = value.len().min(ENTRIES_BYTES);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        value.truncate(end);
        let length = path.len().saturating_add(value.len());
        if bytes.saturating_add(length) > ENTRIES_BYTES && !batch.is_empty() {
            replies.push(Reply::Entries(std::mem::take(&mut batch)));
            bytes = 0;
        }
        bytes = bytes.saturating_add(length).saturating_add(32);
        batch.push((path, value));
    }
    replies.push(Reply::Entries(batch));
    replies.push(Reply::Done);
    replies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_cut_into_messages_that_fit() {
        let entries: Vec<_> = (0..5000)
            .map(|number| (format!("path.{number}"), "value".repeat(10)))
            .collect();
        let replies = replies(entries.clone());
        assert_eq!(replies.last(), Some(&Reply::Done));
        let mut back = Vec::new();
        for reply in &replies {
            assert!(vmbus::ipc::codec::encode(reply).is_ok());
            if let Reply::Entries(entries) = reply {
                back.extend(entries.clone());
            }
        }
        assert_eq!(back, entries);
        assert!(replies.len() > 5);
    }

    #[test]
    fn a_socket_is_for_its_user_only_and_carries_messages() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control");
        assert!(connect_to(&path).expect("no error").is_none());
        let listener = Listener::bind(&path).expect("bound");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(listener.accept().expect("no error").is_none());
        let mut client = connect_to(&path).expect("no error").expect("connected");
        let mut server = listener.accept().expect("no error").expect("a client");
        client.send(&Request::Inspect, &[]).expect("sent");
        let (request, _) = server.recv::<Request>().expect("right").expect("there");
        assert_eq!(request, Request::Inspect);
        server.send(&Reply::Done, &[]).expect("sent");
        let (reply, _) = client.recv::<Reply>().expect("right").expect("there");
        assert_eq!(reply, Reply::Done);
    }
}
