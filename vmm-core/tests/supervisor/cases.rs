#![forbid(unsafe_code)]
//! A VM, from its start to its end.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use vmm_core::supervisor::chronicle::{Event, read_after};
use vmm_core::supervisor::control::{Reply, Request};
use vmm_core::supervisor::crash_report;

use super::place::{Place, Running, is_gone};
use super::swaps::until;

pub const ALL: &[(&str, fn())] = &[
    (
        "a_guest_that_powers_off_ends_the_vm_with_status_0",
        a_guest_that_powers_off_ends_the_vm_with_status_0,
    ),
    (
        "what_is_typed_reaches_the_guest_as_it_is",
        what_is_typed_reaches_the_guest_as_it_is,
    ),
    (
        "a_server_that_dies_gets_a_successor",
        a_server_that_dies_gets_a_successor,
    ),
    (
        "a_server_that_is_accused_gets_a_successor",
        a_server_that_is_accused_gets_a_successor,
    ),
    (
        "a_server_that_talks_nonsense_gets_a_successor",
        a_server_that_talks_nonsense_gets_a_successor,
    ),
    (
        "a_start_that_fails_says_why_with_status_1",
        a_start_that_fails_says_why_with_status_1,
    ),
    (
        "what_the_host_lacks_is_said_once_or_is_an_error",
        what_the_host_lacks_is_said_once_or_is_an_error,
    ),
    (
        "a_crash_of_the_guest_is_reported_with_status_3",
        a_crash_of_the_guest_is_reported_with_status_3,
    ),
    (
        "a_guest_that_crashes_without_end_does_not_fill_the_log",
        a_guest_that_crashes_without_end_does_not_fill_the_log,
    ),
    (
        "the_death_of_the_vcpu_process_ends_the_vm_with_status_4",
        the_death_of_the_vcpu_process_ends_the_vm_with_status_4,
    ),
    (
        "the_death_of_the_control_plane_ends_the_vm_with_status_4",
        the_death_of_the_control_plane_ends_the_vm_with_status_4,
    ),
    (
        "servers_that_end_with_the_control_plane_are_not_replaced_nor_told_of",
        servers_that_end_with_the_control_plane_are_not_replaced_nor_told_of,
    ),
    (
        "a_control_plane_that_hangs_ends_the_vm_with_status_4",
        a_control_plane_that_hangs_ends_the_vm_with_status_4,
    ),
    (
        "a_signal_ends_everything_in_order",
        a_signal_ends_everything_in_order,
    ),
    ("a_vm_that_does_not_end_is_ended", a_vm_that_does_not_end_is_ended),
    (
        "the_control_socket_tells_inspects_and_stops",
        the_control_socket_tells_inspects_and_stops,
    ),
    ("a_name_that_runs_is_refused", a_name_that_runs_is_refused),
    (
        "the_escape_ends_the_vm_and_the_terminal_is_as_before",
        the_escape_ends_the_vm_and_the_terminal_is_as_before,
    ),
    ("a_signal_restores_the_terminal", a_signal_restores_the_terminal),
    (
        "a_supervisor_that_is_killed_leaves_the_terminal_as_it_was_and_the_next_one_has_it",
        a_supervisor_that_is_killed_leaves_the_terminal_as_it_was_and_the_next_one_has_it,
    ),
    (
        "mistakes_of_a_person_are_one_sentence",
        mistakes_of_a_person_are_one_sentence,
    ),
];

fn a_guest_that_powers_off_ends_the_vm_with_status_0() {
    let ended = Place::new().run(&[
        "--cmdline",
        "poweroff",
        "--disk",
        "memory=1M",
        "--disk",
        "memory=2M,serial=quick",
    ]);
    ended.expect(0, "");
    assert_eq!(ended.stdout, "the guest runs\n");
    assert_eq!(ended.stderr, "");
}

