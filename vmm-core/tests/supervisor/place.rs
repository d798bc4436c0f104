#![forbid(unsafe_code)]
//! A place for a supervisor and its VM, and what can be asked of them.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vmbus::ipc::Socket;
use vmm_core::pc::boot::halting_kernel;
use vmm_core::supervisor::control::{Reply, Request, connect_to};
use vmm_core::supervisor::keeper::is_orphaned;

/// Limit: for everything that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A place with played programs, a kernel and a folder for running VMs.
pub struct Place {
    pub folder: TempDir,
}

/// A supervisor that runs, and is ended with its VM when this is dropped: by a test that fails.
pub struct Running {
    pub child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if matches!(self.child.try_wait(), Ok(None)) {
                self.signal(signal);
                self.ends();
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A test that fails may have killed the supervisor of a VM that goes on.
        if std::thread::panicking() && is_orphaned(&self.path("run/vm")).unwrap_or(false) {
            let mut adopter = self.adopt("vm");
            // What is asked now waits for it.
            if let Ok(Some(mut socket)) = connect_to(&self.control()) {
                socket.send(&Request::Stop, &[]).ok();
                adopter.ends();
            }
        }
    }
}

/// A supervisor that ended.
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let this = std::env::current_exe().expect("known");
        for program in ["bulkhead-vcpu", "bulkhead-bus", "bulkhead-block"] {
            symlink(&this, folder.path().join(program)).expect("linked");
        }
        std::fs::write(folder.path().join("kernel"), halting_kernel()).expect("written");
        Place { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn control(&self) -> PathBuf {
        self.path("run/vm/control")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .args(["run", "--memory", "64M", "--name", "vm"])
            .arg("--kernel")
            .arg(self.path("kernel"))
            .arg("--programs")
            .arg(self.folder.path())
            .arg("--run-folder")
            .arg(self.path("run"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn adopt(&self, name: &str) -> Running {
        let mut command = self.adopt_command(name, Path::new(env!("CARGO_BIN_EXE_bulkhead")));
        Running {
            child: command.spawn().expect("started"),
        }
    }

    /// `bulkhead` is the program.
    pub fn adopt_command(&self, name: &str, bulkhead: &Path) -> Command {
        let mut command = Command::new(bulkhead);
        command
            .args(["adopt", name, "--run-folder"])
            .arg(self.path("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn start(&self, args: &[&str]) -> Running {
        Running {
            child: self.command(args).spawn().expect("started"),
        }
    }

    pub fn run(&self, args: &[&str]) -> Ended {
        let ended = self.start(args).wait();
        self.expect_ended();
        ended
    }

    /// Nothing is left of the VM but what happened.
    #[track_caller]
    pub fn expect_ended(&self) {
        for entry in std::fs::read_dir(self.path("run/vm")).into_iter().flatten() {
            let name = entry.expect("an entry").file_name();
            assert!(name == "events.jsonl" || name == "crashes", "{name:?} is left");
        }
    }

    /// Asks the supervisor, which may still be starting.
    pub fn ask(&self, request: &Request) -> Vec<Reply> {
        let mut socket = self.connect();
        socket.send(request, &[]).expect("sent");
        replies(&mut socket)
    }

    pub fn connect(&self) -> Socket {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The socket's appearance is no event that one could wait for; it is looked for, with a deadline.
            match connect_to(&self.control()) {
                Ok(Some(socket)) => break socket,
                Ok(None) | Err(_) if Instant::now() < deadline => std::thread::yield_now(),
                other => panic!("no control socket: {other:?}"),
            }
        }
    }

    pub fn wait_until_it_runs(&self) -> Vec<(String, i32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match &self.ask(&Request::Status)[..] {
                [Reply::Status { state, processes, .. }] if state == "running" => return processes.clone(),
                other => assert!(Instant::now() < deadline, "{other:?}"),
            }
        }
    }
}

impl Running {
    /// Waits for its end for as long as it may take.
    pub fn ends(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(15);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }

    pub fn wait(mut self) -> Ended {
        let mut stdout = String::new();
        let mut stderr = String::new();
        if let Some(mut pipe) = self.child.stdout.take() {
            pipe.read_to_string(&mut stdout).expect("read");
        }
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut stderr).expect("read");
        }
        let status = self.child.wait().expect("waited");
        Ended {
            status,
            stdout,
            stderr,
        }
    }

    /// Kills the supervisor and nobody else; what it said.
    pub fn kill(mut self) -> String {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited");
        let mut stderr = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut stderr).expect("read");
        }
        stderr
    }

    /// It may have ended already.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).ok();
    }
}

impl Ended {
    #[track_caller]
    pub fn expect(&self, status: i32, stderr: &str) {
        assert_eq!(self.status.code(), Some(status), "{}", self.stderr);
        assert!(
            self.stderr.contains(stderr),
            "{:?} is not in {:?}",
            stderr,
            self.stderr
        );
    }
}

/// All answers to one question.
pub fn replies(socket: &mut Socket) -> Vec<Reply> {
    let mut replies = Vec::new();
    loop {
        match socket.recv::<Reply>() {
            Ok(Some((reply, _))) => {
                let last = !matches!(reply, Reply::Entries(_));
                replies.push(reply);
                if last {
                    return replies;
                }
            }
            Ok(None) => {
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                assert_ne!(poll(&mut fds, PollTimeout::from(30_000_u16)), Ok(0), "no answer");
            }
            Err(_) => return replies,
        }
    }
}

pub fn is_gone(process: i32) -> bool {
    kill(Pid::from_raw(process), None).is_err()
}
