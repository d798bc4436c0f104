//! Verified load on a network interface: the guest's driver on one side of the server, the network on the other.
//!
//! The network is the far end of the stream that the supervisor keeps for all servers of the interface: it believes that
//! it speaks with passt ([`super::played`]). So no privilege is needed, no server can cut the connection, and what is in
//! the socket survives every death. What is checked of each frame, packet and credit, and which frames may be missing, is
//! written in [`device_net::vsc::load`], whose load this is. In short:
//! - *lost*: a packet or a control message that is not completed, a receive credit that does not come back, or a frame
//!   that never arrives although no server was dying while it was under way;
//! - *double*: a completion of what is not under way, a frame that comes again or after a younger one of its sender;
//! - *wrong*: a changed frame, a receive buffer overwritten while the guest holds it, a flow on another channel, a broken
//!   channel or rule of the protocol.
//!
//! A frame that a dying server had in hand may be missing, as on any network: what is counted as `swallowed` is no fault,
//! but shown. Credits are compared with all that there are after every 25 deaths, when nothing is under way: each server counts them anew from the journal, so that only what the last one has forgotten would be seen at the end.

#![forbid(unsafe_code)]

use super::PATIENCE;
use super::faults::{Fault, Faults};
use super::host::Host;
use super::played::receive;
use super::timeline::{Life, Timeline};
use anyhow::{Context, Result, bail, ensure};
use device_net::vsc::load::{self, FILTER, LoadError, Tally};
use device_net::vsc::{Driver, DriverOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use vmm_core::supervisor::control::{Reply, Request, connect_to};

/// Frames that one server has brought to the guest before its credits are counted: one that forgets one of a thousand is
/// found out by the first count, however soon those before it died.
const AUDITED_FRAMES: u64 = 4000;

/// Opens the interface as Linux does, with so many channels.
pub fn open(host: &mut Host<'_>, channels: u16) -> Result<Driver> {
    let deadline = Instant::now() + PATIENCE;
    let options = DriverOptions {
        queues: channels,
        ..DriverOptions::default()
    };
    let mut driver = Driver::open(&mut host.guest, options, deadline)?;
    ensure!(
        driver.channels.len() == usize::from(channels),
        "{} channels instead of {channels}",
        driver.channels.len()
    );
    driver.set_filter(FILTER, deadline)?;
    Ok(driver)
}

/// Whoever kills asks the load for an audit through this.
pub struct Auditor {
    ask: Sender<()>,
    done: Receiver<()>,
}

impl Auditor {
    /// Waits until nothing is under way and the credits are counted. A load that has ended early has counted why.
    pub fn audit(&self) -> Result<()> {
        if self.ask.send(()).is_ok() {
            let heard = self.done.recv_timeout(3 * PATIENCE);
            ensure!(
                !matches!(heard, Err(std::sync::mpsc::RecvTimeoutError::Timeout)),
                "the load does not come to rest"
            );
        }
        Ok(())
    }
}

/// The thread of the interface.
pub struct Load<'a> {
    load: load::Load,
    /// Where the supervisor listens, for the server's own count of credits: each audit may be another supervisor's.
    control: PathBuf,
    faults: &'a Faults,
    timeline: &'a Timeline,
    asked: Receiver<()>,
    done: Sender<()>,
    /// Lost, double and wrong of the tally that were passed on.
    counted: [u64; 3],
}

impl<'a> Load<'a> {
    /// Nothing is sent yet. `network` is the far end of the servers' stream.
    pub fn new(
        driver: Driver,
        network: UnixStream,
        control: PathBuf,
        (faults, timeline): (&'a Faults, &'a Timeline),
        seed: u64,
    ) -> Result<(Self, Auditor)> {
        let mut load = load::Load::new(driver, network, seed)?;
        load.lives = Some(Vec::new());
        let ((ask, asked), (done, heard)) = (channel(), channel());
        let this = Self {
            load,
            control,
            faults,
            timeline,
            asked,
            done,
            counted: [0; 3],
        };
        Ok((this, Auditor { ask, done: heard }))
    }

    /// Sends and checks until `stop` is set and everything is answered; what there is to say besides faults.
    pub fn run(mut self, stop: &AtomicBool) -> Result<String> {
        if let Err(error) = self.work(stop) {
            self.pass_on();
            if !self.faults.any() {
                let what = format!("{error:#}: {}", self.load.describe());
                self.faults.count(Fault::Wrong, format_args!("{what}"));
            }
        }
        Ok(summary(&self.load.tally()))
    }

