#![forbid(unsafe_code)]
//! Servers that are gone while the host still works for them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tempfile::NamedTempFile;
use vmbus::lease::{self, Place as Lock};
use vmm_core::supervisor::control::{Reply, Request};

use super::place::{Place, Running, is_gone, replies};
use super::swaps::{process, program, stop, until};

pub const ALL: &[(&str, fn())] = &[
    (
        "a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over",
        a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over,
    ),
    (
        "a_successor_serves_when_the_dead_servers_io_uring_is_gone",
        a_successor_serves_when_the_dead_servers_io_uring_is_gone,
    ),
    (
        "a_swap_waits_for_the_io_of_a_server_that_says_that_it_has_let_go",
        a_swap_waits_for_the_io_of_a_server_that_says_that_it_has_let_go,
    ),
];

/// A VM with a disk in a file, and what a request in flight of its server would refer to.
struct Scene {
    place: Place,
    running: Running,
    _image: NamedTempFile,
    server: i32,
    in_flight: OwnedFd,
}

/// `None`, said aloud: it cannot be had here.
fn scene() -> Option<Scene> {
    let place = Place::new();
    let image = NamedTempFile::new().expect("a file");
    image.as_file().set_len(1 << 20).expect("its length can be set");
    if !lease::proves_end(image.as_file().as_fd()) {
        println!("SKIP supervisor: temporary files are on a file system whose locks prove nothing");
        return None;
    }
    let disk = format!("path={}", image.path().display());
    let running = place.start(&["--cmdline", "watch", "--disk", &disk]);
    let server = process(&place, "disk0");
    let wanted = image.as_file().metadata().expect("asked").ino();
    let is_image = |path: &str| std::fs::metadata(path).is_ok_and(|found| found.ino() == wanted);
    let Some(in_flight) = description(server, is_image) else {
        stop(&place, running);
        println!("SKIP supervisor: this user may not have a server's descriptors");
        return None;
    };
    Some(Scene {
        place,
        running,
        _image: image,
        server,
        in_flight,
    })
}

/// A descriptor of a process, by what it is of: the very description, not another one of the same file.
fn description(process: i32, is_it: impl Fn(&str) -> bool) -> Option<OwnedFd> {
    let folder = format!("/proc/{process}/fd");
    let entries = std::fs::read_dir(&folder).ok()?.flatten();
    let mut numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let number = numbers.find(|number: &i32| is_it(&format!("{folder}/{number}")))?;
    let process = pidfd_open(Pid::from_raw(process)?, PidfdFlags::empty()).ok()?;
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()
}

/// The journal of the VM's only device, which the supervisor has, too; a description of our own.
fn journal(place: &Place) -> File {
    let [Reply::Status { supervisor, .. }] = &place.ask(&Request::Status)[..] else {
        panic!("no status");
    };
    let folder = format!("/proc/{supervisor}/fd");
    let found = std::fs::read_dir(&folder)
        .expect("a process of ours")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("bulkhead-journal"))
        });
    let mut options = File::options();
    let opened = options
        .read(true)
        .write(true)
        .open(found.expect("there is a journal"));
    opened.expect("opened")
}

fn kill_hard(process: i32) {
    kill(nix::unistd::Pid::from_raw(process), Signal::SIGKILL).expect("killed");
}

/// The successor waits as long as that is held, and serves then.
fn serves_after<T>(place: &Place, held: T) {
    let new = process(place, "disk0 successor");
    let serves = || {
        let processes = place.wait_until_it_runs();
        let now = processes.iter().find(|(name, _)| name == "disk0");
        now.map(|(_, process)| *process)
    };
    for _ in 0..100 {
        assert_ne!(serves(), Some(new), "the host still works for the server before");
    }
    drop(held);
    until(|| (serves() == Some(new)).then_some(()));
}

/// Takes the lease as the server would have it: on its description, which outlives it.
fn take_lease(scene: &Scene) {
    let lock = Lock::lease(journal(&scene.place).as_fd()).expect("a place");
    let taken = lease::try_lock(scene.in_flight.as_fd(), lock, lease::Holder::Description);
    assert_eq!(taken, Ok(true));
}

fn a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over() {
    let Some(scene) = scene() else { return };
    take_lease(&scene);
    kill_hard(scene.server);
    serves_after(&scene.place, scene.in_flight);
    let ended = stop(&scene.place, scene.running);
    assert_eq!(ended.stdout, "the guest runs\nServerAttached 2\nServerGone 1\n");
}

/// Where locks on the disk prove nothing, it is the journal's lock that the io_uring keeps.
fn a_successor_serves_when_the_dead_servers_io_uring_is_gone() {
    let place = Place::new();
    let running = place.start(&["--cmdline", "watch", "--disk", "memory=1M"]);
    let server = process(&place, "disk0");
    let lock = Flock::lock(journal(&place), FlockArg::LockExclusiveNonblock);
    let Ok(lock) = lock else {
        panic!("a played server has no lock on it");
    };
    kill_hard(server);
    serves_after(&place, lock);
    let ended = stop(&place, running);
    assert_eq!(ended.stdout, "the guest runs\nServerAttached 2\nServerGone 1\n");
}

fn a_swap_waits_for_the_io_of_a_server_that_says_that_it_has_let_go() {
    let Some(scene) = scene() else { return };
    take_lease(&scene);
    let mut asked = scene.place.connect();
    let request = Request::Swap {
        device: "disk0".to_owned(),
        program: Some(program(&scene.place, "good")),
        patience_s: 60,
    };
    asked.send(&request, &[]).expect("sent");
    // Its word that it has let go is its last one.
    until(|| is_gone(scene.server).then_some(()));
    serves_after(&scene.place, scene.in_flight);
    let answer = replies(&mut asked);
    assert!(
        matches!(answer[..], [Reply::Swapped { from: 1, to: 2, .. }]),
        "{answer:?}"
    );
    let ended = stop(&scene.place, scene.running);
    assert_eq!(ended.stdout, "the guest runs\nServerAttached 2\nServerGone 1\n");
}
