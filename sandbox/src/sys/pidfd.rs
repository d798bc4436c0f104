//! A child process, watched by its pidfd.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCause {
    Exited(i32),
    /// Signal number; whether a core was dumped.
    Signaled {
        signal: i32,
        core: bool,
    },
    /// It ended, and only its parent, which is another process, could have learnt how.
    Unknown,
}

/// Exit status of a signal that the first process of a PID namespace could not send to itself; see
/// [`super::process`]. The shells' convention: 128 + signal.
const BY_PROXY: [(i32, i32); 2] = [
    (128 + libc::SIGABRT, libc::SIGABRT),
    (128 + libc::SIGSYS, libc::SIGSYS),
];

/// A process made by [`super::spawn::spawn`].
///
/// Its descriptor is readable once the process has ended; nothing here blocks but [`Child::wait_at_most`].
/// Dropping the handle of a running child kills it, because nobody could watch it any more.
#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    /// First process of a PID namespace.
    namespace_init: bool,
    ended: Option<ExitCause>,
    /// It is another process's child.
    adopted: bool,
}

impl Child {
    pub(super) fn new(pid: Pid, pidfd: OwnedFd, namespace_init: bool) -> Self {
        Self {
            pid,
            pidfd,
            namespace_init,
            ended: None,
            adopted: false,
        }
    }

    /// A process that another one has started, which has handed over the pidfd. It cannot be reaped from here, and how it
    /// ends is [`ExitCause::Unknown`].
    pub fn adopt(pid: Pid, pidfd: OwnedFd) -> Self {
        Self {
            pid,
            pidfd,
            namespace_init: false,
            ended: None,
            adopted: true,
        }
    }

    /// How the child ended; `None` while it runs. The first answer reaps it; later ones repeat that answer.
    ///
    /// # Errors
    /// Only if somebody else has reaped the child.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitCause>> {
        if self.ended.is_some() {
            return Ok(self.ended);
        }
        if self.adopted {
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO)? > 0 {
                self.ended = Some(ExitCause::Unknown);
            }
            return Ok(self.ended);
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        self.ended = match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, status)) => Some(self.cause_of_exit(status)),
            Ok(WaitStatus::Signaled(_, signal, core)) => Some(ExitCause::Signaled {
                signal: signal as i32,
                core,
            }),
            Ok(_) | Err(Errno::EINTR) => None,
            Err(errno) => return Err(errno.into()),
        };
        Ok(self.ended)
    }

    fn cause_of_exit(&self, status: i32) -> ExitCause {
        match BY_PROXY.into_iter().find(|(proxy, _)| *proxy == status) {
            Some((_, signal)) if self.namespace_init => ExitCause::Signaled { signal, core: false },
            _ => ExitCause::Exited(status),
        }
    }

    /// Kills the child, if it still runs, by SIGKILL. Does not wait.
    ///
    /// # Errors
    /// The kernel's; a child that has ended already is none.
    pub fn kill(&self) -> io::Result<()> {
        use rustix::process::{Signal, pidfd_send_signal};
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// [`Child::try_wait`], waiting for the end no longer than this. For shutting down and for tests; a
    /// supervisor that has other children to watch polls the descriptor instead.
    ///
    /// # Errors
    /// As [`Child::try_wait`].
    pub fn wait_at_most(&mut self, patience: Duration) -> io::Result<Option<ExitCause>> {
        let start = Instant::now();
        loop {
            if let Some(cause) = self.try_wait()? {
                return Ok(Some(cause));
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)));
            match poll(
                &mut [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)],
                timeout.unwrap_or(PollTimeout::MAX),
            ) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // Nobody is left to tell; a zombie that stays is collected when this process ends.
            let _ = self.kill();
            let _ = self.try_wait();
        }
    }
}

impl ExitCause {
    /// Ended by itself with status 0.
    pub fn is_success(self) -> bool {
        self == ExitCause::Exited(0)
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            ExitCause::Unknown => {
                f.write_str("ended (how is not known: an earlier supervisor had started it)")
            }
            ExitCause::Exited(status) => write!(f, "exited with status {status}"),
            ExitCause::Signaled { signal, .. } if signal == libc::SIGSYS => {
                f.write_str("killed for a forbidden system call (SIGSYS)")
            }
            ExitCause::Signaled { signal, .. } => {
                let name = nix::sys::signal::Signal::try_from(signal).map(|signal| signal.as_str());
                write!(f, "killed by {}", name.unwrap_or("an unknown signal"))
            }
        }
    }
}
