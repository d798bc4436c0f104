#![forbid(unsafe_code)]
//! `bulkhead list`, `inspect` and `stop`: talking to the supervisor of a running VM.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmbus::ipc::{PeerFault, Socket};

use crate::spec::Name;
use crate::supervisor::control::{MAX_CLIENTS, Reply, Request, connect_to};
use crate::supervisor::folder::{base, control_socket};
use crate::supervisor::keeper::is_orphaned;

/// Limit: how long an answer is waited for. A supervisor answers within a second, and ends a VM within seven.
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) fn list() -> Result<()> {
    let entries = match std::fs::read_dir(base()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("cannot read {}: {error}", base().display()),
    };
    let mut names: Vec<Name> = Vec::new();
    for entry in entries {
        // What is no name is not of ours.
        names.extend(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    names.sort();
    for name in names {
        if is_orphaned(&base().join(name.as_str())).unwrap_or(false) {
            println!("{name} orphaned");
            continue;
        }
        let Some(mut socket) = connect_to(&control_socket(&base(), &name))? else {
            continue;
        };
        let Ok(Reply::Status {
            supervisor,
            state,
            processes,
        }) = ask(&mut socket, &Request::Status)
        else {
            continue;
        };
        let processes: Vec<String> = processes
            .iter()
            .map(|(name, process)| format!("{name}={process}"))
            .collect();
        println!("{name} {state} supervisor={supervisor} {}", processes.join(" "));
    }
    Ok(())
}

pub(super) fn inspect(vm: &Name, path: Option<&str>) -> Result<()> {
    let mut socket = connect(vm)?;
    let mut reply = ask(&mut socket, &Request::Inspect)?;
    let mut found = false;
    loop {
        match reply {
            Reply::Entries(entries) => {
                for (key, value) in entries
                    .iter()
                    .filter(|(key, _)| path.is_none_or(|path| key.starts_with(path)))
                {
                    println!("{key} = {value}");
                    found = true;
                }
            }
            Reply::Done => break,
            other => bail!("{vm} answers {other:?}"),
        }
        reply = receive(&mut socket)?;
    }
    match path {
        Some(path) if !found => bail!("{vm} knows nothing that begins with {path}"),
        _ => Ok(()),
    }
}

pub(super) fn stop(vm: &Name, power_button: bool) -> Result<()> {
    let mut socket = connect(vm)?;
    let request = if power_button {
        Request::PowerButton
    } else {
        Request::Stop
    };
    match ask(&mut socket, &request)? {
        Reply::Done if power_button => return Ok(()),
        Reply::Done => {}
        other => bail!("{vm} answers {other:?}"),
    }
    // The supervisor closes the connection when nothing of the VM is left.
    match receive(&mut socket) {
        Err(error) if matches!(error.downcast_ref(), Some(PeerFault::Eof)) => Ok(()),
        Err(error) => Err(error),
        Ok(other) => Err(anyhow!("{vm} answers {other:?}")),
    }
}

pub(super) fn connect(vm: &Name) -> Result<Socket> {
    connect_below(vm, &base())
}

/// The same where the folders of VMs are elsewhere.
pub(super) fn connect_below(vm: &Name, base: &Path) -> Result<Socket> {
    if is_orphaned(&base.join(vm.as_str()))? {
        bail!("{vm} runs without a supervisor: `bulkhead adopt {vm}` takes it over");
    }
    connect_to(&control_socket(base, vm))?
        .ok_or_else(|| anyhow!("no VM named {vm} runs for this user (bulkhead list shows which do)"))
}

pub(super) fn ask(socket: &mut Socket, request: &Request) -> Result<Reply> {
    socket.send(request, &[])?;
    receive(socket)
}

pub(super) fn receive(socket: &mut Socket) -> Result<Reply> {
    receive_within(socket, PATIENCE)
}

pub(super) fn receive_within(socket: &mut Socket, patience: Duration) -> Result<Reply> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some((reply, _)) = socket.recv::<Reply>()? {
            return Ok(reply);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!(
                "the VM's supervisor does not answer: if {MAX_CLIENTS} commands talk to it already (events --follow does), end one of them"
            );
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => bail!("poll failed: {}", errno.desc()),
        }
    }
}
