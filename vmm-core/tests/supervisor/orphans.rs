#![forbid(unsafe_code)]
//! Supervisors that are killed, and keepers.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmm_core::supervisor::control::{Reply, Request};
use vmm_core::supervisor::keeper::is_orphaned;

use super::place::{PATIENCE, Place, Running};
use super::swaps::until;

pub const ALL: &[(&str, fn())] = &[
    (
        "a_vm_outlives_its_supervisor_and_ends_with_its_vcpu_process",
        a_vm_outlives_its_supervisor_and_ends_with_its_vcpu_process,
    ),
    (
        "a_vm_without_supervisor_and_keeper_ends_and_its_name_is_free",
        a_vm_without_supervisor_and_keeper_ends_and_its_name_is_free,
    ),
    (
        "a_keeper_that_dies_is_followed_by_one_that_holds_as_much",
        a_keeper_that_dies_is_followed_by_one_that_holds_as_much,
    ),
    (
        "an_adopted_vm_goes_on_and_its_servers_get_successors",
        an_adopted_vm_goes_on_and_its_servers_get_successors,
    ),
    (
        "a_server_that_died_without_a_supervisor_gets_its_successor_at_adoption",
        a_server_that_died_without_a_supervisor_gets_its_successor_at_adoption,
    ),
    (
        "a_guest_that_powers_off_ends_an_adopted_vm_as_any_other",
        a_guest_that_powers_off_ends_an_adopted_vm_as_any_other,
    ),
    (
        "adopters_follow_each_other_and_a_service_manager_needs_one_command",
        adopters_follow_each_other_and_a_service_manager_needs_one_command,
    ),
    (
        "what_cannot_be_adopted_is_refused_with_a_sentence",
        what_cannot_be_adopted_is_refused_with_a_sentence,
    ),
    (
        "a_vm_that_has_not_begun_to_run_ends_with_its_supervisor",
        a_vm_that_has_not_begun_to_run_ends_with_its_supervisor,
    ),
];

/// A process that somebody else started.
struct Other {
    name: String,
    number: i32,
    pidfd: OwnedFd,
}

impl Other {
    fn kill(&self) {
        pidfd_send_signal(&self.pidfd, Signal::KILL).expect("it is there to be killed");
    }

    fn has_ended(&self, within: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, within).expect("polled") == 1
    }

    #[track_caller]
    fn wait(&self) {
        let patience = PollTimeout::try_from(PATIENCE).expect("in range");
        assert!(self.has_ended(patience), "{} does not end", self.name);
    }
}

/// The VM's processes, as the supervisor tells of them.
fn processes(place: &Place) -> Vec<Other> {
    let status = place.ask(&Request::Status);
    let [Reply::Status { processes, .. }] = &status[..] else {
        panic!("{status:?}");
    };
    let open = |number| {
        let pid = Pid::from_raw(number).expect("a number");
        pidfd_open(pid, PidfdFlags::empty()).expect("it runs")
    };
    let processes = processes.iter().map(|(name, number)| Other {
        name: name.clone(),
        number: *number,
        pidfd: open(*number),
    });
    processes.collect()
}

fn named<'a>(others: &'a [Other], name: &str) -> &'a Other {
    others.iter().find(|other| other.name == name).expect("there")
}

/// A VM with a disk that runs until somebody ends it. (Its console is not the test's: that would end with the supervisor.)
const FLAGS: [&str; 6] = ["--cmdline", "watch", "--disk", "memory=1M", "--console", "none"];

fn started(place: &Place) -> Running {
    let running = place.start(&FLAGS);
    place.wait_until_it_runs();
    running
}

fn folder_is_orphaned(place: &Place) -> bool {
    is_orphaned(&place.path("run/vm")).expect("an answer")
}

/// The name can be used again, and the one who does is told what was there.
fn the_name_is_free(place: &Place) {
    let ended = place.run(&["--cmdline", "poweroff"]);
    ended.expect(0, "bulkhead: an earlier VM named vm (process ");
}

fn a_vm_outlives_its_supervisor_and_ends_with_its_vcpu_process() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    assert!(!folder_is_orphaned(&place));
    running.kill();
    assert!(folder_is_orphaned(&place));
    // The second one finds that all those are there to whom the first one's end could have mattered.
    assert!(folder_is_orphaned(&place));
    for other in &others {
        assert!(!other.has_ended(PollTimeout::ZERO), "{} has ended", other.name);
    }
    place.start(&["--cmdline", "poweroff"]).wait().expect(
        1,
        "bulkhead: a VM named vm runs without a supervisor: `bulkhead adopt vm` takes it over",
    );
    named(&others, "vcpu").kill();
    others.iter().for_each(Other::wait);
    the_name_is_free(&place);
}

fn a_vm_without_supervisor_and_keeper_ends_and_its_name_is_free() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    running.kill();
    named(&others, "keeper").kill();
    others.iter().for_each(Other::wait);
    the_name_is_free(&place);
}

