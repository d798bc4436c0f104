#![forbid(unsafe_code)]
//! Who adopts: several at once, some who say nothing, and users who may not.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Instant;

use nix::unistd::geteuid;
use vmm_core::supervisor::control::connect_to;
use vmm_core::supervisor::keeper::{FromKeeper, is_orphaned, receive_kept};

use super::adoption::{ends_with, started};
use super::place::{PATIENCE, Place, Running};
use super::swaps::process;

pub const ALL: &[(&str, fn())] = &[
    (
        "of_several_adopters_one_is_let_and_each_other_says_why_not",
        of_several_adopters_one_is_let_and_each_other_says_why_not,
    ),
    (
        "those_who_connect_to_a_keeper_and_say_nothing_keep_no_adopter_out",
        those_who_connect_to_a_keeper_and_say_nothing_keep_no_adopter_out,
    ),
    (
        "the_vm_of_another_user_is_not_adopted",
        the_vm_of_another_user_is_not_adopted,
    ),
    (
        "a_keeper_gives_nothing_to_another_user",
        a_keeper_gives_nothing_to_another_user,
    ),
];

fn of_several_adopters_one_is_let_and_each_other_says_why_not() {
    let place = Place::new();
    let mut supervisor = started(&place, "memory=1M");
    let server = process(&place, "disk0");
    for others in [1, 5, 19, 19] {
        supervisor.kill();
        let mut adopters: Vec<Running> = (0..=others).map(|_| place.adopt("vm")).collect();
        let deadline = Instant::now() + PATIENCE;
        let mut refused = Vec::new();
        while refused.len() < others {
            assert!(Instant::now() < deadline, "{} were refused", refused.len());
            let ended = adopters
                .iter_mut()
                .position(|adopter| adopter.child.try_wait().expect("ours").is_some());
            match ended {
                Some(ended) => refused.push(adopters.remove(ended).wait()),
                None => std::thread::yield_now(),
            }
        }
        supervisor = adopters.remove(0);
        place.wait_until_it_runs();
        // The faster one may not have said yet which process it is.
        let winner = supervisor.child.id();
        let sentences = [
            format!("the VM vm has a supervisor (process {winner}): "),
            "the VM vm has a supervisor: ".to_owned(),
            "the VM vm was adopted by another process just before: ".to_owned(),
        ];
        for ended in refused {
            ended.expect(1, ": there is nothing to adopt\n");
            let sentence = ended.stderr.strip_prefix("bulkhead: ").expect("a sentence");
            assert_eq!(sentence.lines().count(), 1, "{sentence}");
            let is_expected = sentences.iter().any(|expected| sentence.starts_with(expected));
            assert!(is_expected, "{sentence}");
        }
        assert_eq!(process(&place, "disk0"), server);
    }
    ends_with(&place, supervisor, &[server]);
}

fn those_who_connect_to_a_keeper_and_say_nothing_keep_no_adopter_out() {
    let place = Place::new();
    let supervisor = started(&place, "memory=1M");
    let server = process(&place, "disk0");
    supervisor.kill();
    let silent: Vec<_> = (0..20)
        .map(|_| {
            let socket = connect_to(&place.path("run/vm/adopt")).expect("an answer");
            let mut socket = socket.expect("the keeper listens");
            let (word, _) = receive_kept(&mut socket).expect("a word");
            assert_eq!(word, FromKeeper::Orphaned);
            socket
        })
        .collect();
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    drop(silent);
    ends_with(&place, adopter, &[server]);
}

/// It ends, and the VM has no supervisor all the while.
fn is_refused(place: &Place, mut adopter: Running, sentence: &str) {
    while adopter.child.try_wait().expect("ours").is_none() {
        let orphaned = is_orphaned(&place.path("run/vm")).expect("an answer");
        assert!(orphaned, "it is adopted");
        std::thread::yield_now();
    }
    let refused = adopter.wait();
    refused.expect(1, "");
    assert_eq!(refused.stderr, format!("bulkhead: {sentence}\n"));
}

/// A VM whose supervisor was killed, and its server, for a test that gives it to another user.
fn orphan_of_root() -> Option<(Place, i32)> {
    if !geteuid().is_root() {
        println!("SKIP supervisor: only root can be another user, and give a VM's folder to one");
        return None;
    }
    let place = Place::new();
    let supervisor = started(&place, "memory=1M");
    let server = process(&place, "disk0");
    supervisor.kill();
    Some((place, server))
}

fn the_vm_of_another_user_is_not_adopted() {
    let Some((place, server)) = orphan_of_root() else {
        return;
    };
    let folder = place.path("run/vm");
    let give = |user| chown(Path::new(&folder), Some(user), None).expect("we are root");
    give(65534);
    is_refused(
        &place,
        place.adopt("vm"),
        "the VM vm is one of the user 65534: nobody else can adopt it",
    );
    give(0);
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    ends_with(&place, adopter, &[server]);
}

/// As if the folder had been opened to somebody: the keeper itself looks at who comes.
fn a_keeper_gives_nothing_to_another_user() {
    let Some((place, server)) = orphan_of_root() else {
        return;
    };
    let folder = place.path("run/vm");
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    for path in [place.folder.path(), &place.path("run")] {
        open(path, 0o755);
    }
    open(&folder.join("adopt"), 0o666);
    // The other user need not be able to go where this program was built.
    let bulkhead = place.path("bulkhead");
    std::fs::copy(env!("CARGO_BIN_EXE_bulkhead"), &bulkhead).expect("copied");
    open(&bulkhead, 0o755);
    chown(&folder, Some(65534), None).expect("we are root");
    let mut command = place.adopt_command("vm", &bulkhead);
    let other = Running {
        child: command.uid(65534).gid(65534).spawn().expect("started"),
    };
    let sentence = "the keeper of vm hangs up: it does not give the VM to this user";
    is_refused(&place, other, sentence);
    chown(&folder, Some(0), None).expect("we are root");
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    ends_with(&place, adopter, &[server]);
}
