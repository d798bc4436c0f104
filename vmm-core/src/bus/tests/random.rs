#![forbid(unsafe_code)]
//! Any sequence of messages by guest and servers: the shell's assertions hold after each step, tables stay bounded, and
//! once everybody has let go, everything that the guest waits for was answered.

use proptest::prelude::*;

use super::*;
use crate::bus::gpadls::{MAX_GPADL_PAGES, MAX_GPADLS};

#[derive(Clone, Debug)]
pub(super) enum Step {
    Contact {
        version: u32,
        target_vp: u32,
    },
    RequestOffers,
    Unload,
    Gpadl {
        channel: u32,
        gpadl: u32,
        pages: u32,
    },
    Header {
        channel: u32,
        gpadl: u32,
        range_bytes: u16,
        range_count: u16,
        ranges: Vec<u8>,
    },
    Body {
        gpadl: u32,
        ranges: Vec<u8>,
    },
    Open {
        channel: u32,
        gpadl: u32,
        target_vp: u32,
        downstream: u32,
    },
    Close {
        channel: u32,
    },
    Teardown {
        channel: u32,
        gpadl: u32,
    },
    Modify {
        channel: u32,
        target_vp: u32,
    },
    Release {
        channel: u32,
    },
    Bytes(Vec<u8>),
    Serve {
        device: u32,
    },
    Die {
        device: u32,
    },
    Attach {
        device: u32,
    },
    Connect {
        device: u32,
    },
    AttachWaiting {
        device: u32,
    },
    DieWaiting {
        device: u32,
    },
    SpeakWaiting {
        device: u32,
    },
    Lost {
        device: u32,
    },
    Lie {
        device: u32,
        message: ServerToBus,
    },
    Late {
        nth: usize,
    },
    Reset,
}

/// Numbers that are likely to name something, and some that are not.
fn channel() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 1..3u32, 4 => 257..264u32, 1 => Just(0), 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn gpadl() -> impl Strategy<Value = u32> {
    prop_oneof![10 => 1..6u32, 1 => Just(0), 1 => any::<u32>()]
}

fn vp() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..u32::from(VPS), 1 => any::<u32>()]
}

fn server_message() -> impl Strategy<Value = ServerToBus> {
    prop_oneof![
        1 => (any::<bool>(), 0..4u32).prop_map(|(right, generation)| ServerToBus::Hello {
            protocol: PROTOCOL + u32::from(!right),
            generation
        }),
        6 => (0..5u16).prop_map(|count| ServerToBus::OfferSubChannels { count }),
        1 => (channel(), 0..20u32).prop_map(|(channel, open_epoch)| ServerToBus::ChannelClosed { channel, open_epoch }),
        1 => gpadl().prop_map(|gpadl| ServerToBus::GpadlReleased { gpadl }),
        1 => (0..5u64).prop_map(|token| ServerToBus::Quiesced { token }),
        1 => (channel(), 0..20u32).prop_map(|(channel, open_epoch)| ServerToBus::ChannelBroken {
            channel,
            open_epoch,
            why: String::new()
        }),
    ]
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let version =
        prop_oneof![6 => Just(0x50003u32), 2 => Just(0x40000), 1 => Just(0x60000), 1 => any::<u32>()];
    prop_oneof![
        2 => (version, vp()).prop_map(|(version, target_vp)| Step::Contact { version, target_vp }),
        3 => Just(Step::RequestOffers),
        1 => Just(Step::Unload),
        8 => (channel(), gpadl(), 1..40u32).prop_map(|(channel, gpadl, pages)| Step::Gpadl { channel, gpadl, pages }),
        2 => (channel(), gpadl(), any::<u16>(), 0..3u16, prop::collection::vec(any::<u8>(), 0..220)).prop_map(
            |(channel, gpadl, range_bytes, range_count, ranges)| Step::Header {
                channel, gpadl, range_bytes, range_count, ranges
            }
        ),
        2 => (gpadl(), prop::collection::vec(0..3u8, 0..220)).prop_map(|(gpadl, ranges)| Step::Body { gpadl, ranges }),
        8 => (channel(), gpadl(), vp(), prop_oneof![5 => Just(4u32), 1 => any::<u32>()]).prop_map(
            |(channel, gpadl, target_vp, downstream)| Step::Open { channel, gpadl, target_vp, downstream }
        ),
        5 => channel().prop_map(|channel| Step::Close { channel }),
        5 => (channel(), gpadl()).prop_map(|(channel, gpadl)| Step::Teardown { channel, gpadl }),
        2 => (channel(), vp()).prop_map(|(channel, target_vp)| Step::Modify { channel, target_vp }),
        4 => channel().prop_map(|channel| Step::Release { channel }),
        1 => prop::collection::vec(any::<u8>(), 0..240).prop_map(Step::Bytes),
        12 => (0..2u32).prop_map(|device| Step::Serve { device }),
        2 => (0..2u32).prop_map(|device| Step::Die { device }),
        4 => (0..2u32).prop_map(|device| Step::Attach { device }),
        4 => (0..2u32).prop_map(|device| Step::AttachWaiting { device }),
        1 => (0..2u32).prop_map(|device| Step::DieWaiting { device }),
        1 => (0..2u32).prop_map(|device| Step::SpeakWaiting { device }),
        1 => (0..2u32).prop_map(|device| Step::Connect { device }),
        1 => (0..2u32).prop_map(|device| Step::Lost { device }),
        3 => (0..2u32, server_message()).prop_map(|(device, message)| Step::Lie { device, message }),
        2 => (0..8usize).prop_map(|nth| Step::Late { nth }),
        1 => Just(Step::Reset),
    ]
}

