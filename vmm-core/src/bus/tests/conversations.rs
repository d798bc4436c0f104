#![forbid(unsafe_code)]
//! Conversations as Linux leads them.

use super::*;
use crate::bus::guest::STATUS_UNSUCCESSFUL;
use vmbus::wire::{ConnectionId, VersionResponse};

fn version_response(supported: bool) -> HostToGuest {
    HostToGuest::VersionResponse(VersionResponse {
        supported,
        connection_state: 0,
        message_connection: ConnectionId(1),
    })
}

fn opened(channel: ChannelId) -> HostToGuest {
    HostToGuest::OpenChannelResult {
        channel,
        open_id: channel.0,
        status: 0,
    }
}

fn created(channel: ChannelId, gpadl: u32) -> HostToGuest {
    HostToGuest::GpadlCreated {
        channel,
        gpadl: GpadlId(gpadl),
        status: 0,
    }
}

fn torndown(gpadl: u32) -> HostToGuest {
    HostToGuest::GpadlTorndown {
        gpadl: GpadlId(gpadl),
    }
}

fn instances(messages: &[HostToGuest]) -> Vec<(Guid, u16, u32)> {
    let offer = |message: &HostToGuest| match message {
        HostToGuest::OfferChannel(offer) => Some((offer.instance, offer.sub_channel_index, offer.channel.0)),
        _ => None,
    };
    messages.iter().filter_map(offer).collect()
}

#[test]
fn a_boot_finds_the_devices_in_order() {
    let mut world = World::new();
    world.contact(Version::V5_3, 0);
    assert_eq!(world.heard(), [version_response(true)]);
    world.guest(GuestToHost::RequestOffers);
    let heard = world.heard();
    assert_eq!(instances(&heard), [(instance(DISK), 0, 1), (instance(NIC), 0, 2)]);
    assert_eq!(heard.last(), Some(&HostToGuest::AllOffersDelivered));
    assert_eq!(heard.len(), 3);
    assert_eq!(world.faults(), 0);
}

#[test]
fn a_kernel_that_begins_with_6_0_goes_down_to_5_3() {
    let mut world = World::new();
    world.contact(Version(0x60000), 0);
    assert_eq!(world.heard(), [version_response(false)]);
    world.guest(GuestToHost::RequestOffers);
    assert_eq!(world.heard(), []);
    world.contact(Version::V5_3, 0);
    assert_eq!(world.heard(), [version_response(true)]);
}

#[test]
fn nothing_that_the_guest_waits_for_at_boot_needs_a_server() {
    let mut world = World::without_servers();
    world.boot();
    world.heard();
    let disk = world.channel(DISK, 0);
    world.gpadl(disk, 0xE1E10, 64);
    world.open(disk, 0xE1E10, 1);
    assert_eq!(world.heard(), [created(disk, 0xE1E10), opened(disk)]);
    world.close(disk);
    world.teardown(disk, 0xE1E10);
    assert_eq!(world.heard(), [torndown(0xE1E10)]);
    assert_eq!(world.faults(), 0);
}

#[test]
fn an_open_channel_is_told_with_its_ring_first() {
    let mut world = World::booted();
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0xE1E10);
    let inbox = world.inbox(DISK);
    assert!(matches!(
        inbox[..3],
        [
            BusToServer::Attach { .. },
            BusToServer::Serve,
            BusToServer::HandedOver
        ]
    ));
    assert!(
        matches!(&inbox[3], BusToServer::Gpadl { gpadl: 0xE1E10, pages, byte_count: 32768, .. } if pages.len() == 8)
    );
    assert!(matches!(
        inbox[4],
        BusToServer::OpenChannel {
            ring_gpadl: 0xE1E10,
            downstream_page_offset: 4,
            fresh: true,
            sub_index: 0,
            ..
        }
    ));
    assert_eq!(inbox.len(), 5);
    assert!(world.inbox(NIC).len() == 3);
}

