#![forbid(unsafe_code)]
//! The supervisor's side: what the keeper knows, and telling it what has changed.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use anyhow::Result;
use sandbox::{Namespaces, Options, profile};
use vmbus::ipc::{SendError, Socket};

use super::{ARGUMENT, ToKeeper, send_kept};
use crate::supervisor::process::Process;
use crate::supervisor::program::Program;

/// Tells the VM's processes apart; those of the devices count from 1.
const INDEX: u32 = 15;

/// Limit: a killed process that holds descriptors ends at once.
const END: Duration = Duration::from_secs(1);

/// A keeper that runs. It is ended when this is dropped.
#[derive(Debug)]
pub struct Keeper {
    pub process: Process,
    pub ready: bool,
    /// By name: the number that it has here tells a descriptor from its successor of the same name.
    kept: BTreeMap<String, RawFd>,
    written: BTreeMap<String, Vec<u8>>,
}

impl Keeper {
    /// Starts one, of the program that this process runs.
    pub fn start(vm: &str) -> Result<Self> {
        // Root needs no user namespace to have the others, and without one the keeper sees who comes to it.
        let namespaces = Namespaces::all().without(Namespaces::USER);
        let program = Program::named("/proc/self/exe".into());
        // What the host lacks is reported, and the supervisor knows whether that is an error.
        let jail = (profile::keeper(), Options::default());
        let process = Process::launch(&program, &[ARGUMENT, vm], (namespaces, None), jail, INDEX)?;
        Ok(Keeper {
            process,
            ready: false,
            kept: BTreeMap::new(),
            written: BTreeMap::new(),
        })
    }

    /// One that has given what it has.
    pub fn adopt(
        process: Process,
        kept: BTreeMap<String, RawFd>,
        written: BTreeMap<String, Vec<u8>>,
    ) -> Self {
        Keeper {
            process,
            ready: true,
            kept,
            written,
        }
    }

    /// Makes it hold exactly these descriptors and bytes. What is new comes first and what is old goes last, so that at no
    /// moment it has less than what its bytes speak of.
    pub fn tell(
        &mut self,
        held: &[(String, BorrowedFd<'_>)],
        states: &BTreeMap<String, Vec<u8>>,
    ) -> Result<(), SendError> {
        let Process {
            child, control, log, ..
        } = &mut self.process;
        let Some(socket) = control else {
            return Ok(());
        };
        // Of itself it keeps what the next supervisor will need of it.
        let mut held = held.to_owned();
        held.push(("keeper.end".to_owned(), child.as_fd()));
        held.extend(log.fd.as_ref().map(|log| ("keeper.log".to_owned(), log.as_fd())));
        let new: Vec<(String, BorrowedFd<'_>)> = held
            .iter()
            .filter(|(name, fd)| self.kept.get(name) != Some(&fd.as_raw_fd()))
            .cloned()
            .collect();
        send_kept(socket, &new, |names| ToKeeper::Keep { names })?;
        let gone = self.written.keys().filter(|name| !states.contains_key(*name));
        let gone: Vec<String> = gone.cloned().collect();
        for name in gone {
            write(socket, &mut self.written, &name, &[])?;
        }
        for (name, bytes) in states {
            if self.written.get(name) != Some(bytes) {
                write(socket, &mut self.written, name, bytes)?;
            }
        }
        let names: BTreeMap<&str, RawFd> = held
            .iter()
            .map(|(name, fd)| (name.as_str(), fd.as_raw_fd()))
            .collect();
        let gone = self.kept.keys().filter(|name| !names.contains_key(name.as_str()));
        let gone: Vec<String> = gone.cloned().collect();
        if !gone.is_empty() {
            socket.send(&ToKeeper::Forget { names: gone }, &[])?;
        }
        self.kept = names
            .into_iter()
            .map(|(name, fd)| (name.to_owned(), fd))
            .collect();
        Ok(())
    }
}

fn write(
    socket: &mut Socket,
    written: &mut BTreeMap<String, Vec<u8>>,
    name: &str,
    bytes: &[u8],
) -> Result<(), SendError> {
    let message = ToKeeper::Write {
        name: name.to_owned(),
        bytes: bytes.to_owned(),
    };
    socket.send(&message, &[])?;
    match bytes.is_empty() {
        true => written.remove(name),
        false => written.insert(name.to_owned(), bytes.to_owned()),
    };
    Ok(())
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Waited for: it holds the locks of the VM's disks and folder as well.
        self.process.kill();
        // One that does not end is init's.
        let _ = self.process.child.wait_at_most(END);
    }
}
