//! Rounds between a guest's driver and a device server, as in a VM: the guest is `vmbus::vsc`, the server
//! `vmbus::channel`, both with the sleeping and waking that belongs to them.

#![forbid(unsafe_code)]

use super::{DATA_BYTES, DEPTH, LARGE_BYTES, SMALL_BYTES};
use anyhow::{Context, Result, anyhow, ensure};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vmbus::channel::{Endpoint, Port, PortEvent};
use vmbus::mem::{File, Gpa, GuestRam, PAGE_BYTES, Uring};
use vmbus::ring::{PacketBuf, RingWriter, StageError};
use vmbus::vsc::{ChannelOptions, GuestChannel, GuestOptions, PlayedSupervisor, SyntheticGuest};
use vmbus::wire::{Packet, PacketKind};

/// Limit: how long one wait of the guest may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// As long as storvsp's packets, which is what a request and its answer carry besides page numbers.
const HEAD_BYTES: usize = 64;
/// Packets that the server reads between two looks at everything else, as device-block does.
const BATCH: usize = 64;
/// Requests that it answers together if each is a copy of 64 KiB: half of what is in flight, so that guest and server can
/// both be at work. Fewer, and the guest's interrupts cost more than it gains.
const LARGE_BATCH: usize = DEPTH as usize / 2;
/// The device's own mark in the journal.
const KIND: u8 = 1;

/// The guest.
pub(super) struct Guest {
    guest: SyntheticGuest,
    channel: GuestChannel,
    buffers: Gpa,
    packets: PacketBuf,
    /// Where memcpy copies to.
    disk: Vec<u8>,
}

impl Guest {
    /// Opens a channel to the server at the other end of `bus`.
    pub(super) fn new(bus: OwnedFd) -> Result<Guest> {
        let mut guest = SyntheticGuest::new(GuestOptions::default())?;
        guest.attach(bus, deadline())?;
        let channel = guest.open_channel(ChannelOptions {
            // The control page and the data area.
            ring_pages: (DATA_BYTES / PAGE_BYTES) as u32 + 1,
            ..ChannelOptions::default()
        })?;
        let buffers = guest.allocate(DEPTH as usize * LARGE_BYTES / PAGE_BYTES as usize)?;
        Ok(Guest {
            guest,
            channel,
            buffers,
            packets: PacketBuf::new(),
            disk: vec![0; DEPTH as usize * LARGE_BYTES],
        })
    }

