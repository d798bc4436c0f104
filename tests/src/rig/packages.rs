//! Debian packages, unpacked below the rig's folder; nothing is installed on this machine.
//!
//! apt-get is given a package state of its own that says "nothing is installed", so it resolves the whole closure, the
//! C library included. The result runs by its own dynamic loader ([`Sysroot::command`]), whatever this machine has, and
//! needs no root rights. The package sources are those that this machine is configured with.

#![forbid(unsafe_code)]

use super::{progress, read_stamp};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the rig is made of. The kernel is not among them: it is fetched without its dependencies.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "e2fsprogs",
    "kmod",
    "xz-utils",
    "zstd",
    "lz4",
    "kexec-tools",
    "iproute2",
    "iperf3",
    "fio",
    "passt",
    "strace",
    "systemd",
];

/// The meta package whose one dependency is the newest cloud kernel.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Never needed, and half of what would be unpacked.
const EXCLUDED: &[&str] = &[
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/share/perl",
    "./usr/lib/x86_64-linux-gnu/perl",
];

/// What a stamp says when the packages of this recipe are unpacked.
pub fn recipe() -> String {
    format!("1 {KERNEL} {}\n", PACKAGES.join(" "))
}

/// Are the packages of this recipe unpacked?
pub fn is_current(dir: &Path) -> bool {
    read_stamp(&dir.join("packages.stamp")) == Some(recipe())
}

/// Downloads and unpacks everything.
pub fn build(dir: &Path) -> Result<()> {
    let scratch = dir.join("packages.new");
    remove_tree(&scratch)?;
    fs::create_dir_all(scratch.join("kernel-deb"))?;
    let apt = Apt::new(&scratch)?;
    progress("asking the package index");
    apt.run(&["update"], &scratch)?;
    let kernel = apt.dependency_of(KERNEL)?;
    progress(&format!(
        "downloading {kernel} and {} other packages with what they need",
        PACKAGES.len()
    ));
    apt.run(&["download", &kernel], &scratch.join("kernel-deb"))?;
    let mut install = vec!["install", "--download-only", "--no-install-recommends"];
    install.extend(PACKAGES);
    apt.run(&install, &scratch)?;

    let sysroot = scratch.join("sysroot");
    make_merged_usr(&sysroot)?;
    let debs = files_with_suffix(&scratch.join("cache/archives"), ".deb")?;
    progress(&format!("unpacking {} packages", debs.len()));
    for deb in &debs {
        unpack(deb, &sysroot)?;
    }
    let kernel_root = scratch.join("kernel");
    make_merged_usr(&kernel_root)?;
    for deb in files_with_suffix(&scratch.join("kernel-deb"), ".deb")? {
        unpack(&deb, &kernel_root)?;
    }

    for name in ["sysroot", "kernel"] {
        remove_tree(&dir.join(name))?;
        fs::rename(scratch.join(name), dir.join(name))?;
    }
    remove_tree(&scratch)?;
    let kernel = Kernel::find(dir)?;
    // kmod is many programs in one, told apart by the name they are called by.
    let mut depmod = Sysroot::of(dir).command_named("usr/bin/kmod", "depmod")?;
    run(depmod.arg("-b").arg(dir.join("kernel")).arg(&kernel.release))?;
    fs::write(dir.join("packages.stamp"), recipe())?;
    Ok(())
}

/// apt-get with a state of its own below a scratch folder.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(scratch: &Path) -> Result<Apt> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(scratch.join(sub))?;
        }
        let status = scratch.join("status");
        fs::write(&status, "")?;
        let pairs = [
            format!("Dir::State={}", scratch.join("state").display()),
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Cache={}", scratch.join("cache").display()),
            "APT::Architecture=amd64".into(),
            // The download helper's own user could not write below our folder.
            "APT::Sandbox::User=root".into(),
            "Acquire::Retries=3".into(),
            "APT::Get::Assume-Yes=true".into(),
        ];
        Ok(Apt {
            options: pairs
                .into_iter()
                .flat_map(|pair| ["-o".to_string(), pair])
                .collect(),
        })
    }

    fn run(&self, arguments: &[&str], cwd: &Path) -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.arg("-qq")
            .args(&self.options)
            .args(arguments)
            .current_dir(cwd);
        run(&mut apt).context(
            "the rig is made from Debian 12 packages and needs apt-get, a configured package source and the network for its first build",
        )
    }

    fn dependency_of(&self, meta: &str) -> Result<String> {
        let mut apt = Command::new("apt-cache");
        apt.args(&self.options).args(["depends", meta]);
        let listing = output_of(&mut apt)?;
        listing
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_string)
            .with_context(|| format!("the package index does not say which kernel {meta} stands for"))
    }
}

