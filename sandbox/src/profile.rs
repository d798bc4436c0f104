#![forbid(unsafe_code)]
//! What each program may ask of the kernel: one function per program.
//!
//! An entry is a system call, the conditions its arguments must meet, and `by`: who makes it. `by` is the path
//! of a source file and the function in it, or, for calls that no code of ours makes, `runtime: ` and the part
//! of the C library or of Rust's that does. An entry nobody can name a caller for does not belong here.
//!
//! No program may open, connect, execute, trace, mount, or make a namespace; memory can never become
//! executable. Calls on descriptors are not restricted to certain descriptors: a sandbox holds exactly those it
//! needs, and their own rights (read-only, sealed) are the finer tool.

use libc as c;

use crate::limits::Limits;

mod kvm;

/// The sandbox of one program.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The program; becomes the process's name, so at most 15 bytes.
    pub name: &'static str,
    pub syscalls: Vec<Rule>,
    pub limits: Limits,
}

/// One system call of an allow-list.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The call's name in `man 2 syscalls`.
    pub name: &'static str,
    /// Its number on x86-64.
    pub number: i64,
    /// All of these must hold; a call that fails one of them is not allowed by this rule.
    pub when: &'static [When],
    pub answer: Answer,
    /// Who makes the call; see the module's text.
    pub by: &'static str,
}

/// What the kernel does with a call that meets its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Allow,
    /// Fails with this errno. For calls that a library tries first and can do without.
    Errno(i32),
}

/// A condition on an argument (counted from 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The low 32 bits are one of these. Only for arguments that the kernel itself takes as 32 bits.
    OneOf { argument: u8, values: &'static [u32] },
    /// The argument, masked, is this.
    Bits { argument: u8, mask: u64, equal: u64 },
    /// The argument is zero.
    Null { argument: u8 },
    /// The argument is the id of this process.
    OwnPid { argument: u8 },
}

/// bulkhead-vcpu: KVM, the overlay pages, its threads, and the sockets to the supervisor and to bulkhead-bus.
pub fn vcpu() -> Profile {
    Profile {
        name: "bulkhead-vcpu",
        syscalls: [RUNTIME, MEMORY, THREADS, SOCKETS, EPOLL, VCPU].concat(),
        // Limit: two eventfds for each of at most 1,024 open channels, and as many for what is on its way; the rest is
        // slack. Where the host allows less, bulkhead-bus opens fewer channels.
        limits: Limits {
            open_files: 16384,
            threads: 96,
        },
    }
}

/// bulkhead-block: one disk, by an io_uring that was set up and restricted before.
pub fn block() -> Profile {
    Profile {
        name: "bulkhead-block",
        syscalls: [RUNTIME, MEMORY, SOCKETS, BLOCK].concat(),
        // Limit: threads are io_uring's workers: by default min(queue entries, 4 x CPUs) bounded ones, and as
        // many unbounded ones as this limit lets it have (Linux 6.1 io_uring/io-wq.c io_wq_create).
        limits: Limits {
            open_files: 2048,
            threads: 512,
        },
    }
}

/// bulkhead-bus: sockets, and eventfds that it makes.
pub fn bus() -> Profile {
    Profile {
        name: "bulkhead-bus",
        syscalls: [RUNTIME, MEMORY, SOCKETS, EPOLL, BUS].concat(),
        // Limit: two eventfds for each of at most 1,024 open channels, and as many again on their way to each server that
        // does not read: a hijacked one can make some 4,096 wait.
        limits: Limits {
            open_files: 16384,
            threads: 1,
        },
    }
}

/// bulkhead-net: one tap or stream, and the rings.
pub fn net() -> Profile {
    Profile {
        name: "bulkhead-net",
        syscalls: [RUNTIME, MEMORY, SOCKETS, EPOLL, NET].concat(),
        // Limit: one thread, and none to be made.
        limits: Limits {
            open_files: 2048,
            threads: 1,
        },
    }
}

/// The keeper of `bulkhead`: holds descriptors, and gives them to whoever connects and may have them.
pub fn keeper() -> Profile {
    Profile {
        name: "bulkhead-keeper",
        syscalls: [RUNTIME, MEMORY, SOCKETS, KEEPER].concat(),
        // Limit: 64 devices with some 20 descriptors each, twice: once held and once on the way to an adopter.
        limits: Limits {
            open_files: 4096,
            threads: 1,
        },
    }
}

/// The profiles of all programs.
pub fn all() -> [Profile; 5] {
    [vcpu(), bus(), block(), net(), keeper()]
}

const fn allow(name: &'static str, number: i64, when: &'static [When], by: &'static str) -> Rule {
    Rule {
        name,
        number,
        when,
        answer: Answer::Allow,
        by,
    }
}

