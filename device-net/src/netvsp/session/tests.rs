//! What a session agrees to, in what order, and what it refuses.

use super::*;
use proptest::prelude::*;

fn sixteen_megabytes(gpadl: u32) -> Option<u32> {
    (gpadl == 0xE1E10).then_some(16 << 20)
}

fn around() -> Surroundings<'static> {
    Surroundings {
        max_sub_channels: 3,
        gpadl_bytes: &sixteen_megabytes,
    }
}

fn init(version: NvspVersion) -> GuestMessage {
    GuestMessage::Init {
        min: version,
        max: version,
    }
}

fn ready() -> Session {
    let mut session = Session::default();
    session
        .on_message(init(NvspVersion::V6), Origin::Fresh, &around())
        .expect("accepted");
    session
}

const RECEIVE: GuestMessage = GuestMessage::ReceiveBuffer {
    gpadl: 0xE1E10,
    id: RECEIVE_BUFFER_ID,
};

#[test]
fn versions_5_6_and_6_1_are_accepted_and_others_refused_with_version_zero() {
    for version in VERSIONS {
        let mut session = Session::default();
        let outcome = session
            .on_message(init(version), Origin::Fresh, &around())
            .expect("accepted");
        assert_eq!(
            outcome.answer,
            Answer::Message(init_complete(version, NvspStatus::SUCCESS))
        );
    }
    for (version, status) in [
        (NvspVersion(0x0007_0000), NvspStatus::PROTOCOL_TOO_NEW),
        (NvspVersion::V4, NvspStatus::PROTOCOL_TOO_OLD),
        (NvspVersion::V1, NvspStatus::PROTOCOL_TOO_OLD),
    ] {
        let refusal = Session::default()
            .on_message(init(version), Origin::Fresh, &around())
            .expect_err("refused");
        assert_eq!(refusal.answer, init_complete(NvspVersion(0), status));
    }
}

#[test]
fn a_guest_that_gives_a_range_gets_the_newest_version_in_it() {
    let mut session = Session::default();
    let message = GuestMessage::Init {
        min: NvspVersion::V1,
        max: NvspVersion::V6,
    };
    session
        .on_message(message, Origin::Fresh, &around())
        .expect("accepted");
    assert_eq!(
        session.agreement().map(|agreement| agreement.version),
        Some(NvspVersion::V6)
    );
}

#[test]
fn nothing_works_before_init() {
    let refusal = Session::default()
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect_err("refused");
    assert_eq!(refusal.fault, SessionFault::NotInitialized);
    assert!(matches!(
        refusal.answer,
        HostMessage::ReceiveBufferComplete {
            status: NvspStatus::FAIL,
            ..
        }
    ));
}

#[test]
fn a_second_init_from_the_guest_is_a_fault_but_a_replayed_one_gets_its_answer_again() {
    let mut session = ready();
    assert!(
        session
            .on_message(init(NvspVersion::V6), Origin::Fresh, &around())
            .is_err()
    );
    let again = session
        .on_message(init(NvspVersion::V6), Origin::Replayed, &around())
        .expect("replayed");
    assert_eq!(
        again.answer,
        Answer::Message(init_complete(NvspVersion::V6, NvspStatus::SUCCESS))
    );
}

#[test]
fn the_receive_buffer_is_cut_for_the_mtu_that_the_guest_announced() {
    let mut session = ready();
    let config = GuestMessage::NdisConfig {
        mtu_bytes: 9014,
        capabilities: 0,
    };
    assert_eq!(
        session.on_message(config, Origin::Fresh, &around()),
        Ok(Outcome::quiet())
    );
    let outcome = session
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect("accepted");
    let Some(Effect::ReceiveBufferGiven(buffer)) = outcome.effect else {
        panic!("{outcome:?}")
    };
    assert!(buffer.suballocation_bytes >= 9014 + 256 + 36);
    assert!(buffer.suballocation_bytes * buffer.suballocation_count <= 16 << 20);
}

