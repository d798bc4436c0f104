//! Plays `bulkhead-bus` and the guest's memory and channel management.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::channel::{ChannelCounters, GuestChannel};
use super::{VscError, wait_until};
use crate::channel::MAX_RELID;
use crate::ipc::hello::{PROTOCOL, check_protocol};
use crate::ipc::{BusToServer, PeerFault, ServerToBus, Socket};
use crate::mem::{Access, Gpa, Gpn, GuestRam, HostError, PAGE_BYTES, RamLayout, SharedMap, sealed_memfd};
use crate::ring::{RingReader, RingWriter, split_channel};

/// First page given out; the pages below are never named, so that a zero where a page number should be is found.
const FIRST_PAGE: u64 = 16;

/// First GPADL number, as in Linux 6.1 (`VMBUS_GPADL_START`, drivers/hv/hyperv_vmbus.h).
const FIRST_GPADL: u32 = 0xE1E10;

/// What the guest is.
#[derive(Debug, Clone, Copy)]
pub struct GuestOptions {
    /// Bytes of RAM, whole pages.
    pub ram_bytes: u64,
    /// Virtual processors.
    pub vp_count: u16,
}

impl Default for GuestOptions {
    /// 64 MiB and one VP.
    fn default() -> Self {
        Self {
            ram_bytes: 64 << 20,
            vp_count: 1,
        }
    }
}

/// How a channel is opened.
#[derive(Debug, Clone, Copy)]
pub struct ChannelOptions {
    /// 0: the primary.
    pub sub_index: u16,
    /// Pages of each ring, the control page included. Linux storvsc: 32, netvsc: 64 and more.
    pub ring_pages: u32,
    /// The VP to interrupt.
    pub target_vp: u16,
    /// Lay the rings' pages out in descending order with gaps, as a guest with fragmented memory would.
    pub scattered: bool,
}

impl Default for ChannelOptions {
    /// A primary channel as storvsc opens it.
    fn default() -> Self {
        Self {
            sub_index: 0,
            ring_pages: 32,
            target_vp: 0,
            scattered: false,
        }
    }
}

#[derive(Debug)]
struct OpenGpadl {
    channel: u32,
    pages: Vec<u64>,
    byte_count: u32,
    byte_offset: u32,
}

#[derive(Debug)]
struct OpenChannel {
    sub_index: u16,
    open_epoch: u32,
    ring_gpadl: u32,
    downstream_page_offset: u32,
    target_vp: Arc<AtomicU32>,
    kick: OwnedFd,
    interrupt: OwnedFd,
}

/// A guest without a processor.
#[derive(Debug)]
pub struct SyntheticGuest {
    ram_fd: OwnedFd,
    ram: GuestRam,
    event_flags_fd: OwnedFd,
    event_flags: Arc<SharedMap>,
    vp_count: u16,
    next_page: u64,
    /// Freed pages by how many were freed together.
    free_pages: BTreeMap<usize, Vec<u64>>,
    next_gpadl: u32,
    next_relid: u32,
    next_epoch: u32,
    gpadls: BTreeMap<u32, OpenGpadl>,
    channels: BTreeMap<u32, OpenChannel>,
    server: Option<Socket>,
    /// A server that has said hello and waits until the one before is gone.
    waiting: Option<Socket>,
    /// What the server said and nobody asked for yet.
    heard: VecDeque<ServerToBus>,
    sub_channels_offered: u16,
}

