//! bulkhead beside QEMU's `microvm` with virtio, in one run of the rig: same kernel, same initrd, same disk file, a TAP each.
//!
//! The host half starts this program again inside the rig ([`inside`]); the figures come back as JSON.

#![forbid(unsafe_code)]

use super::Figure;
use super::machine::{Kind, Sample, Wanted, run_machine};
use crate::rig::{FileSource, Rig, RigError, RigSpec, workspace_root};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Boots of each of the two monitors, in turn.
const ROUNDS: usize = 3;
/// A boot and its measurements take some 40 s on two idle cores.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How often to try for one sample, and how often for the rig's run.
const ATTEMPTS: u32 = 3;
const RESULT: &str = "/out/samples.json";

/// Measures all figures of the rig.
pub fn measure(wanted: &[&str]) -> Result<Vec<Figure>> {
    let rig = Rig::build()?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from);
    let mut spec = RigSpec::new(["/usr/bin/xtask", "bench-rig"].iter().chain(wanted).copied());
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    spec.files
        .push(("/usr/bin/xtask".to_string(), FileSource::Path(program)));
    spec.binaries = Some(target.join("release"));
    spec.timeout = TIMEOUT;
    spec.echo = true;
    let mut attempt = 1;
    let outcome = loop {
        match rig.run(&spec) {
            Ok(outcome) => break outcome,
            Err(RigError::Failed(failed)) if attempt < ATTEMPTS => {
                eprintln!("attempt {attempt} of {ATTEMPTS}: {failed}; trying again");
                attempt += 1;
            }
            Err(RigError::Failed(failed)) => bail!("{failed}; run the benchmark again"),
            Err(RigError::Setup(error)) => return Err(error),
        }
    };
    if outcome.status != 0 {
        bail!("the rig's benchmarks failed with status {}", outcome.status);
    }
    let name = RESULT.trim_start_matches("/out/");
    let bytes = outcome
        .files
        .get(name)
        .context("the rig brought no samples back")?;
    let samples: BTreeMap<String, Vec<Sample>> = serde_json::from_slice(bytes)?;
    let of = |kind: Kind| samples.get(kind.name()).cloned().unwrap_or_default();
    Ok(figures(&of(Kind::Bulkhead), &of(Kind::QemuMicrovm)))
}

/// The half inside the rig.
pub fn inside(names: &[String]) -> Result<ExitCode> {
    let any = |of: &[&str]| names.iter().any(|name| of.contains(&name.as_str()));
    let wanted = Wanted {
        idle: any(&["idle-wakeups", "memory-pss"]),
        disk: any(&["rig-disk-read", "rig-disk-write"]),
        net: any(&["rig-net"]),
    };
    let mut samples: BTreeMap<&str, Vec<Sample>> = BTreeMap::new();
    for round in 1..=ROUNDS {
        for kind in [Kind::Bulkhead, Kind::QemuMicrovm] {
            let sample = sample(round, kind, wanted)?;
            println!("round {round} {}: {sample:?}", kind.name());
            samples.entry(kind.name()).or_default().push(sample);
        }
    }
    std::fs::write(RESULT, serde_json::to_vec(&samples)?)?;
    Ok(ExitCode::SUCCESS)
}

/// One sample. Inner guests of either monitor now and then break down under the emulator's load: tried again, and said.
fn sample(round: usize, kind: Kind, wanted: Wanted) -> Result<Sample> {
    let mut attempt = 1;
    loop {
        match run_machine(kind, wanted) {
            Ok(sample) => return Ok(sample),
            Err(error) if attempt < ATTEMPTS => {
                println!(
                    "round {round} {}: attempt {attempt} of {ATTEMPTS} failed: {error:#}; trying again",
                    kind.name()
                );
                attempt += 1;
            }
            Err(error) => return Err(error.context(format!("round {round}, {}", kind.name()))),
        }
    }
}

fn figures(ours: &[Sample], theirs: &[Sample]) -> Vec<Figure> {
    let against = "QEMU microvm with virtio";
    let figure = |name, unit, of: fn(&Sample) -> f64| {
        Figure::new(
            name,
            unit,
            against,
            ours.iter().map(of).collect(),
            theirs.iter().map(of).collect(),
        )
    };
    vec![
        figure("idle-wakeups", "wakeups/s", |sample| sample.wakeups_per_s),
        figure("memory-pss", "MiB", |sample| sample.pss_mib),
        figure("boot", "s", |sample| sample.boot_s),
        figure("rig-disk-read", "MB/s", |sample| sample.disk_read_mb_s),
        figure("rig-disk-write", "MB/s", |sample| sample.disk_write_mb_s),
        figure("rig-net", "MB/s", |sample| sample.net_mb_s),
    ]
}
