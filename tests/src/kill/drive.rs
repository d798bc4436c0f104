//! Load on one side, deaths on the other, until enough is seen.

#![forbid(unsafe_code)]

use super::faults::Faults;
use super::host::Host;
use super::pattern::Random;
use super::timeline::Timeline;
use super::vm::{Victim, Vm};
use super::{LOAD_REQUESTS, PATIENCE};
use anyhow::{Result, anyhow, ensure};
use nix::sys::signal::{SigSet, Signal as NixSignal};
use rustix::process::Signal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// One kill in so many comes without waiting for the last one to be got over.
const CHAINED: u64 = 8;

/// Longest time from a server's recovery to the next kill, and from a kill to a chained one.
const LOAD: Duration = Duration::from_millis(6);
const RECOVERY: Duration = Duration::from_millis(30);

/// Deaths between two looks at how long requests take when nobody dies.
const LOOK_ON: u64 = 4;

/// Deaths between two moments at which everything is let come to rest.
const AUDIT: u64 = 25;

/// How often a person hears how far it is.
const PROGRESS: Duration = Duration::from_secs(10);

/// A thread of the load; what it has to say in the end.
pub type Job<'a> = Box<dyn FnOnce(&AtomicBool) -> Result<String> + Send + 'a>;

/// Runs the load while `work` does what it does; the load's last words.
pub fn under_load(
    host: &mut Host<'_>,
    faults: &Faults,
    jobs: Vec<Job<'_>>,
    work: impl FnOnce() -> Result<()>,
) -> Result<Vec<String>> {
    let (stop_load, stop_host) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let hosting = scope.spawn(|| host.serve(&stop_host, faults));
        let loading: Vec<_> = jobs
            .into_iter()
            .map(|job| {
                let stop = &stop_load;
                scope.spawn(move || job(stop))
            })
            .collect();
        let worked = work();
        // Ordering: flags; what they say needs nothing else to be seen.
        stop_load.store(true, Ordering::Relaxed);
        let loads: Vec<_> = loading.into_iter().map(|load| load.join()).collect();
        stop_host.store(true, Ordering::Relaxed);
        let hosted = hosting.join();
        let mut said = Vec::new();
        for load in loads {
            said.push(load.map_err(|_| anyhow!("a thread of the load has panicked"))??);
        }
        hosted.map_err(|_| anyhow!("the played bulkhead-vcpu has panicked"))??;
        worked.map(|()| said)
    })
}

/// Kills servers of `device`.
pub struct Killer<'a> {
    pub device: &'a str,
    pub count: u64,
    pub seed: u64,
    pub faults: &'a Faults,
    pub timeline: &'a Timeline,
    pub ctrl_c: &'a AtomicBool,
    /// Kill only while a successor waits.
    pub standby: bool,
    /// Kill supervisors as well, and have the VM adopted.
    pub adopted: bool,
}