const fn refuse(name: &'static str, number: i64, errno: i32, by: &'static str) -> Rule {
    Rule {
        name,
        number,
        when: &[],
        answer: Answer::Errno(errno),
        by,
    }
}

/// Whatever the arguments are.
const ANY: &[When] = &[];

/// What Rust's standard library and glibc do in any program, whatever it is for.
#[rustfmt::skip] // a table: one entry a line
const RUNTIME: &[Rule] = &[
    allow("read", c::SYS_read, ANY, "runtime: File, eventfds, timerfds"),
    allow("write", c::SYS_write, ANY, "runtime: the log on standard error, eventfds"),
    allow("close", c::SYS_close, ANY, "runtime: OwnedFd"),
    allow("futex", c::SYS_futex, ANY, "runtime: Mutex, Condvar, join"),
    allow("clock_gettime", c::SYS_clock_gettime, ANY, "runtime: Instant where the vDSO cannot answer"),
    allow("clock_nanosleep", c::SYS_clock_nanosleep, ANY, "runtime: thread::sleep"),
    allow("restart_syscall", c::SYS_restart_syscall, ANY, "runtime: the kernel, after SIGSTOP and SIGCONT"),
    allow("sched_yield", c::SYS_sched_yield, ANY, "runtime: thread::yield_now"),
    // HashMap's seed is drawn once per thread.
    allow("getrandom", c::SYS_getrandom, ANY, "runtime: HashMap"),
    allow("rt_sigreturn", c::SYS_rt_sigreturn, ANY, "runtime: return from any signal handler"),
    allow("rt_sigprocmask", c::SYS_rt_sigprocmask, ANY, "runtime: abort, thread start"),
    allow("rt_sigaction", c::SYS_rt_sigaction, FATAL_SIGNALS, "runtime: abort, stack overflow"),
    allow("sigaltstack", c::SYS_sigaltstack, ANY, "runtime: the stack overflow guard of a thread"),
    allow("gettid", c::SYS_gettid, ANY, "runtime: abort, panic"),
    allow("getpid", c::SYS_getpid, ANY, "runtime: abort"),
    allow("tgkill", c::SYS_tgkill, &[When::OwnPid { argument: 0 }], "runtime: abort, pthread_kill"),
    allow("exit", c::SYS_exit, ANY, "runtime: end of a thread"),
    allow("exit_group", c::SYS_exit_group, ANY, "runtime: end of the process"),
    // OwnedFd::try_clone; std and vmbus ask a received descriptor what it is and whether it is sealed.
    allow("fcntl", c::SYS_fcntl, FCNTL, "runtime: OwnedFd::try_clone, nix::fcntl"),
    allow("fstat", c::SYS_fstat, ANY, "runtime: nix::sys::stat::fstat"),
    allow("newfstatat", c::SYS_newfstatat, &[NO_PATH_3], "runtime: fstat of newer glibc"),
    allow("statx", c::SYS_statx, &[NO_PATH_2], "runtime: File::metadata"),
    allow("ioctl", c::SYS_ioctl, IOCTL_ANY_PROGRAM, "runtime: set_nonblocking, set_cloexec, is_terminal"),
];

/// Not SIGSYS, by which the filter ends a process.
const FATAL_SIGNALS: &[When] = &[When::OneOf {
    argument: 0,
    values: &[c::SIGABRT as u32, c::SIGSEGV as u32, c::SIGBUS as u32],
}];

/// SIGCANCEL and SIGSETXID (glibc, internal-signals.h).
const GLIBC_SIGNALS: &[When] = &[When::OneOf {
    argument: 0,
    values: &[32, 33],
}];

/// The first real-time signal that glibc leaves to programs.
const KICK_SIGNAL: &[When] = &[When::OneOf {
    argument: 0,
    values: &[34],
}];

/// linux/fcntl.h. Leases, owners and signals on descriptors are not needed by anyone, locks only by one program.
const FCNTL: &[When] = &[When::OneOf {
    argument: 1,
    values: &[
        c::F_GETFD as u32,
        c::F_SETFD as u32,
        c::F_GETFL as u32,
        c::F_SETFL as u32,
        c::F_DUPFD_CLOEXEC as u32,
        c::F_GET_SEALS as u32,
        c::F_ADD_SEALS as u32,
    ],
}];

/// AT_EMPTY_PATH is set: the call is about a descriptor. (A path would find an empty root anyway.)
const NO_PATH_2: When = When::Bits {
    argument: 2,
    mask: c::AT_EMPTY_PATH as u64,
    equal: c::AT_EMPTY_PATH as u64,
};
const NO_PATH_3: When = When::Bits {
    argument: 3,
    mask: c::AT_EMPTY_PATH as u64,
    equal: c::AT_EMPTY_PATH as u64,
};

