#![forbid(unsafe_code)]
//! A process of ours that runs: its end (pidfd), its control socket, and the lines that it logs.
//!
//! Nothing here waits. A child is believed nothing: its lines are cut, stripped of control characters and limited in
//! rate; its messages are decoded by `vmbus::ipc`.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use sandbox::{Child, ExitCause, Identity, Lasting, Namespaces, Options, Profile, Spawn};
use vmbus::ipc::{Message, PeerFault, Socket, pair};

use super::program::Program;

/// Limit: characters of a line; the rest of a longer one follows as another line.
const MAX_LINE: usize = 1000;

/// Limit: lines a second of one process.
const LINES_PER_SECOND: u32 = 200;

/// Limit: the last lines, for the report of a death.
const TAIL_LINES: usize = 10;

/// A running child.
#[derive(Debug)]
pub struct Process {
    pub child: Child,
    /// `None` for a program that is not ours.
    pub control: Option<Socket>,
    pub log: LogPipe,
    pub started: Instant,
    /// Its flight recorder, if it has one.
    pub recorder: Option<OwnedFd>,
    /// `bulkhead-bus` was given the other end of this server's socket to it, and takes messages.
    pub introduced: bool,
}

impl Process {
    /// Starts a program of ours with a jail, in which it locks itself. `index` tells the VM's processes apart.
    pub fn start(program: &Path, jail: (Profile, Options), index: u32) -> Result<Self> {
        let program = Program::named(program.to_owned());
        Self::launch(&program, &[], (Namespaces::all(), None), jail, index)
    }

    /// The same with arguments, in these namespaces, of which some may have been made already.
    pub fn launch(
        program: &Program,
        args: &[&str],
        (namespaces, lasting): (Namespaces, Option<Arc<Lasting>>),
        jail: (Profile, Options),
        index: u32,
    ) -> Result<Self> {
        let file = program.file().map(|file| file.try_clone_to_owned()).transpose();
        let (ours, theirs) = pair().context("cannot make a socket pair")?;
        let (log, stderr) = pipe().context("cannot make a pipe")?;
        let child = sandbox::spawn(Spawn {
            program: program.path.clone(),
            file: file.context("cannot have another descriptor")?,
            args: args.iter().map(OsString::from).collect(),
            env: passed_on(),
            fds: vec![(theirs, sandbox::sys::fds::CONTROL)],
            namespaces,
            lasting,
            stderr: Some(stderr),
            identity: Identity::own(index),
            jail: Some(jail),
        })
        .with_context(|| format!("cannot start {}", program.path.display()))?;
        Ok(Process {
            child,
            control: Some(Socket::new(ours)),
            log: LogPipe::new(log),
            started: Instant::now(),
            recorder: None,
            introduced: false,
        })
    }

    /// A program that has no control socket.
    pub fn without_control(child: Child, log: OwnedFd) -> Self {
        Process {
            child,
            control: None,
            log: LogPipe::new(log),
            started: Instant::now(),
            recorder: None,
            introduced: false,
        }
    }

    /// One that an earlier supervisor has started.
    pub fn adopt(
        pid: i32,
        pidfd: OwnedFd,
        control: Option<OwnedFd>,
        log: Option<OwnedFd>,
        started: Instant,
    ) -> Self {
        Process {
            child: Child::adopt(nix::unistd::Pid::from_raw(pid), pidfd),
            control: control.map(Socket::new),
            log: LogPipe::adopt(log),
            started,
            recorder: None,
            introduced: false,
        }
    }

