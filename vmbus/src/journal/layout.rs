//! Where everything lies in the journal. All words are `u64`, little endian, aligned.
#![forbid(unsafe_code)]

/// Limit: channels of one device, the primary included. Linux asks for at most one for each CPU, and a VM has at
/// most 64.
pub const MAX_CHANNELS: u16 = 64;

/// Limit: requests of one channel in flight, plus held packets. A 128 KiB ring has room for about as many of the
/// smallest completions.
pub const SLOT_COUNT: u16 = 1024;

/// Limit: held packets of one channel. Half of the slots, so that packets which only the guest can release never
/// keep the requests, which come through the same ring as the releases, from being taken.
pub const MAX_HELD: u16 = SLOT_COUNT / 2;

/// Limit: bytes kept of one request. The largest is a storvsp packet of 64 bytes with the page list of a 1 MiB
/// transfer (257 pages at 8 bytes).
pub const MAX_PAYLOAD_BYTES: usize = 2560;

/// Limit: bytes of one copy of the saved state, its header included.
pub const SAVED_STATE_BYTES: u64 = 64 * 1024;

const PAGE_BYTES: u64 = 4096;

pub(super) const SAVED_STATE: u64 = PAGE_BYTES;
const CHANNELS: u64 = SAVED_STATE + 2 * SAVED_STATE_BYTES;

// Words of a channel's header page.
/// Opening that the contents belong to, plus one; 0: none. With [`GIVEN_UP`]: that opening is not served any more.
pub(super) const EPOCH: u64 = 0x00;
pub(super) const GIVEN_UP: u64 = 1 << 63;
/// Sequence number of the last request taken.
pub(super) const TAKEN_SEQ: u64 = 0x08;
/// The ring's read index as of `taken_seq`, in the one of two words that the number's lowest bit names.
pub(super) const TAKE_INDEX: u64 = 0x10;
/// Sequence number of the last publication that was finished.
pub(super) const PUBLISHED_SEQ: u64 = 0x20;
/// Two records of two words, named by the number's lowest bit: sequence number; old index | new index << 32.
pub(super) const RECORDS: u64 = 0x28;
/// How many slots were ever used since the channel was opened.
pub(super) const USED_SLOTS: u64 = 0x48;

// Words of a slot.
pub(super) const SLOT_BYTES: u64 = 32;
pub(super) const SLOT_HEAD: u64 = 0x00;
pub(super) const SLOT_TAKE_SEQ: u64 = 0x08;
pub(super) const SLOT_PUBLISH_SEQ: u64 = 0x10;
pub(super) const SLOT_TRANSACTION: u64 = 0x18;

const SLOTS: u64 = PAGE_BYTES;
const PAYLOADS: u64 = SLOTS + SLOT_COUNT as u64 * SLOT_BYTES;
const CHANNEL_BYTES: u64 = PAYLOADS + SLOT_COUNT as u64 * MAX_PAYLOAD_BYTES as u64;

const _: () = assert!(RECORDS + 2 * 16 <= USED_SLOTS);
const _: () = assert!(CHANNEL_BYTES.is_multiple_of(PAGE_BYTES) && CHANNELS.is_multiple_of(PAGE_BYTES));
const _: () = assert!(MAX_PAYLOAD_BYTES.is_multiple_of(8));

/// Length of a journal in bytes. Sparse: what is not used takes no memory.
pub const fn required_len() -> u64 {
    CHANNELS + MAX_CHANNELS as u64 * CHANNEL_BYTES
}

/// Where the channel with that index begins.
///
/// # Panics
/// If the index is [`MAX_CHANNELS`] or above; callers have checked it.
pub(super) fn channel(sub_index: u16) -> u64 {
    assert!(sub_index < MAX_CHANNELS, "channel index {sub_index}");
    CHANNELS + u64::from(sub_index) * CHANNEL_BYTES
}

/// Where a slot's words begin, counted from the channel.
pub(super) fn slot(slot: u16) -> u64 {
    debug_assert!(slot < SLOT_COUNT);
    SLOTS + u64::from(slot) * SLOT_BYTES
}

/// Where a slot's payload begins, counted from the channel.
pub(super) fn payload(slot: u16) -> u64 {
    debug_assert!(slot < SLOT_COUNT);
    PAYLOADS + u64::from(slot) * MAX_PAYLOAD_BYTES as u64
}

/// Where what is used of a journal lies: begin and length in bytes of its header, of the states that are saved by anything
/// so far, and of the header, the slots and the payloads of each channel. For tests that spoil it.
pub(crate) fn used_parts(channels: u16, slots: u16) -> Vec<(u64, u64)> {
    const HEADER_BYTES: u64 = 64;
    const STATE_BYTES: u64 = 320;
    let copies = [0, 1].map(|copy| (SAVED_STATE + copy * SAVED_STATE_BYTES, STATE_BYTES));
    let mut parts = vec![(0, HEADER_BYTES)];
    parts.extend(copies);
    for index in 0..channels {
        let base = channel(index);
        parts.extend([
            (base, USED_SLOTS + 8),
            (base + slot(0), u64::from(slots) * SLOT_BYTES),
            (base + payload(0), u64::from(slots) * MAX_PAYLOAD_BYTES as u64),
        ]);
    }
    parts
}
