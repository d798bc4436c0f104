//! A port and endpoints in this thread, against a synthetic guest that behaves or does not.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::interrupt::flag_offset;
use super::*;
use crate::fault::GuestFault;
use crate::ipc::hello::PROTOCOL;
use crate::ipc::{BusToServer, PeerFault, ServerToBus};
use crate::journal::test_state::Plain;
use crate::journal::{MAX_HELD, MAX_PAYLOAD_BYTES, SLOT_COUNT};
use crate::mem::{Gpn, PAGE_BYTES, RamLayout, sealed_memfd};
use crate::ring::{PacketBuf, StageError};
use crate::vsc::{ChannelOptions, GuestChannel, GuestOptions, PlayedSupervisor, SyntheticGuest};
use crate::wire::{OutPacket, PacketKind};

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn connect(guest: &mut SyntheticGuest, journal: &OwnedFd) -> Port {
    let (ours, theirs) = crate::ipc::pair().expect("a socket pair");
    let port = Port::new(theirs, journal.try_clone().expect("a journal"), 1).expect("a port");
    guest.attach(ours, deadline()).expect("attach");
    port
}

fn setup() -> (SyntheticGuest, Port, OwnedFd) {
    let mut guest = SyntheticGuest::new(GuestOptions {
        ram_bytes: 4 << 20,
        vp_count: 2,
    })
    .expect("a guest");
    let journal = PlayedSupervisor::new_journal().expect("a journal");
    let port = connect(&mut guest, &journal);
    (guest, port, journal)
}

/// The endpoints that the port has opened by now.
fn opened(port: &mut Port) -> Vec<(Box<Endpoint>, Recovered)> {
    let events = port.on_readable().expect("bus behaves");
    let opened = events.into_iter().filter_map(|event| match event {
        PortEvent::ChannelOpened(endpoint, recovered) => Some((endpoint, recovered)),
        _ => None,
    });
    opened.collect()
}

struct Open {
    guest: SyntheticGuest,
    port: Port,
    channel: GuestChannel,
    endpoint: Endpoint,
    buf: PacketBuf,
}

fn open(options: ChannelOptions) -> Open {
    let (mut guest, mut port, _) = setup();
    let channel = guest.open_channel(options).expect("a channel");
    let (endpoint, recovered) = opened(&mut port).remove(0);
    assert!(recovered.fresh && recovered.requests.is_empty());
    Open {
        guest,
        port,
        channel,
        endpoint: *endpoint,
        buf: PacketBuf::new(),
    }
}

impl Open {
    fn request(&mut self) -> u64 {
        let id = self.channel.new_transaction_id();
        self.channel.send_in_band(id, true, &[&[0; 64]]).expect("room");
        id
    }

    fn take(&mut self) -> Option<Token> {
        let packet = self.endpoint.receive(&mut self.buf).expect("the guest behaves")?;
        let (id, payload) = (packet.transaction_id, packet.payload);
        Some(self.endpoint.take(0, id, &[payload]).expect("a slot"))
    }