fn a_keeper_that_dies_is_followed_by_one_that_holds_as_much() {
    let place = Place::new();
    let running = started(&place);
    let first = processes(&place);
    named(&first, "keeper").kill();
    named(&first, "keeper").wait();
    let second = until(|| {
        let now = processes(&place);
        let is_new = |other: &Other| other.number != named(&first, "keeper").number;
        let new = now.iter().any(|other| other.name == "keeper" && is_new(other));
        new.then_some(now)
    });
    let said = running.kill();
    assert!(
        said.contains("bulkhead: the keeper killed by SIGKILL; another one is started\n"),
        "{said}"
    );
    assert!(folder_is_orphaned(&place));
    for other in &second {
        assert!(!other.has_ended(PollTimeout::ZERO), "{} has ended", other.name);
    }
    named(&second, "vcpu").kill();
    second.iter().for_each(Other::wait);
}

/// The process that serves the disk, once it is another one.
fn next_server(place: &Place, before: &Other) -> i32 {
    until(|| {
        let now = place.wait_until_it_runs();
        let server = now.iter().find(|(name, _)| name == "disk0");
        server
            .map(|(_, number)| *number)
            .filter(|number| *number != before.number)
    })
}

/// Ends the VM by way of its present supervisor; what that said.
fn stopped(place: &Place, running: Running, others: &[Other]) -> String {
    assert_eq!(place.ask(&Request::Stop), [Reply::Done]);
    let ended = running.wait();
    ended.expect(0, "");
    others.iter().for_each(Other::wait);
    place.expect_ended();
    ended.stderr
}

fn an_adopted_vm_goes_on_and_its_servers_get_successors() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    running.kill();
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    assert!(!folder_is_orphaned(&place));
    let now = processes(&place);
    let numbers = |others: &[Other]| others.iter().map(|other| other.number).collect::<Vec<_>>();
    assert_eq!(numbers(&now), numbers(&others));
    named(&others, "disk0").kill();
    let second = next_server(&place, named(&others, "disk0"));
    // One that this supervisor has started itself.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(second),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("killed");
    until(|| {
        let now = place.wait_until_it_runs();
        let server = now.iter().find(|(name, _)| name == "disk0");
        server.filter(|(_, number)| *number != second).map(|_| ())
    });
    let said = stopped(&place, adopter, &others);
    for part in [
        " is the supervisor of vm now\n",
        "disk0 (server 1) ended (how is not known: an earlier supervisor had started it)",
        "disk0 (server 2) killed by SIGKILL",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

fn a_server_that_died_without_a_supervisor_gets_its_successor_at_adoption() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    running.kill();
    named(&others, "disk0").kill();
    named(&others, "disk0").wait();
    let adopter = place.adopt("vm");
    next_server(&place, named(&others, "disk0"));
    stopped(&place, adopter, &others);
}

/// How a process ended that an earlier supervisor had started is not known; `bulkhead-bus` ends before `bulkhead-vcpu`.
fn a_guest_that_powers_off_ends_an_adopted_vm_as_any_other() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    running.kill();
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    assert_eq!(place.ask(&Request::PowerButton), [Reply::Done]);
    named(&others, "bus").wait();
    assert_eq!(place.ask(&Request::PowerButton), [Reply::Done]);
    adopter.wait().expect(0, "");
    others.iter().for_each(Other::wait);
}

fn adopters_follow_each_other_and_a_service_manager_needs_one_command() {
    let place = Place::new();
    let args = [&FLAGS[..], &["--adopt"]].concat();
    let running = place.start(&args);
    place.wait_until_it_runs();
    let others = processes(&place);
    running.kill();
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    adopter.kill();
    let third = place.start(&args);
    place.wait_until_it_runs();
    for other in &others {
        assert!(!other.has_ended(PollTimeout::ZERO), "{} has ended", other.name);
    }
    named(&others, "keeper").kill();
    named(&others, "keeper").wait();
    until(|| {
        let keeper = processes(&place).into_iter().find(|other| other.name == "keeper");
        keeper.filter(|keeper| keeper.number != named(&others, "keeper").number)
    });
    let said = stopped(&place, third, &others);
    assert!(said.contains("the keeper ended"), "{said}");
}

fn what_cannot_be_adopted_is_refused_with_a_sentence() {
    let place = Place::new();
    let running = started(&place);
    let others = processes(&place);
    place.adopt("vm").wait().expect(
        1,
        &format!(
            "bulkhead: the VM vm has a supervisor (process {}): there is nothing to adopt\n",
            running.child.id()
        ),
    );
    place
        .adopt("other")
        .wait()
        .expect(1, "bulkhead: no VM named other runs for this user");
    stopped(&place, running, &others);
}

fn a_vm_that_has_not_begun_to_run_ends_with_its_supervisor() {
    let place = Place::new();
    let running = place.start(&["--cmdline", "slow", "--disk", "memory=1M"]);
    let others = processes(&place);
    running.kill();
    others.iter().for_each(Other::wait);
    the_name_is_free(&place);
}
