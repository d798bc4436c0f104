//! What passes between the guest and `bulkhead-bus`, and what that one must not do.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmbus::ipc::{BusToVcpu, VcpuToBus};
use vmbus::mem::RamLayout;

use super::super::machine::MAX_POSTS_UNDER_WAY;
use super::super::processor::Ending;
use super::bench::{Bench, kvm, skip};
use super::code::*;
use crate::bus::offers::MAX_CHANNELS;
use crate::hyperv::hypercall::signal_connection;
use crate::hyperv::msr;
use crate::kvm::{Event, GuestMapping, Vm};

/// HvPostMessage's block with an INITIATE_CONTACT for version 5.3 and this VP.
fn initiate_contact() -> Vec<u8> {
    let mut block = vec![0; 256];
    block[0..4].copy_from_slice(&4u32.to_le_bytes());
    block[8..12].copy_from_slice(&1u32.to_le_bytes());
    block[12..16].copy_from_slice(&0x28u32.to_le_bytes());
    block[16..20].copy_from_slice(&14u32.to_le_bytes());
    block[24..28].copy_from_slice(&0x0005_0003u32.to_le_bytes());
    // Interrupt page: SINT 2, VTL 0.
    block[32] = 2;
    block
}

#[test]
fn a_contact_is_answered_through_the_message_slot() {
    let Some(mut bench) = Bench::new() else { return };
    bench.play_bus(0);
    bench.write(BLOCK, &initiate_contact());
    let code = Code::default()
        .enable_interrupts()
        .enable_hypercalls()
        .enable_synic()
        .hypercall(0x5C, BLOCK)
        .store_rax(RESULTS + 8)
        .wait_for_message()
        .wait_for_interrupt()
        // Message type and size, then the channel message's type and its version flag.
        .load_rax(SIMP + 0x200)
        .store_rax(RESULTS + 16)
        .load_rax(SIMP + 0x210)
        .store_rax(RESULTS + 24)
        .load_rax(SIMP + 0x218)
        .store_rax(RESULTS + 32);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(1), 0, "status");
    assert_eq!(bench.result(2), 0x10_0000_0001, "type 1, 16 bytes");
    assert_eq!(bench.result(3), 15, "VERSION_RESPONSE");
    assert_eq!(bench.result(4) & 0xFFFF, 1, "supported, state 0");
}

#[test]
fn a_guest_that_switches_its_local_apic_off_gets_its_messages_and_does_not_end_the_vm() {
    const APIC_BASE: u32 = 0x1B;
    let Some(mut bench) = Bench::new() else { return };
    bench.play_bus(0);
    bench.write(BLOCK, &initiate_contact());
    let code = Code::default()
        .enable_hypercalls()
        .enable_synic()
        .wrmsr(APIC_BASE, 0xFEE0_0000)
        .hypercall(0x5C, BLOCK)
        .store_rax(RESULTS)
        .wait_for_message();
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0, "status");
    assert_eq!(bench.shared.machine().failure, None);
}

/// A guest may give its local APICs other ids.
#[test]
fn an_interrupt_that_no_local_apic_takes_is_lost_and_does_not_end_the_vm() {
    let Some(kvm) = kvm() else { return };
    let memory = GuestMapping::new(RamLayout::for_size(MEMORY_BYTES)).expect("memory");
    let vm = Vm::new(&kvm, Arc::new(memory)).expect("VM");
    vm.raise(0, VECTOR).expect("lost");
}

