#![forbid(unsafe_code)]
//! How guest RAM gets its pages.
//!
//! Shared memory is faulted in by 4 KiB unless the host gives huge pages for it, and each fault of the guest is an
//! exit. In order of preference:
//!
//! 1. the host gives huge pages on a fault (`shmem_enabled` is advise, within_size or always): nothing to do;
//! 2. it gives them on request (`MADV_COLLAPSE`, which does not look at `shmem_enabled`): they are asked for before
//!    anything is written to RAM. That makes RAM resident and takes time, so it stops at [`EAGER_BYTES`];
//! 3. it gives none: pages come when they are touched, or all at once if the operator says so.

use std::io;

use vmbus::ipc::Populate;

use crate::kvm::{GuestMapping, HugePages};

/// Limit: RAM that is made resident without having been asked for: what a kernel touches while it starts, with
/// its page structures.
const EAGER_BYTES: usize = 512 << 20;

/// Prepares RAM, which is empty; returns what was found and done, for inspection.
pub fn prepare(memory: &GuestMapping, mode: Populate) -> io::Result<&'static str> {
    let huge = memory.advise_huge_pages();
    Ok(match (huge, mode) {
        (HugePages::OnFault, Populate::Never | Populate::Auto) => "huge pages on fault",
        (HugePages::OnFault, Populate::Always) => {
            memory.populate()?;
            "huge pages, populated"
        }
        (HugePages::OnRequest, Populate::Auto) => {
            memory.collapse(EAGER_BYTES);
            "huge pages on request"
        }
        (HugePages::OnRequest, Populate::Always) => {
            memory.collapse(memory.total_bytes());
            memory.populate()?;
            "huge pages on request, populated"
        }
        (HugePages::None, Populate::Always) => {
            memory.populate()?;
            "4 KiB pages, populated"
        }
        (HugePages::OnRequest | HugePages::None, _) => "4 KiB pages on fault",
    })
}
