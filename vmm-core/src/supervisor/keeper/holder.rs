#![forbid(unsafe_code)]
//! The keeper's process; see the theory of [`super`].

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use vmbus::ipc::{PeerFault, SendError, Socket};

use super::{FromKeeper, LISTENER, STATE, TERMINAL, ToKeeper, VCPU_END, send_kept};
use crate::supervisor::report::say;
use crate::supervisor::{console, control};

/// Limit: names of bytes. A VM has one for itself, one for each of at most 64 devices and one for a terminal.
const MAX_WRITTEN: usize = 256;

/// Limit: those who have connected and not yet said that they want to adopt. One more takes the place of the first, who
/// may have stopped; one who has not comes again.
pub const MAX_CANDIDATES: usize = 8;

/// What the keeper has.
struct Keeper {
    kept: BTreeMap<String, OwnedFd>,
    written: BTreeMap<String, Vec<u8>>,
    /// `None`: the VM has none.
    supervisor: Option<Socket>,
    /// Who has been told that there is no supervisor.
    candidates: Vec<Socket>,
    /// The user who may adopt: the one who has started the VM.
    uid: u32,
}

/// The program.
pub fn main() -> ExitCode {
    match begin().and_then(Keeper::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("the keeper cannot go on: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Locks the process in. It has no descriptor yet but the supervisor's socket.
fn begin() -> Result<Keeper> {
    let (control, jail) = sandbox::inherited()?;
    let uid = uid_of(control.as_fd()).context("cannot find out who has started the VM")?;
    let mut supervisor = Socket::new(control);
    let report = serde_json::to_string(&jail.lock_in()?)?;
    // One that is gone already may have said before that the VM is to be kept.
    supervisor.send(&FromKeeper::Ready { report }, &[]).ok();
    Ok(Keeper {
        kept: BTreeMap::new(),
        written: BTreeMap::new(),
        supervisor: Some(supervisor),
        candidates: Vec::new(),
        uid,
    })
}

/// The user at the other end of a socket, in numbers of this process's user namespace. For root this has none of its own,
/// and for others one with a single user in it: nobody else has that number.
fn uid_of(socket: BorrowedFd<'_>) -> nix::Result<u32> {
    Ok(getsockopt(&socket, PeerCredentials)?.uid())
}

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Supervisor,
    VcpuEnd,
    Candidate,
    Listener,
}

impl Keeper {
    /// Until nothing is to be kept any more.
    fn run(mut self) -> Result<()> {
        while self.supervisor.is_some() || self.is_worth_keeping() {
            let ready = self.wait()?;
            // First of all: it decides what the others are told.
            if ready.contains(&Source::Supervisor) {
                self.on_supervisor()?;
            }
            if self.supervisor.is_none() && ready.contains(&Source::VcpuEnd) {
                break;
            }
            if ready.contains(&Source::Candidate) {
                self.on_candidates();
            }
            if ready.contains(&Source::Listener) {
                self.on_listener()?;
            }
        }
        Ok(())
    }

    /// Whether the guest was running when the supervisor was last heard of.
    fn is_worth_keeping(&self) -> bool {
        self.written.contains_key(STATE) && self.kept.contains_key(VCPU_END)
    }

    fn wait(&self) -> Result<Vec<Source>> {
        let mut sources = Vec::new();
        if let Some(supervisor) = &self.supervisor {
            let room = match supervisor.has_queued() {
                true => PollFlags::POLLOUT,
                false => PollFlags::empty(),
            };
            sources.push((
                Source::Supervisor,
                PollFd::new(supervisor.as_fd(), PollFlags::POLLIN | room),
            ));
        } else if let Some(vcpu_end) = self.kept.get(VCPU_END) {
            sources.push((Source::VcpuEnd, PollFd::new(vcpu_end.as_fd(), PollFlags::POLLIN)));
        }
        for candidate in &self.candidates {
            sources.push((
                Source::Candidate,
                PollFd::new(candidate.as_fd(), PollFlags::POLLIN),
            ));
        }
        if let Some(listener) = self.kept.get(LISTENER) {
            sources.push((Source::Listener, PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        }
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = sources.into_iter().unzip();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => bail!("poll failed: {}", errno.desc()),
        }
        let ready = sources.into_iter().zip(fds);
        Ok(ready
            .filter(|(_, fd)| fd.any().unwrap_or(false))
            .map(|(source, _)| source)
            .collect())
    }

    /// All that it said.
    fn on_supervisor(&mut self) -> Result<()> {
        while let Some(supervisor) = &mut self.supervisor {
            let received = match supervisor.flush() {
                Ok(()) => supervisor.recv::<ToKeeper>(),
                Err(_) => Err(PeerFault::Eof),
            };
            match received {
                Ok(Some((ToKeeper::Keep { names }, fds))) => self.kept.extend(names.into_iter().zip(fds)),
                Ok(Some((ToKeeper::Forget { names }, _))) => {
                    self.kept.retain(|name, _| !names.contains(name));
                }
                Ok(Some((ToKeeper::Write { name, bytes }, _))) => {
                    if bytes.is_empty() {
                        self.written.remove(&name);
                    } else if self.written.len() < MAX_WRITTEN || self.written.contains_key(&name) {
                        self.written.insert(name, bytes);
                    } else {
                        bail!("more is written than can be remembered");
                    }
                }
                Ok(None) => return Ok(()),
                Err(PeerFault::Eof) => {
                    self.supervisor = None;
                    self.restore_terminal();
                }
                // It lives, so that nobody else may be let adopt: it sees this end, and starts another keeper.
                Ok(Some((ToKeeper::Adopt, _))) => bail!("the supervisor wants to adopt"),
                Err(fault) => bail!("the supervisor does not speak our protocol: {fault}"),
            }
        }
        Ok(())
    }

    /// The supervisor did not come to that.
    fn restore_terminal(&self) {
        if let (Some(terminal), Some(to_restore)) = (self.kept.get(TERMINAL), self.written.get(TERMINAL)) {
            console::restore(terminal.as_fd(), to_restore);
        }
    }

    /// Lets the first one that wants to be the supervisor be it.
    fn on_candidates(&mut self) {
        for mut candidate in std::mem::take(&mut self.candidates) {
            match candidate.recv::<ToKeeper>() {
                Ok(None) => self.candidates.push(candidate),
                Ok(Some((ToKeeper::Adopt, _))) => {
                    if self.supervisor.is_some() {
                        // It may be gone.
                        candidate.send(&FromKeeper::Supervised, &[]).ok();
                    } else if self.hand_over(&mut candidate).is_ok() {
                        self.supervisor = Some(candidate);
                    }
                }
                // It only wanted to know, or talks nonsense.
                Ok(Some(_)) | Err(_) => {}
            }
        }
    }

    /// Tells an adopter everything. Everything is kept, too: it may die like the one before.
    fn hand_over(&self, adopter: &mut Socket) -> Result<(), SendError> {
        let kept = self.kept.iter().map(|(name, fd)| (name.clone(), fd.as_fd()));
        send_kept(adopter, &kept.collect::<Vec<_>>(), |names| FromKeeper::Keep {
            names,
        })?;
        for (name, bytes) in &self.written {
            let (name, bytes) = (name.clone(), bytes.clone());
            adopter.send(&FromKeeper::Write { name, bytes }, &[])?;
        }
        adopter.send(&FromKeeper::All, &[])
    }

    /// Tells all who have come how things are.
    fn on_listener(&mut self) -> Result<()> {
        let Some(listener) = self.kept.get(LISTENER) else {
            return Ok(());
        };
        while let Some(mut socket) = control::accept(listener.as_fd()).context("cannot accept")? {
            let may = uid_of(socket.as_fd()) == Ok(self.uid);
            let word = match self.supervisor {
                Some(_) => FromKeeper::Supervised,
                None => FromKeeper::Orphaned,
            };
            if may && socket.send(&word, &[]).is_ok() && self.supervisor.is_none() {
                if self.candidates.len() == MAX_CANDIDATES {
                    self.candidates.remove(0);
                }
                self.candidates.push(socket);
            }
        }
        Ok(())
    }
}
