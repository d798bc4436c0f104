//! What a socket does with peers that do not behave.
#![forbid(unsafe_code)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::socket::{MAX_DESCRIPTORS, MAX_QUEUED_MESSAGES};
use super::*;

fn sockets() -> (Socket, Socket) {
    let (one, other) = pair().expect("a socket pair");
    (Socket::new(one), Socket::new(other))
}

/// Sends bytes with copies of a descriptor, past all checks of our own.
fn send_raw(socket: &OwnedFd, bytes: &[u8], fd: BorrowedFd<'_>, count: usize) {
    let fds = vec![fd.as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights: &[ControlMessage<'_>] = if count == 0 { &[] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights,
        MsgFlags::empty(),
        None,
    )
    .expect("sent");
}

#[test]
fn what_a_peer_said_before_it_died_is_heard_although_it_did_not_listen() {
    let (mut ours, mut theirs) = sockets();
    ours.send(&SupervisorToServer::Inspect, &[]).expect("sent");
    theirs
        .send(&ServerToSupervisor::Pong { token: 7 }, &[])
        .expect("sent");
    // With a message of ours unread.
    drop(theirs);
    let (said, _) = ours
        .recv::<ServerToSupervisor>()
        .expect("no fault")
        .expect("there");
    assert_eq!(said, ServerToSupervisor::Pong { token: 7 });
    assert_eq!(ours.recv::<ServerToSupervisor>().err(), Some(PeerFault::Eof));
}

/// A pipe: the reading end sees when the last copy of the writing end is closed.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe().expect("a pipe")
}

/// Whether all writing ends are closed.
fn is_hung_up(reader: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1
}

#[test]
fn a_message_arrives_with_its_descriptors_which_are_close_on_exec() {
    let (mut ours, mut theirs) = sockets();
    let (reader, writer) = pipe();
    let open = BusToServer::OpenChannel {
        channel: 1,
        sub_index: 0,
        open_epoch: 1,
        ring_gpadl: 1,
        downstream_page_offset: 1,
        target_vp: 0,
        fresh: true,
    };
    ours.send(&open, &[reader.as_fd(), writer.as_fd()]).expect("sent");
    let (message, fds) = theirs.recv::<BusToServer>().expect("received").expect("there");
    assert_eq!((message, fds.len()), (open, 2));
    for fd in &fds {
        let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).expect("flags"));
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
    assert_eq!(nix::unistd::write(&fds[1], b"x"), Ok(1));
    assert_eq!(nix::unistd::read(&reader, &mut [0; 4]), Ok(1));
}

#[test]
fn nothing_to_receive_is_not_waited_for_and_the_end_is_an_error() {
    let (mut ours, theirs) = sockets();
    assert_eq!(
        ours.recv::<BusToServer>().map(|message| message.is_none()),
        Ok(true)
    );
    drop(theirs);
    assert_eq!(ours.recv::<BusToServer>().map(|_| ()), Err(PeerFault::Eof));
    assert_eq!(
        ours.send(&ServerToBus::Quiesced { token: 1 }, &[]),
        Err(SendError::Disconnected)
    );
}

#[test]
fn the_number_of_descriptors_must_match_the_message_and_wrong_ones_are_closed() {
    for count in [1, 3] {
        let (raw, theirs) = pair().expect("a socket pair");
        let mut theirs = Socket::new(theirs);
        let (reader, writer) = pipe();
        let bytes = codec::encode(&BusToServer::Quiesce { token: 1 }).expect("encodes");
        send_raw(&raw, &bytes, writer.as_fd(), count);
        drop(writer);
        assert!(!is_hung_up(&reader), "the descriptor is on its way");
        let fault = theirs.recv::<BusToServer>().map(|_| ());
        assert_eq!(
            fault,
            Err(PeerFault::DescriptorCount {
                message: "Quiesce",
                expected: 0,
                received: count
            })
        );
        assert!(is_hung_up(&reader), "the descriptor is closed");
    }
}

#[test]
fn descriptors_beyond_the_limit_are_a_fault_and_are_closed() {
    let (raw, theirs) = pair().expect("a socket pair");
    let mut theirs = Socket::new(theirs);
    let (reader, writer) = pipe();
    let bytes = codec::encode(&BusToServer::Quiesce { token: 1 }).expect("encodes");
    send_raw(&raw, &bytes, writer.as_fd(), MAX_DESCRIPTORS + 4);
    drop(writer);
    assert_eq!(
        theirs.recv::<BusToServer>().map(|_| ()),
        Err(PeerFault::DescriptorsTruncated)
    );
    assert!(is_hung_up(&reader));
}

#[test]
fn a_datagram_that_is_too_long_or_no_message_is_a_fault_and_its_descriptors_are_closed() {
    let too_long = vec![0; codec::MAX_MESSAGE_BYTES + 2];
    for bytes in [
        &too_long[..],
        &too_long[..codec::MAX_MESSAGE_BYTES + 1],
        b"\xff\xff\xff\xff",
        b"\x00",
    ] {
        let (raw, theirs) = pair().expect("a socket pair");
        let mut theirs = Socket::new(theirs);
        let (reader, writer) = pipe();
        send_raw(&raw, bytes, writer.as_fd(), 1);
        drop(writer);
        let fault = theirs.recv::<BusToServer>().map(|_| ()).expect_err("a fault");
        match bytes.len() {
            0..=4 => assert!(matches!(fault, PeerFault::Malformed(_)), "{fault:?}"),
            _ => assert_eq!(fault, PeerFault::MessageTooLong),
        }
        assert!(is_hung_up(&reader));
    }
}

#[test]
fn a_peer_that_does_not_read_never_blocks_us_and_is_given_up_in_the_end() {
    let (mut ours, theirs) = sockets();
    let message = ServerToSupervisor::Event {
        text: "x".repeat(1000),
    };
    let sent = (0..100_000).find_map(|count| ours.send(&message, &[]).err().map(|error| (count, error)));
    let (count, error) = sent.expect("the queue is bounded");
    assert_eq!(error, SendError::QueueFull);
    assert!(count >= MAX_QUEUED_MESSAGES, "{count}");
    drop(theirs);
}

#[test]
fn queued_messages_and_their_descriptors_arrive_in_order_once_the_peer_reads() {
    let (mut ours, mut theirs) = sockets();
    let (_reader, writer) = pipe();
    let text = "x".repeat(60_000);
    let start = |generation| SupervisorToServer::Start {
        protocol: 1,
        generation,
        name: text.clone(),
        config: String::new(),
        log: String::new(),
        fds: vec!["a".to_owned()],
    };
    for generation in 0..40 {
        ours.send(&start(generation), &[writer.as_fd()]).expect("queued");
    }
    assert!(ours.has_queued());
    for expected in 0..40 {
        ours.flush().expect("the peer is there");
        let (message, fds) = theirs
            .recv::<SupervisorToServer>()
            .expect("received")
            .expect("there");
        assert_eq!((message, fds.len()), (start(expected), 1));
    }
    assert!(!ours.has_queued());
}

#[test]
fn our_own_miscount_of_descriptors_is_refused_before_anything_is_sent() {
    let (mut ours, mut theirs) = sockets();
    let error = ours.send(
        &SupervisorToBus::ServerAttached {
            device: 1,
            generation: 1,
        },
        &[],
    );
    assert!(
        matches!(
            error,
            Err(SendError::DescriptorCount {
                expected: 1,
                given: 0,
                ..
            })
        ),
        "{error:?}"
    );
    assert_eq!(
        theirs.recv::<SupervisorToBus>().map(|message| message.is_none()),
        Ok(true)
    );
}
