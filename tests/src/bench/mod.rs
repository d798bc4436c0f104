//! `cargo xtask bench`: each figure beside a baseline measured in the same run.
//!
//! One line a figure: `bench NAME value=N unit=U baseline=N ratio=R`, where ratio is value / baseline. Machines are noisy;
//! the two sides of a ratio take turns, and the medians are compared. What is measured, and a line that tells people what
//! the baseline is and between which quartiles the single rounds lay, goes to standard error.

#![forbid(unsafe_code)]

mod journal;
mod machine;
pub mod netvsp;
mod processes;
pub mod rig;
pub mod ring;
pub mod storvsp;

use crate::release;
use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// `cargo xtask bench …`
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Which figures; all of them if none is named.
    names: Vec<String>,
    /// Also write the figures, with their single runs, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// This program was built with optimization.
    #[arg(long, hide = true)]
    optimized: bool,
}

/// One measured figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// As in `cargo xtask bench NAME`.
    pub name: &'static str,
    /// Median of `runs`.
    pub value: f64,
    /// Unit of value and baseline.
    pub unit: &'static str,
    /// Median of `baseline_runs`.
    pub baseline: f64,
    /// What the baseline is, for people.
    pub against: &'static str,
    /// Single runs.
    pub runs: Vec<f64>,
    /// Single runs of the baseline.
    pub baseline_runs: Vec<f64>,
}

impl Figure {
    /// A figure from its single runs.
    pub fn new(
        name: &'static str,
        unit: &'static str,
        against: &'static str,
        runs: Vec<f64>,
        baseline_runs: Vec<f64>,
    ) -> Figure {
        Figure {
            name,
            value: median(&runs),
            unit,
            baseline: median(&baseline_runs),
            against,
            runs,
            baseline_runs,
        }
    }

    fn line(&self) -> String {
        let ratio = self.value / self.baseline;
        format!(
            "bench {} value={} unit={} baseline={} ratio={}",
            self.name,
            number(self.value),
            self.unit,
            number(self.baseline),
            number(ratio)
        )
    }

    fn remark(&self) -> String {
        let spread = |runs: &[f64]| {
            let [low, high] = quartiles(runs);
            format!(
                "{} to {} in half of {} rounds",
                number(low),
                number(high),
                runs.len()
            )
        };
        format!(
            "  {}; beside {}: {}",
            spread(&self.runs),
            self.against,
            spread(&self.baseline_runs)
        )
    }
}

/// Three to four significant digits are more than these machines can tell.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return "nan".to_string();
    }
    let digits = if value.abs() >= 100.0 { 0 } else { 3 };
    format!("{value:.digits$}")
}

/// The middle value; 0 for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[len / 2],
        len => (sorted[len / 2 - 1] + sorted[len / 2]) / 2.0,
    }
}

/// The values a quarter and three quarters up; 0 for none.
pub fn quartiles(values: &[f64]) -> [f64; 2] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    [last / 4, last - last / 4].map(|index| sorted.get(index).copied().unwrap_or(0.0))
}

/// Figures that are measured together, and how.
struct Group {
    names: &'static [&'static str],
    measure: fn(&[&str]) -> Result<Vec<Figure>>,
}

const GROUPS: &[Group] = &[
    Group {
        names: &[
            "ring-256",
            "ring-64k",
            "ring-64k-filled",
            "ring-256-polled",
            "ring-64k-inline",
            "ring-64k-crossing",
        ],
        measure: ring::measure,
    },
    Group {
        names: &[
            "storvsp-cpu",
            "storvsp-cpu-alone",
            "storvsp-cpu-reads",
            "storvsp-cpu-reads-alone",
            "storvsp-interrupts",
        ],
        measure: storvsp::measure,
    },
    Group {
        names: journal::NAMES,
        measure: journal::measure,
    },
    Group {
        names: &["netvsp-pps"],
        measure: netvsp::measure,
    },
    Group {
        names: &[
            "idle-wakeups",
            "memory-pss",
            "boot",
            "rig-disk-read",
            "rig-disk-write",
            "rig-net",
        ],
        measure: rig::measure,
    },
];

/// Runs the benchmarks.
pub fn main(arguments: BenchArguments) -> Result<ExitCode> {
    for name in &arguments.names {
        if !GROUPS.iter().any(|group| group.names.contains(&name.as_str())) {
            let all: Vec<&str> = GROUPS.iter().flat_map(|group| group.names).copied().collect();
            bail!("there is no benchmark named {name}; there are {}", all.join(", "));
        }
    }
    if !arguments.optimized {
        // Before anything that takes minutes.
        if let Some(path) = &arguments.json {
            std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))?;
        }
        return again_optimized(&arguments);
    }
    let mut figures = Vec::new();
    for group in GROUPS {
        let wanted: Vec<&str> = group
            .names
            .iter()
            .copied()
            .filter(|name| arguments.names.is_empty() || arguments.names.iter().any(|n| n == name))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        eprintln!("bench: measures {}", wanted.join(", "));
        for figure in (group.measure)(&wanted)? {
            if wanted.contains(&figure.name) {
                println!("{}", figure.line());
                eprintln!("{}", figure.remark());
                figures.push(figure);
            }
        }
    }
    if let Some(path) = &arguments.json {
        let text = serde_json::to_vec_pretty(&figures)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask` itself is built for quick building; what is measured must be built for speed.
fn again_optimized(arguments: &BenchArguments) -> Result<ExitCode> {
    let programs = release::build_all()?;
    let named = |name: &&str| arguments.names.iter().any(|other| other == name);
    if arguments.names.is_empty() || journal::NAMES.iter().any(named) {
        release::build_block_without_journal()?;
    }
    let mut args: Vec<OsString> = vec!["bench".into(), "--optimized".into()];
    args.extend(arguments.names.iter().map(OsString::from));
    if let Some(path) = &arguments.json {
        args.extend(["--json".into(), path.into()]);
    }
    release::run_xtask(&programs, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value_or_the_mean_of_the_two_middle_ones() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn half_of_the_values_lie_between_the_quartiles() {
        assert_eq!(quartiles(&[5.0, 1.0, 4.0, 2.0, 3.0]), [2.0, 4.0]);
        assert_eq!(quartiles(&[7.0]), [7.0, 7.0]);
        assert_eq!(quartiles(&[]), [0.0, 0.0]);
    }

    #[test]
    fn the_names_that_scripts_rely_on_are_there_and_none_twice() {
        let all: Vec<&str> = GROUPS.iter().flat_map(|group| group.names).copied().collect();
        for name in [
            "ring-256",
            "ring-64k",
            "storvsp-cpu",
            "storvsp-interrupts",
            "netvsp-pps",
            "idle-wakeups",
            "memory-pss",
            "boot",
            "rig-disk-read",
            "rig-disk-write",
            "rig-net",
        ] {
            assert_eq!(all.iter().filter(|other| **other == name).count(), 1, "{name}");
        }
    }

    #[test]
    fn a_line_has_the_form_that_scripts_rely_on() {
        let figure = Figure::new("ring-256", "packets/s", "x", vec![250.0], vec![1000.0]);
        assert_eq!(
            figure.line(),
            "bench ring-256 value=250 unit=packets/s baseline=1000 ratio=0.250"
        );
    }
}
