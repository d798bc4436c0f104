use super::*;
use vmbus::journal::{Parts, SavedState};

/// The id that Linux 6.1 gives all initialisation packets.
const LINUX_INIT_ID: u64 = 0xFFFF_FFFF_FFFF_FFFD;

fn packet(operation: Operation, body: &[u8]) -> VstorPacket {
    VstorPacket::with_body(operation, body)
}

fn send(session: &mut Session, operation: Operation, body: &[u8]) -> Step {
    session.on_packet(0, LINUX_INIT_ID, &packet(operation, body))
}

/// NTSTATUS of the answer; everything else is a failed test.
fn status(step: &Step) -> u32 {
    match step {
        Step::Reply(reply) | Step::ReplyAndOffer { reply, .. } => {
            assert_eq!(reply.operation(), Operation::CompleteIo);
            reply.header.status.get()
        }
        Step::Execute | Step::Reset => panic!("not an answer: {step:?}"),
    }
}

fn ready(max_sub_channels: u16) -> Session {
    let mut session = Session::new(max_sub_channels);
    for (operation, body) in [
        (Operation::BeginInitialization, &[][..]),
        (Operation::QueryProtocolVersion, &[0x02, 0x06, 0, 0]),
        (Operation::QueryProperties, &[]),
        (Operation::EndInitialization, &[]),
    ] {
        assert_eq!(status(&send(&mut session, operation, body)), 0, "{operation:?}");
    }
    session
}

#[test]
fn linux_asks_for_sub_channels_after_the_end() {
    let mut session = ready(3);
    assert_eq!(
        session.on_packet(0, 1, &packet(Operation::ExecuteSrb, &[])),
        Step::Execute
    );
    let step = send(&mut session, Operation::CreateSubChannels, &[3, 0]);
    assert!(matches!(step, Step::ReplyAndOffer { count: 3, .. }), "{step:?}");
    assert_eq!(session.sub_channels(), Some(3));
    assert_eq!(
        session.on_packet(3, 1, &packet(Operation::ExecuteSrb, &[])),
        Step::Execute
    );
}

#[test]
fn windows_asks_for_sub_channels_before_the_end() {
    let mut session = Session::new(4);
    send(&mut session, Operation::BeginInitialization, &[]);
    send(&mut session, Operation::QueryProtocolVersion, &[0x02, 0x06]);
    send(&mut session, Operation::QueryProperties, &[]);
    assert!(matches!(
        send(&mut session, Operation::CreateSubChannels, &[2, 0]),
        Step::ReplyAndOffer { count: 2, .. }
    ));
    assert_eq!(status(&send(&mut session, Operation::EndInitialization, &[])), 0);
    assert_eq!(session.sub_channels(), Some(2));
    let again = send(&mut session, Operation::CreateSubChannels, &[2, 0]);
    assert_eq!(status(&again), PacketStatus::InvalidDeviceState as u32);
}

#[test]
fn a_version_that_we_do_not_speak_is_refused_and_another_may_be_asked_for() {
    let mut session = Session::new(0);
    send(&mut session, Operation::BeginInitialization, &[]);
    for unknown in [0x0603u16, 0x0700, 0x0402, 0x0200, 0] {
        let step = send(
            &mut session,
            Operation::QueryProtocolVersion,
            &unknown.to_le_bytes(),
        );
        assert_eq!(status(&step), 0xC000_0059);
    }
    let step = send(
        &mut session,
        Operation::QueryProtocolVersion,
        &0x0501u16.to_le_bytes(),
    );
    assert_eq!(status(&step), 0);
}

#[test]
fn properties_tell_sub_channels_and_transfer_size() {
    for (max, flags) in [(0u16, 0u32), (7, 1)] {
        let mut session = Session::new(max);
        send(&mut session, Operation::BeginInitialization, &[]);
        send(&mut session, Operation::QueryProtocolVersion, &[0x00, 0x06]);
        let Step::Reply(reply) = send(&mut session, Operation::QueryProperties, &[]) else {
            panic!("no answer")
        };
        let properties = reply.channel_properties();
        assert_eq!(properties.max_channel_count.get(), max);
        assert_eq!(properties.flags.get(), flags);
        assert_eq!(properties.max_transfer_bytes.get() % 4096, 0);
        assert!(properties.max_transfer_bytes.get() > 0);
    }
}

#[test]
fn more_sub_channels_than_allowed_are_refused_and_fewer_may_be_asked_for() {
    let mut session = ready(2);
    let step = send(&mut session, Operation::CreateSubChannels, &[3, 0]);
    assert_eq!(status(&step), PacketStatus::InvalidParameter as u32);
    assert_eq!(session.sub_channels(), None);
    assert!(matches!(
        send(&mut session, Operation::CreateSubChannels, &[1, 0]),
        Step::ReplyAndOffer { count: 1, .. }
    ));
}

