//! A machine with one vCPU, and who plays the processes around it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::{BusToVcpu, PeerFault, Socket, VcpuToBus, pair};
use vmbus::mem::RamLayout;
use vmbus::wire::Guid;

use super::super::control::Source;
use super::super::gate::{Gate, Wanted};
use super::super::machine::Machine;
use super::super::partition::{Pages, Partition};
use super::super::processor::{self, Ending, Shared};
use super::super::slot_timer::SlotTimer;
use super::code::*;
use crate::bus::{Action, Bus, DeviceId, DeviceOffer};
use crate::child::{Link, wait_for};
use crate::hyperv::reference_tsc::ReferenceClock;
use crate::kvm::{Event, GuestMapping, Kick, Kvm, Vcpu, Vm, install_kick_handler};
use crate::pc::boot;
use crate::pc::memory_map::{CODE_SELECTOR, GDT, PAGE_TABLES};
use crate::pc::serial::{COM1_GSI, Console, Output};

/// Says why a test cannot run here, past the harness's capture, as `cargo xtask test` counts it.
pub(super) fn skip(reason: &str) {
    let thread = thread::current();
    let line = format!("\nSKIP {}: {reason}\n", thread.name().unwrap_or("a test"));
    let written = std::io::stderr().write_all(line.as_bytes());
    written.expect("standard error is open");
}

/// `None`, said loudly, where there is no KVM.
pub(super) fn kvm() -> Option<Kvm> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(Kvm::new(OwnedFd::from(file)).expect("a KVM that can run bulkhead")),
        Err(error) => {
            skip(&format!("/dev/kvm cannot be opened: {error}"));
            None
        }
    }
}

/// A machine with one vCPU.
pub(super) struct Bench {
    pub shared: Arc<Shared>,
    pub memory: Arc<GuestMapping>,
    output: Arc<Output>,
    pub supervisor: Socket,
    /// The end of `bulkhead-bus`.
    pub bus: Option<Socket>,
    vcpu: Option<Vcpu>,
    pub thread: Option<(JoinHandle<()>, Sender<Vcpu>)>,
    attention: Event,
}

