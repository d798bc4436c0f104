#![forbid(unsafe_code)]
//! The eventfds of each open channel: the kick (guest to server) and the interrupt (server to guest).
//!
//! Both are made when the channel is opened and outlive the servers that hold duplicates of them, so that a kick
//! that came while no server was there is still in the counter. When the channel is closed our handles go, and with
//! them what KVM does on a write: a server that is gone, or slow, holds eventfds that nobody listens to.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use crate::kvm::{Event, KvmError, Vm};

#[derive(Debug, Default)]
struct Channel {
    kick: Option<(Event, u32)>,
    interrupt: Option<(Event, u16)>,
}

/// Eventfds by channel. Bounded by the number of channels that the bus allows.
#[derive(Debug, Default)]
pub struct Signals {
    channels: BTreeMap<u32, Channel>,
}

impl Signals {
    /// Makes the channel's kick and lets the guest's signal of `connection_id` write it.
    pub fn bind_kick(&mut self, vm: &Vm, channel: u32, connection_id: u32) -> Result<(), KvmError> {
        let event = new_event()?;
        // Without the eventfd in the kernel the signal comes as an exit, and `kick` does it.
        if let Err(error) = vm.bind_signal(&event, connection_id) {
            tracing::warn!(channel, "signals of the channel take the slow path: {error}");
        }
        self.channels.entry(channel).or_default().kick = Some((event, connection_id));
        Ok(())
    }

    /// Drops the channel's kick.
    pub fn unbind_kick(&mut self, vm: &Vm, channel: u32) {
        if let Some((event, connection_id)) = self.entry(channel, |entry| entry.kick.take()) {
            // It was not bound if `bind_kick` said so.
            vm.unbind_signal(&event, connection_id).ok();
        }
    }

    /// Makes the channel's interrupt and lets it raise SINT 2 of `vp`.
    pub fn bind_interrupt(&mut self, vm: &Vm, channel: u32, vp: u16) -> Result<(), KvmError> {
        let event = new_event()?;
        vm.bind_vp_interrupt(&event, vp)?;
        self.channels.entry(channel).or_default().interrupt = Some((event, vp));
        Ok(())
    }

    /// Lets the channel's interrupt raise SINT 2 of another VP from now on.
    pub fn rebind_interrupt(&mut self, vm: &Vm, channel: u32, vp: u16) -> Result<(), KvmError> {
        let entry = self
            .channels
            .get_mut(&channel)
            .and_then(|entry| entry.interrupt.as_mut());
        if let Some((event, old)) = entry {
            vm.unbind_vp_interrupt(event, *old)?;
            *old = vp;
            vm.bind_vp_interrupt(event, vp)?;
        }
        Ok(())
    }

    /// Drops the channel's interrupt.
    pub fn unbind_interrupt(&mut self, vm: &Vm, channel: u32) {
        if let Some((event, vp)) = self.entry(channel, |entry| entry.interrupt.take()) {
            // Bound by `bind_interrupt`; a failure leaves an irqfd that goes when its last holder does.
            vm.unbind_vp_interrupt(&event, vp).ok();
        }
    }

    /// Kicks the channel's server: the guest's signal took the slow path.
    pub fn kick(&self, channel: u32) {
        if let Some((event, _)) = self.channels.get(&channel).and_then(|entry| entry.kick.as_ref()) {
            event.signal();
        }
    }

    /// Kick and interrupt of an open channel.
    pub fn descriptors(&self, channel: u32) -> Option<[BorrowedFd<'_>; 2]> {
        let entry = self.channels.get(&channel)?;
        Some([
            entry.kick.as_ref()?.0.as_fd(),
            entry.interrupt.as_ref()?.0.as_fd(),
        ])
    }

    /// Channels with eventfds.
    pub fn len(&self) -> usize {
        self.channels.len()
    }

    fn entry<T>(&mut self, channel: u32, take: impl FnOnce(&mut Channel) -> Option<T>) -> Option<T> {
        let entry = self.channels.get_mut(&channel)?;
        let taken = take(entry);
        if entry.kick.is_none() && entry.interrupt.is_none() {
            self.channels.remove(&channel);
        }
        taken
    }
}

fn new_event() -> Result<Event, KvmError> {
    Event::new().map_err(|error| KvmError::host("make an eventfd", error))
}
