//! A UNIX stream socket that carries frames, each behind its length (4 bytes, big endian): how passt and QEMU's
//! `-netdev stream` speak.
//!
//! A server may die between any two system calls, and its successor goes on with the same socket, so neither side's
//! boundary between frames may ever lie in a dead server's memory:
//! - *Receive*: the socket is peeked at, and then exactly the whole frames that were seen are read. A frame that has not
//!   come whole stays in the kernel.
//!   The call that reads them copies to where the peek has just copied, so it is not cut short by a fault.
//! - *Send*: whole frames go in one call of at most [`ATOMIC_BYTES`]. Quirk(Linux 6.1 net/unix/af_unix.c
//!   unix_stream_sendmsg): that much is one buffer in the kernel, which is queued whole or not at all, if it is below
//!   half the socket's send buffer; [`Stream::new`] sees to that. Longer frames than [`LINK_FRAME_BYTES_MAX`] are no
//!   frames of this link and are dropped, so no frame needs two buffers.
//!
//! So nothing of a stream's state has to be saved, and a successor finds both directions in step.

use super::{Backend, FRAME_BYTES_MAX, Gone, IncomingFrame, OutgoingFrame, Sent, set_nonblocking, software};
use crate::frame::vnet::VnetHeader;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send, setsockopt, sockopt};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use thiserror::Error;
use vmbus::mem::HostError;

const LENGTH_BYTES: usize = 4;
/// Limit: below `SKB_MAX_ALLOC + UNIX_SKB_FRAGS_SZ` (Linux 6.1 net/unix/af_unix.c), see above.
const ATOMIC_BYTES: usize = 32 * 1024;
/// Longest frame that is sent: what the largest MTU allows, with an Ethernet header and two tags.
const LINK_FRAME_BYTES_MAX: usize = crate::config::MTU_MAX as usize + 14 + 8;
const _: () = assert!(LENGTH_BYTES + LINK_FRAME_BYTES_MAX <= ATOMIC_BYTES);
/// Least size of the socket's send buffer: a kernel buffer takes half of it less 64 bytes (see above).
const SEND_BUFFER_BYTES_MIN: usize = 2 * (ATOMIC_BYTES + 64);
/// Bytes looked at in one go.
const CHUNK_BYTES: usize = LENGTH_BYTES + FRAME_BYTES_MAX;
/// Below this no Ethernet frame exists.
const FRAME_BYTES_MIN: usize = 14;

/// Why a descriptor cannot carry frames.
#[derive(Debug, Error)]
pub enum StreamError {
    #[error("the descriptor is not a stream socket; hand over one end of a connected UNIX stream")]
    NotAStream,
    #[error(
        "the socket's send buffer has {0} bytes and cannot be made {SEND_BUFFER_BYTES_MIN}; raise net.core.wmem_max"
    )]
    SendBuffer(usize),
    #[error(transparent)]
    Host(#[from] HostError),
}

pub struct Stream {
    fd: OwnedFd,
    chunk: Vec<u8>,
    /// Whole frames in `chunk` that were not handed out.
    ready: std::ops::Range<usize>,
    /// Finished frames, with their lengths, that wait for the kernel.
    unsent: Vec<u8>,
    prefix: Vec<u8>,
    whole: Vec<u8>,
    head: Vec<u8>,
}

