//! `cargo xtask kill`: servers are killed at any moment, and what a guest would notice is counted.
//!
//! ```text
//!   harness (this process)                                   real processes
//!     load: one thread a channel ══ rings, kicks, interrupts ══╗
//!     host: plays bulkhead-vcpu ═══ "vcpu" socket ═════════ bulkhead-block or bulkhead-net, sandboxed
//!       ╚═══════ supervisor's socket ════════ bulkhead run        ▲ starts, watches, fences, starts again
//!     killer: one thread ── SIGKILL by pidfd ─────────────────────┘
//! ```
//!
//! Supervisor and servers are the programs that are shipped, with their sandboxes. Only `bulkhead-vcpu` is played
//! ([`played`]), so that no processor is needed and a kill costs milliseconds. The guest's driver is
//! the one that the servers' own tests use.
//!
//! Moments of death come from a seed: mostly some time after the last death was got over, so that each stall is that of
//! one death; every eighth some time after the last kill, whatever the successor is doing then: starting, locking itself
//! in, replaying. The same seed gives the same plan; what the processes do at those moments is up to the machine.
//!
//! | file | what |
//! | --- | --- |
//! | `vm.rs`, `played.rs` | the supervisor, its played child, and how all of it ends |
//! | `host.rs` | what the supervisor says to `bulkhead-vcpu` |
//! | `timeline.rs` | kills, and the stalls that they cause |
//! | `block.rs`, `pattern.rs` | load on a disk, and what its blocks must hold |
//! | `faults.rs` | lost, double, wrong |
//! | `rig.rs`, `rig-guest.sh`, `rig-host.sh` | the same under a real Linux guest, in the rig |

#![forbid(unsafe_code)]

mod block;
mod faults;
mod host;
mod pattern;
pub mod played;
pub mod rig;
mod timeline;
mod vm;

use crate::rig::workspace_root;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use faults::Faults;
use host::Host;
use pattern::Random;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use timeline::{PHASES, Stalls, Timeline, histogram, quantile};
use vm::Vm;
use vmbus::vsc::GuestOptions;

/// Limit: how long anything may take before it counts as lost. Nothing that works comes near it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests under way on each channel.
const DEPTH: u64 = 32;

/// Channels of a disk: the primary and three more.
const CHANNELS: u16 = 4;

/// One kill in so many comes without waiting for the last one to be got over.
const CHAINED: u64 = 8;

/// Longest time from a server's recovery to the next kill, and from a kill to a chained one.
const LOAD: Duration = Duration::from_millis(6);
const RECOVERY: Duration = Duration::from_millis(30);

/// Requests that must be completed between two kills that are not chained.
const LOAD_REQUESTS: u64 = 256;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ServerKind {
    /// `bulkhead-block`
    Block,
    /// `bulkhead-net`
    Net,
}

/// `cargo xtask kill`.
#[derive(Debug, Args)]
pub struct KillArguments {
    /// Which server.
    #[arg(long, value_enum)]
    server: ServerKind,
    /// How many kills.
    #[arg(long, value_name = "N", default_value_t = 200)]
    count: u64,
    /// What the moments of death and the load are made of [default: the time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Where the disk's file is made. On a disk, the stall has the time of its flushes in it.
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    folder: PathBuf,
    /// Where the programs are that are killed [default: they are built]
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
    /// Under a Linux guest in the rig.
    #[arg(long)]
    rig: bool,
}

impl ServerKind {
    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            ServerKind::Block => "block",
            ServerKind::Net => "net",
        }
    }
}

impl KillArguments {
    /// The same as a command line.
    fn again(&self, programs: &Path) -> Vec<std::ffi::OsString> {
        let mut args: Vec<std::ffi::OsString> =
            vec!["kill".into(), "--server".into(), self.server.name().into()];
        args.extend(["--count".into(), self.count.to_string().into()]);
        if let Some(seed) = self.seed {
            args.extend(["--seed".into(), seed.to_string().into()]);
        }
        args.extend(["--folder".into(), self.folder.clone().into()]);
        args.extend(["--programs".into(), programs.into()]);
        if self.rig {
            args.push("--rig".into());
        }
        args
    }
}