    /// Its next message; at the end of the socket none, and none any more. After a fault it is not heard any more either.
    pub fn receive<M: Message>(&mut self) -> Result<Option<M>, PeerFault> {
        let Some(control) = &mut self.control else {
            return Ok(None);
        };
        let received = match control.flush() {
            Ok(()) => control.recv(),
            Err(_) => Err(PeerFault::Eof),
        };
        if received.is_err() {
            self.control = None;
        }
        match received {
            Ok(message) => Ok(message.map(|(message, _)| message)),
            Err(PeerFault::Eof) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// How it ended, if it did. Somebody else who reaped it (nobody should) counts as an end.
    pub fn ended(&mut self) -> Option<ExitCause> {
        self.child.try_wait().unwrap_or(Some(ExitCause::Exited(-1)))
    }

    /// Whether a signal has ended it, or is about to: others see its sockets closed before its end shows here.
    pub fn is_killed(&mut self) -> bool {
        match self.ended() {
            Some(cause) => matches!(cause, ExitCause::Signaled { .. }),
            None => {
                let path = format!("/proc/{}/stat", self.child.pid);
                std::fs::read_to_string(path).is_ok_and(|stat| is_killed(&stat))
            }
        }
    }

    /// Kills it; its end shows at the pidfd.
    pub fn kill(&self) {
        // A process that cannot be killed has ended.
        let _ = self.child.kill();
    }

    /// What we hold of it, each by the last part of its name for the keeper.
    pub fn held(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        let end = Some(("end", self.child.as_fd()));
        let control = self.control.as_ref().map(|socket| ("control", socket.as_fd()));
        let log = self.log.fd.as_ref().map(|fd| ("log", fd.as_fd()));
        let recorder = self.recorder.as_ref().map(|fd| ("recorder", fd.as_fd()));
        [end, control, log, recorder].into_iter().flatten()
    }

    /// New lines that it logged.
    pub fn lines(&mut self) -> Vec<String> {
        self.log.read()
    }
}

/// From the text of `/proc/PID/stat` (proc(5)). A process that a signal ends is marked before it lets go of anything (Linux 6.1
/// kernel/signal.c `get_signal`).
fn is_killed(stat: &str) -> bool {
    /// linux/sched.h
    const PF_SIGNALED: u64 = 0x400;
    // A name may contain whatever one likes. After it: state, five numbers, the flags.
    let flags = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_SIGNALED != 0)
}

/// How a process of ours ended, and what it said last.
pub fn last_words(program: &str, process: &Process, cause: impl std::fmt::Display) -> String {
    let said = process
        .log
        .last_words()
        .map(|line| format!("; its last words: {line:?}"))
        .unwrap_or_default();
    format!("{program} {cause}{said}")
}

/// What of our environment the children get.
fn passed_on() -> Vec<(OsString, OsString)> {
    const NAMES: [&str; 1] = ["RUST_BACKTRACE"];
    NAMES
        .iter()
        .filter_map(|name| Some((name.into(), std::env::var_os(name)?)))
        .collect()
}

/// A pipe for a log, neither of whose ends blocks: (reading, writing). While there is no supervisor nobody reads, and a child
/// that has much to say must lose lines rather than wait.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?)
}

/// The reading end of a child's standard error.
#[derive(Debug)]
pub struct LogPipe {
    /// `None`: nothing more will come.
    pub fd: Option<OwnedFd>,
    partial: Vec<u8>,
    budget: Budget,
    tail: VecDeque<String>,
}

impl LogPipe {
    fn new(fd: OwnedFd) -> Self {
        Self::adopt(Some(fd))
    }

    fn adopt(fd: Option<OwnedFd>) -> Self {
        LogPipe {
            fd,
            partial: Vec::new(),
            budget: Budget::new(LINES_PER_SECOND, Instant::now()),
            tail: VecDeque::new(),
        }
    }

    /// Whole lines; at the end also an unfinished one.
    fn read(&mut self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let Some(fd) = &self.fd else {
            return Vec::new();
        };
        let open = match nix::unistd::read(fd.as_fd(), &mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                self.partial.extend(buffer.iter().take(length));
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Err(_) => false,
        };
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut self.partial, !open) {
            if self.tail.len() == TAIL_LINES {
                self.tail.pop_front();
            }
            self.tail.push_back(line.clone());
            match self.budget.spend(Instant::now()) {
                Spent::Yes => lines.push(line),
                Spent::FirstRefused => lines.push("(logs too much: some lines are left out)".to_owned()),
                Spent::No => {}
            }
        }
        if !open {
            self.fd = None;
        }
        lines
    }

    /// The last lines.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }

    /// The last line that tells of trouble: one of a log below warnings does not.
    pub fn last_words(&self) -> Option<&str> {
        let is_calm = |line: &&String| {
            [" INFO ", "DEBUG ", "TRACE "]
                .iter()
                .any(|level| line.starts_with(level))
        };
        self.tail
            .iter()
            .rev()
            .find(|line| !is_calm(line))
            .map(String::as_str)
    }
}

/// Takes a line from the front. With `all`, an unfinished one counts.
fn next_line(bytes: &mut Vec<u8>, all: bool) -> Option<String> {
    let newline = bytes.iter().take(MAX_LINE).position(|&byte| byte == b'\n');
    let (length, skip) = match newline {
        Some(at) => (at, at + 1),
        None if bytes.len() >= MAX_LINE => (MAX_LINE, MAX_LINE),
        None if all && !bytes.is_empty() => (bytes.len(), bytes.len()),
        None => return None,
    };
    let rest = bytes.split_off(skip);
    let line = std::mem::replace(bytes, rest);
    let text = String::from_utf8_lossy(line.get(..length).unwrap_or_default()).into_owned();
    Some(printable(&text))
}

/// Without control characters: a child must not be able to write escape sequences to a person's terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// A rate of lines, or of other things to be told.
#[derive(Debug)]
pub struct Budget {
    per_second: u32,
    second: Instant,
    spent: u32,
}

/// Whether it is told.
#[derive(Debug, PartialEq, Eq)]
pub enum Spent {
    Yes,
    /// It is not, as the first one of its second.
    FirstRefused,
    No,
}

