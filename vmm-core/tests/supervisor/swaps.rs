#![forbid(unsafe_code)]
//! Planned replacement of a server.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_core::supervisor::chronicle::{Entry, Event};
use vmm_core::supervisor::control::{Reply, Request};

use super::operator::{event, events};
use super::place::{Ended, PATIENCE, Place, Running, is_gone, replies};
use super::played::SWAPPED;

pub const ALL: &[(&str, fn())] = &[
    (
        "a_swap_puts_a_server_of_the_new_program_in_place",
        a_swap_puts_a_server_of_the_new_program_in_place,
    ),
    (
        "a_swap_to_a_broken_program_leaves_the_old_server_where_it_is",
        a_swap_to_a_broken_program_leaves_the_old_server_where_it_is,
    ),
    (
        "a_program_whose_servers_die_at_work_is_given_up_for_the_one_before_once",
        a_program_whose_servers_die_at_work_is_given_up_for_the_one_before_once,
    ),
    (
        "devices_are_listed_with_their_servers_and_those_that_wait",
        devices_are_listed_with_their_servers_and_those_that_wait,
    ),
    (
        "a_second_swap_at_the_same_time_is_refused",
        a_second_swap_at_the_same_time_is_refused,
    ),
    (
        "a_swap_that_cannot_be_is_refused_with_a_sentence",
        a_swap_that_cannot_be_is_refused_with_a_sentence,
    ),
    (
        "an_old_server_that_dies_when_told_to_stop_is_followed_by_the_new_one",
        an_old_server_that_dies_when_told_to_stop_is_followed_by_the_new_one,
    ),
    (
        "an_old_server_that_does_not_let_go_is_killed_and_followed_by_the_new_one",
        an_old_server_that_does_not_let_go_is_killed_and_followed_by_the_new_one,
    ),
    (
        "an_old_server_that_let_go_and_does_not_end_is_killed",
        an_old_server_that_let_go_and_does_not_end_is_killed,
    ),
    (
        "an_old_server_that_dies_before_the_new_one_is_ready_is_followed_by_it_or_by_its_own_program",
        an_old_server_that_dies_before_the_new_one_is_ready_is_followed_by_it_or_by_its_own_program,
    ),
    (
        "a_server_that_took_over_before_it_was_prepared_is_not_killed_for_that_later",
        a_server_that_took_over_before_it_was_prepared_is_not_killed_for_that_later,
    ),
    (
        "the_end_of_the_vm_ends_a_server_that_waits",
        the_end_of_the_vm_ends_a_server_that_waits,
    ),
];

/// A VM with one disk whose servers are of that play.
pub fn with_disk(place: &Place, play: &str) -> Running {
    let disk = match play {
        "" => "memory=1M".to_owned(),
        play => format!("memory=1M,serial={play}"),
    };
    let running = place.start(&["--cmdline", "watch", "--disk", &disk]);
    place.wait_until_it_runs();
    running
}

pub fn stop(place: &Place, running: Running) -> Ended {
    assert_eq!(place.ask(&Request::Stop), [Reply::Done]);
    let ended = running.wait();
    ended.expect(0, "");
    ended
}

/// A program of that play.
pub fn program(place: &Place, play: &str) -> PathBuf {
    let path = place.path(&format!("{SWAPPED}{play}"));
    if !path.exists() {
        symlink(std::env::current_exe().expect("known"), &path).expect("linked");
    }
    path
}

pub fn request(program: Option<PathBuf>) -> Request {
    Request::Swap {
        device: "disk0".to_owned(),
        program,
        patience_s: 60,
    }
}

/// The answer to a swap.
pub fn swap(place: &Place, request: &Request) -> Reply {
    let replies = place.ask(request);
    let [reply] = &replies[..] else {
        panic!("{replies:?}");
    };
    reply.clone()
}

/// A swap that was done, though not as planned: what happened to the old server.
fn mishap_of_swap(place: &Place) -> String {
    match swap(place, &request(Some(program(place, "good")))) {
        Reply::Swapped {
            from: 1,
            to: 2,
            mishap: Some(mishap),
            ..
        } => mishap,
        other => panic!("{other:?}"),
    }
}

fn refusal(reply: &Reply) -> String {
    match reply {
        Reply::Refused(why) => why.clone(),
        other => panic!("{other:?}"),
    }
}

