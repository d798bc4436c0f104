#![forbid(unsafe_code)]
//! What vCPU threads and the control thread share: the partition, the bus, and everything the bus acts on.
//!
//! One lock around all of it. It is taken for an MSR access, a slow hypercall, a message of a server and a timer:
//! control path, none of it per request. Nobody waits for a socket or a process while holding it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::{VcpuToServer, VcpuToSupervisor};

use super::links::Links;
use super::partition::{Pages, Partition};
use super::signals::Signals;
use super::timers::{Alarm, Timers};
use crate::bus::{Action, Bus, DeviceId, LogLevel};
use crate::hyperv::hypercall::{self, Call, PostMessage, SignalEvent, Status};
use crate::hyperv::msr::GeneralProtection;
use crate::kvm::{CallRegisters, Event, GuestMapping, KvmError};

/// See the module.
#[derive(Debug)]
pub struct Machine {
    pub partition: Partition,
    pub bus: Bus,
    pub links: Links,
    pub timers: Timers,
    signals: Signals,
    memory: Arc<GuestMapping>,
    pages: Arc<Pages>,
    /// The reset token that the servers have last let go for.
    pub quiesced: Option<u64>,
    /// The host refused something that the VM cannot do without.
    pub failure: Option<String>,
    attention: Event,
}

impl Machine {
    pub fn new(
        partition: Partition,
        bus: Bus,
        links: Links,
        timers: Timers,
        memory: Arc<GuestMapping>,
        pages: Arc<Pages>,
        attention: Event,
    ) -> Self {
        let signals = Signals::default();
        let (quiesced, failure) = (None, None);
        Self {
            partition,
            bus,
            links,
            timers,
            signals,
            memory,
            pages,
            quiesced,
            failure,
            attention,
        }
    }

    /// RDMSR by a vCPU.
    pub fn read_msr(&self, vp: u16, msr: u32, tsc: impl FnOnce() -> u64) -> Result<u64, GeneralProtection> {
        self.partition.read_msr(vp, msr, tsc)
    }

    /// WRMSR by a vCPU.
    pub fn write_msr(&mut self, vp: u16, msr: u32, value: u64) -> Result<(), GeneralProtection> {
        match self.partition.write_msr(vp, msr, value)? {
            Ok(Some(crash)) => {
                let (parameters, text) = (crash.parameters, crash.text);
                self.links
                    .report(&VcpuToSupervisor::GuestCrash { parameters, text });
            }
            Ok(None) => {}
            Err(error) => self.fail(&error),
        }
        self.schedule_slots();
        Ok(())
    }

    /// A hypercall that took the slow port.
    pub fn hypercall(&mut self, registers: CallRegisters) -> Status {
        match hypercall::decode(registers.rcx, registers.r9) {
            Err(status) => status,
            Ok(Call::SignalEvent(signal)) => self.signal(signal.connection_id),
            Ok(Call::SignalEventAt(gpa)) => {
                let mut block = [0; SignalEvent::BYTES];
                match self
                    .copy_in(gpa, &mut block)
                    .and_then(|()| SignalEvent::parse(block))
                {
                    Ok(signal) => self.signal(signal.connection_id),
                    Err(status) => status,
                }
            }
            Ok(Call::PostMessageAt(gpa)) => {
                let mut block = [0; PostMessage::BYTES];
                match self
                    .copy_in(gpa, &mut block)
                    .and_then(|()| PostMessage::parse(block))
                {
                    Ok(message) => self.post(&message),
                    Err(status) => status,
                }
            }
        }
    }

    /// HvSignalEvent that matched no ioeventfd: the channel is closed, or its eventfd is being exchanged, or it has
    /// none.
    pub fn signal(&mut self, connection_id: u32) -> Status {
        match self.bus.on_signal(connection_id) {
            Some(channel) => {
                self.signals.kick(channel.0);
                Status::Success
            }
            None => Status::InvalidConnectionId,
        }
    }

    /// An alarm has gone off.
    pub fn on_alarm(&mut self, alarm: Alarm) {
        match alarm {
            Alarm::Bus(id) => {
                let actions = self.bus.on_deadline(id);
                self.execute(actions);
            }
            Alarm::Slots => {
                if let Err(error) = self.partition.pump_all(true) {
                    self.fail(&error);
                }
                self.schedule_slots();
            }
        }
    }