#[test]
fn a_large_gpadl_is_answered_once_after_its_last_body() {
    let mut world = World::booted();
    world.heard();
    let nic = world.channel(NIC, 0);
    world.gpadl(nic, 0xE1E11, 4096);
    assert_eq!(world.heard(), [created(nic, 0xE1E11)]);
}

#[test]
fn a_page_outside_ram_is_answered_with_an_error_once() {
    let mut world = World::booted();
    world.heard();
    let nic = world.channel(NIC, 0);
    world.gpadl(nic, 7, 8000);
    assert_eq!(world.heard(), [created(nic, 7)]);
    let mut ranges = Vec::new();
    ranges.extend(8192u32.to_le_bytes());
    ranges.extend(0u32.to_le_bytes());
    ranges.extend((RAM_BYTES / 4096).to_le_bytes());
    let header = GpadlHeader {
        channel: nic,
        gpadl: GpadlId(8),
        range_bytes: 24,
        range_count: 1,
        ranges: &ranges,
    };
    world.guest(GuestToHost::GpadlHeader(header));
    let refused = HostToGuest::GpadlCreated {
        channel: nic,
        gpadl: GpadlId(8),
        status: STATUS_UNSUCCESSFUL,
    };
    assert_eq!(world.heard(), [refused]);
    let body = GpadlBody {
        message_number: 0,
        gpadl: GpadlId(8),
        ranges: &[0; 8],
    };
    world.guest(GuestToHost::GpadlBody(body));
    assert_eq!(world.heard(), []);
}

/// The guest's storvsc with two sub-channels; returns primary and sub-channels.
fn storvsc_up(world: &mut World) -> [ChannelId; 3] {
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.say(DISK, ServerToBus::OfferSubChannels { count: 2 });
    let subs = [world.channel(DISK, 1), world.channel(DISK, 2)];
    world.gpadl_and_open(subs[0], 0x101);
    world.gpadl_and_open(subs[1], 0x102);
    [disk, subs[0], subs[1]]
}

/// vmbus_close of a device: sub-channels first, each CLOSE and TEARDOWN.
fn storvsc_down(world: &mut World, channels: [ChannelId; 3]) {
    for (index, channel) in [(1, channels[1]), (2, channels[2]), (0, channels[0])] {
        world.close(channel);
        world.teardown(channel, 0x100 + index);
        world.serve(DISK);
    }
}

#[test]
fn rmmod_and_modprobe_of_storvsc_begin_anew_with_new_sub_channels() {
    let mut world = World::booted();
    let first = storvsc_up(&mut world);
    world.heard();
    storvsc_down(&mut world, first);
    let rescinds: Vec<HostToGuest> = [first[1], first[2]]
        .map(|channel| HostToGuest::RescindChannelOffer { channel })
        .into();
    // The rescinds come with the close of the primary, before its ring is torn down.
    assert_eq!(
        world.heard(),
        [
            torndown(0x101),
            torndown(0x102),
            rescinds[0],
            rescinds[1],
            torndown(0x100)
        ]
    );
    world.release(first[1]);
    world.release(first[2]);
    let second = storvsc_up(&mut world);
    assert_eq!(first[0], second[0]);
    assert!(first[1] != second[1] && first[2] != second[2]);
    assert_eq!(world.faults(), 0);
    assert_eq!(world.bus.waits.len(), 0);
}

#[test]
fn an_mtu_change_gets_its_sub_channels_when_the_old_ones_are_given_back() {
    let mut world = World::booted();
    let first = storvsc_up(&mut world);
    storvsc_down(&mut world, first);
    // The driver opens at once, while the guest's work queue still handles the rescinds.
    world.gpadl_and_open(first[0], 0x200);
    world.heard();
    world.say(DISK, ServerToBus::OfferSubChannels { count: 2 });
    assert_eq!(world.heard(), []);
    world.release(first[2]);
    assert_eq!(
        instances(&world.heard())
            .iter()
            .map(|offer| offer.1)
            .collect::<Vec<_>>(),
        [2]
    );
    world.release(first[1]);
    assert_eq!(
        instances(&world.heard())
            .iter()
            .map(|offer| offer.1)
            .collect::<Vec<_>>(),
        [1]
    );
    world.say(DISK, ServerToBus::OfferSubChannels { count: 2 });
    assert_eq!(world.heard(), []);
    assert_eq!(world.faults(), 0);
}

