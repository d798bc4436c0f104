//! What `bulkhead-bus` says and is told, and whose fault it is if that makes no sense.

use super::*;

#[test]
fn a_ring_fault_breaks_one_channel_and_no_other() {
    let (mut guest, mut port, journal) = setup();
    let bad = guest.open_channel(SMALL).expect("a channel");
    let mut good = guest
        .open_channel(ChannelOptions {
            sub_index: 1,
            ..SMALL
        })
        .expect("a channel");
    let mut endpoints = opened(&mut port);
    let (mut good_endpoint, _) = endpoints.remove(1);
    let (mut endpoint, _) = endpoints.remove(0);
    // A write index that is not a multiple of 8.
    guest
        .ram()
        .map()
        .store_u32(FIRST_RING_PAGE, 0x13, Ordering::SeqCst)
        .expect("RAM");
    let mut buf = PacketBuf::new();
    let fault = endpoint.receive(&mut buf).expect_err("an impossible index");
    assert!(matches!(fault, GuestFault::Ring(_)));
    assert_eq!(endpoint.publish(), Err(fault));
    assert_eq!(endpoint.prepare_sleep(), Err(fault));
    assert!(!endpoint.can_answer(8));
    assert!(endpoint.send(&OutPacket::in_band(1, false, &[b"x"])).is_err());
    port.channel_broken(*endpoint, fault.to_string())
        .expect("bus is there");
    assert!(
        guest
            .wait_broken(&bad, deadline())
            .expect("reported")
            .contains("0x13")
    );

    good.send_in_band(1, true, &[b"hi......"]).expect("room");
    good.flush().expect("flush");
    assert!(
        good_endpoint
            .receive(&mut buf)
            .expect("the guest behaves")
            .is_some()
    );
    // A successor does not begin it anew.
    let mut successor = connect(&mut guest, &journal);
    let taken_over = opened(&mut successor);
    assert_eq!(
        taken_over
            .iter()
            .map(|(endpoint, _)| endpoint.sub_index())
            .collect::<Vec<_>>(),
        [1]
    );
    assert!(
        guest
            .wait_broken(&bad, deadline())
            .expect("reported")
            .contains("given up")
    );
    let mut port = successor;
    // The guest closes the broken one: the port answers by itself.
    guest
        .send_raw(
            &BusToServer::CloseChannel {
                channel: 1,
                open_epoch: bad.open_epoch(),
            },
            &[],
        )
        .expect("sent");
    assert!(port.on_readable().expect("bus behaves").is_empty());
    let closed = ServerToBus::ChannelClosed {
        channel: 1,
        open_epoch: bad.open_epoch(),
    };
    assert_eq!(guest.next_message(), Ok(Some(closed)));
}

/// The control page of the first channel's ring to the host: the first page that the guest gives out.
const FIRST_RING_PAGE: u64 = 16 * PAGE_BYTES;

#[test]
fn a_ring_of_impossible_shape_is_the_guests_fault() {
    let (mut guest, mut port, _journal) = setup();
    let pages: Vec<Gpn> = (100..104).map(Gpn).collect();
    let odd = guest
        .add_gpadl(1, &pages, 8, 3 * PAGE_BYTES as u32)
        .expect("a GPADL");
    let whole = guest
        .add_gpadl(1, &pages, 0, 4 * PAGE_BYTES as u32)
        .expect("a GPADL");
    for (sub_index, (gpadl, downstream)) in [(odd, 1), (whole, 0), (whole, 1), (whole, 3), (whole, u32::MAX)]
        .into_iter()
        .enumerate()
    {
        let channel = 10 + sub_index as u32;
        let message = BusToServer::OpenChannel {
            channel,
            sub_index: sub_index as u16,
            open_epoch: 1,
            ring_gpadl: gpadl,
            downstream_page_offset: downstream,
            target_vp: 0,
            fresh: true,
        };
        guest.send_raw(&message, &eventfds()).expect("sent");
        assert!(
            opened(&mut port).is_empty(),
            "gpadl {gpadl:#x} cut at {downstream}"
        );
        match guest.next_message().expect("the server behaves") {
            Some(ServerToBus::ChannelBroken { channel: broken, .. }) => assert_eq!(broken, channel),
            other => panic!("{other:?}"),
        }
    }
}

fn eventfds() -> [OwnedFd; 2] {
    use nix::sys::eventfd::EventFd;
    [
        EventFd::new().expect("an eventfd").into(),
        EventFd::new().expect("an eventfd").into(),
    ]
}

