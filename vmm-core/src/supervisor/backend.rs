#![forbid(unsafe_code)]
//! Opening what the processes need: the one place of a VM's life where paths are followed. Every mistake of a person
//! that shows here is one sentence.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use sandbox::{Identity, Namespaces, Spawn};
use vmbus::lease::{self, Place};
use vmbus::mem::sealed_memfd;

use super::plan::Backend;
use super::process::{Process, pipe};
use crate::spec::Size;

/// A backend that is held open for all servers of a room.
#[derive(Debug)]
pub enum Held {
    /// Each server gets a description of its own, so that locks and flags are its own; the lock that makes this VM the
    /// disk's owner is on ours ([`vmbus::lease`]).
    File {
        path: PathBuf,
        handle: OwnedFd,
        read_only: bool,
    },
    /// A memfd; likewise.
    Memory(OwnedFd),
    /// The same description for all: there is one TAP queue.
    Tap(OwnedFd),
    /// passt's stream: likewise.
    Passt(OwnedFd),
}

/// The descriptors for `bulkhead-vcpu`, by name.
pub type Named = Vec<(&'static str, OwnedFd)>;

impl Held {
    /// Opens a backend that is no process.
    pub fn open(backend: &Backend) -> Result<Self> {
        match backend {
            Backend::File { path, read_only } => open_disk(path, *read_only),
            Backend::Memory { bytes } => {
                let memory = sealed_memfd("bulkhead-disk", *bytes)
                    .map_err(|error| anyhow!("cannot make a disk in memory: {error}"))?;
                Ok(Held::Memory(memory))
            }
            Backend::Tap { name } => Ok(Held::Tap(open_tap(name)?)),
            Backend::TapFd(number) => Ok(Held::Tap(inherited_tap(*number)?)),
            Backend::Passt => bail!("passt is a process, and started by itself"),
        }
    }

    /// Starts passt with one end of a stream as its only peer. It ends by itself when nobody holds the other end.
    pub fn start_passt(mtu: u16) -> Result<(Self, Process)> {
        let (stream, process) = start_passt(mtu)?;
        Ok((Held::Passt(stream), process))
    }

    /// Keeps other VMs away from a disk, for as long as `self` lives.
    pub fn own(&self) -> Result<()> {
        let Held::File {
            path,
            handle,
            read_only,
        } = self
        else {
            return Ok(());
        };
        let shown = path.display();
        match lease::own(handle.as_fd()) {
            Ok(true) => Ok(()),
            Ok(false) if *read_only => bail!(
                "the disk {shown} is in use by a VM that may write it: end that one, or have it say readonly, too"
            ),
            Ok(false) => {
                bail!("the disk {shown} is in use by another VM: end that one, or have both say readonly")
            }
            Err(errno) => bail!("cannot lock the disk {shown}: {}", errno.desc()),
        }
    }

    /// Whether no I/O of the last server of the device with this journal is in flight, as far as locks on its disk tell.
    pub fn is_free(&self, journal: BorrowedFd<'_>) -> bool {
        match self {
            // Where locks prove nothing, servers do not use them, and a look at one may wait for another host.
            Held::File { handle, .. } if lease::proves_end(handle.as_fd()) => Place::lease(journal)
                .and_then(|place| lease::is_free(handle.as_fd(), place))
                .unwrap_or(false),
            Held::File { .. } | Held::Memory(_) | Held::Tap(_) | Held::Passt(_) => true,
        }
    }

    /// What an earlier supervisor has opened.
    pub fn adopt(backend: &Backend, fd: OwnedFd) -> Self {
        match backend {
            Backend::File { path, read_only } => Held::File {
                path: path.clone(),
                handle: fd,
                read_only: *read_only,
            },
            Backend::Memory { .. } => Held::Memory(fd),
            Backend::Tap { .. } | Backend::TapFd(_) => Held::Tap(fd),
            Backend::Passt => Held::Passt(fd),
        }
    }

    /// What is held.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Held::File { handle: fd, .. } | Held::Memory(fd) | Held::Tap(fd) | Held::Passt(fd) => fd.as_fd(),
        }
    }

    /// The descriptor for a server that is started now.
    pub fn for_server(&self) -> Result<OwnedFd> {
        match self {
            Held::File {
                path,
                handle,
                read_only,
            } => reopen(handle, *read_only)
                .with_context(|| format!("cannot open the disk {} again", path.display())),
            Held::Memory(memory) => reopen(memory, false).context("cannot open a disk in memory again"),
            Held::Tap(fd) | Held::Passt(fd) => fd
                .try_clone()
                .context("cannot duplicate a network interface's descriptor"),
        }
    }
}