impl Killer<'_> {
    /// Kills so many, and waits until the last death is got over.
    pub fn run(&self, vm: &mut Vm, audit: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut random = Random::new(self.seed, u64::MAX);
        let mut pause = |most: Duration| {
            // This is the moment of death, not a synchronization.
            thread::sleep(Duration::from_micros(random.below(most.as_micros() as u64)));
        };
        let mut chooser = Random::new(self.seed, u64::MAX - 1);
        let mut progress = Progress::new("kills", self.count);
        let mut last_victim = None;
        self.get_over()?;
        // A supervisor that answers has told its keeper that the guest runs. Before that the VM ends with it.
        vm.server(self.device)?;
        for killed in 1..=self.count {
            if self.standby {
                self.wait_for_standby(vm)?;
            }
            last_victim = Some(match self.adopted {
                true => self.kill_with_supervisor(vm, last_victim, chooser.below(4), &mut pause)?,
                false => self.kill_other_than(vm, last_victim)?,
            });
            let chains = !self.standby && !self.adopted;
            // Ordering: a flag; what it says needs nothing else to be seen.
            let is_enough = self.ctrl_c.load(Ordering::Relaxed);
            let is_due = killed.is_multiple_of(AUDIT);
            if !is_enough && !is_due && chains && chooser.below(CHAINED) == 0 {
                pause(RECOVERY);
                continue;
            }
            if !self.get_over()? {
                return Ok(());
            }
            if is_enough {
                eprintln!("interrupted after {killed} kills");
                return Ok(());
            }
            if is_due {
                audit()?;
            }
            progress.tell(killed, self.faults);
            pause(LOAD);
            if killed.is_multiple_of(LOOK_ON) {
                self.timeline.look_on(Instant::now() + PATIENCE);
                pause(LOAD);
            }
        }
        self.get_over()?;
        Ok(())
    }

    /// Replaces the server so often; how long nobody served each time, as the supervisor sees it.
    pub fn swap(&self, vm: &mut Vm, audit: &dyn Fn() -> Result<()>) -> Result<Vec<Duration>> {
        let mut random = Random::new(self.seed, u64::MAX);
        let mut progress = Progress::new("swaps", self.count);
        let mut gaps = Vec::new();
        for swapped in 1..=self.count {
            // Ordering: a flag; what it says needs nothing else to be seen.
            if !self.get_over()? || self.ctrl_c.load(Ordering::Relaxed) {
                break;
            }
            // This is the moment of the swap, not a synchronization.
            thread::sleep(Duration::from_micros(random.below(LOAD.as_micros() as u64)));
            self.timeline.look_on(Instant::now() + PATIENCE);
            self.timeline.replace();
            gaps.push(vm.swap(self.device)?);
            if swapped.is_multiple_of(AUDIT) && self.get_over()? {
                audit()?;
            }
            progress.tell(swapped, self.faults);
        }
        self.get_over()?;
        gaps.sort();
        Ok(gaps)
    }

    fn wait_for_standby(&self, vm: &mut Vm) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !vm.has_standby(self.device)? {
            ensure!(Instant::now() < deadline, "{} has no standby", self.device);
            // Each question costs the supervisor, which has a server to start, some time.
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Kills the server and the supervisor, in one of four ways, and has the VM adopted; the server's process number.
    ///
    /// All begin in calm. So only the first way kills a supervisor that may be starting a server, which its adopter then
    /// kills: what is under way to or from the guest may be missing until that is got over.
    fn kill_with_supervisor(
        &self,
        vm: &mut Vm,
        last: Option<i32>,
        way: u64,
        pause: &mut impl FnMut(Duration),
    ) -> Result<i32> {
        match way {
            0 => {
                let victim = self.kill_other_than(vm, last)?;
                pause(RECOVERY);
                self.timeline.watch.dying();
                vm.replace_supervisor(|| Ok(()))?;
                // Once the adopter answers, it has killed whom it had to; what is completed now is completed by others.
                vm.server(self.device)?;
                self.get_over()?;
                self.timeline.watch.dead();
                return Ok(victim);
            }
            1 => vm.replace_supervisor(|| Ok(()))?,
            2 => {
                let victim = self.next_victim(vm, last)?;
                let mut was_killed = false;
                vm.replace_supervisor(|| {
                    was_killed = self.kill(&victim)?;
                    Ok(())
                })?;
                ensure!(was_killed, "a server ended with its supervisor");
                return Ok(victim.pid);
            }
            _ => {
                vm.replace_supervisor(|| Ok(()))?;
                // Perhaps while it adopts.
                pause(RECOVERY);
                vm.replace_supervisor(|| Ok(()))?;
            }
        }
        self.kill_other_than(vm, last)
    }

    /// Kills the server as soon as there is one that was not killed already; its process number.
    pub fn kill_other_than(&self, vm: &mut Vm, last: Option<i32>) -> Result<i32> {
        loop {
            let victim = self.next_victim(vm, last)?;
            if self.kill(&victim)? {
                return Ok(victim.pid);
            }
        }
    }

    /// The server, as soon as there is one that was not killed already.
    fn next_victim(&self, vm: &mut Vm, last: Option<i32>) -> Result<Victim> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            ensure!(Instant::now() < deadline, "{} has no server", self.device);
            let victim = vm.server(self.device)?;
            match victim.filter(|victim| Some(victim.pid) != last) {
                Some(victim) => return Ok(victim),
                None => thread::yield_now(),
            }
        }
    }

    /// Kills it. `false`: it has ended just now, by itself, which the played `bulkhead-bus` counts.
    fn kill(&self, victim: &Victim) -> Result<bool> {
        self.timeline.kill(victim.generation);
        let was_there = victim.signal(Signal::KILL)?;
        if !was_there {
            self.timeline.take_back(victim.generation);
        }
        Ok(was_there)
    }

    /// Waits until everything that was under way at the last kill, and some more, is answered. `false`: a fault was
    /// seen, and more kills would only hide it.
    pub fn get_over(&self) -> Result<bool> {
        let deadline = Instant::now() + 2 * PATIENCE;
        while !self.faults.any() {
            let second = Instant::now() + Duration::from_secs(1);
            if self.timeline.wait_over(LOAD_REQUESTS, second) {
                return Ok(true);
            }
            ensure!(
                Instant::now() < deadline,
                "requests under way at a kill are not answered, and their threads do not say so"
            );
        }
        Ok(false)
    }
}

/// What a person hears of a long run.
struct Progress {
    unit: &'static str,
    count: u64,
    begun: Instant,
    told: Instant,
}

impl Progress {
    fn new(unit: &'static str, count: u64) -> Self {
        let begun = Instant::now();
        Self {
            unit,
            count,
            begun,
            told: begun,
        }
    }

    fn tell(&mut self, done: u64, faults: &Faults) {
        if self.told.elapsed() > PROGRESS {
            self.told = Instant::now();
            let [lost, double, wrong] = faults.counts();
            eprintln!(
                "{done} of {} {} after {} s, lost={lost} double={double} wrong={wrong}",
                self.count,
                self.unit,
                self.begun.elapsed().as_secs()
            );
        }
    }
}

/// From now on an interruption by a person only sets the flag that is returned; a second one ends this process.
///
/// Call it before any thread is made. Programs started later inherit the mask: see [`super::vm`].
pub fn catch_ctrl_c() -> Result<Arc<AtomicBool>> {
    let signals = SigSet::from_iter([NixSignal::SIGINT, NixSignal::SIGTERM]);
    signals.thread_block()?;
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    thread::spawn(move || {
        let mut first: Option<Instant> = None;
        while signals.wait().is_ok() {
            // Ordering: a flag; what it says needs nothing else to be seen.
            set.store(true, Ordering::Relaxed);
            // One press may arrive twice: from the terminal, and from the process that guards this one.
            if first.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
                std::process::exit(130);
            }
        }
    });
    Ok(flag)
}
