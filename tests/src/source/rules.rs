//! The house rules that a program can check, as pure functions from source text to complaints.
//!
//! `tests/tidy.rs` applies them to the whole workspace. Each rule here has a test that shows what it catches.

#![forbid(unsafe_code)]

use super::paths::{code_paths, imports};
use super::tokens::{Token, tokenize};
use std::collections::BTreeSet;

/// The only places where `unsafe` may stand. One room, one invariant.
pub const UNSAFE_ROOMS: &[&str] = &["vmbus/src/mem/", "vmm-core/src/kvm/", "sandbox/src/sys/"];

/// Foreign crates that may be named in certain places only: whoever exchanges one of them then knows where to look.
const CONFINED_CRATES: &[(&str, &[&str])] = &[
    ("kvm_ioctls", &["vmm-core/src/kvm/"]),
    (
        "seccompiler",
        &["sandbox/src/seccomp.rs", "tests/src/xtask/without.rs"],
    ),
    (
        "bincode",
        &["vmbus/src/ipc/codec.rs", "vmbus/src/journal/saved_state.rs"],
    ),
    (
        "vhost_user_backend",
        &["device-block/src/vhost_user.rs", "device-net/src/vhost_user.rs"],
    ),
    (
        "virtio_queue",
        &["device-block/src/vhost_user.rs", "device-net/src/vhost_user.rs"],
    ),
];

/// Which of our crates each of our crates may depend on.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("vmbus", &[]),
    ("sandbox", &[]),
    ("vmm-core", &["vmbus", "sandbox"]),
    ("device-block", &["vmbus", "sandbox"]),
    ("device-net", &["vmbus", "sandbox"]),
    (
        "bulkhead-tests",
        &["vmbus", "sandbox", "vmm-core", "device-block", "device-net"],
    ),
];

/// Words that say that something is not finished. Put together here so that this file does not trip over itself.
const UNFINISHED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("dbg", "!("),
    concat!("#[", "ignore"),
];

/// One file as the rules see it.
#[derive(Debug)]
pub struct SourceFile {
    /// Path relative to the workspace.
    pub path: String,
    /// The text.
    pub text: String,
    tokens: Vec<Token>,
}

impl SourceFile {
    /// A file with its tokens.
    pub fn new(path: &str, text: &str) -> SourceFile {
        SourceFile {
            path: path.into(),
            text: text.into(),
            tokens: tokenize(text),
        }
    }

    /// All that is wrong with the file by itself.
    pub fn complaints(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.check_unsafe(&mut found);
        self.check_unsafe_opt_in(&mut found);
        self.check_unfinished(&mut found);
        self.check_dropped_results(&mut found);
        self.check_confined_crates(&mut found);
        self.check_supervisor(&mut found);
        self.check_theory(&mut found);
        found
            .into_iter()
            .map(|(line, text)| format!("{}:{line}: {text}", self.path))
            .collect()
    }

    /// Is this file in one of the rooms?
    pub fn is_in_unsafe_room(&self) -> bool {
        UNSAFE_ROOMS.iter().any(|room| self.path.starts_with(room))
    }

    /// Does the file itself forbid unsafe code?
    pub fn forbids_unsafe(&self) -> bool {
        let expected = ["#", "!", "[", "forbid", "(", "unsafe_code", ")", "]"];
        self.tokens
            .windows(8)
            .any(|eight| eight.iter().zip(expected).all(|(token, text)| token.is(text)))
    }

    fn check_unsafe(&self, found: &mut Vec<(usize, String)>) {
        if self.is_in_unsafe_room() {
            return;
        }
        let uses = self.tokens.iter().filter(|token| token.is("unsafe"));
        found.extend(uses.map(|token| (token.line, "unsafe outside of the rooms".into())));
    }

    fn check_unsafe_opt_in(&self, found: &mut Vec<(usize, String)>) {
        for (index, line) in self.lines() {
            let opens = ["allow", "expect", "warn"]
                .iter()
                .any(|level| line.contains(&format!("{level}(unsafe_code)")));
            if opens && line.starts_with('#') && !self.comment_above(index).contains("UNSAFETY:") {
                found.push((
                    index + 1,
                    "a room is opened without an UNSAFETY comment above".into(),
                ));
            }
        }
    }

    fn check_unfinished(&self, found: &mut Vec<(usize, String)>) {
        for (index, line) in self.lines() {
            for word in UNFINISHED.iter().filter(|word| line.contains(**word)) {
                found.push((index + 1, format!("{word} means unfinished")));
            }
        }
    }

    fn check_dropped_results(&self, found: &mut Vec<(usize, String)>) {
        for (index, line) in self.lines() {
            let drops = line.starts_with(concat!("let _", " ="));
            let has_reason = line.contains("//") || !self.comment_above(index).is_empty();
            if drops && !has_reason {
                found.push((
                    index + 1,
                    "a result is dropped without a comment that says why".into(),
                ));
            }
        }
    }

    fn check_confined_crates(&self, found: &mut Vec<(usize, String)>) {
        for (name, places) in CONFINED_CRATES {
            let may = places.iter().any(|place| self.path.starts_with(place)) || !self.path.contains("/src/");
            if let Some(token) = self.tokens.iter().find(|token| token.is(name) && !may) {
                found.push((token.line, format!("{name} may be named in {places:?} only")));
            }
        }
    }