impl SyntheticGuest {
    /// Makes RAM and event flags. No server is there yet.
    pub fn new(options: GuestOptions) -> Result<Self, VscError> {
        let GuestOptions { ram_bytes, vp_count } = options;
        let layout = RamLayout::for_size(ram_bytes);
        let (ram_fd, ram) = shared("synthetic-guest-ram", ram_bytes)?;
        ram.collapse();
        let ram = GuestRam::new(ram, layout).map_err(|_| VscError::Missing("RAM of that size"))?;
        let flags_bytes = u64::from(vp_count) * PAGE_BYTES;
        let (event_flags_fd, event_flags) = shared("synthetic-guest-siefp", flags_bytes)?;
        Ok(Self {
            ram_fd,
            ram,
            event_flags_fd,
            event_flags,
            vp_count,
            next_page: FIRST_PAGE,
            free_pages: BTreeMap::new(),
            next_gpadl: FIRST_GPADL,
            next_relid: 1,
            next_epoch: 1,
            gpadls: BTreeMap::new(),
            channels: BTreeMap::new(),
            server: None,
            waiting: None,
            heard: VecDeque::new(),
            sub_channels_offered: 0,
        })
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The memfd of guest memory, for tests that keep or restore it.
    pub fn ram_fd(&self) -> BorrowedFd<'_> {
        self.ram_fd.as_fd()
    }

    /// Allocates consecutive pages; their first address. The contents are what an earlier owner left, or zero.
    pub fn allocate(&mut self, pages: usize) -> Result<Gpa, VscError> {
        if let Some(page) = self.free_pages.get_mut(&pages).and_then(Vec::pop) {
            return Ok(Gpa(page * PAGE_BYTES));
        }
        let page = self.next_page;
        let gpa = Gpa(page * PAGE_BYTES);
        let bytes = u32::try_from(pages as u64 * PAGE_BYTES).map_err(|_| VscError::OutOfMemory(pages))?;
        // All of it in one region of RAM, or not at all.
        self.ram
            .span(gpa, bytes)
            .map_err(|_| VscError::OutOfMemory(pages))?;
        self.next_page = page + pages as u64;
        Ok(gpa)
    }

    /// Frees what [`Self::allocate`] gave for the same number of pages.
    pub fn free(&mut self, gpa: Gpa, pages: usize) {
        self.free_pages.entry(pages).or_default().push(gpa.0 / PAGE_BYTES);
    }

    /// The pages from an address on.
    pub fn pages_of(gpa: Gpa, pages: usize) -> Vec<Gpn> {
        (0..pages as u64)
            .map(|page| Gpn(gpa.0 / PAGE_BYTES + page))
            .collect()
    }

    /// Takes the server's end of a new connection and tells it everything: RAM, GPADLs, open channels. Waits for its
    /// hello, and returns its generation.
    ///
    /// The first server is told nothing but RAM and that it serves, and hears of the rest as it happens.
    pub fn attach(&mut self, socket: OwnedFd, deadline: Instant) -> Result<u32, VscError> {
        let generation = self.attach_waiting(socket, deadline)?;
        self.promote()?;
        Ok(generation)
    }

    /// The same for a successor of a server that still serves: it is told of RAM and waits for [`Self::promote`].
    pub fn attach_waiting(&mut self, socket: OwnedFd, deadline: Instant) -> Result<u32, VscError> {
        let mut socket = Socket::new(socket);
        let generation = loop {
            match socket.recv::<ServerToBus>()? {
                Some((ServerToBus::Hello { protocol, generation }, _)) => {
                    check_protocol(protocol)?;
                    break generation;
                }
                Some(_) => {
                    return Err(PeerFault::OutOfTurn {
                        message: "a message",
                        why: "Hello comes first",
                    }
                    .into());
                }
                None if wait_until(&socket, deadline)? => {}
                None => return Err(VscError::Deadline("the server's hello")),
            }
        };
        let attach = BusToServer::Attach {
            protocol: PROTOCOL,
            ram: self.ram.layout().clone(),
            vp_count: self.vp_count,
        };
        socket.send(&attach, &[self.ram_fd.as_fd(), self.event_flags_fd.as_fd()])?;
        self.waiting = Some(socket);
        Ok(generation)
    }

    /// The server that served is gone, and nothing of it touches memory any more: the waiting one is told to serve, and
    /// everything else.
    pub fn promote(&mut self) -> Result<(), VscError> {
        self.server = Some(self.waiting.take().ok_or(VscError::Missing("waiting server"))?);
        self.heard.clear();
        self.tell(&BusToServer::Serve)?;
        let gpadls: Vec<u32> = self.gpadls.keys().copied().collect();
        gpadls.into_iter().try_for_each(|gpadl| self.tell_gpadl(gpadl))?;
        let channels: Vec<u32> = self.channels.keys().copied().collect();
        channels
            .into_iter()
            .try_for_each(|channel| self.tell_channel(channel, false))?;
        self.tell(&BusToServer::HandedOver)
    }