#[test]
fn closing_the_primary_closes_sub_channels_that_the_guest_left_open() {
    let mut world = World::booted();
    let channels = storvsc_up(&mut world);
    world.close(channels[0]);
    let closes: Vec<u32> = world
        .inbox(DISK)
        .iter()
        .filter_map(|message| match message {
            BusToServer::CloseChannel { channel, .. } => Some(*channel),
            _ => None,
        })
        .collect();
    assert_eq!(closes, [channels[1].0, channels[2].0, channels[0].0]);
    assert!(world.kicks.is_empty());
    // The guest may still close them, and tear down their rings.
    world.close(channels[1]);
    world.teardown(channels[1], 0x101);
    world.serve(DISK);
    assert!(world.heard().contains(&torndown(0x101)));
    assert_eq!(world.faults(), 0);
}

#[test]
fn torndown_waits_for_the_server_and_the_relid_for_the_release() {
    let mut world = World::booted();
    let channels = storvsc_up(&mut world);
    world.close(channels[0]);
    world.release(channels[1]);
    world.heard();
    world.close(channels[0]);
    world.teardown(channels[0], 0x100);
    assert_eq!(world.heard(), []);
    assert_eq!(world.bus.waits.len(), 5);
    world.serve(DISK);
    assert_eq!(world.heard(), [torndown(0x100)]);
    assert_eq!(world.bus.waits.len(), 0);
    assert!(world.bus.channels.get(channels[1]).is_none());
    assert!(world.bus.gpadls.get(0x101).is_none());
}

#[test]
fn a_reopen_while_the_server_closes_is_answered_at_once_and_told_later() {
    let mut world = World::booted();
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.close(disk);
    world.gpadl(disk, 0x101, 8);
    world.heard();
    world.open(disk, 0x101, 2);
    assert_eq!(world.heard(), [opened(disk)]);
    let opens = |world: &World| {
        let inbox = world.inbox(DISK);
        inbox
            .iter()
            .filter(|message| matches!(message, BusToServer::OpenChannel { .. }))
            .count()
    };
    assert_eq!(opens(&world), 1);
    while world.servers[&DISK].open.contains_key(&disk.0) {
        assert!(world.serve_one(DISK));
        if !world.bus.waits.is_empty() {
            continue;
        }
        break;
    }
    let told = world.inbox(DISK);
    assert!(matches!(
        told.last(),
        Some(BusToServer::OpenChannel {
            ring_gpadl: 0x101,
            target_vp: 2,
            fresh: true,
            ..
        })
    ));
    assert_eq!(world.faults(), 0);
}

#[test]
fn a_reopen_that_is_closed_before_it_was_told_never_reaches_the_server() {
    let mut world = World::booted();
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.close(disk);
    world.gpadl_and_open(disk, 0x101);
    world.close(disk);
    world.teardown(disk, 0x101);
    world.serve(DISK);
    assert!(world.heard().contains(&torndown(0x101)));
    assert!(world.inbox(DISK).is_empty());
    assert!(world.kicks.is_empty());
    assert_eq!(world.faults(), 0);
}

#[test]
fn teardown_of_an_open_ring_waits_for_the_close() {
    let mut world = World::booted();
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.heard();
    world.teardown(disk, 0x100);
    world.serve(DISK);
    assert_eq!(world.heard(), []);
    world.close(disk);
    world.serve(DISK);
    assert_eq!(world.heard(), [torndown(0x100)]);
}

#[test]
fn teardown_of_what_is_not_known_is_answered() {
    let mut world = World::booted();
    world.heard();
    world.teardown(ChannelId(1), 0xBAD);
    assert_eq!(world.heard(), [torndown(0xBAD)]);
}

