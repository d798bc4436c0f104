//! What stands in for `bulkhead-vcpu`, `bulkhead-bus` and passt: children of the supervisor that hand their sockets to the
//! harness.
//!
//! The console's output is a socket to the harness, because the harness made it the supervisor's standard output.
//! So the harness itself answers the supervisor, with one clock for kills and completions, and this process only lives
//! as long as the harness wants the VM to live, or as long as the harness lives. `bulkhead-bus` gives its own socket to
//! `bulkhead-vcpu`, which hands both over, and lives as long as that one.
//!
//! passt is given one end of a stream and nothing else. The one played here is found by the supervisor in a folder that
//! the harness has put in front of its PATH, and beside itself it finds the socket at which the harness waits for it.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmbus::ipc::server_start::NamedFds;
use vmbus::ipc::{Message, Socket, SupervisorToBus, SupervisorToVcpu};
use vmm_core::supervisor::control::connect_to;

/// The names under which xtask plays these parts.
pub const VCPU: &str = "bulkhead-vcpu";
pub const BUS: &str = "bulkhead-bus";
pub const PASST: &str = "passt";

/// Beside the played passt: where the harness listens.
pub const NETWORK_SOCKET: &str = "network";

/// passt's end of the stream, as `--fd` says.
const PASST_FD: i32 = 3;

/// The one message of whoever hands a socket over. Comes with it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    /// Of a kind that a decoder can tell from nothing at all.
    mark: u32,
}

impl Message for Handover {
    fn name(&self) -> &'static str {
        "Handover"
    }

    fn descriptor_count(&self) -> usize {
        1
    }
}

/// If this program was started under one of those names: plays that part, to its end.
pub fn main(program: &str) -> Option<ExitCode> {
    let path = Path::new(program);
    let (name, result) = match path.file_name()?.to_str()? {
        VCPU => (VCPU, play_vcpu()),
        BUS => (BUS, play_bus()),
        PASST => (PASST, play_passt(path)),
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("played {name}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn play_passt(program: &Path) -> Result<()> {
    let this = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let stream =
        pidfd_getfd(&this, PASST_FD, PidfdGetfdFlags::empty()).context("no stream was handed over")?;
    let folder = program.parent().context("a program without a folder")?;
    let harness = connect_to(&folder.join(NETWORK_SOCKET))?;
    let mut line = harness.context("nobody waits for a network")?;
    line.send(&Handover { mark: 1 }, &[stream.as_fd()])?;
    wait_readable(&line, None)?;
    Ok(())
}

fn play_vcpu() -> Result<()> {
    let mut control = Socket::new(sandbox::inherited_control_fd()?);
    let deadline = Instant::now() + super::PATIENCE;
    let (message, fds) = receive(&mut control, deadline)?;
    let SupervisorToVcpu::Start { fds: names, .. } = message else {
        bail!("the supervisor begins with {}", message.name());
    };
    let mut fds = NamedFds::new(names, fds)?;
    let mut line = Socket::new(fds.take("console-out")?);
    let mut bus = Socket::new(fds.take("bus")?);
    let (_, bus_control) = receive::<Handover>(&mut bus, deadline)?;
    let bus_control = bus_control.first().context("bulkhead-bus hands nothing over")?;
    line.send(&Handover { mark: 1 }, &[control.as_fd()])?;
    line.send(&Handover { mark: 1 }, &[bus_control.as_fd()])?;
    drop((control, fds));
    // The harness never says anything: its end is what there is to hear.
    wait_readable(&line, None)?;
    Ok(())
}

fn play_bus() -> Result<()> {
    let mut control = Socket::new(sandbox::inherited_control_fd()?);
    let deadline = Instant::now() + super::PATIENCE;
    let (message, fds) = receive(&mut control, deadline)?;
    let SupervisorToBus::Start { .. } = message else {
        bail!("the supervisor begins with {}", message.name());
    };
    let vcpu = fds.into_iter().next().context("no socket was handed over")?;
    let mut vcpu = Socket::new(vcpu);
    vcpu.send(&Handover { mark: 1 }, &[control.as_fd()])?;
    drop(control);
    wait_readable(&vcpu, None)?;
    Ok(())
}

/// The next message, before the deadline.
pub(super) fn receive<M: Message>(socket: &mut Socket, deadline: Instant) -> Result<(M, Vec<OwnedFd>)> {
    loop {
        if let Some(received) = socket.recv::<M>()? {
            return Ok(received);
        }
        if !wait_readable(socket, Some(deadline))? {
            bail!("nothing was heard in time");
        }
    }
}

/// Waits until `fd` is readable or at its end. `false`: the deadline has passed.
pub(super) fn wait_readable(fd: &impl AsFd, deadline: Option<Instant>) -> Result<bool> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until one of them is readable or at its end, or the deadline has passed.
pub(super) fn wait_any(fds: [&Socket; 2], deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut list = fds.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
    match poll(&mut list, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits for the end of a process of ours that is not reaped yet. `false`: the deadline has passed.
pub(super) fn wait_end(pid: Pid, deadline: Instant) -> Result<bool> {
    let pid = rustix::process::Pid::from_raw(pid.as_raw()).context("no process has that number")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch a process")?;
    wait_readable(&pidfd, Some(deadline))
}