    fn is_kicked(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(self.endpoint.kick(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1
    }
}

const SMALL: ChannelOptions = ChannelOptions {
    sub_index: 0,
    ring_pages: 2,
    target_vp: 0,
    scattered: false,
};

#[test]
fn a_request_is_answered_and_interrupts_once_with_its_flag() {
    for scattered in [false, true] {
        let mut open = open(ChannelOptions {
            ring_pages: 4,
            scattered,
            ..SMALL
        });
        let id = open.request();
        open.channel.flush().expect("flush");
        assert!(open.is_kicked());
        open.endpoint.drain_kick().expect("a kick");
        assert!(!open.is_kicked());
        let token = open.take().expect("a packet");
        assert_eq!(token.transaction_id(), id);
        open.endpoint
            .complete(token, b"answer..")
            .expect("the guest behaves");
        assert_eq!(open.endpoint.prepare_sleep(), Ok(false));
        assert_eq!(
            open.channel.receive_one(deadline()),
            Ok((PacketKind::COMPLETION, id, b"answer..".to_vec()))
        );
        assert_eq!(open.channel.wait(Instant::now()), Ok(false));
        let counters = open.channel.counters();
        assert_eq!((counters.interrupts, counters.interrupts_without_flag), (1, 0));
        assert_eq!(open.endpoint.counters().interrupts, 1);
    }
}

#[test]
fn a_guest_in_a_burst_is_asked_to_kick_again_when_it_pauses() {
    let mut open = open(ChannelOptions {
        ring_pages: 32,
        ..SMALL
    });
    for _ in 0..2 {
        for _ in 0..100 {
            open.channel.send_in_band(0, false, &[&[0; 64]]).expect("room");
        }
        open.channel.flush().expect("flush");
        assert!(open.is_kicked());
        open.endpoint.drain_kick().expect("a kick");
        while open
            .endpoint
            .receive(&mut open.buf)
            .expect("good packets")
            .is_some()
        {
            open.endpoint.consume();
        }
        assert_eq!(open.endpoint.prepare_sleep(), Ok(false));
        assert!(!open.is_kicked());
    }
}

#[test]
fn a_guest_that_waits_for_room_is_interrupted_when_there_is_enough() {
    let mut open = open(SMALL);
    while open.channel.send_in_band(0, false, &[&[0; 480]]).is_ok() {}
    open.channel.flush().expect("flush");
    assert_eq!(open.channel.wait_room(504, Instant::now()), Ok(false));
    while open
        .endpoint
        .receive(&mut open.buf)
        .expect("good packets")
        .is_some()
    {
        open.endpoint.consume();
    }
    open.endpoint.commit_taken().expect("the guest behaves");
    assert_eq!(open.endpoint.counters().interrupts, 1);
    assert_eq!(open.channel.wait_room(504, deadline()), Ok(true));
}

#[test]
fn at_queue_depth_32_there_is_less_than_one_interrupt_for_two_completions() {
    let mut open = open(ChannelOptions {
        ring_pages: 32,
        ..SMALL
    });
    let (mut in_flight, mut completed) = (Vec::new(), 0u64);
    for _ in 0..32 {
        open.request();
    }
    open.channel.flush().expect("flush");
    for round in 0..1000 {
        while let Some(token) = open.take() {
            in_flight.push(token);
        }
        // The backend finishes a few at a time, at least one.
        for _ in 0..(round % 5 + 1).min(in_flight.len()) {
            let token = in_flight.remove(0);
            open.endpoint
                .complete(token, &[0; 64])
                .expect("the guest behaves");
            completed += 1;
        }
        open.endpoint.prepare_sleep().expect("the guest behaves");
        // The guest's driver is only ever called by an interrupt.
        if open.channel.wait_interrupt(Instant::now()).expect("poll") {
            open.channel.mask();
            let mut finished = 0;
            while open
                .channel
                .receive(&mut open.buf)
                .expect("the server behaves")
                .is_some()
            {
                finished += 1;
            }
            open.channel.wait(Instant::now()).expect("poll");
            for _ in 0..finished {
                open.request();
            }
            open.channel.flush().expect("flush");
        }
    }
    let interrupts = open.endpoint.counters().interrupts;
    assert!(
        interrupts * 2 < completed,
        "{interrupts} interrupts for {completed} completions"
    );
    in_flight.into_iter().for_each(Token::abandon);
}

#[test]
fn an_open_channel_has_no_mask_and_no_wish_of_an_earlier_opening() {
    let (mut guest, mut port, _journal) = setup();
    let channel = guest.open_channel(SMALL).expect("a channel");
    let (mut endpoint, _) = opened(&mut port).remove(0);
    // Masked by receive; and a wish for space that cannot be fulfilled.
    assert_eq!(endpoint.receive(&mut PacketBuf::new()), Ok(None));
    assert!(!endpoint.can_answer(1 << 16));
    endpoint.prepare_sleep().expect("the guest behaves");
    let (relid, open_epoch) = (channel.channel_id(), channel.open_epoch());
    guest
        .send_raw(
            &BusToServer::CloseChannel {
                channel: relid,
                open_epoch,
            },
            &[],
        )
        .expect("sent");
    assert!(matches!(
        port.on_readable().expect("bus behaves")[..],
        [PortEvent::ChannelClosing { .. }]
    ));
    port.channel_closed(*endpoint).expect("bus is there");
    let closed = ServerToBus::ChannelClosed {
        channel: relid,
        open_epoch,
    };
    assert_eq!(guest.next_message(), Ok(Some(closed)));
    let mut channel = guest.reopen_channel(&channel).expect("a channel");
    let (endpoint, recovered) = opened(&mut port).remove(0);
    assert!(recovered.fresh);
    channel.send_in_band(1, true, &[b"hi......"]).expect("room");
    channel.flush().expect("flush");
    assert_eq!(channel.counters().kicks, 1, "the mask is gone");
    drop(endpoint);
}

#[test]
fn a_guest_that_does_not_read_stops_its_own_requests_and_kicks_when_it_reads() {
    let mut open = open(SMALL);
    // 4096 bytes of ring: an answer of 64 bytes takes 88 of it.
    let mut answered = 0;
    loop {
        open.request();
        open.channel.flush().expect("flush");
        if !open.endpoint.can_answer(64) {
            break;
        }
        let token = open.take().expect("a packet");
        open.endpoint
            .complete(token, &[0; 64])
            .expect("the guest behaves");
        open.endpoint.publish().expect("the guest behaves");
        answered += 1;
    }
    assert_eq!(answered, 4096 / 88 - 1 + usize::from(4096 % 88 != 0));
    open.endpoint.drain_kick().expect("a kick");
    assert_eq!(
        open.endpoint.prepare_sleep(),
        Ok(false),
        "a request waits, but cannot be taken"
    );
    assert_eq!(open.endpoint.prepare_sleep(), Ok(false));
    assert!(!open.is_kicked());
    while open
        .channel
        .receive(&mut open.buf)
        .expect("the server behaves")
        .is_some()
    {}
    open.channel.give_back().expect("the server behaves");
    assert!(open.is_kicked(), "the guest has made room and says so");
    assert!(open.endpoint.can_answer(64));
    let token = open.take().expect("the request that had to wait");
    open.endpoint.complete(token, &[]).expect("the guest behaves");
    assert_eq!(open.endpoint.prepare_sleep(), Ok(false));
}

#[test]
fn answers_without_room_are_kept_and_sent_in_order_later() {
    let mut open = open(SMALL);
    let ids: Vec<u64> = (0..40).map(|_| open.request()).collect();
    open.channel.flush().expect("flush");
    // A device that never asks whether it can answer, with answers that are longer than the requests.
    for _ in 0..40 {
        let token = open.take().expect("a packet");
        open.endpoint
            .complete(token, &[7; 256])
            .expect("the guest behaves");
    }
    let mut received = Vec::new();
    for _ in 0..10 {
        open.endpoint.prepare_sleep().expect("the guest behaves");
        while let Some(packet) = open.channel.receive(&mut open.buf).expect("the server behaves") {
            received.push(packet.transaction_id);
        }
        open.channel.give_back().expect("the server behaves");
    }
    assert_eq!(received, ids);
    assert_eq!(open.endpoint.outstanding(), 0);
    assert_eq!(open.endpoint.free_slots(), SLOT_COUNT);
}

#[test]
fn a_packet_put_back_does_not_keep_the_server_awake_until_something_was_answered() {
    let mut open = open(SMALL);
    open.request();
    let second = open.request();
    open.channel.flush().expect("flush");
    let first = open.take().expect("a packet");
    assert!(
        open.endpoint
            .receive(&mut open.buf)
            .expect("the guest behaves")
            .is_some()
    );
    open.endpoint.put_back();
    assert_eq!(open.endpoint.prepare_sleep(), Ok(false));
    open.endpoint.complete(first, &[]).expect("the guest behaves");
    assert_eq!(open.endpoint.prepare_sleep(), Ok(true), "now it may be taken");
    let token = open.take().expect("the same packet");
    assert_eq!(token.transaction_id(), second);
    open.endpoint.cancel(token);
}

#[test]
fn requests_beyond_the_slots_stay_in_the_ring_and_too_long_ones_are_refused() {
    let mut open = open(ChannelOptions {
        ring_pages: 64,
        ..SMALL
    });
    let mut tokens = Vec::new();
    let mut taken = 0;
    for _ in 0..=SLOT_COUNT {
        open.request();
        open.channel.flush().expect("flush");
        let packet = open
            .endpoint
            .receive(&mut open.buf)
            .expect("the guest behaves")
            .expect("a packet");
        let too_long = [0; MAX_PAYLOAD_BYTES + 1];
        let refused = open
            .endpoint
            .take(0, packet.transaction_id, &[&too_long])
            .expect_err("too long");
        assert_eq!(
            refused,
            NotTaken::TooLong {
                bytes: MAX_PAYLOAD_BYTES + 1
            }
        );
        match open.endpoint.take(0, packet.transaction_id, &[packet.payload]) {
            Ok(token) => {
                tokens.push(token);
                taken += 1;
            }
            Err(error) => {
                assert_eq!(error, NotTaken::NoFreeSlot);
                open.endpoint.put_back();
            }
        }
    }
    assert_eq!(taken, SLOT_COUNT);
    tokens.into_iter().for_each(|token| open.endpoint.cancel(token));
    assert_eq!(open.endpoint.prepare_sleep(), Ok(true));
    let last = open.take().expect("the packet put back");
    open.endpoint.cancel(last);
}

#[test]
fn held_packets_leave_half_of_the_slots_to_requests() {
    let mut open = open(ChannelOptions {
        ring_pages: 64,
        ..SMALL
    });
    let mut held = Vec::new();
    for id in 0..u64::from(MAX_HELD) {
        held.push(
            open.endpoint
                .send_held(&OutPacket::in_band(id, true, &[&[0; 8]]), 1, &[])
                .expect("room"),
        );
    }
    let one_more = open
        .endpoint
        .send_held(&OutPacket::in_band(9999, true, &[&[0; 8]]), 1, &[]);
    assert!(matches!(one_more, Err(StageError::Full)));
    assert_eq!(open.endpoint.free_slots(), SLOT_COUNT - MAX_HELD);
    open.endpoint.publish().expect("the guest behaves");
    open.channel.complete(0, &[]).expect("room");
    open.channel.flush().expect("flush");
    assert!(
        open.endpoint
            .receive(&mut open.buf)
            .expect("the guest behaves")
            .is_some()
    );
    open.endpoint.release(held.remove(0)).expect("the guest behaves");
    assert_eq!(
        open.endpoint.held(),
        MAX_HELD,
        "not before the answer is committed as read"
    );
    open.endpoint.commit_taken().expect("the guest behaves");
    assert_eq!(open.endpoint.held(), MAX_HELD - 1);
}

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