    /// The server's process is gone, and nothing of it touches memory any more.
    pub fn server_gone(&mut self) {
        self.server = None;
        self.heard.clear();
    }

    fn tell(&mut self, message: &BusToServer) -> Result<(), VscError> {
        match &mut self.server {
            Some(server) => Ok(server.send(message, &[])?),
            // The next one will be told the state that results.
            None => Ok(()),
        }
    }

    fn tell_gpadl(&mut self, gpadl: u32) -> Result<(), VscError> {
        let OpenGpadl {
            channel,
            pages,
            byte_count,
            byte_offset,
        } = self.gpadls.get(&gpadl).ok_or(VscError::Missing("such GPADL"))?;
        let (channel, pages, byte_count, byte_offset) = (*channel, pages.clone(), *byte_count, *byte_offset);
        self.tell(&BusToServer::Gpadl {
            channel,
            gpadl,
            pages,
            byte_count,
            byte_offset,
        })
    }

    fn tell_channel(&mut self, relid: u32, fresh: bool) -> Result<(), VscError> {
        let channel = self
            .channels
            .get(&relid)
            .ok_or(VscError::Missing("such channel"))?;
        let message = BusToServer::OpenChannel {
            channel: relid,
            sub_index: channel.sub_index,
            open_epoch: channel.open_epoch,
            ring_gpadl: channel.ring_gpadl,
            downstream_page_offset: channel.downstream_page_offset,
            // Stored from a u16.
            target_vp: channel.target_vp.load(Ordering::Relaxed) as u16,
            fresh,
        };
        match &mut self.server {
            Some(server) => Ok(server.send(&message, &[channel.kick.as_fd(), channel.interrupt.as_fd()])?),
            None => Ok(()),
        }
    }

    /// Makes a GPADL of these pages and tells the server; its number.
    pub fn add_gpadl(
        &mut self,
        channel: u32,
        pages: &[Gpn],
        byte_offset: u32,
        byte_count: u32,
    ) -> Result<u32, VscError> {
        let gpadl = self.next_gpadl;
        self.next_gpadl += 1;
        let pages = pages.iter().map(|page| page.0).collect();
        self.gpadls.insert(
            gpadl,
            OpenGpadl {
                channel,
                pages,
                byte_count,
                byte_offset,
            },
        );
        self.tell_gpadl(gpadl)?;
        Ok(gpadl)
    }

    /// Makes a GPADL of consecutive whole pages.
    pub fn add_gpadl_at(&mut self, channel: u32, gpa: Gpa, pages: usize) -> Result<u32, VscError> {
        let bytes = u32::try_from(pages as u64 * PAGE_BYTES).map_err(|_| VscError::OutOfMemory(pages))?;
        self.add_gpadl(channel, &Self::pages_of(gpa, pages), 0, bytes)
    }

    /// Tears a GPADL down and waits until the server has let go of it.
    pub fn teardown_gpadl(&mut self, gpadl: u32, deadline: Instant) -> Result<(), VscError> {
        self.tell(&BusToServer::TeardownGpadl { gpadl })?;
        self.expect("GpadlReleased", deadline, |message| {
            *message == ServerToBus::GpadlReleased { gpadl }
        })?;
        self.gpadls.remove(&gpadl);
        Ok(())
    }

    /// Allocates and initializes rings, makes their GPADL, and opens a channel.
    pub fn open_channel(&mut self, options: ChannelOptions) -> Result<GuestChannel, VscError> {
        let ring_pages = options.ring_pages as usize;
        let pages = match options.scattered {
            false => Self::pages_of(self.allocate(2 * ring_pages)?, 2 * ring_pages),
            true => {
                let all = Self::pages_of(self.allocate(4 * ring_pages)?, 4 * ring_pages);
                all.into_iter().rev().step_by(2).collect()
            }
        };
        let relid = self.next_relid;
        assert!(
            relid <= MAX_RELID,
            "a synthetic guest opens at most {MAX_RELID} channels"
        );
        self.next_relid += 1;
        let bytes = options
            .ring_pages
            .saturating_mul(2)
            .saturating_mul(PAGE_BYTES as u32);
        let ring_gpadl = self.add_gpadl(relid, &pages, 0, bytes)?;
        self.open_on(relid, ring_gpadl, options)
    }

