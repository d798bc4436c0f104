//! `cargo xtask kill` and `swap`: servers are killed at any moment, or replaced, and what a guest would notice is counted.
//!
//! ```text
//!   harness (this process)                                   real processes
//!     load: one thread for all ═══ rings, kicks, interrupts ═══╗
//!     host: plays bulkhead-bus  ═══ "bus" socket ═════════ bulkhead-block or bulkhead-net, sandboxed
//!       ╚═══════ supervisor's socket ════════ bulkhead run        ▲ starts, watches, fences, starts again
//!     killer: one thread ── SIGKILL by pidfd ─────────────────────┘
//! ```
//!
//! Supervisor and servers are the programs that are shipped, with their sandboxes. Only `bulkhead-vcpu` and `bulkhead-bus`
//! are played ([`played`]), so that no processor is needed and a kill costs milliseconds; and, for a network interface, passt. The
//! guest's drivers are those that the servers' own tests use.
//!
//! Moments of death come from a seed: mostly some time after the last death was got over, so that each stall is that of
//! one death; every eighth some time after the last kill, whatever the successor is doing then: starting, locking itself
//! in, replaying. The same seed gives the same plan; what the processes do at those moments is up to the machine.
//!
//! Nothing grows with the number of kills but some hundred bytes of each in [`timeline`]. Ctrl-C ends a long run as if all
//! had been done, with the figures so far; the exit status is then 1, as with any fault.
//!
//! | file | what |
//! | --- | --- |
//! | `vm.rs`, `played.rs` | the supervisor, its played child, and how all of it ends |
//! | `host.rs` | what the supervisor says to these two |
//! | `timeline.rs` | kills, and the stalls that they cause |
//! | `scene.rs` | a VM, its load, and what is done to its servers |
//! | `drive.rs` | the threads, and who is killed when |
//! | `steps.rs` | one death at every named step of the journal |
//! | `block.rs`, `pattern.rs` | load on a disk, and what its blocks must hold |
//! | `net.rs` | load on a network interface, and what its packets, frames and credits must be |
//! | `faults.rs` | lost, double, wrong |
//! | `rig.rs`, `rig-guest.sh`, `rig-host.sh` | the same under a real Linux guest, in the rig |

#![forbid(unsafe_code)]

mod block;
mod drive;
mod faults;
mod host;
mod net;
mod pattern;
pub mod played;
pub mod rig;
mod scene;
mod steps;
mod timeline;
mod vm;

use crate::release;
use anyhow::Result;
use clap::{Args, ValueEnum};
use drive::{Killer, catch_ctrl_c};
use scene::{Plan, Scene, Seen, play};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use timeline::{PHASES, Stalls, histogram, quantile};

/// Limit: how long anything may take before it counts as lost. Nothing that works comes near it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests under way on each channel.
const DEPTH: u64 = 32;

/// Channels of a device: the primary and three more.
const CHANNELS: u16 = 4;

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

/// What both commands are told.
#[derive(Debug, Args)]
struct Arguments {
    /// Which server.
    #[arg(long, value_enum)]
    server: ServerKind,
    /// How many kills or swaps.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// What the moments and the load are made of [default: the time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Where the disk's file is made. On a disk, the stall has the time of its flushes in it.
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    folder: PathBuf,
    /// Where the programs are [default: they are built]
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
    /// Under a Linux guest in the rig.
    #[arg(long)]
    rig: bool,
}

/// `cargo xtask kill`.
#[derive(Debug, Args)]
pub struct KillArguments {
    #[command(flatten)]
    common: Arguments,
    /// Not at random, but at every named step of the journal (vmbus/src/journal/steps.rs), with servers built for that.
    #[arg(long, conflicts_with_all = ["rig", "count"])]
    steps: bool,
    /// A successor waits whenever a server is killed (`standby = true`).
    #[arg(long, conflicts_with_all = ["rig", "steps"])]
    standby: bool,
    /// The supervisor is killed with each server, before it, after it or while it adopts, and the VM adopted by another.
    #[arg(long, conflicts_with_all = ["rig", "steps", "standby"])]
    adopt: bool,
}

