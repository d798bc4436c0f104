#![forbid(unsafe_code)]
//! The folder of a VM: `/run/bulkhead/NAME`, or `$XDG_RUNTIME_DIR/bulkhead/NAME` for a normal user.
//!
//! | file | what |
//! | --- | --- |
//! | `lock` | locked as long as supervisor or keeper lives; holds the supervisor's process id |
//! | `control` | the socket that `bulkhead list`, `inspect` and `stop` talk to |
//! | `adopt` | the socket of the keeper, for a new supervisor |
//! | `events*.jsonl`, `crashes/` | what happened: see `chronicle.rs` and `crash_report.rs` |
//!
//! What happened outlives the VM: it stays in the folder, without the other files, and the next VM of that name goes on
//! writing there. The folders of the [`MAX_ENDED`] VMs that ended last are kept.
//!
//! A folder with a lock that is free was left by a supervisor and a keeper that were killed; the next VM of that name
//! takes it over.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::report::say;
use super::{chronicle, crash_report, keeper};
use crate::spec::Name;

/// Limit: ended VMs that have a folder.
const MAX_ENDED: usize = 32;

const LOCK: &str = "lock";

/// What outlives a VM.
const RECORDS: [&str; 3] = [chronicle::NEW, chronicle::OLD, crash_report::FOLDER];

/// The folder of a VM, ours until this is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    lock: Flock<File>,
}

/// Where the folders of this user's VMs are.
pub fn base() -> PathBuf {
    if geteuid().is_root() {
        return "/run/bulkhead".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if !runtime.is_empty() => PathBuf::from(runtime).join("bulkhead"),
        _ => format!("/tmp/bulkhead-{}", geteuid()).into(),
    }
}

/// The control socket of a VM below `base`.
pub fn control_socket(base: &Path, name: &Name) -> PathBuf {
    base.join(name.as_str()).join("control")
}

impl Folder {
    /// Takes the folder of that name below `base`, which is made if need be.
    pub fn take(base: &Path, name: &Name) -> Result<Self> {
        make_base(base)?;
        let path = base.join(name.as_str());
        // Somebody who ends may remove the folder between any two of our steps: try again then, with a limit against
        // somebody who does nothing else.
        for _ in 0..100 {
            match make_folder(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                made => made.with_context(|| format!("cannot make {}", path.display()))?,
            }
            let lock_path = path.join(LOCK);
            let file = match open_lock(&lock_path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.with_context(|| format!("cannot open {}", lock_path.display()))?,
            };
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(in_use(name, &path)?),
                Err((_, errno)) => bail!("cannot lock {}: {}", lock_path.display(), errno.desc()),
            };
            if !is_same_file(&lock, &lock_path) {
                continue;
            }
            let left = fs::read_to_string(&lock_path).unwrap_or_default();
            if !left.trim().is_empty() {
                say(&format!(
                    "an earlier VM named {name} (process {}) was killed together with what kept it; its folder is cleared, but for its events and crash reports",
                    super::process::printable(left.trim())
                ));
            }
            clear(&path).with_context(|| format!("cannot clear {}", path.display()))?;
            claim(&mut lock, &lock_path)?;
            // Best effort: a folder too many harms nobody.
            let _ = forget_ended(base);
            return Ok(Folder { path, lock });
        }
        bail!("cannot take {}: it is removed again and again", path.display())
    }

    /// Takes over the folder of a supervisor that was killed, with what it had locked.
    pub fn adopt(path: PathBuf, lock: OwnedFd) -> Result<Self> {
        // Locked already, and by this very description: that succeeds.
        let lock = Flock::lock(File::from(lock), FlockArg::LockExclusiveNonblock);
        let mut lock =
            lock.map_err(|(_, errno)| anyhow!("cannot lock {}: {}", path.display(), errno.desc()))?;
        lock.rewind()?;
        claim(&mut lock, &path.join(LOCK))?;
        Ok(Folder { path, lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whoever holds it, or a duplicate of it, holds the folder.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The lock is still held: nobody else has moved in. What cannot be removed now, the next of that name clears.
        let _ = clear(&self.path);
        let _ = fs::remove_file(self.path.join(LOCK));
        // Only if nothing is left in it.
        let _ = fs::remove_dir(&self.path);
    }
}

/// Says whose the folder is now.
fn claim(lock: &mut File, path: &Path) -> Result<()> {
    let said = lock
        .set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()));
    said.with_context(|| format!("cannot write {}", path.display()))
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn in_use(name: &Name, path: &Path) -> Result<String> {
    if keeper::is_orphaned(path)? {
        return Ok(format!(
            "a VM named {name} runs without a supervisor: `bulkhead adopt {name}` takes it over; or give this one another --name"
        ));
    }
    Ok(match fs::read_to_string(path.join("lock")) {
        Ok(text) if !text.trim().is_empty() => {
            format!(
                "a VM named {name} runs already (process {}); give this one another --name",
                text.trim()
            )
        }
        _ => format!("a VM named {name} runs already; give this one another --name"),
    })
}

