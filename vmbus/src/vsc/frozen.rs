//! Shared memory as text: what an older build left, kept in the repository to be read by newer ones; and
//! how that build read.
//!
//! A line for each 32 bytes that are not all zero: the offset in hexadecimal, a space, the bytes. The rest is zero.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use nix::sys::uio::{pread, pwrite};

use super::VscError;
use crate::mem::HostError;

const LINE_BYTES: usize = 32;

/// The bytes of `fd` from `start` up to `end`, both multiples of 4096, as text.
pub fn freeze(fd: impl AsFd, start: u64, end: u64) -> Result<String, VscError> {
    let mut text = String::new();
    let mut page = [0u8; 4096];
    for base in (start..end).step_by(page.len()) {
        // Offsets of files are below 2^63.
        let read = pread(&fd, &mut page, base as i64);
        let read = read.map_err(|errno| HostError::new("read shared memory", errno))?;
        for (index, line) in page[..read].chunks(LINE_BYTES).enumerate() {
            if line.iter().all(|&byte| byte == 0) {
                continue;
            }
            text += &format!("{:x} ", base + (index * LINE_BYTES) as u64);
            for byte in line {
                text += &format!("{byte:02x}");
            }
            text.push('\n');
        }
    }
    Ok(text)
}

/// Writes the bytes of a text made by [`freeze`] to their places. What the text does not name stays as it is.
pub fn thaw(text: &str, fd: impl AsFd) -> Result<(), VscError> {
    let wrong = || VscError::Missing("frozen memory in that text");
    for line in text.lines() {
        let (offset, digits) = line.split_once(' ').ok_or_else(wrong)?;
        let offset = i64::from_str_radix(offset, 16).map_err(|_| wrong())?;
        let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err(wrong());
        }
        let bytes: Option<Vec<u8>> = pairs
            .iter()
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect();
        pwrite(&fd, &bytes.ok_or_else(wrong)?, offset)
            .map_err(|errno| HostError::new("write shared memory", errno))?;
    }
    Ok(())
}

/// The device's state in the opening `open_epoch` as the build before versions (journal layout 1) found it: its code and
/// its layout, never to be changed. Encoded.
pub fn state_for_version_1(journal: impl AsFd, open_epoch: u32) -> Result<Option<Vec<u8>>, VscError> {
    const COPY_BYTES: i64 = 65536;
    let read = |offset: i64, bytes: &mut [u8]| {
        pread(&journal, bytes, offset)
            .map(|_| ())
            .map_err(|errno| HostError::new("read shared memory", errno))
    };
    let word = |offset: i64| {
        let mut word = [0; 8];
        read(offset, &mut word).map(|()| u64::from_le_bytes(word))
    };
    if ![0, u64::from_le_bytes(*b"BHJ\0\x01\0\0\0")].contains(&word(0)?) {
        return Err(VscError::Missing("layout that the older build knew"));
    }
    let mut newest: Option<(u64, u32, Vec<u8>)> = None;
    for base in [4096, 4096 + COPY_BYTES] {
        let (generation, sizes) = (word(base)?, word(base + 8)?);
        let length = sizes >> 32;
        if generation == 0 || length > COPY_BYTES as u64 - 24 {
            continue;
        }
        let mut payload = vec![0; length as usize];
        read(base + 24, &mut payload)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&generation.to_le_bytes());
        hasher.update(&sizes.to_le_bytes());
        hasher.update(&payload);
        let is_whole = word(base + 16)? == u64::from(hasher.finalize());
        if is_whole && newest.as_ref().is_none_or(|(last, ..)| *last < generation) {
            newest = Some((generation, sizes as u32, payload));
        }
    }
    Ok(newest
        .filter(|(_, epoch, _)| *epoch == open_epoch)
        .map(|(.., payload)| payload))
}
