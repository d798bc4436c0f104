//! One end of a `SOCK_SEQPACKET` pair that carries [`Message`]s and descriptors, and never blocks.
//!
//! Descriptors arrive close-on-exec (`MSG_CMSG_CLOEXEC`) and owned: whatever goes wrong after `recvmsg(2)`, the
//! ones that came are closed when the error is returned. A message or its control data cut short
//! (`MSG_TRUNC`, `MSG_CTRUNC`) is a fault of the sender, never a shorter message.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::PeerFault;
use super::codec::{self, EncodeError, MAX_MESSAGE_BYTES};
use super::messages::Message;

/// Limit: the longest honest list is a server's `Start` (socket, journal, one descriptor for each of a few
/// disks or queues).
pub const MAX_DESCRIPTORS: usize = 16;

/// Limit: what may wait for a slow peer. The whole truth about a device at attach is one message for each
/// channel and GPADL; the largest GPADLs take 64 KiB, the usual ones 2 KiB to 32 KiB.
pub const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;

/// Limit: see [`MAX_QUEUED_BYTES`]; bounds the descriptors that wait, too.
pub const MAX_QUEUED_MESSAGES: usize = 4096;

const _: () = assert!(MAX_MESSAGE_BYTES * 64 <= MAX_QUEUED_BYTES);

/// Why a message was not sent. After any of these but `Encode` and `DescriptorCount`, drop the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Our caller's mistake: the descriptors do not match the message.
    #[error("{message} wants {expected} descriptors, {given} given")]
    DescriptorCount {
        message: &'static str,
        expected: usize,
        given: usize,
    },
    /// The message is too long.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The peer has not read for so long that the queue is full.
    #[error("the peer does not read its messages")]
    QueueFull,
    /// The peer is gone.
    #[error("the peer closed the connection")]
    Disconnected,
    /// The kernel refused for another reason.
    #[error("send failed: {0}")]
    Send(Errno),
}

/// Makes the two ends of a connection, both close-on-exec.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// One end of a connection.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// Where datagrams arrive; one byte longer than any message may be. Untouched pages cost nothing.
    buffer: Vec<u8>,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    queued_bytes: usize,
}

impl Socket {
    /// Wraps an end made by [`pair`]. The descriptor's flags do not matter: each call asks not to block.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            buffer: Vec::new(),
            queue: VecDeque::new(),
            queued_bytes: 0,
        }
    }

    /// Sends one message with its descriptors (which stay the caller's), or queues it, in order.
    ///
    /// If [`Self::has_queued`] afterwards, call [`Self::flush`] when the descriptor becomes writable.
    pub fn send<M: Message>(&mut self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        let expected = message.descriptor_count();
        if fds.len() != expected || expected > MAX_DESCRIPTORS {
            return Err(SendError::DescriptorCount {
                message: message.name(),
                expected,
                given: fds.len(),
            });
        }
        let bytes = codec::encode(message)?;
        self.flush()?;
        if self.queue.is_empty() && send_now(self.fd.as_fd(), &bytes, fds)? {
            return Ok(());
        }
        let queued_bytes = self.queued_bytes.saturating_add(bytes.len());
        if queued_bytes > MAX_QUEUED_BYTES || self.queue.len() >= MAX_QUEUED_MESSAGES {
            return Err(SendError::QueueFull);
        }
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<Result<Vec<_>, _>>();
        let fds = fds.map_err(|error| SendError::Send(errno_of(&error)))?;
        self.queue.push_back((bytes, fds));
        self.queued_bytes = queued_bytes;
        Ok(())
    }

    /// Sends what waits, as far as the peer takes it.
    pub fn flush(&mut self) -> Result<(), SendError> {
        while let Some((bytes, fds)) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            if !send_now(self.fd.as_fd(), bytes, &fds)? {
                break;
            }
            self.queued_bytes = self.queued_bytes.saturating_sub(bytes.len());
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Whether messages wait for the descriptor to become writable.
    pub fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Bytes of the messages that wait.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Receives one message and the descriptors that belong to it; `None`: nothing is there now.
    ///
    /// After any error the connection is to be dropped: messages may be lost.
    pub fn recv<M: Message>(&mut self) -> Result<Option<(M, Vec<OwnedFd>)>, PeerFault> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; MAX_MESSAGE_BYTES + 1];
        }
        let Some((length, fds)) = receive_now(self.fd.as_fd(), &mut self.buffer)? else {
            return Ok(None);
        };
        let bytes = self.buffer.get(..length).ok_or(PeerFault::MessageTooLong)?;
        let message: M = codec::decode(bytes)?;
        let expected = message.descriptor_count();
        if fds.len() != expected {
            return Err(PeerFault::DescriptorCount {
                message: message.name(),
                expected,
                received: fds.len(),
            });
        }
        Ok(Some((message, fds)))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends one datagram; `false`: not now.
fn send_now(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, SendError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(SendError::Send(Errno::EINVAL));
    }
    loop {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        return match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(SendError::Disconnected),
            Err(error) => Err(SendError::Send(Errno::from_raw(error.raw_os_error()))),
        };
    }
}

/// Receives one datagram into `buffer`; `None`: nothing there now.
fn receive_now(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> Result<Option<(usize, Vec<OwnedFd>)>, PeerFault> {
    // Room for one descriptor too many is not needed: the kernel closes what does not fit and says so.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(received) => break received,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            // The peer died with messages of ours unread. That is told once; what it said before, and then the end, are
            // still to be read.
            Err(rustix::io::Errno::CONNRESET) => continue,
            Err(error) => return Err(PeerFault::Receive(Errno::from_raw(error.raw_os_error()))),
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received_fds) = message {
            fds.extend(received_fds);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(PeerFault::DescriptorsTruncated);
    }
    if received.flags.contains(ReturnFlags::TRUNC) || received.bytes > MAX_MESSAGE_BYTES {
        return Err(PeerFault::MessageTooLong);
    }
    // An empty datagram cannot be told from the end, and is no message either.
    if received.bytes == 0 {
        return Err(PeerFault::Eof);
    }
    Ok(Some((received.bytes, fds)))
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
