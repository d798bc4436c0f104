#![forbid(unsafe_code)]
//! What vCPU threads and the control thread share: the partition, the channels' eventfds, the links, and how they meet.
//!
//! One lock around all of it. It is taken for an MSR access, a slow hypercall, a message of `bulkhead-bus` and a timer:
//! control path, none of it per request. Nobody waits for a socket or a process while holding it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::{BusToVcpu, PeerFault, VcpuToBus, VcpuToSupervisor};

use super::partition::Partition;
use super::signals::Signals;
use super::slot_timer::SlotTimer;
use crate::child::Link;
use crate::hyperv::hypercall::{self, Call, MESSAGE_CONNECTIONS, PostMessage, SignalEvent, Status};
use crate::hyperv::hypercall_page;
use crate::hyperv::msr::GeneralProtection;
use crate::kvm::{CallRegisters, Event, GuestMapping, KvmError};

/// Limit: messages of the guest that `bulkhead-bus` has not dealt with. More are refused for lack of buffers, and Linux
/// posts them again after a while. A GPADL of 8 MiB takes 75 messages.
pub(super) const MAX_POSTS_UNDER_WAY: usize = 64;

/// See the module.
#[derive(Debug)]
pub struct Machine {
    pub partition: Partition,
    pub supervisor: Link,
    /// `None`: it is gone, and the supervisor ends the VM.
    bus: Option<Link>,
    pub slot_timer: SlotTimer,
    posts_under_way: usize,
    signals: Signals,
    memory: Arc<GuestMapping>,
    /// The reset token that the servers have last let go for.
    pub quiesced: Option<u64>,
    /// The host refused something that the VM cannot do without.
    pub failure: Option<String>,
    attention: Event,
}

impl Machine {
    pub fn new(
        partition: Partition,
        (supervisor, bus): (Link, Link),
        slot_timer: SlotTimer,
        memory: Arc<GuestMapping>,
        attention: Event,
    ) -> Self {
        Self {
            partition,
            supervisor,
            bus: Some(bus),
            slot_timer,
            posts_under_way: 0,
            signals: Signals::default(),
            memory,
            quiesced: None,
            failure: None,
            attention,
        }
    }

    /// Tells the supervisor. If it is gone the control thread notices, and ends the VM.
    pub fn report(&mut self, message: &VcpuToSupervisor) {
        if let Err(error) = self.supervisor.send(message, &[]) {
            tracing::debug!("report to the supervisor: {error}");
        }
    }

    /// RDMSR by a vCPU.
    pub fn read_msr(&self, vp: u16, msr: u32, tsc: impl FnOnce() -> u64) -> Result<u64, GeneralProtection> {
        self.partition.read_msr(vp, msr, tsc)
    }

    /// WRMSR by a vCPU.
    pub fn write_msr(&mut self, vp: u16, msr: u32, value: u64) -> Result<(), GeneralProtection> {
        match self.partition.write_msr(vp, msr, value)? {
            // A guest may crash without end; what else there is to say must not lack room for that.
            Ok(Some(_)) if self.supervisor.has_queued() => {}
            Ok(Some(crash)) => {
                let (parameters, text) = (crash.parameters, crash.text);
                self.report(&VcpuToSupervisor::GuestCrash { parameters, text });
            }
            Ok(None) => {}
            Err(error) => self.fail(&error),
        }
        self.schedule_slots();
        Ok(())
    }

    /// A hypercall that took the slow port: what is read there.
    pub fn hypercall(&mut self, registers: CallRegisters) -> u32 {
        let send = |signal: SignalEvent| hypercall_page::SEND | signal.connection_id;
        let answer = match hypercall::decode(registers.rcx, registers.r9) {
            Err(status) => Err(status),
            Ok(Call::SignalEvent(signal)) => Ok(send(signal)),
            Ok(Call::SignalEventAt(gpa)) => self.copy_in(gpa).and_then(SignalEvent::parse).map(send),
            Ok(Call::PostMessageAt(gpa)) => self
                .copy_in(gpa)
                .and_then(PostMessage::parse)
                .map(|message| self.post(&message) as u32),
        };
        answer.unwrap_or_else(|status| status as u32)
    }

    /// Looks again at message slots that were full.
    pub fn on_slot_timer(&mut self) {
        if let Err(error) = self.slot_timer.take() {
            self.fail(&format!("cannot read the timer: {error}"));
        }
        if let Err(error) = self.partition.pump_all(true) {
            self.fail(&error);
        }
        self.schedule_slots();
    }

