#![forbid(unsafe_code)]
//! A vCPU thread: runs the guest, and answers its exits.
//!
//! The thread lives as long as the process. At each power-on it is given a vCPU; when the gate says stop, it drops
//! the vCPU and waits for the next one. It takes one lock at a time and waits for no other process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::gate::Gate;
use super::machine::Machine;
use crate::hyperv::hypercall::Status;
use crate::hyperv::hypercall_page::{SIGNAL_PORT, SLOW_PORT};
use crate::kvm::{Event, Exit, RunningVcpu, Vcpu};
use crate::pc::clock::{self, Clock};
use crate::pc::ports::{self, Power};
use crate::pc::serial::Console;

/// Why the guest stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    Reset,
    Fault(String),
}

/// What all threads share.
pub struct Shared {
    machine: Mutex<Machine>,
    console: Mutex<Console>,
    clock: Mutex<Clock>,
    pub gate: Gate,
    ending: Mutex<Option<Ending>>,
    pub attention: Event,
    pub counters: Vec<ExitCounters>,
}

impl Shared {
    pub fn new(machine: Machine, console: Console, gate: Gate, attention: Event, vp_count: u16) -> Self {
        let counters = (0..vp_count).map(|_| ExitCounters::default()).collect();
        let ending = Mutex::new(None);
        Self {
            machine: Mutex::new(machine),
            console: Mutex::new(console),
            clock: Mutex::default(),
            gate,
            ending,
            attention,
            counters,
        }
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has stopped itself. The first reason counts.
    pub fn end(&self, ending: Ending) {
        self.ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(ending);
        self.attention.signal();
    }

    /// Takes the reason, if there is one.
    pub fn take_ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Exits to user space of one vCPU, by kind. Written by its thread, read by whoever inspects.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; Kind::NAMES.len()]);

#[derive(Clone, Copy)]
enum Kind {
    Console,
    Port,
    Hypercall,
    SignalMiss,
    ReadMsr,
    WriteMsr,
    Mmio,
    Interrupted,
}

impl Kind {
    const NAMES: [&'static str; 8] = [
        "console",
        "port",
        "hypercall",
        "signal_miss",
        "read_msr",
        "write_msr",
        "mmio",
        "interrupted",
    ];
}

impl ExitCounters {
    fn count(&self, kind: Kind) {
        if let Some(counter) = self.0.get(kind as usize) {
            // Ordering: a statistic.
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Name and count of each kind.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        // Ordering: a statistic.
        Kind::NAMES
            .into_iter()
            .zip(self.0.iter().map(|counter| counter.load(Ordering::Relaxed)))
    }
}

/// The thread's body.
pub fn run(shared: &Arc<Shared>, vcpus: &Receiver<Vcpu>) {
    while let Ok(vcpu) = vcpus.recv() {
        let index = vcpu.index();
        let mut vcpu = vcpu.into_running();
        if let Some(ending) = run_guest(shared, index, &mut vcpu) {
            shared.end(ending);
        }
        drop(vcpu);
        shared.gate.leave();
    }
}

/// Runs the guest until this vCPU ends it, or the gate says stop: `None`.
fn run_guest(shared: &Shared, index: u16, vcpu: &mut RunningVcpu) -> Option<Ending> {
    let counters = shared.counters.get(usize::from(index))?;
    loop {
        vcpu.clear_kick();
        if !shared.gate.pass() {
            return None;
        }
        match on_exit(shared, counters, vcpu.run()) {
            Next::Enter => {}
            Next::End(ending) => return Some(ending),
            Next::ReadMsr(msr) => {
                let read = shared.machine().read_msr(index, msr, || vcpu.tsc().unwrap_or(0));
                match read {
                    Ok(value) => vcpu.answer_msr(value),
                    Err(_) => vcpu.fault_msr(),
                }
            }
            Next::WriteMsr(msr, value) => {
                let written = shared.machine().write_msr(index, msr, value);
                if written.is_err() {
                    vcpu.fault_msr();
                }
            }
            Next::NoSuchConnection => vcpu.set_r9(Status::InvalidConnectionId as u64),
        }
    }
}

/// What is to be done when the exit's data has been dealt with.
enum Next {
    Enter,
    End(Ending),
    ReadMsr(u32),
    WriteMsr(u32, u64),
    NoSuchConnection,
}

fn on_exit(shared: &Shared, counters: &ExitCounters, exit: Exit<'_>) -> Next {
    match exit {
        // No channel that is open has this connection id, or KVM would have taken it.
        Exit::PortWrite {
            port: SIGNAL_PORT,
            size: 4,
            ..
        } => {
            counters.count(Kind::SignalMiss);
            return Next::NoSuchConnection;
        }
        Exit::PortWrite { port, size, data } => return write_port(shared, counters, port, size, data),
        Exit::PortRead {
            port: SLOW_PORT,
            size: 4,
            data,
            registers,
        } => {
            counters.count(Kind::Hypercall);
            let answer = shared.machine().hypercall(registers);
            for chunk in data.chunks_exact_mut(4) {
                chunk.copy_from_slice(&answer.to_le_bytes());
            }
        }
        Exit::PortRead { port, size, data, .. } => read_port(shared, counters, port, size, data),
        Exit::MmioRead { data } => {
            counters.count(Kind::Mmio);
            data.fill(0xFF);
        }
        Exit::MmioWrite => counters.count(Kind::Mmio),
        Exit::ReadMsr { msr } => {
            counters.count(Kind::ReadMsr);
            return Next::ReadMsr(msr);
        }
        Exit::WriteMsr { msr, value } => {
            counters.count(Kind::WriteMsr);
            return Next::WriteMsr(msr, value);
        }
        Exit::Interrupted => counters.count(Kind::Interrupted),
        // The processor would reset itself; a PC's chip set resets it.
        Exit::Shutdown => {
            tracing::warn!("triple fault");
            return Next::End(Ending::Reset);
        }
        Exit::Fault(why) => return Next::End(Ending::Fault(why)),
    }
    Next::Enter
}

/// OUT. Devices here are one byte wide: wider accesses find nobody.
fn write_port(shared: &Shared, counters: &ExitCounters, port: u16, size: u8, data: &[u8]) -> Next {
    let is_console = Console::claims(port) && size == 1;
    counters.count(if is_console { Kind::Console } else { Kind::Port });
    if is_console {
        let mut console = shared.console();
        data.iter().for_each(|byte| console.write(port, *byte));
        return Next::Enter;
    }
    if size != 1 {
        return Next::Enter;
    }
    for byte in data {
        match (port, ports::write(port, *byte)) {
            (_, Some(Power::Off)) => return Next::End(Ending::PowerOff),
            (_, Some(Power::Reset)) => return Next::End(Ending::Reset),
            (clock::INDEX_PORT, None) => shared.clock().select(*byte),
            (_, None) => {}
        }
    }
    Next::Enter
}

/// IN, likewise.
fn read_port(shared: &Shared, counters: &ExitCounters, port: u16, size: u8, data: &mut [u8]) {
    let is_console = Console::claims(port) && size == 1;
    counters.count(if is_console { Kind::Console } else { Kind::Port });
    match port {
        _ if size != 1 => data.fill(0xFF),
        clock::DATA_PORT => data.fill(shared.clock().read(SystemTime::now())),
        _ if is_console => {
            let mut console = shared.console();
            data.iter_mut().for_each(|byte| *byte = console.read(port));
        }
        _ => data.fill(ports::read(port)),
    }
}
