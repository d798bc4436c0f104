#![forbid(unsafe_code)]
//! How guest RAM gets its pages.
//!
//! Shared memory is faulted in by 4 KiB unless the host gives huge pages for it, and each fault of the guest is an
//! exit. In order of preference:
//!
//! 1. the host gives huge pages on a fault (`shmem_enabled` is advise, within_size or always): nothing to do;
//! 2. it gives them on request (`MADV_COLLAPSE`, which does not look at `shmem_enabled`): a thread asks for them,
//!    first where the kernel goes, ahead of the guest that is starting meanwhile. That makes RAM resident, so it
//!    stops at [`EAGER_BYTES`];
//! 3. it gives none: pages come when they are touched, or all at once if the operator says so.

use std::io;
use std::sync::Arc;
use std::thread;

use vmbus::ipc::Populate;

use crate::kvm::{GuestMapping, HugePages};
use crate::pc::memory_map::KERNEL;

/// Limit: RAM that is made resident without having been asked for: what a kernel touches while it starts, with
/// its page structures.
const EAGER_BYTES: usize = 512 << 20;
const HUGE_BYTES: usize = 2 << 20;

/// Prepares RAM; returns what was found and is done, for inspection.
pub fn prepare(memory: &Arc<GuestMapping>, mode: Populate) -> io::Result<&'static str> {
    let huge = memory.advise_huge_pages();
    let limit = match mode {
        Populate::Never => 0,
        Populate::Auto => EAGER_BYTES.min(memory.total_bytes()),
        Populate::Always => memory.total_bytes(),
    };
    let done = match (huge, mode) {
        (HugePages::OnFault, Populate::Always) => "huge pages, populated",
        (HugePages::OnFault, _) => return Ok("huge pages on fault"),
        (HugePages::OnRequest, Populate::Never) => return Ok("4 KiB pages on fault"),
        (HugePages::OnRequest, _) => "huge pages on request",
        (HugePages::None, Populate::Always) => "4 KiB pages, populated",
        (HugePages::None, _) => return Ok("4 KiB pages on fault"),
    };
    let memory = memory.clone();
    thread::Builder::new()
        .name("populate".to_owned())
        .spawn(move || {
            for offset in order(limit) {
                let collapsed = huge == HugePages::OnRequest && memory.collapse(offset);
                if !collapsed && (mode != Populate::Always || memory.populate(offset, HUGE_BYTES).is_err()) {
                    // No huge page is free any more, or no memory: the guest gets what it touches.
                    break;
                }
            }
        })?;
    Ok(done)
}

/// Offsets of the 2 MiB pieces below `limit`: from the kernel upwards, then what lies below it.
fn order(limit: usize) -> impl Iterator<Item = usize> {
    let kernel = KERNEL as usize;
    let above = (kernel..limit).step_by(HUGE_BYTES);
    above.chain((0..kernel.min(limit)).step_by(HUGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_visited_once_and_the_kernel_s_first() {
        let mut pieces: Vec<usize> = order(64 << 20).collect();
        assert_eq!(pieces[0], KERNEL as usize);
        pieces.sort_unstable();
        assert_eq!(pieces, (0..64 << 20).step_by(HUGE_BYTES).collect::<Vec<_>>());
        assert_eq!(order(0).count(), 0);
    }
}
