//! The whole of it but sandbox and sockets, on the real /dev/kvm, with guests of a few dozen instructions.
//!
//! A test writes its guest with [`Code`], starts it, talks with it by the serial port, and looks at what it left in
//! memory. Guests end by switching off. The instructions are ones that a software KVM can emulate at ring 0.

mod bench;
mod bus;
mod code;

use std::thread;

use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::VcpuToSupervisor;

use super::gate::Wanted;
use super::processor::Ending;
use crate::hyperv::hypercall::signal_connection;
use crate::hyperv::hypercall_page::SIGNAL_PORT;
use crate::hyperv::msr;
use crate::kvm::{Event, Kick};
use bench::Bench;
use code::*;

#[test]
fn a_guest_that_switches_off_ends_with_power_off() {
    let Some(mut bench) = Bench::new() else { return };
    assert_eq!(bench.run(Code::default()), Ending::PowerOff);
}

#[test]
fn a_triple_fault_and_the_reset_port_end_with_reset() {
    // ud2 without an IDT.
    for code in [
        Code::default().bytes(&[0x0F, 0x0B]),
        Code::default().out(0x602, 1),
    ] {
        let Some(mut bench) = Bench::new() else { return };
        bench
            .memory
            .memory()
            .write_obj(0u64, GuestAddress(IDT))
            .expect("in RAM");
        assert_eq!(bench.run(code), Ending::Reset);
    }
}

#[test]
fn the_probe_for_pci_finds_nothing_and_resets_nothing() {
    let Some(mut bench) = Bench::new() else { return };
    // mov eax, -1; mov edx, 0xcf8; out dx, eax; in eax, dx
    let code = Code::default()
        .set(RAX, u64::MAX)
        .set(RDX, 0xCF8)
        .bytes(&[0xEF, 0xED])
        .store_rax(RESULTS);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0xFFFF_FFFF);
}

#[test]
fn synthetic_msrs_are_answered_and_others_fault() {
    let Some(mut bench) = Bench::new() else { return };
    let code = Code::default()
        .rdmsr(msr::VP_INDEX)
        .store_rax(RESULTS)
        .rdmsr(msr::APIC_FREQUENCY)
        .store_rax(RESULTS + 8)
        .rdmsr(msr::TIME_REF_COUNT)
        .store_rax(RESULTS + 16)
        .rdmsr(msr::TIME_REF_COUNT)
        .store_rax(RESULTS + 24)
        // No handler for #GP: a triple fault.
        .rdmsr(0x4000_0118);
    assert_eq!(bench.run(code), Ending::Reset);
    assert_eq!((bench.result(0), bench.result(1)), (0, 1_000_000_000));
    let (first, second) = (bench.result(2), bench.result(3));
    assert!(
        first > 0 && first < second && second < 600_000_000,
        "100 ns units since power-on: {first}, {second}"
    );
}

#[test]
fn overlays_show_and_go_and_ram_comes_back() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write(SIMP, &0x1234_5678u64.to_le_bytes());
    let code = Code::default()
        .wrmsr(msr::SIMP, SIMP | 1)
        .load_rax(SIMP)
        .store_rax(RESULTS)
        .store(SIMP, 0x55)
        .wrmsr(msr::SIMP, SIMP)
        .load_rax(SIMP)
        .store_rax(RESULTS + 8)
        .wrmsr(msr::SIMP, SIMP | 1)
        .load_rax(SIMP)
        .store_rax(RESULTS + 16)
        .wrmsr(msr::REFERENCE_TSC, TSC_PAGE | 1)
        .load_rax(TSC_PAGE)
        .store_rax(RESULTS + 24);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0, "a fresh message page");
    assert_eq!(
        bench.result(1),
        0x1234_5678,
        "RAM, untouched by what was written to the overlay"
    );
    assert_eq!(bench.result(2), 0, "fresh again");
    assert_eq!(bench.result(3), 1, "the TSC page has a valid sequence");
}