#[test]
fn messages_with_impossible_values_are_the_peers_fault() {
    let open = |channel, sub_index, target_vp, ring_gpadl| BusToServer::OpenChannel {
        channel,
        sub_index,
        open_epoch: 1,
        ring_gpadl,
        downstream_page_offset: 2,
        target_vp,
        fresh: true,
    };
    let gpadl = |gpadl, pages, byte_count| BusToServer::Gpadl {
        channel: 1,
        gpadl,
        pages,
        byte_count,
        byte_offset: 0,
    };
    let good_gpadl = gpadl(1, vec![20, 21, 22, 23], 16384);
    let cases: Vec<(Vec<BusToServer>, &str)> = vec![
        (vec![open(0, 0, 0, 1)], "relid 0"),
        (vec![open(2048, 0, 0, 1)], "relid beyond the flags"),
        (vec![open(1, 64, 0, 1)], "sub-channel index"),
        (vec![open(1, 0, 2, 1)], "VP"),
        (vec![open(1, 0, 0, 2)], "unknown GPADL"),
        (vec![open(1, 0, 0, 1), open(1, 1, 0, 1)], "channel twice"),
        (vec![open(1, 0, 0, 1), open(2, 0, 0, 1)], "index twice"),
        (vec![gpadl(2, vec![1024], 4096)], "page beyond RAM"),
        (vec![gpadl(2, vec![u64::MAX], 4096)], "page number that overflows"),
        (vec![gpadl(2, vec![], 0)], "no pages"),
        (vec![gpadl(2, vec![20], 4097)], "more bytes than pages"),
        (
            vec![gpadl(2, vec![20; MAX_GPADL_PAGES + 1], 4096)],
            "too many pages",
        ),
        (vec![gpadl(1, vec![20], 4096)], "GPADL twice"),
        (
            vec![BusToServer::TeardownGpadl { gpadl: 7 }],
            "teardown of nothing",
        ),
        (
            vec![BusToServer::CloseChannel {
                channel: 7,
                open_epoch: 1,
            }],
            "close of nothing",
        ),
        (
            vec![BusToServer::Retarget {
                channel: 1,
                open_epoch: 1,
                target_vp: 9,
            }],
            "retarget to no VP",
        ),
        (
            (0..256).map(|n| gpadl(100 + n, vec![20], 4096)).collect(),
            "too many GPADLs",
        ),
    ];
    for (messages, what) in cases {
        let (mut guest, mut port, _journal) = setup();
        guest.send_raw(&good_gpadl, &[]).expect("sent");
        let mut outcome = port.on_readable().map(|_| ());
        for message in &messages {
            let fds = eventfds();
            let fds = if matches!(message, BusToServer::OpenChannel { .. }) {
                &fds[..]
            } else {
                &[]
            };
            guest.send_raw(message, fds).expect("sent");
            outcome = outcome.and_then(|()| {
                // Endpoints that were opened on the way are dropped: this server exits.
                port.on_readable().map(drop)
            });
        }
        assert!(outcome.is_err(), "{what}");
    }
}

