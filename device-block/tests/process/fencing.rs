//! A server dies while the host still works on its requests. Its successor must do nothing before they are over: a write
//! that lands late would undo a newer one, and a read would land in pages that the guest uses for something else.
//!
//! Of direct I/O the device still has the requests, of cached I/O a thread of the process, which cannot end before them.

use crate::room::*;
use crate::slow::{Kind, SlowDisk};
use device_block::config::DiskConfig;
use device_block::vsc::{Command, Initiator, Room};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use vmbus::ipc::ServerToSupervisor;
use vmbus::lease::{self, Place};

const BYTES: u32 = 4096;

/// For how long the host does not answer after the death.
const SILENCE: Duration = Duration::from_secs(2);

fn disk(direct: bool) -> DiskConfig {
    DiskConfig {
        direct,
        ..disk_config()
    }
}

fn slow_disk(kind: Kind) -> Option<SlowDisk> {
    let disk = SlowDisk::new(kind);
    if disk.is_none() {
        skip("no file system of a test's own can be mounted here, or no loop device be made on it");
    }
    disk
}

/// A slow disk, its server, and the channel to it. `None`, said aloud: it cannot be had here.
fn served(kind: Kind, direct: bool) -> Option<(SlowDisk, Room, Initiator)> {
    let slow = slow_disk(kind)?;
    let mut room = room_with(disk(direct), slow.open());
    let primary = room.open_all(0).expect("the channel opens").remove(0);
    Some((slow, room, primary))
}

/// Sends commands, numbered from 1, and waits until the host holds them all back.
fn send_held(slow: &SlowDisk, primary: &mut Initiator, commands: &[Command]) {
    for (id, command) in (1..).zip(commands) {
        primary.queue_as(command, id).expect("there is room");
    }
    primary.channel.flush().expect("kicked");
    slow.wait_held(commands.len());
}

/// Writes and a read are in flight when the server is killed, and for seconds after it. A single cached write: a second one
/// may be begun by a thread of the dying process or not, before the kill or after it.
fn waits(kind: Kind, direct: bool) {
    let Some((slow, mut room, mut primary)) = served(kind, direct) else {
        return;
    };
    let (written, read) = (
        room.guest.allocate(2).expect("there is memory"),
        room.guest.allocate(1).expect("there is memory"),
    );
    let stored = pattern(1 << 20, 9, BYTES as usize);
    slow.put(1 << 20, &stored);
    put(&room, written, &pattern(0, 1, 2 * BYTES as usize));
    put(&room, read, &[0xDD; BYTES as usize]);
    slow.hold();
    let second = vmbus::mem::Gpa(written.0 + u64::from(BYTES));
    let write = match direct {
        true => Command::write,
        false => Command::write_durable,
    };
    let mut commands = vec![
        write(0, 0, written, BYTES),
        Command::read(0, 1 << 20, read, BYTES),
    ];
    if direct {
        commands.push(write(0, 2 << 20, second, BYTES));
    }
    send_held(&slow, &mut primary, &commands);

    let dying = room.child.pidfd.try_clone().expect("a duplicate");
    match direct {
        true => room.kill().expect("killed"),
        false => {
            room.child.kill().expect("killed");
            room.guest.server_gone();
        }
    }
    slow.expect_silence();
    room.start_successor().expect("the successor attaches");
    let until = Instant::now() + SILENCE;
    while Instant::now() < until {
        // It waits, and answers its supervisor nevertheless.
        let deadline = room.deadline();
        let entries = room.supervisor.inspect(deadline).expect("it answers");
        assert!(
            entries.contains(&("active".to_owned(), "0".to_owned())),
            "{entries:?}"
        );
        let mut answers = 0;
        primary
            .collect_ready(10, |_, _| answers += 1)
            .expect("the ring is sound");
        assert_eq!(answers, 0, "answered while the host works on it");
        assert_eq!(
            slow.early(),
            Vec::<String>::new(),
            "done while the host works on it"
        );
    }
    assert_eq!(
        get(&room, read, 1),
        [0xDD],
        "what the host has not read is not in the guest's memory"
    );

    slow.release();
    if !direct {
        waitid(Id::PIDFd(dying.as_fd()), WaitPidFlag::WEXITED).expect("it ends");
    }
    let mut ids = Vec::new();
    let deadline = room.deadline();
    primary
        .collect(commands.len(), deadline, |id, reply| {
            assert!(reply.is_good(BYTES), "{reply:?}");
            ids.push(id);
        })
        .expect("all are answered in time");
    ids.sort_unstable();
    assert!(ids.iter().copied().eq(1..=commands.len() as u64), "{ids:?}");
    assert_eq!(slow.early(), Vec::<String>::new());
    assert!(get(&room, read, BYTES as usize) == stored);
    // A newer write, and nothing older that comes after it.
    let newer = pattern(0, 2, BYTES as usize);
    put(&room, written, &newer);
    assert!(run(&room, &mut primary, &Command::write(0, 0, written, BYTES)).is_good(BYTES));
    put(&room, read, &[0xEE; BYTES as usize]);
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
    assert!(slow.bytes(0, BYTES as usize) == newer);
    assert_eq!(get(&room, read, 1), [0xEE]);
}

