//! Requests, answers and signals of an open channel.

use super::*;

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
    let mut open = open_with(32);
    for _ in 0..2 {
        for _ in 0..100 {
            open.channel.send_in_band(0, false, &[&[0; 64]]).expect("room");
        }
        open.channel.flush().expect("flush");
        assert!(open.is_kicked());
        open.endpoint.drain_kick().expect("a kick");
        while open.receives() {
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
    while open.receives() {
        open.endpoint.consume();
    }
    open.endpoint.commit_taken().expect("the guest behaves");
    assert_eq!(open.endpoint.counters().interrupts, 1);
    assert_eq!(open.channel.wait_room(504, deadline()), Ok(true));
}

#[test]
fn at_queue_depth_32_there_is_less_than_one_interrupt_for_two_completions() {
    let mut open = open_with(32);
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
    assert!(open.receives());
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
    let mut open = open_with(64);
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
    let mut open = open_with(64);
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
    assert!(open.receives());
    open.endpoint.release(held.remove(0)).expect("the guest behaves");
    assert_eq!(
        open.endpoint.held(),
        MAX_HELD,
        "not before the answer is committed as read"
    );
    open.endpoint.commit_taken().expect("the guest behaves");
    assert_eq!(open.endpoint.held(), MAX_HELD - 1);
}

/// It had taken the kick, and died before it read the ring and before it interrupted for what it had published.
#[test]
fn a_successor_finds_what_its_predecessor_was_kicked_for_and_signals_what_that_may_not_have_signalled() {
    let (mut guest, mut port, journal) = setup();
    let mut channel = guest.open_channel(SMALL).expect("a channel");
    let (mut endpoint, _) = opened(&mut port).remove(0);
    let id = channel.new_transaction_id();
    channel.send_in_band(id, true, &[&[0; 64]]).expect("room");
    channel.flush().expect("flush");
    endpoint.drain_kick().expect("a kick");
    drop((endpoint, port));
    guest.server_gone();

    let mut port = connect(&mut guest, &journal);
    let (endpoint, recovered) = opened(&mut port).remove(0);
    assert!(!recovered.fresh);
    let mut open = Open {
        guest,
        port,
        channel,
        endpoint: *endpoint,
        buf: PacketBuf::new(),
    };
    assert!(open.channel.wait_interrupt(deadline()).expect("poll"));
    assert_eq!(open.channel.counters().interrupts_without_flag, 0);
    assert!(!open.is_kicked());
    assert_eq!(
        open.endpoint.prepare_sleep(),
        Ok(true),
        "there is something to read"
    );
    let token = open.take().expect("the packet");
    assert_eq!(token.transaction_id(), id);
    token.abandon();
}