fn reopen(handle: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    Ok(OpenOptions::new().read(true).write(!read_only).open(path)?.into())
}

fn open_disk(path: &Path, read_only: bool) -> Result<Held> {
    let shown = path.display();
    // Looked at before it is opened: opening some devices does something to them.
    let named = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                anyhow!("there is no disk {shown}: `truncate -s 10G {shown}` makes an empty one of 10 GiB")
            }
            _ => anyhow!("cannot open the disk {shown}: {error}"),
        })?;
    let metadata = named
        .metadata()
        .with_context(|| format!("cannot look at the disk {shown}"))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        bail!("the disk {shown} is a folder: a raw file or a block device is needed");
    }
    if !kind.is_file() && !kind.is_block_device() {
        bail!("the disk {shown} is neither a regular file nor a block device");
    }
    if kind.is_file() && metadata.len() < 512 {
        bail!(
            "the disk {shown} is {} bytes long, and a disk has 512 or more: `truncate -s 10G {shown}` makes it larger",
            metadata.len()
        );
    }
    let handle = reopen(&named.into(), read_only).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => anyhow!(
            "the disk {shown} may not be written by this user: change its permissions, or say readonly"
        ),
        io::ErrorKind::PermissionDenied => {
            anyhow!("the disk {shown} may not be read by this user: change its permissions")
        }
        _ => anyhow!("cannot open the disk {shown} again: {error}"),
    })?;
    Ok(Held::File {
        path: path.to_owned(),
        handle,
        read_only,
    })
}

/// Two disks on one file would overwrite each other. Positions are those of `held`.
pub fn same_file(held: &[&Held]) -> Option<(usize, usize)> {
    let identity = |held: &Held| match held {
        Held::File { handle, .. } => {
            let metadata = File::from(handle.try_clone().ok()?).metadata().ok()?;
            let device = if metadata.file_type().is_block_device() {
                metadata.rdev()
            } else {
                metadata.dev()
            };
            Some((metadata.file_type().is_block_device(), device, metadata.ino()))
        }
        Held::Memory(_) | Held::Tap(_) | Held::Passt(_) => None,
    };
    let identities: Vec<_> = held.iter().map(|held| identity(held)).collect();
    identities.iter().enumerate().find_map(|(second, later)| {
        let first = identities[..second]
            .iter()
            .position(|earlier| earlier == later && later.is_some())?;
        let both_read = [first, second]
            .iter()
            .all(|&at| matches!(held[at], Held::File { read_only: true, .. }));
        (!both_read).then_some((first, second))
    })
}

fn open_tap(name: &str) -> Result<OwnedFd> {
    sandbox::tap::create(name, false).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "there is no /dev/net/tun: load the module tun, or use --net user",
            io::ErrorKind::PermissionDenied => {
                "this user may not: have root run `ip tuntap add mode tap user $USER name TAP`, or use --net user"
            }
            io::ErrorKind::ResourceBusy => "somebody else has it open",
            io::ErrorKind::InvalidInput => "an interface of this name exists and is no TAP with one queue",
            _ => return anyhow!("cannot open the tap {name}: {error}"),
        };
        anyhow!("cannot open the tap {name}: {advice}")
    })
}

fn inherited_tap(number: i32) -> Result<OwnedFd> {
    // Whoever adopts a bare number must know that nobody else owns it; a duplicate made by the kernel is simply ours.
    // (Opening it anew below /proc would make a TAP without an interface.)
    let this =
        pidfd_open(getpid(), PidfdFlags::empty()).context("cannot look at bulkhead's own descriptors")?;
    let tap = pidfd_getfd(this, number, PidfdGetfdFlags::empty())
        .map_err(|_| anyhow!("descriptor {number} was not handed over to bulkhead"))?;
    sandbox::tap::flags(tap.as_fd()).map_err(|_| anyhow!("descriptor {number} is not a TAP"))?;
    Ok(tap)
}

