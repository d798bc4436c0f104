//! A predecessor may have been anybody's before it died: whatever is in the journal, its successor refuses it in a
//! sentence, or gives a channel up, or goes on; it does not crash, and it writes to no place that is not its disk's.

use crate::room::*;
use device_block::config::DiskConfig;
use device_block::vsc::{Command, Initiator, Room};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The disk ends here, and its file does not.
const DISK_BYTES: u64 = 512 << 10;
const FILE_BYTES: u64 = 1 << 20;

/// Where a journal's parts are (vmbus/src/journal/layout.rs), and how much of each is in use here: begin, length.
const SAVED_STATE: u64 = 4096;
const CHANNELS: u64 = 4096 + 2 * 65536;
const CHANNEL_BYTES: u64 = 4096 + 1024 * 32 + 1024 * 2560;
const PARTS: [(u64, u64); 9] = [
    (0, 64),
    (SAVED_STATE, 160),
    (SAVED_STATE + 65536, 160),
    (CHANNELS, 0x50),
    (CHANNELS + 4096, 16 * 32),
    (CHANNELS + 4096 + 1024 * 32, 16 * 2560),
    (CHANNELS + CHANNEL_BYTES, 0x50),
    (CHANNELS + CHANNEL_BYTES + 4096, 16 * 32),
    (CHANNELS + CHANNEL_BYTES + 4096 + 1024 * 32, 16 * 2560),
];

/// Values that counters, lengths and indexes go wrong at.
const WORDS: [u64; 12] = [
    0,
    1,
    4,
    8,
    0x7FFF_FFFF,
    0xFFFF_FFF8,
    0xFFFF_FFFF,
    1 << 32,
    (1 << 62) - 1,
    1 << 62,
    1 << 63,
    u64::MAX,
];

struct Random(u64);

impl Random {
    /// Xorshift.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Up to six changes.
fn spoil(journal: &File, random: &mut Random) {
    for _ in 0..=random.below(6) {
        let (begin, len) = PARTS[random.below(PARTS.len() as u64) as usize];
        let at = begin + random.below(len / 8) * 8;
        let mut word = [0; 8];
        journal
            .read_exact_at(&mut word, at)
            .expect("the journal is readable");
        match random.below(4) {
            0 => word = WORDS[random.below(WORDS.len() as u64) as usize].to_le_bytes(),
            1 => word[random.below(8) as usize] ^= 1 << random.below(8),
            2 => word = random.below(u64::MAX).to_le_bytes(),
            _ => {
                // Anything at all, everywhere in this part.
                let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                journal
                    .write_all_at(&bytes, begin)
                    .expect("the journal is writable");
                continue;
            }
        }
        journal.write_all_at(&word, at).expect("the journal is writable");
    }
}

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
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
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
    let journal = File::from(room.journal().try_clone_to_owned().expect("a descriptor"));
    spoil(&journal, &mut random);
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
