#![forbid(unsafe_code)]
//! Every state of a channel against every event, as text: a changed transition is a changed line.

use super::*;
use crate::bus::channels::ChannelState;
use std::fmt::Write;

/// Something that happens, to this sub-channel if to any.
type Step = fn(&mut World, ChannelId);

/// A sub-channel in some state, its ring is GPADL 0x101; GPADL 0x102 is another ring for it.
const STATES: [(&str, Step); 9] = [
    ("closed", |_, _| {}),
    ("open", |world, sub| world.open(sub, 0x101, 0)),
    ("open, unattended", |world, sub| {
        world.open(sub, 0x101, 0);
        world.die(DISK);
    }),
    ("open, server condemned", |world, sub| {
        world.open(sub, 0x101, 0);
        let actions = world.bus.server_lost(DISK, 1, "test");
        world.act(actions);
    }),
    ("open, ring doomed", |world, sub| {
        world.open(sub, 0x101, 0);
        world.teardown(sub, 0x101);
    }),
    ("closing", |world, sub| {
        world.open(sub, 0x101, 0);
        world.close(sub);
    }),
    ("closing, to be reopened", |world, sub| {
        world.open(sub, 0x101, 0);
        world.close(sub);
        world.open(sub, 0x102, 1);
    }),
    ("rescinded, closing", |world, sub| {
        world.open(sub, 0x101, 0);
        let primary = world.channel(DISK, 0);
        world.close(primary);
    }),
    ("released, closing", |world, sub| {
        world.open(sub, 0x101, 0);
        let primary = world.channel(DISK, 0);
        world.close(primary);
        world.release(sub);
    }),
];

const EVENTS: [(&str, Step); 11] = [
    ("OPEN ring 101", |world, sub| world.open(sub, 0x101, 0)),
    ("OPEN ring 102", |world, sub| world.open(sub, 0x102, 2)),
    ("CLOSE", |world, sub| world.close(sub)),
    ("CLOSE of the primary", |world, _| world.close(ChannelId(1))),
    ("TEARDOWN 101", |world, sub| world.teardown(sub, 0x101)),
    ("MODIFY", |world, sub| {
        world.guest(GuestToHost::ModifyChannel {
            channel: sub,
            target_vp: 3,
        });
    }),
    ("RELID_RELEASED", |world, sub| world.release(sub)),
    ("UNLOAD", |world, _| world.guest(GuestToHost::Unload)),
    ("server answers", |world, _| world.serve(DISK)),
    ("server gone", |world, _| world.die(DISK)),
    ("server attaches", |world, _| {
        if !world.servers.contains_key(&DISK) {
            world.attach(DISK);
        }
    }),
];

fn describe(world: &World, sub: ChannelId) -> String {
    let Some(channel) = world.bus.channels.get(sub) else {
        return "gone".to_owned();
    };
    let state = match channel.state {
        ChannelState::Closed => "closed",
        ChannelState::Open(_) => "open",
        ChannelState::Closing { reopen: None, .. } => "closing",
        ChannelState::Closing { reopen: Some(_), .. } => "closing+reopen",
    };
    format!("{:?}, {state}", channel.standing).to_lowercase()
}

fn short(message: &HostToGuest) -> String {
    match message {
        HostToGuest::OpenChannelResult { status: 0, .. } => "opened".to_owned(),
        HostToGuest::OpenChannelResult { .. } => "open refused".to_owned(),
        HostToGuest::RescindChannelOffer { .. } => "rescind".to_owned(),
        HostToGuest::GpadlTorndown { gpadl } => format!("torndown {:x}", gpadl.0),
        HostToGuest::ModifyChannelResponse { status: 0, .. } => "modified".to_owned(),
        HostToGuest::ModifyChannelResponse { .. } => "modify refused".to_owned(),
        HostToGuest::UnloadResponse => "unloaded".to_owned(),
        other => format!("{other:?}"),
    }
}

fn told(message: &BusToServer) -> String {
    match message {
        BusToServer::Attach { .. } => "attach".to_owned(),
        BusToServer::Gpadl { gpadl, .. } => format!("gpadl {gpadl:x}"),
        BusToServer::OpenChannel { channel, fresh, .. } => {
            format!("open {channel} {}", if *fresh { "fresh" } else { "recover" })
        }
        BusToServer::Retarget { channel, .. } => format!("retarget {channel}"),
        BusToServer::CloseChannel { channel, .. } => format!("close {channel}"),
        BusToServer::TeardownGpadl { gpadl } => format!("teardown {gpadl:x}"),
        BusToServer::Quiesce { .. } => "quiesce".to_owned(),
        BusToServer::Serve => "serve".to_owned(),
        BusToServer::HandedOver => "handed over".to_owned(),
    }
}

fn table() -> String {
    let mut text = String::new();
    for (state, prepare) in STATES {
        writeln!(text, "{state}").expect("text");
        for (event, happen) in EVENTS {
            let mut world = World::booted();
            world.gpadl_and_open(ChannelId(1), 0x100);
            world.say(DISK, ServerToBus::OfferSubChannels { count: 1 });
            let sub = world.channel(DISK, 1);
            world.gpadl(sub, 0x101, 8);
            world.gpadl(sub, 0x102, 8);
            prepare(&mut world, sub);
            world.heard();
            let before = world.inbox(DISK).len();
            let faults = world.faults();
            happen(&mut world, sub);
            let mut did: Vec<String> = world.heard().iter().map(short).collect();
            let inbox = world.inbox(DISK);
            did.extend(
                inbox
                    .iter()
                    .skip(before)
                    .map(|message| format!("[{}]", told(message))),
            );
            if world.faults() > faults {
                did.push("fault".to_owned());
            }
            let line = format!(
                "  {event:<21} -> {:<26} {}",
                describe(&world, sub),
                did.join(", ")
            );
            writeln!(text, "{}", line.trim_end()).expect("text");
        }
    }
    text
}

#[test]
fn every_state_meets_every_event_as_written() {
    let golden = include_str!("table.txt");
    let now = table();
    assert!(golden == now, "transitions changed; now:\n{now}");
}
