#![forbid(unsafe_code)]
//! The eventfds of each open channel: the kick (guest to server) and the interrupt (server to guest).
//!
//! They are made when the channel is opened, and outlive the servers that hold duplicates of them: a kick that came while
//! no server was there is still in the counter.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Context;
use nix::sys::eventfd::{EfdFlags, EventFd};

#[derive(Debug, Default)]
struct Pair {
    kick: Option<EventFd>,
    interrupt: Option<EventFd>,
}

/// Eventfds by channel. Bounded by the number of channels that the bus allows.
#[derive(Debug, Default)]
pub struct EventFds {
    channels: BTreeMap<u32, Pair>,
}

impl EventFds {
    /// Makes the channel's kick.
    pub fn make_kick(&mut self, channel: u32) -> anyhow::Result<BorrowedFd<'_>> {
        let pair = self.channels.entry(channel).or_default();
        let fd: &EventFd = pair.kick.insert(new()?);
        Ok(fd.as_fd())
    }

    /// Drops our handle on the channel's kick.
    pub fn drop_kick(&mut self, channel: u32) {
        self.change(channel, |pair| pair.kick = None);
    }

    /// Makes the channel's interrupt.
    pub fn make_interrupt(&mut self, channel: u32) -> anyhow::Result<BorrowedFd<'_>> {
        let pair = self.channels.entry(channel).or_default();
        let fd: &EventFd = pair.interrupt.insert(new()?);
        Ok(fd.as_fd())
    }

    /// Drops our handle on the channel's interrupt.
    pub fn drop_interrupt(&mut self, channel: u32) {
        self.change(channel, |pair| pair.interrupt = None);
    }

    /// Kick and interrupt of an open channel.
    pub fn get(&self, channel: u32) -> Option<[BorrowedFd<'_>; 2]> {
        let pair = self.channels.get(&channel)?;
        Some([pair.kick.as_ref()?.as_fd(), pair.interrupt.as_ref()?.as_fd()])
    }

    fn change(&mut self, channel: u32, change: impl FnOnce(&mut Pair)) {
        if let Some(pair) = self.channels.get_mut(&channel) {
            change(pair);
            if pair.kick.is_none() && pair.interrupt.is_none() {
                self.channels.remove(&channel);
            }
        }
    }
}

fn new() -> anyhow::Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).context("cannot make an eventfd")
}
