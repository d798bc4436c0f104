//! The baselines: processes that have nothing but io_uring.

#![forbid(unsafe_code)]

use super::{BYTES, Cost, DEPTH, Driver, Mix, REQUESTS, cost, drive, place, processor_time};
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::time::ClockId;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use vmbus::ipc::server_start::Start;
use vmbus::mem::{Access, Durability, File as UringFile, GuestSpans, SharedMap, Uring, sealed_memfd};
use vmbus::vsc::{PlayedSupervisor, StartOptions};

/// Limit: how long one answer may take.
const PATIENCE_MS: u16 = 30_000;

/// The shared area: words, each in a cache line of its own; two queues; pages for data.
const SENT_WORD: u64 = 0;
const SERVER_SLEEPS_WORD: u64 = 128;
const DONE_WORD: u64 = 256;
const GUEST_SLEEPS_WORD: u64 = 384;
const REQUESTS_START: u64 = 1024;
const ANSWERS_START: u64 = 2048;
const PAGES_START: u64 = 4096;
const AREA_BYTES: u64 = PAGES_START + DEPTH * BYTES as u64;
/// Twice as many as can be under way: a queue is never full.
const QUEUE: u64 = 2 * DEPTH;
/// In a request, besides its offset, which has none of these bits: the slot, and whether it writes.
const WRITES: u64 = 1 << 11;
const SLOT: u64 = WRITES - 1;

const KICK: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;

/// io_uring on one file and a page of memory for each request.
struct Disk {
    io: Uring,
    pages: Vec<GuestSpans>,
}

impl Disk {
    fn new(file: impl AsFd, map: &Arc<SharedMap>) -> Result<Self> {
        let pages = (0..DEPTH)
            .map(|slot| GuestSpans::from_map(map.clone(), PAGES_START + slot * u64::from(BYTES), BYTES))
            .collect::<Result<_, _>>()?;
        let mut io = Uring::new(2 * DEPTH as u32)?;
        io.register_files(&[file.as_fd()])?;
        Ok(Self { io, pages })
    }

    fn issue(&mut self, offset: u64, writes: bool, slot: u64) -> Result<()> {
        let file = UringFile::Registered(0);
        let page = self.pages.get(slot as usize).context("no such slot")?;
        match writes {
            true => self.io.write(file, page, offset, Durability::Cached, slot)?,
            false => self.io.read(file, page, offset, slot)?,
        };
        Ok(())
    }
}

fn check(result: i32) -> Result<()> {
    ensure!(result == BYTES as i32, "a request failed: {result}");
    Ok(())
}

fn open(image: &Path) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).open(image)?)
}

/// This process, which makes its requests itself.
pub(super) struct Alone {
    disk: Disk,
}

impl Alone {
    pub(super) fn new(image: &Path) -> Result<Self> {
        let map = Arc::new(SharedMap::anonymous("bench-alone", AREA_BYTES as usize)?);
        Ok(Self {
            disk: Disk::new(open(image)?, &map)?,
        })
    }

    pub(super) fn round(&mut self, mix: Mix) -> Result<Cost> {
        let clock = ClockId::CLOCK_PROCESS_CPUTIME_ID;
        let (before, start) = (processor_time(clock)?, Instant::now());
        let issue = |disk: &mut Disk, number: u64, slot: u64| {
            let (offset, writes) = place(number, mix);
            disk.issue(offset, writes, slot)
        };
        for slot in 0..DEPTH {
            issue(&mut self.disk, slot, slot)?;
        }
        let (mut issued, mut done) = (DEPTH, 0);
        while done < REQUESTS {
            self.disk.io.submit_and_wait(1, None)?;
            while let Some(completion) = self.disk.io.next_completion() {
                check(completion.result)?;
                done += 1;
                if issued < REQUESTS {
                    issue(&mut self.disk, issued, completion.user_data)?;
                    issued += 1;
                }
            }
        }
        cost(clock, before, start)
    }
}

/// What a driver and a server of a plain queue share.
struct Queue {
    map: Arc<SharedMap>,
    sent: u64,
    done: u64,
}

impl Queue {
    fn load(&self, word: u64) -> Result<u64> {
        Ok(self.map.load_u64(word, Ordering::Acquire)?)
    }

    fn store(&self, word: u64, value: u64) -> Result<()> {
        Ok(self.map.store_u64(word, value, Ordering::Release)?)
    }

    /// Publishes `count` in `word`; whether the other side sleeps and must be woken.
    fn publish(&self, word: u64, count: u64, sleeps: u64) -> Result<bool> {
        self.store(word, count)?;
        fence(Ordering::SeqCst);
        let wake = self.load(sleeps)? != 0;
        if wake {
            self.store(sleeps, 0)?;
        }
        Ok(wake)
    }

    /// Says that this side is going to sleep. `false`: it must not, because `word` has moved on from `seen`.
    fn may_sleep(&self, word: u64, seen: u64, sleeps: u64) -> Result<bool> {
        self.store(sleeps, 1)?;
        fence(Ordering::SeqCst);
        let may = self.load(word)? == seen;
        if !may {
            self.store(sleeps, 0)?;
        }
        Ok(may)
    }
}

/// A process that is sent its requests.
pub(super) struct Driven {
    guest: Guest,
    supervisor: PlayedSupervisor,
    child: Child,
    clock: ClockId,
}

struct Guest {
    queue: Queue,
    kick: EventFd,
    interrupt: EventFd,
}