impl Bench {
    /// `None`, said loudly, where there is no KVM.
    pub(super) fn new() -> Option<Self> {
        let kvm = kvm()?;
        install_kick_handler().expect("signal handler");
        let layout = RamLayout::for_size(MEMORY_BYTES);
        let memory = Arc::new(GuestMapping::new(layout).expect("memory"));
        let pages = Arc::new(Pages::new(1).expect("pages"));
        let vm = Vm::new(&kvm, memory.clone()).expect("VM");
        let event = || Event::new().expect("eventfd");
        let (interrupt, attention) = (event(), event());
        vm.bind_pin(&interrupt, COM1_GSI).expect("irqfd");
        let vcpu = vm.create_vcpus(&kvm, 1).expect("vCPU").remove(0);
        let clock =
            ReferenceClock::new(vcpu.tsc_khz().expect("TSC"), vcpu.tsc().expect("TSC")).expect("clock");
        let output = Arc::new(Output::default());
        let console = Console::new(output.clone(), interrupt.into_inner(), event().into_inner());
        let partition = Partition::new(vm, 1, memory.clone(), pages, clock);
        let (ours, theirs) = pair().expect("sockets");
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::empty()).expect("epoll"));
        let supervisor = Link::new(theirs, Source::Supervisor.token(), &epoll).expect("link");
        let (bus, theirs) = pair().expect("sockets");
        let to_bus = Link::new(theirs, Source::Bus.token(), &epoll).expect("link");
        let slot_timer = SlotTimer::new().expect("timer");
        let clone = || attention.try_clone().expect("dup");
        let links = (supervisor, to_bus);
        let machine = Machine::new(partition, links, slot_timer, memory.clone(), clone());
        let shared = Arc::new(Shared::new(machine, console, Gate::new(clone()), clone(), 1));
        let supervisor = Socket::new(ours);
        let (vcpu, thread) = (Some(vcpu), None);
        Some(Self {
            shared,
            memory,
            output,
            supervisor,
            bus: Some(Socket::new(bus)),
            vcpu,
            thread,
            attention,
        })
    }

    pub(super) fn start(&mut self, code: Code) {
        let memory = self.memory.memory();
        let tables = memory.write_slice(&boot::page_tables(), GuestAddress(PAGE_TABLES));
        tables.expect("page tables");
        memory.write_slice(&boot::gdt(), GuestAddress(GDT)).expect("GDT");
        let code = Code::default().set(RSP, STACK).bytes(&code.power_off()).0;
        memory.write_slice(&code, GuestAddress(CODE)).expect("code");
        self.write_interrupt_table();
        let vcpu = self.vcpu.take().expect("started once");
        vcpu.enter_kernel(CODE, 0).expect("registers");
        let (sender, receiver): (Sender<Vcpu>, Receiver<Vcpu>) = channel();
        let shared = self.shared.clone();
        self.shared.gate.expect(1);
        self.shared.gate.set(Wanted::Run);
        let thread = thread::spawn(move || processor::run(&shared, &receiver));
        sender.send(vcpu).expect("the thread waits");
        self.thread = Some((thread, sender));
    }

    /// Answers the guest's messages as `bulkhead-bus` with these devices does, for as long as there is a machine.
    pub(super) fn play_bus(&mut self, devices: u8) {
        let mut bus = Bus::new(1, RamLayout::for_size(MEMORY_BYTES));
        for number in 0..devices {
            let offer = DeviceOffer {
                interface: Guid([1; 16]),
                instance: Guid([number; 16]),
                max_sub_channels: 0,
            };
            bus.add_device(DeviceId(u32::from(number)), offer).expect("added");
        }
        let mut socket = self.bus.take().expect("played once");
        let shared = Arc::downgrade(&self.shared);
        thread::spawn(move || {
            loop {
                let message = match wait_for::<VcpuToBus>(&mut socket) {
                    Ok((message, _)) => message,
                    Err(error) if error.downcast_ref() == Some(&PeerFault::Eof) => return,
                    Err(error) => panic!("{error}"),
                };
                let VcpuToBus::Post {
                    connection_id,
                    message_type,
                    payload,
                } = message
                else {
                    panic!("{message:?}")
                };
                let (_, actions) = bus.on_post_message(connection_id, message_type, &payload);
                for action in actions {
                    if let Action::PostToGuest { vp, message } = action {
                        let payload = message.emit().as_bytes().to_vec();
                        let post = BusToVcpu::PostToGuest { vp, payload };
                        socket.send(&post, &[]).expect("sent");
                    }
                }
                socket.send(&BusToVcpu::Posted, &[]).expect("sent");
                // In the place of the control thread.
                if let Some(shared) = shared.upgrade() {
                    shared.machine().on_bus(usize::MAX);
                }
            }
        });
    }

    /// What `bulkhead-bus` says, in an order that it must not be believed in.
    pub(super) fn hear_from_bus(
        &mut self,
        message: &BusToVcpu,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Option<String> {
        let socket = self.bus.as_mut().expect("not played");
        socket.send(message, fds).expect("sent");
        let mut machine = self.shared.machine();
        machine.on_bus(1);
        machine.failure.take()
    }

    /// Waits for the guest's end.
    pub(super) fn finish(&mut self) -> Ending {
        use nix::poll::{PollFd, PollFlags, poll};
        use std::os::fd::AsFd;
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.shared.gate.is_empty() {
            let rest = deadline
                .saturating_duration_since(std::time::Instant::now())
                .as_millis() as u16;
            assert!(rest > 0, "the guest hangs; exits: {:?}", self.exits());
            poll(
                &mut [PollFd::new(self.attention.as_fd(), PollFlags::POLLIN)],
                rest,
            )
            .expect("polls");
            self.attention.drain();
        }
        self.shared.take_ending().expect("the guest ended itself")
    }

    pub(super) fn run(&mut self, code: Code) -> Ending {
        self.start(code);
        self.finish()
    }

    /// Waits until the guest says this byte.
    pub(super) fn hear(&self, byte: u8) {
        assert_eq!(self.output.take(), Some(vec![byte]));
    }

    pub(super) fn say(&self) {
        self.shared.console().offer_input(b"!");
    }

    pub(super) fn result(&self, index: u64) -> u64 {
        self.memory
            .memory()
            .read_obj(GuestAddress(RESULTS + index * 8))
            .expect("in RAM")
    }

    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(gpa))
            .expect("in RAM");
    }

    pub(super) fn exits(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters[0]
            .iter()
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub(super) fn exits_of(&self, kind: &str) -> u64 {
        self.exits()
            .iter()
            .find(|(name, _)| *name == kind)
            .map_or(0, |(_, count)| *count)
    }

    /// One gate, for [`VECTOR`]: 64-bit interrupt gate, present, selector of the boot code segment.
    pub(super) fn write_interrupt_table(&self) {
        let at = STACK;
        self.write(at, &handler());
        let mut gate = [0u8; 16];
        gate[0..2].copy_from_slice(&(at as u16).to_le_bytes());
        gate[2..4].copy_from_slice(&CODE_SELECTOR.to_le_bytes());
        gate[5] = 0x8E;
        gate[6..8].copy_from_slice(&((at >> 16) as u16).to_le_bytes());
        self.write(IDT + u64::from(VECTOR) * 16, &gate);
        self.write(IDT_POINTER, &0xFFFu16.to_le_bytes());
        self.write(IDT_POINTER + 2, &IDT.to_le_bytes());
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.shared.gate.set(Wanted::Stop);
        if let Some((thread, sender)) = self.thread.take() {
            thread.kick();
            drop(sender);
            thread.join().ok();
        }
    }
}
