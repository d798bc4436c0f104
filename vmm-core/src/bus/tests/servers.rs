#![forbid(unsafe_code)]
//! Servers that come late, die, dawdle or lie.

use super::*;

fn up(world: &mut World) -> ChannelId {
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.heard();
    disk
}

fn opens(world: &World) -> Vec<(u32, u32, bool)> {
    let open = |message: &BusToServer| match *message {
        BusToServer::OpenChannel {
            channel,
            open_epoch,
            fresh,
            ..
        } => Some((channel, open_epoch, fresh)),
        _ => None,
    };
    world.inbox(DISK).iter().filter_map(open).collect()
}

#[test]
fn a_server_that_attaches_late_hears_the_whole_truth_afresh() {
    let mut world = World::without_servers();
    world.boot();
    let disk = up(&mut world);
    world.attach(DISK);
    let inbox = world.inbox(DISK);
    assert!(matches!(
        inbox[..],
        [
            BusToServer::Attach { .. },
            BusToServer::Serve,
            BusToServer::Gpadl { .. },
            BusToServer::OpenChannel { fresh: true, .. },
            BusToServer::HandedOver,
        ]
    ));
    assert_eq!(opens(&world), [(disk.0, 1, true)]);
}

#[test]
fn a_successor_hears_the_same_and_recovers() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.guest(GuestToHost::ModifyChannel {
        channel: disk,
        target_vp: 2,
    });
    world.die(DISK);
    world.guest(GuestToHost::ModifyChannel {
        channel: disk,
        target_vp: 3,
    });
    world.heard();
    world.attach(DISK);
    assert_eq!(opens(&world), [(disk.0, 1, false)]);
    assert!(matches!(
        world.inbox(DISK)[3],
        BusToServer::OpenChannel { target_vp: 3, .. }
    ));
    assert_eq!(world.heard(), []);
    assert!(world.kicks.contains(&disk.0));
}

#[test]
fn a_channel_that_was_reopened_between_two_servers_is_fresh() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.die(DISK);
    world.close(disk);
    world.teardown(disk, 0x100);
    assert_eq!(
        world.heard(),
        [HostToGuest::GpadlTorndown {
            gpadl: GpadlId(0x100)
        }]
    );
    world.gpadl_and_open(disk, 0x101);
    world.attach(DISK);
    assert_eq!(opens(&world), [(disk.0, 2, true)]);
}

#[test]
fn the_death_of_a_server_settles_all_that_it_owed() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.teardown(disk, 0x100);
    assert_eq!(world.heard(), []);
    assert_eq!(world.bus.waits.len(), 2);
    world.die(DISK);
    assert_eq!(
        world.heard(),
        [HostToGuest::GpadlTorndown {
            gpadl: GpadlId(0x100)
        }]
    );
    assert!(world.bus.waits.is_empty());
}

#[test]
fn the_death_of_a_server_lets_an_unload_finish() {
    let mut world = World::booted();
    up(&mut world);
    world.guest(GuestToHost::Unload);
    assert_eq!(world.heard(), []);
    world.die(NIC);
    assert_eq!(world.heard(), []);
    world.die(DISK);
    assert_eq!(world.heard(), [HostToGuest::UnloadResponse]);
}

#[test]
fn an_overdue_acknowledgement_is_reported_and_still_taken() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.teardown(disk, 0x100);
    for id in std::mem::take(&mut world.deadlines) {
        let actions = world.bus.on_deadline(id);
        for action in actions {
            world.act_one(action);
        }
    }
    assert_eq!(world.slow.len(), 2);
    assert!(world.slow[1].1.contains("GPADL 0x100"), "{:?}", world.slow);
    world.serve(DISK);
    assert_eq!(
        world.heard(),
        [HostToGuest::GpadlTorndown {
            gpadl: GpadlId(0x100)
        }]
    );
    assert!(world.misbehaved.is_empty());
}

#[test]
fn a_deadline_that_fires_after_it_was_cleared_does_nothing() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    let id = *world.deadlines.first().expect("the close has a deadline");
    world.serve(DISK);
    let actions = world.bus.on_deadline(id);
    assert_eq!(actions, []);
}

#[test]
fn messages_of_a_stale_generation_are_dropped() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.die(DISK);
    world.attach(DISK);
    world.close(disk);
    let closed = ServerToBus::ChannelClosed {
        channel: disk.0,
        open_epoch: 1,
    };
    let actions = world.bus.on_server_message(DISK, 1, closed);
    world.act(actions);
    assert_eq!(world.bus.waits.len(), 1);
    let actions = world.bus.server_gone(DISK, 1);
    world.act(actions);
    assert_eq!(world.bus.waits.len(), 1);
    let actions = world.bus.server_lost(DISK, 1, "late news");
    world.act(actions);
    assert!(world.misbehaved.is_empty());
    world.serve(DISK);
    assert!(world.bus.waits.is_empty());
}