fn start_passt(mtu: u16) -> Result<(OwnedFd, Process)> {
    let program = find_program("passt").ok_or_else(|| {
        anyhow!("--net user needs the program passt, which is not to be found: apt install passt")
    })?;
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context("cannot make a socket pair")?;
    let (log, stderr) = pipe().context("cannot make a pipe")?;
    let mut args: Vec<OsString> = ["--foreground", "--quiet", "--fd", "3"]
        .map(OsString::from)
        .into();
    args.extend(["--mtu".into(), mtu.to_string().into()]);
    let child = sandbox::spawn(Spawn {
        program,
        file: None,
        args,
        env: Vec::new(),
        fds: vec![(theirs, 3)],
        namespaces: Namespaces::none(),
        lasting: None,
        stderr: Some(stderr),
        identity: Identity::Keep,
        jail: None,
    })
    .context("cannot start passt")?;
    Ok((ours, Process::without_control(child, log)))
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// Refuses a guest that is larger than this host: it would run until the memory is used up, and be killed then.
pub fn check_memory(memory: Size) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let Some(host) = host_memory(&text) else {
        return Ok(());
    };
    if memory > host {
        let host = Size(host.0 >> 20 << 20);
        bail!("memory of {memory} is more than this host has: {host}, swap included");
    }
    Ok(())
}

/// `man 5 proc_meminfo`: lines like `MemTotal:   16314872 kB`.
fn host_memory(meminfo: &str) -> Option<Size> {
    let kilobytes = |key: &str| -> Option<u64> {
        let line = meminfo.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let total = kilobytes("MemTotal:")?.checked_add(kilobytes("SwapTotal:").unwrap_or(0))?;
    total.checked_mul(1024).map(Size)
}

/// Opens /dev/kvm.
pub fn open_kvm() -> Result<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "there is no /dev/kvm: load kvm-intel or kvm-amd, and switch virtualization on (bulkhead doctor says more)"
        ),
        io::ErrorKind::PermissionDenied => anyhow!(
            "this user may not open /dev/kvm: join the group kvm, then log in again (bulkhead doctor says more)"
        ),
        _ => anyhow!("cannot open /dev/kvm: {error} (bulkhead doctor says more)"),
    })?;
    Ok(file.into())
}

/// Opens the file that the console is written to; made or emptied. `others`: what the VM has open, which must not be that
/// file.
pub fn open_console<'a>(path: &Path, others: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<File> {
    let shown = path.display();
    // Without waiting, as above; and a terminal does not become ours.
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => anyhow!("cannot write the console to {shown}: nobody reads that pipe yet"),
        _ => anyhow!("cannot write the console to {shown}: {error}"),
    })?;
    let identity = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        let own = identity(file.as_fd())?;
        if others.into_iter().any(|other| identity(other) == Ok(own)) {
            bail!("cannot write the console to {shown}: that is a disk, the kernel or the initrd of this VM");
        }
        file.set_len(0).with_context(|| format!("cannot empty {shown}"))?;
    }
    Ok(file)
}