#[test]
fn cpu_offline_moves_the_channel_and_is_answered_from_5_3_on() {
    for (version, answers) in [(Version::V5_3, 1), (Version::V5_2, 0), (Version::V4_1, 0)] {
        let mut world = World::new();
        world.contact(version, 0);
        world.guest(GuestToHost::RequestOffers);
        let disk = world.channel(DISK, 0);
        world.gpadl_and_open(disk, 0x100);
        world.heard();
        world.guest(GuestToHost::ModifyChannel {
            channel: disk,
            target_vp: 3,
        });
        let answer = HostToGuest::ModifyChannelResponse {
            channel: disk,
            status: 0,
        };
        assert_eq!(world.heard(), vec![answer; answers]);
        assert_eq!(world.interrupts.get(&disk.0), Some(&3));
        assert_eq!(world.raised, [(disk.0, 3)]);
        assert!(matches!(
            world.inbox(DISK).last(),
            Some(BusToServer::Retarget { target_vp: 3, .. })
        ));
        assert_eq!(world.faults(), 0);
    }
}

#[test]
fn a_modify_that_cannot_be_done_is_answered_with_an_error() {
    let mut world = World::booted();
    let disk = world.channel(DISK, 0);
    world.heard();
    let refused = HostToGuest::ModifyChannelResponse {
        channel: disk,
        status: STATUS_UNSUCCESSFUL,
    };
    world.guest(GuestToHost::ModifyChannel {
        channel: disk,
        target_vp: 1,
    });
    assert_eq!(world.heard(), [refused]);
    world.gpadl_and_open(disk, 0x100);
    world.heard();
    for target_vp in [u32::from(VPS), 0x10000, u32::MAX] {
        world.guest(GuestToHost::ModifyChannel {
            channel: disk,
            target_vp,
        });
        assert_eq!(world.heard(), [refused]);
    }
    assert_eq!(world.interrupts.get(&disk.0), Some(&0));
}

#[test]
fn a_modify_before_4_1_is_ignored() {
    let mut world = World::new();
    world.contact(Version::V4_0, 0);
    world.guest(GuestToHost::RequestOffers);
    let disk = world.channel(DISK, 0);
    world.gpadl_and_open(disk, 0x100);
    world.heard();
    world.guest(GuestToHost::ModifyChannel {
        channel: disk,
        target_vp: 3,
    });
    assert_eq!(world.heard(), []);
    assert_eq!(world.interrupts.get(&disk.0), Some(&0));
}

#[test]
fn kexec_unloads_and_finds_the_same_relids_again() {
    let mut world = World::booted();
    let channels = storvsc_up(&mut world);
    world.heard();
    world.guest(GuestToHost::Unload);
    assert_eq!(world.heard(), []);
    world.serve(DISK);
    assert_eq!(world.heard(), [HostToGuest::UnloadResponse]);
    world.boot();
    assert_eq!(world.channel(DISK, 0), channels[0]);
    storvsc_up(&mut world);
    assert_eq!(world.faults(), 0);
}

#[test]
fn unload_without_anything_open_is_answered_at_once() {
    let mut world = World::booted();
    world.heard();
    world.guest(GuestToHost::Unload);
    assert_eq!(world.heard(), [HostToGuest::UnloadResponse]);
    world.guest(GuestToHost::RequestOffers);
    assert_eq!(world.heard(), []);
}

#[test]
fn a_crash_kernel_makes_contact_without_unload_from_another_processor() {
    let mut world = World::booted();
    storvsc_up(&mut world);
    world.heard();
    world.contact(Version::V5_3, 2);
    assert_eq!(world.heard(), []);
    world.serve(DISK);
    assert_eq!(world.posted, [(2, version_response(true))]);
    assert!(world.kicks.is_empty() && world.interrupts.is_empty());
    world.guest(GuestToHost::RequestOffers);
    assert!(world.posted.iter().all(|(vp, _)| *vp == 2));
}

