//! A VM of the real supervisor and real servers, and how it ends whatever happens.
//!
//! Its `bulkhead-vcpu` is [`super::played`]. That process ends when the harness closes its line or ends itself, however
//! it ends; the supervisor takes that for the end of the VM and ends the servers.

#![forbid(unsafe_code)]

use super::PATIENCE;
use super::played::{self, Handover, receive, wait_readable};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::SigSet;
use nix::unistd::Pid as NixPid;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmbus::ipc::Socket;
use vmm_core::pc::boot::halting_kernel;
use vmm_core::supervisor::adopt::DISOWNED;
use vmm_core::supervisor::control::{Listener, Reply, Request, connect_to};

/// Limit: what the supervisor may take to end a VM; it allows its children three seconds twice.
const END: Duration = Duration::from_secs(15);

/// Where the supervisor expects the processes that the harness plays.
pub struct Sockets {
    pub vcpu: Socket,
    pub bus: Socket,
}

/// A running VM.
pub struct Vm {
    supervisor: Child,
    /// Its program.
    program: PathBuf,
    /// The played `bulkhead-vcpu` lives until this is closed. `None`: it is.
    line: Option<Socket>,
    control: Socket,
    /// Where a played passt comes.
    network: Listener,
    /// The played passt lives until this is closed.
    passt: Option<Socket>,
    log: Log,
    folder: TempDir,
}

