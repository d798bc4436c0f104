//! The ELF kernel inside a bzImage.
//!
//! Source: Linux 6.1 Documentation/x86/boot.rst, "Details of Header Fields": `setup_sects`, `payload_offset`,
//! `payload_length`; and scripts/Makefile.lib `size_append`: all compressed payloads but gzip's are followed by the
//! unpacked size, four bytes that are no part of the compressed stream.

#![forbid(unsafe_code)]

use super::packages::Sysroot;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR_BYTES: usize = 512;

/// Unpacks the ELF kernel of the bzImage `image` into the file `target`, with the sysroot's decompressors.
pub fn extract(image: &Path, target: &Path, sysroot: &Sysroot) -> Result<()> {
    let bytes = std::fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let (program, payload) = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
    let mut unpacker = sysroot
        .command(program)?
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(File::create(target)?)
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut input = unpacker.stdin.take().context("the decompressor takes no input")?;
    let fed = input.write_all(payload);
    drop(input);
    let status = unpacker.wait()?;
    ensure!(
        status.success(),
        "{program} could not unpack the kernel ({status})"
    );
    fed?;
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut File::open(target)?, &mut magic)?;
    ensure!(&magic == b"\x7fELF", "what the bzImage holds is no ELF file");
    Ok(())
}

/// The decompressor to use (a path in the sysroot) and the compressed stream.
fn payload(image: &[u8]) -> Result<(&'static str, &[u8])> {
    ensure!(
        image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS"),
        "the header's magic is missing"
    );
    let sectors = match image.get(SETUP_SECTS).copied().unwrap_or(0) {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * SECTOR_BYTES + word(image, PAYLOAD_OFFSET)?;
    let length = word(image, PAYLOAD_LENGTH)?;
    let end = start
        .checked_add(length)
        .context("the payload's length overflows")?;
    let stream = image
        .get(start..end)
        .context("the payload reaches beyond the file")?;
    let without_size = &stream[..stream.len().saturating_sub(4)];
    Ok(match stream {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("usr/bin/xz", without_size),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("usr/bin/zstd", without_size),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("usr/bin/lz4", without_size),
        _ => bail!("the kernel is compressed by something other than xz, zstd or lz4"),
    })
}

fn word(image: &[u8], at: usize) -> Result<usize> {
    let bytes = image
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .context("the header is cut off")?;
    Ok(usize::try_from(u32::from_le_bytes(bytes))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(magic: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&100u32.to_le_bytes());
        image[1040..1040 + magic.len()].copy_from_slice(magic);
        image
    }

    #[test]
    fn the_payload_is_found_behind_the_set_up_code_and_loses_its_size_word() {
        let image = image(&[0xfd, b'7', b'z', b'X', b'Z', 0]);
        let (program, stream) = payload(&image).unwrap();
        assert_eq!((program, stream.len(), stream[0]), ("usr/bin/xz", 96, 0xfd));
    }

    #[test]
    fn what_is_no_bzimage_is_refused() {
        assert!(payload(&[]).is_err());
        assert!(payload(&image(b"nonsense")).is_err());
        assert!(payload(&image(&[0xfd, b'7', b'z', b'X', b'Z', 0])[..1100]).is_err());
    }
}