/// Runs the kills.
pub fn main(arguments: KillArguments) -> Result<ExitCode> {
    let Some(programs) = &arguments.programs else {
        let programs = build()?;
        return run_again(&programs, &arguments.again(&programs));
    };
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        now.as_millis() as u64 % 1_000_000_000
    });
    if arguments.rig {
        return rig::main(rig::Act::Kill, arguments.server, arguments.count, seed, programs);
    }
    let (faults, stalls) = match arguments.server {
        ServerKind::Block => kill_block(programs, &arguments, seed)?,
        ServerKind::Net => bail!("bulkhead-net cannot be killed yet"),
    };
    print_stalls(&stalls);
    println!("{}", line("kill block", "kills", &faults, &stalls, seed));
    Ok(if faults == [0; 3] {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn kill_block(programs: &Path, arguments: &KillArguments, seed: u64) -> Result<([u64; 3], Stalls)> {
    let image = tempfile::Builder::new()
        .prefix("bulkhead-kill-disk-")
        .tempfile_in(&arguments.folder)
        .with_context(|| format!("cannot make a disk in {}", arguments.folder.display()))?;
    image.as_file().set_len(block::disk_bytes(CHANNELS))?;
    let flags = [
        format!("--vcpus={CHANNELS}"),
        format!("--disk=path={}", image.path().display()),
    ];
    let (mut vm, supervisor) = Vm::start(programs, &flags)?;
    let options = GuestOptions {
        ram_bytes: 64 << 20,
        vp_count: CHANNELS,
    };
    let (faults, timeline) = (Faults::default(), Timeline::new(usize::from(CHANNELS)));
    let mut host = Host::start(supervisor, options, &timeline)
        .with_context(|| format!("the VM does not start: {}", vm.last_lines()))?;
    let initiators = block::open_channels(&mut host, CHANNELS)?;
    let mut loads = Vec::new();
    for (channel, initiator) in initiators.into_iter().enumerate() {
        let shared = (&faults, &timeline);
        loads.push(block::Load::new(
            &mut host,
            channel,
            initiator,
            image.as_file(),
            shared,
            seed,
        )?);
    }
    let (stop_load, stop_host) = (AtomicBool::new(false), AtomicBool::new(false));
    let killed = thread::scope(|scope| -> Result<()> {
        let hosting = scope.spawn(|| host.serve(&stop_host, &faults));
        let loading: Vec<_> = loads
            .into_iter()
            .map(|load| scope.spawn(|| load.run(&stop_load)))
            .collect();
        let killed = kill_all(&mut vm, "disk0", arguments.count, seed, (&faults, &timeline));
        // Ordering: flags; what they say needs nothing else to be seen.
        stop_load.store(true, Ordering::Relaxed);
        let loads = loading.into_iter().map(|load| load.join());
        let loads: Vec<_> = loads.collect();
        stop_host.store(true, Ordering::Relaxed);
        let hosted = hosting.join();
        for load in loads {
            load.map_err(|_| anyhow::anyhow!("a thread of the load has panicked"))??;
        }
        hosted.map_err(|_| anyhow::anyhow!("the played bulkhead-vcpu has panicked"))??;
        killed
    });
    killed.with_context(|| format!("after {} kills: {}", timeline.kills(), vm.last_lines()))?;
    if faults.any() {
        eprintln!("the supervisor said last: {}", vm.last_lines());
    }
    host.power_off()?;
    vm.end()?;
    Ok((faults.counts(), timeline.stalls()))
}

/// Kills the server of `device` so many times, and waits until the last death is got over.
fn kill_all(
    vm: &mut Vm,
    device: &str,
    count: u64,
    seed: u64,
    (faults, timeline): (&Faults, &Timeline),
) -> Result<()> {
    let mut random = Random::new(seed, u64::MAX);
    let mut pause = |most: Duration| {
        // This is the moment of death, not a synchronization.
        thread::sleep(Duration::from_micros(random.below(most.as_micros() as u64)));
    };
    let mut chooser = Random::new(seed, u64::MAX - 1);
    get_over(timeline, faults)?;
    for _ in 0..count {
        let deadline = Instant::now() + PATIENCE;
        loop {
            ensure!(Instant::now() < deadline, "{device} has no server");
            let Some(victim) = vm.server(device)? else {
                thread::yield_now();
                continue;
            };
            timeline.kill();
            if victim.signal(Signal::KILL)? {
                break;
            }
            // It died of an earlier kill, and its end is not noticed yet.
            timeline.take_back();
        }
        if chooser.below(CHAINED) == 0 {
            pause(RECOVERY);
        } else {
            if !get_over(timeline, faults)? {
                return Ok(());
            }
            pause(LOAD);
        }
    }
    get_over(timeline, faults)?;
    Ok(())
}

/// Waits until everything that was under way at the last kill, and some more, is answered. `false`: a fault was seen,
/// and more kills would only hide it.
fn get_over(timeline: &Timeline, faults: &Faults) -> Result<bool> {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !faults.any() {
        if timeline.wait_over(LOAD_REQUESTS, Instant::now() + Duration::from_secs(1)) {
            return Ok(true);
        }
        ensure!(
            Instant::now() < deadline,
            "requests under way at a kill are not answered, and their threads do not say so"
        );
    }
    Ok(false)
}

/// What a person looks at.
fn print_stalls(stalls: &Stalls) {
    let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    println!(
        "requests: {} completed; under way at a kill: {} at least, {} in the middle",
        stalls.completed,
        stalls.under_way.first().unwrap_or(&0),
        stalls.under_way.get(stalls.under_way.len() / 2).unwrap_or(&0),
    );
    println!(
        "without a kill: half within {}, 99 % within {}, longest {}",
        ms(quantile(&stalls.calm, 500)),
        ms(quantile(&stalls.calm, 990)),
        ms(quantile(&stalls.calm, 1000)),
    );
    for (phase, times) in PHASES.iter().zip(&stalls.phases) {
        println!(
            "from a kill until: {phase}: half within {}, 99 % within {}, longest {}",
            ms(quantile(times, 500)),
            ms(quantile(times, 990)),
            ms(quantile(times, 1000)),
        );
    }
    for (title, times) in [
        (
            "silence: the longest time after a kill in which nothing at all was completed",
            &stalls.silences,
        ),
        (
            "stall of deaths that came before the last one was got over, not in the figures below",
            &stalls.chained,
        ),
        ("stall: the longest request under way at a kill", &stalls.stalls),
    ] {
        println!("{title} ({})", times.len());
        for line in histogram(times) {
            println!("{line}");
        }
    }
}

/// What a script reads.
fn line(what: &str, unit: &str, faults: &[u64; 3], stalls: &Stalls, seed: u64) -> String {
    let [lost, double, wrong] = faults;
    let us = |of_thousand| quantile(&stalls.stalls, of_thousand).as_micros();
    format!(
        "{what} {unit}={} lost={lost} double={double} wrong={wrong} stall_p50_us={} stall_p99_us={} \
         stall_max_us={} seed={seed}",
        stalls.under_way.len(),
        us(500),
        us(990),
        us(1000),
    )
}

/// Builds what is killed, and what kills, as it is shipped; where it is.
fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--workspace", "--bins"])
        .current_dir(workspace_root())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the programs do not build");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from);
    Ok(target.join("release"))
}

/// Runs the xtask that was built with optimization.
fn run_again(programs: &Path, args: &[std::ffi::OsString]) -> Result<ExitCode> {
    let status = Command::new(programs.join("xtask"))
        .args(args)
        .status()
        .context("cannot run the optimized xtask")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_form_that_scripts_rely_on() {
        let stalls = Stalls {
            stalls: [3, 5, 9].map(Duration::from_millis).to_vec(),
            under_way: vec![1; 4],
            ..Stalls::default()
        };
        assert_eq!(
            line("kill block", "kills", &[0, 1, 2], &stalls, 7),
            "kill block kills=4 lost=0 double=1 wrong=2 stall_p50_us=5000 stall_p99_us=9000 stall_max_us=9000 seed=7"
        );
    }
}