    fn work(&mut self, stop: &AtomicBool) -> Result<()> {
        let mut moved = Instant::now();
        // Ordering: a flag; what it says needs nothing else to be seen.
        while !stop.load(Ordering::Relaxed) {
            if self.asked.try_recv().is_ok() {
                self.audit()?;
                self.done.send(()).ok();
            }
            let has_moved = self.load.step(&self.timeline.watch)?;
            self.report();
            if has_moved {
                moved = Instant::now();
            } else {
                self.load.nap()?;
            }
            let oldest = self.load.oldest().map_or(Duration::ZERO, |sent| sent.elapsed());
            if oldest > PATIENCE || moved.elapsed() > PATIENCE {
                let what = self.load.describe();
                for _ in 0..self.load.under_way().max(1) {
                    let what = format_args!("no completion after {PATIENCE:?}: {what}");
                    self.faults.count(Fault::Lost, what);
                }
                return Ok(());
            }
        }
        if self.faults.any() {
            // What is missing then was counted, and would be waited for.
            return Ok(());
        }
        self.audit()
    }

    /// Lets the present server do enough to be judged by, then everything come to its end, and counts the credits.
    fn audit(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let enough = self.load.tally().received + AUDITED_FRAMES;
        while self.load.tally().received < enough && !self.faults.any() && Instant::now() < deadline {
            let has_moved = self.load.step(&self.timeline.watch)?;
            self.report();
            if !has_moved {
                self.load.nap()?;
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let control = &self.control;
        let free = || free_credits(control, deadline).map_err(|error| format!("{error:#}"));
        let finished = self.load.finish(&self.timeline.watch, free, deadline);
        self.report();
        match finished {
            Ok(_) => Ok(()),
            Err(LoadError::Credits(why)) => bail!("the server's credits cannot be counted: {why}"),
            Err(error) => Err(error.into()),
        }
    }

    fn report(&mut self) {
        self.pass_on();
        if self.load.is_deaf() {
            self.timeline.is_deaf();
        }
        let lives = self.load.lives.as_mut().map(std::mem::take).unwrap_or_default();
        let lives: Vec<Life> = lives
            .into_iter()
            .map(|(sent, done)| Life { sent, done })
            .collect();
        self.timeline
            .report(0, &lives, self.load.oldest(), self.load.under_way());
    }

    fn pass_on(&mut self) {
        let Tally {
            lost, double, wrong, ..
        } = self.load.tally();
        let kinds = [Fault::Lost, Fault::Double, Fault::Wrong];
        for ((now, counted), fault) in [lost, double, wrong]
            .into_iter()
            .zip(&mut self.counted)
            .zip(kinds)
        {
            for _ in *counted..now {
                let first = self.load.first_fault().unwrap_or("not told");
                self.faults.count(fault, format_args!("first: {first}"));
            }
            *counted = now;
        }
    }
}

/// What the server says is free of its receive buffer; asked again while there is no server to answer.
fn free_credits(control: &Path, deadline: Instant) -> Result<u32> {
    let control = &mut connect_to(control)?.context("the supervisor does not listen")?;
    loop {
        control.send(&Request::Inspect, &[])?;
        let mut found = None;
        loop {
            match receive::<Reply>(control, deadline)?.0 {
                Reply::Entries(entries) => {
                    let mut free = entries
                        .into_iter()
                        .filter(|(path, _)| path == "net0.receive-buffer/free");
                    found = free.next().map(|(_, value)| value).or(found);
                }
                Reply::Done => break,
                other => bail!("the supervisor answers {other:?}"),
            }
        }
        if let Some(found) = found {
            return found.parse().with_context(|| format!("{found:?} free credits"));
        }
        ensure!(Instant::now() < deadline, "no server says how many");
    }
}

fn summary(tally: &Tally) -> String {
    format!(
        "packets: {} completed; frames from the guest: {} sent, {} swallowed by deaths; to the guest: {} put, {} swallowed; \
         control messages: {} answered",
        tally.completed, tally.sent, tally.dropped_out, tally.put, tally.dropped_in, tally.answers
    )
}
