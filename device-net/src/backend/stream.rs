//! A UNIX stream socket that carries frames, each behind its length (4 bytes, big endian): how passt and QEMU's
//! `-netdev stream` speak.
//!
//! A server may die between any two system calls, and its successor goes on with the same socket, so neither side's
//! boundary between frames may ever lie in a dead server's memory:
//! - *Receive*: the socket is peeked at, and then exactly the whole frames that were seen are read. A frame that has not
//!   come whole stays in the kernel.
//! - *Send*: whole frames go in one call of at most [`ATOMIC_BYTES`]. Quirk(Linux unix_stream_sendmsg): that much is one
//!   buffer in the kernel, which is queued whole or not at all. Should a part be taken nonetheless, the rest is kept and
//!   goes first.

use super::{Backend, FRAME_BYTES_MAX, Gone, IncomingFrame, OutgoingFrame, Sent, set_nonblocking, software};
use crate::frame::vnet::VnetHeader;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vmbus::mem::HostError;

const LENGTH_BYTES: usize = 4;
/// Limit: below `SKB_MAX_ALLOC + UNIX_SKB_FRAGS_SZ` (Linux 6.1 net/unix/af_unix.c), see above.
const ATOMIC_BYTES: usize = 32 * 1024;
/// Bytes looked at in one go.
const CHUNK_BYTES: usize = LENGTH_BYTES + FRAME_BYTES_MAX;
/// Below this no Ethernet frame exists.
const FRAME_BYTES_MIN: usize = 14;

pub struct Stream {
    fd: OwnedFd,
    chunk: Vec<u8>,
    /// Whole frames in `chunk` that were not handed out.
    ready: std::ops::Range<usize>,
    /// Finished frames, with their lengths, that wait for the kernel.
    unsent: Vec<u8>,
    /// `unsent` begins in the middle of a frame.
    cut: bool,
    prefix: Vec<u8>,
    whole: Vec<u8>,
    head: Vec<u8>,
}

impl Stream {
    pub fn new(fd: OwnedFd) -> Result<Self, HostError> {
        set_nonblocking(fd.as_fd())?;
        Ok(Self {
            fd,
            chunk: vec![0; CHUNK_BYTES],
            ready: 0..0,
            unsent: Vec::new(),
            cut: false,
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

    /// The kernel took a part of a frame: the rest is copied, and the guest's memory is free.
    fn keep_rest(&mut self, frame: &OutgoingFrame<'_>, taken: usize) -> Result<(), Gone> {
        self.unsent.clear();
        self.unsent.extend_from_slice(&self.prefix);
        let prefix_bytes = self.unsent.len();
        self.unsent.resize(prefix_bytes + frame.rest.len(), 0);
        // The spans were checked when they were made; a failure would leave the stream out of step.
        frame
            .rest
            .copy_to(&mut self.unsent[prefix_bytes..])
            .map_err(|_| Gone::Closed)?;
        self.unsent.drain(..taken);
        self.cut = true;
        Ok(())
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
            let finished = software::finish(frame, &mut self.whole, &mut self.head, |head, rest| {
                Self::append(unsent, head, rest);
            });
            self.flush()?;
            return Ok(if finished { Sent::Done } else { Sent::Dropped });
        }
        self.prefix.clear();
        self.prefix.extend_from_slice(&length_prefix(frame.bytes()));
        self.prefix.extend_from_slice(frame.head);
        let all = LENGTH_BYTES + frame.bytes();
        match frame.rest.writev_to(self.fd.as_fd(), &self.prefix) {
            Ok(taken) if taken == all => Ok(Sent::Done),
            Ok(taken) => {
                self.keep_rest(frame, taken)?;
                Ok(Sent::Done)
            }
            Err(error) if error.errno == Errno::EAGAIN => Ok(Sent::Full),
            Err(error) => Err(host(error.errno, "write to the stream")),
        }
    }

    fn flush(&mut self) -> Result<bool, Gone> {
        while !self.unsent.is_empty() {
            // What begins in the middle of a frame goes as a whole: its boundaries are not known here.
            let part = if self.cut {
                self.unsent.len()
            } else {
                atomic_part(&self.unsent)
            };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.fd.as_raw_fd(), &self.unsent[..part], flags) {
                Ok(taken) => {
                    self.unsent.drain(..taken);
                    self.cut = taken != part;
                }
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
        let huge = framed(&[0; 60_000]);
        assert_eq!(atomic_part(&huge.repeat(2)), huge.len());
    }
}
