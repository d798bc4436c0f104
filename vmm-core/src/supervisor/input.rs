#![forbid(unsafe_code)]
//! What is typed, on its way to the guest: standard input, the escape, a pipe.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, raise};

use super::console::{Command, EscapeFilter, RawTerminal};
use crate::spec::Console;

/// Limit: what is taken from standard input at once; no more is taken while it waits for the guest.
const CHUNK_BYTES: usize = 1024;

/// The way from standard input to `bulkhead-vcpu`.
#[derive(Debug)]
pub struct Input {
    /// `None`: nothing is read any more.
    pipe: Option<OwnedFd>,
    /// Not yet taken by the pipe.
    waiting: Vec<u8>,
    filter: EscapeFilter,
    terminal: Option<RawTerminal>,
    /// For the keeper, while there is that.
    to_restore: Option<Vec<u8>>,
    /// Instead of `pipe`, if there is nothing to type on: the guest's end is not to be told that nothing will ever come.
    idle: Option<OwnedFd>,
}

impl Input {
    /// Returns the guest's end, too.
    pub fn new(console: &Console) -> io::Result<(Self, OwnedFd)> {
        let mut input = Input {
            pipe: None,
            waiting: Vec::new(),
            filter: EscapeFilter::default(),
            terminal: None,
            to_restore: None,
            idle: None,
        };
        if *console != Console::Stdio {
            return Ok((input, File::open("/dev/null")?.into()));
        }
        let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&writing, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        input.pipe = Some(writing);
        Ok((input, reading))
    }

    /// With the pipe of an earlier supervisor. What is typed goes to the guest if standard input is the terminal to which
    /// the guest writes; what is typed on another one would be echoed there.
    pub fn adopt(pipe: Option<OwnedFd>, terminal: Option<u64>) -> Self {
        let attach = terminal.is_some() && terminal_of(stdin()) == terminal;
        let (pipe, idle) = if attach { (pipe, None) } else { (None, pipe) };
        Input {
            pipe,
            waiting: Vec::new(),
            filter: EscapeFilter::default(),
            terminal: None,
            to_restore: None,
            idle,
        }
    }

    /// Makes the terminal raw, if standard input is one and is the guest's.
    pub fn make_raw(&mut self) -> io::Result<()> {
        if self.pipe.is_some() {
            self.terminal = RawTerminal::enter()?;
            self.to_restore = self.terminal.as_ref().and_then(RawTerminal::to_restore);
        }
        Ok(())
    }

    /// The terminal that is raw, and what gives it back.
    pub fn raw_terminal(&self) -> Option<(BorrowedFd<'static>, &[u8])> {
        self.to_restore.as_deref().map(|to_restore| (stdin(), to_restore))
    }

    /// Gives the terminal back.
    pub fn restore(&mut self) {
        self.terminal = None;
        self.to_restore = None;
        self.pipe = None;
    }

    /// Stops this process as Ctrl-Z would, with the terminal as the shell wants it; goes on when it is continued.
    pub fn stop_and_go_on(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.suspend();
        }
        // Only a process that may not signal itself could fail here; then it does not stop.
        let _ = raise(Signal::SIGSTOP);
        if let Some(terminal) = &self.terminal {
            // A terminal that is gone ends us by SIGHUP.
            let _ = terminal.resume();
        }
    }

    /// The end of the pipe that is ours.
    pub fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().or(self.idle.as_ref()).map(AsFd::as_fd)
    }

    /// Standard input, if more of it can be taken.
    pub fn wants_typed(&self) -> Option<BorrowedFd<'static>> {
        (self.pipe.is_some() && self.waiting.is_empty()).then(stdin)
    }

    /// The pipe, if something waits for room in it.
    pub fn wants_pipe(&self) -> Option<BorrowedFd<'_>> {
        self.pipe
            .as_ref()
            .filter(|_| !self.waiting.is_empty())
            .map(AsFd::as_fd)
    }

    /// Standard input is readable.
    pub fn on_typed(&mut self) -> Option<Command> {
        let mut buffer = [0; CHUNK_BYTES];
        let typed = match nix::unistd::read(stdin(), &mut buffer) {
            Ok(0) => {
                self.pipe = None;
                return None;
            }
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(Errno::EINTR | Errno::EAGAIN) => return None,
            // As at its end: a terminal that is gone, for example.
            Err(_) => {
                self.pipe = None;
                return None;
            }
        };
        let command = if self.terminal.is_some() {
            self.filter.feed(typed, &mut self.waiting)
        } else {
            self.waiting.extend(typed);
            None
        };
        self.flush();
        command
    }

    /// Gives the pipe what it takes.
    pub fn flush(&mut self) {
        let Some(pipe) = &self.pipe else {
            return;
        };
        match nix::unistd::write(pipe, &self.waiting) {
            Ok(length) => {
                self.waiting.drain(..length.min(self.waiting.len()));
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // The guest's end is closed: nobody listens.
            Err(_) => {
                self.pipe = None;
                self.waiting.clear();
            }
        }
    }
}

/// The device number of a terminal.
pub fn terminal_of(fd: BorrowedFd<'_>) -> Option<u64> {
    let is_terminal = nix::unistd::isatty(fd).unwrap_or(false);
    let stat = is_terminal
        .then(|| nix::sys::stat::fstat(fd))
        .and_then(Result::ok)?;
    Some(stat.st_rdev)
}

fn stdin() -> BorrowedFd<'static> {
    use std::sync::LazyLock;
    static STDIN: LazyLock<io::Stdin> = LazyLock::new(io::stdin);
    STDIN.as_fd()
}