    /// Sends packets that want no answer, each published by itself.
    pub(super) fn send_small(&mut self, count: u64) -> Result<()> {
        let payload = [0x5A_u8; SMALL_BYTES];
        for number in 0..count {
            loop {
                match self.channel.send_in_band(number, false, &[&payload]) {
                    Ok(()) => break,
                    Err(StageError::Full) => {
                        let needed = RingWriter::needed_bytes(0, SMALL_BYTES) as u32;
                        let room = self.channel.wait_room(needed, deadline())?;
                        ensure!(room, "the server does not read");
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            self.channel.flush()?;
        }
        Ok(())
    }

    /// Sends requests on buffers, each published by itself, as long as there are free ones; takes what answers are there; waits
    /// when there is nothing else to do. With `fill`, each buffer gets new data; else only its ends do.
    pub(super) fn send_large(&mut self, count: u64, fill: bool) -> Result<()> {
        let head = [0x5A_u8; HEAD_BYTES];
        let mut free: Vec<u64> = (0..DEPTH).rev().collect();
        let (mut issued, mut done) = (0, 0);
        while done < count {
            while issued < count
                && let Some(buffer) = free.pop()
            {
                let gpa = self.buffer(buffer);
                let range = (gpa, LARGE_BYTES as u32);
                let mut spans = self.guest.ram().spans();
                spans.append(self.guest.ram().span(gpa, LARGE_BYTES as u32)?)?;
                match fill {
                    true => spans.fill(0, LARGE_BYTES, issued as u8)?,
                    false => {
                        spans.fill(0, 1, issued as u8)?;
                        spans.fill(LARGE_BYTES - 1, 1, issued as u8)?;
                    }
                }
                // The number tells the server what has to be in the buffer; the answer tells us which one is free.
                let id = issued << 8 | buffer;
                self.channel.send_gpa_direct(id, &[range], &[&head])?;
                self.channel.flush()?;
                issued += 1;
            }
            let had = self.take_answers(&mut free)?;
            done += had;
            if had == 0 {
                ensure!(self.channel.wait(deadline())?, "the server does not answer");
            }
        }
        Ok(())
    }

    fn take_answers(&mut self, free: &mut Vec<u64>) -> Result<u64> {
        let mut had = 0;
        self.channel.mask();
        while let Some(packet) = self.channel.receive(&mut self.packets)? {
            ensure!(
                packet.kind == PacketKind::COMPLETION,
                "the server sends something else"
            );
            free.push(packet.transaction_id & 0xFF);
            had += 1;
        }
        self.channel.give_back()?;
        Ok(had)
    }

    fn buffer(&self, number: u64) -> Gpa {
        Gpa(self.buffers.0 + number * LARGE_BYTES as u64)
    }

    /// The baseline: the same bytes from the same buffers to as much private memory, in one process.
    pub(super) fn memcpy(&mut self, count: u64) -> Result<()> {
        let ram = self.guest.ram();
        let mut buffers = ram.spans();
        buffers.append(ram.span(self.buffers, self.disk.len() as u32)?)?;
        for number in 0..count {
            let at = (number % DEPTH) as usize * LARGE_BYTES;
            buffers.copy_to_at(at, &mut self.disk[at..at + LARGE_BYTES])?;
            std::hint::black_box(&self.disk);
        }
        Ok(())
    }
}

/// The server.
pub(super) struct Server {
    port: Port,
    endpoint: Box<Endpoint>,
    io: Uring,
    packets: PacketBuf,
    disk: Vec<u8>,
}

impl Server {
    /// Waits for the guest to open its channel.
    pub(super) fn new(bus: OwnedFd) -> Result<Server> {
        let mut port = Port::new(bus, PlayedSupervisor::new_journal()?, 1)?;
        let mut io = Uring::new(8)?;
        let endpoint = loop {
            io.poll_add(File::Fd(std::os::fd::AsFd::as_fd(&port)), libc::POLLIN, false, 0)?;
            io.submit_and_wait(1, None)?;
            while io.next_completion().is_some() {}
            let opened = port.on_readable()?.into_iter().find_map(|event| match event {
                PortEvent::ChannelOpened(endpoint, _) => Some(endpoint),
                _ => None,
            });
            if let Some(endpoint) = opened {
                break endpoint;
            }
        };
        io.poll_add(File::Fd(endpoint.kick()), libc::POLLIN, true, 0)?;
        Ok(Server {
            port,
            endpoint,
            io,
            packets: PacketBuf::new(),
            disk: vec![0; DEPTH as usize * LARGE_BYTES],
        })
    }

    /// Reads `count` packets that want no answer.
    pub(super) fn read_small(&mut self, count: u64) -> Result<()> {
        self.serve(count, BATCH, |server, expected| {
            let Some(packet) = server.endpoint.receive(&mut server.packets)? else {
                return Ok(false);
            };
            ensure!(packet.transaction_id == expected, "packet {expected} is missing");
            server.endpoint.consume();
            Ok(true)
        })
    }

    /// Takes `count` requests, copies their data out, and answers.
    pub(super) fn read_large(&mut self, count: u64) -> Result<()> {
        self.serve(count, LARGE_BATCH, Server::execute)
    }

    fn execute(&mut self, number: u64) -> Result<bool> {
        if !self.endpoint.can_answer(HEAD_BYTES) {
            return Ok(false);
        }
        let Some(packet) = self.endpoint.receive(&mut self.packets)? else {
            return Ok(false);
        };
        let id = packet.transaction_id;
        ensure!(id >> 8 == number, "request {number} is missing");
        let kept = [packet.payload, packet.extra_header()];
        let token = self
            .endpoint
            .take(KIND, id, &kept)
            .map_err(|why| anyhow!("a request cannot be taken: {why:?}"))?;
        let ram = self.port.ram().context("there is no guest RAM")?;
        let at = (number % DEPTH) as usize * LARGE_BYTES;
        let copy = &mut self.disk[at..at + LARGE_BYTES];
        copy_out(&packet, ram, copy)?;
        let wanted = number as u8;
        ensure!(
            copy.first() == Some(&wanted) && copy.last() == Some(&wanted),
            "wrong data"
        );
        self.endpoint.complete(token, &[0x5A; HEAD_BYTES])?;
        Ok(true)
    }

    /// As a server does: up to `batch` packets, publish, look whether there are more, else sleep until the guest kicks.
    /// `step` handles one packet; `false`: there is none.
    fn serve(
        &mut self,
        count: u64,
        batch: usize,
        mut step: impl FnMut(&mut Self, u64) -> Result<bool>,
    ) -> Result<()> {
        let mut done = 0;
        while done < count {
            for _ in 0..batch {
                if !step(self, done)? {
                    break;
                }
                done += 1;
            }
            let awake = self.endpoint.prepare_sleep()? || done == count;
            self.io.submit_and_wait(usize::from(!awake), None)?;
            while self.io.next_completion().is_some() {}
        }
        Ok(())
    }
}

fn copy_out(packet: &Packet<'_>, ram: &GuestRam, to: &mut [u8]) -> Result<()> {
    let mut spans = ram.spans();
    for range in packet.gpa_direct()?.ranges.iter() {
        range.resolve(ram, &mut spans)?;
    }
    Ok(spans.copy_to(to)?)
}

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}