#[test]
fn the_hypercall_page_reports_each_status_and_keeps_registers() {
    let Some(mut bench) = Bench::new() else { return };
    // mov rbx, …; and back into rax.
    let code = Code::default()
        .enable_hypercalls()
        .set(3, 0xB0B)
        .hypercall(0x46, 0)
        .store_rax(RESULTS)
        .hypercall(0x5C, 0x1004)
        .store_rax(RESULTS + 8)
        .hypercall(0x1_005D, 0x2001)
        .store_rax(RESULTS + 16)
        .hypercall(0x1_005D, 1 << 32)
        .store_rax(RESULTS + 24)
        .bytes(&[0x48, 0x89, 0xD8])
        .store_rax(RESULTS + 32);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0x02, "unknown call");
    assert_eq!(bench.result(1), 0x04, "misaligned block");
    assert_eq!(
        bench.result(2),
        0x12,
        "a signal for no channel takes the slow path"
    );
    assert_eq!(bench.result(3), 0x05, "a flag number takes the slow port");
    assert_eq!(bench.result(4), 0xB0B, "RBX is the caller's");
    assert_eq!(
        (bench.exits_of("hypercall"), bench.exits_of("signal_miss")),
        (3, 1)
    );
}

#[test]
fn a_signal_of_a_bound_channel_writes_its_eventfd_without_an_exit() {
    let Some(mut bench) = Bench::new() else { return };
    let event = Event::new().expect("eventfd");
    let id = signal_connection(7);
    bench
        .shared
        .machine()
        .partition
        .vm
        .bind_signal(&event, id)
        .expect("bound");
    let code = Code::default()
        .enable_hypercalls()
        .hypercall(0x1_005D, u64::from(id))
        .store_rax(RESULTS);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert!(event.drain());
    assert_eq!((bench.result(0), bench.exits_of("signal_miss")), (0, 0));
}

#[test]
fn a_string_of_signals_is_no_signal() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write(BLOCK, &[1, 0, 0, 0, 2, 0, 0, 0]);
    // mov rsi, BLOCK; mov ecx, 2; mov edx, port; rep outsd
    let code = Code::default()
        .set(6, BLOCK)
        .set(RCX, 2)
        .set(RDX, u64::from(SIGNAL_PORT))
        .bytes(&[0xF3, 0x6F]);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert!(bench.exits_of("signal_miss") >= 1);
}

#[test]
fn an_irqfd_of_the_vp_raises_the_vector_of_its_sint() {
    let Some(mut bench) = Bench::new() else { return };
    let event = Event::new().expect("eventfd");
    bench
        .shared
        .machine()
        .partition
        .vm
        .bind_vp_interrupt(&event, 0)
        .expect("bound");
    bench.start(
        Code::default()
            .enable_interrupts()
            .enable_synic()
            .say(b'r')
            .wait_for_interrupt()
            .wait_for_interrupt(),
    );
    bench.hear(b'r');
    // The first interrupt may be the one that every change of a SINT raises.
    event.signal();
    while bench.result(0) < 2 && !bench.shared.gate.is_empty() {
        event.signal();
        thread::yield_now();
    }
    assert_eq!(bench.finish(), Ending::PowerOff);
}

#[test]
fn a_masked_sint_gets_nothing_and_is_raised_once_when_unmasked() {
    let Some(mut bench) = Bench::new() else { return };
    let event = Event::new().expect("eventfd");
    bench
        .shared
        .machine()
        .partition
        .vm
        .bind_vp_interrupt(&event, 0)
        .expect("bound");
    let masked = u64::from(VECTOR) | 1 << 16;
    bench.start(
        Code::default()
            .enable_interrupts()
            .wrmsr(msr::SCONTROL, 1)
            .wrmsr(msr::SINT0 + 2, masked)
            .say(b'm')
            .wait_for_input()
            // sti; nop; cli: whatever is pending is taken here.
            .bytes(&[0xFB, 0x90, 0x90, 0xFA])
            .load_rax(RESULTS)
            .store_rax(RESULTS + 8)
            .wrmsr(msr::SINT0 + 2, u64::from(VECTOR))
            .wait_for_interrupt(),
    );
    bench.hear(b'm');
    event.signal();
    bench.say();
    assert_eq!(bench.finish(), Ending::PowerOff);
    assert_eq!(bench.result(1), 0, "lost while masked");
    assert_eq!(bench.result(0), 1, "made good when unmasked");
}

