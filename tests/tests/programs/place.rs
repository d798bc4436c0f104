#![forbid(unsafe_code)]
//! A place for a VM of real programs.

use bulkhead_tests::kill::played::{NETWORK_SOCKET, PASST};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmbus::ipc::Socket;
use vmm_core::pc::boot::halting_kernel;
use vmm_core::supervisor::control::{Listener, Reply, Request, connect_to};

/// Limit: for everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is looked for, with a deadline.
pub fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Some(found) => return found,
            None => assert!(Instant::now() < deadline, "not in time"),
        }
        std::thread::yield_now();
    }
}

/// A program that behaves as if this host lacked a feature.
pub fn without(feature: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["without", feature]);
    command
}

/// A folder with a kernel, a network at which nobody is, and the VM's folder.
pub struct Place {
    pub folder: TempDir,
    _network: Listener,
}

/// A supervisor, ended with its VM when this is dropped: by a test that fails.
pub struct Running {
    pub child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let (Ok(None), Ok(process)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            let process = nix::unistd::Pid::from_raw(process);
            nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM).ok();
            self.child.wait().ok();
        }
    }
}

impl Running {
    /// What it said, to its end.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let stderr = self.child.stderr.as_mut().expect("piped");
        stderr.read_to_string(&mut said).expect("text");
        (self.child.wait().expect("ours").code(), said)
    }
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("kernel"), halting_kernel()).expect("written");
        let network = Listener::bind(&folder.path().join(NETWORK_SOCKET)).expect("bound");
        symlink(env!("CARGO_BIN_EXE_xtask"), folder.path().join(PASST)).expect("linked");
        Place {
            folder,
            _network: network,
        }
    }

    /// `bulkhead run` of a VM with a disk and a network interface, perhaps as if this host lacked a feature.
    pub fn start(&self, programs: &Path, lacking: Option<&str>, flags: &[&str]) -> Running {
        let folder = self.folder.path();
        let path = std::env::var("PATH").unwrap_or_default();
        let bulkhead = programs.join("bulkhead");
        let mut command = match lacking {
            None => Command::new(bulkhead),
            Some(feature) => {
                let mut command = without(feature);
                command.arg(bulkhead);
                command
            }
        };
        command
            .args(["run", "--name", "vm", "--memory", "64M", "--console", "none"])
            .args(["--disk", "memory=1M", "--net", "user", "--kernel"])
            .arg(folder.join("kernel"))
            .arg("--run-folder")
            .arg(folder.join("run"))
            .args(flags)
            .env("PATH", format!("{}:{path}", folder.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        Running {
            child: command.spawn().expect("cargo builds xtask before its tests"),
        }
    }

    /// Says something to the VM once it is there.
    pub fn ask(&self, running: &mut Running, request: &Request) -> Reply {
        let deadline = Instant::now() + PATIENCE;
        let control = self.folder.path().join("run/vm/control");
        loop {
            if running.child.try_wait().expect("ours").is_some() {
                panic!("no answer: {}", running.end().1);
            }
            assert!(Instant::now() < deadline, "no answer");
            let Ok(Some(mut socket)) = connect_to(&control) else {
                std::thread::yield_now();
                continue;
            };
            socket.send(request, &[]).expect("sent");
            if let Some(reply) = answer(&mut socket, deadline) {
                return reply;
            }
        }
    }

    /// The status of a VM whose guest runs.
    pub fn wait_until_it_runs(&self, running: &mut Running) -> Reply {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.ask(running, &Request::Status) {
                Reply::Status {
                    supervisor,
                    state,
                    processes,
                } if state == "running" => {
                    return Reply::Status {
                        supervisor,
                        state,
                        processes,
                    };
                }
                other => assert!(Instant::now() < deadline, "{other:?}"),
            }
        }
    }
}

fn answer(socket: &mut Socket, deadline: Instant) -> Option<Reply> {
    while Instant::now() < deadline {
        match socket.recv::<Reply>() {
            Ok(None) => std::thread::yield_now(),
            Ok(Some((reply, _))) => return Some(reply),
            Err(_) => return None,
        }
    }
    None
}
