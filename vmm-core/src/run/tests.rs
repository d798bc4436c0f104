//! The whole of it but sandbox and sockets, on the real /dev/kvm, with guests of a few dozen instructions.
//!
//! A test writes its guest with [`Code`], starts it, talks with it by the serial port, and looks at what it left in
//! memory. Guests end by switching off. The instructions are ones that a software KVM can emulate at ring 0.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use vm_memory::{Bytes, GuestAddress};
use vmbus::ipc::{BusToVcpu, PeerFault, Socket, VcpuToBus, VcpuToSupervisor, pair};
use vmbus::mem::RamLayout;

use super::control::Source;
use super::gate::{Gate, Wanted};
use super::machine::{MAX_POSTS_UNDER_WAY, Machine};
use super::partition::{Pages, Partition};
use super::processor::{self, Ending, Shared};
use super::slot_timer::SlotTimer;
use crate::bus::{Action, Bus, DeviceId, DeviceOffer};
use crate::child::{Link, wait_for};
use crate::hyperv::hypercall::signal_connection;
use crate::hyperv::hypercall_page::SIGNAL_PORT;
use crate::hyperv::msr;
use crate::hyperv::reference_tsc::ReferenceClock;
use crate::kvm::{Event, GuestMapping, Kick, Kvm, Vcpu, Vm, install_kick_handler};
use crate::pc::boot;
use crate::pc::memory_map::{CODE_SELECTOR, GDT, PAGE_TABLES};
use crate::pc::serial::{COM1_BASE, COM1_GSI, Console, Output};
use vmbus::wire::Guid;

const MEMORY_BYTES: u64 = 32 << 20;
/// Where the guest's code lies.
const CODE: u64 = 0x10_0000;
/// Where guests leave their results.
const RESULTS: u64 = 0x20_0000;
/// Pages for overlays.
const HYPERCALL_PAGE: u64 = 0x30_0000;
const SIMP: u64 = 0x30_1000;
const SIEFP: u64 = 0x30_2000;
const TSC_PAGE: u64 = 0x30_3000;
/// A block for slow hypercalls.
const BLOCK: u64 = 0x30_4000;
const IDT: u64 = 0x30_5000;
const IDT_POINTER: u64 = 0x30_6000;
const STACK: u64 = 0x40_0000;
const VECTOR: u8 = 0xF3;
/// A guest of a few dozen instructions that has not ended by then hangs.
const PATIENCE: Duration = Duration::from_secs(60);

// Register numbers of the instruction encoding.
const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RSP: u8 = 4;
const RDI: u8 = 7;

/// A guest's code.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// mov r64, imm64
    fn set(self, register: u8, value: u64) -> Self {
        self.bytes(&[0x48, 0xB8 + register]).bytes(&value.to_le_bytes())
    }
    /// mov [address], rax
    fn store_rax(self, address: u64) -> Self {
        self.set(RDI, address).bytes(&[0x48, 0x89, 0x07])
    }
    /// mov rax, [address]
    fn load_rax(self, address: u64) -> Self {
        self.set(RDI, address).bytes(&[0x48, 0x8B, 0x07])
    }
    /// mov dword [address], value
    fn store(self, address: u64, value: u32) -> Self {
        self.set(RAX, u64::from(value))
            .set(RDI, address)
            .bytes(&[0x89, 0x07])
    }
    fn wrmsr(self, msr: u32, value: u64) -> Self {
        self.set(RCX, u64::from(msr))
            .set(RAX, value & 0xFFFF_FFFF)
            .set(RDX, value >> 32)
            .bytes(&[0x0F, 0x30])
    }
    /// rdmsr; shl rdx, 32; or rax, rdx
    fn rdmsr(self, msr: u32) -> Self {
        self.set(RCX, u64::from(msr))
            .bytes(&[0x0F, 0x32, 0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0])
    }
    /// mov dx, port; out dx, al
    fn out(self, port: u16, value: u8) -> Self {
        self.set(RAX, u64::from(value))
            .set(RDX, u64::from(port))
            .bytes(&[0xEE])
    }
    /// Calls the hypercall page.
    fn hypercall(self, control: u64, input: u64) -> Self {
        // mov r8, 0; the page's address goes through rax.
        self.bytes(&[0x4D, 0x31, 0xC0])
            .set(RCX, control)
            .set(RDX, input)
            .set(RAX, HYPERCALL_PAGE)
            .bytes(&[0xFF, 0xD0])
    }
    fn say(self, byte: u8) -> Self {
        self.out(COM1_BASE, byte)
    }
    /// Waits for a byte from the serial port: in al, LSR; test al, 1; jz; in al, data.
    fn wait_for_input(self) -> Self {
        self.set(RDX, u64::from(COM1_BASE) + 5)
            .bytes(&[0xEC, 0xA8, 0x01, 0x74, 0xFB])
            .set(RDX, u64::from(COM1_BASE))
            .bytes(&[0xEC])
    }
    fn enable_hypercalls(self) -> Self {
        self.wrmsr(msr::GUEST_OS_ID, 1)
            .wrmsr(msr::HYPERCALL, HYPERCALL_PAGE | 1)
    }
    fn enable_synic(self) -> Self {
        self.wrmsr(msr::SIMP, SIMP | 1)
            .wrmsr(msr::SIEFP, SIEFP | 1)
            .wrmsr(msr::SINT0 + 2, u64::from(VECTOR))
            .wrmsr(msr::SCONTROL, 1)
    }
    /// Loads the IDT and switches the local APIC on: spurious vector register, Intel SDM volume 3, 11.9.
    fn enable_interrupts(self) -> Self {
        let lidt = (IDT_POINTER as u32).to_le_bytes();
        self.bytes(&[0x0F, 0x01, 0x1C, 0x25])
            .bytes(&lidt)
            .store(0xFEE0_00F0, 0x1FF)
    }
    /// Waits for a message in the slot: mov eax, [address]; test eax, eax; jz.
    fn wait_for_message(self) -> Self {
        self.set(RDI, SIMP + 0x200)
            .bytes(&[0x8B, 0x07, 0x85, 0xC0, 0x74, 0xFA])
    }
    /// sti; hlt; cli
    fn wait_for_interrupt(self) -> Self {
        self.bytes(&[0xFB, 0xF4, 0xFA])
    }
    fn power_off(self) -> Vec<u8> {
        self.out(0x600, 5 << 2 | 1 << 5).bytes(&[0xF4]).0
    }
}

