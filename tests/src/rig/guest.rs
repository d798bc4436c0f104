//! What inner guests boot: Debian's cloud kernel, unmodified, and a small initrd with Debian's drivers and programs.
//!
//! Conversation on the guest's console, one line each, for tests to wait for:
//!
//! | line | when |
//! | --- | --- |
//! | `guest: init` | `/init` has begun |
//! | `guest: drivers hyperv` or `guest: drivers virtio` | the drivers are loaded |
//! | `guest: exit N` | the command ended with status N; the guest powers off |
//!
//! `more.cpio` has programs that few tests want (fio); a test appends it to the initrd.
//!
//! The command is the value of `bulkhead.cmd=` on the kernel's command line (one word), else the script `/run-me` (see
//! [`GuestInitrd::with_script`]), else a shell on the console.

#![forbid(unsafe_code)]

use super::archive::Tree;
use super::modules::{ModuleTable, install};
use super::packages::{Kernel, Sysroot};
use super::programs::{install_busybox, install_program};
use super::{Rig, progress, vmlinux};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

const INIT: &str = include_str!("scripts/guest-init.sh");

/// Hyper-V's drivers for bulkhead; virtio's, for the same guest under another VMM; ext4 with the checksum it asks for.
const MODULES: &[&str] = &[
    "hv_vmbus",
    "hv_utils",
    "hv_storvsc",
    "hv_netvsc",
    "sd_mod",
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "crc32c_generic",
    "crc32c_intel",
    "ext4",
];

/// Programs beside busybox.
const PROGRAMS: &[&str] = &["usr/sbin/mke2fs", "usr/sbin/kexec"];

/// Programs that few tests want, in an archive of their own (`more.cpio`) because they would slow every guest's start:
/// fio alone brings 80 MB of libraries.
const MORE_PROGRAMS: &[&str] = &["usr/bin/fio"];

pub fn recipe() -> String {
    format!("2 {MODULES:?} {PROGRAMS:?} {MORE_PROGRAMS:?} {INIT}")
}

/// Makes `guest/` from the unpacked packages.
pub fn build(dir: &Path) -> Result<()> {
    progress("making the guest's kernel images and initrd");
    let (kernel, sysroot) = (Kernel::find(dir)?, Sysroot::of(dir));
    let guest = dir.join("guest");
    fs::create_dir_all(&guest)?;
    fs::copy(&kernel.image, guest.join("vmlinuz"))?;
    vmlinux::extract(&kernel.image, &guest.join("vmlinux"), &sysroot)?;

    let mut tree = Tree::new();
    install_busybox(&mut tree, &sysroot)?;
    for program in PROGRAMS {
        install_program(&mut tree, &sysroot, program)?;
    }
    tree.symlink("usr/sbin/mkfs.ext4", "mke2fs");
    tree.file("etc/mke2fs.conf", 0o644, sysroot.root.join("etc/mke2fs.conf"));
    install(&mut tree, &kernel, &ModuleTable::read(&kernel)?.closure(MODULES)?)?;
    for folder in ["proc", "sys", "dev", "root"] {
        tree.directory(folder);
    }
    tree.file("init", 0o755, INIT);
    // The kernel opens the console before /init can mount anything.
    tree.character_device("dev/console", 5, 1);
    let file = File::create(guest.join("initrd.cpio"))?;
    tree.write_cpio(BufWriter::new(file))
        .context("cannot write the guest's initrd")?;

    let mut more = Tree::new();
    for program in MORE_PROGRAMS {
        install_program(&mut more, &sysroot, program)?;
    }
    let file = File::create(guest.join("more.cpio"))?;
    more.write_cpio(BufWriter::new(file))
        .context("cannot write the archive of the guest's other programs")
}

/// The guest's initrd.
#[derive(Debug)]
pub struct GuestInitrd;

impl GuestInitrd {
    /// The initrd with a shell script that the guest runs. The kernel unpacks archives one after the other, so the
    /// script's archive is simply appended.
    pub fn with_script(rig: &Rig, script: &str) -> Result<Vec<u8>> {
        let path = rig.guest_initrd();
        let mut initrd = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        initrd.extend(GuestInitrd::script_only(script)?);
        Ok(initrd)
    }

    /// Only the archive that [`GuestInitrd::with_script`] appends: where the initrd is at hand already (in the rig at
    /// `/opt/guest/initrd.cpio`), `cat` can do the rest.
    pub fn script_only(script: &str) -> Result<Vec<u8>> {
        let mut tree = Tree::new();
        tree.file("run-me", 0o755, script);
        tree.to_cpio()
    }
}
