//! Guests of a few dozen instructions, and where they keep things.

use std::time::Duration;

use crate::hyperv::msr;
use crate::pc::serial::COM1_BASE;

pub(super) const MEMORY_BYTES: u64 = 32 << 20;
/// Where the guest's code lies.
pub(super) const CODE: u64 = 0x10_0000;
/// Where guests leave their results.
pub(super) const RESULTS: u64 = 0x20_0000;
/// Pages for overlays.
pub(super) const HYPERCALL_PAGE: u64 = 0x30_0000;
pub(super) const SIMP: u64 = 0x30_1000;
pub(super) const SIEFP: u64 = 0x30_2000;
pub(super) const TSC_PAGE: u64 = 0x30_3000;
/// A block for slow hypercalls.
pub(super) const BLOCK: u64 = 0x30_4000;
pub(super) const IDT: u64 = 0x30_5000;
pub(super) const IDT_POINTER: u64 = 0x30_6000;
pub(super) const STACK: u64 = 0x40_0000;
pub(super) const VECTOR: u8 = 0xF3;
/// A guest of a few dozen instructions that has not ended by then hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

// Register numbers of the instruction encoding.
pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RSP: u8 = 4;
pub(super) const RDI: u8 = 7;

/// A guest's code.
#[derive(Default)]
pub(super) struct Code(pub Vec<u8>);

impl Code {
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// mov r64, imm64
    pub(super) fn set(self, register: u8, value: u64) -> Self {
        self.bytes(&[0x48, 0xB8 + register]).bytes(&value.to_le_bytes())
    }
    /// mov [address], rax
    pub(super) fn store_rax(self, address: u64) -> Self {
        self.set(RDI, address).bytes(&[0x48, 0x89, 0x07])
    }
    /// mov rax, [address]
    pub(super) fn load_rax(self, address: u64) -> Self {
        self.set(RDI, address).bytes(&[0x48, 0x8B, 0x07])
    }
    /// mov dword [address], value
    pub(super) fn store(self, address: u64, value: u32) -> Self {
        self.set(RAX, u64::from(value))
            .set(RDI, address)
            .bytes(&[0x89, 0x07])
    }
    pub(super) fn wrmsr(self, msr: u32, value: u64) -> Self {
        self.set(RCX, u64::from(msr))
            .set(RAX, value & 0xFFFF_FFFF)
            .set(RDX, value >> 32)
            .bytes(&[0x0F, 0x30])
    }
    /// rdmsr; shl rdx, 32; or rax, rdx
    pub(super) fn rdmsr(self, msr: u32) -> Self {
        self.set(RCX, u64::from(msr))
            .bytes(&[0x0F, 0x32, 0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0])
    }
    /// mov dx, port; out dx, al
    pub(super) fn out(self, port: u16, value: u8) -> Self {
        self.set(RAX, u64::from(value))
            .set(RDX, u64::from(port))
            .bytes(&[0xEE])
    }
    /// Calls the hypercall page.
    pub(super) fn hypercall(self, control: u64, input: u64) -> Self {
        // mov r8, 0; the page's address goes through rax.
        self.bytes(&[0x4D, 0x31, 0xC0])
            .set(RCX, control)
            .set(RDX, input)
            .set(RAX, HYPERCALL_PAGE)
            .bytes(&[0xFF, 0xD0])
    }
    pub(super) fn say(self, byte: u8) -> Self {
        self.out(COM1_BASE, byte)
    }
    /// Waits for a byte from the serial port: in al, LSR; test al, 1; jz; in al, data.
    pub(super) fn wait_for_input(self) -> Self {
        self.set(RDX, u64::from(COM1_BASE) + 5)
            .bytes(&[0xEC, 0xA8, 0x01, 0x74, 0xFB])
            .set(RDX, u64::from(COM1_BASE))
            .bytes(&[0xEC])
    }
    pub(super) fn enable_hypercalls(self) -> Self {
        self.wrmsr(msr::GUEST_OS_ID, 1)
            .wrmsr(msr::HYPERCALL, HYPERCALL_PAGE | 1)
    }
    pub(super) fn enable_synic(self) -> Self {
        self.wrmsr(msr::SIMP, SIMP | 1)
            .wrmsr(msr::SIEFP, SIEFP | 1)
            .wrmsr(msr::SINT0 + 2, u64::from(VECTOR))
            .wrmsr(msr::SCONTROL, 1)
    }
    /// Loads the IDT and switches the local APIC on: spurious vector register, Intel SDM volume 3, 11.9.
    pub(super) fn enable_interrupts(self) -> Self {
        let lidt = (IDT_POINTER as u32).to_le_bytes();
        self.bytes(&[0x0F, 0x01, 0x1C, 0x25])
            .bytes(&lidt)
            .store(0xFEE0_00F0, 0x1FF)
    }
    /// Waits for a message in the slot: mov eax, [address]; test eax, eax; jz.
    pub(super) fn wait_for_message(self) -> Self {
        self.set(RDI, SIMP + 0x200)
            .bytes(&[0x8B, 0x07, 0x85, 0xC0, 0x74, 0xFA])
    }
    /// sti; hlt; cli
    pub(super) fn wait_for_interrupt(self) -> Self {
        self.bytes(&[0xFB, 0xF4, 0xFA])
    }
    pub(super) fn power_off(self) -> Vec<u8> {
        self.out(0x600, 5 << 2 | 1 << 5).bytes(&[0xF4]).0
    }
}

/// What the interrupt handler does: count in [`RESULTS`], EOI, return.
pub(super) fn handler() -> Vec<u8> {
    // push rax; push rdi; inc qword [rdi]; then the EOI register; pop; pop; iretq
    Code::default()
        .bytes(&[0x50, 0x57])
        .set(RDI, RESULTS)
        .bytes(&[0x48, 0xFF, 0x07])
        .store(0xFEE0_00B0, 0)
        .bytes(&[0x5F, 0x58, 0x48, 0xCF])
        .0
}
