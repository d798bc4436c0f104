#![forbid(unsafe_code)]
//! Namespaces that outlive the process in them.
//!
//! A network namespace costs 0.6 ms to make and more to clear away, and an IPC namespace about as much afterwards: some
//! milliseconds of the kernel's workers. A device server that dies is followed by another one for the same device and the
//! same guest, which waits. So the two are made once for a device, empty, and every server of it is born into them. Nothing
//! can be left there for a successor to find: the filters refuse to make a socket or any IPC object, and the servers have no
//! capability over either, which belong to the user namespace of whoever made them.
//!
//! A thread of its own makes and enters them: namespaces belong to a thread, and a process inherits those of the thread
//! that makes it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::thread;

use nix::sched::{setns, unshare};

use crate::namespaces::Namespaces;

/// A network and an IPC namespace, empty and kept by their descriptors.
#[derive(Debug)]
pub struct Lasting {
    kept: Vec<(Namespaces, File)>,
}

impl Lasting {
    const KINDS: Namespaces = Namespaces::NET.with(Namespaces::IPC);

    /// Makes them.
    ///
    /// # Errors
    /// Only root may; or the host does not have them.
    pub fn new() -> io::Result<Self> {
        in_thread(|| {
            unshare(Self::KINDS.clone_flags())?;
            let open = |(kind, name)| Ok((kind, File::open(format!("/proc/thread-self/ns/{name}"))?));
            let kept = Self::KINDS.iter().map(open).collect::<io::Result<_>>()?;
            Ok(Lasting { kept })
        })
    }

    /// Does something in them. A process that is made there stays there.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            for (kind, namespace) in &self.kept {
                setns(namespace.as_fd(), kind.clone_flags())?;
            }
            work()
        })
    }

    /// What need not be made for a process that is made [`Self::within`].
    pub(crate) fn kinds(&self) -> Namespaces {
        Self::KINDS
    }
}

fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, work)?;
        let done = thread.join();
        done.unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::PathBuf;

    fn here() -> io::Result<[PathBuf; 2]> {
        let link = |name| std::fs::read_link(format!("/proc/thread-self/ns/{name}"));
        Ok([link("net")?, link("ipc")?])
    }

    #[test]
    fn all_who_are_made_within_share_what_nobody_else_is_in() {
        if !nix::unistd::geteuid().is_root() {
            // Past the harness's capture, in the form that `cargo xtask test` counts.
            let line = "\nSKIP all_who_are_made_within: needs root\n";
            io::stderr()
                .write_all(line.as_bytes())
                .expect("standard error is open");
            return;
        }
        let [one, other] = [(); 2].map(|()| Lasting::new().expect("root may"));
        let within = |lasting: &Lasting| lasting.within(here).expect("they can be entered");
        let outside = here().expect("procfs");
        assert_eq!(within(&one), within(&one));
        for (a, b) in [(within(&one), within(&other)), (within(&one), outside.clone())] {
            assert!(a[0] != b[0] && a[1] != b[1], "{a:?} {b:?}");
        }
        assert_eq!(
            here().expect("procfs"),
            outside,
            "whoever makes them stays where it is"
        );
    }
}