    /// Opens a channel again on the rings that it has, with initialized indexes, as a driver does when it changes its
    /// settings. Close it first, unless no server is there. The old value is of no use any more.
    pub fn reopen_channel(&mut self, old: &GuestChannel) -> Result<GuestChannel, VscError> {
        let ring_pages = old.to_host.data_bytes() / PAGE_BYTES as u32 + 1;
        // Stored from a u16.
        let target_vp = old.target_vp.load(Ordering::Relaxed) as u16;
        let options = ChannelOptions {
            sub_index: old.sub_index,
            ring_pages,
            target_vp,
            scattered: false,
        };
        self.channels.remove(&old.relid);
        self.open_on(old.relid, old.ring_gpadl, options)
    }

    fn open_on(
        &mut self,
        relid: u32,
        ring_gpadl: u32,
        options: ChannelOptions,
    ) -> Result<GuestChannel, VscError> {
        let gpadl = self
            .gpadls
            .get(&ring_gpadl)
            .ok_or(VscError::Missing("such GPADL"))?;
        let pages: Vec<Gpn> = gpadl.pages.iter().copied().map(Gpn).collect();
        let area = self.ram.paged_area(&pages, gpadl.byte_offset, gpadl.byte_count);
        let area = area.map_err(|_| VscError::Missing("RAM under the ring"))?;
        let rings = split_channel(&area, options.ring_pages);
        let (to_host, to_guest) = rings.map_err(|_| VscError::Missing("ring of that size"))?;
        to_host.initialize();
        to_guest.initialize();
        // The kick blocks (servers may read it with io_uring), the interrupt is polled.
        let kick = eventfd(EfdFlags::EFD_CLOEXEC)?;
        let interrupt = eventfd(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let open_epoch = self.next_epoch;
        self.next_epoch += 1;
        let target_vp = Arc::new(AtomicU32::new(u32::from(options.target_vp)));
        let channel = GuestChannel {
            relid,
            ring_gpadl,
            sub_index: options.sub_index,
            open_epoch,
            reader: RingReader::new(to_guest.clone(), 0)?,
            writer: RingWriter::new(to_host.clone(), 0)?,
            to_host,
            to_guest,
            kick: duplicate(&kick)?,
            interrupt: duplicate(&interrupt)?,
            event_flags: self.event_flags.clone(),
            target_vp: target_vp.clone(),
            next_transaction: 0,
            header: Vec::new(),
            counters: ChannelCounters::default(),
        };
        let open = OpenChannel {
            sub_index: options.sub_index,
            open_epoch,
            ring_gpadl,
            downstream_page_offset: options.ring_pages,
            target_vp,
            kick,
            interrupt,
        };
        self.channels.insert(relid, open);
        self.tell_channel(relid, true)?;
        Ok(channel)
    }

    /// Closes a channel and waits until the server has let go of it. Its ring GPADL stays.
    pub fn close_channel(&mut self, channel: &GuestChannel, deadline: Instant) -> Result<(), VscError> {
        let (relid, open_epoch) = (channel.relid, channel.open_epoch);
        self.channels
            .remove(&relid)
            .ok_or(VscError::Missing("such channel"))?;
        if channel.sub_index == 0 {
            self.sub_channels_offered = 0;
        }
        self.tell(&BusToServer::CloseChannel {
            channel: relid,
            open_epoch,
        })?;
        let closed = ServerToBus::ChannelClosed {
            channel: relid,
            open_epoch,
        };
        self.expect("ChannelClosed", deadline, |message| *message == closed)
    }

    /// Moves a channel's interrupt to another VP.
    pub fn retarget(&mut self, channel: &GuestChannel, target_vp: u16) -> Result<(), VscError> {
        channel.target_vp.store(u32::from(target_vp), Ordering::Relaxed);
        let (channel, open_epoch) = (channel.relid, channel.open_epoch);
        self.tell(&BusToServer::Retarget {
            channel,
            open_epoch,
            target_vp,
        })
    }

    /// Resets: all channels and GPADLs are gone once the server has answered.
    pub fn quiesce(&mut self, deadline: Instant) -> Result<(), VscError> {
        let token = u64::from(self.next_epoch);
        self.next_epoch += 1;
        self.channels.clear();
        self.gpadls.clear();
        self.sub_channels_offered = 0;
        self.tell(&BusToServer::Quiesce { token })?;
        self.expect("Quiesced", deadline, |message| {
            *message == ServerToBus::Quiesced { token }
        })
    }

    /// Sends the server any message, as a broken `bulkhead-bus` might.
    pub fn send_raw(&mut self, message: &BusToServer, fds: &[OwnedFd]) -> Result<(), VscError> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let server = self.server.as_mut().ok_or(VscError::Missing("server"))?;
        Ok(server.send(message, &fds)?)
    }

