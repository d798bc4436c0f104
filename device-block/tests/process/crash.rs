//! Servers that die. The guest must not notice: nothing lost, nothing answered twice, nothing acknowledged and gone.

use crate::room::*;
use device_block::config::{DiskConfig, DiskKind};
use device_block::storvsp::wire::Operation;
use device_block::storvsp::wire::VstorPacket;
use device_block::vsc::{Command, Data};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use vmbus::mem::{Gpa, sealed_memfd};
use vmbus::vsc::ChannelOptions;

const BYTES: u32 = 4096;
const SLOTS: u64 = 24;

/// Keeps `SLOTS` writes and reads in flight on each of two channels while the server is killed `kills` times. Each place
/// on the disk belongs to one slot, so that what it must hold is known.
fn survives(disk: DiskConfig, fd: OwnedFd, kills: u64) {
    let mut room = room_with(disk, fd);
    let mut channels = room.open_all(1).unwrap();
    let areas: Vec<Gpa> = channels
        .iter()
        .map(|_| room.guest.allocate(SLOTS as usize).unwrap())
        .collect();
    // Per channel and slot: the round that was written last and acknowledged, and what is in flight (round, reading).
    let mut held: Vec<Vec<u64>> = vec![vec![0; SLOTS as usize]; channels.len()];
    let mut flying: Vec<BTreeMap<u64, (u64, bool)>> = vec![BTreeMap::new(); channels.len()];
    let mut round = 0u64;
    let mut answered = 0u64;
    for kill in 0..=kills {
        let until = answered + 200 + kill * 37 % 90;
        let mut batch = 0;
        while answered < until {
            for (index, initiator) in channels.iter_mut().enumerate() {
                for slot in 0..SLOTS {
                    if flying[index].contains_key(&slot) {
                        continue;
                    }
                    round += 1;
                    let gpa = Gpa(areas[index].0 + slot * u64::from(BYTES));
                    let offset = (index as u64 * SLOTS + slot) * u64::from(BYTES);
                    let reading = round.is_multiple_of(3) && held[index][slot as usize] != 0;
                    let command = if reading {
                        put(&room, gpa, &[0xDD; BYTES as usize]);
                        Command::read(0, offset, gpa, BYTES)
                    } else {
                        put(&room, gpa, &pattern(offset, round, BYTES as usize));
                        Command::write(0, offset, gpa, BYTES)
                    };
                    initiator.queue_as(&command, slot + 1).unwrap();
                    flying[index].insert(slot, (round, reading));
                }
                initiator.channel.flush().unwrap();
            }
            batch += 1;
            // The last batch before a kill is left in flight.
            if batch > 3 && kill < kills && answered + 60 > until {
                break;
            }
            for (index, initiator) in channels.iter_mut().enumerate() {
                let mut finished = Vec::new();
                let deadline = room.deadline();
                initiator
                    .collect(1, deadline, |id, reply| finished.push((id, reply)))
                    .unwrap();
                initiator
                    .collect_ready(1000, |id, reply| finished.push((id, reply)))
                    .unwrap();
                for (id, reply) in finished {
                    assert!(reply.is_good(BYTES), "{reply:?}");
                    let slot = id - 1;
                    let (written, reading) = flying[index]
                        .remove(&slot)
                        .expect("a request is answered once, and only once");
                    let offset = (index as u64 * SLOTS + slot) * u64::from(BYTES);
                    if reading {
                        let gpa = Gpa(areas[index].0 + slot * u64::from(BYTES));
                        let expected = pattern(offset, held[index][slot as usize], BYTES as usize);
                        assert!(
                            get(&room, gpa, BYTES as usize) == expected,
                            "acknowledged data is gone"
                        );
                    } else {
                        held[index][slot as usize] = written;
                    }
                    answered += 1;
                }
            }
        }
        if kill < kills {
            room.kill().unwrap();
            room.start_successor().unwrap();
        }
    }
    // Everything in flight is answered, and the disk holds what was acknowledged.
    let page = room.guest.allocate(1).unwrap();
    for (index, initiator) in channels.iter_mut().enumerate() {
        let deadline = room.deadline();
        let left = flying[index].len();
        initiator
            .collect(left, deadline, |id, reply| {
                assert!(reply.is_good(BYTES));
                let (written, reading) = flying[index].remove(&(id - 1)).expect("answered once");
                if !reading {
                    held[index][id as usize - 1] = written;
                }
            })
            .unwrap();
        for slot in 0..SLOTS {
            let offset = (index as u64 * SLOTS + slot) * u64::from(BYTES);
            assert!(run(&room, initiator, &Command::read(0, offset, page, BYTES)).is_good(BYTES));
            let expected = pattern(offset, held[index][slot as usize], BYTES as usize);
            assert!(get(&room, page, BYTES as usize) == expected);
        }
    }
}

