//! What is explored, and that mistakes are found.
#![forbid(unsafe_code)]

use super::*;

fn setup(script: &[Packet], deaths: u8) -> Setup {
    Setup {
        script: script.to_vec(),
        thanks: 1,
        deaths,
        slots: 3,
        mutation: None,
    }
}

fn holds(script: &[Packet], deaths: u8) {
    let states = explore(&setup(script, deaths)).unwrap_or_else(|why| panic!("{why}"));
    println!("{states} states");
}

#[test]
fn requests_survive_two_deaths_at_any_store() {
    holds(&[Packet::Echo(1), Packet::Echo(2), Packet::Echo(3)], 2);
}

#[test]
fn requests_and_held_packets_survive_two_deaths_at_any_store() {
    holds(&[Packet::Push(1), Packet::Note, Packet::Echo(2)], 2);
}

#[test]
fn rings_that_wrap_survive_a_death_at_any_store() {
    holds(
        &[Packet::Push(1), Packet::Note, Packet::Echo(2), Packet::Echo(3)],
        1,
    );
}

#[test]
fn every_mistake_is_found() {
    use Mutation::*;
    let scripts: [&[Packet]; 2] = [
        &[Packet::Echo(1), Packet::Push(2), Packet::Echo(3), Packet::Echo(4)],
        &[Packet::Push(1), Packet::Push(2), Packet::Echo(3)],
    ];
    let mut missed = Vec::new();
    for mutation in [
        PublishBeforeRecord,
        RecordNumberFirst,
        PublishBeforeTake,
        ReadIndexBeforeTake,
        OneTakeIndex,
        OneRecord,
        AnswerNotedLate,
        OldEndFirst,
        SlotFreedEarly,
        ReleaseNotedLate,
        IndexIgnored,
        StaleLeft,
        ReadIndexBelieved,
        WordsNotClaimed,
    ] {
        let found = scripts.iter().find_map(|script| {
            let setup = Setup {
                mutation: Some(mutation),
                ..setup(script, 2)
            };
            explore(&setup).err()
        });
        match found {
            Some(why) => println!("{mutation:?}: {why}\n"),
            None => missed.push(mutation),
        }
    }
    assert_eq!(missed, []);
}
