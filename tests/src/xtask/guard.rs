//! The process around a long command: whatever ends the command, nothing of it is left behind.
//!
//! `cargo xtask` starts itself a second time and does its work there. The first process, the guard, only waits. It owns
//! the folder in which the second one and all that it starts keep their temporary files (`TMPDIR`), it becomes the parent
//! of whatever loses its own (a subreaper), and it knows the terminal's settings. When the work is cut short (Ctrl-C, a
//! SIGTERM, a crash), the guard ends the processes that are left, puts the terminal right and removes the folder. The work
//! itself needs no signal handlers for that, and cannot forget anything. A guard that is killed takes the work with it: that
//! gets a SIGTERM, and what of it listens to one ends in order.

#![forbid(unsafe_code)]

use crate::rig::Rig;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};
use std::fs;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Set for the second process, and for all that it starts: what is guarded already needs no guard of its own.
pub const GUARDED_VARIABLE: &str = "BULKHEAD_XTASK_GUARDED";

/// What the folder's name begins with.
const SCRATCH: &str = "bulkhead-";

/// What ends a command early.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// A VM's supervisor needs a moment to end its processes; who takes longer is killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `work` in a process with a guard around it, or right here if this is that process.
pub fn guarded(work: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    if std::env::var_os(GUARDED_VARIABLE).is_none() {
        return guard();
    }
    // The guard's mask was inherited; whatever is started here must not inherit it, too.
    SigSet::empty().thread_set_mask()?;
    let parent = getppid();
    set_pdeathsig(Signal::SIGTERM)?;
    let result = work();
    let scratch = std::env::temp_dir();
    let is_own = scratch
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(SCRATCH.as_bytes()));
    if getppid() != parent && is_own {
        fs::remove_dir_all(scratch).context("cannot remove the temporary files of this run")?;
    }
    result
}

fn guard() -> Result<ExitCode> {
    let mut awaited = SigSet::from_iter(ENDING);
    awaited.add(Signal::SIGCHLD);
    let mut blocked = awaited;
    // Lets tcsetattr work even if this is no longer the terminal's foreground.
    blocked.add(Signal::SIGTTOU);
    blocked.thread_block()?;
    set_child_subreaper(true)?;
    let terminal = tcgetattr(std::io::stdin()).ok();
    let scratch = TempDir::with_prefix(SCRATCH).context("cannot make a temporary folder")?;

    let work = Command::new(std::env::current_exe().context("cannot find this program's own file")?)
        .args(std::env::args_os().skip(1))
        .env(GUARDED_VARIABLE, "1")
        .env("TMPDIR", scratch.path())
        .spawn()
        .context("cannot start the guarded process")?;
    let work = Pid::from_raw(work.id() as i32);
    let mut told = None;
    let status = loop {
        match awaited.wait()? {
            Signal::SIGCHLD => {
                if let Some(status) = reap(Some(work)) {
                    break status;
                }
            }
            signal => {
                told = Some(signal);
                // It has got it already if it came from the terminal, and may be gone: both do no harm.
                kill(work, signal).ok();
            }
        }
    };
    let cut_short = match status {
        WaitStatus::Signaled(_, signal, _) => Some(told.unwrap_or(signal)),
        _ => told,
    };
    if let Some(signal) = cut_short {
        eprintln!("xtask: ended by {signal}, cleaning up");
        end_all_children();
        restore(terminal.as_ref());
        Rig::remove_left_runs();
    }
    scratch
        .close()
        .context("cannot remove the temporary files of this run")?;
    Ok(match (cut_short, status) {
        (Some(signal), _) => ExitCode::from(128 + signal as u8),
        (None, WaitStatus::Exited(_, code)) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, _) => ExitCode::FAILURE,
    })
}

/// Takes note of every child that has ended; the status of `wanted` if it is among them.
fn reap(wanted: Option<Pid>) -> Option<WaitStatus> {
    let mut found = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return found,
            Ok(status @ (WaitStatus::Exited(pid, ..) | WaitStatus::Signaled(pid, ..))) => {
                if Some(pid) == wanted {
                    found = Some(status);
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            // No children at all.
            Err(_) => return found,
        }
    }
}

/// Ends our children, and theirs as they become ours: politely at first.
fn end_all_children() {
    let deadline = Instant::now() + PATIENCE;
    let mut asked = Vec::new();
    loop {
        reap(None);
        let left = children();
        if left.is_empty() {
            return;
        }
        let patient = Instant::now() < deadline;
        for pid in left {
            // Each is asked once; what it does then is its own affair until our patience ends. A child that is not reaped
            // keeps its number, so that nobody else is hit.
            if !patient {
                kill(pid, Signal::SIGKILL).ok();
            } else if !asked.contains(&pid) {
                kill(pid, Signal::SIGTERM).ok();
                asked.push(pid);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn children() -> Vec<Pid> {
    let own = std::process::id();
    fs::read_to_string(format!("/proc/{own}/task/{own}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok().map(Pid::from_raw))
        .collect()
}

fn restore(terminal: Option<&Termios>) {
    if let Some(terminal) = terminal
        && tcsetattr(std::io::stdin(), SetArg::TCSANOW, terminal).is_err()
    {
        eprintln!("xtask: cannot restore this terminal; `reset` does");
    }
}