/// Opens a kernel or an initrd.
pub fn open_image(what: &str, path: &Path) -> Result<File> {
    let shown = path.display();
    // Without waiting: a pipe that nobody writes would hold us for ever, and nothing ends us here.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .with_context(|| format!("cannot open the {what} {shown}"))?;
    let metadata = file
        .metadata()
        .with_context(|| format!("cannot look at the {what} {shown}"))?;
    if !metadata.is_file() {
        bail!("the {what} {shown} is not a regular file");
    }
    if metadata.len() == 0 {
        bail!("the {what} {shown} is empty");
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn refused(path: &Path) -> String {
        format!("{:#}", open_disk(path, false).map(|_| ()).expect_err("refused"))
    }

    #[test]
    fn what_is_no_disk_is_refused_with_a_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(refused(folder.path()).contains("is a folder"));
        assert!(refused(Path::new("/dev/null")).contains("neither a regular file nor a block device"));
        let empty = folder.path().join("empty");
        File::create(&empty).expect("made");
        assert!(refused(&empty).contains("0 bytes long"));
        let absent = refused(&folder.path().join("absent"));
        assert!(
            absent.starts_with("there is no disk ") && absent.contains("truncate"),
            "{absent}"
        );
    }

    #[test]
    fn pipes_that_nobody_serves_are_refused_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let kernel = open_image("kernel", &pipe).expect_err("refused").to_string();
        assert!(kernel.ends_with("is not a regular file"), "{kernel}");
        let console = open_console(&pipe, []).expect_err("refused").to_string();
        assert!(console.ends_with("nobody reads that pipe yet"), "{console}");
    }

    #[test]
    fn a_console_empties_its_file_and_no_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let (disk, log) = (folder.path().join("disk"), folder.path().join("log"));
        for file in [&disk, &log] {
            std::fs::write(file, [7; 1024]).expect("written");
        }
        let held = open_disk(&disk, false).expect("a disk");
        let refused = open_console(&disk, [held.as_fd()])
            .expect_err("its disk")
            .to_string();
        assert!(refused.ends_with("the initrd of this VM"), "{refused}");
        assert_eq!(std::fs::metadata(&disk).expect("there").len(), 1024);
        open_console(&log, [held.as_fd()]).expect("another file");
        assert_eq!(std::fs::metadata(&log).expect("there").len(), 0);
        open_console(Path::new("/dev/null"), [held.as_fd()]).expect("no file to be emptied");
    }

    #[test]
    fn each_server_gets_a_description_of_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, [7; 1024]).expect("written");
        let held = open_disk(&path, true).expect("a disk");
        for _ in 0..2 {
            let mut file = File::from(held.for_server().expect("opened again"));
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).expect("read");
            assert_eq!(bytes.len(), 1024);
        }
    }

    #[test]
    fn a_disk_belongs_to_one_vm_or_to_several_that_only_read_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, [7; 1024]).expect("written");
        let open = |read_only| open_disk(&path, read_only).expect("a disk");
        let refused = |held: &Held| held.own().expect_err("refused").to_string();
        let first = open(false);
        first.own().expect("nobody has it");
        // What its servers get is not the lock, and their end does not end it.
        drop(first.for_server().expect("opened again"));
        assert!(refused(&open(false)).contains("is in use by another VM"));
        assert!(refused(&open(true)).contains("is in use by a VM that may write it"));
        drop(first);
        let readers = [open(true), open(true)];
        readers
            .iter()
            .for_each(|reader| reader.own().expect("shared to read"));
        assert!(refused(&open(false)).contains("is in use by another VM"));
    }

    #[test]
    fn a_disk_is_free_when_its_servers_description_is_closed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, [7; 1024]).expect("written");
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        let place = Place::lease(journal.as_fd()).expect("a place");
        let held = open_disk(&path, false).expect("a disk");
        let server = held.for_server().expect("opened again");
        assert!(held.is_free(journal.as_fd()));
        assert_eq!(
            lease::try_lock(server.as_fd(), place, lease::Holder::Description),
            Ok(true)
        );
        assert!(!held.is_free(journal.as_fd()));
        drop(server);
        assert!(held.is_free(journal.as_fd()));
    }

    #[test]
    fn a_tenant_that_reads_the_same_disk_cannot_keep_a_successor_waiting() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        std::fs::write(&path, [7; 1024]).expect("written");
        let journal = sealed_memfd("journal", 4096).expect("a memfd");
        let place = Place::lease(journal.as_fd()).expect("a place");
        let (ours, theirs) = (open_disk(&path, true), open_disk(&path, true));
        let (ours, theirs) = (ours.expect("a disk"), theirs.expect("a disk"));
        let hostile = theirs.for_server().expect("opened again");
        assert_eq!(
            lease::try_lock(hostile.as_fd(), place, lease::Holder::Description),
            Ok(true)
        );
        assert!(ours.is_free(journal.as_fd()));
    }

    #[test]
    fn two_disks_on_one_file_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        let link = folder.path().join("link");
        let other = folder.path().join("other");
        std::fs::write(&path, [7; 1024]).expect("written");
        std::fs::write(&other, [7; 1024]).expect("written");
        std::fs::hard_link(&path, &link).expect("linked");
        let open = |path: &Path, read_only| open_disk(path, read_only).expect("a disk");
        let disks = [open(&other, false), open(&path, false), open(&link, true)];
        assert_eq!(same_file(&disks.iter().collect::<Vec<_>>()), Some((1, 2)));
        let readers = [open(&path, true), open(&link, true)];
        assert_eq!(same_file(&readers.iter().collect::<Vec<_>>()), None);
    }

    #[test]
    fn the_hosts_memory_is_read_from_meminfo() {
        let text = "MemTotal:        2048 kB\nMemFree: 1 kB\nSwapTotal:       1024 kB\n";
        assert_eq!(host_memory(text), Some(Size(3 << 20)));
        assert_eq!(host_memory("MemTotal: 1 kB\n"), Some(Size(1024)));
        assert_eq!(host_memory("nothing"), None);
        assert!(check_memory(Size(1 << 20)).is_ok());
        let refused = check_memory(Size(1 << 50)).expect_err("too large").to_string();
        assert!(
            refused.starts_with("memory of 1024T is more than this host has: "),
            "{refused}"
        );
    }

    #[test]
    fn images_are_regular_files_with_something_in_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let empty = folder.path().join("empty");
        File::create(&empty).expect("made");
        let said = |path: &Path| format!("{:#}", open_image("kernel", path).expect_err("refused"));
        assert!(said(&empty).ends_with("is empty"));
        assert!(said(folder.path()).ends_with("is not a regular file"));
        assert!(said(Path::new("/nonexistent")).starts_with("cannot open the kernel /nonexistent: "));
    }
}