#[test]
fn a_server_that_lies_is_condemned_and_not_heard_any_more() {
    let lies: [fn(ChannelId) -> ServerToBus; 8] = [
        |_| ServerToBus::Hello {
            protocol: PROTOCOL,
            generation: 1,
        },
        |disk| ServerToBus::ChannelClosed {
            channel: disk.0,
            open_epoch: 1,
        },
        |_| ServerToBus::ChannelClosed {
            channel: 2,
            open_epoch: 1,
        },
        |_| ServerToBus::ChannelClosed {
            channel: u32::MAX,
            open_epoch: u32::MAX,
        },
        |_| ServerToBus::GpadlReleased { gpadl: 0x100 },
        |_| ServerToBus::GpadlReleased { gpadl: 0 },
        |_| ServerToBus::Quiesced { token: 1 },
        |_| ServerToBus::OfferSubChannels { count: 4 },
    ];
    for lie in lies {
        let mut world = World::booted();
        let disk = up(&mut world);
        let lie = lie(disk);
        let actions = world.bus.on_server_message(DISK, 1, lie.clone());
        world.act(actions);
        assert_eq!(world.misbehaved.len(), 1, "{lie:?}");
        // What it may touch stays held until it is gone.
        world.close(disk);
        world.teardown(disk, 0x100);
        let released = ServerToBus::GpadlReleased { gpadl: 0x100 };
        let actions = world.bus.on_server_message(DISK, 1, released);
        world.act(actions);
        assert_eq!(world.heard(), [], "{lie:?}");
        assert!(world.bus.waits.is_empty());
        world.die(DISK);
        assert_eq!(
            world.heard(),
            [HostToGuest::GpadlTorndown {
                gpadl: GpadlId(0x100)
            }]
        );
        assert_eq!(world.misbehaved.len(), 1);
    }
}

#[test]
fn a_server_cannot_speak_for_the_device_of_another() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.teardown(disk, 0x100);
    for message in [
        ServerToBus::ChannelClosed {
            channel: disk.0,
            open_epoch: 1,
        },
        ServerToBus::GpadlReleased { gpadl: 0x100 },
    ] {
        let actions = world.bus.on_server_message(NIC, 1, message);
        world.act(actions);
    }
    assert_eq!(world.misbehaved.len(), 1);
    assert_eq!(world.misbehaved[0].0, NIC);
    assert_eq!(world.heard(), []);
}

#[test]
fn a_wrong_hello_is_condemned() {
    for hello in [
        ServerToBus::Hello {
            protocol: PROTOCOL + 1,
            generation: 1,
        },
        ServerToBus::Hello {
            protocol: PROTOCOL,
            generation: 2,
        },
        ServerToBus::OfferSubChannels { count: 1 },
    ] {
        let mut world = World::without_servers();
        world.connect(DISK);
        let actions = world.bus.on_server_message(DISK, 1, hello);
        world.act(actions);
        assert_eq!(world.misbehaved.len(), 1);
        world.die(DISK);
        world.attach(DISK);
        assert_eq!(world.inbox(DISK).len(), 3);
    }
}

#[test]
fn a_lost_socket_is_reported_once_and_the_successor_takes_over() {
    let mut world = World::booted();
    let disk = up(&mut world);
    for _ in 0..2 {
        let actions = world.bus.server_lost(DISK, 1, "closed");
        world.act(actions);
    }
    assert_eq!(world.misbehaved.len(), 1);
    world.die(DISK);
    world.attach(DISK);
    assert_eq!(opens(&world), [(disk.0, 1, false)]);
}

#[test]
fn acknowledgements_that_cross_a_quiesce_are_no_lies() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.teardown(disk, 0x100);
    world.guest(GuestToHost::Unload);
    world.serve(DISK);
    assert_eq!(world.heard(), [HostToGuest::UnloadResponse]);
    assert!(world.misbehaved.is_empty());
    assert!(world.bus.waits.is_empty());
}

#[test]
fn a_sub_channel_request_that_crosses_a_close_is_ignored() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.say(DISK, ServerToBus::OfferSubChannels { count: 2 });
    world.serve(DISK);
    assert_eq!(world.heard(), []);
    world.gpadl_and_open(disk, 0x101);
    assert!(
        !world
            .heard()
            .iter()
            .any(|message| matches!(message, HostToGuest::OfferChannel(_)))
    );
    assert!(world.misbehaved.is_empty());
}

