#![forbid(unsafe_code)]
//! Adoptions at the worst moments: in the middle of a swap, beside a standby, under a service manager.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_core::supervisor::chronicle::{self, Event};
use vmm_core::supervisor::control::{DeviceLine, Reply, Request};

use super::place::{Place, Running, is_gone, replies};
use super::played::SWAPPED;
use super::standbys::standby;
use super::swaps::{process, program, runs, until};

pub const ALL: &[(&str, fn())] = &[
    (
        "a_swap_that_had_not_come_far_is_undone_at_adoption",
        a_swap_that_had_not_come_far_is_undone_at_adoption,
    ),
    (
        "a_swap_whose_old_server_was_told_to_stop_is_completed_at_adoption",
        a_swap_whose_old_server_was_told_to_stop_is_completed_at_adoption,
    ),
    (
        "a_swap_command_whose_supervisor_is_killed_says_what_to_do",
        a_swap_command_whose_supervisor_is_killed_says_what_to_do,
    ),
    (
        "a_standby_outlives_the_supervisor_and_takes_over_under_the_next",
        a_standby_outlives_the_supervisor_and_takes_over_under_the_next,
    ),
    (
        "the_unit_that_the_help_shows_is_right_about_what_bulkhead_does",
        the_unit_that_the_help_shows_is_right_about_what_bulkhead_does,
    ),
];

/// A VM with a disk whose supervisor can be killed (its console is not the test's).
pub fn started(place: &Place, disk: &str) -> Running {
    let running = place.start(&["--cmdline", "watch", "--disk", disk, "--console", "none"]);
    place.wait_until_it_runs();
    running
}

pub fn signal(process: i32, signal: Signal) {
    kill(Pid::from_raw(process), signal).expect("it is there");
}

pub fn disk(place: &Place) -> DeviceLine {
    match &place.ask(&Request::Devices)[..] {
        [Reply::Devices(lines)] => lines[0].clone(),
        other => panic!("{other:?}"),
    }
}

pub fn ends_with(place: &Place, adopter: Running, processes: &[i32]) -> String {
    assert_eq!(place.ask(&Request::Stop), [Reply::Done]);
    let ended = adopter.wait();
    ended.expect(0, "");
    for process in processes {
        until(|| is_gone(*process).then_some(()));
    }
    place.expect_ended();
    ended.stderr
}

/// What happened to the VM, in order.
pub fn events(place: &Place) -> Vec<Event> {
    let read = chronicle::read_after(&place.path("run/vm"), 0);
    read.into_iter().map(|entry| entry.event).collect()
}

/// Asks for a swap of the disk to a program of that play, and returns what hears the answer.
fn begin_swap(place: &Place, play: &str) -> vmbus::ipc::Socket {
    let mut asked = place.connect();
    let request = Request::Swap {
        device: "disk0".to_owned(),
        program: Some(program(place, play)),
        patience_s: 60,
    };
    asked.send(&request, &[]).expect("sent");
    asked
}

fn own_program(place: &Place) -> String {
    place.path("bulkhead-block").display().to_string()
}

fn a_swap_that_had_not_come_far_is_undone_at_adoption() {
    for has_standby in [false, true] {
        let place = Place::new();
        let supervisor = started(&place, &format!("memory=1M,standby={has_standby}"));
        let old = process(&place, "disk0");
        let mut asked = begin_swap(&place, "cold");
        let of_swap = until(|| {
            let (_, _, process) = disk(&place).successor?;
            runs(process, "swapped-cold").then_some(process)
        });
        // By the time of another answer the keeper has heard of all that came before.
        disk(&place);
        supervisor.kill();
        assert_eq!(replies(&mut asked), []);
        let adopter = place.adopt("vm");
        place.wait_until_it_runs();
        until(|| is_gone(of_swap).then_some(()));
        if has_standby {
            assert!(runs(standby(&place), "/bulkhead-block"));
        }
        let line = disk(&place);
        assert_eq!(
            (line.state.as_str(), line.process, line.program),
            ("serves", Some(old), own_program(&place))
        );
        assert_eq!(line.successor.is_some(), has_standby);
        let said = ends_with(&place, adopter, &[old]);
        let sentence = "the swap of disk0 has failed: its supervisor was killed before the old server was told to stop; \
                        server 1 goes on\n";
        assert!(said.contains(sentence), "{said}");
        let told = events(&place);
        assert!(
            told.iter().any(|event| matches!(event, Event::SwapFailed { .. })),
            "{told:?}"
        );
    }
}