#[test]
fn killed_servers_lose_and_repeat_nothing_on_a_file() {
    let file = image(1 << 20);
    survives(disk_config(), open(file.path()), 12);
}

#[test]
fn killed_servers_lose_and_repeat_nothing_around_the_page_cache() {
    let file = image(1 << 20);
    survives(
        DiskConfig {
            direct: true,
            ..disk_config()
        },
        open(file.path()),
        8,
    );
}

#[test]
fn killed_servers_lose_and_repeat_nothing_on_a_memory_disk() {
    let disk = DiskConfig {
        kind: DiskKind::Memory,
        ..disk_config()
    };
    survives(disk, sealed_memfd("disk", 1 << 20).unwrap(), 8);
}

#[test]
fn initialisation_goes_on_with_a_new_server_at_every_step() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open(ChannelOptions::default()).unwrap();
    let steps: [(Operation, &[u8]); 5] = [
        (Operation::BeginInitialization, &[]),
        (Operation::QueryProtocolVersion, &[2, 6, 0, 0]),
        (Operation::QueryProperties, &[]),
        (Operation::EndInitialization, &[]),
        (Operation::CreateSubChannels, &[1, 0]),
    ];
    for (operation, body) in steps {
        room.kill().unwrap();
        room.start_successor().unwrap();
        let answer = primary
            .call(&VstorPacket::with_body(operation, body), room.deadline())
            .unwrap();
        assert_eq!(answer.header.status.get(), 0, "{operation:?}");
    }
    room.kill().unwrap();
    room.start_successor().unwrap();
    // The offer may have died with the server that promised it.
    assert_eq!(room.guest.wait_sub_channels(room.deadline()).unwrap(), 1);
    let mut second = room
        .open(ChannelOptions {
            sub_index: 1,
            ..ChannelOptions::default()
        })
        .unwrap();
    assert!(run(&room, &mut second, &Command::new(0, &[0; 6], Data::None)).is_good(0));
}

#[test]
fn requests_sent_while_nobody_serves_are_answered_later() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let mut primary = room.open_all(0).unwrap().remove(0);
    let page = room.guest.allocate(1).unwrap();
    room.kill().unwrap();
    for id in 1..=10 {
        primary
            .queue_as(&Command::read(0, id * 4096, page, 4096), id)
            .unwrap();
    }
    primary.channel.flush().unwrap();
    room.start_successor().unwrap();
    let mut ids = Vec::new();
    primary
        .collect(10, room.deadline(), |id, reply| {
            ids.push((id, reply.is_good(4096)))
        })
        .unwrap();
    ids.sort_unstable();
    assert_eq!(ids, (1..=10).map(|id| (id, true)).collect::<Vec<_>>());
}

#[test]
fn a_channel_opened_while_nobody_serves_starts_anew() {
    let file = image(1 << 20);
    let mut room = room(&file);
    let primary = room.open_all(0).unwrap().remove(0);
    room.kill().unwrap();
    room.guest
        .close_channel(&primary.channel, room.deadline())
        .unwrap();
    let mut again = room.open(ChannelOptions::default()).unwrap();
    room.start_successor().unwrap();
    assert_eq!(
        run(&room, &mut again, &Command::flush(0)).packet_status,
        0xC000_0184
    );
    again.initialize(room.deadline()).unwrap();
    assert!(run(&room, &mut again, &Command::flush(0)).is_good(0));
}
