#![forbid(unsafe_code)]
//! Servers that wait for the one that serves to die.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_core::supervisor::control::{Reply, Request};

use super::place::{Place, Running, is_gone};
use super::swaps::{kill_hard, process, program, request, runs, stop, swap, until};

pub const ALL: &[(&str, fn())] = &[
    (
        "a_standby_takes_over_from_a_server_that_dies_and_is_followed_by_another",
        a_standby_takes_over_from_a_server_that_dies_and_is_followed_by_another,
    ),
    (
        "a_standby_that_dies_is_started_again_and_harms_nobody",
        a_standby_that_dies_is_started_again_and_harms_nobody,
    ),
    (
        "a_standby_that_hangs_is_replaced_before_it_is_needed",
        a_standby_that_hangs_is_replaced_before_it_is_needed,
    ),
    (
        "a_standby_makes_way_for_a_swap_and_comes_back",
        a_standby_makes_way_for_a_swap_and_comes_back,
    ),
];

/// A VM with one disk whose servers are of that play, and a standby.
fn with_standby(place: &Place, play: &str) -> Running {
    let disk = format!("memory=1M,serial={play},standby=true");
    let running = place.start(&["--cmdline", "watch", "--disk", &disk]);
    place.wait_until_it_runs();
    running
}

/// The standby's process, once it waits.
pub fn standby(place: &Place) -> i32 {
    until(|| match &place.ask(&Request::Devices)[..] {
        [Reply::Devices(lines)] => match &lines[..] {
            [line] => line
                .successor
                .as_ref()
                .and_then(|(state, _, process)| (state == "waits").then_some(*process)),
            _ => panic!("{lines:?}"),
        },
        other => panic!("{other:?}"),
    })
}

/// Another standby follows one to which that was done, and is there when the server dies that serves all the while.
fn replaced_while_it_waits(place: &Place, harm: impl FnOnce(i32)) {
    let serving = process(place, "disk0");
    let first = standby(place);
    harm(first);
    let second = until(|| Some(standby(place)).filter(|process| *process != first));
    assert_eq!(process(place, "disk0"), serving);
    // This death is the device's first, and answered at once by the one that waits.
    kill_hard(serving);
    until(|| (process(place, "disk0") == second).then_some(()));
}

fn a_standby_takes_over_from_a_server_that_dies_and_is_followed_by_another() {
    let place = Place::new();
    let running = with_standby(&place, "any");
    let waiting = standby(&place);
    let old = process(&place, "disk0");
    kill_hard(old);
    until(|| (process(&place, "disk0") == waiting).then_some(()));
    let next = standby(&place);
    assert!(next != waiting && next != old);
    let ended = stop(&place, running);
    assert_eq!(
        ended.stdout,
        "the guest runs\nServerAttached 2\nServerGone 1\nServerAttached 3\n"
    );
    assert!(is_gone(next) && is_gone(waiting));
}

fn a_standby_that_dies_is_started_again_and_harms_nobody() {
    let place = Place::new();
    let running = with_standby(&place, "any");
    replaced_while_it_waits(&place, kill_hard);
    let ended = stop(&place, running);
    assert!(
        ended.stderr.starts_with(
            "bulkhead: the standby of disk0 is lost (disk0 (server 2) killed by SIGKILL); the next one is started in 1 seconds\n"
        ),
        "{:?}",
        ended.stderr
    );
}

fn a_standby_that_hangs_is_replaced_before_it_is_needed() {
    let place = Place::new();
    let disk = "memory=1M,standby=true";
    let running = place.start(&["--cmdline", "watch", "--patience", "1", "--disk", disk]);
    place.wait_until_it_runs();
    replaced_while_it_waits(&place, |standby| {
        kill(Pid::from_raw(standby), Signal::SIGSTOP).expect("stopped");
    });
    let ended = stop(&place, running);
    assert!(
        ended.stderr.contains(
            "the standby of disk0 is lost (disk0 (server 2) killed by SIGKILL (hangs: no answer for 1 seconds))"
        ),
        "{:?}",
        ended.stderr
    );
}

fn a_standby_makes_way_for_a_swap_and_comes_back() {
    let place = Place::new();
    let running = with_standby(&place, "any");
    let first = standby(&place);
    let swapped = swap(&place, &request(Some(program(&place, "good"))));
    assert!(
        matches!(
            swapped,
            Reply::Swapped {
                from: 1,
                to: 3,
                mishap: None,
                ..
            }
        ),
        "{swapped:?}"
    );
    let second = standby(&place);
    assert!(runs(second, "swapped-good"));
    until(|| is_gone(first).then_some(()));
    let ended = stop(&place, running);
    assert_eq!(
        ended.stdout,
        "the guest runs\nServerAttached 2\nServerGone 2\nServerAttached 3\nServerGone 1\nServerAttached 4\n"
    );
    assert_eq!(ended.stderr, "");
}