#[test]
fn messages_follow_each_other_by_end_of_message() {
    let Some(mut bench) = Bench::new() else { return };
    bench.play_bus(2);
    bench.write(BLOCK, &initiate_contact());
    let mut request = vec![0; 256];
    request[0..4].copy_from_slice(&1u32.to_le_bytes());
    request[8..12].copy_from_slice(&1u32.to_le_bytes());
    request[12..16].copy_from_slice(&8u32.to_le_bytes());
    request[16..20].copy_from_slice(&3u32.to_le_bytes());
    bench.write(BLOCK + 0x100, &request);
    // Takes one message: remembers its type, frees the slot, says end of message. No interrupt is waited for.
    let take = |code: Code, index: u64| {
        code.wait_for_message()
            .load_rax(SIMP + 0x210)
            .store_rax(RESULTS + index * 8)
            .store(SIMP + 0x200, 0)
            .wrmsr(msr::EOM, 0)
    };
    let mut code = Code::default()
        .enable_hypercalls()
        .enable_synic()
        .hypercall(0x5C, BLOCK);
    code = take(code, 1).hypercall(0x5C, BLOCK + 0x100);
    for index in 2..5 {
        code = take(code, index);
    }
    assert_eq!(bench.run(code), Ending::PowerOff);
    let types: Vec<u64> = (1..5).map(|index| bench.result(index)).collect();
    assert_eq!(types, [15, 1, 1, 4], "version, two offers, all offers delivered");
}

#[test]
fn a_guest_that_posts_faster_than_it_is_answered_is_refused_for_lack_of_buffers() {
    let Some(mut bench) = Bench::new() else { return };
    bench.write(BLOCK, &initiate_contact());
    let mut code = Code::default().enable_hypercalls().enable_synic();
    let count = MAX_POSTS_UNDER_WAY as u64 + 2;
    for index in 0..count {
        code = code.hypercall(0x5C, BLOCK).store_rax(RESULTS + index * 8);
    }
    assert_eq!(bench.run(code), Ending::PowerOff);
    let statuses: Vec<u64> = (0..count).map(|index| bench.result(index)).collect();
    let (taken, refused) = statuses.split_at(MAX_POSTS_UNDER_WAY);
    assert!(taken.iter().all(|status| *status == 0), "{taken:?}");
    assert_eq!(refused, [0x13, 0x13]);
}

#[test]
fn a_message_to_another_port_than_vmbus_reaches_nobody() {
    let Some(mut bench) = Bench::new() else { return };
    let mut block = initiate_contact();
    block[0] = 2;
    bench.write(BLOCK, &block);
    let code = Code::default()
        .enable_hypercalls()
        .hypercall(0x5C, BLOCK)
        .store_rax(RESULTS);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.result(0), 0x12);
    let heard = bench.bus.as_mut().expect("not played").recv::<VcpuToBus>();
    assert!(matches!(heard, Ok(None)), "{heard:?}");
}

#[test]
fn a_signal_whose_input_is_in_memory_reaches_the_eventfd_of_its_channel() {
    use std::os::fd::AsFd;
    let Some(mut bench) = Bench::new() else { return };
    let kick = Event::new().expect("eventfd");
    let bind = BusToVcpu::BindSignal { channel: 7 };
    assert_eq!(bench.hear_from_bus(&bind, &[kick.as_fd()]), None);
    let mut code = Code::default().enable_hypercalls();
    // The last two name no channel that is open.
    for (index, id) in [
        signal_connection(7),
        signal_connection(8),
        signal_connection(7) | 1 << 31,
    ]
    .into_iter()
    .enumerate()
    {
        let at = index as u64 * 8;
        bench.write(BLOCK + at, &id.to_le_bytes());
        code = code.hypercall(0x5D, BLOCK + at).store_rax(RESULTS + at);
    }
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert!(kick.drain());
    assert_eq!([0, 1, 2].map(|index| bench.result(index)), [0, 0x12, 0x12]);
    assert_eq!(bench.exits_of("signal_miss"), 1);
}

/// Whether this process may have so many descriptors; if not, that is said.
fn may_have(descriptors: u64) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if maximum.is_some_and(|most| most < descriptors) {
        skip(&format!(
            "this host lets a process have fewer than {descriptors} open files"
        ));
        return false;
    }
    if current.is_some_and(|now| now < descriptors) {
        let current = Some(descriptors);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("below the hard limit");
    }
    true
}