fn what_is_typed_reaches_the_guest_as_it_is() {
    let place = Place::new();
    let mut command = place.command(&["--cmdline", "echo"]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("started");
    let typed = "\u{1}x is no escape here\n".repeat(10_000);
    let mut stdin = child.stdin.take().expect("piped");
    let text = typed.clone();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let ended = Running { child }.wait();
    writer.join().expect("joined").expect("written");
    ended.expect(0, "");
    assert_eq!(ended.stdout, format!("the guest runs\n{typed}"));
}

fn a_server_that_dies_gets_a_successor() {
    let ended = Place::new().run(&["--cmdline", "succeed", "--disk", "memory=1M"]);
    ended.expect(
        0,
        "bulkhead: disk0 (server 1) killed by SIGABRT; its last words: \"I cannot go on\"",
    );
    assert!(ended.stdout.contains("a successor came"), "{:?}", ended.stdout);
    assert!(
        ended.stderr.contains("[disk0] I cannot go on"),
        "{:?}",
        ended.stderr
    );
}

fn a_server_that_is_accused_gets_a_successor() {
    let ended = Place::new().run(&["--cmdline", "accuse", "--disk", "memory=1M"]);
    ended.expect(0, "disk0 (server 1) killed by SIGKILL (bulkhead-bus says: lied)");
    assert!(ended.stdout.contains("a successor came"), "{:?}", ended.stdout);
}

fn a_server_that_talks_nonsense_gets_a_successor() {
    let ended = Place::new().run(&["--cmdline", "succeed", "--disk", "memory=1M,serial=nonsense"]);
    ended.expect(
        0,
        "disk0 (server 1) killed by SIGKILL (does not speak our protocol",
    );
    assert!(ended.stdout.contains("a successor came"), "{:?}", ended.stdout);
}

fn a_start_that_fails_says_why_with_status_1() {
    let place = Place::new();
    place
        .run(&["--cmdline", "fail"])
        .expect(1, "bulkhead: there are no processors today\n");
    let early = place.run(&["--cmdline", "die-early"]);
    early.expect(
        1,
        "bulkhead: bulkhead-vcpu exited with status 7; its last words: \"oh no\"\n",
    );
    let server = place.run(&["--cmdline", "hang", "--disk", "memory=1M,serial=fail"]);
    server.expect(1, "disk0 (server 1) exited with status 1 (the disk is on fire)\n");
    std::fs::remove_file(place.path("bulkhead-block")).expect("removed");
    let program = place.run(&["--cmdline", "hang", "--disk", "memory=1M"]);
    program.expect(1, "bulkhead-block");
}

fn what_the_host_lacks_is_said_once_or_is_an_error() {
    let place = Place::new();
    let disks = [
        "--disk",
        "memory=1M,serial=lacking",
        "--disk",
        "memory=1M,serial=noisy",
    ];
    let said = place.run(&[&["--cmdline", "poweroff"], &disks[..]].concat());
    said.expect(
        0,
        "this host lacks what a full sandbox needs: a wall against the north\n",
    );
    assert_eq!(said.stderr.matches("a wall against the north").count(), 1);
    assert!(
        said.stderr.contains("[disk1] red \u{fffd}[31m alert"),
        "{:?}",
        said.stderr
    );
    let refused = place.run(&[&["--cmdline", "poweroff", "--require-full-sandbox"], &disks[..]].concat());
    refused.expect(
        1,
        "a full sandbox was asked for, and this host lacks: a wall against the north\n",
    );
    assert_eq!(refused.stdout, "");
}

fn a_crash_of_the_guest_is_reported_with_status_3() {
    let ended = Place::new().run(&["--cmdline", "crash"]);
    ended.expect(
        3,
        "the guest's kernel crashed: 0x1 0x2 0x3 0x4 0x5\n  | Kernel panic - not syncing: \u{fffd}[2Jplayed",
    );
}

fn a_guest_that_crashes_without_end_does_not_fill_the_log() {
    let place = Place::new();
    let ended = place.run(&["--cmdline", "crash-often"]);
    let told = ended.stderr.matches("the guest's kernel crashed: 0x1 ").count();
    let noted = read_after(&place.path("run/vm"), 0)
        .iter()
        .filter(|entry| matches!(entry.event, Event::GuestCrash { .. }))
        .count();
    assert!(
        (1..60).contains(&told) && told == noted,
        "{told} and {noted} of 100"
    );
    ended.expect(3, "too often to tell of each time");
}

fn the_death_of_the_vcpu_process_ends_the_vm_with_status_4() {
    let place = Place::new();
    place
        .run(&["--cmdline", "die", "--disk", "memory=1M"])
        .expect(4, "bulkhead-vcpu killed by SIGABRT");
    let report = std::fs::read_to_string(place.path("run/vm/crashes/1.txt")).expect("a report");
    assert!(report.contains(" vcpu killed by SIGABRT\n"), "{report}");
    place
        .run(&["--cmdline", "garbage", "--disk", "memory=1M"])
        .expect(4, "it does not speak our protocol");
}

fn the_death_of_the_control_plane_ends_the_vm_with_status_4() {
    for (play, why) in [
        ("die-bus", "bulkhead-bus killed by SIGABRT"),
        ("garbage-bus", "it does not speak our protocol"),
        ("lose-bus", "bulkhead-bus ended by itself"),
    ] {
        let place = Place::new();
        place
            .run(&["--cmdline", play, "--disk", "memory=1M"])
            .expect(4, why);
        let lines = crash_report::list(&place.path("run/vm"));
        let is_told = lines
            .iter()
            .any(|(_, line)| line.ends_with(" bus killed by SIGABRT"));
        assert_eq!(is_told, play == "die-bus", "{lines:?}");
    }
}

fn servers_that_end_with_the_control_plane_are_not_replaced_nor_told_of() {
    let place = Place::new();
    let disk = "memory=1M,serial=quick";
    let ended = place.run(&["--cmdline", "end-bus", "--disk", disk]);
    assert!(!ended.stderr.contains("disk0"), "{}", ended.stderr);
    ended.expect(4, "bulkhead-bus killed by SIGABRT");
    let reports = crash_report::list(&place.path("run/vm"));
    assert_eq!(reports.len(), 1, "{reports:?}");
}

fn a_control_plane_that_hangs_ends_the_vm_with_status_4() {
    let place = Place::new();
    let why = "hangs: no answer for 1 seconds";
    place
        .run(&["--cmdline", "deaf-bus", "--patience", "1", "--disk", "memory=1M"])
        .expect(4, &format!("bulkhead-bus killed by SIGKILL; {why}"));
    let lines = crash_report::list(&place.path("run/vm"));
    assert!(
        matches!(&lines[..], [(_, line)] if line.ends_with(&format!("bus killed by SIGKILL ({why})"))),
        "{lines:?}"
    );
    let last = read_after(&place.path("run/vm"), 0).pop();
    let Some(Event::Ending { why: told }) = last.map(|entry| entry.event) else {
        panic!("the end is told of")
    };
    assert!(told.contains(why), "{told}");
    place.expect_ended();
}

fn a_signal_ends_everything_in_order() {
    for (signal, status) in [
        (Signal::SIGTERM, 143),
        (Signal::SIGINT, 130),
        (Signal::SIGHUP, 129),
    ] {
        let place = Place::new();
        let running = place.start(&["--cmdline", "hang", "--disk", "memory=1M"]);
        let processes = place.wait_until_it_runs();
        assert_eq!(processes.len(), 4);
        running.signal(signal);
        running.wait().expect(status, "ended by signal");
        assert!(processes.iter().all(|(_, process)| is_gone(*process)));
        place.expect_ended();
    }
}

fn a_vm_that_does_not_end_is_ended() {
    let place = Place::new();
    let running = place.start(&[
        "--cmdline",
        "ignore-quit",
        "--disk",
        "memory=1M,serial=ignore-stop",
    ]);
    let processes = place.wait_until_it_runs();
    running.signal(Signal::SIGTERM);
    running.wait().expect(143, "");
    assert!(processes.iter().all(|(_, process)| is_gone(*process)));
}

fn the_control_socket_tells_inspects_and_stops() {
    let place = Place::new();
    let running = place.start(&["--cmdline", "hang", "--disk", "memory=1M"]);
    place.wait_until_it_runs();
    let replies = place.ask(&Request::Inspect);
    let mut entries = Vec::new();
    for reply in &replies {
        match reply {
            Reply::Entries(some) => entries.extend(some.clone()),
            other => assert_eq!(*other, Reply::Done),
        }
    }
    for (path, value) in [
        ("bus.connection", "played"),
        ("disk0.generation", "1"),
        ("supervisor.disk0.state", "serves"),
        ("supervisor.state", "running"),
    ] {
        assert!(
            entries.contains(&(path.to_owned(), value.to_owned())),
            "{path} in {entries:?}"
        );
    }
    assert_eq!(place.ask(&Request::Stop), [Reply::Done]);
    running.wait().expect(0, "");
}

fn a_name_that_runs_is_refused() {
    let place = Place::new();
    let running = place.start(&["--cmdline", "hang"]);
    place.wait_until_it_runs();
    place
        .start(&["--cmdline", "hang"])
        .wait()
        .expect(1, "a VM named vm runs already (process ");
    assert_eq!(place.ask(&Request::Stop), [Reply::Done]);
    running.wait().expect(0, "");
}

/// A supervisor on a terminal of its own.
fn on_a_terminal(place: &Place) -> (Running, OwnedFd, OwnedFd) {
    let pty = openpty(None, None).expect("a terminal");
    let mut command = place.command(&["--cmdline", "hang"]);
    let end = || Stdio::from(pty.slave.try_clone().expect("duplicated"));
    let child = command.stdin(end()).stdout(end()).spawn().expect("started");
    (Running { child }, pty.master, pty.slave)
}

fn the_escape_ends_the_vm_and_the_terminal_is_as_before() {
    let place = Place::new();
    let (running, master, slave) = on_a_terminal(&place);
    place.wait_until_it_runs();
    let raw = tcgetattr(&slave).expect("asked");
    assert!(
        !raw.local_flags
            .intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    );
    File::from(master.try_clone().expect("duplicated"))
        .write_all(b"ls\r\x01x")
        .expect("typed");
    running.wait().expect(0, "bulkhead: Ctrl-A x ends the VM; ");
    let after = tcgetattr(&slave).expect("asked");
    assert!(
        after
            .local_flags
            .contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    );
}

fn a_signal_restores_the_terminal() {
    let place = Place::new();
    let (running, _master, slave) = on_a_terminal(&place);
    place.wait_until_it_runs();
    running.signal(Signal::SIGTERM);
    running.wait().expect(143, "");
    let after = tcgetattr(&slave).expect("asked");
    assert!(after.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO));
}

