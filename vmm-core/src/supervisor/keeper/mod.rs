#![forbid(unsafe_code)]
//! The keeper: a process that holds what the supervisor holds, so that the VM outlives its supervisor.
//!
//! # Theory of operation
//!
//! A child of the supervisor takes the end of its control socket for the end of the VM. So that a supervisor may be killed
//! and its VM goes on, a second process holds a duplicate of every descriptor that the supervisor holds, each under a name,
//! and the supervisor's state as bytes. As long as one of the two lives, no child sees an end, and what the children say
//! meanwhile waits in their sockets (which none of them waits for).
//!
//! ```text
//!   supervisor ── Keep, Forget, Write ──▶ keeper                      SEQPACKET pair; fd 3 there
//!       ╳ killed
//!                                         keeper ◀── connect ── bulkhead adopt VM      socket "adopt" in the VM's folder
//!                                           │ ── Orphaned ──────────▶  │
//!                                           │ ◀───────────── Adopt ──  │
//!                                           │ ── Keep, Write, All ──▶  │  from here on this is the supervisor's socket
//! ```
//!
//! * The keeper waits in `poll(2)` and knows nothing: not what its descriptors are (but for [`LISTENER`], [`VCPU_END`] and
//!   [`TERMINAL`], which it restores when the supervisor is gone), nor what the other bytes mean. It never reads from a
//!   descriptor that it only keeps, so that no child can talk to it.
//! * It speaks to one supervisor at a time. Whoever connects is told at once whether there is one; of several that want to
//!   adopt, the first one is let. That is the lock against two supervisors.
//! * It keeps a VM only while [`STATE`] is written, which the supervisor does while the guest runs: a supervisor that is
//!   killed during the VM's start or end takes all with it.
//! * If the vCPU process ends while there is no supervisor, the keeper ends, and with it all that only it held: the
//!   servers see their sockets at their ends.
//! * If the keeper dies, the supervisor starts another one and gives it everything again. If both die, the VM ends.
//! * At the end of a VM the supervisor kills the keeper: it has nothing to clean up.
//!
//! | file | what |
//! | --- | --- |
//! | `holder.rs` | the keeper's process |
//! | `mirror.rs` | the supervisor's side: tells the keeper what has changed |

pub mod holder;
pub mod mirror;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vmbus::ipc::socket::MAX_DESCRIPTORS;
use vmbus::ipc::{Message, PeerFault, SendError, Socket};

use super::control::connect_to;

/// The argument that makes `bulkhead` a keeper.
pub const ARGUMENT: &str = "keeper";

/// The name of the socket at which the keeper listens, and of its file in the VM's folder.
pub const LISTENER: &str = "adopt";

/// The name of the pidfd of the vCPU process.
pub const VCPU_END: &str = "vcpu.end";

/// The name of the terminal that the supervisor has made raw, and of what gives it back.
pub const TERMINAL: &str = "terminal";

/// The name of the bytes that are there as long as the guest runs.
pub const STATE: &str = "vm";

/// Limit: what an answer of a keeper may take, which has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(5);

/// Limit: how often the end of a supervisor is looked for that is gone, or a keeper is asked that hangs up, and the pause
/// before each further look.
pub const LOOKS: usize = 200;
pub const PAUSE: Duration = Duration::from_millis(5);

/// What a supervisor says to its keeper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToKeeper {
    /// Hold these descriptors. A name that is there already names the new descriptor from now on.
    Keep { names: Vec<String> },
    /// Close them.
    Forget { names: Vec<String> },
    /// Remember these bytes; none at all: forget them.
    Write { name: String, bytes: Vec<u8> },
    /// The first word of who wants to be the supervisor.
    Adopt,
}

/// What a keeper says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromKeeper {
    /// To its first supervisor: it is locked in; the sandbox's report, JSON.
    Ready { report: String },
    /// To who has connected: there is a supervisor, and the connection is closed.
    Supervised,
    /// To who has connected: there is none. Say [`ToKeeper::Adopt`] to be it.
    Orphaned,
    /// To an adopter.
    Keep { names: Vec<String> },
    /// To an adopter.
    Write { name: String, bytes: Vec<u8> },
    /// To an adopter: these were all.
    All,
}