    /// The supervisor holds no guest RAM and no KVM, so it has nothing to do with these.
    fn check_supervisor(&self, found: &mut Vec<(usize, String)>) {
        if !self.path.starts_with("vmm-core/src/supervisor/") {
            return;
        }
        let imported = imports(&self.tokens).into_iter().map(|import| import.path);
        let named: BTreeSet<String> = imported
            .chain(code_paths(&self.tokens))
            .filter(|path| ["crate", "super", "vmm_core"].contains(&path[0].as_str()))
            .filter_map(|path| {
                path.into_iter()
                    .find(|segment| segment != "crate" && segment != "super")
            })
            .collect();
        for module in ["kvm", "hyperv", "bus"] {
            if named.contains(module) {
                found.push((1, format!("the supervisor may not name {module}")));
            }
        }
    }

    fn check_theory(&self, found: &mut Vec<(usize, String)>) {
        let is_front_page = ["/mod.rs", "/lib.rs"]
            .iter()
            .any(|name| self.path.ends_with(name));
        let has_theory = self.text.lines().any(|line| line.starts_with("//!"));
        if is_front_page && !has_theory {
            found.push((1, "a lib.rs or mod.rs opens with what this is".into()));
        }
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().map(str::trim_start).enumerate()
    }

    /// The comment that ends on the line above, past attributes and lines that drop results for the same reason.
    fn comment_above(&self, index: usize) -> String {
        let lines: Vec<&str> = self.text.lines().take(index).map(str::trim).collect();
        let mut above = lines.into_iter().rev();
        let first = above.find(|line| !line.starts_with("#[") && !line.starts_with(concat!("let _", " =")));
        let mut comment = String::new();
        for line in first
            .into_iter()
            .chain(above)
            .take_while(|line| line.starts_with("//"))
        {
            comment.push_str(line);
        }
        comment
    }
}

/// What is wrong with a package's dependencies on our own packages. `dependencies` are the names of all sections.
pub fn direction_complaints(package: &str, dependencies: &[String]) -> Vec<String> {
    let Some((_, allowed)) = DIRECTIONS.iter().find(|(name, _)| *name == package) else {
        return vec![format!("{package}: no rule says what it may depend on")];
    };
    let ours = |name: &str| DIRECTIONS.iter().any(|(known, _)| *known == name);
    dependencies
        .iter()
        .filter(|name| ours(name) && *name != package && !allowed.contains(&name.as_str()))
        .map(|name| format!("{package} may not depend on {name}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        SourceFile::new(path, text).complaints().len()
    }

    #[test]
    fn unsafe_is_caught_outside_of_the_rooms_and_in_no_comment() {
        assert_eq!(
            count("vmbus/src/ring/reader.rs", "fn f() { unsafe { g() } } // unsafe"),
            1
        );
        assert_eq!(count("vmbus/src/mem/shared.rs", "fn f() { unsafe { g() } }"), 0);
    }

    #[test]
    fn a_room_is_opened_with_a_reason() {
        let opened = "#[expect(unsafe_code)]\nmod mem;";
        assert_eq!(count("vmbus/src/x.rs", opened), 1);
        assert_eq!(
            count("vmbus/src/x.rs", &format!("// UNSAFETY: because.\n{opened}")),
            0
        );
    }

    #[test]
    fn unfinished_work_is_caught() {
        for word in UNFINISHED {
            assert_eq!(
                count("vmbus/src/x.rs", &format!("fn f() {{ {word} }}")),
                1,
                "{word}"
            );
        }
    }

    #[test]
    fn a_result_is_dropped_with_a_reason_only() {
        let drop = concat!("let _", " = f();\n");
        assert_eq!(count("vmbus/src/x.rs", drop), 1);
        assert_eq!(
            count("vmbus/src/x.rs", &format!("// It cannot fail.\n{drop}{drop}")),
            0
        );
    }

    #[test]
    fn a_confined_crate_is_caught_elsewhere() {
        assert_eq!(count("vmbus/src/ipc/socket.rs", "use bincode::Options;"), 1);
        assert_eq!(count("vmbus/src/ipc/codec.rs", "use bincode::Options;"), 0);
    }

    #[test]
    fn the_supervisor_names_nothing_of_the_machine() {
        assert_eq!(
            count(
                "vmm-core/src/supervisor/plan.rs",
                "use crate::{bus::Bus, spec::Spec};"
            ),
            1
        );
        assert_eq!(
            count("vmm-core/src/supervisor/plan.rs", "fn f() { crate::kvm::g() }"),
            1
        );
        assert_eq!(
            count(
                "vmm-core/src/supervisor/plan.rs",
                "use crate::spec::Bus; use other::kvm::x;"
            ),
            0
        );
    }

    #[test]
    fn a_front_page_has_text() {
        assert_eq!(count("vmbus/src/lib.rs", "mod a;"), 1);
        assert_eq!(
            count(
                "vmbus/src/lib.rs",
                "#![forbid(unsafe_code)]\n//! What it is.\nmod a;"
            ),
            0
        );
    }

    #[test]
    fn dependencies_point_downward_only() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(
            direction_complaints("vmm-core", &names(&["vmbus", "nix"])).len(),
            0
        );
        assert_eq!(
            direction_complaints("device-net", &names(&["device-block", "vmm-core"])).len(),
            2
        );
        assert_eq!(direction_complaints("newcomer", &[]).len(), 1);
    }
}