/// What the interrupt handler does: count in [`RESULTS`], EOI, return.
fn handler() -> Vec<u8> {
    // push rax; push rdi; inc qword [rdi]; then the EOI register; pop; pop; iretq
    Code::default()
        .bytes(&[0x50, 0x57])
        .set(RDI, RESULTS)
        .bytes(&[0x48, 0xFF, 0x07])
        .store(0xFEE0_00B0, 0)
        .bytes(&[0x5F, 0x58, 0x48, 0xCF])
        .0
}

/// A machine with one vCPU.
struct Bench {
    shared: Arc<Shared>,
    memory: Arc<GuestMapping>,
    output: Arc<Output>,
    supervisor: Socket,
    /// The end of `bulkhead-bus`.
    bus: Option<Socket>,
    vcpu: Option<Vcpu>,
    thread: Option<(JoinHandle<()>, Sender<Vcpu>)>,
    attention: Event,
}

impl Bench {
    /// `None`, said loudly, where there is no KVM.
    fn new() -> Option<Self> {
        let fd = match File::options().read(true).write(true).open("/dev/kvm") {
            Ok(file) => OwnedFd::from(file),
            Err(error) => {
                println!("SKIP /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        install_kick_handler().expect("signal handler");
        let kvm = Kvm::new(fd).expect("a KVM that can run bulkhead");
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

    fn start(&mut self, code: Code) {
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
    fn play_bus(&mut self, devices: u8) {
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
    fn hear_from_bus(&mut self, message: &BusToVcpu, fds: &[std::os::fd::BorrowedFd<'_>]) -> Option<String> {
        let socket = self.bus.as_mut().expect("not played");
        socket.send(message, fds).expect("sent");
        let mut machine = self.shared.machine();
        machine.on_bus(1);
        machine.failure.take()
    }

    /// Waits for the guest's end.
    fn finish(&mut self) -> Ending {
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

    fn run(&mut self, code: Code) -> Ending {
        self.start(code);
        self.finish()
    }

    /// Waits until the guest says this byte.
    fn hear(&self, byte: u8) {
        assert_eq!(self.output.take(), Some(vec![byte]));
    }

    fn say(&self) {
        self.shared.console().offer_input(b"!");
    }

    fn result(&self, index: u64) -> u64 {
        self.memory
            .memory()
            .read_obj(GuestAddress(RESULTS + index * 8))
            .expect("in RAM")
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(gpa))
            .expect("in RAM");
    }

    fn exits(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters[0]
            .iter()
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    fn exits_of(&self, kind: &str) -> u64 {
        self.exits()
            .iter()
            .find(|(name, _)| *name == kind)
            .map_or(0, |(_, count)| *count)
    }

    /// One gate, for [`VECTOR`]: 64-bit interrupt gate, present, selector of the boot code segment.
    fn write_interrupt_table(&self) {
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
fn a_string_of_signals_is_taken_apart() {
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
fn a_signal_of_a_bound_channel_that_takes_the_slow_path_reaches_its_eventfd() {
    use std::os::fd::AsFd;
    let Some(mut bench) = Bench::new() else { return };
    let kick = Event::new().expect("eventfd");
    let bind = BusToVcpu::BindSignal { channel: 7 };
    assert_eq!(bench.hear_from_bus(&bind, &[kick.as_fd()]), None);
    // The slow form: the input is in memory.
    bench.write(BLOCK, &signal_connection(7).to_le_bytes());
    let code = Code::default()
        .enable_hypercalls()
        .hypercall(0x5D, BLOCK)
        .store_rax(RESULTS);
    assert_eq!(bench.run(code), Ending::PowerOff);
    assert!(kick.drain());
    assert_eq!(bench.result(0), 0);
}

fn event_fd() -> OwnedFd {
    use std::os::fd::AsFd;
    let event = Event::new().expect("eventfd");
    event.as_fd().try_clone_to_owned().expect("dup")
}

#[test]
fn what_bulkhead_bus_must_not_say_ends_the_vm_and_touches_nothing() {
    use std::os::fd::AsFd;
    let file = File::open("/dev/null").expect("opened");
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
        (
            BusToVcpu::BindInterrupt { channel: 1, vp: 0 },
            Some(OwnedFd::from(file)),
        ),
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
