//! Start-up, changes of the MTU, shutdown.

use crate::network::{FILTER, MAC, from_guest, room, running, to_guest};
use device_net::netvsp::wire::{GuestMessage, HostMessage, NvspStatus, NvspVersion};
use device_net::rndis::oid;
use device_net::vsc::{Driver, DriverOptions, Form};
use vmbus::vsc::ChannelOptions;

#[test]
fn linux_start_up_gets_what_it_needs() {
    for version in [NvspVersion::V6_1, NvspVersion::V6, NvspVersion::V5] {
        let (mut room, _network) = room();
        let driver = room
            .open(DriverOptions {
                version,
                ..DriverOptions::default()
            })
            .expect("the NIC opens");
        assert_eq!(driver.nic.mac, MAC);
        assert_eq!(driver.nic.mtu, 1500);
        assert!(driver.nic.link_up);
        assert_eq!(driver.nic.receive_queues, 4);
        assert_eq!(driver.section_bytes, 6144);
        assert!(room.report.contains("bulkhead-net"), "{}", room.report);
    }
}

#[test]
fn an_unknown_version_is_refused_and_the_next_is_taken() {
    let (mut room, _network) = room();
    let deadline = room.deadline();
    let mut primary = room
        .guest
        .open_channel(ChannelOptions {
            ring_pages: 128,
            ..Default::default()
        })
        .expect("open");
    for version in [NvspVersion(0x0007_0000), NvspVersion::V4, NvspVersion::V1] {
        let init = GuestMessage::Init {
            min: version,
            max: version,
        };
        let answer = primary.call(&[&init.emit()], deadline).expect("answered");
        assert_eq!(answer.len(), 40);
        let Some(HostMessage::InitComplete { status, version, .. }) = HostMessage::parse(&answer) else {
            panic!("{answer:?}")
        };
        assert!(status != NvspStatus::SUCCESS && version == NvspVersion(0));
    }
    Driver::open_on(&mut room.guest, primary, DriverOptions::default(), deadline).expect("the NIC opens");
}

#[test]
fn a_change_of_the_mtu_opens_the_nic_anew() {
    let (mut room, mut network, mut driver) = running(DriverOptions::default());
    for (round, mtu) in [9000, 1280, 1500].into_iter().enumerate() {
        let deadline = room.deadline();
        driver.send(0, &from_guest(1, 100), Form::Section).expect("sent");
        assert_eq!(network.take(), from_guest(1, 100));
        let closed = driver.shut_down(&mut room.guest, deadline).expect("shut down");
        let primary = room.guest.reopen_channel(&closed).expect("re-opened");
        let options = DriverOptions {
            mtu,
            ..DriverOptions::default()
        };
        driver = Driver::open_on(&mut room.guest, primary, options, deadline).expect("opens");
        driver.set_filter(FILTER, deadline).expect("a filter");
        assert_eq!(driver.nic.mtu, mtu, "round {round}");
        assert!(driver.suballocation_bytes as usize > mtu as usize + 14);
        let bytes = mtu as usize + 14;
        network.put(&to_guest(7, bytes));
        assert_eq!(
            driver.receive(0, 1, deadline).expect("received")[0].bytes,
            to_guest(7, bytes)
        );
        driver.send(0, &from_guest(8, bytes), Form::Pages).expect("sent");
        assert_eq!(network.take(), from_guest(8, bytes));
    }
}

#[test]
fn sub_channels_are_closed_and_opened_again() {
    let options = DriverOptions {
        queues: 3,
        ..DriverOptions::default()
    };
    let (mut room, mut network, driver) = running(options);
    let deadline = room.deadline();
    let closed = driver.shut_down(&mut room.guest, deadline).expect("shut down");
    let primary = room.guest.reopen_channel(&closed).expect("re-opened");
    let mut driver = Driver::open_on(&mut room.guest, primary, options, deadline).expect("opens");
    assert_eq!(driver.channels.len(), 3);
    driver.send(2, &from_guest(1, 100), Form::Section).expect("sent");
    assert_eq!(network.take(), from_guest(1, 100));
    driver.wait_sent(deadline).expect("completed");
}

#[test]
fn a_reset_of_the_guest_lets_go_of_everything() {
    let (mut room, mut network, _driver) = running(DriverOptions {
        queues: 2,
        ..DriverOptions::default()
    });
    let deadline = room.deadline();
    room.guest.quiesce(deadline).expect("quiesced");
    assert_eq!(room.inspect("receive-buffer/count").expect("a number"), "0");
    let mut driver = room.open(DriverOptions::default()).expect("opens again");
    driver.send(0, &from_guest(1, 100), Form::Section).expect("sent");
    assert_eq!(network.take(), from_guest(1, 100));
}

#[test]
fn a_network_that_goes_away_takes_the_link_down_and_not_the_server() {
    let (mut room, network, mut driver) = running(DriverOptions::default());
    let deadline = room.deadline();
    drop(network);
    while driver.indications.is_empty() {
        driver.poll(0, deadline).expect("an indication");
    }
    assert_eq!(driver.indications, [0x4001_000C]);
    driver.send(0, &from_guest(1, 100), Form::Section).expect("sent");
    driver.wait_sent(deadline).expect("completed");
    let state = driver
        .query(oid::GEN_MEDIA_CONNECT_STATUS, &[], deadline)
        .expect("answered");
    assert_eq!(state, [1, 0, 0, 0]);
    assert_eq!(room.inspect("link/up").expect("a value"), "false");
}

#[test]
fn a_polite_stop_ends_with_status_zero() {
    let (mut room, _network, _driver) = running(DriverOptions::default());
    assert!(room.stop().expect("it ends").is_success());
}
