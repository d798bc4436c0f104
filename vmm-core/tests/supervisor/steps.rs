#![forbid(unsafe_code)]
//! A supervisor that is killed after each of its system calls that somebody else can see, one after the other, while it
//! replaces a server. What it does between two of them is in its own memory, which nobody sees: so this is a kill at
//! every instruction.
//!
//! The test traces the supervisor (ptrace(2)), so that nothing of this is in the program.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use vmbus::ipc::Socket;
use vmm_core::supervisor::adopt::DISOWNED;
use vmm_core::supervisor::chronicle::{Entry, Event};
use vmm_core::supervisor::control::{DeviceLine, Reply, Request};

use super::adoption::{disk, signal};
use super::operator::events;
use super::place::{PATIENCE, Place, Running};
use super::swaps::{process, program, runs, stop};

pub const ALL: &[(&str, fn())] = &[
    (
        "a_swap_survives_its_supervisor_at_every_step",
        a_swap_survives_its_supervisor_at_every_step,
    ),
    (
        "a_restart_survives_its_supervisor_at_every_step",
        a_restart_survives_its_supervisor_at_every_step,
    ),
    (
        "the_promotion_of_a_standby_survives_its_supervisor_at_every_step",
        the_promotion_of_a_standby_survives_its_supervisor_at_every_step,
    ),
    (
        "what_is_said_of_a_bad_server_survives_its_supervisor_at_every_step",
        what_is_said_of_a_bad_server_survives_its_supervisor_at_every_step,
    ),
];

/// Calls that change nothing that others see. Of all others it is believed that they do. What is closed is closed by a kill,
/// too, and limits are set of a child that does not run yet.
const UNSEEN: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_wait,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
];

/// How long a supervisor has nothing to do, when it has done what it had to, before that is looked for. All that depends on
/// it is which steps count.
const IDLE: Duration = Duration::from_millis(50);

/// How long a supervisor waits for a server that was told to stop, in microseconds.
const STOP_US: u64 = 5_000_000;

/// A supervisor that is traced.
struct Traced {
    running: Running,
    pid: Pid,
    /// It has been stopped by this signal, or by none.
    signal: Option<Signal>,
}

impl Traced {
    /// Stops one between two system calls, if this user may trace at all.
    fn stop(running: Running) -> Result<Self, Running> {
        let pid = Pid::from_raw(i32::try_from(running.child.id()).expect("a process id"));
        if ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).is_err() {
            return Err(running);
        }
        ptrace::interrupt(pid).expect("it is traced");
        let mut traced = Traced {
            running,
            pid,
            signal: None,
        };
        match waitpid(pid, None).expect("it is ours") {
            WaitStatus::PtraceEvent(..) => {}
            // Of a child that has ended just now.
            WaitStatus::Stopped(_, signal) => traced.signal = Some(signal),
            other => panic!("{other:?}"),
        }
        Ok(traced)
    }

    /// Lets it make so many calls that others see, and returns the last one's number. `None`: it has no more to do before
    /// that, and is let go.
    fn go(&mut self, calls: usize, mut is_done: impl FnMut() -> bool) -> Option<i64> {
        let mut seen = 0;
        loop {
            ptrace::syscall(self.pid, self.signal.take()).expect("it is stopped");
            let status = self.wait(&mut is_done)?;
            match status {
                WaitStatus::PtraceSyscall(_) => {
                    let registers = ptrace::getregs(self.pid).expect("it is stopped");
                    let call = registers.orig_rax.cast_signed();
                    let begins = registers.rax.cast_signed() == -i64::from(libc::ENOSYS);
                    seen += usize::from(!begins && !UNSEEN.contains(&call));
                    if seen == calls {
                        return Some(call);
                    }
                }
                WaitStatus::Stopped(_, signal) => self.signal = Some(signal),
                WaitStatus::PtraceEvent(..) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits for its next stop. `None`: it waits, too, and all is done.
    fn wait(&self, is_done: &mut impl FnMut() -> bool) -> Option<WaitStatus> {
        let (mut since, began) = (Instant::now(), Instant::now());
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)).expect("it is ours") {
                WaitStatus::StillAlive if since.elapsed() > IDLE => {
                    if is_done() {
                        return None;
                    }
                    assert!(began.elapsed() < PATIENCE, "it does nothing");
                    since = Instant::now();
                }
                WaitStatus::StillAlive => std::thread::yield_now(),
                status => return Some(status),
            }
        }
    }
}

/// A VM that gets one supervisor after the other.
struct Course {
    place: Place,
    standby: bool,
    /// Number of the last event that was looked at.
    last_event: u64,
}

impl Course {
    fn new(standby: bool) -> (Self, Running) {
        let place = Place::new();
        let disk = format!("memory=1M,standby={standby}");
        let console = format!("file={}", place.path("console").display());
        // What an adopter does it does at once, and not when it next asks who still lives.
        let running = place.start(&[
            "--cmdline",
            "watch",
            "--disk",
            &disk,
            "--console",
            &console,
            "--patience",
            "0",
        ]);
        let mut course = Course {
            place,
            standby,
            last_event: 0,
        };
        course.settle();
        (course, running)
    }

