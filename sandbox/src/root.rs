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

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, mount_remount, unmount,
};
use rustix::process::{chdir, chroot, pivot_root};

/// Empties the root. The caller has a mount namespace of its own and CAP_SYS_ADMIN over it.
///
/// # Errors
/// The step that failed. The process is then still in the host's root, or in a state between the two that has
/// no more rights than before.
pub(crate) fn empty() -> Result<(), String> {
    let cannot = |step| move |errno: Errno| format!("cannot {step}: {}", describe(errno));
    let nothing = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Nothing that happens here may travel back into the host's mount namespace.
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    mount_change("/", private).map_err(cannot("make mounts private"))?;
    // Limit: one inode is the root directory itself, so that nothing can be created even before it is read-only.
    let room = c"size=4k,nr_inodes=1,mode=0555";
    mount("bulkhead", "/proc", "tmpfs", nothing, room).map_err(cannot("mount a tmpfs"))?;
    chdir("/proc").map_err(cannot("go into the tmpfs"))?;
    match pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(cannot("detach the old root"))?,
        // man 2 pivot_root, NOTES: the rootfs of a host that runs from its initramfs cannot be pivoted; switch_root's way
        // is to move over it.
        Err(Errno::INVAL) => {
            mount_move(".", "/").map_err(cannot("move the tmpfs over the root"))?;
            chroot(".").map_err(cannot("change into the moved root"))?;
        }
        Err(errno) => return Err(cannot("pivot the root")(errno)),
    }
    chdir("/").map_err(cannot("go to the new root"))?;
    mount_remount("/", nothing | MountFlags::RDONLY, "").map_err(cannot("make the root read-only"))?;
    match fs::read_dir("/").map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(count) => Err(format!("it has {count} entries")),
        Err(error) => Err(format!("cannot list it: {error}")),
    }
}

fn describe(errno: Errno) -> &'static str {
    nix::errno::Errno::from_raw(errno.raw_os_error()).desc()
}
