//! A predecessor may have been anybody's before it died: whatever is in the journal, its successor refuses it in a
//! sentence, or gives a channel up, or goes on; it does not crash, and it writes to no place that is not its disk's.

use crate::room::*;
use device_block::config::DiskConfig;
use device_block::vsc::{Command, Initiator, Room};
use std::os::unix::fs::FileExt;
use vmbus::vsc::{Random, spoil};

/// The disk ends here, and its file does not.
const DISK_BYTES: u64 = 512 << 10;
const FILE_BYTES: u64 = 1 << 20;

/// Of what the journal has, as much as is in use here.
const SLOTS: u16 = 24;

/// What became of a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Refuses,
    GivesAChannelUp,
    GoesOn,
}

/// Starts the successor; the guest takes what it answers, right or wrong.
fn succeed(room: &mut Room, channels: &mut [Initiator], case: &str) -> Fate {
    let started = room.start_successor();
    let deadline = room.deadline();
    let mut gave_up = false;
    if started.is_ok() && room.supervisor.inspect(deadline).is_ok() {
        // Once more: the requests of the journal are executed by now, or are at the disk.
        for channel in channels {
            // What a journal of nonsense answers is nonsense.
            channel.collect_ready(1000, |_, _| {}).ok();
        }
        // The first question may be answered before the channels are opened, the second is not.
        if room.supervisor.inspect(deadline).is_ok() {
            while let Ok(Some(message)) = room.guest.next_message() {
                gave_up |= format!("{message:?}").starts_with("ChannelBroken");
            }
            let cause = room.stop().expect("it stops");
            assert!(cause.is_success(), "{case}: {cause:?}");
            return match gave_up {
                true => Fate::GivesAChannelUp,
                false => Fate::GoesOn,
            };
        }
    }
    let cause = room.wait_end().expect("it ends");
    assert!(
        matches!(cause, sandbox::ExitCause::Exited(1)),
        "{case}: the successor ended with {cause:?}, after {started:?}"
    );
    Fate::Refuses
}

fn survive(seed: u64) -> Fate {
    let case = format!("seed {seed}");
    let mut random = Random::new(seed);
    let file = image(FILE_BYTES);
    let behind = pattern(DISK_BYTES, seed, (FILE_BYTES - DISK_BYTES) as usize);
    file.as_file().write_all_at(&behind, DISK_BYTES).expect("written");
    let disk = DiskConfig {
        bytes: Some(DISK_BYTES),
        ..disk_config()
    };
    let mut room = room_with(disk, open(file.path()));
    let mut channels = room.open_all(1).expect("two channels");
    let pages = room.guest.allocate(8).expect("memory");
    put(&room, pages, &pattern(0, seed, 8 * 4096));
    for channel in &mut channels {
        for id in 1..=8 {
            let offset = DISK_BYTES - 4096 * (1 + random.below(8));
            let gpa = vmbus::mem::Gpa(pages.0 + 4096 * (id - 1));
            let command = match random.below(2) {
                0 => Command::read(0, offset, gpa, 4096),
                _ => Command::write(0, offset, gpa, 4096),
            };
            channel.queue_as(&command, id).expect("room in the ring");
        }
        channel.channel.flush().expect("a server that behaves");
    }
    room.kill().expect("killed");
    spoil(room.journal(), 2, SLOTS, &mut random).expect("the journal can be written");
    let fate = succeed(&mut room, &mut channels, &case);
    assert!(
        file_bytes(file.as_file(), DISK_BYTES, behind.len()) == behind,
        "{case}: something was written behind the end of the disk"
    );
    let len = file.as_file().metadata().expect("metadata").len();
    assert_eq!(len, FILE_BYTES, "{case}: the file has grown");
    fate
}

#[test]
fn whatever_is_in_the_journal_its_successor_does_not_crash_and_writes_nowhere_else() {
    let mut fates: Vec<Fate> = (1..=60).map(survive).collect();
    fates.sort();
    let count = |fate| fates.iter().filter(|found| **found == fate).count();
    println!(
        "{} refused, {} gave a channel up, {} went on",
        count(Fate::Refuses),
        count(Fate::GivesAChannelUp),
        count(Fate::GoesOn)
    );
    for fate in [Fate::Refuses, Fate::GivesAChannelUp, Fate::GoesOn] {
        assert!(count(fate) > 0, "none of the journals led to {fate:?}");
    }
}