impl Budget {
    pub fn new(per_second: u32, now: Instant) -> Self {
        Budget {
            per_second,
            second: now,
            spent: 0,
        }
    }

    pub fn spend(&mut self, now: Instant) -> Spent {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            *self = Budget::new(self.per_second, now);
        }
        self.spent = self.spent.saturating_add(1);
        match self.spent.checked_sub(self.per_second) {
            None | Some(0) => Spent::Yes,
            Some(1) => Spent::FirstRefused,
            Some(_) => Spent::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_cleaned() {
        let mut bytes = b"one\ntwo \x1b[31mred\nthr".to_vec();
        assert_eq!(next_line(&mut bytes, false).as_deref(), Some("one"));
        assert_eq!(
            next_line(&mut bytes, false).as_deref(),
            Some("two \u{fffd}[31mred")
        );
        assert_eq!(next_line(&mut bytes, false), None);
        bytes.extend(b"ee");
        assert_eq!(next_line(&mut bytes, true).as_deref(), Some("three"));
        assert_eq!(next_line(&mut bytes, true), None);
        let mut long = vec![b'x'; 2500];
        let lengths: Vec<_> = std::iter::from_fn(|| next_line(&mut long, true))
            .map(|line| line.len())
            .collect();
        assert_eq!(lengths, [1000, 1000, 500]);
    }

    #[test]
    fn a_flood_of_lines_is_cut_to_a_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(LINES_PER_SECOND, start);
        let spent: Vec<_> = (0..1000).map(|_| budget.spend(start)).collect();
        assert_eq!(spent.iter().filter(|spent| **spent == Spent::Yes).count(), 200);
        assert_eq!(
            spent
                .iter()
                .filter(|spent| **spent == Spent::FirstRefused)
                .count(),
            1
        );
        assert_eq!(budget.spend(start + Duration::from_secs(1)), Spent::Yes);
    }

    #[test]
    fn that_a_signal_ends_a_process_shows_before_it_is_reaped() {
        use nix::sys::signal::{Signal, kill};
        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        for (script, signal, expected) in [
            ("exec sleep 1000", Some(Signal::SIGKILL), true),
            ("exit 1", None, false),
        ] {
            let mut child = std::process::Command::new("/bin/sh")
                .args(["-c", script])
                .spawn()
                .expect("started");
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("not reaped");
            assert!(!is_killed(&stat()));
            if let Some(signal) = signal {
                kill(pid, signal).expect("sent");
            }
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).expect("it ends");
            assert_eq!(is_killed(&stat()), expected, "{script}");
            child.wait().expect("reaped");
        }
        assert!(is_killed("7 (a) b) Z 1 7 7 0 -1 4228364 0"));
        assert!(!is_killed("7 (a) b) Z 1 7 7 0 -1 4227340 0"));
        assert!(!is_killed("nonsense"));
    }

    #[test]
    fn why_a_process_cannot_be_started_is_said_once() {
        let spawn = sandbox::spawn(sandbox::Spawn {
            program: "/nowhere/bulkhead-block".into(),
            file: None,
            args: Vec::new(),
            env: Vec::new(),
            fds: Vec::new(),
            namespaces: sandbox::Namespaces::none(),
            lasting: None,
            stderr: None,
            identity: sandbox::Identity::Keep,
            jail: None,
        });
        let error = spawn
            .context("cannot start a server")
            .err()
            .map(|error| format!("{error:#}"));
        assert_eq!(
            error.as_deref(),
            Some(
                "cannot start a server: cannot open /nowhere/bulkhead-block: No such file or directory (os error 2)"
            )
        );
    }

    #[test]
    fn a_child_that_nobody_listens_to_does_not_wait() {
        let (_reading, writing) = pipe().expect("a pipe");
        let full = (0..1000).find_map(|_| nix::unistd::write(&writing, &[b'x'; 4096]).err());
        assert_eq!(full, Some(Errno::EAGAIN));
    }

    #[test]
    fn what_a_child_said_last_is_kept() {
        let (reading, writing) = pipe().expect("a pipe");
        let mut log = LogPipe::new(reading);
        assert_eq!(log.read(), Vec::<String>::new());
        for number in 0..12 {
            nix::unistd::write(&writing, format!("line {number}\n").as_bytes()).expect("written");
        }
        nix::unistd::write(&writing, b"last words").expect("written");
        drop(writing);
        assert_eq!(log.read().len(), 12);
        assert_eq!(log.read(), ["last words"]);
        assert!(log.fd.is_none());
        assert_eq!(log.tail.len(), TAIL_LINES);
        assert_eq!(log.last_words(), Some("last words"));
        log.tail.push_back(" INFO all is well".to_owned());
        assert_eq!(log.last_words(), Some("last words"));
    }
}