fn a_supervisor_that_is_killed_leaves_the_terminal_as_it_was_and_the_next_one_has_it() {
    let place = Place::new();
    let (running, master, slave) = on_a_terminal(&place);
    let echoes = |wanted: bool| {
        let now = tcgetattr(&slave).expect("asked");
        (now.local_flags.contains(LocalFlags::ECHO) == wanted).then_some(now)
    };
    let before = echoes(true).expect("a terminal as it is at first");
    place.wait_until_it_runs();
    until(|| echoes(false));
    // Once more: the keeper was told at the end of the turn before.
    place.wait_until_it_runs();
    running.kill();
    assert_eq!(until(|| echoes(true)), before);

    let end = || Stdio::from(slave.try_clone().expect("duplicated"));
    let mut adopter = place.adopt_command("vm", Path::new(env!("CARGO_BIN_EXE_bulkhead")));
    let child = adopter.stdin(end()).stdout(end()).spawn().expect("started");
    let adopter = Running { child };
    until(|| echoes(false));
    // A terminal without its other end is none.
    let mut typing = File::from(master);
    typing.write_all(b"\x01x").expect("typed");
    adopter.wait().expect(0, "");
    assert_eq!(echoes(true).expect("restored"), before);
}

fn mistakes_of_a_person_are_one_sentence() {
    let place = Place::new();
    std::fs::write(place.path("wrong.toml"), "kernel = \"k\"\nvcpus = 99\n").expect("written");
    let wrong = place.path("wrong.toml").display().to_string();
    let folder = place.folder.path().display().to_string();
    std::fs::write(place.path("disk"), [0; 4096]).expect("written");
    let pipe = place.path("pipe").display().to_string();
    nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("made");
    let disk = place.path("disk").display().to_string();
    for (args, status, sentence) in [
        (
            &["--config", &wrong][..],
            2,
            "wrong.toml:2:9: 99 virtual processors are not supported",
        ),
        (
            &["--config", "/nonexistent"],
            2,
            "cannot read /nonexistent: No such file",
        ),
        (&["--memory", "16M"], 2, "cannot be used multiple times"),
        (
            &["--initrd", "/nonexistent"],
            1,
            "cannot open the initrd /nonexistent: No such file",
        ),
        (
            &["--disk", &format!("path={folder}")],
            1,
            "is a folder: a raw file or a block device is needed",
        ),
        (&["--initrd", &pipe], 1, "the initrd PIPE is not a regular file"),
        (
            &["--console", &format!("file={pipe}")],
            1,
            "cannot write the console to PIPE: nobody reads that pipe yet",
        ),
        (
            &[
                "--disk",
                &format!("path={disk}"),
                "--console",
                &format!("file={disk}"),
            ],
            1,
            "that is a disk, the kernel or the initrd of this VM",
        ),
        (
            &["--disk", "path=/nonexistent"],
            1,
            "there is no disk /nonexistent: `truncate",
        ),
        (
            &[
                "--disk",
                &format!("path={disk}"),
                "--disk",
                &format!("path={disk}"),
            ],
            1,
            "disks 1 and 2 are the same file",
        ),
        (
            &["--net", "tap-fd=77"],
            1,
            "descriptor 77 was not handed over to bulkhead",
        ),
        (
            &["--console", "file=/nonexistent/console"],
            1,
            "cannot write the console to /nonexistent/console",
        ),
    ] {
        let ended = place.run(args);
        ended.expect(status, &sentence.replace("PIPE", &pipe));
        if status == 1 {
            assert_eq!(ended.stderr.lines().count(), 1, "{:?}", ended.stderr);
        }
    }
}
