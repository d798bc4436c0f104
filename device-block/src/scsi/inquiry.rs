//! Data of INQUIRY and READ CAPACITY.

use super::disk::{BLOCK_BYTES, Identity, Limits};

/// Quirk(Linux 6.1 storvsc): an error of INQUIRY is turned into success with whatever is in the buffer, and an
/// empty answer becomes a disk of type 0. So a logical unit that is not there must answer with this:
/// qualifier 3, type 0x1F (SPC-4 6.6.2), 36 bytes.
pub fn absent_unit() -> Vec<u8> {
    let mut data = vec![0u8; 36];
    data[0] = 0x7F;
    data[2] = VERSION_SPC4;
    data[3] = RESPONSE_FORMAT;
    data[4] = 36 - 5;
    data
}

/// SPC-4 table 141: the standard claims compliance with SPC-4. Quirk(Linux 6.1 sd): VPD pages are read from
/// version 4 on and READ CAPACITY (16) is tried first from 5 on; without it there is no discard.
const VERSION_SPC4: u8 = 0x06;
/// RESPONSE DATA FORMAT 2 with HISUP (SPC-4 6.6.2).
const RESPONSE_FORMAT: u8 = 0x12;
/// T10 VENDOR IDENTIFICATION, 8 characters.
pub const VENDOR: &[u8; 8] = b"BULKHEAD";
/// PRODUCT IDENTIFICATION, 16 characters.
pub const PRODUCT: &[u8; 16] = b"Virtual Disk    ";
/// PRODUCT REVISION LEVEL, 4 characters.
pub const REVISION: &[u8; 4] = b"1   ";

/// Standard INQUIRY data (SPC-4 6.6.2).
pub fn standard() -> Vec<u8> {
    let mut data = vec![0u8; 36];
    data[2] = VERSION_SPC4;
    data[3] = RESPONSE_FORMAT;
    data[4] = 36 - 5;
    // CMDQUE: the task set is the full one.
    data[7] = 0x02;
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(PRODUCT);
    data[32..36].copy_from_slice(REVISION);
    data
}

/// A vital product data page, or `None` if there is no such page (SPC-4 7.8, SBC-3 6.6).
pub fn vital_page(page: u8, identity: &Identity, limits: &Limits) -> Option<Vec<u8>> {
    let body = match page {
        0x00 => PAGES.to_vec(),
        0x80 => identity.serial.as_bytes().to_vec(),
        0x83 => designators(identity),
        0xB0 => block_limits(limits),
        0xB1 => characteristics(),
        0xB2 => provisioning(limits),
        _ => return None,
    };
    // Bodies are built here and short: the serial number is bounded by `Identity::new`.
    let length = u16::try_from(body.len()).ok()?;
    let mut data = vec![0x00, page];
    data.extend_from_slice(&length.to_be_bytes());
    data.extend_from_slice(&body);
    Some(data)
}

/// Page 0x00: the pages that exist, ascending.
const PAGES: [u8; 6] = [0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2];

/// Page 0x83 (SPC-4 7.8.6): a T10 designator and a locally assigned NAA one, both for the logical unit.
fn designators(identity: &Identity) -> Vec<u8> {
    let mut text = VENDOR.to_vec();
    text.extend_from_slice(identity.serial.as_bytes());
    let mut body = Vec::new();
    // CODE SET 1 (binary), ASSOCIATION 0, DESIGNATOR TYPE 3 (NAA). The highest type is what Linux's
    // scsi_vpd_lun_id and udev prefer, so it comes first.
    body.extend_from_slice(&[0x01, 0x03, 0x00, 8]);
    body.extend_from_slice(&identity.naa.to_be_bytes());
    // CODE SET 2 (ASCII), DESIGNATOR TYPE 1 (T10 vendor identification).
    body.extend_from_slice(&[0x02, 0x01, 0x00, text.len() as u8]);
    body.extend_from_slice(&text);
    body
}

/// Page 0xB0 (SBC-3 6.6.4), 64 bytes with its header.
fn block_limits(limits: &Limits) -> Vec<u8> {
    let mut body = vec![0u8; 0x3C];
    let mut put = |at: usize, value: u32| body[at - 4..at].copy_from_slice(&value.to_be_bytes());
    // Offsets below are those of the page minus its 4-byte header, plus the field's 4 bytes.
    // OPTIMAL TRANSFER LENGTH GRANULARITY is a u16 at byte 6: the upper half of this word is zero.
    put(4, limits.physical_block_bytes / BLOCK_BYTES);
    put(8, limits.max_transfer_blocks);
    put(12, limits.max_transfer_blocks);
    if let Some(unmap) = &limits.unmap {
        put(20, unmap.max_blocks);
        put(24, unmap.max_descriptors);
        put(28, unmap.granularity_blocks);
        // UGAVALID with an alignment of 0.
        put(32, 1 << 31);
    }
    body
}

/// Page 0xB1 (SBC-3 6.6.2): MEDIUM ROTATION RATE 1, non-rotating.
fn characteristics() -> Vec<u8> {
    let mut body = vec![0u8; 0x3C];
    body[1] = 1;
    body
}

/// Page 0xB2 (SBC-3 6.6.6).
fn provisioning(limits: &Limits) -> Vec<u8> {
    match limits.unmap {
        // LBPU: UNMAP is there; LBPRZ: unmapped blocks read zero. PROVISIONING TYPE 2: thin.
        Some(_) => vec![0, 0x80 | 0x04, 0x02, 0],
        None => vec![0, 0, 0, 0],
    }
}

