//! Servers that die by the thousand, with the supervisor and the sandboxes that are shipped.
#![forbid(unsafe_code)]

use bulkhead_tests::tier;
use bulkhead_tests::xtask::guard::GUARDED_VARIABLE;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs an xtask that kills or swaps; its last line begins with `begins`, and nothing went wrong.
fn kills(args: &[&str], begins: &str) {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .arg("--programs")
        .arg(&programs)
        .output()
        .expect("cargo builds xtask before its tests");
    let (said, complained) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    println!("{said}");
    assert!(output.status.success(), "{said}\n{complained}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with(begins), "{last}");
}

#[test]
fn no_guest_notices_two_thousand_deaths_of_bulkhead_block() {
    kills(
        &["kill", "--server", "block", "--count", "2000"],
        "kill block kills=2000 lost=0 double=0 wrong=0 ",
    );
}

/// The server is built here, unless it is up to date.
#[test]
fn no_guest_notices_a_death_of_bulkhead_block_at_any_step_of_its_journal() {
    kills(&["kill", "--server", "block", "--steps"], "kill block kills=");
}

#[test]
fn no_guest_notices_a_death_of_bulkhead_net_at_any_step_of_its_journal() {
    kills(&["kill", "--server", "net", "--steps"], "kill net kills=");
}

#[test]
fn no_guest_notices_five_hundred_deaths_of_bulkhead_net() {
    kills(
        &["kill", "--server", "net", "--count", "500"],
        "kill net kills=500 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn no_guest_notices_that_bulkhead_block_is_replaced_two_hundred_times() {
    kills(
        &["swap", "--server", "block", "--count", "200"],
        "swap block swaps=200 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn no_guest_notices_that_bulkhead_net_is_replaced_two_hundred_times() {
    kills(
        &["swap", "--server", "net", "--count", "200"],
        "swap net swaps=200 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn no_guest_notices_a_hundred_deaths_of_bulkhead_block_before_a_standby() {
    kills(
        &["kill", "--server", "block", "--standby", "--count", "100"],
        "kill block kills=100 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn no_guest_notices_a_hundred_deaths_of_bulkhead_net_before_a_standby() {
    kills(
        &["kill", "--server", "net", "--standby", "--count", "100"],
        "kill net kills=100 lost=0 double=0 wrong=0 ",
    );
}

/// Each of them with its supervisor, and each time another one adopts the VM.
#[test]
fn no_guest_notices_a_hundred_deaths_of_bulkhead_block_with_its_supervisor() {
    kills(
        &["kill", "--server", "block", "--adopt", "--count", "100"],
        "kill block kills=100 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn no_guest_notices_a_hundred_deaths_of_bulkhead_net_with_its_supervisor() {
    kills(
        &["kill", "--server", "net", "--adopt", "--count", "100"],
        "kill net kills=100 lost=0 double=0 wrong=0 ",
    );
}

#[test]
fn a_harness_that_is_killed_leaves_nothing() {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let place = tempfile::tempdir().expect("a folder");
    let mut guard = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["kill", "--server", "block", "--count", "3000", "--programs"])
        .arg(&programs)
        .arg("--folder")
        .arg(place.path())
        .env("TMPDIR", place.path())
        // `cargo xtask test` has a guard, under which this one would get none.
        .env_remove(GUARDED_VARIABLE)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cargo builds xtask before its tests");
    let names = || {
        let entries = std::fs::read_dir(place.path()).expect("readable");
        let names = entries.map(|entry| entry.expect("an entry").path());
        names.collect::<Vec<_>>()
    };
    let runs = |folder: &PathBuf| {
        let mut inner = std::fs::read_dir(folder).into_iter().flatten().flatten();
        inner.any(|entry| entry.path().join("run/kill/control").exists())
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while !names().iter().any(runs) {
        assert!(Instant::now() < deadline, "no VM is started");
        std::thread::yield_now();
    }
    guard.kill().expect("killed");
    guard.wait().expect("waited for");
    while !names().is_empty() {
        assert!(Instant::now() < deadline, "{:?} are left", names());
        std::thread::yield_now();
    }
}
