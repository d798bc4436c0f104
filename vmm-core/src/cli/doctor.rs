#![forbid(unsafe_code)]
//! `bulkhead doctor`: what this host can do for a VM, and what to do about the rest.
//!
//! One line for each thing that was looked at: `ok`, `degraded` (a VM runs without it: slower, less protected, or
//! without some device) or `missing` (no VM without it). The last line says whether a Linux guest can run here, and
//! the exit status says the same: 0 or 1. KVM is measured, not believed; see `kvm/probe.rs`.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use sandbox::host::{self, Probe, State};
use serde::Serialize;

use crate::kvm::{self, BOOT_INSTRUCTIONS_PER_SECOND, Capability, KvmSpeed};

/// `bulkhead doctor …`
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct DoctorArguments {
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Diagnosis {
    /// Whether a Linux guest can run here.
    linux_guest: bool,
    /// The same as a sentence, with the reason.
    verdict: String,
    kvm: Option<KvmSpeed>,
    checks: Vec<Probe>,
}

/// What KVM answered. Errors are sentences.
struct KvmAnswers {
    capabilities: Result<Vec<(Capability, bool)>, String>,
    speed: Result<KvmSpeed, String>,
}

/// Looks at everything and says what was found. Takes about half a second, and less than two.
pub fn main(arguments: DoctorArguments) -> ExitCode {
    let mut host = host::probe_all();
    host.extend(program_checks());
    let diagnosis = Diagnosis::of(host, ask_kvm().as_ref());
    match print(&diagnosis, arguments.json) {
        Ok(()) if diagnosis.linux_guest => ExitCode::SUCCESS,
        // Whoever has closed the pipe has read enough.
        Ok(()) => ExitCode::FAILURE,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead doctor: cannot write: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(diagnosis: &Diagnosis, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, diagnosis)?;
        writeln!(out)
    } else {
        write!(out, "{diagnosis}")
    }
}

/// None if there is no KVM to ask; why, is what the host's own check of /dev/kvm says.
fn ask_kvm() -> Option<KvmAnswers> {
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map(OwnedFd::from)
    };
    let (first, second) = (open().ok()?, open().ok()?);
    Some(KvmAnswers {
        capabilities: kvm::capabilities(first).map_err(|error| error.to_string()),
        speed: kvm::measure(second).map_err(|error| error.to_string()),
    })
}

/// The programs that a VM's processes run. They lie beside this one.
fn program_checks() -> Vec<Probe> {
    let this = std::env::current_exe().unwrap_or_default();
    let folder = this.parent().unwrap_or(Path::new("/"));
    let check = |(program, absent)| {
        if folder.join(program).is_file() {
            return Probe::ok(program, format!("is in {}", folder.display()));
        }
        Probe::not(
            program,
            absent,
            format!("is not in {}", folder.display()),
            "install it beside bulkhead",
        )
    };
    let programs = [
        ("bulkhead-vcpu", State::Missing),
        ("bulkhead-bus", State::Missing),
        ("bulkhead-block", State::Degraded),
        ("bulkhead-net", State::Degraded),
    ];
    programs.into_iter().map(check).collect()
}

impl Diagnosis {
    fn of(host: Vec<Probe>, answers: Option<&KvmAnswers>) -> Self {
        let mut checks = host;
        // Behind the check of /dev/kvm, which is the first.
        let rest = checks.split_off(checks.len().min(1));
        if let Some(answers) = answers {
            checks.extend(capability_checks(&answers.capabilities));
            checks.extend(speed_checks(&answers.speed));
        }
        checks.extend(rest);
        let missing = checks.iter().find(|check| check.state == State::Missing);
        Self {
            linux_guest: missing.is_none(),
            verdict: match missing {
                None => "A Linux guest can run here.".to_owned(),
                Some(check) => format!("No Linux guest can run here: {} {}.", check.name, check.detail),
            },
            kvm: answers.and_then(|answers| answers.speed.as_ref().ok().copied()),
            checks,
        }
    }
}

const RIG: &str = "use the nested rig, an emulated machine with a KVM that works: `cargo xtask demo`, or `cargo xtask \
                   rig run -- COMMAND`";

/// One line for all that is there, one for each that is not.
fn capability_checks(capabilities: &Result<Vec<(Capability, bool)>, String>) -> Vec<Probe> {
    const NAME: &str = "KVM capabilities";
    let capabilities = match capabilities {
        Ok(capabilities) => capabilities,
        Err(why) => {
            return vec![Probe::not(
                NAME,
                State::Missing,
                format!("cannot be asked for: {why}"),
                RIG,
            )];
        }
    };
    let met = capabilities
        .iter()
        .filter(|(_, met)| *met)
        .map(|(capability, _)| capability.name);
    let met: Vec<&str> = met.collect();
    let mut checks = vec![Probe::ok(NAME, format!("it has {}", met.join(", ")))];
    for (capability, _) in capabilities.iter().filter(|(_, met)| !met) {
        let name = capability.name;
        checks.push(if capability.is_needed() {
            let advice = format!("use a kernel that has it, or {RIG}");
            Probe::not(
                "KVM capability",
                State::Missing,
                format!("it lacks {name}"),
                advice,
            )
        } else {
            let detail = format!("it lacks {name}: {}", capability.without);
            Probe::not(
                "KVM capability",
                State::Degraded,
                detail,
                "use a newer kernel, if that matters",
            )
        });
    }
    checks
}