#[test]
fn contact_while_an_unload_is_under_way_is_what_is_answered() {
    let mut world = World::booted();
    storvsc_up(&mut world);
    world.heard();
    world.guest(GuestToHost::Unload);
    world.contact(Version::V5_3, 1);
    world.serve(DISK);
    assert_eq!(world.heard(), [version_response(true)]);
}

#[test]
fn a_refused_contact_ends_the_old_connection_too() {
    let mut world = World::booted();
    storvsc_up(&mut world);
    world.heard();
    world.contact(Version(0x60000), 0);
    world.serve(DISK);
    assert_eq!(world.heard(), [version_response(false)]);
    world.guest(GuestToHost::RequestOffers);
    assert_eq!(world.heard(), []);
}

#[test]
fn a_reset_waits_for_the_servers_and_the_next_boot_finds_them() {
    let mut world = World::booted();
    storvsc_up(&mut world);
    let actions = world.bus.reset(9);
    world.act(actions);
    assert!(world.quiesced.is_empty());
    world.offered.clear();
    world.rescinded.clear();
    world.serve(DISK);
    assert_eq!(world.quiesced, [9]);
    world.boot();
    storvsc_up(&mut world);
    assert_eq!(world.faults(), 0);
}

#[test]
fn a_device_that_is_added_later_is_offered_at_once() {
    let mut world = World::booted();
    world.heard();
    let late = DeviceId(5);
    let actions = world
        .bus
        .add_device(late, offer_of(late, 0))
        .expect("a good device");
    world.act(actions);
    assert_eq!(instances(&world.heard()), [(instance(late), 0, 6)]);
}

#[test]
fn devices_that_cannot_be_are_refused() {
    use crate::bus::AddDeviceError::*;
    let mut bus = Bus::new(1, RamLayout::for_size(RAM_BYTES));
    assert_eq!(bus.add_device(DISK, offer_of(DISK, 64)), Err(TooManySubChannels));
    assert_eq!(bus.add_device(DISK, offer_of(DISK, 63)), Ok(vec![]));
    assert_eq!(bus.add_device(DISK, offer_of(NIC, 0)), Err(IndexInUse(DISK)));
    assert_eq!(bus.add_device(NIC, offer_of(DISK, 0)), Err(InstanceInUse(DISK)));
    assert_eq!(
        bus.add_device(DeviceId(256), offer_of(NIC, 0)),
        Err(TooManyDevices)
    );
}

#[test]
fn messages_go_to_the_known_ports_only() {
    let mut world = World::new();
    let bytes = GuestToHost::RequestOffers.emit();
    for (port, status) in [
        (0, PostStatus::InvalidConnectionId),
        (1, PostStatus::Success),
        (2, PostStatus::InvalidConnectionId),
        (4, PostStatus::Success),
        (0x80_0074, PostStatus::InvalidConnectionId),
        (u32::MAX, PostStatus::InvalidConnectionId),
    ] {
        let (answer, actions) = world.bus.on_post_message(port, 1, bytes.as_bytes());
        assert_eq!(answer, status, "port {port:#x}");
        world.act(actions);
    }
}

#[test]
fn hv_sock_connects_are_refused_politely() {
    let mut world = World::booted();
    world.heard();
    let connect = vmbus::wire::TlConnect {
        endpoint: Guid([1; 16]),
        service: Guid([2; 16]),
        silo: None,
    };
    world.guest(GuestToHost::TlConnectRequest(connect));
    assert!(matches!(
        world.heard()[..],
        [HostToGuest::TlConnectResult {
            status: 0xC000_0236,
            ..
        }]
    ));
}

#[test]
fn everything_that_is_known_can_be_inspected() {
    let mut world = World::booted();
    storvsc_up(&mut world);
    let entries: BTreeMap<String, String> = world.bus.inspect().into_iter().collect();
    assert!(entries["connection"].contains("5.3"));
    assert!(entries["channel.1.state"].contains("open_epoch"));
    assert_eq!(entries["gpadls"], "3");
}
