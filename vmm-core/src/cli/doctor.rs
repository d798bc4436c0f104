#![forbid(unsafe_code)]
//! `bulkhead doctor`: what this host can do, how fast its KVM is, and what to do about what is missing.

use std::process::ExitCode;

use sandbox::host::{Probe, State, probe_all};

pub(super) fn doctor() -> ExitCode {
    let probes = probe_all();
    for probe in &probes {
        print!("{}", describe(probe));
    }
    let possible = probes.iter().all(|probe| probe.state != State::Missing);
    if possible {
        println!("A guest can run here.");
        ExitCode::SUCCESS
    } else {
        println!("A guest cannot run here.");
        ExitCode::FAILURE
    }
}

fn describe(probe: &Probe) -> String {
    let mark = match probe.state {
        State::Ok => "ok      ",
        State::Degraded => "degraded",
        State::Missing => "MISSING ",
    };
    let mut text = format!("{mark}  {}: {}\n", probe.name, probe.detail);
    if !probe.advice.is_empty() {
        text.push_str(&format!("          -> {}\n", probe.advice));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_advice() {
        let probe = Probe {
            name: "/dev/kvm",
            state: State::Missing,
            detail: "is not there".to_owned(),
            advice: "load a module".to_owned(),
        };
        assert_eq!(
            describe(&probe),
            "MISSING   /dev/kvm: is not there\n          -> load a module\n"
        );
    }
}