const IOCTL_ANY_PROGRAM: &[When] = &[When::OneOf {
    argument: 1,
    values: &[c::FIONBIO as u32, c::FIOCLEX as u32, c::TCGETS as u32],
}];

/// The allocator and the maps of received memfds. PROT_EXEC is never allowed: no code can be added to a process.
#[rustfmt::skip] // a table: one entry a line
const MEMORY: &[Rule] = &[
    allow("brk", c::SYS_brk, ANY, "runtime: malloc"),
    allow("mmap", c::SYS_mmap, &[NOT_EXECUTABLE], "runtime: malloc, thread stacks; vmbus/src/mem/shared.rs map"),
    allow("mprotect", c::SYS_mprotect, &[NOT_EXECUTABLE], "runtime: malloc, guard pages of thread stacks"),
    allow("munmap", c::SYS_munmap, ANY, "runtime: free; vmbus/src/mem/shared.rs drop"),
    allow("mremap", c::SYS_mremap, ANY, "runtime: realloc of large blocks"),
    allow("madvise", c::SYS_madvise, ANY, "runtime: free of thread stacks; vmm-core/src/kvm/memory.rs advise"),
];

const NOT_EXECUTABLE: When = When::Bits {
    argument: 2,
    mask: c::PROT_EXEC as u64,
    equal: 0,
};

/// Threads that are made after the lock-in. The one way to make a process is closed: clone3 keeps its flags in
/// memory, where a filter cannot see them, so it does not exist here and glibc falls back to clone; clone must
/// share memory and thread group and must not make a namespace.
#[rustfmt::skip] // a table: one entry a line
const THREADS: &[Rule] = &[
    allow("rt_sigaction", c::SYS_rt_sigaction, GLIBC_SIGNALS, "runtime: the first pthread_create"),
    refuse("clone3", c::SYS_clone3, c::ENOSYS, "runtime: pthread_create, which then takes clone"),
    allow("clone", c::SYS_clone, &[THREAD_ONLY], "runtime: pthread_create"),
    allow("set_robust_list", c::SYS_set_robust_list, ANY, "runtime: start of a thread"),
    allow("rseq", c::SYS_rseq, ANY, "runtime: start of a thread"),
    allow("sched_getaffinity", c::SYS_sched_getaffinity, ANY, "runtime: start of a thread, malloc"),
    allow("prctl", c::SYS_prctl, &[SET_NAME], "runtime: thread::Builder::name"),
];

const SET_NAME: When = When::OneOf {
    argument: 0,
    values: &[c::PR_SET_NAME as u32],
};

const NEW_NAMESPACE: u64 = (c::CLONE_NEWUSER
    | c::CLONE_NEWNS
    | c::CLONE_NEWPID
    | c::CLONE_NEWNET
    | c::CLONE_NEWIPC
    | c::CLONE_NEWUTS
    | c::CLONE_NEWCGROUP) as u64;
const SAME_PROCESS: u64 = (c::CLONE_VM | c::CLONE_THREAD | c::CLONE_SIGHAND) as u64;
const THREAD_ONLY: When = When::Bits {
    argument: 0,
    mask: SAME_PROCESS | NEW_NAMESPACE,
    equal: SAME_PROCESS,
};

/// Messages on the inherited sockets. There is no call here that makes a socket or gives it a peer.
#[rustfmt::skip] // a table: one entry a line
const SOCKETS: &[Rule] = &[
    allow("recvmsg", c::SYS_recvmsg, ANY, "vmbus/src/ipc/socket.rs recv"),
    allow("sendmsg", c::SYS_sendmsg, ANY, "vmbus/src/ipc/socket.rs send"),
    allow("poll", c::SYS_poll, ANY, "vmbus/src/ipc/server_start.rs wait_readable"),
    allow("ppoll", c::SYS_ppoll, ANY, "vmbus/src/ipc/server_start.rs wait_readable"),
];

/// Waiting for many descriptors, where that is not io_uring's work.
#[rustfmt::skip] // a table: one entry a line
const EPOLL: &[Rule] = &[
    allow("epoll_create1", c::SYS_epoll_create1, ANY, "runtime: nix Epoll::new"),
    allow("epoll_ctl", c::SYS_epoll_ctl, ANY, "runtime: nix Epoll::add, modify, delete"),
    allow("epoll_wait", c::SYS_epoll_wait, ANY, "runtime: nix Epoll::wait"),
    allow("epoll_pwait", c::SYS_epoll_pwait, ANY, "runtime: nix Epoll::wait by way of newer glibc"),
];