/// The process of that name, once there is one.
pub fn process(place: &Place, name: &str) -> i32 {
    until(|| {
        let processes = place.wait_until_it_runs();
        processes
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, process)| *process)
    })
}

/// What is looked for, with a deadline: an end of another's child, or a line of another's, is no event here.
pub fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Some(found) => return found,
            None => assert!(Instant::now() < deadline, "not in time"),
        }
        std::thread::yield_now();
    }
}

pub fn kill_hard(process: i32) {
    kill(Pid::from_raw(process), Signal::SIGKILL).expect("killed");
}

pub fn runs(process: i32, program: &str) -> bool {
    let line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(program)
}

fn a_swap_puts_a_server_of_the_new_program_in_place() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let old = process(&place, "disk0");
    let Reply::Swapped {
        from: 1,
        to: 2,
        process: new,
        mishap: None,
        stall_us,
    } = swap(&place, &request(Some(program(&place, "good"))))
    else {
        panic!("no swap");
    };
    assert!(stall_us < 5_000_000, "{stall_us}");
    assert_eq!(process(&place, "disk0"), new);
    assert!(runs(new, "swapped-good"));
    until(|| is_gone(old).then_some(()));
    // A swap without a program is one to the same.
    let Reply::Swapped {
        from: 2,
        to: 3,
        process: newer,
        mishap: None,
        ..
    } = swap(&place, &request(None))
    else {
        panic!("no second swap");
    };
    assert!(runs(newer, "swapped-good"));
    // And so is a restart.
    kill_hard(newer);
    let newest = until(|| {
        let processes = place.wait_until_it_runs();
        processes
            .into_iter()
            .find(|(name, process)| name == "disk0" && *process != newer)
    });
    assert!(runs(newest.1, "swapped-good"));
    let ended = stop(&place, running);
    assert_eq!(
        ended.stdout,
        "the guest runs\nServerAttached 2\nServerGone 1\nServerAttached 3\nServerGone 2\nServerGone 3\nServerAttached 4\n"
    );
    assert_eq!(
        ended.stderr,
        "bulkhead: disk0 (server 3) killed by SIGKILL\nbulkhead: a crash report is kept: bulkhead crashes vm\n"
    );
}

fn a_swap_to_a_broken_program_leaves_the_old_server_where_it_is() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let old = process(&place, "disk0");
    let text = place.path("text");
    std::fs::write(&text, "no program").expect("written");
    let empty = program(&place, "empty");
    std::fs::remove_file(&empty).expect("removed");
    std::fs::write(&empty, "").expect("written");
    std::fs::set_permissions(&empty, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("changed");
    for (path, sentences) in [
        (
            program(&place, "quits"),
            &[
                "the swap has failed: disk0 (server 2) exited with status 3",
                "a library is missing",
                "; server 1 goes on",
            ][..],
        ),
        (
            program(&place, "fail"),
            &[
                "disk0 (server 3) exited with status 1 (the disk is on fire)",
                "; server 1 goes on",
            ],
        ),
        (
            program(&place, "mute"),
            &["disk0 (server 4) killed by SIGKILL (did not get ready in time); server 1 goes on"],
        ),
        (
            program(&place, "cold"),
            &["disk0 (server 5) killed by SIGKILL (did not get ready in time); server 1 goes on"],
        ),
        (
            place.path("missing"),
            &["cannot find the program ", "/missing: No such file"],
        ),
        (text, &["/text is not executable: chmod +x it"]),
        (
            place.folder.path().to_owned(),
            &["is no program: it is not a regular file"],
        ),
        (empty, &["cannot start ", "swapped-empty", "Exec format error"]),
    ] {
        let request = Request::Swap {
            device: "disk0".to_owned(),
            program: Some(path),
            patience_s: 1,
        };
        let why = refusal(&swap(&place, &request));
        for sentence in sentences {
            assert!(why.contains(sentence), "{sentence:?} is not in {why:?}");
        }
        assert!(!why.contains('\n'), "{why:?}");
        assert_eq!(process(&place, "disk0"), old);
    }
    // Nothing of them counts: a right one follows.
    let Reply::Swapped { from: 1, to: 6, .. } = swap(&place, &request(Some(program(&place, "good")))) else {
        panic!("no swap");
    };
    let ended = stop(&place, running);
    let heard: Vec<String> = (2..=5)
        .map(|generation| format!("ServerAttached {generation}\nServerGone {generation}\n"))
        .collect();
    assert_eq!(
        ended.stdout,
        format!(
            "the guest runs\n{}ServerAttached 6\nServerGone 1\n",
            heard.concat()
        )
    );
}

