//! What the host does wrong, and how the guest hears of it.

use crate::room::*;
use device_block::config::DiskConfig;
use device_block::vsc::Command;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command as Program, Stdio};

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let file = image(1 << 20);
    let disk = DiskConfig {
        read_only: true,
        ..disk_config()
    };
    let read_only = OpenOptions::new().read(true).open(file.path()).unwrap();
    let mut room = room_with(disk, read_only.into());
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    assert!(run(&room, &mut primary, &Command::write(0, 0, page, 4096)).is_check(7, 0x27, 0));
    assert!(run(&room, &mut primary, &Command::read(0, 0, page, 4096)).is_good(4096));
    let mode = Command::new(
        0,
        &[0x1A, 0, 0x3F, 0, 192, 0],
        device_block::vsc::Data::ToGuest(page, 192),
    );
    assert_eq!(run(&room, &mut primary, &mode).srb_status, 1);
    assert_eq!(get(&room, page, 3)[2] & 0x80, 0x80);
}

#[test]
fn what_is_beyond_the_end_is_refused() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(2).unwrap();
    for offset in [1u64 << 20, (1 << 20) - 512, !511] {
        assert!(run(&room, &mut primary, &Command::read(0, offset, page, 4096)).is_check(5, 0x21, 0));
        assert!(run(&room, &mut primary, &Command::write(0, offset, page, 4096)).is_check(5, 0x21, 0));
    }
    assert_eq!(
        file.as_file().metadata().unwrap().len(),
        1 << 20,
        "the file has not grown"
    );
}

#[test]
fn a_file_that_was_cut_off_is_an_unrecovered_read_error() {
    for direct in [false, true] {
        let file = image(1 << 20);
        let mut room = room_with(
            DiskConfig {
                direct,
                ..disk_config()
            },
            open(file.path()),
        );
        let mut primary = room.open_all(0).unwrap().remove(0);
        let page = room.guest.allocate(4).unwrap();
        file.as_file().set_len(256 << 10).unwrap();
        assert!(run(&room, &mut primary, &Command::read(0, 512 << 10, page, 4096)).is_check(3, 0x11, 0));
        // Across the new end, which is in the middle of the transfer.
        file.as_file().set_len((256 << 10) + 700).unwrap();
        let across = Command::read(0, (256 << 10) - 4096, page, 16384);
        assert!(run(&room, &mut primary, &across).is_check(3, 0x11, 0));
        assert!(run(&room, &mut primary, &Command::read(0, 0, page, 4096)).is_good(4096));
    }
}

#[test]
fn a_host_that_refuses_reads_or_writes_is_a_medium_error() {
    let file = image(1 << 20);
    // Descriptors without the right: the kernel answers EBADF to each request.
    let only_read = OpenOptions::new().read(true).open(file.path()).unwrap();
    let mut first = room_with(disk_config(), only_read.into());
    let mut primary = first.open_all(0).unwrap().remove(0);
    let page = first.guest.allocate(1).unwrap();
    assert!(run(&first, &mut primary, &Command::write(0, 0, page, 4096)).is_check(3, 0x0C, 0));
    drop(first);
    let other = image(1 << 20);
    let only_write = OpenOptions::new().write(true).open(other.path()).unwrap();
    let mut second = room_with(disk_config(), only_write.into());
    let mut primary = second.open_all(0).unwrap().remove(0);
    let page = second.guest.allocate(1).unwrap();
    assert!(run(&second, &mut primary, &Command::read(0, 0, page, 4096)).is_check(3, 0x11, 0));
    assert!(run(&second, &mut primary, &Command::write(0, 0, page, 4096)).is_good(4096));
}

/// A file system of 1 MiB that lives as long as this does, in namespaces of its own: nobody needs to be root.
struct SmallFileSystem {
    keeper: Child,
    path: std::path::PathBuf,
}

impl SmallFileSystem {
    fn new() -> Option<Self> {
        let script = "mount -t tmpfs -o size=1m none /mnt && : > /mnt/disk && truncate -s 16M /mnt/disk && echo ready && read line";
        let mut keeper = Program::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        BufReader::new(keeper.stdout.take()?).read_line(&mut line).ok()?;
        let path = format!("/proc/{}/root/mnt/disk", keeper.id()).into();
        let this = Self { keeper, path };
        (line == "ready\n").then_some(this)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Its end of the pipe closes, and it ends by itself.
        drop(self.keeper.stdin.take());
        if let Err(error) = self.keeper.wait() {
            eprintln!("the keeper of the file system: {error}");
        }
    }
}

#[test]
fn a_full_host_disk_is_a_failed_space_allocation_and_goes_away_with_the_cause() {
    let Some(small) = SmallFileSystem::new() else {
        return skip("no file system can be mounted in a user namespace here");
    };
    let mut room = room_with(disk_config(), open(&small.path));
    let mut primary = room.open_all(0).unwrap().remove(0);
    let data = room.guest.allocate(64).unwrap();
    let bytes = 256 << 10;
    for i in 0..3u64 {
        assert!(
            run(
                &room,
                &mut primary,
                &Command::write(0, i * u64::from(bytes), data, bytes)
            )
            .is_good(bytes)
        );
    }
    let mut refused = None;
    for i in 3..8u64 {
        let reply = run(
            &room,
            &mut primary,
            &Command::write(0, i * u64::from(bytes), data, bytes),
        );
        if !reply.is_good(bytes) {
            refused = Some((i, reply));
            break;
        }
    }
    let (i, reply) = refused.expect("a megabyte is full at last");
    assert!(reply.is_check(7, 0x27, 7), "{reply:?}");
    assert_eq!(reply.bytes, 0);
    assert!(
        run(&room, &mut primary, &Command::read(0, 0, data, bytes)).is_good(bytes),
        "reads go on"
    );
    let list = Command::unmap_list(&[(0, bytes), (u64::from(bytes), bytes)]);
    put(&room, data, &list);
    assert!(run(&room, &mut primary, &Command::unmap(0, data, list.len() as u16)).is_good(0));
    let again = run(
        &room,
        &mut primary,
        &Command::write(0, i * u64::from(bytes), data, bytes),
    );
    assert!(again.is_good(bytes), "{again:?}");
}