    /// How many sub-channels the server has asked to be offered by now, or asks for before the deadline.
    pub fn wait_sub_channels(&mut self, deadline: Instant) -> Result<u16, VscError> {
        if self.sub_channels_offered == 0 {
            self.expect("OfferSubChannels", deadline, |message| {
                matches!(message, ServerToBus::OfferSubChannels { .. })
            })?;
        }
        Ok(self.sub_channels_offered)
    }

    /// Waits until the server reports that channel as broken; why.
    pub fn wait_broken(&mut self, channel: &GuestChannel, deadline: Instant) -> Result<String, VscError> {
        let mut found = String::new();
        self.expect("ChannelBroken", deadline, |message| match message {
            ServerToBus::ChannelBroken {
                channel: relid, why, ..
            } if *relid == channel.relid => {
                found.clone_from(why);
                true
            }
            _ => false,
        })?;
        Ok(found)
    }

    /// The next thing that the server said, if it said something.
    pub fn next_message(&mut self) -> Result<Option<ServerToBus>, VscError> {
        self.hear()?;
        Ok(self.heard.pop_front())
    }

    /// Waits for the message that `is_it` accepts; keeps the others. Without a server nothing is waited for: like
    /// `bulkhead-bus`, the guest then gets its answer at once.
    fn expect(
        &mut self,
        what: &'static str,
        deadline: Instant,
        mut is_it: impl FnMut(&ServerToBus) -> bool,
    ) -> Result<(), VscError> {
        loop {
            self.hear()?;
            if let Some(position) = self.heard.iter().position(&mut is_it) {
                self.heard.remove(position);
                return Ok(());
            }
            let Some(server) = &self.server else { return Ok(()) };
            if !wait_until(server, deadline)? {
                return Err(VscError::Deadline(what));
            }
        }
    }

    fn hear(&mut self) -> Result<(), VscError> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        server.flush()?;
        while let Some((message, _)) = server.recv::<ServerToBus>()? {
            if let ServerToBus::OfferSubChannels { count } = message {
                self.sub_channels_offered = count;
            }
            self.heard.push_back(message);
        }
        Ok(())
    }
}

fn shared(name: &str, bytes: u64) -> Result<(OwnedFd, Arc<SharedMap>), VscError> {
    let fd = sealed_memfd(name, bytes)?;
    let length = usize::try_from(bytes).map_err(|_| VscError::Missing("RAM of that size"))?;
    let map = SharedMap::map(fd.as_fd(), length, Access::ReadWrite)?;
    Ok((fd, Arc::new(map)))
}

fn eventfd(flags: EfdFlags) -> Result<OwnedFd, HostError> {
    let eventfd = EventFd::from_value_and_flags(0, flags);
    Ok(eventfd
        .map_err(|errno| HostError::new("make an eventfd", errno))?
        .into())
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, HostError> {
    fd.try_clone()
        .map_err(|error| HostError::from_io("duplicate an eventfd", &error))
}