/// `cargo xtask swap`.
#[derive(Debug, Args)]
pub struct SwapArguments {
    #[command(flatten)]
    common: Arguments,
}

/// What is done to servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Kill,
    KillWithStandby,
    KillWithSupervisor,
    KillAtSteps,
    Swap,
}

/// All of a command.
#[derive(Debug)]
pub struct Task {
    common: Arguments,
    deed: Deed,
}

impl From<KillArguments> for Task {
    fn from(arguments: KillArguments) -> Self {
        let deed = match arguments {
            KillArguments { steps: true, .. } => Deed::KillAtSteps,
            KillArguments { standby: true, .. } => Deed::KillWithStandby,
            KillArguments { adopt: true, .. } => Deed::KillWithSupervisor,
            KillArguments { .. } => Deed::Kill,
        };
        let common = arguments.common;
        Self { common, deed }
    }
}

impl From<SwapArguments> for Task {
    fn from(arguments: SwapArguments) -> Self {
        Self {
            common: arguments.common,
            deed: Deed::Swap,
        }
    }
}

impl ServerKind {
    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            ServerKind::Block => "block",
            ServerKind::Net => "net",
        }
    }

    /// Its device in the VM.
    fn device(self) -> &'static str {
        match self {
            ServerKind::Block => "disk0",
            ServerKind::Net => "net0",
        }
    }

    fn program(self) -> &'static str {
        match self {
            ServerKind::Block => "bulkhead-block",
            ServerKind::Net => "bulkhead-net",
        }
    }

    fn package(self) -> &'static str {
        match self {
            ServerKind::Block => "device-block",
            ServerKind::Net => "device-net",
        }
    }
}

impl Task {
    /// The same as a command line.
    fn again(&self, programs: &Path) -> Vec<OsString> {
        let Arguments {
            server,
            count,
            seed,
            folder,
            rig,
            ..
        } = &self.common;
        let (command, flag) = match self.deed {
            Deed::Kill => ("kill", None),
            Deed::KillWithStandby => ("kill", Some("--standby")),
            Deed::KillWithSupervisor => ("kill", Some("--adopt")),
            Deed::KillAtSteps => ("kill", Some("--steps")),
            Deed::Swap => ("swap", None),
        };
        let mut args: Vec<OsString> = vec![command.into(), "--server".into(), server.name().into()];
        args.extend(flag.map(OsString::from));
        if self.deed != Deed::KillAtSteps {
            args.extend(["--count".into(), count.to_string().into()]);
        }
        if let Some(seed) = seed {
            args.extend(["--seed".into(), seed.to_string().into()]);
        }
        args.extend(["--folder".into(), folder.into()]);
        args.extend(["--programs".into(), programs.into()]);
        args.extend(rig.then(|| "--rig".into()));
        args
    }
}