pub(super) fn apply(world: &mut World, step: Step) {
    match step {
        Step::Contact { version, target_vp } => world.contact(Version(version), target_vp),
        Step::RequestOffers => world.guest(GuestToHost::RequestOffers),
        Step::Unload => world.guest(GuestToHost::Unload),
        Step::Gpadl {
            channel,
            gpadl,
            pages,
        } => world.gpadl(ChannelId(channel), gpadl, pages),
        Step::Header {
            channel,
            gpadl,
            range_bytes,
            range_count,
            ranges,
        } => {
            world.guest(GuestToHost::GpadlHeader(GpadlHeader {
                channel: ChannelId(channel),
                gpadl: GpadlId(gpadl),
                range_bytes,
                range_count,
                ranges: &ranges,
            }));
        }
        Step::Body { gpadl, ranges } => world.guest(GuestToHost::GpadlBody(GpadlBody {
            message_number: 0,
            gpadl: GpadlId(gpadl),
            ranges: &ranges,
        })),
        Step::Open {
            channel,
            gpadl,
            target_vp,
            downstream,
        } => {
            world.guest(GuestToHost::OpenChannel(OpenChannel {
                channel: ChannelId(channel),
                open_id: channel,
                ring_gpadl: GpadlId(gpadl),
                target_vp,
                downstream_page_offset: downstream,
                user_data: [0; 120],
            }));
        }
        Step::Close { channel } => world.close(ChannelId(channel)),
        Step::Teardown { channel, gpadl } => world.teardown(ChannelId(channel), gpadl),
        Step::Modify { channel, target_vp } => world.guest(GuestToHost::ModifyChannel {
            channel: ChannelId(channel),
            target_vp,
        }),
        Step::Release { channel } => world.release(ChannelId(channel)),
        Step::Bytes(bytes) => {
            if let Ok(message) = GuestToHost::parse(&bytes) {
                world.note_owed(&message);
            }
            world.post_bytes(&bytes);
        }
        Step::Serve { device } => {
            world.serve_one(DeviceId(device));
        }
        Step::Die { device } => world.die(DeviceId(device)),
        Step::Attach { device } if !world.servers.contains_key(&DeviceId(device)) => {
            world.attach(DeviceId(device))
        }
        Step::Connect { device } if !world.servers.contains_key(&DeviceId(device)) => {
            world.connect(DeviceId(device));
        }
        Step::Attach { .. } | Step::Connect { .. } => {}
        Step::AttachWaiting { device } => {
            let device = DeviceId(device);
            if world.servers.contains_key(&device) && !world.waiting.contains_key(&device) {
                world.attach_waiting(device);
            }
        }
        Step::DieWaiting { device } => world.die_waiting(DeviceId(device)),
        Step::SpeakWaiting { device } => {
            world.say_waiting(DeviceId(device), ServerToBus::OfferSubChannels { count: 1 });
        }
        Step::Lost { device } => {
            if let Some(server) = world.servers.get(&DeviceId(device)) {
                let generation = server.generation;
                let actions = world.bus.server_lost(DeviceId(device), generation, "test");
                world.act(actions);
            }
        }
        Step::Lie { device, message } => lie(world, DeviceId(device), message),
        Step::Late { nth } => {
            if let Some(&id) = world.deadlines.iter().nth(nth) {
                world.deadlines.remove(&id);
                let actions = world.bus.on_deadline(id);
                world.act(actions);
            }
        }
        Step::Reset => {
            let actions = world.bus.reset(1);
            world.act(actions);
            world.offered.clear();
            world.rescinded.clear();
            world.owed.clear();
        }
    }
}

