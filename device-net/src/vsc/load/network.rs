//! The network's end of the stream, and frames that tell who they are.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// Ethernet, IPv4, UDP.
const HEADER_BYTES: usize = 14 + 20 + 8;
/// Sender, number.
const MARK_BYTES: usize = 2 + 8;
const CHECKSUM_BYTES: usize = 4;
/// Smallest frame of a load.
pub const FRAME_BYTES_MIN: usize = HEADER_BYTES + MARK_BYTES + CHECKSUM_BYTES;
const FRAME_BYTES_MAX: usize = 1514;

/// The far end of the stream.
#[derive(Debug)]
pub(super) struct Network {
    pub stream: UnixStream,
    /// What was read. Its first [`Self::taken`] bytes were taken.
    inbox: Vec<u8>,
    taken: usize,
    piece: Vec<u8>,
    pub outbox: VecDeque<u8>,
}

/// Limit: bytes read at once.
const PIECE_BYTES: usize = 64 << 10;

impl Network {
    /// Its stream must not block.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            inbox: Vec::new(),
            taken: 0,
            piece: vec![0; PIECE_BYTES],
            outbox: VecDeque::new(),
        }
    }

    pub fn put(&mut self, frame: &[u8]) {
        self.outbox.extend((frame.len() as u32).to_be_bytes());
        self.outbox.extend(frame);
    }

    /// Writes pieces that end anywhere, so that the server sees halves of frames. Whether any were written.
    pub fn flush(&mut self, random: &mut Random) -> std::io::Result<bool> {
        let mut moved = false;
        while !self.outbox.is_empty() {
            let piece = 1 + random.below(4000) as usize;
            let (front, _) = self.outbox.as_slices();
            match self.stream.write(&front[..front.len().min(piece)]) {
                Ok(count) => {
                    self.outbox.drain(..count);
                    moved = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    pub fn read(&mut self) -> std::io::Result<bool> {
        let mut moved = false;
        self.inbox.drain(..std::mem::take(&mut self.taken));
        loop {
            match self.stream.read(&mut self.piece) {
                Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.inbox.extend_from_slice(&self.piece[..count]);
                    moved = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next whole frame.
    pub fn take(&mut self) -> Option<&[u8]> {
        let (length, rest) = self.inbox[self.taken..].split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let frame = rest.get(..length)?;
        self.taken += 4 + length;
        Some(frame)
    }
}

/// A frame of a load: UDP, so that receive-side scaling sees a flow.
pub(super) fn frame(to: [u8; 6], sender: u16, number: u64, bytes: usize) -> Vec<u8> {
    let bytes = bytes.clamp(FRAME_BYTES_MIN, FRAME_BYTES_MAX);
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&((bytes - 14) as u16).to_be_bytes());
    // Not a fragment; 64 hops; UDP; no checksum, which nobody on the way looks at.
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    frame.extend_from_slice(&(4000 + sender).to_be_bytes());
    frame.extend_from_slice(&[0x20, 0]);
    frame.extend_from_slice(&((bytes - 34) as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(&sender.to_be_bytes());
    frame.extend_from_slice(&number.to_be_bytes());
    let filling = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    frame.extend((frame.len()..bytes - CHECKSUM_BYTES).map(|place| (place as u64 ^ filling) as u8));
    let checksum = crc32fast::hash(&frame);
    frame.extend_from_slice(&checksum.to_be_bytes());
    frame
}

/// Sender and number of a frame; `None` if it is not as it was made.
pub(super) fn mark_of(frame: &[u8]) -> Option<(u16, u64)> {
    let (body, checksum) = frame.split_last_chunk::<CHECKSUM_BYTES>()?;
    if crc32fast::hash(body) != u32::from_be_bytes(*checksum) {
        return None;
    }
    let mark = body.get(HEADER_BYTES..)?;
    let (sender, rest) = mark.split_first_chunk::<2>()?;
    Some((
        u16::from_be_bytes(*sender),
        u64::from_be_bytes(*rest.first_chunk()?),
    ))
}

/// Xorshift, so that a seed names a load.
#[derive(Debug)]
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        if limit == 0 { 0 } else { self.0 % limit }
    }

    pub fn frame_bytes(&mut self) -> usize {
        match self.below(3) {
            0 => FRAME_BYTES_MIN,
            1 => FRAME_BYTES_MAX,
            _ => FRAME_BYTES_MIN + self.below((FRAME_BYTES_MAX - FRAME_BYTES_MIN) as u64) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_tells_who_it_is_and_whether_it_was_changed() {
        for bytes in [0, FRAME_BYTES_MIN, 500, FRAME_BYTES_MAX] {
            let mut frame = frame([2; 6], 7, 0x1_0000_0001, bytes);
            assert_eq!(frame.len(), bytes.max(FRAME_BYTES_MIN));
            assert_eq!(mark_of(&frame), Some((7, 0x1_0000_0001)));
            for place in [0, 20, HEADER_BYTES, frame.len() - 1] {
                frame[place] ^= 4;
                assert_eq!(mark_of(&frame), None);
                frame[place] ^= 4;
            }
        }
    }
}
