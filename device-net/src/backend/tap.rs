//! A TAP interface, handed over as a descriptor.
//!
//! With IFF_VNET_HDR (every TAP that our supervisor makes) the kernel completes checksums, cuts large segments, and
//! hands us the same in return. A TAP without it gets finished frames only.

use super::{Backend, FRAME_BYTES_MAX, Gone, IncomingFrame, OutgoingFrame, Sent, set_nonblocking, software};
use crate::frame::vnet::{VNET_BYTES, VnetHeader};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;
use vmbus::mem::HostError;
use zerocopy::{FromBytes, IntoBytes};

/// Why a descriptor cannot be used as a TAP.
#[derive(Debug, Error)]
pub enum TapError {
    #[error("the descriptor is not a TAP interface: {0}")]
    NotATap(std::io::Error),
    #[error("the descriptor is a TUN interface, which carries no Ethernet frames; use a TAP")]
    NoEthernet,
    #[error("the TAP puts packet information before frames; open it with IFF_NO_PI")]
    PacketInformation,
    #[error("the TAP refuses {what}: {error}")]
    Refused {
        what: &'static str,
        error: std::io::Error,
    },
    #[error(transparent)]
    Host(#[from] HostError),
}

pub struct Tap {
    fd: OwnedFd,
    header_bytes: usize,
    /// Header and frame, as read.
    incoming: Vec<u8>,
    /// Header and head, to be written before the guest's part.
    prefix: Vec<u8>,
    whole: Vec<u8>,
    head: Vec<u8>,
}

impl Tap {
    /// Asks the descriptor what it is and prepares it. To be called before the sandbox closes: these are ioctls.
    pub fn new(fd: OwnedFd) -> Result<Self, TapError> {
        let flags = sandbox::tap::flags(fd.as_fd()).map_err(TapError::NotATap)?;
        if !flags.ethernet {
            return Err(TapError::NoEthernet);
        }
        if flags.packet_information {
            return Err(TapError::PacketInformation);
        }
        let header_bytes = if flags.vnet_header {
            let refused = |what| move |error| TapError::Refused { what, error };
            sandbox::tap::set_header_bytes(fd.as_fd(), VNET_BYTES as i32)
                .map_err(refused("a header of 10 bytes"))?;
            sandbox::tap::set_offloads(fd.as_fd(), sandbox::tap::OFFLOADS)
                .map_err(refused("segmentation offload"))?;
            VNET_BYTES
        } else {
            0
        };
        set_nonblocking(fd.as_fd())?;
        Ok(Self {
            fd,
            header_bytes,
            incoming: vec![0; VNET_BYTES + FRAME_BYTES_MAX],
            prefix: Vec::new(),
            whole: Vec::new(),
            head: Vec::new(),
        })
    }

    fn send_finished(&mut self, frame: &OutgoingFrame<'_>) -> Result<Sent, Gone> {
        let mut last = Ok(Sent::Done);
        let fd = self.fd.as_fd();
        let finished = software::finish(frame, &mut self.whole, &mut self.head, |head, rest| {
            let parts = [std::io::IoSlice::new(head), std::io::IoSlice::new(rest)];
            if last.is_ok() {
                last = outcome(nix::sys::uio::writev(fd, &parts));
            }
        });
        // Of several pieces some may be lost, and then some of the frame's data; Full would send the others again.
        match last {
            Ok(_) if !finished => Ok(Sent::Dropped),
            Ok(Sent::Full) => Ok(Sent::Dropped),
            other => other,
        }
    }
}

fn outcome(written: Result<usize, Errno>) -> Result<Sent, Gone> {
    match written {
        Ok(_) => Ok(Sent::Done),
        Err(Errno::EAGAIN) => Ok(Sent::Full),
        // EIO: the interface is down. EINVAL, EMSGSIZE: the kernel does not like the frame. The others pass.
        Err(
            Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EFAULT,
        ) => Ok(Sent::Dropped),
        // EBADFD: the interface was deleted.
        Err(errno) => Err(Gone::Host(HostError::new("write to the TAP", errno))),
    }
}

impl Backend for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn send(&mut self, frame: &OutgoingFrame<'_>) -> Result<Sent, Gone> {
        if self.header_bytes == 0 && *frame.vnet != VnetHeader::default() {
            return self.send_finished(frame);
        }
        self.prefix.clear();
        if self.header_bytes != 0 {
            self.prefix.extend_from_slice(frame.vnet.as_bytes());
        }
        self.prefix.extend_from_slice(frame.head);
        outcome(
            frame
                .rest
                .writev_to(self.fd.as_fd(), &self.prefix)
                .map_err(|error| error.errno),
        )
    }

    fn flush(&mut self) -> Result<bool, Gone> {
        Ok(true)
    }

    fn is_behind(&self) -> bool {
        false
    }

    fn receive(&mut self) -> Result<Option<IncomingFrame<'_>>, Gone> {
        let bytes = loop {
            match nix::unistd::read(&self.fd, &mut self.incoming) {
                Ok(bytes) if bytes > self.header_bytes => break bytes,
                Ok(_) | Err(Errno::EINTR) => {}
                // EIO: the interface is down. Either way, what there will be comes with a new edge.
                Err(Errno::EAGAIN | Errno::EIO) => return Ok(None),
                Err(errno) => return Err(Gone::Host(HostError::new("read from the TAP", errno))),
            }
        };
        let (header, frame) = self.incoming[..bytes].split_at_mut(self.header_bytes);
        let vnet = VnetHeader::read_from_prefix(header)
            .map(|(vnet, _)| vnet)
            .unwrap_or_default();
        Ok(Some(IncomingFrame { vnet, frame }))
    }
}