impl Driven {
    pub(super) fn new(image: &Path) -> Result<Self> {
        let memory = sealed_memfd("bench-driven", AREA_BYTES)?;
        let map = SharedMap::map(memory.as_fd(), AREA_BYTES as usize, Access::ReadWrite)?;
        let [kick, interrupt] = [eventfd()?, eventfd()?];
        let (ours, theirs) = vmbus::ipc::pair().context("cannot make a pair of sockets")?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("bench-storage")
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("cannot start the baseline's process")?;
        let mut supervisor = PlayedSupervisor::new(ours);
        let file = open(image)?;
        let fds = [
            ("memory", memory.as_fd()),
            ("file", file.as_fd()),
            ("kick", kick.as_fd()),
            ("interrupt", interrupt.as_fd()),
        ];
        let started = supervisor.start(&StartOptions::new("bench", "{}"), &fds);
        let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS.into());
        if let Err(error) = started.and_then(|()| supervisor.wait_ready(deadline)) {
            child.kill().ok();
            child.wait().ok();
            return Err(error.into());
        }
        let clock = ClockId::pid_cpu_clock_id(nix::unistd::Pid::from_raw(child.id() as i32))?;
        let queue = Queue {
            map: Arc::new(map),
            sent: 0,
            done: 0,
        };
        Ok(Self {
            guest: Guest {
                queue,
                kick,
                interrupt,
            },
            supervisor,
            child,
            clock,
        })
    }

    pub(super) fn round(&mut self, mix: Mix) -> Result<Cost> {
        drive(&mut self.guest, mix, self.clock)
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        if self.supervisor.stop().is_err() {
            self.child.kill().ok();
        }
        self.child.wait().ok();
    }
}

impl Driver for Guest {
    fn send(&mut self, offset: u64, writes: bool, slot: u64) -> Result<()> {
        let request = offset | if writes { WRITES } else { 0 } | slot;
        let queue = &mut self.queue;
        queue.store(REQUESTS_START + queue.sent % QUEUE * 8, request)?;
        queue.sent += 1;
        if queue.publish(SENT_WORD, queue.sent, SERVER_SLEEPS_WORD)? {
            self.kick.write(1)?;
        }
        Ok(())
    }

    fn collect(&mut self, free: &mut Vec<u64>) -> Result<()> {
        let mut done = self.queue.load(DONE_WORD)?;
        while done == self.queue.done {
            if self.queue.may_sleep(DONE_WORD, done, GUEST_SLEEPS_WORD)? {
                let mut fds = [PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN)];
                let timeout = PollTimeout::from(PATIENCE_MS);
                ensure!(
                    poll(&mut fds, timeout)? == 1,
                    "the baseline's process does not answer"
                );
                self.interrupt.read()?;
            }
            done = self.queue.load(DONE_WORD)?;
        }
        while self.queue.done < done {
            free.push(self.queue.load(ANSWERS_START + self.queue.done % QUEUE * 8)?);
            self.queue.done += 1;
        }
        Ok(())
    }
}

fn eventfd() -> Result<EventFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_value_and_flags(0, flags).context("cannot make an eventfd")
}

/// The process that is sent requests. Its standard input is its control socket. It ends when that says anything.
pub fn server() -> Result<ExitCode> {
    let mut start = Start::receive(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    let memory = start.fds.take("memory")?;
    let map = SharedMap::map(memory.as_fd(), AREA_BYTES as usize, Access::ReadWrite)?;
    let map = Arc::new(map);
    let [file, kick, interrupt] = ["file", "kick", "interrupt"].map(|name| start.fds.take(name));
    let (file, kick, interrupt): (OwnedFd, OwnedFd, OwnedFd) = (file?, kick?, interrupt?);
    let mut disk = Disk::new(file, &map)?;
    let (multishot, input) = (true, libc::POLLIN);
    disk.io
        .poll_add(UringFile::Fd(kick.as_fd()), input, multishot, KICK)?;
    let control = start.ready(String::new())?;
    disk.io
        .poll_add(UringFile::Fd(control.as_fd()), input, multishot, CONTROL)?;
    let mut queue = Queue {
        map,
        sent: 0,
        done: 0,
    };
    let mut marked = true;
    loop {
        disk.io.submit_and_wait(usize::from(!marked), None)?;
        let done = queue.done;
        while let Some(completion) = disk.io.next_completion() {
            match completion.user_data {
                KICK => ensure!(completion.more, "the poll of the kick has ended"),
                CONTROL => return Ok(ExitCode::SUCCESS),
                slot => {
                    check(completion.result)?;
                    queue.store(ANSWERS_START + queue.done % QUEUE * 8, slot)?;
                    queue.done += 1;
                }
            }
        }
        let sent = queue.load(SENT_WORD)?;
        while queue.sent < sent {
            let request = queue.load(REQUESTS_START + queue.sent % QUEUE * 8)?;
            let offset = request & !(SLOT | WRITES);
            disk.issue(offset, request & WRITES != 0, request & SLOT)?;
            queue.sent += 1;
        }
        if queue.done != done && queue.publish(DONE_WORD, queue.done, GUEST_SLEEPS_WORD)? {
            nix::unistd::write(&interrupt, &1_u64.to_ne_bytes())?;
        }
        marked = !queue.may_sleep(SENT_WORD, queue.sent, SERVER_SLEEPS_WORD)?;
    }
}