#[test]
fn a_successor_waits_for_requests_that_the_block_layer_still_has() {
    waits(Kind::Loop, true);
}

#[test]
fn a_successor_waits_for_cached_requests_that_the_block_layer_still_has() {
    waits(Kind::Loop, false);
}

#[test]
fn a_successor_waits_for_requests_that_a_file_system_in_user_space_still_has() {
    waits(Kind::File, true);
}

/// The lease of a room's disk is looked at through a description of the test's own, as a supervisor does.
fn is_free(room: &Room, disk: &OwnedFd) -> bool {
    let place = Place::lease(room.journal()).expect("the journal has a number");
    lease::is_free(disk.as_fd(), place).expect("the kernel answers")
}

/// Told to stop while a write and a read are in flight.
fn lets_go_late(direct: bool) {
    let Some((slow, mut room, mut primary)) = served(Kind::Loop, direct) else {
        return;
    };
    let page = room.guest.allocate(2).expect("there is memory");
    slow.hold();
    let commands = [
        Command::write_durable(0, 0, page, BYTES),
        Command::read(0, 1 << 20, page, BYTES),
    ];
    send_held(&slow, &mut primary, &commands);
    let look = slow.open();
    room.supervisor.stop().expect("told");
    for _ in 0..100 {
        // One that has let go ends, and does not answer any more.
        let deadline = room.deadline();
        room.supervisor.inspect(deadline).expect("it answers");
        assert!(!is_free(&room, &look), "let go while the host works on it");
    }
    slow.release();
    let deadline = room.deadline();
    let said = room.supervisor.next(deadline, "Released").expect("it speaks");
    assert!(matches!(said, ServerToSupervisor::Released), "{said:?}");
    assert!(is_free(&room, &look));
    // What was in flight is answered, by the old one.
    let mut answers = 0;
    primary
        .collect(2, deadline, |_, reply| {
            assert!(reply.is_good(BYTES), "{reply:?}");
            answers += 1;
        })
        .expect("all are answered in time");
    assert_eq!(answers, 2);
    assert!(room.wait_end().expect("it ends").is_success());
}

#[test]
fn a_server_that_is_told_to_stop_lets_go_when_its_direct_io_is_over() {
    lets_go_late(true);
}

#[test]
fn a_server_that_is_told_to_stop_lets_go_when_its_cached_io_is_over() {
    lets_go_late(false);
}

/// What a request in flight refers to: the description that the server does its I/O on.
fn description(room: &Room, disk: &OwnedFd) -> Option<OwnedFd> {
    let identity = |path: String| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let wanted = identity(format!("/proc/self/fd/{}", disk.as_raw_fd()));
    let folder = format!("/proc/{}/fd", room.child.pid);
    let numbers = std::fs::read_dir(&folder).ok()?.flatten();
    let mut numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let number = numbers.find(|number: &i32| identity(format!("{folder}/{number}")) == wanted)?;
    pidfd_getfd(&room.child.pidfd, number, PidfdGetfdFlags::empty()).ok()
}

fn lease_ends(direct: bool, open: impl Fn() -> OwnedFd) {
    let look = open();
    if !lease::proves_end(look.as_fd()) {
        return skip("temporary files are on a file system whose locks prove nothing");
    }
    let mut room = room_with(disk(direct), open());
    let Some(in_flight) = description(&room, &look) else {
        return skip("this user may not have a server's descriptors");
    };
    let mut primary = room.open_all(0).expect("the channel opens").remove(0);
    assert!(run(&room, &mut primary, &Command::flush(0)).is_good(0));
    assert!(!is_free(&room, &look), "it serves without a lease");
    room.kill().expect("killed");
    assert_eq!(is_free(&room, &look), !direct);
    drop(in_flight);
    // The kernel closes the dead process's descriptors in the background, and there is no event for it.
    let deadline = room.deadline();
    while !is_free(&room, &look) {
        assert!(Instant::now() < deadline, "nothing is in flight any more");
        std::thread::yield_now();
    }
}

#[test]
fn the_lease_of_a_dead_server_is_held_by_its_direct_io() {
    let Some(device) = slow_disk(Kind::Loop) else {
        return;
    };
    lease_ends(true, || device.open());
}

#[test]
fn the_lease_of_a_dead_server_with_cached_io_ends_with_its_process() {
    let file = image(1 << 20);
    lease_ends(false, || open(file.path()));
}
