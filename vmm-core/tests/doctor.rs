//! `bulkhead doctor` as a person runs it, on whatever host this is.
#![forbid(unsafe_code)]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn doctor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
    command
        .arg("doctor")
        .args(arguments)
        .output()
        .expect("bulkhead starts")
}

#[test]
fn the_exit_status_says_what_the_last_line_says() {
    let begin = Instant::now();
    let output = doctor(&[]);
    // Two seconds are promised on a machine that has time for us; this one may be testing on all processors.
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("text");
    let mut lines: Vec<&str> = text.lines().collect();
    let verdict = lines.pop().expect("a last line");
    let is_missing = lines.iter().any(|line| line.starts_with("missing"));
    match output.status.code() {
        Some(0) => assert!(verdict == "A Linux guest can run here." && !is_missing, "{text}"),
        Some(1) => assert!(
            verdict.starts_with("No Linux guest can run here: ") && is_missing,
            "{text}"
        ),
        other => panic!("ended with {other:?}: {text}"),
    }
    assert!(lines.len() >= 14, "{text}");
    for line in lines {
        let (state, rest) = line.split_once(' ').expect("columns");
        assert!(["ok", "degraded", "missing"].contains(&state), "{line}");
        assert_eq!(rest.contains("; what to do: "), state != "ok", "{line}");
    }
}

#[test]
fn the_json_object_agrees_with_the_exit_status_and_has_the_speed_of_a_kvm_that_is_there() {
    let output = doctor(&["--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["linux_guest"], output.status.success());
    let can_open = json["checks"][0]["state"] == "ok";
    assert_eq!(json["checks"][0]["name"], "/dev/kvm");
    if can_open {
        assert!(
            json["kvm"]["instructions_per_second"].as_f64().expect("a number") > 0.0,
            "{json}"
        );
        assert!(json["kvm"]["exit_us"].as_f64().expect("a number") > 0.0, "{json}");
    }
}
