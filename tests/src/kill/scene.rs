//! A VM with one device, the load on it, and whatever is done to its servers meanwhile.

#![forbid(unsafe_code)]

use super::drive::{Job, under_load};
use super::faults::{Fault, Faults};
use super::host::Host;
use super::timeline::{Stalls, Timeline};
use super::vm::Vm;
use super::{CHANNELS, ServerKind, block, net};
use anyhow::{Context, Result};
use std::os::fd::AsRawFd;
use std::path::Path;
use vmbus::vsc::GuestOptions;

/// What is to be there.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Where `bulkhead` and the servers are.
    pub programs: &'a Path,
    /// The file that runs as the server, if not the one among `programs`.
    pub server: Option<&'a Path>,
    pub kind: ServerKind,
    /// A successor waits all the time.
    pub standby: bool,
    /// Supervisors are killed as well.
    pub adopted: bool,
    /// Where a disk's file is made.
    pub folder: &'a Path,
    pub seed: u64,
}

/// What whoever kills has before it.
pub struct Scene<'a> {
    pub vm: &'a mut Vm,
    pub faults: &'a Faults,
    pub timeline: &'a Timeline,
    /// Lets everything come to rest and counts what only then can be counted.
    pub audit: &'a dyn Fn() -> Result<()>,
}

/// What a run has shown.
#[derive(Debug)]
pub struct Seen {
    /// Lost, double, wrong.
    pub faults: [u64; 3],
    pub stalls: Stalls,
    /// What the load has to say.
    pub notes: Vec<String>,
}

/// Starts everything, does `early` before a channel is opened and `work` under load, and ends everything.
pub fn play(
    plan: &Plan<'_>,
    early: impl FnOnce(&Vm, &Timeline) -> Result<()>,
    work: impl FnOnce(Scene<'_>) -> Result<()>,
) -> Result<Seen> {
    // Without a name, so that nothing of it is left however this process ends.
    let image = tempfile::tempfile_in(plan.folder)
        .with_context(|| format!("cannot make a disk in {}", plan.folder.display()))?;
    image.set_len(block::disk_bytes(CHANNELS))?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
    let (flag, threads) = match plan.kind {
        ServerKind::Block => (format!("--disk=path={path}"), CHANNELS),
        ServerKind::Net => (format!("--net=user,queues={CHANNELS}"), 1),
    };
    let flag = flag + if plan.standby { ",standby" } else { "" };
    let server = plan.server.map(|server| (plan.kind.program(), server));
    let (mut vm, supervisor) = Vm::start(plan.programs, server, &[format!("--vcpus={CHANNELS}"), flag])?;
    let options = GuestOptions {
        ram_bytes: 64 << 20,
        vp_count: CHANNELS,
    };
    let (faults, timeline) = (Faults::default(), Timeline::new(usize::from(threads)));
    let shared = (&faults, &timeline);
    let mut host = Host::start(supervisor, options, shared)
        .with_context(|| format!("the VM does not start: {}", vm.last_lines()))?;
    host.adopted = plan.adopted;
    early(&vm, &timeline)?;
    let mut jobs: Vec<Job<'_>> = Vec::new();
    let mut auditor = None;
    match plan.kind {
        ServerKind::Block => {
            let initiators = block::open_channels(&mut host, CHANNELS, &faults)?;
            let mut loads = Vec::new();
            for (channel, initiator) in initiators.into_iter().enumerate() {
                loads.push(block::Load::new(
                    &mut host, channel, initiator, &image, shared, plan.seed,
                )?);
            }
            jobs.push(Box::new(|stop| block::run(loads, &faults, stop)));
        }
        ServerKind::Net => {
            let network = vm.network()?;
            let driver = net::open(&mut host, CHANNELS)?;
            let (load, by) = net::Load::new(driver, network, vm.control_socket(), shared, plan.seed)?;
            auditor = Some(by);
            jobs.push(Box::new(|stop| load.run(stop)));
        }
    }
    let audit = || auditor.as_ref().map_or(Ok(()), net::Auditor::audit);
    let done = under_load(&mut host, &faults, jobs, || {
        work(Scene {
            vm: &mut vm,
            faults: &faults,
            timeline: &timeline,
            audit: &audit,
        })
    });
    let notes = done.with_context(|| format!("after {} deaths: {}", timeline.kills(), vm.last_lines()))?;
    if faults.any() {
        eprintln!("the supervisor said last: {}", vm.last_lines());
    }
    let unexplained = std::mem::take(&mut host.unexplained);
    host.power_off()?;
    let disowned = vm.end()?;
    for generation in unexplained {
        if !disowned.contains(&generation) {
            let what = format_args!("server {generation} died, and nobody says to have killed it");
            faults.count(Fault::Wrong, what);
        }
    }
    Ok(Seen {
        faults: faults.counts(),
        stalls: timeline.stalls(),
        notes,
    })
}
