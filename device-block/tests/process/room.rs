//! What all these tests need: a disk, a room, and memory in the guest.

use device_block::config::{CacheMode, ControllerConfig, DiskConfig, DiskKind};
use device_block::vsc::{Command, Initiator, Reply, Room};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use vmbus::mem::Gpa;
use vmbus::vsc::GuestOptions;

pub fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_bulkhead-block").into()
}

/// Past the harness's capture, in the form that `cargo xtask test` counts.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("\nSKIP {}: {reason}\n", thread.name().unwrap_or("a test"));
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("standard error is open");
}

/// A sparse file of that size.
pub fn image(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(std::env::temp_dir()).expect("a temporary file");
    file.as_file().set_len(bytes).expect("its length can be set");
    file
}

/// A new description of a file, as the supervisor opens it for a server.
pub fn open(path: &Path) -> OwnedFd {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("the image opens")
        .into()
}

pub fn disk_config() -> DiskConfig {
    DiskConfig {
        lun: 0,
        fd: "disk".into(),
        read_only: false,
        kind: DiskKind::File,
        bytes: None,
        serial: Some("SERIAL-1".into()),
        cache: CacheMode::Writeback,
        direct: false,
    }
}

pub fn controller(disk: DiskConfig) -> ControllerConfig {
    ControllerConfig {
        instance: uuid::Uuid::from_u128(0x1234),
        disks: vec![disk],
        max_sub_channels: 3,
    }
}

/// A room with one disk.
pub fn room_with(disk: DiskConfig, fd: OwnedFd) -> Room {
    let guest = GuestOptions {
        ram_bytes: 64 << 20,
        vp_count: 4,
    };
    Room::new(program(), &controller(disk), vec![("disk".into(), fd)], guest).expect("the server starts")
}

/// A room with a writable disk in that file.
pub fn room(file: &NamedTempFile) -> Room {
    room_with(disk_config(), open(file.path()))
}

pub fn run(room: &Room, initiator: &mut Initiator, command: &Command) -> Reply {
    initiator
        .execute(command, room.deadline())
        .expect("the server answers")
}

/// Bytes that tell which place they belong to and which round wrote them.
pub fn pattern(offset_bytes: u64, round: u64, len: usize) -> Vec<u8> {
    let mut state = (offset_bytes ^ round.wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

pub fn put(room: &Room, gpa: Gpa, bytes: &[u8]) {
    room.guest.ram().write(gpa, bytes).expect("the address is RAM");
}

pub fn get(room: &Room, gpa: Gpa, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    room.guest
        .ram()
        .read(gpa, &mut bytes)
        .expect("the address is RAM");
    bytes
}

pub fn file_bytes(file: &File, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)
        .expect("the image is long enough");
    bytes
}
