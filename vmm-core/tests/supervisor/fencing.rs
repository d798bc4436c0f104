#![forbid(unsafe_code)]
//! Servers that die while the host still works for them.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmbus::lease::{self, Place as Lock};
use vmm_core::supervisor::control::{Reply, Request};

use super::place::Place;
use super::swaps::{process, stop, until};

pub const ALL: &[(&str, fn())] = &[(
    "a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over",
    a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over,
)];

/// The journal of the VM's only device, which the supervisor has, too.
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
    File::open(found.expect("there is a journal")).expect("opened")
}

fn a_successor_is_started_at_once_and_serves_when_the_dead_servers_io_is_over() {
    let place = Place::new();
    let image = tempfile::NamedTempFile::new().expect("a file");
    image.as_file().set_len(1 << 20).expect("its length can be set");
    if !lease::proves_end(image.as_file().as_fd()) {
        println!("SKIP supervisor: temporary files are on a file system whose locks prove nothing");
        return;
    }
    let disk = format!("path={}", image.path().display());
    let running = place.start(&["--cmdline", "watch", "--disk", &disk]);
    let old = process(&place, "disk0");
    // What a request in flight does: it keeps the lease of its server.
    let mut options = OpenOptions::new();
    let in_flight = options.read(true).write(true).open(image.path()).expect("opened");
    let lock = Lock::lease(journal(&place).as_fd()).expect("a place");
    assert_eq!(
        lease::try_lock(in_flight.as_fd(), lock, lease::Holder::Description),
        Ok(true)
    );
    kill(Pid::from_raw(old), Signal::SIGKILL).expect("killed");
    let new = process(&place, "disk0 successor");
    let serves = |place: &Place| {
        let processes = place.wait_until_it_runs();
        processes.iter().any(|(name, _)| name == "disk0")
    };
    for _ in 0..100 {
        assert!(!serves(&place), "the host still works for the server before");
    }
    drop(in_flight);
    until(|| serves(&place).then_some(()));
    assert_eq!(process(&place, "disk0"), new);
    let ended = stop(&place, running);
    assert_eq!(ended.stdout, "the guest runs\nServerAttached 2\nServerGone 1\n");
}