impl Message for ToKeeper {
    fn name(&self) -> &'static str {
        match self {
            ToKeeper::Keep { .. } => "Keep",
            ToKeeper::Forget { .. } => "Forget",
            ToKeeper::Write { .. } => "Write",
            ToKeeper::Adopt => "Adopt",
        }
    }

    fn descriptor_count(&self) -> usize {
        match self {
            ToKeeper::Keep { names } => names.len(),
            ToKeeper::Forget { .. } | ToKeeper::Write { .. } | ToKeeper::Adopt => 0,
        }
    }
}

impl Message for FromKeeper {
    fn name(&self) -> &'static str {
        match self {
            FromKeeper::Ready { .. } => "Ready",
            FromKeeper::Supervised => "Supervised",
            FromKeeper::Orphaned => "Orphaned",
            FromKeeper::Keep { .. } => "Keep",
            FromKeeper::Write { .. } => "Write",
            FromKeeper::All => "All",
        }
    }

    fn descriptor_count(&self) -> usize {
        match self {
            FromKeeper::Keep { names } => names.len(),
            FromKeeper::Ready { .. }
            | FromKeeper::Supervised
            | FromKeeper::Orphaned
            | FromKeeper::Write { .. }
            | FromKeeper::All => 0,
        }
    }
}

/// Sends descriptors with their names, in as few messages as can be.
fn send_kept<M: Message>(
    socket: &mut Socket,
    kept: &[(String, BorrowedFd<'_>)],
    message: impl Fn(Vec<String>) -> M,
) -> Result<(), SendError> {
    for some in kept.chunks(MAX_DESCRIPTORS) {
        let names = some.iter().map(|(name, _)| name.clone()).collect();
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(|(_, fd)| *fd).collect();
        socket.send(&message(names), &fds)?;
    }
    Ok(())
}

/// Whether the VM with this folder runs without a supervisor. A VM without a keeper does not.
pub fn is_orphaned(folder: &Path) -> Result<bool> {
    match first_word(folder)? {
        Some((_, Ok(FromKeeper::Orphaned))) => Ok(true),
        // One that goes away just now keeps nothing any more.
        None | Some((_, Ok(_) | Err(PeerFault::Eof))) => Ok(false),
        Some((_, Err(fault))) => bail!("the keeper at {} does not answer: {fault}", folder.display()),
    }
}

/// Connects to the keeper of the VM with this folder, if there is one, and hears whether the VM has a supervisor.
pub fn first_word(folder: &Path) -> Result<Option<(Socket, Result<FromKeeper, PeerFault>)>> {
    for last in [false; LOOKS].into_iter().chain([true]) {
        let Some(mut socket) = connect_to(&folder.join(LISTENER))? else {
            return Ok(None);
        };
        let word = receive_kept(&mut socket).map(|(word, _)| word);
        // A supervisor that was killed while it made a process is survived by that for a moment, with all it had.
        if last || word != Ok(FromKeeper::Supervised) || !is_killed(folder) {
            return Ok(Some((socket, word)));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(None)
}

/// The process that has said last that it holds the folder, and whether it is gone.
fn holder(folder: &Path) -> Option<(i32, bool)> {
    let text = std::fs::read_to_string(folder.join("lock")).ok()?;
    let number = text.trim().parse().ok().filter(|number| *number > 0)?;
    let asked = nix::sys::signal::kill(nix::unistd::Pid::from_raw(number), None);
    Some((number, asked == Err(nix::errno::Errno::ESRCH)))
}

fn is_killed(folder: &Path) -> bool {
    holder(folder).is_some_and(|(_, is_gone)| is_gone)
}

/// The supervisor's process. `None`: it has just become that, and has not said so yet.
pub fn supervisor_of(folder: &Path) -> Option<i32> {
    let (number, is_gone) = holder(folder)?;
    (!is_gone).then_some(number)
}

/// The keeper's next word, and what came with it.
pub fn receive_kept(socket: &mut Socket) -> Result<(FromKeeper, Vec<OwnedFd>), PeerFault> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(received) = socket.recv::<FromKeeper>()? {
            return Ok(received);
        }
        wait_readable(socket, deadline)?;
    }
}

fn wait_readable(socket: &Socket, deadline: Instant) -> Result<(), PeerFault> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(0) => Err(PeerFault::Receive(nix::errno::Errno::ETIMEDOUT)),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(PeerFault::Receive(errno)),
    }
}
