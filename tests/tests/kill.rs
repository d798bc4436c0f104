//! Servers that die by the thousand, with the supervisor and the sandboxes that are shipped.
#![forbid(unsafe_code)]

use bulkhead_tests::tier;
use std::process::Command;

#[test]
fn no_guest_notices_two_thousand_deaths_of_bulkhead_block() {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["kill", "--server", "block", "--count", "2000", "--programs"])
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
    assert!(
        last.starts_with("kill block kills=2000 lost=0 double=0 wrong=0 "),
        "{last}"
    );
}
