//! Advisory file locks, released when dropped or when the process dies.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::Path;

/// A held lock.
#[derive(Debug)]
pub struct FileLock {
    _file: Flock<File>,
}

impl FileLock {
    /// Waits until no one holds the lock exclusively.
    pub fn shared(path: &Path) -> Result<FileLock> {
        take(
            path,
            FlockArg::LockSharedNonblock,
            FlockArg::LockShared,
            "another process that builds the rig",
        )
    }

    /// Waits until no one holds the lock at all; says `what` it waits for if it has to.
    pub fn exclusive(path: &Path, what: &str) -> Result<FileLock> {
        take(
            path,
            FlockArg::LockExclusiveNonblock,
            FlockArg::LockExclusive,
            what,
        )
    }

    /// Takes the lock if no one holds it.
    pub fn try_exclusive(path: &Path) -> Result<Option<FileLock>> {
        match Flock::lock(open(path)?, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Some(FileLock { _file: file })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(anyhow!("cannot lock {}: {errno}", path.display())),
        }
    }
}

fn take(path: &Path, at_once: FlockArg, waiting: FlockArg, what: &str) -> Result<FileLock> {
    let file = match Flock::lock(open(path)?, at_once) {
        Ok(file) => return Ok(FileLock { _file: file }),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(anyhow!("cannot lock {}: {errno}", path.display())),
    };
    super::progress(&format!("waiting for {what}"));
    match Flock::lock(file, waiting) {
        Ok(file) => Ok(FileLock { _file: file }),
        Err((_, errno)) => Err(anyhow!("cannot lock {}: {errno}", path.display())),
    }
}

fn open(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock file {}", path.display()))
}
