//! One death at every step of the journal, by name.
//!
//! Random moments hardly ever fall between two stores that follow each other. So servers built with the feature
//! `crash-points` are told through their own journal ([`vmbus::journal::steps`]) at which step to die. Steps that only
//! a successor passes are ordered before its predecessor is killed; those of a disk's protocol state, which changes only
//! while the guest opens the disk, are tried in VMs of their own.

#![forbid(unsafe_code)]

use super::ServerKind;
use super::drive::Killer;
use super::faults::Faults;
use super::pattern::Random;
use super::scene::{Plan, Scene, Seen, play};
use super::timeline::{Stalls, Timeline};
use anyhow::{Context, Result, ensure};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmbus::journal::Step;
use vmbus::journal::steps::Trigger;

/// Deaths at each step.
const DEATHS: u64 = 4;

/// Limit: passes of a step before the one that is deadly, so that the deaths are not all alike.
const PASSES: u64 = 24;

/// Limit: how long a step may not be passed under load before it counts as unreachable. Some are passed with every
/// other control message only.
const UNPASSED: Duration = Duration::from_secs(10);

/// Limit: predecessors killed for one death of a successor. Not every one leaves something to be settled.
const PREDECESSORS: u64 = 40;

/// Steps that a server passes while a guest opens its device, and under load never.
const OPENING: [Step; 3] = [Step::StateInvalidated, Step::StateWritten, Step::StateSaved];

/// Steps that servers of the other kind pass.
fn is_strange(step: Step, kind: ServerKind) -> bool {
    match kind {
        ServerKind::Block => matches!(
            step,
            Step::FramesSent
                | Step::FrameRead
                | Step::HeldSlotBegun
                | Step::HeldStaged
                | Step::HeldInRing
                | Step::ReleaseNoted
        ),
        ServerKind::Net => matches!(step, Step::RequestQueued | Step::IoSubmitted | Step::IoDone),
    }
}

/// Goes through all steps, says of each how many died there, and returns all that was seen.
pub fn run(plan: &Plan<'_>, ctrl_c: &AtomicBool) -> Result<Seen> {
    let mut deaths: BTreeMap<u32, u64> = BTreeMap::new();
    let opens = |step: &Step| plan.kind == ServerKind::Block && OPENING.contains(step);
    let mut seen = play(
        plan,
        |_, _| Ok(()),
        |scene| {
            let trigger = Trigger::map(scene.vm.journal()?.as_fd())?;
            let mut course = Course {
                scene,
                trigger,
                random: Random::new(plan.seed, u64::MAX - 2),
                last_victim: None,
                plan,
                ctrl_c,
            };
            for &step in Step::ALL {
                if is_strange(step, plan.kind) || opens(&step) {
                    continue;
                }
                for _ in 0..DEATHS {
                    if !course.die_at(step)? {
                        return Ok(());
                    }
                    *deaths.entry(step as u32).or_default() += 1;
                }
                (course.scene.audit)()?;
            }
            Ok(())
        },
    )?;
    for &step in Step::ALL.iter().filter(|step| opens(step)) {
        for passes in 0.. {
            // Ordering: a flag; what it says needs nothing else to be seen.
            let is_enough = ctrl_c.load(Ordering::Relaxed) || seen.faults != [0; 3];
            if is_enough || !while_opening(plan, step, passes, &mut seen)? {
                break;
            }
            *deaths.entry(step as u32).or_default() += 1;
        }
    }
    let mut missing = Vec::new();
    for &step in Step::ALL.iter().filter(|step| !is_strange(**step, plan.kind)) {
        match deaths.get(&(step as u32)) {
            Some(deaths) => println!("step {} deaths={deaths}", step.name()),
            None => missing.push(step.name()),
        }
    }
    ensure!(
        missing.is_empty() || seen.faults != [0; 3],
        "no server died at {}",
        missing.join(", ")
    );
    Ok(seen)
}