    /// What happened since this was asked last.
    fn news(&mut self) -> Vec<Event> {
        let news = self.peek();
        self.last_event = news.last().map_or(self.last_event, |entry| entry.number);
        news.into_iter().map(|entry| entry.event).collect()
    }

    fn peek(&self) -> Vec<Entry> {
        let mut news = events(&self.place);
        news.retain(|entry| entry.number > self.last_event);
        news
    }

    /// Waits until the device is served, has its standby if it wants one, and there is nobody else.
    fn settle(&mut self) -> DeviceLine {
        self.place.wait_until_it_runs();
        let deadline = Instant::now() + PATIENCE / 2;
        loop {
            let line = disk(&self.place);
            let waits = line.successor.as_ref().map(|(state, _, _)| state == "waits");
            let successor = line.successor.as_ref().map(|(_, generation, _)| *generation);
            let strangers = self.strangers();
            if line.state == "serves"
                && waits == self.standby.then_some(true)
                && line.process.is_some_and(|server| runs(server, &line.program))
                && strangers.is_empty()
                && self.known_to_bus() == (Some(line.generation), successor)
            {
                return line;
            }
            let events = events(&self.place);
            let last = events.get(events.len().saturating_sub(12)..);
            assert!(
                Instant::now() < deadline,
                "{line:#?}, {strangers:?} after {last:#?}"
            );
        }
    }

    /// Processes of programs of this place that the supervisor does not know.
    fn strangers(&self) -> Vec<(i32, String)> {
        let known: BTreeSet<i32> = self
            .place
            .wait_until_it_runs()
            .into_iter()
            .map(|(_, process)| process)
            .collect();
        let folder = self.place.folder.path().display().to_string();
        let numbers = std::fs::read_dir("/proc").expect("there is one");
        let numbers = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        numbers
            .filter(|number| !known.contains(number))
            .filter_map(|number: i32| {
                let line = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).into_owned();
                line.starts_with(&folder).then_some((number, line))
            })
            .collect()
    }

    /// Who serves and who waits, by all that `bulkhead-bus` was told: it has one place for each.
    fn known_to_bus(&self) -> (Option<u32>, Option<u32>) {
        let heard = std::fs::read_to_string(self.place.path("console")).expect("readable");
        let (mut serves, mut waits) = (Some(1), None);
        // The last line may still be written.
        let told = heard.rsplit_once('\n').map_or("", |(told, _)| told);
        for told in told.lines().skip(1) {
            let (what, generation) = told.split_once(' ').expect("two words");
            let generation: u32 = generation.parse().expect("a number");
            match what {
                "ServerAttached" => {
                    let place = if serves.is_none() { &mut serves } else { &mut waits };
                    assert_eq!(
                        place.replace(generation),
                        None,
                        "no place for {generation}: {heard}"
                    );
                }
                // Once more, or of one that bulkhead-bus has not heard of: nothing new.
                _ => {
                    waits.take_if(|waits| *waits == generation);
                    if serves.take_if(|serves| *serves == generation).is_some() {
                        serves = waits.take();
                    }
                }
            }
        }
        (serves, waits)
    }

    /// Kills the supervisor at each step that follows `deed`, up to the event that is its end; `check` sees each time what
    /// came of it, once the device, as it was before and is now, `is_past` it.
    fn run(
        mut self,
        mut running: Running,
        deed: impl Fn(&Place, &DeviceLine, &mut Socket),
        is_end: impl Fn(&Event) -> bool,
        is_past: impl Fn(&DeviceLine, &DeviceLine) -> bool,
        check: impl Fn(&Outcome),
    ) {
        for calls in 1.. {
            self.forget();
            let before = self.settle();
            let mut asked = self.place.connect();
            self.news();
            let mut traced = match Traced::stop(running) {
                Ok(traced) => traced,
                Err(untraced) => {
                    println!("SKIP supervisor: this user may not trace a process of its own");
                    running = untraced;
                    break;
                }
            };
            deed(&self.place, &before, &mut asked);
            let step = traced.go(calls, || self.peek().iter().any(|entry| is_end(&entry.event)));
            traced.running.kill();
            let answer = asked.recv::<Reply>().ok().flatten().map(|(reply, _)| reply);
            running = self.place.adopt("vm");
            let deadline = Instant::now() + PATIENCE / 2;
            let mut after = self.settle();
            while !is_past(&before, &after) && Instant::now() < deadline {
                after = self.settle();
            }
            let events = once(self.news());
            check(&Outcome {
                before,
                answer,
                events,
                after,
            });
            if step.is_none() {
                assert!(calls > 20, "there are more steps than that");
                break;
            }
        }
        stop(&self.place, running);
        self.place.expect_ended();
    }

    /// Deaths of servers before a swap do not count any more, so that the device is never held.
    fn forget(&self) {
        let swap = Request::Swap {
            device: "disk0".to_owned(),
            program: None,
            patience_s: 60,
        };
        let answer = self.place.ask(&swap);
        assert!(matches!(answer[..], [Reply::Swapped { .. }]), "{answer:?}");
    }
}

