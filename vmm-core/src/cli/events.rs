#![forbid(unsafe_code)]
//! `bulkhead events` and `bulkhead crashes`. Both read the VM's folder, and work without a supervisor and after the VM's
//! end; only following needs a supervisor.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use vmbus::ipc::{PeerFault, Socket};

use super::talk::connect_below;
use crate::spec::Name;
use crate::supervisor::chronicle::{self, Entry};
use crate::supervisor::control::{Reply, Request, connect_to};
use crate::supervisor::crash_report;
use crate::supervisor::folder::control_socket;
use crate::supervisor::keeper::is_orphaned;

pub(super) fn events(vm: &Name, base: &Path, follow: bool, json: bool) -> Result<()> {
    let folder = folder_of(vm, base)?;
    if !follow {
        for entry in chronicle::read_after(&folder, 0) {
            show(&entry, json)?;
        }
        return Ok(());
    }
    let mut socket = connect_below(vm, base)?;
    let mut last = 0;
    loop {
        let request = Request::Events { after: last, follow };
        // One that is gone is found so below.
        socket.send(&request, &[]).ok();
        listen(vm, &mut socket, &mut last, json)?;
        // The VM has ended; or its supervisor, and then the next one goes on.
        if is_orphaned(&folder)? {
            bail!(
                "the supervisor of {vm} was killed, and the VM goes on: `bulkhead adopt {vm}` takes it over"
            );
        }
        match connect_to(&control_socket(base, vm))? {
            Some(next) => socket = next,
            None => return Ok(()),
        }
    }
}

/// Shows what a supervisor tells, until it tells no more.
fn listen(vm: &Name, socket: &mut Socket, last: &mut u64, json: bool) -> Result<()> {
    loop {
        match socket.recv::<Reply>() {
            Ok(Some((Reply::Events(lines), _))) => {
                for line in lines {
                    let entry: Entry = serde_json::from_str(&line).context("an event that is none")?;
                    *last = entry.number;
                    show(&entry, json)?;
                }
            }
            Ok(Some((other, _))) => bail!("{vm} answers {other:?}"),
            Ok(None) => {
                let mut list = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                match poll(&mut list, PollTimeout::NONE) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(errno) => bail!("poll failed: {}", errno.desc()),
                }
            }
            Err(PeerFault::Eof) => return Ok(()),
            Err(fault) => return Err(fault.into()),
        }
    }
}

pub(super) fn crashes(vm: &Name, base: &Path, number: Option<u64>) -> Result<()> {
    let folder = folder_of(vm, base)?;
    let Some(number) = number else {
        for (number, line) in crash_report::list(&folder) {
            print(&format!("{number} {line}"))?;
        }
        return Ok(());
    };
    match crash_report::read(&folder, number) {
        Ok(text) => print(text.trim_end()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("{vm} has no crash report {number} (bulkhead crashes {vm} lists those that it has)")
        }
        Err(error) => Err(error.into()),
    }
}

fn folder_of(vm: &Name, base: &Path) -> Result<PathBuf> {
    let folder = base.join(vm.as_str());
    if !folder.is_dir() {
        bail!(
            "nothing is known of a VM named {vm} of this user: check its name ({} has those that ran last)",
            base.display()
        );
    }
    Ok(folder)
}

fn show(entry: &Entry, json: bool) -> Result<()> {
    if json {
        print(&serde_json::to_string(entry)?)
    } else {
        print(&entry.to_string())
    }
}

fn print(line: &str) -> Result<()> {
    match writeln!(io::stdout(), "{line}") {
        // Who closes the pipe has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}