    /// Does what the bus decided, in order; what follows from a failure comes at the end.
    pub fn execute(&mut self, actions: Vec<Action>) {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            match self.act(action) {
                Ok(more) => queue.extend(more),
                Err(error) => self.fail(&error),
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
        entries.extend(self.bus.inspect());
        entries
    }

    fn act(&mut self, action: Action) -> Result<Vec<Action>, KvmError> {
        let vm = &self.partition.vm;
        match action {
            Action::PostToGuest { vp, message } => {
                self.partition.post_to_guest(vp, message.emit().as_bytes())?;
            }
            Action::BindSignal {
                channel,
                connection_id,
            } => {
                self.signals.bind_kick(vm, channel.0, connection_id)?;
            }
            Action::UnbindSignal { channel, .. } => self.signals.unbind_kick(vm, channel.0),
            Action::BindInterrupt { channel, vp } => self.signals.bind_interrupt(vm, channel.0, vp)?,
            Action::RebindInterrupt { channel, vp } => self.signals.rebind_interrupt(vm, channel.0, vp)?,
            Action::UnbindInterrupt { channel } => self.signals.unbind_interrupt(vm, channel.0),
            Action::RaiseInterrupt { channel, vp } => self.partition.raise_event(vp, channel.0)?,
            Action::SendToServer {
                device,
                generation,
                message,
            } => return Ok(self.send(device, generation, &message)),
            Action::SetDeadline { id, ms } => {
                let after = Duration::from_millis(u64::from(ms));
                self.timers.set(Alarm::Bus(id), after).map_err(timer_error)?;
            }
            Action::ClearDeadline { id } => self.timers.clear(Alarm::Bus(id)).map_err(timer_error)?,
            Action::ReportSlow {
                device,
                generation,
                waiting_for,
            } => {
                let device = device.0;
                self.links.report(&VcpuToSupervisor::ServerSlow {
                    device,
                    generation,
                    waiting_for,
                });
            }
            Action::Misbehaves {
                device,
                generation,
                why,
            } => {
                self.links.disconnect(device, generation);
                let device = device.0;
                self.links.report(&VcpuToSupervisor::ServerMisbehaves {
                    device,
                    generation,
                    why,
                });
            }
            Action::QuiesceDone { token } => {
                self.quiesced = Some(token);
                self.attention.signal();
            }
            Action::Log {
                level: LogLevel::Warn,
                text,
            } => tracing::warn!("{text}"),
            Action::Log {
                level: LogLevel::Info,
                text,
            } => tracing::info!("{text}"),
            Action::Log {
                level: LogLevel::Debug,
                text,
            } => tracing::debug!("{text}"),
        }
        Ok(Vec::new())
    }

    fn send(&mut self, device: DeviceId, generation: u32, message: &VcpuToServer) -> Vec<Action> {
        let channel_fds;
        let ram_fds: [BorrowedFd<'_>; 2];
        let fds: &[BorrowedFd<'_>] = match message {
            VcpuToServer::Attach { .. } => {
                ram_fds = [self.memory.fd(), self.pages.siefp_fd()];
                &ram_fds
            }
            VcpuToServer::OpenChannel { channel, .. } => match self.signals.descriptors(*channel) {
                Some(descriptors) => {
                    channel_fds = descriptors;
                    &channel_fds
                }
                None => &[],
            },
            _ => &[],
        };
        match self.links.send(device, generation, message, fds) {
            Ok(()) => Vec::new(),
            Err(error) => {
                self.links.disconnect(device, generation);
                self.bus.server_lost(device, generation, &error.to_string())
            }
        }
    }

    fn post(&mut self, message: &PostMessage) -> Status {
        if self.partition.is_full() {
            return Status::InsufficientBuffers;
        }
        let (status, actions) =
            self.bus
                .on_post_message(message.connection_id, message.message_type, message.payload());
        self.execute(actions);
        match status {
            crate::bus::PostStatus::Success => Status::Success,
            crate::bus::PostStatus::InvalidConnectionId => Status::InvalidConnectionId,
        }
    }

    /// Copies a parameter block, once, into private memory.
    fn copy_in(&self, gpa: u64, block: &mut [u8]) -> Result<(), Status> {
        self.memory
            .memory()
            .read_slice(block, GuestAddress(gpa))
            .map_err(|_| Status::InvalidParameter)
    }

    fn schedule_slots(&mut self) {
        let result = match self.partition.retry_delay_ms() {
            Some(ms) => self.timers.ensure(Alarm::Slots, Duration::from_millis(ms)),
            None => self.timers.clear(Alarm::Slots),
        };
        if let Err(error) = result {
            self.fail(&timer_error(error));
        }
    }
}

fn timer_error(error: std::io::Error) -> KvmError {
    KvmError::host("set a timer", error)
}
