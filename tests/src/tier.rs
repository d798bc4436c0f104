//! What a test needs beyond a plain machine, and how it says that it has to be skipped.
//!
//! Rust's test harness knows no "skipped". A test that cannot run calls one of the functions below, gets `None`, and
//! returns; the function has then written `SKIP name: reason` past the harness's capture, so that it is seen even in a
//! plain `cargo test`, and `cargo xtask test` counts such a line as a skipped test, not as a passed one:
//!
//! ```no_run
//! # fn test() {
//! let Some(rig) = bulkhead_tests::tier::rig() else { return };
//! # }
//! ```
//!
//! | tier | function | runs when |
//! | --- | --- | --- |
//! | process | [`programs`] | `BULKHEAD_TEST_PROGRAMS` names a folder with our programs |
//! | KVM | [`kvm`] | `/dev/kvm` can be opened and has what the bare guest needs |
//! | Linux | [`rig`] | `BULKHEAD_TEST_RIG` is set: such tests take minutes, so they have to be asked for |
//!
//! `cargo xtask test` sets both variables.

#![forbid(unsafe_code)]

use crate::rig::{Rig, RigError, RigOutcome, RigSpec};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// Names the folder with our programs, usually `target/release`.
pub const PROGRAMS_VARIABLE: &str = "BULKHEAD_TEST_PROGRAMS";

/// Set (to anything) where tests may boot the rig.
pub const RIG_VARIABLE: &str = "BULKHEAD_TEST_RIG";

/// What begins the line of a skipped test.
pub const SKIP_PREFIX: &str = "SKIP ";

/// The folder with our programs, or None after saying that the test is skipped.
///
/// # Panics
/// If the variable names a folder without them: whoever set it wants these tests run.
pub fn programs() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os(PROGRAMS_VARIABLE).map(PathBuf::from) else {
        skip(&format!(
            "{PROGRAMS_VARIABLE} is not set; `cargo xtask test` sets it"
        ));
        return None;
    };
    let folder = if folder.is_absolute() {
        folder
    } else {
        crate::rig::workspace_root().join(folder)
    };
    let sample = folder.join("bulkhead-block");
    assert!(
        sample.exists(),
        "{PROGRAMS_VARIABLE} is set, but there is no {}",
        sample.display()
    );
    Some(folder)
}

/// An open `/dev/kvm`, or None after saying that the test is skipped.
pub fn kvm() -> Option<File> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file),
        Err(error) => {
            skip(&format!("/dev/kvm cannot be opened: {error}"));
            None
        }
    }
}

/// The rig, built if need be, or None after saying that the test is skipped.
///
/// # Panics
/// If the rig was asked for and cannot be built.
pub fn rig() -> Option<Rig> {
    if std::env::var_os(RIG_VARIABLE).is_none() {
        skip(&format!("{RIG_VARIABLE} is not set; `cargo xtask test` sets it"));
        return None;
    }
    Some(Rig::build().unwrap_or_else(|error| panic!("the rig cannot be built: {error:#}")))
}

/// Runs a payload that is expected to come to its end, and says so if the rig needed more than one attempt.
///
/// # Panics
/// If the rig failed at every attempt or cannot be used: the test has then shown nothing, which is not a pass.
pub fn run(rig: &Rig, spec: &RigSpec) -> RigOutcome {
    match rig.run(spec) {
        Ok(outcome) => outcome,
        Err(RigError::Failed(failed)) => {
            panic!(
                "{failed}\n--- output\n{}\n--- console\n{}",
                failed.output, failed.console
            )
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says, past the harness's capture, that the running test is skipped and why.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    // The harness may have left its own line unfinished.
    let line = format!("\n{SKIP_PREFIX}{}: {reason}\n", thread.name().unwrap_or("a test"));
    // Not eprint!, which the harness captures. A closed stderr leaves nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
