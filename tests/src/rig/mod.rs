//! The nested rig: a machine with SVM, out of nothing but Debian packages.
//!
//! ```text
//! this host                QEMU (TCG) ── an emulated machine with AMD SVM
//!                            └─ Debian's cloud kernel, kvm-amd, /dev/kvm      "the rig", the outer machine
//!                                 └─ the payload, e.g. `bulkhead run …`       what a caller asks for
//!                                      └─ Debian's cloud kernel again         "the guest", the inner machine
//! ```
//!
//! What lies below `target/rig`, and which file makes it:
//!
//! | path | what | made by |
//! | --- | --- | --- |
//! | `sysroot/` | the unpacked Debian packages; QEMU itself is run from here | `packages.rs` |
//! | `kernel/` | Debian's cloud kernel package, with `modules.dep` | `packages.rs` |
//! | `outer/` | initramfs and root disk of the outer machine | `outer.rs` |
//! | `guest/` | `vmlinuz`, `vmlinux`, `initrd.cpio`, `more.cpio` for inner guests; also in the rig at `/opt/guest` | `guest.rs` |
//! | `runs/` | one temporary folder per run, removed at its end | `run.rs` |
//!
//! The network is needed once, for `packages.rs`. Everything after that works offline. A build and a run keep out of
//! each other's way by file locks (`lock.rs`): any number of processes may ask for the rig at once.
//!
//! One run: three virtio disks are given to the outer machine: its root (a throw-away snapshot), an archive going in
//! (the payload's files, and the command), and an empty disk on which the outer machine leaves an archive going out
//! (the exit status, the kernel's log, and everything in `/out`). A run counts only if that archive is complete, so no
//! noise on a console can be taken for a result. The payload's output comes by a virtio console of its own; the kernel's
//! console is a second, separate one.
//!
//! The emulator has faults that are not ours: its kernel now and then panics in `__svm_vcpu_run`, and inner guests of any
//! VMM now and then hang. Therefore every run has a deadline, and a run that brings no complete archive, or that reached
//! its deadline, is a [`RigFailed`]: neither pass nor failure of the payload. [`Rig::run`] tries again a bounded number of
//! times, says so, and counts it in [`RigOutcome::attempts`].

#![forbid(unsafe_code)]

mod archive;
mod guest;
mod lock;
mod modules;
mod outer;
mod packages;
mod programs;
mod run;
mod scene;
mod spec;
mod vmlinux;

pub use archive::Tree;
pub use guest::GuestInitrd;
pub use run::RUNS_AT_ONCE;
pub use scene::Scenes;
pub use spec::{EXIT_RIG_AT_FAULT, FileSource, RigError, RigFailed, RigOutcome, RigSpec};

use anyhow::{Context, Result};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A rig that is built and ready to run.
#[derive(Debug, Clone)]
pub struct Rig {
    dir: PathBuf,
}

impl Rig {
    /// Where the rig of this workspace lives.
    pub fn default_dir() -> PathBuf {
        workspace_root().join("target/rig")
    }

    /// The rig of this workspace, built now if it is missing or out of date. Says on stderr what it does.
    pub fn build() -> Result<Rig> {
        let rig = Rig {
            dir: Rig::default_dir(),
        };
        let _shared_or_built = rig.build_if_needed()?;
        Ok(rig)
    }

    /// The rig of this workspace if it is built and up to date, without building anything.
    pub fn find() -> Option<Rig> {
        let rig = Rig {
            dir: Rig::default_dir(),
        };
        rig.is_current().then_some(rig)
    }

    /// Debian's cloud kernel as it is booted inside the rig, a bzImage.
    pub fn guest_vmlinuz(&self) -> PathBuf {
        self.dir.join("guest/vmlinuz")
    }

    /// The same kernel's ELF image, as unpacked from the bzImage.
    pub fn guest_vmlinux(&self) -> PathBuf {
        self.dir.join("guest/vmlinux")
    }

    /// The folder of the guest's images: `vmlinuz`, `vmlinux`, `initrd.cpio`.
    pub fn guest_folder(&self) -> PathBuf {
        self.dir.join("guest")
    }

    /// The guest's initrd, see [`GuestInitrd`].
    pub fn guest_initrd(&self) -> PathBuf {
        self.dir.join("guest/initrd.cpio")
    }

    fn is_current(&self) -> bool {
        packages::is_current(&self.dir) && read_stamp(&self.dir.join("images.stamp")) == Some(images_recipe())
    }

    /// Builds under an exclusive lock unless everything is current, and returns holding a shared one, so that nobody
    /// rebuilds under the caller.
    fn build_if_needed(&self) -> Result<lock::FileLock> {
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        let lock_path = self.dir.join("build.lock");
        loop {
            let shared = lock::FileLock::shared(&lock_path)?;
            if self.is_current() {
                return Ok(shared);
            }
            drop(shared);
            let _exclusive =
                lock::FileLock::exclusive(&lock_path, "another process to be done with the rig")?;
            if self.is_current() {
                continue;
            }
            self.build_all()?;
        }
    }

    fn build_all(&self) -> Result<()> {
        let begun = std::time::Instant::now();
        if !packages::is_current(&self.dir) {
            packages::build(&self.dir)?;
        }
        guest::build(&self.dir)?;
        outer::build(&self.dir)?;
        std::fs::write(self.dir.join("images.stamp"), images_recipe())?;
        progress(&format!(
            "ready in {} ({} s)",
            self.dir.display(),
            begun.elapsed().as_secs()
        ));
        Ok(())
    }
}

/// The folder that holds the workspace's `Cargo.toml`.
pub fn workspace_root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// One line about what is being done. On stderr, so that a payload's output stays clean; past the capture of a test
/// harness, so that a test that takes long says why, and a failed attempt is seen and counted.
fn progress(what: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = std::io::stderr().write_all(format!("rig: {what}\n").as_bytes());
}

/// Changes whenever something that is put into an image changes, so that a stale image is never used.
fn images_recipe() -> String {
    let mut hasher = DefaultHasher::new();
    (packages::recipe(), guest::recipe(), outer::recipe()).hash(&mut hasher);
    format!("{:016x}\n", hasher.finish())
}

fn read_stamp(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
