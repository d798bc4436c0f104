#![forbid(unsafe_code)]
//! The code that the guest calls for a hypercall.
//!
//! KVM would take a VMCALL itself, so the page does port I/O instead. HvSignalEvent in its fast form becomes
//! one 32-bit OUT of the connection id to [`SIGNAL_PORT`], where KVM matches it against one ioeventfd for each
//! channel: no exit to user space. Every other call is one IN from [`SLOW_PORT`], which exits; the value that
//! we answer is the call's status, and lands in RAX without a write of registers. If that call is a HvSignalEvent (its input
//! was in memory), the answer is the connection id with [`SEND`], and the page sends it as above: only KVM ever writes a
//! channel's eventfd, which never waits, while a write of ours would, if another holder of it so wishes.
//!
//! ```text
//!       endbr64                     first, or Linux switches indirect-branch tracking off for good
//!       cmp   rcx, 0x1005d          the whole control word: fast bit and call code, all else zero
//!       jne   slow
//!       mov   r9, rdx
//!       shr   r9, 32                flag number and reserved bits must be zero
//!       jne   slow
//!       mov   eax, edx
//! send: mov   edx, SIGNAL_PORT
//!       xor   r9d, r9d              status: success, unless user space sets it on a miss
//!       out   dx, eax
//!       mov   rax, r9
//!       ret
//!       int3                        against straight-line speculation
//! slow: mov   r9, rdx               the port number takes RDX; the input is found in R9
//!       mov   edx, SLOW_PORT
//!       in    eax, dx               RCX control, R9 input, R8 output; EAX := status, or SEND and connection id
//!       btr   eax, 31
//!       jc    send
//!       ret
//!       int3 …                      to the end of the page
//! ```
//!
//! Clobbered: RAX, RDX, R9 and flags, all of which a hypercall may change (Linux 6.1
//! arch/x86/include/asm/mshyperv.h `hv_do_hypercall`). The code keeps no state and may run on all processors
//! at once. Root in the guest can write the ports itself: a forged signal is a spurious kick, a forged slow call
//! has no more power than the guest's kernel gave itself.

/// Where the page writes the connection id of a fast HvSignalEvent. Not used by any PC device; reserved in
/// the DSDT (`pc/acpi.rs`).
pub const SIGNAL_PORT: u16 = 0x0520;
/// Where the page reads the status of any other call.
pub const SLOW_PORT: u16 = 0x0524;

/// Bit 31 of what is read there: no status, but the id of a connection, which is to be written to [`SIGNAL_PORT`].
pub const SEND: u32 = 1 << 31;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// The code, without the padding.
const CODE: [u8; 55] = {
    let signal = SIGNAL_PORT.to_le_bytes();
    let slow = SLOW_PORT.to_le_bytes();
    [
        0xF3, 0x0F, 0x1E, 0xFA, // endbr64
        0x48, 0x81, 0xF9, 0x5D, 0x00, 0x01, 0x00, // cmp rcx, 0x1005d
        0x75, 0x19, // jne slow
        0x49, 0x89, 0xD1, // mov r9, rdx
        0x49, 0xC1, 0xE9, 0x20, // shr r9, 32
        0x75, 0x10, // jne slow
        0x89, 0xD0, // mov eax, edx
        0xBA, signal[0], signal[1], 0x00, 0x00, // send: mov edx, SIGNAL_PORT
        0x45, 0x31, 0xC9, // xor r9d, r9d
        0xEF, // out dx, eax
        0x4C, 0x89, 0xC8, // mov rax, r9
        0xC3, // ret
        0xCC, // int3
        0x49, 0x89, 0xD1, // slow: mov r9, rdx
        0xBA, slow[0], slow[1], 0x00, 0x00, // mov edx, SLOW_PORT
        0xED, // in eax, dx
        0x0F, 0xBA, 0xF0, 0x1F, // btr eax, 31
        0x72, 0xE3, // jc send
        0xC3, // ret
        0xCC, // int3
    ]
};

/// The page's content.
pub fn page() -> [u8; PAGE_BYTES] {
    let mut page = [0xCC; PAGE_BYTES];
    page[..CODE.len()].copy_from_slice(&CODE);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offset and length of each instruction, as the listing above has them.
    const LISTING: [(usize, usize, &str); 22] = [
        (0, 4, "endbr64"),
        (4, 7, "cmp"),
        (11, 2, "jne"),
        (13, 3, "mov r9, rdx"),
        (16, 4, "shr"),
        (20, 2, "jne"),
        (22, 2, "mov eax, edx"),
        (24, 5, "mov edx"),
        (29, 3, "xor"),
        (32, 1, "out"),
        (33, 3, "mov rax, r9"),
        (36, 1, "ret"),
        (37, 1, "int3"),
        (38, 3, "mov r9, rdx"),
        (41, 5, "mov edx"),
        (46, 1, "in"),
        (47, 4, "btr"),
        (51, 2, "jc"),
        (53, 1, "ret"),
        (54, 1, "int3"),
        (55, 1, "int3"),
        (4095, 1, "int3"),
    ];

    #[test]
    fn the_listing_covers_the_code_without_a_gap() {
        let mut next = 0;
        for (offset, length, _) in LISTING.iter().filter(|entry| entry.0 < CODE.len()) {
            assert_eq!(*offset, next);
            next = offset + length;
        }
        assert_eq!(next, CODE.len());
    }

    #[test]
    fn both_branches_land_on_the_slow_path() {
        for (offset, length, name) in LISTING {
            if name == "jne" {
                assert_eq!(CODE[offset], 0x75);
                assert_eq!(offset + length + usize::from(CODE[offset + 1]), 38);
            }
        }
        assert_eq!(CODE[38..41], [0x49, 0x89, 0xD1]);
    }

    #[test]
    fn a_connection_id_is_sent_where_the_fast_form_sends_it() {
        assert_eq!(CODE[47..51], [0x0F, 0xBA, 0xF0, SEND.trailing_zeros() as u8]);
        assert_eq!(53_i8.wrapping_add(CODE[52] as i8), 24);
        assert_eq!(CODE[24], 0xBA);
    }

    #[test]
    fn the_compare_takes_the_whole_fast_control_word_of_signal_event() {
        assert_eq!(CODE[4..7], [0x48, 0x81, 0xF9], "cmp rcx, imm32, sign-extended");
        let immediate = u32::from_le_bytes([CODE[7], CODE[8], CODE[9], CODE[10]]);
        assert_eq!(immediate, 0x1_005D);
    }

    #[test]
    fn the_page_begins_with_endbr64_and_is_padded_with_int3() {
        let page = page();
        assert_eq!(page[..4], [0xF3, 0x0F, 0x1E, 0xFA]);
        assert!(page[CODE.len()..].iter().all(|byte| *byte == 0xCC));
    }

    #[test]
    fn the_ports_stand_where_the_moves_load_them() {
        assert_eq!(u16::from_le_bytes([CODE[25], CODE[26]]), SIGNAL_PORT);
        assert_eq!(u16::from_le_bytes([CODE[42], CODE[43]]), SLOW_PORT);
        assert_eq!(CODE[32], 0xEF);
        assert_eq!(CODE[46], 0xED);
    }
}
