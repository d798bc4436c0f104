#![forbid(unsafe_code)]
//! The eventfds of each open channel: the kick (guest to server) and the interrupt (server to guest).
//!
//! KVM writes and reads them. We do neither: who else holds one could make a write wait.
//!
//! Both are made by `bulkhead-bus` when the channel is opened and outlive the servers that hold duplicates of them, so
//! that a kick that came while no server was there is still in the counter. When the channel is closed our handles go,
//! and with them what KVM does on a write: a server that is gone, or slow, holds eventfds that nobody listens to.
//!
//! A binding that KVM refuses ends the VM, because no guest can bring that about by opening channels. KVM does not count
//! signals among the 1,000 devices that a VM may have on its port bus, but leaves their number to the limit on open files
//! (Linux 6.1 virt/kvm/kvm_main.c kvm_io_bus_register_dev), and has no limit on interrupts; `bulkhead-bus` opens no more
//! channels than that limit on open files has room for, and refuses the guest the next one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use crate::hyperv::hypercall::signal_connection;
use crate::kvm::{Event, KvmError, Vm};

/// Limit: as many channels as there are event flags on a VP, flag 0 included (TLFS 6.0b section 11.9). `bulkhead-bus` never
/// opens as many; one that says so has lost its mind.
const MAX_CHANNELS: usize = 2048;

#[derive(Debug, Default)]
struct Channel {
    kick: Option<Event>,
    interrupt: Option<(Event, u16)>,
}

/// Eventfds by channel.
#[derive(Debug, Default)]
pub struct Signals {
    channels: BTreeMap<u32, Channel>,
}

impl Signals {
    /// Lets the guest's signal of the channel write its kick.
    pub fn bind_kick(&mut self, vm: &Vm, channel: u32, kick: OwnedFd) -> Result<(), KvmError> {
        self.unbind_kick(vm, channel);
        let event = Event::from(kick);
        vm.bind_signal(&event, signal_connection(channel))?;
        self.make_entry(channel)?.kick = Some(event);
        Ok(())
    }

    /// Drops the channel's kick.
    pub fn unbind_kick(&mut self, vm: &Vm, channel: u32) {
        if let Some(event) = self.take(channel, |entry| entry.kick.take()) {
            // Bound by `bind_kick`; a failure leaves an ioeventfd that goes with the VM.
            vm.unbind_signal(&event, signal_connection(channel)).ok();
        }
    }

    /// Lets the channel's interrupt raise SINT 2 of `vp`.
    pub fn bind_interrupt(&mut self, vm: &Vm, channel: u32, vp: u16, fd: OwnedFd) -> Result<(), KvmError> {
        self.unbind_interrupt(vm, channel);
        let event = Event::from(fd);
        vm.bind_vp_interrupt(&event, vp)?;
        self.make_entry(channel)?.interrupt = Some((event, vp));
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
        if let Some((event, vp)) = self.take(channel, |entry| entry.interrupt.take()) {
            // Bound by `bind_interrupt`; a failure leaves an irqfd that goes when its last holder does.
            vm.unbind_vp_interrupt(&event, vp).ok();
        }
    }

    /// Channels with eventfds.
    pub fn len(&self) -> usize {
        self.channels.len()
    }

    fn make_entry(&mut self, channel: u32) -> Result<&mut Channel, KvmError> {
        if self.channels.len() >= MAX_CHANNELS && !self.channels.contains_key(&channel) {
            return Err(KvmError::host(
                "bind a channel",
                std::io::ErrorKind::QuotaExceeded.into(),
            ));
        }
        Ok(self.channels.entry(channel).or_default())
    }

    fn take<T>(&mut self, channel: u32, take: impl FnOnce(&mut Channel) -> Option<T>) -> Option<T> {
        let entry = self.channels.get_mut(&channel)?;
        let taken = take(entry);
        if entry.kick.is_none() && entry.interrupt.is_none() {
            self.channels.remove(&channel);
        }
        taken
    }
}