fn a_swap_whose_old_server_was_told_to_stop_is_completed_at_adoption() {
    // The old one lets go while there is no supervisor; or hears only of the next one that it is to stop.
    for lets_go_before in [true, false] {
        let place = Place::new();
        let supervisor = started(&place, "memory=1M");
        let old = process(&place, "disk0");
        signal(old, Signal::SIGSTOP);
        let _asked = begin_swap(&place, "good");
        until(|| (disk(&place).state == "stops").then_some(()));
        supervisor.kill();
        if lets_go_before {
            signal(old, Signal::SIGCONT);
            until(|| is_gone(old).then_some(()));
        }
        let adopter = place.adopt("vm");
        place.wait_until_it_runs();
        if !lets_go_before {
            signal(old, Signal::SIGCONT);
        }
        let serves = |line: DeviceLine| (line.state == "serves" && line.generation > 1).then_some(line);
        let line = until(|| serves(disk(&place)));
        let good = place.path("swapped-good").display().to_string();
        assert_eq!((line.generation, &line.program), (2, &good));
        // Servers that follow are of the new program, too.
        let second = line.process.expect("it serves");
        assert!(runs(second, "swapped-good"));
        signal(second, Signal::SIGKILL);
        let third = until(|| serves(disk(&place)).filter(|line| line.generation > 2));
        assert_eq!(third.program, good);
        let third = third.process.expect("it serves");
        assert!(runs(third, "swapped-good"));
        let said = ends_with(&place, adopter, &[old, second, third]);
        assert!(!said.contains("server 1"), "the old one is not to blame: {said}");
        let told = events(&place);
        let is_swap = |event: &Event| matches!(event, Event::Swap { from: 1, to: 2, .. });
        assert!(told.iter().any(is_swap), "{told:?}");
    }
}