/// A VM whose server dies while the guest opens the disk; `false`: it passes the step less often than that.
fn while_opening(plan: &Plan<'_>, step: Step, passes: u32, seen: &mut Seen) -> Result<bool> {
    let mut died = false;
    let trigger = OnceCell::new();
    let more = play(
        plan,
        |vm, timeline| {
            timeline.order();
            let armed = Trigger::map(vm.journal()?.as_fd())?;
            armed.arm(step, passes);
            trigger.set(armed).ok();
            Ok(())
        },
        |scene| {
            died = !trigger.get().context("armed before")?.disarm();
            if died {
                scene.timeline.died();
            } else {
                scene.timeline.withdraw();
            }
            killer(plan, scene.faults, scene.timeline, &AtomicBool::new(false)).get_over()?;
            Ok(())
        },
    )
    .with_context(|| format!("a death at pass {} of step {}", passes + 1, step.name()))?;
    for (sum, more) in seen.faults.iter_mut().zip(more.faults) {
        *sum += more;
    }
    // Its stall has the guest's opening in it, so that only its being there counts.
    let Stalls {
        under_way, completed, ..
    } = more.stalls;
    seen.stalls.under_way.extend(under_way);
    seen.stalls.completed += completed;
    Ok(died)
}

fn killer<'a>(
    plan: &Plan<'_>,
    faults: &'a Faults,
    timeline: &'a Timeline,
    ctrl_c: &'a AtomicBool,
) -> Killer<'a> {
    Killer {
        device: plan.kind.device(),
        count: 0,
        seed: plan.seed,
        faults,
        timeline,
        ctrl_c,
        standby: false,
        adopted: false,
    }
}

struct Course<'a, 'b> {
    scene: Scene<'a>,
    trigger: Trigger,
    random: Random,
    last_victim: Option<i32>,
    plan: &'b Plan<'b>,
    ctrl_c: &'b AtomicBool,
}

impl Course<'_, '_> {
    /// Lets a server die at that step and waits until that is got over. `false`: enough is seen.
    fn die_at(&mut self, step: Step) -> Result<bool> {
        let killer = killer(self.plan, self.scene.faults, self.scene.timeline, self.ctrl_c);
        // Ordering: a flag; what it says needs nothing else to be seen.
        if !killer.get_over()? || self.ctrl_c.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if step.is_of_successor() {
            for _ in 0..PREDECESSORS {
                self.scene.timeline.order();
                self.trigger.arm(step, self.random.below(3) as u32);
                let victim = killer.kill_other_than(self.scene.vm, self.last_victim)?;
                self.last_victim = Some(victim);
                if self.wait_for_death(&killer)? {
                    return killer.get_over();
                }
                if self.scene.faults.any() {
                    return Ok(false);
                }
            }
        } else {
            self.scene.timeline.order();
            self.trigger.arm(step, self.random.below(PASSES) as u32);
            let (mut left, mut since) = (None, Instant::now());
            while let Some(now) = self.trigger.passes_left()
                && since.elapsed() < UNPASSED
            {
                if left.replace(now) != Some(now) {
                    since = Instant::now();
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            if !self.trigger.disarm() {
                self.scene.timeline.died();
                return killer.get_over();
            }
            self.scene.timeline.withdraw();
        }
        anyhow::bail!("no server passes the step {}", step.name())
    }

    /// Waits until the successor has died, or serves and is past the step.
    fn wait_for_death(&mut self, killer: &Killer<'_>) -> Result<bool> {
        let deadline = Instant::now() + 2 * super::PATIENCE;
        while self.trigger.is_armed() {
            if killer
                .timeline
                .wait_over(1, Instant::now() + Duration::from_millis(1))
            {
                break;
            }
            if killer.faults.any() {
                return Ok(false);
            }
            ensure!(Instant::now() < deadline, "a successor neither dies nor serves");
        }
        if self.trigger.disarm() {
            killer.timeline.withdraw();
            return Ok(false);
        }
        killer.timeline.died();
        Ok(true)
    }
}
