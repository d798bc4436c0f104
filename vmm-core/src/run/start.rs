#![forbid(unsafe_code)]
//! From the supervisor's `Start` to a machine that only needs to be told to run.

use std::fs::File;
use std::os::fd::OwnedFd;

use vmbus::ipc::hello::check_protocol;
use vmbus::ipc::named_fds::NamedFds;
use vmbus::ipc::{Message, PeerFault, Socket, SupervisorToVcpu, VcpuConfig};

use crate::child::wait_for;
use crate::hyperv::MAX_VPS;

/// Limit: less is no room for a kernel beside what we put below 16 MiB.
const MIN_MEMORY_BYTES: u64 = 32 << 20;
/// Limit: 46 bits of guest-physical address, which every x86-64 processor with KVM has, less the hole.
const MAX_MEMORY_BYTES: u64 = 32 << 40;
/// RAM comes in huge pages.
const MEMORY_STEP_BYTES: u64 = 2 << 20;

/// What the supervisor handed over.
pub struct Start {
    pub config: VcpuConfig,
    pub kvm: OwnedFd,
    pub bus: OwnedFd,
    /// Files of the boot plan, by number.
    pub boot_files: Vec<File>,
    pub console_in: Option<OwnedFd>,
    pub console_out: Option<OwnedFd>,
}

/// Waits for `Start`.
pub fn receive(socket: &mut Socket) -> anyhow::Result<Start> {
    let (message, fds) = wait_for(socket)?;
    let SupervisorToVcpu::Start {
        protocol,
        config,
        fds: names,
    } = message
    else {
        let why = "Start comes first";
        return Err(PeerFault::OutOfTurn {
            message: message.name(),
            why,
        }
        .into());
    };
    check_protocol(protocol)?;
    let mut fds = NamedFds::new(names, fds)?;
    let mut boot_files = Vec::new();
    while let Some(file) = fds.take_optional(&format!("boot{}", boot_files.len())) {
        boot_files.push(File::from(file));
    }
    let start = Start {
        kvm: fds.take("kvm")?,
        bus: fds.take("bus")?,
        boot_files,
        console_in: fds.take_optional("console-in"),
        console_out: fds.take_optional("console-out"),
        config,
    };
    fds.finish()?;
    check(&start.config)?;
    Ok(start)
}

fn check(config: &VcpuConfig) -> anyhow::Result<()> {
    if !(1..=MAX_VPS).contains(&config.vcpus) {
        anyhow::bail!("a VM has 1 to {MAX_VPS} vCPUs, not {}", config.vcpus);
    }
    let bytes = config.memory_bytes;
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) || !bytes.is_multiple_of(MEMORY_STEP_BYTES) {
        anyhow::bail!("guest memory of {bytes} bytes is not 32 MiB or more in steps of 2 MiB");
    }
    Ok(())
}