#[test]
fn a_buffer_given_twice_is_refused_and_a_replay_is_answered_with_the_same_geometry() {
    let mut session = ready();
    let first = session
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect("accepted");
    assert_eq!(
        session.on_message(RECEIVE, Origin::Replayed, &around()),
        Ok(first)
    );
    let refusal = session
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect_err("refused");
    assert_eq!(refusal.fault, SessionFault::BufferGivenTwice);
}

#[test]
fn revoke_and_gpadl_teardown_both_take_the_buffer_away() {
    let mut session = ready();
    session
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect("accepted");
    let revoke = GuestMessage::RevokeReceiveBuffer {
        id: RECEIVE_BUFFER_ID,
    };
    assert_eq!(
        session.on_message(revoke, Origin::Fresh, &around()),
        Ok(Outcome::quiet().with(Effect::ReceiveBufferRevoked))
    );
    assert!(session.on_message(revoke, Origin::Fresh, &around()).is_err());
    session
        .on_message(RECEIVE, Origin::Fresh, &around())
        .expect("accepted");
    assert_eq!(session.on_gpadl_teardown(0xE1E11), []);
    assert_eq!(session.on_gpadl_teardown(0xE1E10), [Effect::ReceiveBufferRevoked]);
}

#[test]
fn sub_channels_are_granted_once_and_never_more_than_asked_or_allowed() {
    let mut session = ready();
    let ask = GuestMessage::Subchannel {
        operation: SUBCHANNEL_ALLOCATE,
        count: 9,
    };
    let outcome = session
        .on_message(ask, Origin::Fresh, &around())
        .expect("granted");
    assert_eq!(outcome.effect, Some(Effect::OfferSubChannels(3)));
    assert!(session.on_message(ask, Origin::Fresh, &around()).is_err());
    assert!(session.on_message(ask, Origin::Replayed, &around()).is_ok());
    let none = GuestMessage::Subchannel {
        operation: SUBCHANNEL_ALLOCATE,
        count: 0,
    };
    assert!(ready().on_message(none, Origin::Fresh, &around()).is_err());
    let free = GuestMessage::Subchannel {
        operation: 2,
        count: 1,
    };
    assert!(ready().on_message(free, Origin::Fresh, &around()).is_err());
}

#[test]
fn only_switch_data_path_is_answered_empty() {
    let mut session = ready();
    let outcome = session
        .on_message(
            GuestMessage::SwitchDataPath { active: 1 },
            Origin::Fresh,
            &around(),
        )
        .expect("answered");
    assert_eq!(outcome.answer, Answer::Empty);
}

proptest! {
    #[test]
    fn any_sequence_of_messages_keeps_the_buffers_inside_their_gpadls(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 4..40), 0..60),
        numbers in prop::collection::vec(prop::sample::select(vec![1u32, 100, 101, 103, 104, 106, 125, 129, 133]), 60),
    ) {
        let lengths = |gpadl: u32| Some(gpadl);
        let around = Surroundings { max_sub_channels: 2, gpadl_bytes: &lengths };
        let mut session = Session::default();
        for (mut bytes, number) in messages.into_iter().zip(numbers) {
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            let Ok(message) = GuestMessage::parse(&bytes) else { continue };
            let first = session.on_message(message, Origin::Fresh, &around);
            if let Ok(first) = first {
                let replayed = session.on_message(message, Origin::Replayed, &around);
                if first.effect != Some(Effect::ReceiveBufferRevoked) && first.effect != Some(Effect::SendBufferRevoked) {
                    prop_assert_eq!(Ok(first), replayed);
                }
            }
            if let Some(agreement) = session.agreement() {
                if let Some(buffer) = agreement.receive_buffer {
                    prop_assert!(u64::from(buffer.suballocation_bytes) * u64::from(buffer.suballocation_count) <= u64::from(buffer.gpadl));
                }
                prop_assert!(agreement.sub_channels <= 2);
                prop_assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&agreement.frame_bytes));
            }
        }
    }
}