impl Stream {
    /// Prepares the descriptor. To be called before the sandbox closes: socket options are asked for and set.
    pub fn new(fd: OwnedFd) -> Result<Self, StreamError> {
        let kind = getsockopt(&fd, sockopt::SockType).map_err(|_| StreamError::NotAStream)?;
        if kind != SockType::Stream {
            return Err(StreamError::NotAStream);
        }
        set_nonblocking(fd.as_fd())?;
        let send_buffer_bytes = || {
            getsockopt(&fd, sockopt::SndBuf)
                .map_err(|errno| HostError::new("ask for a send buffer's size", errno))
        };
        if send_buffer_bytes()? < SEND_BUFFER_BYTES_MIN {
            // The kernel doubles what it is told; whether it obeyed is asked below.
            setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER_BYTES_MIN)
                .map_err(|errno| HostError::new("set a send buffer's size", errno))?;
        }
        let bytes = send_buffer_bytes()?;
        if bytes < SEND_BUFFER_BYTES_MIN {
            return Err(StreamError::SendBuffer(bytes));
        }
        Ok(Self {
            fd,
            chunk: vec![0; CHUNK_BYTES],
            ready: 0..0,
            unsent: Vec::new(),
            prefix: Vec::new(),
            whole: Vec::new(),
            head: Vec::new(),
        })
    }

    /// Reads the whole frames that have arrived into `chunk`. False: none has.
    fn refill(&mut self) -> Result<bool, Gone> {
        let seen = loop {
            match recv(
                self.fd.as_raw_fd(),
                &mut self.chunk,
                MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => return Err(Gone::Closed),
                Ok(seen) => break seen,
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(host(errno, "read from the stream")),
            }
        };
        let whole = whole_frames(&self.chunk[..seen])?;
        if whole == 0 {
            return Ok(false);
        }
        let read = recv(
            self.fd.as_raw_fd(),
            &mut self.chunk[..whole],
            MsgFlags::MSG_DONTWAIT,
        )
        .map_err(|errno| host(errno, "read from the stream"))?;
        // We are the only reader, and what was seen is there.
        if read != whole {
            return Err(Gone::Closed);
        }
        self.ready = 0..whole;
        Ok(true)
    }

    /// Adds a finished frame to what is to be sent.
    fn append(unsent: &mut Vec<u8>, head: &[u8], rest: &[u8]) {
        unsent.extend_from_slice(&length_prefix(head.len() + rest.len()));
        unsent.extend_from_slice(head);
        unsent.extend_from_slice(rest);
    }
}

fn host(errno: Errno, attempt: &'static str) -> Gone {
    match errno {
        Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => Gone::Closed,
        errno => Gone::Host(HostError::new(attempt, errno)),
    }
}

fn length_prefix(frame_bytes: usize) -> [u8; LENGTH_BYTES] {
    // At most FRAME_BYTES_MAX.
    (frame_bytes as u32).to_be_bytes()
}

/// How many bytes at the start of `seen` are whole frames with their lengths.
fn whole_frames(seen: &[u8]) -> Result<usize, Gone> {
    let mut whole = 0;
    while let Some(length) = seen[whole..].first_chunk::<LENGTH_BYTES>() {
        let length = u32::from_be_bytes(*length);
        let frame_bytes = length as usize;
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame_bytes) {
            // Frames before it may still be handed out.
            return if whole == 0 {
                Err(Gone::FrameLength(length))
            } else {
                Ok(whole)
            };
        }
        if seen.len() - whole < LENGTH_BYTES + frame_bytes {
            break;
        }
        whole += LENGTH_BYTES + frame_bytes;
    }
    Ok(whole)
}

/// How many bytes at the start of `unsent` are whole frames of at most [`ATOMIC_BYTES`] together, but at least one frame.
fn atomic_part(unsent: &[u8]) -> usize {
    let mut end = 0;
    while let Some(length) = unsent[end..].first_chunk::<LENGTH_BYTES>() {
        let next = end + LENGTH_BYTES + u32::from_be_bytes(*length) as usize;
        if next > unsent.len() || (end != 0 && next > ATOMIC_BYTES) {
            break;
        }
        end = next;
    }
    end
}

