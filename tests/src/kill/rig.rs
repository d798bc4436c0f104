//! Kills and swaps under a real Linux guest, in the rig.
//!
//! The guest runs fio with verification on a file system of its disk and a TCP stream each way (`rig-guest.sh`), while
//! the rig kills and swaps its servers by a plan (`rig-host.sh`). What counts is what the guest sees of it:
//!
//! | count | when |
//! | --- | --- |
//! | lost | a request or a stream that does not end, a stream that breaks, a server without a successor |
//! | double | the kernel's log complains of a completion that it knows nothing of |
//! | wrong | bytes that differ, an I/O error, any other new line in the kernel's log, a damaged file system |
//!
//! Stalls are the supervisor's: from the end of a server to its successor's service.

#![forbid(unsafe_code)]

use super::ServerKind;
use super::pattern::Random;
use super::timeline::{Stalls, histogram};
use crate::rig::{Rig, Scenes};
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const GUEST: &str = include_str!("rig-guest.sh");
const HOST: &str = include_str!("rig-host.sh");

/// The longest pause after a successor is there.
const PAUSE: Duration = Duration::from_millis(250);

/// Seconds for the guest's start, its first writes, and its end.
const AROUND: u64 = 90;

/// Seconds for one server's end, its successor's start, and the pause, in the emulator. Generous: three times what is usual.
const EACH: u64 = 2;

/// What is done to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `kill -9`.
    Kill,
    /// `bulkhead device swap`.
    Swap,
}

/// What is done, and how often.
#[derive(Clone, Debug)]
pub struct Plan {
    /// An act, the server's program, its device, and how often.
    pub acts: Vec<(Act, &'static str, &'static str, u64)>,
    /// What order and pauses are made of.
    pub seed: u64,
    /// Show what guest and rig say.
    pub echo: bool,
}

/// What the guest saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Servers that were replaced.
    pub replaced: u64,
    /// Lost, double, wrong.
    pub faults: [u64; 3],
    /// As the supervisor measured them.
    pub stalls: Vec<Duration>,
    /// What was said, if anything went wrong.
    pub said: String,
}

impl Plan {
    fn count(&self) -> u64 {
        self.acts.iter().map(|(.., count)| count).sum()
    }

    /// A line for each act: what, program, device, microseconds to wait after it.
    fn lines(&self) -> String {
        let mut random = Random::new(self.seed, u64::MAX);
        let mut left = self.acts.clone();
        let mut lines = String::new();
        while !left.is_empty() {
            let chosen = random.below(left.len() as u64) as usize;
            let (act, program, device, count) = &mut left[chosen];
            let act = match act {
                Act::Kill => "kill",
                Act::Swap => "swap",
            };
            let pause = random.below(PAUSE.as_micros() as u64);
            lines += &format!("{act} {program} {device} {pause}\n");
            *count -= 1;
            left.retain(|(.., count)| *count > 0);
        }
        lines
    }
}

/// Runs the plan. `programs`: the folder of our programs.
///
/// # Errors
/// If the guest never came to the point where servers are killed, or the rig failed: nothing is known then.
pub fn run(rig: Rig, programs: PathBuf, plan: &Plan) -> Result<Seen> {
    let around = HOST.replace("@PLAN@", plan.lines().trim_end());
    let scenes = Scenes::new(rig, programs);
    let scenes = if plan.echo { scenes.echo() } else { scenes };
    let seconds = AROUND + EACH * plan.count();
    let result = scenes
        .guest(
            "deaths",
            seconds,
            GUEST,
            &around,
            &["guest: noticed nothing", "guest: exit 0", "bulkhead: exit 0"],
        )
        .run();
    let (said, content) = match result {
        Ok(said) => (said.concat(), true),
        Err(said) => (said, false),
    };
    judge(&said, content, plan.count())
}

