#![forbid(unsafe_code)]
//! The supervisor as a process, with children that are played: this program plays `bulkhead-vcpu` or a server when it is
//! started under such a name, and runs the tests otherwise.

mod adopters;
mod adoption;
mod cases;
mod fencing;
mod operator;
mod orphans;
mod place;
mod played;
mod replaced;
mod standbys;
mod steps;
mod swaps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    match name.rsplit('/').next() {
        Some("bulkhead-vcpu") => return played::vcpu(),
        Some("bulkhead-bus") => return played::bus(),
        Some("bulkhead-block") => return played::server(None),
        Some(name) => {
            if let Some(play) = name.strip_prefix(played::SWAPPED) {
                return played::server(Some(play));
            }
        }
        None => {}
    }
    let args: Vec<String> = args.collect();
    let listing = args.iter().any(|arg| arg == "--list");
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with("--")).collect();
    let chosen: Vec<_> = [
        cases::ALL,
        fencing::ALL,
        operator::ALL,
        swaps::ALL,
        replaced::ALL,
        standbys::ALL,
        orphans::ALL,
        adoption::ALL,
        adopters::ALL,
        steps::ALL,
    ]
    .concat()
    .into_iter()
    .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
    .collect();
    if listing {
        for (name, _) in chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if std::fs::File::open("/dev/kvm").is_err() {
        println!("SKIP supervisor: /dev/kvm cannot be opened");
        println!(
            "\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; 0 filtered out",
            chosen.len()
        );
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", chosen.len());
    let mut failed = 0;
    for (name, test) in &chosen {
        let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out",
        chosen.len() - failed
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
