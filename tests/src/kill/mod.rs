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
//! ([`played`]), so that no processor is needed and a kill costs milliseconds; and, for a network interface, passt. The
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
//! | `host.rs` | what the supervisor says to `bulkhead-vcpu` |
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
use scene::{Plan, Seen, play};
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
    /// Not at random, but at every named step of the journal (vmbus/src/journal/steps.rs), with servers built for that.
    #[arg(long, conflicts_with_all = ["rig", "count"])]
    steps: bool,
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

impl KillArguments {
    /// The same as a command line.
    fn again(&self, programs: &Path) -> Vec<std::ffi::OsString> {
        let mut args: Vec<std::ffi::OsString> =
            vec!["kill".into(), "--server".into(), self.server.name().into()];
        if !self.steps {
            args.extend(["--count".into(), self.count.to_string().into()]);
        }
        if let Some(seed) = self.seed {
            args.extend(["--seed".into(), seed.to_string().into()]);
        }
        args.extend(["--folder".into(), self.folder.clone().into()]);
        args.extend(["--programs".into(), programs.into()]);
        if self.rig {
            args.push("--rig".into());
        }
        if self.steps {
            args.push("--steps".into());
        }
        args
    }
}

/// Runs the kills.
pub fn main(arguments: KillArguments) -> Result<ExitCode> {
    let Some(programs) = &arguments.programs else {
        let programs = release::build_all()?;
        return release::run_xtask(&programs, arguments.again(&programs));
    };
    let seed = arguments.seed.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        now.as_millis() as u64 % 1_000_000_000
    });
    if arguments.rig {
        return rig::main(rig::Act::Kill, arguments.server, arguments.count, seed, programs);
    }
    let ctrl_c = catch_ctrl_c()?;
    let mut plan = Plan {
        programs,
        server: None,
        kind: arguments.server,
        folder: &arguments.folder,
        seed,
    };
    let seen = if arguments.steps {
        let server = release::build_dying(arguments.server.package())?;
        plan.server = Some(&server);
        steps::run(&plan, &ctrl_c)?
    } else {
        kill(&plan, arguments.count, &ctrl_c)?
    };
    let Seen {
        faults,
        stalls,
        notes,
    } = seen;
    print_stalls(&stalls);
    notes
        .iter()
        .filter(|note| !note.is_empty())
        .for_each(|note| println!("{note}"));
    let what = format!("kill {}", arguments.server.name());
    println!("{}", line(&what, "kills", &faults, &stalls, seed));
    // Ordering: a flag; what it says needs nothing else to be seen.
    let is_whole = !ctrl_c.load(Ordering::Relaxed);
    Ok(if faults == [0; 3] && is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn kill(plan: &Plan<'_>, count: u64, ctrl_c: &AtomicBool) -> Result<Seen> {
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
            };
            killer.run(scene.vm, scene.audit)
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
