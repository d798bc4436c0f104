#![forbid(unsafe_code)]
//! The control socket of a running VM: what `bulkhead list`, `inspect` and `stop` say to its supervisor.
//!
//! A SOCK_SEQPACKET socket in the VM's folder, which only its user may enter. The messages are encoded like those
//! between our processes. A client that does not read, or says something else, loses its connection.
//!
//! A `bulkhead` that was upgraded talks to supervisors that were started before: what a message is made of stays as it is,
//! and new kinds of messages come last.

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

    /// A message, and its bytes as they were when a version of bulkhead first had it.
    fn frozen<T: Message + Serialize>(messages: &[(T, &str)]) {
        for (message, bytes) in messages {
            let encoded = vmbus::ipc::codec::encode(message).expect("it is short");
            let encoded: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(encoded, *bytes, "{}", message.name());
        }
    }

    #[test]
    fn messages_are_what_supervisors_understand_that_were_started_before_an_upgrade() {
        let device = || "d".to_owned();
        let program = Some(PathBuf::from("/p"));
        frozen(&[
            (Request::Status, "00000000"),
            (Request::Inspect, "01000000"),
            (Request::Stop, "02000000"),
            (Request::PowerButton, "03000000"),
            (
                Request::Events {
                    after: 7,
                    follow: true,
                },
                "04000000070000000000000001",
            ),
            (
                Request::Resume {
                    device: device(),
                    program: program.clone(),
                },
                "050000000100000000000000640102000000000000002f70",
            ),
            (
                Request::Swap {
                    device: device(),
                    program,
                    patience_s: 9,
                },
                "060000000100000000000000640102000000000000002f7009000000",
            ),
            (Request::Devices, "07000000"),
        ]);
        let line = DeviceLine {
            name: device(),
            kind: "k".to_owned(),
            program: "p".to_owned(),
            state: "s".to_owned(),
            generation: 3,
            process: Some(4),
            successor: Some(("w".to_owned(), 5, 6)),
            gave_up: Some("g".to_owned()),
        };
        frozen(&[
            (
                Reply::Status {
                    supervisor: 1,
                    state: "s".to_owned(),
                    processes: vec![(device(), 2)],
                },
                "0000000001000000010000000000000073010000000000000001000000000000006402000000",
            ),
            (
                Reply::Entries(vec![("p".to_owned(), "v".to_owned())]),
                "010000000100000000000000010000000000000070010000000000000076",
            ),
            (Reply::Done, "02000000"),
            (Reply::Refused("w".to_owned()), "03000000010000000000000077"),
            (
                Reply::Events(vec!["e".to_owned()]),
                "040000000100000000000000010000000000000065",
            ),
            (
                Reply::Swapped {
                    from: 1,
                    to: 2,
                    process: 3,
                    stall_us: 4,
                    mishap: Some("m".to_owned()),
                },
                "0500000001000000020000000300000004000000000000000101000000000000006d",
            ),
            (
                Reply::Devices(vec![line]),
                "06000000010000000000000001000000000000006401000000000000006b01000000000000007001000000000000007303000000010400000001010000000000000077050000000600000001010000000000000067",
            ),
        ]);
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