#[test]
fn a_crash_is_reported_with_the_guest_s_text() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write(BLOCK, b"Kernel panic\x1b[2J - not syncing\n");
    let code = Code::default()
        .wrmsr(msr::CRASH_P0 + 3, BLOCK)
        .wrmsr(msr::CRASH_P4, 31)
        .wrmsr(msr::CRASH_CTL, 3 << 62);
    assert_eq!(bench.run(code), Ending::PowerOff);
    let (message, _) = bench
        .supervisor
        .recv::<VcpuToSupervisor>()
        .expect("a message")
        .expect("at once");
    let VcpuToSupervisor::GuestCrash { parameters, text } = message else {
        panic!("{message:?}")
    };
    assert_eq!((parameters[3], parameters[4]), (BLOCK, 31));
    assert_eq!(
        text.as_deref(),
        Some("Kernel panic[2J - not syncing\n"),
        "no escape for the operator's terminal"
    );
}

#[test]
fn a_guest_that_crashes_without_end_leaves_room_for_the_last_words() {
    let Some(mut bench) = Bench::new() else { return };
    for _ in 0..2 * vmbus::ipc::socket::MAX_QUEUED_MESSAGES {
        let written = bench.shared.machine().write_msr(0, msr::CRASH_CTL, 3 << 62);
        assert!(written.is_ok());
    }
    let cause = vmbus::ipc::ExitCause::PowerOff;
    let shared = bench.shared.clone();
    shared.machine().report(&VcpuToSupervisor::Exited { cause });
    // Nobody reads: it does not wait for ever.
    shared.machine().supervisor.drain(std::time::Duration::ZERO);
    let draining = thread::spawn(move || shared.machine().supervisor.drain(PATIENCE));
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut crashes = 0;
    loop {
        assert!(
            std::time::Instant::now() < deadline,
            "no last word after {crashes} crashes"
        );
        match bench.supervisor.recv::<VcpuToSupervisor>().expect("it speaks") {
            Some((VcpuToSupervisor::GuestCrash { .. }, _)) => crashes += 1,
            Some((VcpuToSupervisor::Exited { .. }, _)) => break,
            Some((other, _)) => panic!("{other:?}"),
            None => thread::yield_now(),
        }
    }
    draining.join().expect("it returns");
    assert!(crashes > 0);
}

#[test]
fn a_guest_that_only_spins_can_be_stopped() {
    let Some(mut bench) = Bench::new() else { return };
    // jmp to itself, behind a word to us.
    bench.start(Code::default().say(b's').bytes(&[0xEB, 0xFE]));
    bench.hear(b's');
    bench.shared.gate.set(Wanted::Stop);
    if let Some((thread, _)) = &bench.thread {
        thread.kick();
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    while !bench.shared.gate.is_empty() {
        assert!(std::time::Instant::now() < deadline, "the kick was lost");
        thread::yield_now();
    }
    assert_eq!(bench.shared.take_ending(), None);
}

#[test]
fn a_guest_that_writes_over_its_hypercall_page_harms_only_itself() {
    let Some(mut bench) = Bench::new() else { return };
    let code = Code::default()
        .enable_hypercalls()
        .store(HYPERCALL_PAGE, 0xC3)
        .set(RAX, HYPERCALL_PAGE)
        .bytes(&[0xFF, 0xD0])
        // Enabled anew, the page is what it was.
        .wrmsr(msr::HYPERCALL, HYPERCALL_PAGE)
        .wrmsr(msr::HYPERCALL, HYPERCALL_PAGE | 1)
        .hypercall(0x46, 0)
        .store_rax(RESULTS);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0x02);
}
