//! What the journal costs: 4 KiB requests through `bulkhead-block`, beside the same build with the journal compiled out.
//!
//! `journal-cost`: requests a second with the journal, beside those without, reading from a file in the page cache at a depth of
//! 32: the least work of the kernel's that a request can have, and so the greatest part that the journal can have in it.
//! `journal-cost-both`: the same, reads and writes in turn. `journal-cost-cpu`: microseconds of the server's processor time
//! for a read, because requests a second say less than they should where the guest's side, which this process plays,
//! is the slower one.
//!
//! The other build differs in nothing but `vmbus::journal::ENABLED`. Both servers are there all the time, with a guest and a file each,
//! and take turns. That the one keeps a journal and the other does not is looked up in their journals.

#![forbid(unsafe_code)]

use super::Figure;
use super::storvsp::{Cost, Mix, Served, warm_image};
use crate::release;
use anyhow::{Context, Result, ensure};
use vmbus::journal::WITHOUT_JOURNAL;

/// The figures.
pub const NAMES: &[&str] = &["journal-cost", "journal-cost-both", "journal-cost-cpu"];

/// Many short rounds in turn, so that both sides see the same noise of a busy machine.
const ROUNDS: usize = 41;

/// Measures the figures.
pub fn measure(wanted: &[&str]) -> Result<Vec<Figure>> {
    let program = std::env::current_exe()?;
    let programs = program.parent().context("this program lies nowhere")?;
    let without = release::block_without_journal(programs)?;
    let [image, other_image] = [warm_image()?, warm_image()?];
    let mut journaled = Served::new(&programs.join("bulkhead-block"), &[], image.path())?;
    ensure!(
        Served::new(&without, &[], other_image.path()).is_err(),
        "{} starts as if it were the usual build",
        without.display()
    );
    let mut bare = Served::new(&without, &[WITHOUT_JOURNAL], other_image.path())?;
    ensure!(journaled.has_journal()?, "the usual build keeps no journal");
    ensure!(!bare.has_journal()?, "{} keeps a journal", without.display());
    let mut figures = Vec::new();
    for (mix, names) in [
        (Mix::Reads, ["journal-cost", "journal-cost-cpu"].as_slice()),
        (Mix::Both, ["journal-cost-both"].as_slice()),
    ] {
        if !names.iter().any(|name| wanted.contains(name)) {
            continue;
        }
        let mut costs: [Vec<Cost>; 2] = Default::default();
        // One turn that does not count: page tables, caches, frequency.
        for turn in 0..=ROUNDS {
            // Whoever is first may be at a disadvantage, or at an advantage.
            let pair = match turn % 2 {
                0 => [journaled.round(mix)?, bare.round(mix)?],
                _ => {
                    let second = bare.round(mix)?;
                    [journaled.round(mix)?, second]
                }
            };
            if turn > 0 {
                for (costs, cost) in costs.iter_mut().zip(pair) {
                    costs.push(cost);
                }
            }
        }
        for name in names {
            let cpu = *name == "journal-cost-cpu";
            let [with, without] = costs.each_ref().map(|costs| {
                let of = |cost: &Cost| if cpu { cost.cpu_us } else { cost.rate };
                costs.iter().map(of).collect()
            });
            let unit = if cpu { "us/request" } else { "requests/s" };
            let against = "the same build with the journal compiled out";
            figures.push(Figure::new(name, unit, against, with, without));
        }
    }
    Ok(figures)
}
