//! A port and endpoints in this thread, against a synthetic guest that behaves or does not.
#![forbid(unsafe_code)]

mod endpoint;
mod port;

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

/// With rings of so many pages.
fn open_with(ring_pages: u32) -> Open {
    open(ChannelOptions { ring_pages, ..SMALL })
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

    /// Whether there is a packet to look at. It is not taken.
    fn receives(&mut self) -> bool {
        let received = self.endpoint.receive(&mut self.buf);
        received.expect("the guest behaves").is_some()
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