/// READ CAPACITY (10) data (SBC-3 5.15.2).
pub fn capacity_10(block_count: u64) -> Vec<u8> {
    let last = u32::try_from(block_count.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut data = last.to_be_bytes().to_vec();
    data.extend_from_slice(&BLOCK_BYTES.to_be_bytes());
    data
}

/// READ CAPACITY (16) data (SBC-3 5.16.2), 32 bytes.
pub fn capacity_16(block_count: u64, limits: &Limits) -> Vec<u8> {
    let mut data = vec![0u8; 32];
    data[0..8].copy_from_slice(&block_count.saturating_sub(1).to_be_bytes());
    data[8..12].copy_from_slice(&BLOCK_BYTES.to_be_bytes());
    // LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
    data[13] = (limits.physical_block_bytes / BLOCK_BYTES).max(1).ilog2() as u8 & 0x0F;
    if limits.unmap.is_some() {
        // LBPME and LBPRZ.
        data[14] = 0x80 | 0x40;
    }
    data
}

#[cfg(test)]
mod tests {
    use super::super::disk::UnmapLimits;
    use super::*;

    fn identity() -> Identity {
        Identity::new("SN-0042", [7; 16], 3)
    }

    fn limits(unmap: bool) -> Limits {
        Limits {
            physical_block_bytes: 4096,
            max_transfer_blocks: 2048,
            unmap: unmap.then_some(UnmapLimits {
                max_blocks: 0x40_0000,
                max_descriptors: 256,
                granularity_blocks: 8,
            }),
        }
    }

    #[test]
    fn a_disk_says_what_it_is() {
        let data = standard();
        assert_eq!(data.len(), 36);
        assert_eq!(data[..8], [0, 0, 6, 0x12, 31, 0, 0, 2]);
        assert_eq!(&data[8..], b"BULKHEADVirtual Disk    1   ");
    }

    #[test]
    fn an_absent_unit_says_that_it_is_absent() {
        let data = absent_unit();
        assert_eq!((data.len(), data[0], data[4]), (36, 0x7F, 31));
    }

    #[test]
    fn every_listed_page_exists_and_says_its_number_and_length() {
        let list = vital_page(0, &identity(), &limits(true)).unwrap();
        assert_eq!(list, [0, 0, 0, 6, 0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2]);
        assert!(list[4..].is_sorted());
        for page in &list[4..] {
            let data = vital_page(*page, &identity(), &limits(true)).unwrap();
            assert_eq!(data[1], *page);
            assert_eq!(
                usize::from(u16::from_be_bytes([data[2], data[3]])),
                data.len() - 4
            );
        }
        assert_eq!(vital_page(0x89, &identity(), &limits(true)), None);
    }

    #[test]
    fn the_serial_number_page_is_the_serial_number() {
        assert_eq!(
            vital_page(0x80, &identity(), &limits(true)).unwrap(),
            b"\0\x80\0\x07SN-0042"
        );
    }

    #[test]
    fn designators_are_a_local_naa_and_a_t10_one() {
        let data = vital_page(0x83, &identity(), &limits(true)).unwrap();
        assert_eq!(data[4..8], [1, 3, 0, 8]);
        assert_eq!(data[8] >> 4, 3);
        assert_eq!(data[16..20], [2, 1, 0, 15]);
        assert_eq!(&data[20..], b"BULKHEADSN-0042");
    }

    #[test]
    fn block_limits_tell_linux_to_unmap() {
        let data = vital_page(0xB0, &identity(), &limits(true)).unwrap();
        assert_eq!(data.len(), 64);
        assert_eq!(data[6..8], [0, 8]);
        assert_eq!(data[8..12], 2048u32.to_be_bytes());
        assert_eq!(data[12..16], 2048u32.to_be_bytes());
        assert_eq!(data[20..24], 0x40_0000u32.to_be_bytes());
        assert_eq!(data[24..28], 256u32.to_be_bytes());
        assert_eq!(data[28..32], 8u32.to_be_bytes());
        assert_eq!(data[32..36], [0x80, 0, 0, 0]);
        assert_eq!(data[36..44], [0; 8], "no WRITE SAME");
    }

    #[test]
    fn without_unmap_nothing_says_that_there_is_unmap() {
        let data = vital_page(0xB0, &identity(), &limits(false)).unwrap();
        assert_eq!(data[20..36], [0; 16]);
        assert_eq!(
            vital_page(0xB2, &identity(), &limits(false)).unwrap()[4..],
            [0, 0, 0, 0]
        );
        assert_eq!(capacity_16(100, &limits(false))[14], 0);
    }

    #[test]
    fn the_thin_provisioning_triple_is_complete() {
        assert_eq!(
            vital_page(0xB2, &identity(), &limits(true)).unwrap()[4..],
            [0, 0x84, 2, 0]
        );
        assert_eq!(capacity_16(100, &limits(true))[14], 0xC0);
    }

    #[test]
    fn the_disk_does_not_rotate() {
        assert_eq!(
            vital_page(0xB1, &identity(), &limits(true)).unwrap()[4..6],
            [0, 1]
        );
    }

    #[test]
    fn capacities_are_last_addresses() {
        assert_eq!(capacity_10(2048), [0, 0, 7, 0xFF, 0, 0, 2, 0]);
        assert_eq!(capacity_10(1 << 32)[..4], [0xFF; 4]);
        assert_eq!(capacity_10((1 << 32) + 5)[..4], [0xFF; 4]);
        let data = capacity_16((1 << 33) + 1, &limits(true));
        assert_eq!(data[..13], [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(data[13], 3);
        assert_eq!(data.len(), 32);
    }
}