impl Vm {
    /// Starts the VM; also returns the sockets on which the supervisor expects `bulkhead-vcpu` and `bulkhead-bus`.
    ///
    /// * `programs`: where `bulkhead` and the servers are; `bulkhead-vcpu` and `bulkhead-bus` are played by the running
    ///   program;
    /// * `server`: the name of a program and the file that runs instead of the one among `programs`;
    /// * `flags`: what `bulkhead run` is told besides.
    pub fn start(
        programs: &Path,
        server: Option<(&str, &Path)>,
        flags: &[String],
    ) -> Result<(Self, Sockets)> {
        let programs = &programs
            .canonicalize()
            .with_context(|| format!("there is no folder {}", programs.display()))?;
        let folder = tempfile::Builder::new().prefix("bulkhead-kill-").tempdir()?;
        let parts = folder.path().join("programs");
        std::fs::create_dir(&parts)?;
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        for (name, target) in [
            ("bulkhead-block", programs.join("bulkhead-block")),
            ("bulkhead-net", programs.join("bulkhead-net")),
            (played::VCPU, this.clone()),
            (played::BUS, this.clone()),
        ] {
            let target = match server {
                Some((other, file)) if other == name => file.to_owned(),
                _ => target,
            };
            ensure!(target.exists(), "there is no {}: build it", target.display());
            symlink(target, parts.join(name))?;
        }
        let network = folder.path().join("network");
        std::fs::create_dir(&network)?;
        symlink(this, network.join(played::PASST))?;
        let passt_first = std::env::join_paths(
            [network.clone()]
                .into_iter()
                .chain(std::env::var_os("PATH").iter().flat_map(std::env::split_paths)),
        )?;
        let network = Listener::bind(&network.join(played::NETWORK_SOCKET))?;
        // The supervisor wants one; nobody boots it.
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, halting_kernel())?;
        let (line, stdout) = vmbus::ipc::pair()?;
        let mut command = Command::new(programs.join("bulkhead"));
        command.args(["run", "--name", NAME, "--restart", "always"]);
        // The played bulkhead-bus shares a thread with the guest, which may wait for a server.
        let patience = PATIENCE.as_secs() * 2 / 3;
        command.arg("--patience").arg(patience.to_string());
        command.arg("--kernel").arg(&kernel);
        command.arg("--programs").arg(&parts);
        command.arg("--run-folder").arg(folder.path().join("run"));
        command.args(flags).env("PATH", passt_first);
        command.stdout(Stdio::from(stdout));
        let mut log = Log::default();
        let supervisor = start_supervisor(command, &mut log)?;
        // From here on a failure ends what was started.
        let mut starting = Starting {
            supervisor: Some(supervisor),
        };
        let mut line = Socket::new(line);
        let deadline = Instant::now() + PATIENCE;
        let mut handed = || {
            let (_, mut fds) = receive::<Handover>(&mut line, deadline)
                .with_context(|| format!("no VM was started: {}", log.last_lines()))?;
            let socket = fds.pop().context("no socket was handed over")?;
            anyhow::Ok(Socket::new(socket))
        };
        let sockets = Sockets {
            vcpu: handed()?,
            bus: handed()?,
        };
        let control = connect(&folder)?;
        let supervisor = starting.supervisor.take().context("started above")?;
        let vm = Self {
            supervisor,
            program: programs.join("bulkhead"),
            line: Some(line),
            control,
            network,
            passt: None,
            log,
            folder,
        };
        Ok((vm, sockets))
    }

    /// The network's end of the stream that the servers of an interface `user` get, once.
    pub fn network(&mut self) -> Result<UnixStream> {
        let deadline = Instant::now() + PATIENCE;
        ensure!(
            wait_readable(&self.network, Some(deadline))?,
            "the supervisor starts no passt: {}",
            self.last_lines()
        );
        let mut line = self.network.accept()?.context("the played passt is gone")?;
        let (_, mut fds) = receive::<Handover>(&mut line, deadline)?;
        self.passt = Some(line);
        let stream = fds.pop().context("no stream was handed over")?;
        Ok(UnixStream::from(stream))
    }

    /// The journal of the device, which the supervisor holds.
    pub fn journal(&self) -> Result<File> {
        let folder = format!("/proc/{}/fd", self.supervisor.id());
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot look into {folder}"))? {
            let path = entry?.path();
            let target = std::fs::read_link(&path).unwrap_or_default();
            if target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"/memfd:bulkhead-journal")
            {
                let journal = File::options().read(true).write(true).open(&path);
                return journal.context("cannot open the supervisor's journal");
            }
        }
        bail!("the supervisor has no journal")
    }

    /// Where the supervisor listens.
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.folder)
    }

    /// The process that serves `device` now, or that will once its dead predecessor's I/O is over; `None` while there
    /// is neither.
    pub fn server(&mut self, device: &str) -> Result<Option<Victim>> {
        self.control.send(&Request::Devices, &[])?;
        let (reply, _) = receive::<Reply>(&mut self.control, Instant::now() + PATIENCE)?;
        let Reply::Devices(lines) = reply else {
            bail!("the supervisor answers {reply:?}");
        };
        let line = lines.into_iter().find(|line| line.name == device);
        let found = line.and_then(|line| match line.process {
            Some(pid) => Some((line.generation, pid)),
            None => line.successor.map(|(_, generation, pid)| (generation, pid)),
        });
        let Some((generation, pid)) =
            found.and_then(|(generation, pid)| Some((generation, Pid::from_raw(pid)?)))
        else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Victim {
                pid: pid.as_raw_nonzero().get(),
                generation,
                pidfd,
            })),
            // It has just ended, and its parent has looked after it.
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno).context("cannot watch a server"),
        }
    }

    /// Replaces the server of `device`, as `bulkhead device swap` does; how long nobody served, as the supervisor sees it.
    pub fn swap(&mut self, device: &str) -> Result<Duration> {
        let request = Request::Swap {
            device: device.to_owned(),
            program: None,
            patience_s: PATIENCE.as_secs() as u32,
        };
        self.control.send(&request, &[])?;
        match receive::<Reply>(&mut self.control, Instant::now() + 2 * PATIENCE)?.0 {
            Reply::Swapped {
                stall_us,
                mishap: None,
                ..
            } => Ok(Duration::from_micros(stall_us)),
            other => bail!("a swap is answered with {other:?}"),
        }
    }

    /// Whether a successor of `device`'s server waits.
    pub fn has_standby(&mut self, device: &str) -> Result<bool> {
        self.control.send(&Request::Devices, &[])?;
        match receive::<Reply>(&mut self.control, Instant::now() + PATIENCE)?.0 {
            Reply::Devices(lines) => Ok(lines.into_iter().any(|line| {
                line.name == device && line.successor.is_some_and(|(state, ..)| state == "waits")
            })),
            other => bail!("the supervisor answers {other:?}"),
        }
    }

    /// Kills the supervisor, and has another one adopt the VM after `meanwhile`.
    pub fn replace_supervisor(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        self.supervisor.kill()?;
        self.supervisor.wait()?;
        meanwhile()?;
        let mut command = Command::new(&self.program);
        command.args(["adopt", NAME, "--run-folder"]);
        command.arg(self.folder.path().join("run"));
        command.stdout(Stdio::null());
        self.supervisor = start_supervisor(command, &mut self.log)?;
        // The socket is the same, and its keeper has kept it: what is asked now waits there for the adopter.
        self.control = connect(&self.folder)?;
        Ok(())
    }

    /// Lets the VM end, after its played vCPU process has said why; the supervisor's last lines if it was not content.
    /// Else the generations of servers that adopters say to have killed by themselves.
    pub fn end(mut self) -> Result<BTreeSet<u32>> {
        self.line = None;
        let deadline = Instant::now() + END;
        let status = loop {
            if let Some(status) = self.supervisor.try_wait()? {
                break status;
            }
            ensure!(
                played::wait_end(NixPid::from_raw(self.supervisor.id() as i32), deadline)?,
                "the supervisor does not end"
            );
        };
        ensure!(
            status.success(),
            "the supervisor ended with {status}: {}",
            self.last_lines()
        );
        Ok(self.log.finish())
    }

    /// What the supervisor said last.
    pub fn last_lines(&self) -> String {
        self.log.last_lines()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        (self.line, self.passt) = (None, None);
        end_child(&mut self.supervisor);
    }
}

