//! House rules, checked on the workspace as it stands. The rules are in `src/source/rules.rs`, with tests of their own.
#![forbid(unsafe_code)]

use bulkhead_tests::rig::workspace_root;
use bulkhead_tests::source::reach::reachable;
use bulkhead_tests::source::rules::{SourceFile, direction_complaints};
use bulkhead_tests::source::tokens::tokenize;
use bulkhead_tests::source::tree::{CrateTree, declared_modules, module_file};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const PACKAGES: &[&str] = &[
    "vmbus",
    "sandbox",
    "vmm-core",
    "device-block",
    "device-net",
    "tests",
];

/// Workspaces of their own, with rules of their own.
const ELSEWHERE: &[&str] = &["tests/fuzz", "tests/guest"];

#[test]
fn every_file_keeps_the_house_rules() {
    let complaints: Vec<String> = source_files().iter().flat_map(SourceFile::complaints).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_file_is_part_of_a_program_or_a_test() {
    let mut reached = BTreeMap::new();
    roots().iter().for_each(|root| {
        walk(
            root,
            root.parent().expect("a file has a folder"),
            false,
            &mut reached,
        )
    });
    let lost: Vec<PathBuf> = rust_files()
        .into_iter()
        .filter(|file| !reached.contains_key(file))
        .collect();
    assert!(lost.is_empty(), "no mod line leads to {lost:#?}");
}

#[test]
fn every_file_outside_of_the_rooms_forbids_unsafe_code() {
    let mut reached = BTreeMap::new();
    roots().iter().for_each(|root| {
        walk(
            root,
            root.parent().expect("a file has a folder"),
            false,
            &mut reached,
        )
    });
    let open: Vec<String> = reached
        .into_iter()
        .filter(|(_, forbids)| !forbids)
        .map(|(file, _)| source_file(&file))
        // A crate's root that lets a room in cannot forbid for its whole crate.
        .filter(|file| !file.is_in_unsafe_room() && !file.text.contains("expect(unsafe_code)"))
        .map(|file| file.path)
        .collect();
    assert!(open.is_empty(), "no forbid(unsafe_code) in force in {open:#?}");
}

#[test]
fn dependencies_point_downward_only() {
    let mut complaints = Vec::new();
    for folder in PACKAGES {
        let manifest = manifest(folder);
        let name = manifest["package"]["name"]
            .as_str()
            .expect("a package has a name")
            .to_string();
        let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
        let names: Vec<String> = sections
            .iter()
            .filter_map(|section| manifest.get(*section)?.as_table())
            .flat_map(|table| table.keys().cloned())
            .collect();
        complaints.extend(direction_complaints(&name, &names));
    }
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// The table of design rules: what each program must not be able to use.
#[test]
fn no_program_reaches_what_it_must_not_have() {
    const FORBIDDEN: &[(&str, &[&str])] = &[
        (
            "vmm-core/src/bin/bulkhead-vcpu.rs",
            &["vmbus::ring", "vmbus::journal", "vmm_core::supervisor"],
        ),
        (
            "vmm-core/src/bin/bulkhead.rs",
            &["vmbus::ring", "vmm_core::bus", "vmm_core::hyperv"],
        ),
    ];
    let libraries = [
        ("vmbus", "vmbus"),
        ("sandbox", "sandbox"),
        ("vmm_core", "vmm-core"),
    ];
    let mut crates: BTreeMap<String, CrateTree> = libraries
        .iter()
        .map(|(name, folder)| {
            let root = workspace_root().join(folder).join("src/lib.rs");
            (
                name.to_string(),
                CrateTree::read(&root).expect("a crate can be read"),
            )
        })
        .collect();
    for (program, forbidden) in FORBIDDEN {
        let root = CrateTree::read(&workspace_root().join(program)).expect("a program can be read");
        crates.insert("program".into(), root);
        if program.ends_with("/bulkhead.rs") {
            // `bulkhead doctor` measures KVM in a process that never becomes a supervisor. Nothing else may take its way.
            let doctor = ["cli", "doctor"].map(String::from);
            let library = crates.get_mut("vmm_core").expect("it was read above");
            assert!(
                library.modules.remove(&doctor[..]).is_some(),
                "the doctor has moved"
            );
        }
        let reached: BTreeSet<String> = reachable(&crates, "program")
            .into_iter()
            .map(|(name, path)| [&[name][..], &path[..]].concat().join("::"))
            .collect();
        for module in *forbidden {
            let found: Vec<_> = reached.iter().filter(|name| name.starts_with(module)).collect();
            assert!(found.is_empty(), "{program} can use {found:?}");
        }
    }
}

#[test]
fn every_allowed_system_call_names_code_that_exists() {
    let mut wrong = BTreeSet::new();
    for profile in sandbox::profile::all() {
        for rule in &profile.syscalls {
            let named = rule
                .by
                .split([';', ','])
                .filter_map(|part| part.split_once(".rs"));
            for (path, function) in named {
                let path = path.rsplit(' ').next().unwrap_or(path);
                let text =
                    fs::read_to_string(workspace_root().join(format!("{path}.rs"))).unwrap_or_default();
                let wanted = format!("fn {}", function.trim());
                let exists = !text.is_empty() && (function.trim().is_empty() || text.contains(&wanted));
                if !exists {
                    wrong.insert(format!(
                        "{} ({}): no such code: {path}.rs {}",
                        rule.name,
                        profile.name,
                        function.trim()
                    ));
                }
            }
            if !rule.by.contains(".rs") && !rule.by.starts_with("runtime: ") {
                wrong.insert(format!("{} ({}): by whom?", rule.name, profile.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn source_files() -> Vec<SourceFile> {
    rust_files().iter().map(|file| source_file(file)).collect()
}

fn source_file(file: &Path) -> SourceFile {
    let path = file
        .strip_prefix(workspace_root())
        .unwrap_or(file)
        .display()
        .to_string();
    SourceFile::new(
        &path,
        &fs::read_to_string(file).expect("a source file can be read"),
    )
}

fn rust_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    PACKAGES
        .iter()
        .for_each(|package| collect(&workspace_root().join(package), &mut files));
    assert!(files.len() > 10, "the workspace was not found");
    files
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a package's folder can be read") {
        let path = entry.expect("a folder's entry can be read").path();
        let is_elsewhere = ELSEWHERE.iter().any(|other| path == workspace_root().join(other));
        if path.is_dir() && !is_elsewhere && !path.ends_with("target") {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn manifest(package: &str) -> toml::Table {
    let path = workspace_root().join(package).join("Cargo.toml");
    fs::read_to_string(path)
        .expect("a package has a manifest")
        .parse()
        .expect("a manifest is TOML")
}

/// The root files of all crates: by cargo's conventions, and by the manifests.
fn roots() -> Vec<PathBuf> {
    let mut roots = BTreeSet::new();
    for package in PACKAGES {
        let folder = workspace_root().join(package);
        let named = ["src/lib.rs", "src/main.rs", "build.rs"].map(|name| folder.join(name));
        let manifest = manifest(package);
        let declared = ["bin", "test", "bench", "example"]
            .iter()
            .filter_map(|section| manifest.get(*section)?.as_array())
            .flatten()
            .filter_map(|target| target.get("path")?.as_str());
        roots.extend(declared.map(|path| folder.join(path)));
        roots.extend(named.into_iter().filter(|path| path.exists()));
        for conventional in ["src/bin", "tests", "benches", "examples"] {
            let entries = fs::read_dir(folder.join(conventional))
                .into_iter()
                .flatten()
                .flatten();
            // Cargo takes the files of these folders only; this package's own tests/ is a level further down.
            roots.extend(
                entries
                    .flat_map(|entry| [entry.path(), entry.path().join("main.rs")])
                    .filter(|path| path.is_file()),
            );
        }
    }
    roots
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

/// Notes every file that is reached from a root, and whether unsafe code is forbidden in it.
fn walk(file: &Path, folder: &Path, forbidden_above: bool, reached: &mut BTreeMap<PathBuf, bool>) {
    let source = source_file(file);
    let forbids = forbidden_above || source.forbids_unsafe();
    reached.insert(file.to_path_buf(), forbids);
    let paths = explicit_paths(&source.text);
    for child in declared_modules(&tokenize(&source.text)) {
        let beside = file.parent().expect("a file has a folder");
        let target = match paths.get(&child) {
            Some(path) => beside.join(path),
            None => match module_file(folder, &child) {
                Ok(target) => target,
                Err(error) => panic!("{}: {error}", file.display()),
            },
        };
        let below = match paths.get(&child) {
            Some(_) => target.parent().expect("a file has a folder").to_path_buf(),
            None => folder.join(&child),
        };
        walk(&target, &below, forbids, reached);
    }
}

/// Modules whose file is given by a `path` attribute on the line before.
fn explicit_paths(text: &str) -> BTreeMap<String, String> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines
        .windows(2)
        .filter_map(|two| {
            let path = two[0].strip_prefix("#[path = \"")?.strip_suffix("\"]")?;
            let name = two[1].strip_suffix(';')?.rsplit(' ').next()?;
            Some((name.to_string(), path.to_string()))
        })
        .collect()
}
