//! The outer machine's initramfs and root disk.

#![forbid(unsafe_code)]

use super::archive::Tree;
use super::modules::{ModuleTable, install};
use super::packages::{Kernel, Sysroot, output_of, remove_tree, run, wrapped};
use super::programs::{install_busybox, install_program};
use super::progress;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

const INITRAMFS_INIT: &str = include_str!("scripts/outer-initramfs.sh");
const RIG_INIT: &str = include_str!("scripts/rig-init.sh");
const GUEST_INITRD: &str = include_str!("scripts/guest-initrd.sh");

/// What finds the root disk.
const INITRAMFS_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// What a payload may want. `loop` and `null_blk` are for tests of block devices, `veth` and `bridge` of networks.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "kvm",
    "kvm-amd",
    "tun",
    "dummy",
    "veth",
    "bridge",
    "loop",
    "null_blk",
    "crc32c_generic",
    "ext4",
    "vhost_net",
    "vhost_vsock",
];

/// Programs beside busybox.
const PROGRAMS: &[&str] = &[
    "usr/bin/qemu-system-x86_64",
    "usr/sbin/mke2fs",
    "usr/sbin/e2fsck",
    "usr/sbin/kexec",
    "usr/bin/ip",
    "usr/bin/iperf3",
    "usr/bin/fio",
    "usr/bin/passt",
    "usr/bin/strace",
    "usr/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "usr/lib/systemd/systemd",
    "usr/lib/systemd/systemd-journald",
    "usr/bin/systemctl",
    "usr/bin/journalctl",
];

/// What systemd needs to start one unit of a test, without the rest of a Debian.
const UNITS: &[&str] = &[
    "basic.target",
    "sysinit.target",
    "shutdown.target",
    "sockets.target",
    "systemd-journald.socket",
    "systemd-journald.service",
];

/// Firmware for the QEMU in the rig (`-M microvm`, `-M pc`).
const FIRMWARE: &[&str] = &[
    "usr/share/qemu/bios-microvm.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/seabios/bios.bin",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nkvm:x:106:user\nuser:x:1000:\nnogroup:x:65534:\n";

/// Size of the root disk; the file is sparse, and a run's own writes go to a throw-away layer above it.
const ROOT_DISK: &str = "6G";

pub fn recipe() -> String {
    format!(
        "2 {SLOW_CPU_FEATURES:?}{INITRAMFS_INIT}{RIG_INIT}{GUEST_INITRD}{INITRAMFS_MODULES:?}{MODULES:?}{PROGRAMS:?}{UNITS:?}{FIRMWARE:?}{PASSWD}{GROUP}{ROOT_DISK}"
    )
}

/// Features that make copies fast on silicon and slow in TCG, which then copies byte by byte. Which of them a QEMU knows
/// differs from version to version, and it refuses the others.
const SLOW_CPU_FEATURES: &[&str] = &["erms", "fsrm", "fsrs", "fzrm", "fsrc"];

/// Makes `outer/` from the unpacked packages and `guest/`.
pub fn build(dir: &Path) -> Result<()> {
    progress("making the outer machine's initramfs and root disk");
    let (kernel, sysroot) = (Kernel::find(dir)?, Sysroot::of(dir));
    let table = ModuleTable::read(&kernel)?;
    let outer = dir.join("outer");
    fs::create_dir_all(&outer)?;
    fs::copy(&kernel.image, outer.join("vmlinuz"))?;
    let file = File::create(outer.join("initramfs.cpio"))?;
    initramfs(&kernel, &table, &sysroot)?.write_cpio(BufWriter::new(file))?;

    let known = output_of(
        sysroot
            .command("usr/bin/qemu-system-x86_64")?
            .args(["-cpu", "help"]),
    )?;
    let known: Vec<&str> = known.split_whitespace().collect();
    let slow = SLOW_CPU_FEATURES.iter().filter(|feature| known.contains(feature));
    fs::write(
        outer.join("cpu-without"),
        slow.map(|feature| format!(",-{feature}")).collect::<String>(),
    )?;

    let staging = dir.join("outer.new");
    remove_tree(&staging)?;
    fs::create_dir(&staging)?;
    root_tree(dir, &kernel, &table, &sysroot)?.write_folder(&staging)?;
    let image = outer.join("root.ext4");
    if image.exists() {
        fs::remove_file(&image)?;
    }
    let mut mke2fs = sysroot.command("usr/sbin/mke2fs")?;
    mke2fs.args(["-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E"]);
    mke2fs
        .arg("lazy_itable_init=0,root_owner=0:0")
        .arg("-d")
        .arg(&staging)
        .arg(&image)
        .arg(ROOT_DISK);
    if !nix::unistd::geteuid().is_root() {
        // So that the files belong to root in the image: in a user namespace they seem to be root's already.
        mke2fs = wrapped(&["unshare", "--map-root-user", "--"], &mke2fs);
    }
    run(&mut mke2fs).context("cannot make the root disk")?;
    remove_tree(&staging)
}

fn initramfs(kernel: &Kernel, table: &ModuleTable, sysroot: &Sysroot) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut order = String::new();
    for path in table.closure(INITRAMFS_MODULES)? {
        let name = path.rsplit('/').next().unwrap_or(&path).to_string();
        tree.file(&format!("modules/{name}"), 0o644, kernel.modules.join(&path));
        order += &(name + "\n");
    }
    tree.file("modules/order", 0o644, order.as_str());
    tree.file("bin/busybox", 0o755, sysroot.root.join("usr/bin/busybox"));
    tree.file("init", 0o755, INITRAMFS_INIT);
    tree.directory("root");
    tree.directory("dev");
    tree.character_device("dev/console", 5, 1);
    Ok(tree)
}

fn root_tree(dir: &Path, kernel: &Kernel, table: &ModuleTable, sysroot: &Sysroot) -> Result<Tree> {
    let mut tree = Tree::new();
    install_busybox(&mut tree, sysroot)?;
    for program in PROGRAMS {
        install_program(&mut tree, sysroot, program)?;
    }
    tree.symlink("usr/sbin/mkfs.ext4", "mke2fs");
    tree.symlink("usr/sbin/ip", "../bin/ip");
    for unit in UNITS {
        let path = format!("usr/lib/systemd/system/{unit}");
        tree.file(&path, 0o644, sysroot.root.join(&path));
    }
    for path in FIRMWARE.iter().chain(&["etc/mke2fs.conf"]) {
        // Which of these are files and which are links differs from one package version to the next.
        tree.file(path, 0o644, sysroot.root.join(path));
    }
    install(&mut tree, kernel, &table.closure(MODULES)?)?;
    for folder in [
        "proc", "sys", "dev", "run", "tmp", "root", "mnt", "out", "var/tmp", "var/run", "var/lib", ".rig",
    ] {
        tree.directory(folder);
    }
    tree.file("etc/passwd", 0o644, PASSWD);
    tree.file("etc/group", 0o644, GROUP);
    tree.file("etc/hosts", 0o644, "127.0.0.1 localhost rig\n");
    tree.file("usr/sbin/rig-init", 0o755, RIG_INIT);
    tree.file("usr/bin/guest-initrd", 0o755, GUEST_INITRD);
    for name in ["vmlinuz", "vmlinux", "initrd.cpio", "more.cpio"] {
        tree.file(&format!("opt/guest/{name}"), 0o644, dir.join("guest").join(name));
    }
    Ok(tree)
}