/// What came of a deed whose supervisor was killed.
#[derive(Debug)]
struct Outcome {
    before: DeviceLine,
    answer: Option<Reply>,
    events: Vec<Event>,
    after: DeviceLine,
}

/// What a supervisor has noted just before it was killed, and not told its keeper, the next one notes again.
fn once(mut events: Vec<Event>) -> Vec<Event> {
    let mut seen = BTreeSet::new();
    events.retain(|event| {
        let mut fields = serde_json::to_value(event).expect("JSON");
        let fields = fields.as_object_mut().expect("fields");
        for of_supervisor in ["stall_us", "report", "cause", "why"] {
            fields.remove(of_supervisor);
        }
        seen.insert(serde_json::to_string(fields).expect("JSON"))
    });
    events
}

impl Outcome {
    fn count(&self, is_it: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|event| is_it(event)).count()
    }

    /// Servers that died, but for those that an adopter kills because they may be unknown.
    fn deaths(&self) -> Vec<u32> {
        let deaths = self.events.iter().filter_map(|event| match event {
            Event::Death { why, .. } if why.as_deref() == Some(DISOWNED) => None,
            Event::Death { generation, .. } => Some(*generation),
            _ => None,
        });
        deaths.collect()
    }
}

fn a_swap_survives_its_supervisor_at_every_step() {
    let (course, running) = Course::new(false);
    let programs = ["good", "fine"].map(|play| program(&course.place, play).display().to_string());
    let other = |line: &DeviceLine| programs[usize::from(line.program == programs[0])].clone();
    course.run(
        running,
        |_, before, asked| {
            let swap = Request::Swap {
                device: "disk0".to_owned(),
                program: Some(other(before).into()),
                patience_s: 60,
            };
            asked.send(&swap, &[]).expect("sent");
        },
        |event| matches!(event, Event::Swap { .. }),
        |_, _| true,
        |outcome| {
            let Outcome { before, after, .. } = outcome;
            let done = outcome.count(|event| matches!(event, Event::Swap { .. }));
            let undone = outcome.count(|event| matches!(event, Event::SwapFailed { .. }));
            assert!(done + undone <= 1, "{outcome:#?}");
            match done {
                0 => assert_eq!(
                    (&before.program, before.process),
                    (&after.program, after.process),
                    "{outcome:#?}"
                ),
                _ => assert_eq!(other(before), after.program, "{outcome:#?}"),
            }
            if let Some(answer) = &outcome.answer {
                assert!(
                    matches!(answer, Reply::Swapped { .. }) && done == 1,
                    "{outcome:#?}"
                );
            }
            assert!(outcome.deaths().is_empty(), "nobody died: {outcome:#?}");
            // Nobody waits for a Released that was read by a supervisor that is dead: the old server's end says as much.
            let too_long =
                |event: &Event| matches!(event, Event::Swap { stall_us, .. } if *stall_us >= STOP_US);
            assert_eq!(outcome.count(too_long), 0, "{outcome:#?}");
        },
    );
}

fn a_restart_survives_its_supervisor_at_every_step() {
    deaths_survive_their_supervisors(false);
}

fn the_promotion_of_a_standby_survives_its_supervisor_at_every_step() {
    deaths_survive_their_supervisors(true);
}

/// bulkhead-bus says it once, and the supervisor that has read it is killed.
fn what_is_said_of_a_bad_server_survives_its_supervisor_at_every_step() {
    let (course, running) = Course::new(false);
    let player = process(&course.place, "vcpu");
    // The sign for bulkhead-bus, as played, to accuse who serves.
    servers_get_successors_after(course, running, |_| signal(player, Signal::SIGUSR1));
}

fn deaths_survive_their_supervisors(standby: bool) {
    let (course, running) = Course::new(standby);
    servers_get_successors_after(course, running, |before| {
        signal(before.process.expect("it serves"), Signal::SIGKILL);
    });
}

/// `end` is the end of the present server.
fn servers_get_successors_after(course: Course, running: Running, end: impl Fn(&DeviceLine)) {
    let standby = course.standby;
    course.run(
        running,
        |_, before, _| end(before),
        |event| match standby {
            true => matches!(event, Event::Standby { .. }),
            false => matches!(event, Event::Serving { .. }),
        },
        |before, after| after.generation > before.generation,
        |outcome| {
            let Outcome { before, after, .. } = outcome;
            assert!(after.generation > before.generation, "{outcome:#?}");
            assert_eq!(outcome.deaths(), [before.generation], "{outcome:#?}");
            let serves = |event: &Event| matches!(event, Event::Serving { .. });
            assert_eq!(outcome.count(serves), 1, "{outcome:#?}");
            // The one that waited has it, whatever became of the supervisor.
            if let Some((_, waited, _)) = before.successor {
                assert_eq!(after.generation, waited, "{outcome:#?}");
            }
        },
    );
}
