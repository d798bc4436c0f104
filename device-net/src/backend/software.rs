//! What a TAP's kernel does for us, done here: for other sides that take only finished frames.

use super::OutgoingFrame;
use crate::frame::segment;

/// Calls `each` with every finished frame, in two parts. False: the frame cannot be finished.
///
/// `whole` and `head` are buffers to be used again.
pub fn finish(
    frame: &OutgoingFrame<'_>,
    whole: &mut Vec<u8>,
    head: &mut Vec<u8>,
    mut each: impl FnMut(&[u8], &[u8]),
) -> bool {
    whole.clear();
    whole.extend_from_slice(frame.head);
    whole.resize(frame.bytes(), 0);
    if frame.rest.copy_to(&mut whole[frame.head.len()..]).is_err() {
        return false;
    }
    let Ok(mut pieces) = segment::pieces(whole, frame.vnet) else {
        return false;
    };
    while let Some(piece) = pieces.next(head) {
        each(head, piece.rest);
    }
    true
}
