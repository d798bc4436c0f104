//! Servers that do what they may not.
#![forbid(unsafe_code)]

use super::place::{Place, until};
use bulkhead_tests::tier;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::process::Command;
use vmm_core::supervisor::chronicle::{Event, read_after};
use vmm_core::supervisor::control::{Reply, Request};

/// Makes a process call socket(2), as one would that a guest has taken over. False: it may not be traced.
fn call_socket(process: i32) -> bool {
    let process = Pid::from_raw(process);
    if ptrace::seize(process, Options::empty()).is_err() {
        return false;
    }
    ptrace::interrupt(process).expect("it is traced");
    waitpid(process, Some(WaitPidFlag::__WALL)).expect("it is traced");
    let mut registers = ptrace::getregs(process).expect("it is stopped");
    // It waits in a system call: the same instruction again with another number, and no restart of the one before.
    registers.rip -= 2;
    registers.orig_rax = u64::MAX;
    registers.rax = libc::SYS_socket.cast_unsigned();
    (registers.rdi, registers.rsi, registers.rdx) = (2, 1, 0);
    ptrace::setregs(process, registers).expect("it is stopped");
    ptrace::detach(process, None).expect("it is stopped");
    true
}

#[test]
fn a_server_that_makes_a_forbidden_call_is_killed_told_of_with_the_call_and_followed() {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let place = Place::new();
    let mut running = place.start(&programs, None, &[]);
    for (number, device) in [(1, "disk0"), (2, "net0")] {
        let Reply::Status { processes, .. } = place.wait_until_it_runs(&mut running) else {
            panic!("no status");
        };
        let server = processes.iter().find(|(name, _)| name == device);
        let (_, process) = server.expect("it serves");
        if !call_socket(*process) {
            tier::skip("this user may not trace a server");
            break;
        }
        let events = || read_after(&place.folder.path().join("run/vm"), 0);
        until(|| {
            events().into_iter().find_map(|entry| match entry.event {
                Event::Serving {
                    device: served,
                    generation: 2,
                    ..
                } if served == device => Some(()),
                _ => None,
            })
        });
        let cause = until(|| {
            events().into_iter().find_map(|entry| match entry.event {
                Event::Death {
                    device: died, cause, ..
                } if died == device => Some(cause),
                _ => None,
            })
        });
        assert_eq!(cause, "killed for a forbidden system call (SIGSYS) number 41");
        let report = until(|| {
            let output = Command::new(programs.join("bulkhead"))
                .args(["crashes", "vm", &number.to_string(), "--run-folder"])
                .arg(place.folder.path().join("run"))
                .output()
                .expect("started");
            output
                .status
                .success()
                .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        });
        assert!(
            report.contains(&format!("{device} (server 1) {cause}")),
            "{report}"
        );
        assert!(report.contains(&format!("deaths of {device}: 1\n")), "{report}");
        let recorded = report.split_once("flight recorder: ").expect("a part").1;
        let (count, _) = recorded.split_once(" events").expect("a count");
        assert!(count.parse::<u64>().expect("a number") > 0, "{report}");
        assert!(recorded.contains("Start 1"), "{report}");
    }
    place.ask(&mut running, &Request::Stop);
    running.child.wait().expect("ours");
}
