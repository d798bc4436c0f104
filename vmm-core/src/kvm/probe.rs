#![forbid(unsafe_code)]
//! How fast this KVM runs a guest kernel.
//!
//! A /dev/kvm may exist, have every capability, and still be of no use for Linux: a software KVM emulates code of
//! guest ring 0 instruction by instruction. Neither a capability nor a name tells; the clock does.
//!
//! The guest is four instructions in 64-bit mode, ring 0, paging on, as a kernel runs:
//!
//! ```text
//!   again: in   eax, 0x80     exit to user space, which answers with a number of rounds
//!   round: dec  eax
//!          jnz  round
//!          jmp  again
//! ```
//!
//! So the time from one exit to the next is that of the rounds plus that of one exit, and the host chooses the
//! rounds: one, to learn what an exit costs; then twice as many each time, until they take long enough to be measured.
//!
//! Time is the processor time of the vCPU's thread: a busy host is no slow KVM.
//!
//! The vCPU runs on a thread of its own, which the caller kicks out of KVM_RUN when the time is over.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};
use vmbus::mem::RamLayout;

use super::{Exit, GuestMapping, Kick, Kvm, KvmError, RunningVcpu, Vcpu, Vm, install_kick_handler};
use crate::pc::boot::page_tables;
use crate::pc::memory_map::{BOOT_PARAMS, HIGH_MEMORY, PAGE_TABLES};

/// Limit: a Linux kernel executes about two thousand million instructions until its first program runs, which takes
/// less than two minutes at this rate. KVM on hardware is a hundred times faster, in an emulated machine five to ten
/// times; a software KVM is forty times slower.
pub const BOOT_INSTRUCTIONS_PER_SECOND: f64 = 20e6;

/// Where the guest's program is. RAM ends 1 MiB above.
const PROGRAM_GPA: u64 = HIGH_MEMORY;
const PROGRAM: [u8; 8] = [0xE5, PORT as u8, 0xFF, 0xC8, 0x75, 0xFC, 0xEB, 0xF8];
/// The BIOS's diagnostic port: none of KVM's in-kernel devices answers there.
const PORT: u16 = 0x80;
const RAM_BYTES: u64 = HIGH_MEMORY + (1 << 20);

/// Exits whose mean is the price of one.
const EXITS: u32 = 200;
/// Rounds of the first attempt.
const FIRST_ROUNDS: u32 = 250;
/// Rounds that take this much processor time are measured well enough.
const LONG_ENOUGH: Duration = Duration::from_millis(10);
/// Limit: for everything that the guest executes.
const TIME: Duration = Duration::from_millis(800);
/// Limit: from the end of that time until a kicked vCPU has stopped.
const TIME_TO_STOP: Duration = Duration::from_millis(400);

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct KvmSpeed {
    /// Simple instructions in guest ring 0.
    pub instructions_per_second: f64,
    /// One exit to user space by an IN, in microseconds of processor time, there and back.
    pub exit_us: f64,
}

impl KvmSpeed {
    /// Whether Linux comes up in a time that a person would wait.
    pub fn boots_linux(&self) -> bool {
        self.instructions_per_second >= BOOT_INSTRUCTIONS_PER_SECOND
    }
}

/// Makes a VM of 2 MiB and measures. Takes about 0.1 s, and never more than 1.3 s.
///
/// Installs the handler of the vCPU signal.
pub fn measure(device: OwnedFd) -> Result<KvmSpeed, KvmError> {
    install_kick_handler()?;
    let kvm = Kvm::new(device)?;
    let memory = Arc::new(GuestMapping::new(RamLayout::for_size(RAM_BYTES))?);
    load(&memory).map_err(|error| KvmError::host("write the test program", error))?;
    let vm = Vm::new(&kvm, memory)?;
    let vcpu = vm
        .create_vcpus(&kvm, 1)?
        .pop()
        .ok_or_else(|| failed("KVM made no vCPU"))?;
    vcpu.enter_kernel(PROGRAM_GPA, BOOT_PARAMS)?;
    run_with_deadline(vm, vcpu)
}

fn load(memory: &GuestMapping) -> io::Result<()> {
    let memory = memory.memory();
    memory
        .write_slice(&page_tables(), GuestAddress(PAGE_TABLES))
        .map_err(io::Error::other)?;
    memory
        .write_slice(&PROGRAM, GuestAddress(PROGRAM_GPA))
        .map_err(io::Error::other)
}