    /// The servers are to let go of the guest's memory.
    pub fn reset_bus(&mut self, token: u64) {
        self.tell_bus(&VcpuToBus::Reset { token });
    }

    /// Does what `bulkhead-bus` says, at most `count` times.
    pub fn on_bus(&mut self, count: usize) {
        for _ in 0..count {
            let Some(bus) = &mut self.bus else { return };
            match bus.receive() {
                Ok(Some((message, fds))) => {
                    if let Err(error) = self.act(message, fds.into_iter().next()) {
                        self.fail(&error);
                    }
                }
                Ok(None) => break,
                // The guest runs on until the supervisor, which knows why, ends it.
                Err(PeerFault::Eof | PeerFault::Send(_)) => self.bus = None,
                Err(fault) => {
                    self.fail(&format!("bulkhead-bus: {fault}"));
                    self.bus = None;
                }
            }
        }
        self.schedule_slots();
    }

    /// The VM cannot go on: the control thread ends it.
    pub fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.failure.get_or_insert_with(|| why.to_string());
        self.attention.signal();
    }

    /// Everything that is known, as `path = value` pairs.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let mut entries = self.partition.inspect();
        entries.push(("signals.channels".to_owned(), self.signals.len().to_string()));
        entries
    }

    /// Believes nothing but the order: `fd` is there if the message has one, and is given to KVM only, which refuses what
    /// is no eventfd.
    fn act(&mut self, message: BusToVcpu, fd: Option<OwnedFd>) -> anyhow::Result<()> {
        let vm = &self.partition.vm;
        match (message, fd) {
            (BusToVcpu::Posted, _) => self.posts_under_way = self.posts_under_way.saturating_sub(1),
            (BusToVcpu::PostToGuest { vp, payload }, _) => self.partition.post_to_guest(vp, &payload)?,
            (BusToVcpu::BindSignal { channel }, Some(fd)) => self.signals.bind_kick(vm, channel, fd)?,
            (BusToVcpu::UnbindSignal { channel }, _) => self.signals.unbind_kick(vm, channel),
            (BusToVcpu::BindInterrupt { channel, vp }, Some(fd)) => {
                self.partition.check_vp(vp)?;
                self.signals.bind_interrupt(vm, channel, vp, fd)?;
            }
            (BusToVcpu::RebindInterrupt { channel, vp }, _) => {
                self.partition.check_vp(vp)?;
                self.signals.rebind_interrupt(vm, channel, vp)?;
            }
            (BusToVcpu::UnbindInterrupt { channel }, _) => self.signals.unbind_interrupt(vm, channel),
            (BusToVcpu::RaiseInterrupt { channel, vp }, _) => self.partition.raise_event(vp, channel)?,
            (BusToVcpu::QuiesceDone { token }, _) => {
                self.quiesced = Some(token);
                self.attention.signal();
            }
            // The codec has checked that it is there.
            (BusToVcpu::BindSignal { .. } | BusToVcpu::BindInterrupt { .. }, None) => {}
        }
        Ok(())
    }

    fn post(&mut self, message: &PostMessage) -> Status {
        if !MESSAGE_CONNECTIONS.contains(&message.connection_id) {
            return Status::InvalidConnectionId;
        }
        if self.partition.is_full() || self.posts_under_way >= MAX_POSTS_UNDER_WAY {
            return Status::InsufficientBuffers;
        }
        self.posts_under_way += 1;
        self.tell_bus(&VcpuToBus::Post {
            connection_id: message.connection_id,
            message_type: message.message_type,
            payload: message.payload().to_vec(),
        });
        Status::Success
    }

    fn tell_bus(&mut self, message: &VcpuToBus) {
        if let Some(bus) = &mut self.bus
            && let Err(error) = bus.send(message, &[])
        {
            tracing::debug!("message to bulkhead-bus: {error}");
        }
    }

    /// Copies a parameter block, once, into private memory.
    fn copy_in<const BYTES: usize>(&self, gpa: u64) -> Result<[u8; BYTES], Status> {
        let mut block = [0; BYTES];
        let copied = self.memory.memory().read_slice(&mut block, GuestAddress(gpa));
        copied.map(|()| block).map_err(|_| Status::InvalidParameter)
    }

    fn schedule_slots(&mut self) {
        if let Err(error) = self.slot_timer.want(self.partition.retry_delay_ms()) {
            self.fail(&KvmError::host("set a timer", error));
        }
    }
}