fn a_program_whose_servers_die_at_work_is_given_up_for_the_one_before_once() {
    for (before, restart, is_held) in [
        ("fine", "careful", false),
        ("fine", "always", false),
        ("dies-serving", "careful", true),
    ] {
        let place = Place::new();
        let disk = format!("memory=1M,serial={before}");
        let flags = ["--cmdline", "watch-serve", "--restart", restart, "--disk", &disk];
        let running = place.start(&flags);
        place.wait_until_it_runs();
        let bad = program(&place, "dies-serving");
        let swapped = swap(&place, &request(Some(bad.clone())));
        assert!(matches!(swapped, Reply::Swapped { .. }), "{swapped:?}");
        let (from, to) = (bad.display().to_string(), place.path("bulkhead-block"));
        let why = event(&place, |event| match event {
            Event::FellBack {
                device,
                from: left,
                to: taken,
                why,
            } if device == "disk0" => {
                assert_eq!((left, taken), (&from, &to.display().to_string()));
                Some(why.clone())
            }
            _ => None,
        });
        assert_eq!(why, "disk0 died 3 times in 60 seconds");
        if is_held {
            event(&place, |event| matches!(event, Event::Held { .. }).then_some(()));
        } else {
            // Three have died; it serves until it is stopped.
            event(&place, |event| {
                matches!(event, Event::Serving { generation: 5, .. }).then_some(())
            });
        }
        let fell_back = |entry: &Entry| matches!(entry.event, Event::FellBack { .. });
        assert_eq!(events(&place).iter().filter(|entry| fell_back(entry)).count(), 1);
        let [Reply::Devices(lines)] = &place.ask(&Request::Devices)[..] else {
            panic!("no list");
        };
        let state = if is_held { "held" } else { "serves" };
        let line = lines[0].to_string();
        assert!(line.starts_with(&format!("disk0 block {state} ")), "{line}");
        assert!(
            line.ends_with(&format!(" program={} gave-up={from}", to.display())),
            "{line}"
        );
        stop(&place, running);
    }
}

fn devices_are_listed_with_their_servers_and_those_that_wait() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let list = || match &place.ask(&Request::Devices)[..] {
        [Reply::Devices(lines)] => lines.iter().map(|line| line.to_string()).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let old = process(&place, "disk0");
    let own = place.path("bulkhead-block").display().to_string();
    assert_eq!(
        list(),
        [format!(
            "disk0 block serves generation=1 process={old} successor=none program={own}"
        )]
    );
    let mut socket = place.connect();
    let mute = request(Some(program(&place, "mute")));
    socket.send(&mute, &[]).expect("sent");
    let waiting = process(&place, "disk0 successor");
    let successor = format!("successor=starts successor-generation=2 successor-process={waiting}");
    assert_eq!(
        list(),
        [format!(
            "disk0 block serves generation=1 process={old} {successor} program={own}"
        )]
    );
    stop(&place, running);
}

fn a_second_swap_at_the_same_time_is_refused() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let mut first = place.connect();
    let mute = request(Some(program(&place, "mute")));
    first.send(&mute, &[]).expect("sent");
    let waiting = process(&place, "disk0 successor");
    let why = refusal(&swap(&place, &request(None)));
    assert_eq!(
        why,
        "disk0 is being swapped already (server 2 for server 1): wait until that is done"
    );
    kill_hard(waiting);
    assert_eq!(
        replies(&mut first),
        [Reply::Refused(
            "the swap has failed: disk0 (server 2) killed by SIGKILL; server 1 goes on".to_owned()
        )]
    );
    assert!(matches!(
        swap(&place, &request(None)),
        Reply::Swapped { from: 1, to: 3, .. }
    ));
    stop(&place, running);
}

fn a_swap_that_cannot_be_is_refused_with_a_sentence() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let wrong = Request::Swap {
        device: "disk7".to_owned(),
        program: None,
        patience_s: 1,
    };
    assert_eq!(
        refusal(&swap(&place, &wrong)),
        "there is no device \"disk7\"; there are: disk0"
    );
    stop(&place, running);
}