/// `bulkhead device swap`, once the new server runs, which never gets ready.
fn swap_command(place: &Place) -> (Running, i32) {
    // A file of its own: the command looks where a link leads.
    let mute = place.path(&format!("{SWAPPED}mute"));
    if !mute.exists() {
        std::fs::copy(std::env::current_exe().expect("known"), &mute).expect("copied");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
    command
        .args(["device", "swap", "vm", "disk0", "--binary"])
        .arg(mute)
        .arg("--run-folder")
        .arg(place.path("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let asked = Running {
        child: command.spawn().expect("started"),
    };
    let (_, _, successor) = until(|| disk(place).successor);
    until(|| runs(successor, "swapped-mute").then_some(()));
    (asked, successor)
}

fn a_swap_command_whose_supervisor_is_killed_says_what_to_do() {
    let place = Place::new();
    let mut supervisor = started(&place, "memory=1M");
    let server = process(&place, "disk0");
    let says = |asked: Running, sentence: &str| {
        let ended = asked.wait();
        ended.expect(1, "");
        assert_eq!(ended.stdout, "");
        assert_eq!(ended.stderr, format!("bulkhead: {sentence}\n"));
    };

    let (asked, successor) = swap_command(&place);
    supervisor.kill();
    says(
        asked,
        "the supervisor of vm was killed, and the VM goes on: `bulkhead adopt vm` completes the swap of disk0 or undoes it",
    );
    supervisor = place.adopt("vm");
    place.wait_until_it_runs();
    until(|| is_gone(successor).then_some(()));

    // By the time that the command looks there is another one.
    let (asked, successor) = swap_command(&place);
    asked.signal(Signal::SIGSTOP);
    supervisor.kill();
    supervisor = place.adopt("vm");
    place.wait_until_it_runs();
    until(|| is_gone(successor).then_some(()));
    asked.signal(Signal::SIGCONT);
    says(
        asked,
        "vm has another supervisor now: `bulkhead events vm` shows whether disk0 was swapped",
    );
    let undone = |event: &Event| matches!(event, Event::SwapFailed { .. });
    assert_eq!(events(&place).iter().filter(|event| undone(event)).count(), 2);
    assert_eq!(process(&place, "disk0"), server);

    let (asked, successor) = swap_command(&place);
    asked.signal(Signal::SIGSTOP);
    ends_with(&place, supervisor, &[server, successor]);
    asked.signal(Signal::SIGCONT);
    says(asked, "the VM ended before disk0 was swapped");
}

fn a_standby_outlives_the_supervisor_and_takes_over_under_the_next() {
    let place = Place::new();
    let supervisor = started(&place, "memory=1M,standby=true");
    let (first, second) = (process(&place, "disk0"), standby(&place));
    supervisor.kill();
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    assert_eq!((process(&place, "disk0"), standby(&place)), (first, second));
    signal(first, Signal::SIGKILL);
    until(|| (process(&place, "disk0") == second).then_some(()));
    let third = until(|| Some(standby(&place)).filter(|third| *third != second));
    let mut now: Vec<i32> = place
        .wait_until_it_runs()
        .iter()
        .map(|(_, process)| *process)
        .collect();
    now.sort_unstable();
    assert_eq!(now.len(), 5, "vcpu, bus, keeper, server and standby: {now:?}");
    ends_with(&place, adopter, &[first, second, third]);
}

/// Only what the program does under it; what systemd does with it is tried in the rig (`linux_guest/service.rs` of the tests).
fn the_unit_that_the_help_shows_is_right_about_what_bulkhead_does() {
    let help = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["adopt", "--help"])
        .output()
        .expect("started");
    let help = String::from_utf8(help.stdout).expect("text");
    let unit: BTreeMap<&str, &str> = help
        .lines()
        .filter_map(|line| line.trim().split_once('='))
        .collect();
    for (key, value) in [
        ("KillMode", "process"),
        ("OOMPolicy", "continue"),
        ("Restart", "on-failure"),
    ] {
        assert_eq!(unit.get(key), Some(&value), "{help}");
    }
    let place = Place::new();
    let description = place.path("web.toml");
    let write = |text: &str| std::fs::write(&description, text).expect("written");
    write("kernel = \"kernel\"\nmemory = \"64M\"\ncmdline = \"watch\"\n[[disk]]\nmemory = \"1M\"\n");
    let start = || {
        let words = unit["ExecStart"].split(' ').skip(1);
        let words = words.map(|word| match word {
            "/etc/bulkhead/web.toml" => description.display().to_string(),
            // The name of all VMs of these tests.
            "web" => "vm".to_owned(),
            word => word.to_owned(),
        });
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .args(words)
            .arg("--programs")
            .arg(place.folder.path())
            .arg("--run-folder")
            .arg(place.path("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Running {
            child: command.spawn().expect("started"),
        }
    };
    // The supervisor is killed, and its command is run again.
    let supervisor = start();
    let processes = place.wait_until_it_runs();
    supervisor.kill();
    let supervisor = start();
    assert_eq!(place.wait_until_it_runs(), processes);
    // What systemctl stop does.
    supervisor.signal(Signal::SIGTERM);
    let stopped = supervisor.wait().status.code();
    assert_eq!(
        stopped.map(|code| code.to_string()).as_deref(),
        unit.get("SuccessExitStatus").copied()
    );
    for (_, process) in processes {
        until(|| is_gone(process).then_some(()));
    }
    write("kernel = \"kernel\"\nmemroy = \"64M\"\n");
    let wrong = start().wait().status.code();
    assert_eq!(
        wrong.map(|code| code.to_string()).as_deref(),
        unit.get("RestartPreventExitStatus").copied()
    );
}
