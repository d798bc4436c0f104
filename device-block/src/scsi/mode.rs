//! Data of MODE SENSE and LOG SENSE.

/// What a disk's mode pages say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeState {
    /// Writes are refused.
    pub read_only: bool,
    /// Written data may be volatile until it is flushed.
    pub write_cache: bool,
}

/// Caching mode page (SBC-3 6.5.5).
const PAGE_CACHING: u8 = 0x08;
/// Control mode page (SPC-4 7.5.8).
const PAGE_CONTROL: u8 = 0x0A;
/// All pages (SPC-4 6.13.1).
const PAGE_ALL: u8 = 0x3F;
/// PAGE CONTROL: changeable values (SPC-4 table 164).
const CHANGEABLE: u8 = 1;
/// PAGE CONTROL: saved values.
const SAVED: u8 = 3;

/// MODE SENSE data (SPC-4 7.5.4).
///
/// Quirk(Linux 6.1 storvsc): errors of MODE SENSE are turned into success, and sd then reads whatever is in its
/// buffer. So a page that does not exist is answered by a valid header without a page.
pub fn sense(long_header: bool, page_control: u8, page_code: u8, subpage: u8, state: ModeState) -> Vec<u8> {
    let mut pages = Vec::new();
    if page_control != SAVED && (subpage == 0 || subpage == 0xFF) {
        if page_code == PAGE_CACHING || page_code == PAGE_ALL {
            pages.extend_from_slice(&caching_page(page_control, state));
        }
        if page_code == PAGE_CONTROL || page_code == PAGE_ALL {
            pages.extend_from_slice(&control_page(page_control));
        }
    }
    // DEVICE-SPECIFIC PARAMETER (SBC-3 6.5.1): WP, DPOFUA.
    let device = if state.read_only { 0x80 | 0x10 } else { 0x10 };
    let mut data = if long_header {
        let length = (pages.len() + 6) as u16;
        let [high, low] = length.to_be_bytes();
        vec![high, low, 0, device, 0, 0, 0, 0]
    } else {
        vec![(pages.len() + 3) as u8, 0, device, 0]
    };
    data.extend_from_slice(&pages);
    data
}

fn caching_page(page_control: u8, state: ModeState) -> [u8; 20] {
    let mut page = [0u8; 20];
    page[0] = PAGE_CACHING;
    page[1] = 0x12;
    // WCE. Nothing is changeable, there is no MODE SELECT.
    if page_control != CHANGEABLE && state.write_cache {
        page[2] = 0x04;
    }
    page
}

fn control_page(page_control: u8) -> [u8; 12] {
    let mut page = [0u8; 12];
    page[0] = PAGE_CONTROL;
    page[1] = 0x0A;
    if page_control != CHANGEABLE {
        // QUEUE ALGORITHM MODIFIER 1: unrestricted reordering.
        page[3] = 0x10;
    }
    page
}

/// LOG SENSE: the list of supported pages, which has but itself (SPC-4 7.3.17). `None`: no such page.
pub fn log_page(page_code: u8, subpage: u8) -> Option<Vec<u8>> {
    (page_code == 0 && subpage == 0).then(|| vec![0x00, 0x00, 0x00, 0x01, 0x00])
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITABLE: ModeState = ModeState {
        read_only: false,
        write_cache: true,
    };

    #[test]
    fn linux_finds_the_write_cache_in_page_8() {
        let data = sense(false, 0, 0x08, 0, WRITABLE);
        assert_eq!(data.len(), 24);
        assert_eq!(data[..7], [23, 0, 0x10, 0, 0x08, 0x12, 0x04]);
        let through = ModeState {
            write_cache: false,
            ..WRITABLE
        };
        assert_eq!(sense(false, 0, 0x08, 0, through)[6], 0);
    }

    #[test]
    fn the_write_protect_bit_is_in_both_headers() {
        let protected = ModeState {
            read_only: true,
            write_cache: false,
        };
        assert_eq!(sense(false, 0, 0x3F, 0, protected)[2] & 0x80, 0x80);
        assert_eq!(sense(true, 0, 0x3F, 0, protected)[3] & 0x80, 0x80);
        assert_eq!(sense(false, 0, 0x3F, 0, WRITABLE)[2] & 0x80, 0);
    }

    #[test]
    fn all_pages_come_in_ascending_order_and_the_length_is_right() {
        let data = sense(true, 0, 0x3F, 0, WRITABLE);
        assert_eq!(
            usize::from(u16::from_be_bytes([data[0], data[1]])),
            data.len() - 2
        );
        assert_eq!((data[8], data[8 + 20]), (0x08, 0x0A));
        let short = sense(false, 0, 0x3F, 0, WRITABLE);
        assert_eq!(usize::from(short[0]), short.len() - 1);
    }

    #[test]
    fn a_page_that_is_not_there_is_a_header_alone() {
        for page in [0x01u8, 0x1C, 0x3E] {
            assert_eq!(sense(false, 0, page, 0, WRITABLE), [3, 0, 0x10, 0]);
        }
        assert_eq!(
            sense(false, 3, 0x08, 0, WRITABLE),
            [3, 0, 0x10, 0],
            "nothing can be saved"
        );
        assert_eq!(sense(true, 0, 0x0A, 1, WRITABLE), [0, 6, 0, 0x10, 0, 0, 0, 0]);
    }

    #[test]
    fn nothing_is_changeable() {
        let data = sense(false, 1, 0x3F, 0, WRITABLE);
        assert_eq!(data[6..24], [0; 18]);
        assert_eq!(data[26..], [0; 10]);
    }
}