/// The unpacked packages.
#[derive(Debug, Clone)]
pub struct Sysroot {
    pub root: PathBuf,
}

impl Sysroot {
    pub fn of(rig_dir: &Path) -> Sysroot {
        Sysroot {
            root: rig_dir.join("sysroot"),
        }
    }

    /// A command that runs `program` (a path inside the sysroot) on this machine with the sysroot's own libraries.
    pub fn command(&self, program: &str) -> Result<Command> {
        self.command_named(program, program)
    }

    /// Like [`Sysroot::command`], with another `argv[0]`.
    fn command_named(&self, program: &str, name: &str) -> Result<Command> {
        let path = self.root.join(program);
        ensure!(path.exists(), "the rig's packages hold no {program}");
        let mut command = Command::new(self.loader());
        command
            .arg("--library-path")
            .arg(self.library_path())
            .arg("--argv0")
            .arg(name)
            .arg(path);
        command.env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"));
        command.env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        Ok(command)
    }

    /// Every file that `program` (a path inside the sysroot) is linked with, as paths inside the sysroot; the dynamic
    /// loader is one of them.
    pub fn libraries_of(&self, program: &str) -> Result<Vec<String>> {
        let mut list = Command::new(self.loader());
        list.arg("--library-path")
            .arg(self.library_path())
            .arg("--list")
            .arg(self.root.join(program));
        let listing = output_of(&mut list)?;
        let mut libraries = vec!["usr/lib64/ld-linux-x86-64.so.2".to_string()];
        for line in listing.lines() {
            let Some((name, rest)) = line.split_once(" => ") else {
                continue;
            };
            let path = rest.split(" (").next().unwrap_or(rest);
            if name.trim().ends_with("ld-linux-x86-64.so.2") {
                continue;
            }
            let inside = Path::new(path).strip_prefix(&self.root).with_context(|| {
                format!(
                    "{program} needs {}, which is not in the rig's packages ({path})",
                    name.trim()
                )
            })?;
            libraries.push(inside.to_string_lossy().into_owned());
        }
        Ok(libraries)
    }

    fn loader(&self) -> PathBuf {
        self.root.join("usr/lib64/ld-linux-x86-64.so.2")
    }

    fn library_path(&self) -> String {
        // The packages of fio and systemd keep some of their libraries in folders of their own.
        let lib = self.root.join("usr/lib/x86_64-linux-gnu");
        let folders = [lib.join("ceph"), lib.join("systemd"), lib];
        folders.map(|folder| folder.display().to_string()).join(":")
    }
}

/// The unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The kernel's version as `uname -r` says it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// The folder that holds `modules.dep`.
    pub modules: PathBuf,
}

impl Kernel {
    pub fn find(rig_dir: &Path) -> Result<Kernel> {
        let boot = rig_dir.join("kernel/boot");
        let image = fs::read_dir(&boot)
            .with_context(|| format!("cannot read {}", boot.display()))?
            .filter_map(|entry| {
                entry
                    .ok()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
            })
            .find(|name| name.starts_with("vmlinuz-"))
            .context("the kernel package holds no vmlinuz")?;
        let release = image.trim_start_matches("vmlinuz-").to_string();
        let modules = rig_dir.join("kernel/usr/lib/modules").join(&release);
        Ok(Kernel {
            image: boot.join(image),
            modules,
            release,
        })
    }
}

fn make_merged_usr(root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(name))?;
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
    }
    Ok(())
}

fn unpack(deb: &Path, root: &Path) -> Result<()> {
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb, which every Debian machine has")?;
    let archive = reader.stdout.take().context("dpkg-deb gave no output")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"])
        .arg(root);
    for excluded in EXCLUDED {
        tar.arg(format!("--exclude={excluded}"));
    }
    let unpacked = tar.stdin(archive).status().context("cannot run tar")?;
    let read = reader.wait()?;
    ensure!(
        unpacked.success() && read.success(),
        "cannot unpack {}",
        deb.display()
    );
    Ok(())
}

fn files_with_suffix(dir: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(suffix) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `command`, run by another program: `prefix` is that program and its first arguments.
pub fn wrapped(prefix: &[&str], command: &Command) -> Command {
    let mut whole = Command::new(prefix[0]);
    whole
        .args(&prefix[1..])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            whole.env(name, value);
        }
    }
    whole
}

/// Runs a command and turns failure into an error that shows what the command said.
pub fn run(command: &mut Command) -> Result<()> {
    output_of(command).map(drop)
}

/// Like [`run`], and returns what the command wrote to its standard output.
pub fn output_of(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