fn speed_checks(speed: &Result<KvmSpeed, String>) -> Vec<Probe> {
    const NAME: &str = "KVM speed";
    let speed = match speed {
        Ok(speed) => speed,
        Err(why) => {
            return vec![Probe::not(
                NAME,
                State::Missing,
                format!("could not be measured: {why}"),
                RIG,
            )];
        }
    };
    let rate = millions(speed.instructions_per_second);
    let found = format!("is {rate} guest kernel instructions a second");
    let first = if speed.boots_linux() {
        Probe::ok(NAME, found)
    } else {
        let least = millions(BOOT_INSTRUCTIONS_PER_SECOND);
        let detail = format!(
            "{found}: too slow, Linux wants {least} or more; this is a software KVM, which emulates the guest's kernel"
        );
        Probe::not(NAME, State::Missing, detail, RIG)
    };
    vec![
        first,
        Probe::ok(
            "KVM exits",
            format!("take {:.1} µs each, to user space and back", speed.exit_us),
        ),
    ]
}

fn millions(count: f64) -> String {
    let millions = count / 1e6;
    let digits = if millions < 10.0 { 2 } else { 0 };
    format!("{millions:.digits$} million")
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        for check in &self.checks {
            let state = match check.state {
                State::Ok => "ok",
                State::Degraded => "degraded",
                State::Missing => "missing",
            };
            write!(f, "{state:<8}  {:<width$}  {}", check.name, check.detail)?;
            if check.advice.is_empty() {
                writeln!(f)?;
            } else {
                writeln!(f, "; what to do: {}", check.advice)?;
            }
        }
        writeln!(f, "{}", self.verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARDWARE: KvmSpeed = KvmSpeed {
        instructions_per_second: 4e9,
        exit_us: 1.5,
    };
    const SOFTWARE: KvmSpeed = KvmSpeed {
        instructions_per_second: 0.5e6,
        exit_us: 12.0,
    };

    fn host() -> Vec<Probe> {
        let slow = Probe::not("huge pages", State::Degraded, "there are none", "make some");
        vec![Probe::ok("/dev/kvm", "can be opened"), slow]
    }

    /// KVM's real table, with the answers given.
    fn answers(met: impl Fn(&Capability) -> bool, speed: KvmSpeed) -> KvmAnswers {
        let table = kvm::Capability::all();
        let capabilities = table
            .iter()
            .map(|capability| (*capability, met(capability)))
            .collect();
        KvmAnswers {
            capabilities: Ok(capabilities),
            speed: Ok(speed),
        }
    }

    fn states(diagnosis: &Diagnosis, state: State) -> usize {
        diagnosis
            .checks
            .iter()
            .filter(|check| check.state == state)
            .count()
    }

    #[test]
    fn a_fast_kvm_with_all_capabilities_runs_a_guest_whatever_is_degraded() {
        let diagnosis = Diagnosis::of(host(), Some(&answers(|_| true, HARDWARE)));
        assert!(diagnosis.linux_guest);
        assert_eq!(
            (
                states(&diagnosis, State::Missing),
                states(&diagnosis, State::Degraded)
            ),
            (0, 1)
        );
        let text = diagnosis.to_string();
        assert!(text.ends_with("\nA Linux guest can run here.\n"), "{text}");
        assert!(text.contains("4000 million"), "{text}");
    }

    #[test]
    fn a_software_kvm_is_told_by_its_speed_and_sends_people_to_the_rig() {
        let diagnosis = Diagnosis::of(host(), Some(&answers(|_| true, SOFTWARE)));
        assert!(!diagnosis.linux_guest);
        let text = diagnosis.to_string();
        let line = text
            .lines()
            .find(|line| line.contains("KVM speed"))
            .expect("a line");
        assert!(
            line.starts_with("missing") && line.contains("cargo xtask demo"),
            "{line}"
        );
        assert!(
            diagnosis.verdict.contains("0.50 million"),
            "{}",
            diagnosis.verdict
        );
    }

    #[test]
    fn a_needed_capability_stops_a_guest_and_a_wanted_one_does_not() {
        let without =
            |name: &'static str| answers(move |capability| !capability.name.contains(name), HARDWARE);
        let diagnosis = Diagnosis::of(host(), Some(&without("ioeventfd")));
        assert!(
            !diagnosis.linux_guest && diagnosis.verdict.contains("ioeventfd"),
            "{}",
            diagnosis.verdict
        );
        let diagnosis = Diagnosis::of(host(), Some(&without("TSC deadline")));
        assert!(diagnosis.linux_guest);
        assert_eq!(states(&diagnosis, State::Degraded), 2);
    }

    #[test]
    fn without_a_kvm_device_the_reason_is_that_of_the_device() {
        let closed = Probe::not(
            "/dev/kvm",
            State::Missing,
            "cannot be opened: no such file",
            "load it",
        );
        let diagnosis = Diagnosis::of(vec![closed], None);
        assert_eq!(
            diagnosis.verdict,
            "No Linux guest can run here: /dev/kvm cannot be opened: no such file."
        );
        assert!(diagnosis.kvm.is_none());
    }

    #[test]
    fn an_error_while_measuring_is_a_finding() {
        let answers = KvmAnswers {
            capabilities: Ok(vec![]),
            speed: Err("a vCPU does not stop".to_owned()),
        };
        let diagnosis = Diagnosis::of(host(), Some(&answers));
        assert!(!diagnosis.linux_guest && diagnosis.verdict.contains("a vCPU does not stop"));
    }

    #[test]
    fn the_json_object_has_what_scripts_ask_for() {
        let diagnosis = Diagnosis::of(host(), Some(&answers(|_| true, SOFTWARE)));
        let json = serde_json::to_value(&diagnosis).expect("serializes");
        assert_eq!(json["linux_guest"], false);
        assert_eq!(json["kvm"]["instructions_per_second"], 0.5e6);
        assert_eq!(json["checks"][0]["name"], "/dev/kvm");
        assert_eq!(json["checks"][0]["state"], "ok");
    }
}
