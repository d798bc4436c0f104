//! TAP interfaces: one system call each on a descriptor of `/dev/net/tun` (Linux include/uapi/linux/if_tun.h).
//!
//! The interface's queue stays with the descriptor, whoever holds it; so the supervisor makes it and a device server
//! that may open nothing uses it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_short, c_uint, c_ulong};

const TUNSETIFF: c_ulong = 0x4004_54CA;
const TUNSETOFFLOAD: c_ulong = 0x4004_54D0;
const TUNGETIFF: c_ulong = 0x8004_54D2;
const TUNSETVNETHDRSZ: c_ulong = 0x4004_54D8;

/// What a TAP may leave to its user, and its user to it: partial checksums, large TCP segments over IPv4 and IPv6.
pub const OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// What kind of descriptor a TAP is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapFlags {
    /// Ethernet frames (TAP) and not IP packets (TUN).
    pub ethernet: bool,
    /// Each frame has a `struct virtio_net_hdr` before it.
    pub vnet_header: bool,
    /// Each frame has four bytes of `struct tun_pi` before it.
    pub packet_information: bool,
}

/// Opens the TAP of that name (makes it if there is none), without blocking, with a `virtio_net_hdr` before each frame.
/// Needs CAP_NET_ADMIN, or to be the owner of a persistent one.
///
/// # Errors
/// What the kernel says; InvalidInput for a name that is empty or too long.
pub fn create(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("\"{name}\" cannot be the name of an interface"),
        ));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives as long as the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(file.into())
}

/// Asks a descriptor what it is.
///
/// # Errors
/// EBADFD or ENOTTY: not a TAP, or one that has no interface.
pub fn flags(tap: BorrowedFd<'_>) -> io::Result<TapFlags> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one `ifreq`, which lives as long as the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF fills the flags, and any value of this integer is valid.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(TapFlags {
        ethernet: flags & libc::IFF_TAP != 0,
        vnet_header: flags & libc::IFF_VNET_HDR != 0,
        packet_information: flags & libc::IFF_NO_PI == 0,
    })
}

/// Sets the length of the header before each frame: 10 without, 12 with `num_buffers`.
///
/// # Errors
/// What the kernel says.
pub fn set_header_bytes(tap: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives as long as the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) })
}

/// Says what the user of the descriptor takes in frames that it reads ([`OFFLOADS`], or 0).
///
/// # Errors
/// What the kernel says.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads as c_uint)) })
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_map: libc::__c_anonymous_ifru_map {
                mem_start: 0,
                mem_end: 0,
                base_addr: 0,
                irq: 0,
                dma: 0,
                port: 0,
            },
        },
    }
}

fn check(result: i32) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_before_the_kernel_is_asked() {
        for name in ["", "a-name-of-sixteen", "nul\0"] {
            assert_eq!(
                create(name, false).expect_err("refused").kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }

    #[test]
    fn a_file_is_no_tap() {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        assert!(flags(file.as_fd()).is_err());
    }
}