/// A lie releases nothing that is really held: the model lets go only if the bus could have asked for it.
fn lie(world: &mut World, device: DeviceId, message: ServerToBus) {
    let Some(server) = world.servers.get_mut(&device) else {
        return;
    };
    // An acknowledgement before it was asked for is a lie; one after it (and not yet given) is the truth, early.
    let asked = server.inbox.iter().position(|asked| match (asked, &message) {
        (
            BusToServer::CloseChannel { channel, open_epoch },
            ServerToBus::ChannelClosed {
                channel: c,
                open_epoch: e,
            },
        ) => (channel, open_epoch) == (c, e),
        (BusToServer::TeardownGpadl { gpadl }, ServerToBus::GpadlReleased { gpadl: g }) => gpadl == g,
        (BusToServer::Quiesce { token }, ServerToBus::Quiesced { token: t }) => token == t,
        _ => false,
    });
    if let Some(position) = asked {
        server.inbox.remove(position);
        return world.say(device, message);
    }
    if let ServerToBus::Hello {
        protocol: PROTOCOL,
        generation,
    } = message
        && generation == server.generation
        && !server.attached
    {
        return world.say(device, message);
    }
    let generation = server.generation;
    let actions = world.bus.on_server_message(device, generation, message);
    world.act(actions);
}

fn check_bounds(world: &World) {
    assert!(world.bus.channels.count() <= 2047);
    assert!(world.bus.gpadls.count() <= MAX_GPADLS);
    assert!(world.bus.gpadls.page_count() <= MAX_GPADL_PAGES);
    assert!(world.bus.waits.len() <= world.bus.channels.count() + world.bus.gpadls.count() + 2);
    let bound = world
        .bus
        .channels
        .iter()
        .filter(|(_, channel)| channel.opening().is_some())
        .count();
    assert_eq!(world.kicks.len(), bound);
    assert_eq!(world.interrupts.len(), bound);
}

/// When all servers are gone, nobody holds anything: the guest has its answers, and only what it owes is left.
fn check_end(world: &mut World) {
    world.die_waiting(DISK);
    world.die(DISK);
    world.die_waiting(NIC);
    world.die(NIC);
    check_bounds(world);
    assert!(world.bus.waits.is_empty());
    for (_, gpadl) in world.bus.gpadls.iter() {
        assert!(
            !matches!(gpadl.state, crate::bus::gpadls::GpadlState::Releasing { .. }),
            "leaked: {gpadl:?}"
        );
    }
    for (id, channel) in world.bus.channels.iter() {
        assert!(
            channel.standing != crate::bus::channels::Standing::Released,
            "leaked relid {id}"
        );
        assert!(world.offered.contains_key(&id.0), "relid {id} was never offered");
    }
    // A contact always gets its answer, and finds every device.
    world.posted.clear();
    world.contact(Version::V5_3, 0);
    assert_eq!(world.posted.len(), 1);
    world.guest(GuestToHost::RequestOffers);
    assert_eq!(world.posted.len(), 4);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_keeps_the_rules(booted in any::<bool>(), steps in prop::collection::vec(step(), 0..120)) {
        let mut world = if booted { World::booted() } else { World::new() };
        for step in steps {
            apply(&mut world, step);
            check_bounds(&world);
        }
        check_end(&mut world);
    }
}
