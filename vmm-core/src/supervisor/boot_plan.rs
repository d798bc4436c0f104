#![forbid(unsafe_code)]
//! What `bulkhead-vcpu` copies into guest memory at each power-on, and the files it copies from.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow};
use vmbus::ipc::BootPlan;
use vmbus::mem::{RamLayout, sealed_memfd};

use super::backend::Named;
use crate::pc::boot::{self, Boot};

/// Names of the plan's files, by number.
const FILES: [&str; 3] = ["boot0", "boot1", "boot2"];

/// Draws up the plan.
///
/// # Errors
/// The kernel, the initrd or the command line is unfit; a sentence for the operator.
pub fn draw_up(
    kernel: File,
    initrd: Option<File>,
    command_line: &str,
    vp_count: u16,
    memory_bytes: u64,
) -> Result<(BootPlan, Named)> {
    let boot = Boot {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        command_line,
        vp_count,
    };
    let (plan, data) = boot::plan(&boot, &RamLayout::for_size(memory_bytes))?;
    let file = sealed_memfd("boot-data", data.len() as u64)
        .map_err(|error| anyhow!("cannot make a memory file: {error}"))?;
    let file = File::from(file);
    file.write_all_at(&data, 0)
        .context("cannot write to a memory file")?;
    let files = [Some(file), Some(kernel), initrd];
    let named = FILES.into_iter().zip(files);
    let named = named.filter_map(|(name, file)| Some((name, OwnedFd::from(file?))));
    Ok((plan, named.collect()))
}