#[rustfmt::skip] // a table: one entry a line
const VCPU: &[Rule] = &[
    allow("rt_sigaction", c::SYS_rt_sigaction, KICK_SIGNAL, "vmm-core/src/kvm/kick.rs install_kick_handler"),
    allow("ioctl", c::SYS_ioctl, KVM_REQUESTS, "vmm-core/src/kvm/vcpu.rs run"),
    allow("eventfd2", c::SYS_eventfd2, ANY, "vmm-core/src/kvm/event.rs new"),
    allow("timerfd_create", c::SYS_timerfd_create, ANY, "vmm-core/src/run/slot_timer.rs new"),
    allow("timerfd_settime", c::SYS_timerfd_settime, ANY, "vmm-core/src/run/slot_timer.rs want"),
    allow("memfd_create", c::SYS_memfd_create, ANY, "vmbus/src/mem/shared.rs sealed_memfd"),
    allow("ftruncate", c::SYS_ftruncate, ANY, "vmbus/src/mem/shared.rs sealed_memfd"),
    allow("fallocate", c::SYS_fallocate, ANY, "vmm-core/src/kvm/memory.rs wipe"),
    allow("mincore", c::SYS_mincore, ANY, "vmm-core/src/kvm/memory.rs is_resident"),
    // The boot plan, which is carried out again at each reset.
    allow("lseek", c::SYS_lseek, ANY, "vmm-core/src/run/power.rs fill_memory"),
];

#[rustfmt::skip] // a table: one entry a line
const BUS: &[Rule] = &[
    allow("eventfd2", c::SYS_eventfd2, ANY, "vmm-core/src/control_plane/eventfds.rs new"),
    allow("timerfd_create", c::SYS_timerfd_create, ANY, "vmm-core/src/control_plane/timers.rs new"),
    allow("timerfd_settime", c::SYS_timerfd_settime, ANY, "vmm-core/src/control_plane/timers.rs arm"),
];

const KVM_REQUESTS: &[When] = &[When::OneOf {
    argument: 1,
    values: &kvm::REQUESTS,
}];

/// Reads, writes and flushes of a disk in a file are operations of the io_uring, which was set up before.
#[rustfmt::skip] // a table: one entry a line
const BLOCK: &[Rule] = &[
    allow("io_uring_enter", c::SYS_io_uring_enter, ANY, "vmbus/src/mem/uring.rs submit"),
    allow("preadv", c::SYS_preadv, ANY, "vmbus/src/mem/fdio.rs preadv"),
    allow("pwritev", c::SYS_pwritev, ANY, "vmbus/src/mem/fdio.rs pwritev"),
    allow("fallocate", c::SYS_fallocate, ANY, "device-block/src/backend/memory.rs begin"),
    allow("flock", c::SYS_flock, ANY, "device-block/src/backend/fence.rs flock_journal"),
    allow("fcntl", c::SYS_fcntl, OWN_LOCK, "vmbus/src/lease.rs try_lock"),
];

/// Of a description or of the process: takes or gives back, without waiting.
const OWN_LOCK: &[When] = &[When::OneOf {
    argument: 1,
    values: &[c::F_OFD_SETLK as u32, c::F_SETLK as u32],
}];

#[rustfmt::skip] // a table: one entry a line
const NET: &[Rule] = &[
    allow("readv", c::SYS_readv, ANY, "vmbus/src/mem/fdio.rs readv"),
    allow("writev", c::SYS_writev, ANY, "vmbus/src/mem/fdio.rs writev"),
    allow("recvfrom", c::SYS_recvfrom, ANY, "runtime: nix recv from the stream of passt"),
    // A null address: the stream is connected, and stays so.
    allow("sendto", c::SYS_sendto, &[When::Null { argument: 4 }], "runtime: nix send to the stream of passt"),
];

/// Connections at the one socket that listens in the VM's folder.
#[rustfmt::skip] // a table: one entry a line
const KEEPER: &[Rule] = &[
    allow("accept4", c::SYS_accept4, ANY, "vmm-core/src/supervisor/control.rs accept"),
    allow("getsockopt", c::SYS_getsockopt, PEER, "vmm-core/src/supervisor/keeper/holder.rs uid_of"),
    allow("ioctl", c::SYS_ioctl, SET_TERMINAL, "vmm-core/src/supervisor/console.rs restore"),
];

/// A terminal's settings, at once.
const SET_TERMINAL: &[When] = &[When::OneOf {
    argument: 1,
    values: &[c::TCSETS as u32],
}];

/// Who is at the other end.
const PEER: &[When] = &[When::OneOf {
    argument: 2,
    values: &[c::SO_PEERCRED as u32],
}];

#[cfg(test)]
mod tests;
