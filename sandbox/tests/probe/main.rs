#![forbid(unsafe_code)]
//! The subject of `locked_in.rs`, in two roles.
//!
//! `sandbox-probe parent [OPTION…] PROFILE [DEED…]` is a supervisor: it starts itself as a child, looks at it from
//! outside while it is locked in and waits, lets it do its deeds, and prints what it saw as `key=value` lines.
//! `sandbox-probe child …` is that child.

mod child;
mod deeds;
mod parent;

use sandbox::Profile;
use sandbox::profile::{self, Answer, Rule};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let status = match words.as_slice() {
        ["parent", rest @ ..] => parent::run(rest),
        ["child", options, rest @ ..] => child::run(options, rest),
        _ => {
            eprintln!("sandbox-probe parent|child …: a part of the sandbox crate's tests");
            2
        }
    };
    std::process::exit(status);
}

/// The profiles of the programs, and `without-walls`: a filter that lets the forbidden calls through, to see what
/// stands behind it.
fn profile(name: &str) -> Profile {
    match name {
        "without-walls" => {
            let mut profile = profile::vcpu();
            profile.name = "without-walls";
            profile
                .syscalls
                .extend(deeds::FORBIDDEN_CALLS.map(|(name, number)| Rule {
                    name,
                    number,
                    when: &[],
                    answer: Answer::Allow,
                    by: "runtime: this test",
                }));
            profile
        }
        other => {
            let mut all = profile::all().into_iter();
            all.find(|profile| profile.name.strip_prefix("bulkhead-") == Some(other))
                .unwrap_or_else(|| panic!("no profile {other}"))
        }
    }
}
