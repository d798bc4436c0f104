//! A disk that holds requests back for as long as a test wants: a file system of one file, served by the test itself
//! (FUSE; fuse(4), linux/fuse.h), and a loop device on it.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const DISK_BYTES: usize = 4 << 20;
const DISK_NODE: u64 = 2;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// FUSE_ASYNC_READ, FUSE_BIG_WRITES, FUSE_ASYNC_DIO.
const FLAGS: u32 = 1 | 1 << 5 | 1 << 15;
const MAX_WRITE: u32 = 128 << 10;

/// How the disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As a file on the file system.
    File,
    /// As a block device: the kernel's block layer stands between.
    Loop,
}

#[derive(Debug)]
struct Held {
    unique: u64,
    offset: usize,
    /// To be written; `None`: so many bytes are to be read.
    data: Result<Vec<u8>, usize>,
}

#[derive(Debug)]
struct State {
    disk: Vec<u8>,
    holding: bool,
    held: Vec<Held>,
    /// Nothing may come while something is held.
    alone: bool,
    early: Vec<String>,
}

#[derive(Debug)]
struct Shared {
    fuse: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

/// The file system, mounted in namespaces of its own, and gone with this.
pub struct SlowDisk {
    keeper: Child,
    _said: BufReader<ChildStdout>,
    path: PathBuf,
    shared: Arc<Shared>,
    daemon: Option<JoinHandle<()>>,
    _stop: OwnedFd,
}

impl SlowDisk {
    /// `None`: it cannot be had here.
    pub fn new(kind: Kind) -> Option<Self> {
        let root = nix::unistd::geteuid().is_root();
        if kind == Kind::Loop && !root {
            return None;
        }
        let (namespaces, others): (&[&str], _) = match root {
            // Servers then have users of their own.
            true => (&["--mount"], ",allow_other"),
            false => (&["--user", "--map-root-user", "--mount"], ""),
        };
        let mount = format!(
            "mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0{others} slow /mnt && echo mounted"
        );
        // When nobody writes to it any more it ends, and the device ends with its last user.
        let device = match kind {
            Kind::File => "read line",
            Kind::Loop => {
                "read line; device=$(losetup --find --show --direct-io=on /mnt/disk) && echo $device; \
                 read line; losetup -d $device"
            }
        };
        let mut keeper = Command::new("unshare")
            .args(namespaces)
            .args(["sh", "-c", &format!("exec 3<>/dev/fuse && {mount} && {device}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut said = BufReader::new(keeper.stdout.take()?);
        let mut line = String::new();
        said.read_line(&mut line).ok()?;
        let pid = Pid::from_raw(keeper.id() as i32)?;
        let opened = (line == "mounted\n").then(|| {
            let keeper = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            let fuse = pidfd_getfd(keeper, 3, PidfdGetfdFlags::empty()).ok()?;
            Some((fuse, nix::unistd::pipe().ok()?))
        });
        let Some((fuse, (stopped, stop))) = opened.flatten() else {
            drop(keeper.stdin.take());
            keeper.wait().ok()?;
            return None;
        };
        let shared = Arc::new(Shared {
            fuse,
            state: Mutex::new(State {
                disk: vec![0; DISK_BYTES],
                holding: false,
                held: Vec::new(),
                alone: false,
                early: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let daemon = {
            let shared = shared.clone();
            std::thread::spawn(move || serve(&shared, &stopped))
        };
        let mut this = Self {
            path: format!("/proc/{}/root/mnt/disk", keeper.id()).into(),
            keeper,
            _said: said,
            shared,
            daemon: Some(daemon),
            _stop: stop,
        };
        if kind == Kind::Loop {
            writeln!(this.keeper.stdin.as_ref()?).ok()?;
            let mut line = String::new();
            this._said.read_line(&mut line).ok()?;
            this.path = line.trim_end().into();
            if !this.path.is_absolute() {
                return None;
            }
        }
        Some(this)
    }

    /// The disk, opened.
    pub fn open(&self) -> OwnedFd {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(&self.path);
        file.expect("the disk opens").into()
    }

    /// From now on reads and writes get no answer.
    pub fn hold(&self) {
        self.lock().holding = true;
    }

    /// Waits until so many are held; the order in which they are is not told.
    pub fn wait_held(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut state = self.lock();
        while state.held.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} requests came", state.held.len());
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .expect("not poisoned")
                .0;
        }
    }

    /// From now on nobody may ask for anything before all that is held was answered.
    pub fn expect_silence(&self) {
        self.lock().alone = true;
    }

    /// Requests that came though others were held.
    pub fn early(&self) -> Vec<String> {
        self.lock().early.clone()
    }

    /// Does what is held, and everything else from now on at once.
    pub fn release(&self) {
        let mut state = self.lock();
        state.holding = false;
        for held in std::mem::take(&mut state.held) {
            act(&self.shared.fuse, &mut state.disk, held);
        }
    }

    /// What the disk holds.
    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.lock().disk[offset..offset + len].to_vec()
    }

    /// Puts it there behind everybody's back.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        self.lock().disk[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("not poisoned")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Ok(mut state) = self.shared.state.lock() {
            state.holding = false;
            for held in std::mem::take(&mut state.held) {
                act(&self.shared.fuse, &mut state.disk, held);
            }
        }
        // The end of its standard input: it gives the device back and ends, and the mount with it. The last words of
        // the device are written and answered before.
        drop(self.keeper.stdin.take());
        if let Err(error) = self.keeper.wait() {
            eprintln!("the keeper of the file system: {error}");
        }
        drop(std::mem::replace(
            &mut self._stop,
            self.shared.fuse.try_clone().expect("a descriptor"),
        ));
        if let Some(daemon) = self.daemon.take() {
            daemon.join().ok();
        }
    }
}

/// Answers the kernel until it, or the test, has enough.
fn serve(shared: &Shared, stopped: &OwnedFd) {
    let mut buffer = vec![0; 2 * MAX_WRITE as usize];
    loop {
        let mut fds = [
            PollFd::new(shared.fuse.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if fds[1].any() == Some(true) {
            return;
        }
        match read(&shared.fuse, &mut buffer) {
            Ok(len) => on_request(shared, &buffer[..len]),
            Err(nix::errno::Errno::ENODEV) => return,
            // One that was given up meanwhile.
            Err(_) => {}
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// `struct fuse_in_header` has 40 bytes: length, operation, unique number, node, user, group, process.
fn on_request(shared: &Shared, request: &[u8]) {
    let (operation, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
    let body = &request[40..];
    let fuse = &shared.fuse;
    match operation {
        INIT => answer(
            fuse,
            unique,
            &words(&[7, 31, 0, FLAGS, 64 | 48 << 16, MAX_WRITE, 1]),
            64,
        ),
        LOOKUP if body == b"disk\0" => {
            let mut entry = [DISK_NODE, 1, 0, 0, 0].map(u64::to_le_bytes).concat();
            entry.extend(attributes(DISK_NODE));
            answer(fuse, unique, &entry, 0);
        }
        GETATTR | SETATTR => {
            let mut out = vec![0; 16];
            out.extend(attributes(node));
            answer(fuse, unique, &out, 0);
        }
        OPEN => answer(fuse, unique, &[], 16),
        STATFS => answer(fuse, unique, &[], 80),
        RELEASE | FSYNC | FLUSH => answer(fuse, unique, &[], 0),
        READ | WRITE => {
            let (offset, size) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
            let data = match operation {
                WRITE => Ok(body[40..40 + size].to_vec()),
                _ => Err(size),
            };
            let mut state = shared.state.lock().expect("not poisoned");
            if state.alone && !state.held.is_empty() {
                let what = format!("operation {operation} at {offset}");
                state.early.push(what);
            }
            let held = Held { unique, offset, data };
            match state.holding {
                true => state.held.push(held),
                false => act(fuse, &mut state.disk, held),
            }
            shared.changed.notify_all();
        }
        FORGET | BATCH_FORGET | INTERRUPT => {}
        LOOKUP => refuse(fuse, unique, libc::ENOENT),
        _ => refuse(fuse, unique, libc::ENOSYS),
    }
}

fn act(fuse: &OwnedFd, disk: &mut [u8], held: Held) {
    match held.data {
        Ok(data) => {
            disk[held.offset..held.offset + data.len()].copy_from_slice(&data);
            answer(fuse, held.unique, &words(&[data.len() as u32]), 8);
        }
        Err(size) => {
            let end = (held.offset + size).min(disk.len());
            answer(fuse, held.unique, &disk[held.offset.min(end)..end], 0);
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// `struct fuse_attr`: number, size, blocks, three times, their nanoseconds, mode, links, user, group, device, block size.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = match node {
        DISK_NODE => (libc::S_IFREG | 0o666, DISK_BYTES as u64),
        _ => (libc::S_IFDIR | 0o777, 0),
    };
    let mut bytes = [node, size, size / 512, 0, 0, 0].map(u64::to_le_bytes).concat();
    bytes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
    bytes
}

/// `struct fuse_out_header`: length, error, unique number. `body` is made `at_least` so long with zeroes.
fn answer(fuse: &OwnedFd, unique: u64, body: &[u8], at_least: usize) {
    let len = body.len().max(at_least);
    let mut message = words(&[16 + len as u32, 0]);
    message.extend(unique.to_le_bytes());
    message.extend(body);
    message.resize(16 + len, 0);
    // The kernel may have given it up: ENOENT.
    write(fuse, &message).ok();
}

fn refuse(fuse: &OwnedFd, unique: u64, errno: i32) {
    let mut message = words(&[16, errno.wrapping_neg().cast_unsigned()]);
    message.extend(unique.to_le_bytes());
    write(fuse, &message).ok();
}