/// The thread owns the VM, so that nothing of it goes away under a vCPU that does not stop.
fn run_with_deadline(vm: Vm, vcpu: Vcpu) -> Result<KvmSpeed, KvmError> {
    let deadline = Instant::now() + TIME;
    let (sender, receiver) = sync_channel(1);
    let thread = thread::Builder::new().name("probe".to_owned()).spawn(move || {
        let mut guest = Guest {
            vcpu: vcpu.into_running(),
            deadline,
        };
        // The receiver waits no longer than its limits; then nobody wants to know.
        sender.send(guest.measure()).ok();
        drop(guest);
        drop(vm);
    });
    let thread = thread.map_err(|error| KvmError::host("start a vCPU thread", error))?;
    let mut patience = TIME;
    loop {
        match receiver.recv_timeout(patience) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline + TIME_TO_STOP => {
                thread.kick();
                patience = Duration::from_millis(20);
            }
            Err(RecvTimeoutError::Timeout) => return Err(failed("a vCPU does not stop")),
            Err(RecvTimeoutError::Disconnected) => return Err(failed("the vCPU thread ended")),
        }
    }
}

struct Guest {
    vcpu: RunningVcpu,
    deadline: Instant,
}

impl Guest {
    fn measure(&mut self) -> Result<KvmSpeed, KvmError> {
        // To the first exit.
        self.run(1)?;
        let mut exits = Duration::ZERO;
        for _ in 0..EXITS {
            exits += self.run(1)?.ok_or_else(too_slow)?;
        }
        let (rounds, took) = self.longest_rounds()?.ok_or_else(too_slow)?;
        Ok(speed(rounds, took, exits / EXITS))
    }

    /// The largest number of rounds for which there was time, and how long they took; the better time of two, if
    /// that was long enough.
    fn longest_rounds(&mut self) -> Result<Option<(u32, Duration)>, KvmError> {
        let mut longest = None;
        let mut rounds = FIRST_ROUNDS;
        self.run(rounds)?;
        loop {
            let next = rounds.saturating_mul(2);
            // What was answered before is what takes its time now.
            let Some(took) = self.run(next)? else {
                return Ok(longest);
            };
            longest = Some((rounds, took));
            if took >= LONG_ENOUGH || next == u32::MAX {
                break;
            }
            rounds = next;
        }
        // The answer to the last run still counts.
        self.run(rounds)?;
        let again = self.run(1)?;
        Ok(longest.map(|(rounds, took)| (rounds, again.map_or(took, |again| again.min(took)))))
    }

    /// Runs until the guest asks for a number of rounds, and answers; returns how long that took, or None if the
    /// time for all is over.
    fn run(&mut self, rounds: u32) -> Result<Option<Duration>, KvmError> {
        let start = processor_time()?;
        while Instant::now() < self.deadline {
            match self.vcpu.run() {
                Exit::PortRead { port: PORT, data, .. } if data.len() == 4 => {
                    data.copy_from_slice(&rounds.to_le_bytes());
                    return Ok(Some(processor_time()?.saturating_sub(start)));
                }
                Exit::Interrupted => {}
                Exit::Fault(why) => return Err(failed(why)),
                other => return Err(failed(format!("a test program ran astray: {other:?}"))),
            }
        }
        Ok(None)
    }
}

/// What this thread has used, its guest included: on a busy host the clock on the wall says little.
fn processor_time() -> Result<Duration, KvmError> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.map(Duration::from)
        .map_err(|errno| KvmError::host("read the processor time", errno.into()))
}

fn too_slow() -> KvmError {
    failed("the guest does not get ahead")
}

/// Two instructions a round, and the two around them.
fn speed(rounds: u32, took: Duration, exit: Duration) -> KvmSpeed {
    let instructions = f64::from(rounds) * 2.0 + 2.0;
    // If rounds took no longer than the exit, the time was too short to say more than this.
    let net = took.saturating_sub(exit).max(Duration::from_nanos(1));
    KvmSpeed {
        instructions_per_second: instructions / net.as_secs_f64(),
        exit_us: exit.as_secs_f64() * 1e6,
    }
}

fn failed(why: impl Into<String>) -> KvmError {
    KvmError::host("run a test program", io::Error::other(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_of_the_exit_is_not_counted_as_instructions() {
        let found = speed(499_999, Duration::from_micros(1100), Duration::from_micros(100));
        assert!(
            (found.instructions_per_second / 1e9 - 1.0).abs() < 1e-6,
            "{found:?}"
        );
        assert!((found.exit_us - 100.0).abs() < 1e-6);
        assert!(found.boots_linux());
        let nothing = speed(1, Duration::from_micros(1), Duration::from_micros(2));
        assert!(nothing.instructions_per_second.is_finite());
    }

    #[test]
    fn half_a_million_instructions_a_second_boot_no_linux() {
        let emulated = speed(10_000, Duration::from_millis(40), Duration::from_micros(12));
        assert!(!emulated.boots_linux(), "{emulated:?}");
    }

    #[test]
    fn what_is_no_kvm_device_is_refused() {
        let null = std::fs::File::open("/dev/null").expect("opens");
        let error = measure(null.into()).expect_err("refused");
        assert_eq!(error.to_string(), "cannot use /dev/kvm: it is no KVM device");
    }
}