/// Ends a supervisor that did not come far enough to be a [`Vm`].
struct Starting {
    supervisor: Option<Child>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(supervisor) = &mut self.supervisor {
            end_child(supervisor);
        }
    }
}

/// A server's process, by its pidfd: the number may be another's by now, this is not.
pub struct Victim {
    /// To tell it from others.
    pub pid: i32,
    pub generation: u32,
    pidfd: OwnedFd,
}

impl Victim {
    /// Sends it a signal; whether it was there to get it.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(errno) => Err(errno).context("cannot kill a server"),
        }
    }
}

/// The VM's name, unique within its own folder.
const NAME: &str = "kill";

fn control_socket(folder: &TempDir) -> PathBuf {
    folder.path().join("run").join(NAME).join("control")
}

fn connect(folder: &TempDir) -> Result<Socket> {
    connect_to(&control_socket(folder))?.context("the supervisor does not listen")
}

/// Starts a supervisor whose standard output is decided on, and listens to what it says.
fn start_supervisor(mut command: Command, log: &mut Log) -> Result<Child> {
    let (heard, stderr) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stderr(stderr)
        // A person's Ctrl-C is for the harness.
        .process_group(0);
    let mask = SigSet::thread_get_mask()?;
    SigSet::empty().thread_set_mask()?;
    let supervisor = command.spawn();
    mask.thread_set_mask()?;
    let program = Path::new(command.get_program()).display();
    let supervisor = supervisor.with_context(|| format!("cannot start {program}"))?;
    log.follow(heard);
    // Of the descriptors of the other ends only those of the children are left: the command goes.
    Ok(supervisor)
}

/// Asks politely, then kills. The servers end with their supervisor or with the played vCPU process.
fn end_child(child: &mut Child) {
    let pid = NixPid::from_raw(child.id() as i32);
    for signal in [
        nix::sys::signal::Signal::SIGTERM,
        nix::sys::signal::Signal::SIGKILL,
    ] {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Not reaped yet, so the number is still its own. One that has ended needs no signal.
        nix::sys::signal::kill(pid, signal).ok();
        played::wait_end(pid, Instant::now() + END).ok();
    }
    child.try_wait().ok();
}

/// Limit: lines of the supervisor's that are kept. It says several of each death.
const LINES: usize = 12;

/// What supervisors say.
#[derive(Default)]
struct Log {
    said: Arc<Mutex<Said>>,
    listeners: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Said {
    /// The last ones.
    lines: VecDeque<String>,
    /// See [`disowned`].
    disowned: BTreeSet<u32>,
}

impl Log {
    /// Reads until nobody writes any more.
    fn follow(&mut self, heard: PipeReader) {
        let said = Arc::clone(&self.said);
        self.listeners.push(std::thread::spawn(move || {
            for line in BufReader::new(heard).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).into_owned();
                let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                said.disowned.extend(disowned(&line));
                said.lines.push_back(line);
                if said.lines.len() > LINES {
                    said.lines.pop_front();
                }
            }
        }));
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_lines(&self) -> String {
        let said = self.said();
        let lines: Vec<&str> = said.lines.iter().map(String::as_str).collect();
        lines.join("\n  | ")
    }

    /// After the supervisors' ends: all servers that they have disowned.
    fn finish(&mut self) -> BTreeSet<u32> {
        for listener in self.listeners.drain(..) {
            listener.join().ok();
        }
        std::mem::take(&mut self.said().disowned)
    }
}

/// The server that an adopter says to have killed because its predecessor was killed when it started it.
fn disowned(line: &str) -> Option<u32> {
    let (_, rest) = line.split_once(" (server ")?;
    let (generation, rest) = rest.split_once(") ")?;
    let is_disowned = rest.contains(DISOWNED);
    generation.parse().ok().filter(|_| is_disowned)
}