#[test]
fn attach_checks_what_it_is_given() {
    let flags = |pages: u64| sealed_memfd("siefp", pages * PAGE_BYTES).expect("a memfd");
    let ram = || sealed_memfd("ram", 1 << 20).expect("a memfd");
    let unsealed = nix::sys::memfd::memfd_create("unsealed", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let unsealed = unsealed.expect("a memfd");
    nix::unistd::ftruncate(&unsealed, 1 << 20).expect("sized");
    let layout = RamLayout::for_size(1 << 20);
    let attach = |protocol, ram: &RamLayout, vp_count| BusToServer::Attach {
        protocol,
        ram: ram.clone(),
        vp_count,
    };
    let cases = [
        (
            attach(PROTOCOL + 1, &layout, 1),
            [ram(), flags(1)],
            "another protocol",
        ),
        (attach(PROTOCOL, &layout, 0), [ram(), flags(1)], "no VP"),
        (
            attach(PROTOCOL, &layout, MAX_VPS + 1),
            [ram(), flags(65)],
            "too many VPs",
        ),
        (
            attach(PROTOCOL, &layout, 2),
            [ram(), flags(1)],
            "a flags page too few",
        ),
        (
            attach(PROTOCOL, &RamLayout::for_size(2 << 20), 1),
            [ram(), flags(1)],
            "a layout beyond the file",
        ),
        (
            attach(PROTOCOL, &layout, 1),
            [unsealed, flags(1)],
            "RAM that can shrink",
        ),
    ];
    for (message, fds, what) in cases {
        let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
        let journal = PlayedSupervisor::new_journal().expect("a journal");
        let mut port = Port::new(theirs, journal, 1).expect("a port");
        let mut bus = crate::ipc::Socket::new(ours);
        let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
        bus.send(&message, &fds).expect("sent");
        assert!(port.on_readable().is_err(), "{what}");
        assert!(port.ram().is_none());
    }
    let (mut guest, mut port, _journal) = setup();
    port.on_readable().expect("attached");
    guest
        .send_raw(&attach(PROTOCOL, &layout, 1), &[ram(), flags(1)])
        .expect("sent");
    assert!(
        matches!(port.on_readable(), Err(PeerFault::OutOfTurn { .. })),
        "attach twice"
    );
}

#[test]
fn nothing_works_before_attach() {
    let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
    let mut port = Port::new(theirs, PlayedSupervisor::new_journal().expect("a journal"), 1).expect("a port");
    let mut bus = crate::ipc::Socket::new(ours);
    let gpadl = BusToServer::Gpadl {
        channel: 1,
        gpadl: 1,
        pages: vec![1],
        byte_count: 4096,
        byte_offset: 0,
    };
    bus.send(&gpadl, &[]).expect("sent");
    assert!(matches!(port.on_readable(), Err(PeerFault::OutOfTurn { .. })));
}

#[test]
fn a_retargeted_channel_sets_the_flag_of_its_new_vp() {
    let mut open = open(SMALL);
    open.guest.retarget(&open.channel, 1).expect("sent");
    let events = open.port.on_readable().expect("bus behaves");
    assert!(matches!(
        events[..],
        [PortEvent::Retargeted {
            channel: 1,
            sub_index: 0,
            target_vp: 1
        }]
    ));
    open.endpoint.retarget(1);
    assert!(open.channel.wait_interrupt(deadline()).expect("poll"));
    assert_eq!(open.channel.counters().interrupts_without_flag, 0);
    assert_eq!(flag_offset(1, 1), 4096 + 512);
}

#[test]
fn the_rings_gpadl_is_given_back_only_after_the_channel_is_closed() {
    let mut open = open(SMALL);
    let gpadl = open.channel.ring_gpadl();
    open.guest
        .send_raw(&BusToServer::TeardownGpadl { gpadl }, &[])
        .expect("sent");
    assert!(matches!(
        open.port.on_readable().expect("bus behaves")[..],
        [PortEvent::GpadlTeardown { .. }]
    ));
    open.port.gpadl_released(gpadl).expect("bus is there");
    assert!(open.port.gpadl(gpadl).is_none(), "no new use");
    assert_eq!(open.guest.next_message(), Ok(None));
    let (channel, open_epoch) = (1, open.channel.open_epoch());
    open.guest
        .send_raw(&BusToServer::CloseChannel { channel, open_epoch }, &[])
        .expect("sent");
    assert!(matches!(
        open.port.on_readable().expect("bus behaves")[..],
        [PortEvent::ChannelClosing { .. }]
    ));
    open.port.channel_closed(open.endpoint).expect("bus is there");
    assert_eq!(
        open.guest.next_message(),
        Ok(Some(ServerToBus::ChannelClosed { channel, open_epoch }))
    );
    assert_eq!(
        open.guest.next_message(),
        Ok(Some(ServerToBus::GpadlReleased { gpadl }))
    );
}

#[test]
fn a_quiesced_port_has_nothing_and_serves_again() {
    let mut open = open(SMALL);
    open.request();
    open.channel.flush().expect("flush");
    let token = open.take().expect("a packet");
    open.guest
        .send_raw(&BusToServer::Quiesce { token: 5 }, &[])
        .expect("sent");
    assert!(matches!(
        open.port.on_readable().expect("bus behaves")[..],
        [PortEvent::Quiesce { token: 5 }]
    ));
    token.abandon();
    open.port.quiesced(5, [open.endpoint]).expect("bus is there");
    assert_eq!(
        open.guest.next_message(),
        Ok(Some(ServerToBus::Quiesced { token: 5 }))
    );
    assert!(open.port.gpadl(open.channel.ring_gpadl()).is_none());
    open.guest
        .open_channel(ChannelOptions {
            ring_pages: 3,
            ..SMALL
        })
        .expect("a channel");
    assert!(opened(&mut open.port)[0].1.fresh);
}

#[test]
fn saved_state_belongs_to_one_opening_and_survives_the_server() {
    let (mut guest, port, journal) = setup();
    let state = |text: &str, number: u32| Plain((text.to_owned(), number));
    port.save_state(7, &state("first", 1)).expect("saved");
    port.save_state(7, &state("second", 2)).expect("saved");
    drop(port);
    guest.server_gone();
    let port = connect(&mut guest, &journal);
    assert_eq!(port.load_state(7), Ok(Some(state("second", 2))));
    assert_eq!(port.load_state::<Plain<(String, u32)>>(8), Ok(None));
    assert!(port.load_state::<Plain<u8>>(7).is_err(), "another type");
    assert!(port.save_state(7, &Plain(vec![0u8; 70_000])).is_err(), "too long");
    assert_eq!(port.load_state(7), Ok(Some(state("second", 2))));
}

#[test]
fn no_ring_is_opened_before_a_server_has_carried_out_that_it_serves() {
    let (mut guest, mut port, journal) = setup();
    let _channel = guest.open_channel(SMALL).expect("a channel");
    let written = || {
        let mut bytes = vec![0; crate::journal::required_len() as usize];
        let file = std::fs::File::from(journal.try_clone().expect("a journal"));
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("its bytes");
        bytes
    };
    let before = written();
    assert!(matches!(port.next_event(), Ok(Some(PortEvent::Attached))));
    assert!(matches!(port.next_event(), Ok(Some(PortEvent::Serve))));
    assert!(
        written() == before,
        "a predecessor may be at work in the journal still"
    );
    let rest = port.on_readable().expect("bus behaves");
    assert!(
        rest.iter()
            .any(|event| matches!(event, PortEvent::ChannelOpened(..)))
    );
    assert!(written() != before, "the channel is opened there");
}