#[test]
fn nothing_is_executed_before_the_end_of_initialisation() {
    let mut session = Session::new(1);
    for operation in [Operation::ExecuteSrb, Operation::ResetBus] {
        assert_eq!(
            status(&session.on_packet(0, 9, &packet(operation, &[]))),
            0xC000_0184
        );
        assert_eq!(
            status(&session.on_packet(1, 9, &packet(operation, &[]))),
            0xC000_0184
        );
    }
}

#[test]
fn a_sub_channel_cannot_talk_initialisation() {
    let mut session = ready(2);
    let before = session.describe();
    for number in [7u32, 8, 9, 10, 13] {
        let step = session.on_packet(1, 5, &packet(Operation::from(number), &[1, 0]));
        assert_eq!(status(&step), 0xC000_0184);
    }
    assert_eq!(session.describe(), before);
}

#[test]
fn opening_the_primary_again_starts_anew() {
    let mut session = ready(2);
    send(&mut session, Operation::CreateSubChannels, &[2, 0]);
    session.on_primary_opened();
    assert_eq!(session, Session::new(2));
}

#[test]
fn every_event_in_every_state_answers_as_the_table_says() {
    // One row a state, one column an event: `ok`, or the low digits of the refusal, or what is to be done.
    let steps: [(Operation, &[u8]); 4] = [
        (Operation::BeginInitialization, &[]),
        (Operation::QueryProtocolVersion, &[0x02, 0x06]),
        (Operation::QueryProperties, &[]),
        (Operation::EndInitialization, &[]),
    ];
    let mut table = String::new();
    for done in 0..=steps.len() {
        for number in 0..=14u32 {
            let mut session = Session::new(1);
            for (operation, body) in &steps[..done] {
                send(&mut session, *operation, body);
            }
            let operation = Operation::from(number);
            let body: &[u8] = if operation == Operation::QueryProtocolVersion {
                &[0x02, 0x06]
            } else {
                &[1, 0]
            };
            let cell = match send(&mut session, operation, body) {
                Step::Execute => "run".to_string(),
                Step::Reset => "reset".to_string(),
                step => match status(&step) {
                    0 => "ok".to_string(),
                    refused => format!("{:03x}", refused & 0xFFF),
                },
            };
            table.push_str(&format!("{number}:{cell} "));
        }
        table.push('\n');
    }
    let expected = "\
0:010 1:010 2:010 3:184 4:184 5:184 6:184 7:ok 8:184 9:184 10:184 11:010 12:010 13:184 14:010 
0:010 1:010 2:010 3:184 4:184 5:184 6:184 7:184 8:184 9:ok 10:184 11:010 12:010 13:184 14:010 
0:010 1:010 2:010 3:184 4:184 5:184 6:184 7:184 8:184 9:184 10:ok 11:010 12:010 13:184 14:010 
0:010 1:010 2:010 3:184 4:184 5:184 6:184 7:184 8:ok 9:184 10:184 11:010 12:010 13:ok 14:010 
0:010 1:010 2:010 3:run 4:reset 5:reset 6:reset 7:184 8:184 9:184 10:184 11:010 12:010 13:ok 14:010 
";
    assert_eq!(table, expected);
}

#[test]
fn a_replay_of_the_last_answered_step_repeats_the_answer_and_changes_nothing() {
    let steps: [(Operation, &[u8]); 5] = [
        (Operation::BeginInitialization, &[]),
        (Operation::QueryProtocolVersion, &[0x02, 0x06]),
        (Operation::QueryProperties, &[]),
        (Operation::EndInitialization, &[]),
        (Operation::CreateSubChannels, &[2, 0]),
    ];
    let mut session = Session::new(2);
    for (operation, body) in steps {
        let request = packet(operation, body);
        let first = session.on_packet(0, LINUX_INIT_ID, &request);
        // The successor has only what was saved.
        let saved = session.emit().unwrap();
        let mut successor = Session::read(&saved).unwrap();
        assert_eq!(successor.on_replay(0, LINUX_INIT_ID, &request), first);
        assert_eq!(successor, session);
    }
}

#[test]
fn a_replay_of_a_step_that_was_not_handled_is_handled() {
    let mut session = Session::new(0);
    send(&mut session, Operation::BeginInitialization, &[]);
    let step = session.on_replay(
        0,
        LINUX_INIT_ID,
        &packet(Operation::QueryProtocolVersion, &[0x02, 0x06]),
    );
    assert_eq!(status(&step), 0);
    assert!(session.describe().contains("version=0x0602"));
}

#[test]
fn a_saved_session_with_promises_that_cannot_be_kept_is_refused() {
    let parts = |sub_channels: u16, max_transfer_bytes: u32| {
        // Ready with version 0x0602; the encoding of the enum is that of the frozen files.
        let base = (4u32, 0x0602u16, Some(sub_channels), 2u16, None::<u8>);
        Parts::new(&base).unwrap().add(2, &max_transfer_bytes).unwrap()
    };
    assert!(Session::read(&parts(2, MAX_TRANSFER_BYTES)).is_ok());
    assert!(Session::read(&parts(3, MAX_TRANSFER_BYTES)).is_err());
    assert!(Session::read(&parts(2, MAX_TRANSFER_BYTES + 1)).is_err());
}