impl Backend for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn send(&mut self, frame: &OutgoingFrame<'_>) -> Result<Sent, Gone> {
        if !self.flush()? {
            return Ok(Sent::Full);
        }
        if *frame.vnet != VnetHeader::default() {
            let unsent = &mut self.unsent;
            let mut all_fit = true;
            let finished = software::finish(frame, &mut self.whole, &mut self.head, |head, rest| {
                if head.len() + rest.len() <= LINK_FRAME_BYTES_MAX {
                    Self::append(unsent, head, rest);
                } else {
                    all_fit = false;
                }
            });
            self.flush()?;
            return Ok(if finished && all_fit {
                Sent::Done
            } else {
                Sent::Dropped
            });
        }
        if frame.bytes() > LINK_FRAME_BYTES_MAX {
            return Ok(Sent::Dropped);
        }
        self.prefix.clear();
        self.prefix.extend_from_slice(&length_prefix(frame.bytes()));
        self.prefix.extend_from_slice(frame.head);
        let all = LENGTH_BYTES + frame.bytes();
        match frame.rest.writev_to(self.fd.as_fd(), &self.prefix) {
            Ok(taken) if taken == all => Ok(Sent::Done),
            Ok(_) => Err(Gone::Torn),
            Err(error) if error.errno == Errno::EAGAIN => Ok(Sent::Full),
            Err(error) => Err(host(error.errno, "write to the stream")),
        }
    }

    fn flush(&mut self) -> Result<bool, Gone> {
        while !self.unsent.is_empty() {
            let part = atomic_part(&self.unsent);
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.fd.as_raw_fd(), &self.unsent[..part], flags) {
                Ok(taken) if taken == part => {
                    self.unsent.drain(..taken);
                }
                Ok(_) => return Err(Gone::Torn),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(host(errno, "write to the stream")),
            }
        }
        Ok(true)
    }

    fn is_behind(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn receive(&mut self) -> Result<Option<IncomingFrame<'_>>, Gone> {
        if self.ready.is_empty() && !self.refill()? {
            return Ok(None);
        }
        let ready = &mut self.chunk[self.ready.clone()];
        // `refill` has seen this length, and that the frame is whole.
        let Some((length, rest)) = ready.split_first_chunk_mut::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        self.ready.start += LENGTH_BYTES + length;
        Ok(rest.get_mut(..length).map(|frame| IncomingFrame {
            vnet: VnetHeader::default(),
            frame,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::headers::tests::{is_sound, tcp4};
    use crate::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use vmbus::mem::{GuestSpans, SharedMap};
    use zerocopy::little_endian::U16;

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        (Stream::new(ours.into()).expect("stream"), theirs)
    }

    fn spans(bytes: &[u8]) -> GuestSpans {
        let map = Arc::new(SharedMap::anonymous("frames", 1 << 20).expect("memory"));
        map.write(0, bytes).expect("fits");
        GuestSpans::from_map(map, 0, bytes.len() as u32).expect("fits")
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes(), frame].concat()
    }

    fn received(stream: &mut Stream) -> Option<Vec<u8>> {
        stream.receive().expect("open").map(|got| got.frame.to_vec())
    }

    #[test]
    fn a_frame_goes_out_behind_its_length() {
        let (mut stream, mut peer) = pair();
        let rest = spans(&[7; 100]);
        let frame = OutgoingFrame {
            vnet: &VnetHeader::default(),
            head: &[1, 2, 3],
            rest: &rest,
        };
        assert_eq!(stream.send(&frame), Ok(Sent::Done));
        let mut got = [0; 107];
        peer.read_exact(&mut got).expect("read");
        assert_eq!(got[..8], [0, 0, 0, 103, 1, 2, 3, 7]);
    }

    #[test]
    fn frames_are_read_only_when_they_are_whole_and_nothing_else_leaves_the_socket() {
        let (mut stream, mut peer) = pair();
        let bytes = [framed(&[1; 60]), framed(&[2; 1500])].concat();
        peer.write_all(&bytes[..70]).expect("write");
        assert_eq!(received(&mut stream), Some(vec![1; 60]));
        assert_eq!(received(&mut stream), None);
        // A successor on the same socket sees the second frame from its beginning.
        let mut successor = Stream::new(stream.fd.try_clone().expect("dup")).expect("stream");
        assert_eq!(received(&mut successor), None);
        peer.write_all(&bytes[70..]).expect("write");
        assert_eq!(received(&mut successor), Some(vec![2; 1500]));
    }

    #[test]
    fn a_full_socket_says_so_and_no_frame_is_cut() {
        let (mut stream, mut peer) = pair();
        let rest = spans(&[7; 1500]);
        let frame = OutgoingFrame {
            vnet: &VnetHeader::default(),
            head: &[],
            rest: &rest,
        };
        let mut sent = 0;
        while stream.send(&frame) == Ok(Sent::Done) {
            sent += 1;
        }
        assert!(sent > 10 && stream.unsent.is_empty());
        drop(stream);
        let mut got = Vec::new();
        peer.read_to_end(&mut got).expect("read");
        assert_eq!(got.len(), sent * 1504);
    }

    #[test]
    fn frames_of_no_link_are_dropped_and_the_stream_stays_in_step() {
        let (mut stream, mut peer) = pair();
        for bytes in [LINK_FRAME_BYTES_MAX + 1, 40_000, 65_000] {
            let rest = spans(&vec![7; bytes]);
            let frame = OutgoingFrame {
                vnet: &VnetHeader::default(),
                head: &[],
                rest: &rest,
            };
            assert_eq!(stream.send(&frame), Ok(Sent::Dropped));
        }
        let vnet = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            gso_size: U16::new(40_000),
            ..VnetHeader::default()
        };
        let rest = spans(&tcp4(&[9; 50_000]));
        let frame = OutgoingFrame {
            vnet: &vnet,
            head: &[],
            rest: &rest,
        };
        assert_eq!(stream.send(&frame), Ok(Sent::Dropped));
        let rest = spans(&[8; LINK_FRAME_BYTES_MAX]);
        let frame = OutgoingFrame {
            vnet: &VnetHeader::default(),
            head: &[],
            rest: &rest,
        };
        assert_eq!(stream.send(&frame), Ok(Sent::Done));
        drop(stream);
        let mut got = Vec::new();
        peer.read_to_end(&mut got).expect("read");
        assert!(got.ends_with(&framed(&[8; LINK_FRAME_BYTES_MAX])));
        assert_eq!(whole_frames(&got), Ok(got.len()));
    }

    /// A server that dies when the socket takes no more leaves whole frames, whatever their length and however small the
    /// socket was.
    #[test]
    fn each_successor_finds_the_stream_in_step_where_the_one_before_met_a_full_socket() {
        let (ours, mut peer) = UnixStream::pair().expect("socket pair");
        setsockopt(&ours, sockopt::SndBuf, &4096).expect("set");
        peer.set_nonblocking(true).expect("set");
        let mut got = Vec::new();
        for round in 0..40usize {
            let mut stream = Stream::new(ours.try_clone().expect("dup").into()).expect("stream");
            let bytes = [60, 1514, 9014, LINK_FRAME_BYTES_MAX, 5000][round % 5];
            let rest = spans(&vec![round as u8; bytes]);
            let frame = OutgoingFrame {
                vnet: &VnetHeader::default(),
                head: &[],
                rest: &rest,
            };
            let mut sent = 0;
            while stream.send(&frame).expect("open") == Sent::Done {
                sent += 1;
            }
            assert!(round == 0 || sent > 0 || !got.is_empty());
            // The network reads a part that ends anywhere.
            let mut part = vec![0; 7001 * (1 + round % 4)];
            let count = peer.read(&mut part).expect("read");
            got.extend_from_slice(&part[..count]);
        }
        let mut rest = vec![0; 1 << 20];
        while let Ok(count) = peer.read(&mut rest) {
            got.extend_from_slice(&rest[..count]);
        }
        assert_eq!(whole_frames(&got), Ok(got.len()));
        let mut left = &got[..];
        while let Some((length, after)) = left.split_first_chunk::<4>() {
            let (frame, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            assert!(frame.iter().all(|byte| *byte == frame[0]));
            left = after;
        }
    }

    #[test]
    fn what_is_no_stream_is_refused() {
        let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().expect("pair");
        assert!(matches!(
            Stream::new(datagram.into()),
            Err(StreamError::NotAStream)
        ));
        let file = tempfile::tempfile().expect("a file");
        assert!(matches!(Stream::new(file.into()), Err(StreamError::NotAStream)));
    }

    #[test]
    fn a_large_segment_arrives_as_sound_frames() {
        let (mut stream, mut peer) = pair();
        let rest = spans(&tcp4(&[9; 30_000]));
        let vnet = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            gso_size: U16::new(1448),
            ..VnetHeader::default()
        };
        assert_eq!(
            stream.send(&OutgoingFrame {
                vnet: &vnet,
                head: &[],
                rest: &rest
            }),
            Ok(Sent::Done)
        );
        drop(stream);
        let mut got = Vec::new();
        peer.read_to_end(&mut got).expect("read");
        let (mut frames, mut data, mut left) = (0, 0, &got[..]);
        while let Some((length, rest)) = left.split_first_chunk::<4>() {
            let (frame, rest) = rest.split_at(u32::from_be_bytes(*length) as usize);
            assert!(is_sound(frame));
            frames += 1;
            data += frame.len() - 54;
            left = rest;
        }
        assert_eq!((frames, data), (21, 30_000));
    }

    #[test]
    fn an_impossible_length_ends_the_link_but_not_before_the_frames_ahead_of_it() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&framed(&[1; 60])).expect("write");
        peer.write_all(&[0xFF; 4]).expect("write");
        assert!(received(&mut stream).is_some());
        assert_eq!(stream.receive().err(), Some(Gone::FrameLength(u32::MAX)));
    }

    #[test]
    fn the_other_side_going_away_is_noticed() {
        let (mut stream, peer) = pair();
        drop(peer);
        assert_eq!(stream.receive().err(), Some(Gone::Closed));
    }

    #[test]
    fn what_goes_in_one_call_is_whole_frames_within_the_limit() {
        let one = framed(&[0; 9000]);
        assert_eq!(atomic_part(&one), one.len());
        assert_eq!(atomic_part(&one.repeat(8)), 3 * one.len());
    }
}
