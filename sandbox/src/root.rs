#![forbid(unsafe_code)]
//! Stage 3: an empty root directory.
//!
//! A tmpfs with room for nothing becomes the root of the process's own mount namespace, the old root is
//! detached with everything below it, and the tmpfs is made read-only. From here on every absolute path fails
//! with ENOENT, for io_uring as well, which seccomp does not see.
//!
//! The tmpfs is mounted on `/proc`, the one directory that is there on every host (the stages before have read
//! from it). `pivot_root(".", ".")` stacks the old root on the new one, so that no directory for it is needed.

use std::fs;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, pivot_root};

use crate::report::Root;

const MOUNT_POINT: &str = "/proc";
/// Limit: one inode is the root directory itself, so that nothing can be created even before it is read-only.
const TMPFS_OPTIONS: &str = "size=4k,nr_inodes=1,mode=0555";

/// What went wrong, as a sentence that can stand in a report.
pub(crate) struct NotEmptied(pub String);

/// Empties the root. The caller has a mount namespace of its own and CAP_SYS_ADMIN over it.
///
/// # Errors
/// The step that failed. The process is then still in the host's root, or in a state between the two that has
/// no more rights than before.
pub(crate) fn empty() -> Result<Root, NotEmptied> {
    let nothing = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let unnamed = None::<&str>;
    // Nothing that happens here may travel back into the host's mount namespace.
    mount(
        unnamed,
        "/",
        unnamed,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        unnamed,
    )
    .or_else(step("make mounts private"))?;
    mount(
        Some("bulkhead"),
        MOUNT_POINT,
        Some("tmpfs"),
        nothing,
        Some(TMPFS_OPTIONS),
    )
    .or_else(step("mount a tmpfs"))?;
    chdir(MOUNT_POINT).or_else(step("go into the tmpfs"))?;
    let root = match pivot_root(".", ".") {
        Ok(()) => {
            umount2(".", MntFlags::MNT_DETACH).or_else(step("detach the old root"))?;
            Root::Empty
        }
        // man 2 pivot_root, NOTES: the rootfs cannot be pivoted; switch_root's way is to move over it.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", unnamed, MsFlags::MS_MOVE, unnamed)
                .or_else(step("move the tmpfs over the root"))?;
            chroot(".").or_else(step("change into the moved root"))?;
            Root::EmptyOverInitramfs
        }
        Err(errno) => return step("pivot the root")(errno),
    };
    chdir("/").or_else(step("go to the new root"))?;
    mount(
        unnamed,
        "/",
        unnamed,
        MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | nothing,
        unnamed,
    )
    .or_else(step("make the root read-only"))?;
    match fs::read_dir("/").map(Iterator::count) {
        Ok(0) => Ok(root),
        Ok(count) => Err(NotEmptied(format!(
            "the root directory is not empty: it has {count} entries"
        ))),
        Err(error) => Err(NotEmptied(format!(
            "the root directory is not empty: cannot list it: {error}"
        ))),
    }
}

fn step<T>(what: &'static str) -> impl FnOnce(Errno) -> Result<T, NotEmptied> {
    move |errno| {
        Err(NotEmptied(format!(
            "the root directory is not empty: cannot {what}: {}",
            errno.desc()
        )))
    }
}
