//! Fixed layouts of the channel messages (Linux 6.1 include/linux/hyperv.h, `struct vmbus_channel_*`), without the
//! eight-byte header that all have in common.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

layouts! {
    /// The header: `struct vmbus_channel_message_header`.
    Header = 8 { message_type: U32, padding: U32, }
    /// Type 1: `struct vmbus_channel_offer_channel` (0xC4 with the header).
    OfferChannel = 0xBC {
        interface: [u8; 16],
        instance: [u8; 16],
        reserved1: [u8; 16],
        flags: U16,
        mmio_megabytes: U16,
        user_defined: [u8; 120],
        sub_channel_index: U16,
        reserved2: U16,
        relid: U32,
        monitor_id: u8,
        monitor_allocated: u8,
        is_dedicated_interrupt: U16,
        connection_id: U32,
    }
    /// Types 2, 7, 12 and 13: one number.
    OneId = 4 { id: U32, }
    /// Type 5: `struct vmbus_channel_open_channel` (0x94).
    Open = 0x8C {
        relid: U32,
        open_id: U32,
        ring_gpadl: U32,
        target_vp: U32,
        downstream_page_offset: U32,
        user_data: [u8; 120],
    }
    /// Types 6 and 10: `struct vmbus_channel_open_result`, `struct vmbus_channel_gpadl_created`.
    Result3 = 12 { relid: U32, id: U32, status: U32, }
    /// Type 8: `struct vmbus_channel_gpadl_header`, then ranges.
    GpadlHeaderFixed = 12 { relid: U32, gpadl: U32, range_bytes: U16, range_count: U16, }
    /// Type 9: `struct vmbus_channel_gpadl_body`, then PFNs.
    GpadlBodyFixed = 8 { message_number: U32, gpadl: U32, }
    /// Types 11, 22 and 24: two numbers.
    TwoIds = 8 { relid: U32, id: U32, }
    /// Type 14: `struct vmbus_channel_initiate_contact` (0x28).
    Contact = 0x20 {
        version: U32,
        target_vp: U32,
        interrupt_page_or_target: U64,
        parent_to_child_monitor: U64,
        child_to_parent_monitor: U64,
    }
    /// Type 15: `struct vmbus_channel_version_response` (0x10).
    VersionResponseLayout = 8 {
        version_supported: u8,
        connection_state: u8,
        padding: U16,
        message_connection_id: U32,
    }
    /// Type 21: `struct vmbus_channel_tl_connect_request` (0x28; with the silo GUID 0x38).
    TlConnectFixed = 0x20 { endpoint: [u8; 16], service: [u8; 16], }
    /// Type 23: TL_CONNECT_RESULT (0x2C).
    TlConnectResultLayout = 0x24 { endpoint: [u8; 16], service: [u8; 16], status: U32, }
}
