//! Parsers over arbitrary bytes, `parse(emit(x)) == x`, and exact bytes where a guest would notice.

mod messages;
mod packets;