#[test]
fn a_broken_channel_stays_open_until_the_guest_closes_it() {
    let mut world = World::booted();
    let disk = up(&mut world);
    let broken = |open_epoch| ServerToBus::ChannelBroken {
        channel: disk.0,
        open_epoch,
        why: "write index\n out of range".to_owned(),
    };
    world.say(DISK, broken(1));
    world.say(DISK, broken(77));
    assert_eq!(world.faults(), 1);
    world.close(disk);
    world.teardown(disk, 0x100);
    world.serve(DISK);
    assert_eq!(
        world.heard(),
        [HostToGuest::GpadlTorndown {
            gpadl: GpadlId(0x100)
        }]
    );
    assert!(world.misbehaved.is_empty());
}

#[test]
fn a_successor_waits_with_the_memory_and_serves_when_its_predecessor_is_gone() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.attach_waiting(DISK);
    assert!(matches!(
        world.waiting[&DISK].inbox.iter().collect::<Vec<_>>()[..],
        [BusToServer::Attach { .. }]
    ));
    // What happens meanwhile is told to the one that serves; the successor hears what came of it.
    world.guest(GuestToHost::ModifyChannel {
        channel: disk,
        target_vp: 2,
    });
    world.die(DISK);
    let inbox = world.inbox(DISK);
    assert!(
        matches!(
            inbox[..],
            [
                BusToServer::Attach { .. },
                BusToServer::Serve,
                BusToServer::Gpadl { .. },
                BusToServer::OpenChannel {
                    fresh: false,
                    target_vp: 2,
                    ..
                },
                BusToServer::HandedOver,
            ]
        ),
        "{inbox:?}"
    );
    world.close(disk);
    world.teardown(disk, 0x100);
    world.serve(DISK);
    assert!(world.bus.waits.is_empty());
    assert!(world.misbehaved.is_empty());
}

#[test]
fn a_successor_that_says_hello_after_its_predecessor_has_gone_is_told_all_at_once() {
    let mut world = World::booted();
    let disk = up(&mut world);
    let generation = world.connect_waiting(DISK);
    world.die(DISK);
    assert!(world.inbox(DISK).is_empty());
    let protocol = PROTOCOL;
    world.say(DISK, ServerToBus::Hello { protocol, generation });
    assert_eq!(opens(&world), [(disk.0, 1, false)]);
}

#[test]
fn a_successor_that_dies_or_lies_does_not_touch_the_one_that_serves() {
    let mut world = World::booted();
    let disk = up(&mut world);
    world.close(disk);
    world.teardown(disk, 0x100);
    let owed = world.bus.waits.len();
    world.attach_waiting(DISK);
    world.say_waiting(DISK, ServerToBus::GpadlReleased { gpadl: 0x100 });
    assert_eq!(world.misbehaved.len(), 1);
    assert_eq!((world.heard(), world.bus.waits.len()), (vec![], owed));
    world.die_waiting(DISK);
    for hello in [
        ServerToBus::Hello {
            protocol: PROTOCOL + 1,
            generation: 3,
        },
        ServerToBus::Hello {
            protocol: PROTOCOL,
            generation: 99,
        },
    ] {
        world.connect_waiting(DISK);
        world.say_waiting(DISK, hello);
        world.die_waiting(DISK);
    }
    assert_eq!(world.misbehaved.len(), 3);
    assert_eq!(world.bus.waits.len(), owed);
    world.serve(DISK);
    assert_eq!(
        world.heard(),
        [HostToGuest::GpadlTorndown {
            gpadl: GpadlId(0x100)
        }]
    );
}

#[test]
fn a_successor_does_not_hold_up_an_unload_and_serves_the_next_boot() {
    let mut world = World::booted();
    up(&mut world);
    world.attach_waiting(DISK);
    world.guest(GuestToHost::Unload);
    // The old one dies instead of letting go: nobody else has to.
    world.die(DISK);
    world.serve(NIC);
    assert_eq!(world.heard(), [HostToGuest::UnloadResponse]);
    world.boot();
    let disk = up(&mut world);
    assert_eq!(opens(&world).len(), 1);
    assert_eq!(opens(&world)[0].0, disk.0);
}

#[test]
fn a_third_server_is_refused() {
    let mut world = World::booted();
    world.attach_waiting(DISK);
    let actions = world.bus.server_attached(DISK, 3);
    world.act(actions);
    let hello = ServerToBus::Hello {
        protocol: PROTOCOL,
        generation: 3,
    };
    let actions = world.bus.on_server_message(DISK, 3, hello);
    world.act(actions);
    assert_eq!(world.inbox(DISK).len(), 3);
    assert_eq!(world.faults(), 2);
}