/// The folder of all VMs. In a shared place like /tmp it must be ours: another user's could be exchanged under us.
fn make_base(base: &Path) -> Result<()> {
    make_folder(base).with_context(|| format!("cannot make {}", base.display()))?;
    let metadata =
        fs::symlink_metadata(base).with_context(|| format!("cannot look at {}", base.display()))?;
    let open_to_others = metadata.permissions().mode() & 0o022 != 0;
    if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || open_to_others {
        bail!(
            "{} is not a folder that only this user may change: remove it",
            base.display()
        );
    }
    Ok(())
}

fn make_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Removes everything but the lock and what is to outlive a VM.
fn clear(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_folder = entry.file_type()?.is_dir();
        let is_record =
            RECORDS.iter().any(|record| name == *record) && (is_folder || entry.metadata()?.len() > 0);
        if name == LOCK || is_record {
            continue;
        }
        if is_folder {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes the folders of the VMs that ended first, if there are too many.
fn forget_ended(base: &Path) -> io::Result<()> {
    let mut ended = Vec::new();
    for entry in fs::read_dir(base)? {
        let path = entry?.path();
        if path.is_dir() && !path.join(LOCK).exists() {
            // Its last change is that its lock went.
            ended.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    ended.sort();
    let superfluous = ended.len().saturating_sub(MAX_ENDED);
    for (_, path) in ended.iter().take(superfluous) {
        // A VM of that name may be starting: whoever has the lock has the folder.
        let lock_path = path.join(LOCK);
        let Ok(lock) = Flock::lock(open_lock(&lock_path)?, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        if is_same_file(&lock, &lock_path) {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        "web".parse().expect("a name")
    }

    #[test]
    fn a_name_is_taken_once_and_free_again_afterwards() {
        let place = tempfile::tempdir().expect("a folder");
        let base = place.path().join("bulkhead");
        let first = Folder::take(&base, &name()).expect("free");
        let refused = Folder::take(&base, &name()).expect_err("taken").to_string();
        assert_eq!(
            refused,
            format!(
                "a VM named web runs already (process {}); give this one another --name",
                std::process::id()
            )
        );
        drop(first);
        assert!(!base.join("web").exists(), "nothing has happened");
        Folder::take(&base, &name()).expect("free again");
    }

    #[test]
    fn what_a_killed_supervisor_left_is_cleared() {
        let place = tempfile::tempdir().expect("a folder");
        let base = place.path().join("bulkhead");
        let left = base.join("web");
        fs::create_dir_all(left.join("net0")).expect("made");
        fs::write(left.join("control"), "").expect("made");
        fs::write(left.join("lock"), "1\n").expect("made");
        let folder = Folder::take(&base, &name()).expect("nobody holds the lock");
        assert_eq!(names_in(folder.path()), ["lock"]);
    }

    fn names_in(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("readable");
        let name = |entry: io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string();
        let mut names: Vec<String> = entries.map(|entry| name(entry).expect("text")).collect();
        names.sort();
        names
    }

    /// A VM of that name comes and goes; something happens meanwhile.
    fn run(base: &Path, name: &str) {
        let folder = Folder::take(base, &name.parse().expect("a name")).expect("free");
        fs::write(folder.path().join("control"), "").expect("made");
        chronicle::Chronicle::open(folder.path()).add(chronicle::Event::GuestReset { count: 1 });
    }

    #[test]
    fn what_happened_outlives_the_vm_and_the_next_of_its_name_goes_on_from_there() {
        let place = tempfile::tempdir().expect("a folder");
        let base = place.path().join("bulkhead");
        run(&base, "web");
        assert_eq!(names_in(&base.join("web")), [chronicle::NEW]);
        run(&base, "web");
        let entries = chronicle::read_after(&base.join("web"), 0);
        let numbers: Vec<u64> = entries.iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn the_vms_that_ended_last_are_remembered_and_those_that_run_are_left_alone() {
        let place = tempfile::tempdir().expect("a folder");
        let base = place.path().join("bulkhead");
        run(&base, "first");
        let running = Folder::take(&base, &name()).expect("free");
        for number in 0..MAX_ENDED {
            run(&base, &format!("vm-{number}"));
        }
        assert!(base.join("first").exists(), "there is room for it");
        run(&base, "one-too-many");
        let _next = Folder::take(&base, &"next".parse().expect("a name")).expect("free");
        assert!(!base.join("first").exists(), "it has ended first");
        assert!(running.path().join(LOCK).exists());
        // The others, the one that runs, and the one that comes.
        assert_eq!(names_in(&base).len(), MAX_ENDED + 2);
    }

    #[test]
    fn a_base_that_others_may_change_is_refused() {
        let place = tempfile::tempdir().expect("a folder");
        let base = place.path().join("bulkhead");
        fs::create_dir(&base).expect("made");
        fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).expect("changed");
        let refused = Folder::take(&base, &name()).expect_err("open to all").to_string();
        assert!(refused.contains("only this user may change"), "{refused}");
    }
}