fn an_old_server_that_dies_when_told_to_stop_is_followed_by_the_new_one() {
    let place = Place::new();
    let running = with_disk(&place, "dies-at-stop");
    assert_eq!(
        mishap_of_swap(&place),
        "disk0 (server 1) killed by SIGABRT; its last words: \"I will not\""
    );
    let ended = stop(&place, running);
    assert_eq!(ended.stdout, "the guest runs\nServerAttached 2\nServerGone 1\n");
}

fn an_old_server_that_does_not_let_go_is_killed_and_followed_by_the_new_one() {
    let place = Place::new();
    let running = with_disk(&place, "ignore-stop");
    assert_eq!(
        mishap_of_swap(&place),
        "disk0 (server 1) killed by SIGKILL (did not let go within 5 seconds after it was told to stop)"
    );
    stop(&place, running);
}

fn an_old_server_that_let_go_and_does_not_end_is_killed() {
    let place = Place::new();
    let running = with_disk(&place, "lingers");
    let old = process(&place, "disk0");
    let swapped = swap(&place, &request(Some(program(&place, "good"))));
    assert!(
        matches!(swapped, Reply::Swapped { mishap: None, .. }),
        "{swapped:?}"
    );
    until(|| is_gone(old).then_some(()));
    let ended = stop(&place, running);
    assert_eq!(ended.stderr, "", "no death is told of a server that let go");
}

fn an_old_server_that_dies_before_the_new_one_is_ready_is_followed_by_it_or_by_its_own_program() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let old = process(&place, "disk0");
    let mut socket = place.connect();
    let mute = Request::Swap {
        device: "disk0".to_owned(),
        program: Some(program(&place, "mute")),
        patience_s: 3,
    };
    socket.send(&mute, &[]).expect("sent");
    let waiting = process(&place, "disk0 successor");
    kill_hard(old);
    // It has the place at once, and loses it because it does nothing with it.
    until(|| (process(&place, "disk0") == waiting).then_some(()));
    let replies = replies(&mut socket);
    let [Reply::Refused(why)] = &replies[..] else {
        panic!("{replies:?}");
    };
    assert_eq!(
        why,
        "the swap has failed: disk0 (server 2) killed by SIGKILL (did not get ready in time) before it was ready"
    );
    let newest = until(|| {
        let processes = place.wait_until_it_runs();
        processes
            .into_iter()
            .find(|(name, process)| name == "disk0" && *process != waiting)
    });
    assert!(runs(newest.1, "bulkhead-block"));
    let ended = stop(&place, running);
    assert_eq!(
        ended.stdout,
        "the guest runs\nServerAttached 2\nServerGone 1\nServerGone 2\nServerAttached 3\n"
    );
}

fn a_server_that_took_over_before_it_was_prepared_is_not_killed_for_that_later() {
    let place = Place::new();
    let mut running = with_disk(&place, "");
    let said = BufReader::new(running.child.stderr.take().expect("piped"));
    let old = process(&place, "disk0");
    let mut socket = place.connect();
    let in_a_second = |play| Request::Swap {
        device: "disk0".to_owned(),
        program: Some(program(&place, play)),
        patience_s: 1,
    };
    // It is locked in, and has nothing of the guest's memory yet.
    socket.send(&in_a_second("cold-and-says-so"), &[]).expect("sent");
    let second = process(&place, "disk0 successor");
    let mut said = said.lines().map(|line| line.expect("text"));
    assert!(said.any(|line| line == "[disk0] I am ready"));
    kill_hard(old);
    let answers = replies(&mut socket);
    assert!(
        matches!(answers[..], [Reply::Swapped { from: 1, to: 2, .. }]),
        "{answers:?}"
    );
    // The second of this one ends after that of the first one.
    let why = refusal(&swap(&place, &in_a_second("mute")));
    assert!(
        why.ends_with("(did not get ready in time); server 2 goes on"),
        "{why}"
    );
    assert_eq!(process(&place, "disk0"), second);
    stop(&place, running);
}

fn the_end_of_the_vm_ends_a_server_that_waits() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let mut socket = place.connect();
    let mute = request(Some(program(&place, "mute")));
    socket.send(&mute, &[]).expect("sent");
    let waiting = process(&place, "disk0 successor");
    let old = process(&place, "disk0");
    let ended = stop(&place, running);
    assert!(is_gone(waiting) && is_gone(old));
    assert_eq!(ended.stderr, "");
}
