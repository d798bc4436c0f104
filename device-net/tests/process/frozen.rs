//! A state that an older build left, and what today's is to that build. The file is described in
//! `tests/golden/README.md`.

use crate::network::{FILTER, from_guest, number_of, running, to_guest};
use device_net::vsc::{DriverOptions, Form};
use nix::sys::uio::pwrite;
use serde::Deserialize;
use vmbus::ipc::codec;
use vmbus::vsc::{state_for_version_1, thaw};

const STATE: &str = include_str!("../golden/state-1.txt");
/// Header page and both copies of the state.
const STATE_BYTES: usize = 135_168;

fn options() -> DriverOptions {
    DriverOptions {
        queues: 2,
        ..DriverOptions::default()
    }
}

#[test]
fn a_server_goes_on_from_the_state_of_an_older_build() {
    let (mut room, mut network, mut driver) = running(options());
    network.put(&to_guest(1, 100));
    driver.receive(0, 1, room.deadline()).expect("received");
    room.kill().expect("killed");
    pwrite(room.journal(), &vec![0; STATE_BYTES], 0).expect("written");
    thaw(STATE, room.journal()).expect("frozen memory");
    room.start_successor().expect("the newer server goes on");
    for number in 2..5 {
        driver
            .send(number as usize % 2, &from_guest(number, 200), Form::Section)
            .expect("sent");
        assert_eq!(network.take(), from_guest(number, 200));
        network.put(&to_guest(number, 300));
        let frames = driver.receive(0, 1, room.deadline()).expect("received");
        assert_eq!(number_of(&frames[0].bytes), number);
    }
    driver.set_filter(FILTER, room.deadline()).expect("control works");
    driver.wait_sent(room.deadline()).expect("all completed once");
}

/// The types of the build before versions, never to be changed.
#[allow(dead_code)]
mod older {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    pub enum Saved {
        V1(State),
    }
    #[derive(Debug, PartialEq, Deserialize)]
    pub struct State {
        pub session: Session,
        pub adapter: Adapter,
        pub open_sub_channels: Vec<u16>,
    }
    #[derive(Debug, PartialEq, Deserialize)]
    pub enum Session {
        Opened,
        Ready(Agreement),
    }
    #[derive(Debug, PartialEq, Deserialize)]
    pub struct Agreement {
        pub version: u32,
        pub ndis_version: Option<(u32, u32)>,
        pub frame_bytes: u32,
        pub capabilities: u64,
        /// GPADL, bytes of a sub-allocation, their number.
        pub receive_buffer: Option<(u32, u32, u32)>,
        /// GPADL, number of sections.
        pub send_buffer: Option<(u32, u32)>,
        pub sub_channels: u16,
    }
    #[derive(Debug, PartialEq, Deserialize)]
    pub struct Adapter {
        pub initialized: bool,
        pub filter: u32,
        pub offload: [u8; 7],
        pub steering: (bool, Vec<u16>, Vec<u8>),
        pub link_told: Option<bool>,
    }
}

fn older_state(journal: impl std::os::fd::AsFd) -> older::State {
    let bytes = state_for_version_1(journal, 1)
        .expect("the layout of that build")
        .expect("a state");
    let older::Saved::V1(state) = codec::decode(&bytes).expect("what the older build decodes");
    state
}

#[test]
fn the_older_build_understands_what_is_saved_now() {
    let (mut room, mut network, mut driver) = running(options());
    network.put(&to_guest(1, 100));
    driver.receive(0, 1, room.deadline()).expect("received");
    room.kill().expect("killed");
    let now = older_state(room.journal());
    assert_eq!(now.adapter.filter, FILTER);
    pwrite(room.journal(), &vec![0; STATE_BYTES], 0).expect("written");
    thaw(STATE, room.journal()).expect("frozen memory");
    assert_eq!(
        now,
        older_state(room.journal()),
        "the same conversation leaves the same"
    );
}
