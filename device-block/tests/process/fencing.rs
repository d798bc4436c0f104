//! A server dies while the host still works on its requests. Its successor must do nothing before they are over: a write
//! that lands late would undo a newer one, and a read would land in pages that the guest uses for something else.
//!
//! Of direct I/O the device still has the requests, of cached I/O a thread of the process, which cannot end before them.

use crate::room::*;
use crate::slow::{Kind, SlowDisk};
use device_block::config::DiskConfig;
use device_block::vsc::Command;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const BYTES: u32 = 4096;

/// For how long the host does not answer after the death.
const SILENCE: Duration = Duration::from_secs(2);

/// Two writes and a read are in flight when the server is killed, and for seconds after it. Cached writes that have to be on
/// the disk before they are answered follow one another.
fn waits(kind: Kind, direct: bool) {
    let Some(slow) = SlowDisk::new(kind) else {
        return skip("no file system of a test's own can be mounted here, or no loop device be made on it");
    };
    let disk = DiskConfig {
        direct,
        ..disk_config()
    };
    let mut room = room_with(disk, slow.open());
    let mut primary = room.open_all(0).unwrap().remove(0);
    let (written, read) = (room.guest.allocate(2).unwrap(), room.guest.allocate(1).unwrap());
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
    for (id, command) in [
        write(0, 0, written, BYTES),
        write(0, 2 << 20, second, BYTES),
        Command::read(0, 1 << 20, read, BYTES),
    ]
    .iter()
    .enumerate()
    {
        primary.queue_as(command, id as u64 + 1).unwrap();
    }
    primary.channel.flush().unwrap();
    slow.wait_held(if direct { 3 } else { 2 });

    let dying = room.child.pidfd.try_clone().unwrap();
    match direct {
        true => room.kill().unwrap(),
        false => {
            room.child.kill().unwrap();
            room.guest.server_gone();
        }
    }
    slow.expect_silence();
    room.start_successor().unwrap();
    let until = Instant::now() + SILENCE;
    while Instant::now() < until {
        // It waits, and answers its supervisor nevertheless.
        let deadline = room.deadline();
        let entries = room.supervisor.inspect(deadline).unwrap();
        assert!(
            entries.contains(&("active".to_owned(), "0".to_owned())),
            "{entries:?}"
        );
        let mut answers = 0;
        primary.collect_ready(10, |_, _| answers += 1).unwrap();
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
        .collect(3, deadline, |id, reply| {
            assert!(reply.is_good(BYTES), "{reply:?}");
            ids.push(id);
        })
        .unwrap();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
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