/// `cargo xtask kill --rig` and `cargo xtask swap --rig`.
pub fn main(act: Act, server: ServerKind, count: u64, seed: u64, programs: &Path) -> Result<ExitCode> {
    let (program, device) = match server {
        ServerKind::Block => ("bulkhead-block", "disk0"),
        ServerKind::Net => ("bulkhead-net", "net0"),
    };
    let plan = Plan {
        acts: vec![(act, program, device, count)],
        seed,
        echo: true,
    };
    let seen = run(Rig::build()?, programs.to_owned(), &plan)?;
    let mut stalls = seen.stalls;
    stalls.sort();
    println!(
        "stall: from a server's end to its successor's service, as the supervisor saw it ({})",
        stalls.len()
    );
    histogram(&stalls).iter().for_each(|line| println!("{line}"));
    let stalls = Stalls {
        stalls,
        under_way: vec![0; seen.replaced as usize],
        ..Stalls::default()
    };
    let (what, unit) = match act {
        Act::Kill => (format!("kill {}", server.name()), "kills"),
        Act::Swap => (format!("swap {}", server.name()), "swaps"),
    };
    println!("{}", super::line(&what, unit, &seen.faults, &stalls, seed));
    Ok(if seen.faults == [0; 3] {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn judge(said: &str, content: bool, planned: u64) -> Result<Seen> {
    if !said.contains("rig: the guest is at work") {
        bail!("the guest did not come to work:\n{said}");
    }
    // Not by lines: the guest's console and the rig write to the same place, each in the middle of the other's line.
    let stalls = said.split("rig: stall ").skip(1);
    let stalls = stalls.filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    let mut seen = Seen {
        replaced: said.matches("rig: replaced ").count() as u64,
        stalls: stalls.map(Duration::from_micros).collect(),
        ..Seen::default()
    };
    if !content || seen.replaced != planned {
        let count = |what: &str| said.matches(what).count() as u64;
        let double = count("FAILED double");
        let wrong = count("FAILED wrong");
        // What nobody could name is a loss: something did not come to its end.
        let lost = count("FAILED lost").max(u64::from(double + wrong == 0));
        seen.faults = [lost, double, wrong];
        seen.said = said.to_owned();
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: &str = "rig: the guest is at work\nrig: replaced bulkhead-net 1 by 2\nrig: stall 1500\nguest: noticed nothing\n";

    #[test]
    fn what_a_guest_does_not_notice_is_no_fault() {
        let seen = judge(WELL, true, 1).expect("the guest came to work");
        assert_eq!((seen.replaced, seen.faults), (1, [0; 3]));
        assert_eq!(seen.stalls, [Duration::from_micros(1500)]);
    }

    #[test]
    fn faults_are_told_apart_and_what_nobody_named_is_a_loss() {
        let faults = |said: &str, content, planned| {
            judge(&format!("{WELL}{said}"), content, planned)
                .expect("the guest came to work")
                .faults
        };
        assert_eq!(faults("FAILED double: so", false, 1), [0, 1, 0]);
        assert_eq!(faults("FAILED wrong: so", false, 1), [0, 0, 1]);
        assert_eq!(faults("FAILED lost: so", false, 1), [1, 0, 0]);
        assert_eq!(faults("", false, 1), [1, 0, 0]);
        assert_eq!(
            faults("", true, 2),
            [1, 0, 0],
            "a kill that was planned did not happen"
        );
    }

    #[test]
    fn a_guest_that_never_worked_shows_nothing() {
        assert!(judge("guest: init", false, 1).is_err());
    }

    #[test]
    fn a_plan_has_every_act_and_the_same_seed_gives_the_same() {
        let plan = |seed| Plan {
            acts: vec![(Act::Kill, "a", "x", 3), (Act::Swap, "b", "y", 2)],
            seed,
            echo: false,
        };
        let lines = plan(7).lines();
        assert_eq!(lines, plan(7).lines());
        assert_eq!(
            lines.lines().filter(|line| line.starts_with("kill a x ")).count(),
            3
        );
        assert_eq!(
            lines.lines().filter(|line| line.starts_with("swap b y ")).count(),
            2
        );
    }
}