/// Runs the kills or swaps.
pub fn main(task: Task) -> Result<ExitCode> {
    let Arguments {
        server,
        count,
        seed,
        folder,
        programs,
        rig,
    } = &task.common;
    let Some(programs) = programs else {
        let programs = release::build_all()?;
        return release::run_xtask(&programs, task.again(&programs));
    };
    let seed = seed.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        now.as_millis() as u64 % 1_000_000_000
    });
    if *rig {
        let act = match task.deed {
            Deed::Swap => rig::Act::Swap,
            Deed::Kill | Deed::KillWithStandby | Deed::KillWithSupervisor | Deed::KillAtSteps => {
                rig::Act::Kill
            }
        };
        return rig::main(act, *server, *count, seed, programs);
    }
    let ctrl_c = catch_ctrl_c()?;
    let mut plan = Plan {
        programs,
        server: None,
        kind: *server,
        standby: task.deed == Deed::KillWithStandby,
        adopted: task.deed == Deed::KillWithSupervisor,
        folder,
        seed,
    };
    let mut gaps = Vec::new();
    let seen = match task.deed {
        Deed::KillAtSteps => {
            let dying = release::build_dying(server.package())?;
            plan.server = Some(&dying);
            steps::run(&plan, &ctrl_c)?
        }
        Deed::Kill | Deed::KillWithStandby | Deed::KillWithSupervisor => {
            under(&plan, *count, &ctrl_c, |killer, scene| {
                killer.run(scene.vm, scene.audit)
            })?
        }
        Deed::Swap => under(&plan, *count, &ctrl_c, |killer, scene| {
            gaps = killer.swap(scene.vm, scene.audit)?;
            Ok(())
        })?,
    };
    let Seen {
        faults,
        stalls,
        notes,
    } = seen;
    print_stalls(&stalls);
    if !gaps.is_empty() {
        println!("gap: nobody served, as the supervisor saw it ({})", gaps.len());
        histogram(&gaps).iter().for_each(|line| println!("{line}"));
    }
    notes
        .iter()
        .filter(|note| !note.is_empty())
        .for_each(|note| println!("{note}"));
    let (what, unit) = match task.deed {
        Deed::Swap => ("swap", "swaps"),
        Deed::Kill | Deed::KillWithStandby | Deed::KillWithSupervisor | Deed::KillAtSteps => {
            ("kill", "kills")
        }
    };
    let what = format!("{what} {}", server.name());
    println!("{}", line(&what, unit, &faults, &stalls, seed));
    // Ordering: a flag; what it says needs nothing else to be seen.
    let is_whole = !ctrl_c.load(Ordering::Relaxed);
    Ok(ExitCode::from(status(&faults, is_whole)))
}

/// Success is that all was done and nothing was noticed.
fn status(faults: &[u64; 3], is_whole: bool) -> u8 {
    u8::from(*faults != [0; 3] || !is_whole)
}

/// A VM under load, and what is done to its servers.
fn under(
    plan: &Plan<'_>,
    count: u64,
    ctrl_c: &AtomicBool,
    deed: impl FnOnce(&Killer<'_>, Scene<'_>) -> Result<()>,
) -> Result<Seen> {
    play(
        plan,
        |_, _| Ok(()),
        |scene| {
            let killer = Killer {
                device: plan.kind.device(),
                count,
                seed: plan.seed,
                faults: scene.faults,
                timeline: scene.timeline,
                ctrl_c,
                standby: plan.standby,
                adopted: plan.adopted,
            };
            deed(&killer, scene)
        },
    )
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
            "stall of deaths before the last one was got over, or while the network did not read; not in the figures below",
            &stalls.chained,
        ),
        (
            "no stall: the longest request under way at a moment at which nothing happened",
            &stalls.moments,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    enum Xtask {
        Kill(KillArguments),
        Swap(SwapArguments),
    }

    #[test]
    fn the_exit_status_is_1_for_each_kind_of_fault_and_for_a_run_that_was_broken_off() {
        assert_eq!(status(&[0; 3], true), 0);
        for (faults, is_whole) in [
            ([1, 0, 0], true),
            ([0, 1, 0], true),
            ([0, 0, 1], true),
            ([0; 3], false),
        ] {
            assert_eq!(status(&faults, is_whole), 1, "{faults:?} {is_whole}");
        }
    }

    #[test]
    fn a_mistake_in_the_command_line_is_named_and_no_count_is_no_success() {
        for (line, part) in [
            ("kill --server disk", "[possible values: block, net]"),
            ("kill --server block --count 0", "0 is not in 1.."),
            ("swap --server net --count 0", "0 is not in 1.."),
            ("kill --server net --rig --standby", "cannot be used with"),
            ("kill --server net --rig --adopt", "cannot be used with"),
            ("kill --server net --rig --steps", "cannot be used with"),
            ("kill --server net --steps --count 9", "cannot be used with"),
            ("kill --server net --standby --adopt", "cannot be used with"),
            ("kill", "--server"),
        ] {
            let words = ["xtask"].into_iter().chain(line.split(' '));
            let error = Xtask::try_parse_from(words).expect_err(line).to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

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