#[test]
fn all_channels_that_a_vm_may_ever_have_are_kicked_and_interrupt_by_eventfds_of_their_own() {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;
    // Two eventfds each, which are here and there; and the other tests' descriptors.
    if !may_have(4 * u64::from(MAX_CHANNELS) + 1024) {
        return;
    }
    let Some(mut bench) = Bench::new() else { return };
    let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let kicks_of = |channel: u32| u64::from(channel % 3 + 1);
    let mut bound = Vec::new();
    let mut code = Code::default().enable_hypercalls();
    for channel in 1..=MAX_CHANNELS {
        let (kick, interrupt) = (event(), event());
        let bind = BusToVcpu::BindSignal { channel };
        assert_eq!(bench.hear_from_bus(&bind, &[kick.as_fd()]), None, "{channel}");
        let bind = BusToVcpu::BindInterrupt { channel, vp: 0 };
        assert_eq!(
            bench.hear_from_bus(&bind, &[interrupt.as_fd()]),
            None,
            "{channel}"
        );
        for _ in 0..kicks_of(channel) {
            code = code.hypercall(0x1_005D, u64::from(signal_connection(channel)));
        }
        bound.push((channel, kick, interrupt));
    }
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!(bench.exits_of("signal_miss"), 0, "each is bound");
    for (channel, kick, interrupt) in bound {
        assert_eq!(kick.read(), Ok(kicks_of(channel)), "kicks of channel {channel}");
        interrupt.write(1).expect("written");
        let left = interrupt.read();
        assert!(
            left.is_err(),
            "KVM has not taken the interrupt of channel {channel}"
        );
    }
}

#[test]
fn a_kick_that_cannot_be_written_without_waiting_keeps_no_processor_waiting() {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;
    let Some(mut bench) = Bench::new() else { return };
    // One that blocks, and is as full as it gets.
    let kick = EventFd::from_flags(EfdFlags::empty()).expect("eventfd");
    kick.write(u64::MAX - 1).expect("written");
    let bind = BusToVcpu::BindSignal { channel: 7 };
    assert_eq!(bench.hear_from_bus(&bind, &[kick.as_fd()]), None);
    bench.write(BLOCK, &signal_connection(7).to_le_bytes());
    let code = Code::default()
        .enable_hypercalls()
        .hypercall(0x5D, BLOCK)
        .store_rax(RESULTS)
        .hypercall(0x1_005D, u64::from(signal_connection(7)))
        .store_rax(RESULTS + 8);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert_eq!((bench.result(0), bench.result(1)), (0, 0));
}

fn event_fd() -> OwnedFd {
    use std::os::fd::AsFd;
    let event = Event::new().expect("eventfd");
    event.as_fd().try_clone_to_owned().expect("dup")
}

#[test]
fn what_bulkhead_bus_must_not_say_ends_the_vm_and_touches_nothing() {
    use std::os::fd::AsFd;
    let file = || OwnedFd::from(File::open("/dev/null").expect("opened"));
    let cases = [
        (BusToVcpu::RaiseInterrupt { channel: 1, vp: 1 }, None),
        (
            BusToVcpu::RaiseInterrupt {
                channel: 1,
                vp: u16::MAX,
            },
            None,
        ),
        (BusToVcpu::BindInterrupt { channel: 1, vp: 7 }, Some(event_fd())),
        (
            BusToVcpu::PostToGuest {
                vp: 0,
                payload: vec![0; 241],
            },
            None,
        ),
        (
            BusToVcpu::PostToGuest {
                vp: 1,
                payload: Vec::new(),
            },
            None,
        ),
        // No eventfd.
        (BusToVcpu::BindInterrupt { channel: 1, vp: 0 }, Some(file())),
        (BusToVcpu::BindSignal { channel: 1 }, Some(file())),
    ];
    for (message, fd) in cases {
        let Some(mut bench) = Bench::new() else { return };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        assert!(bench.hear_from_bus(&message, &fds).is_some(), "{message:?}");
    }
    let Some(mut bench) = Bench::new() else { return };
    let post = BusToVcpu::PostToGuest {
        vp: 0,
        payload: vec![0; 8],
    };
    // The guest takes none: its message page is off.
    for _ in 0..100 {
        assert_eq!(bench.hear_from_bus(&post, &[]), None);
    }
}
