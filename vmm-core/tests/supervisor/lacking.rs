#![forbid(unsafe_code)]
//! Hosts that lack what sandboxes are made of: this one, with a system call less, and the real `bulkhead-vcpu`,
//! `bulkhead-bus` and keeper.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmm_core::supervisor::control::Request;

use super::place::{Place, Running};

/// What the names begin with under which this program takes a feature away and becomes another program.
pub const WITHOUT: &str = "without-";

pub const ALL: &[(&str, fn())] = &[
    (
        "a_host_without_landlock_runs_a_vm_and_says_so_once",
        a_host_without_landlock_runs_a_vm_and_says_so_once,
    ),
    (
        "a_host_without_seccomp_runs_a_vm_and_says_so_once",
        a_host_without_seccomp_runs_a_vm_and_says_so_once,
    ),
    (
        "a_host_that_lacks_something_is_refused_where_a_full_sandbox_is_asked_for",
        a_host_that_lacks_something_is_refused_where_a_full_sandbox_is_asked_for,
    ),
];

const LANDLOCK: (&str, &str) = (
    "landlock",
    "no Landlock: the kernel was built or started without it",
);
const SECCOMP: (&str, &str) = (
    "seccomp",
    "no system call filter: the kernel was built without seccomp",
);

/// Runs the program that the arguments name. As far as it and its children can tell, the kernel has not got the feature.
pub fn become_program(feature: &str) -> ExitCode {
    let number = match feature {
        "landlock" => libc::SYS_landlock_create_ruleset,
        _ => libc::SYS_seccomp,
    };
    let filter = SeccompFilter::new(
        BTreeMap::from([(number, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.expect("a filter").try_into().expect("it compiles");
    seccompiler::apply_filter(&program).expect("the kernel has filters");
    let mut args = std::env::args_os().skip(1);
    let error = Command::new(args.next().expect("a program")).args(args).exec();
    eprintln!("{error}");
    ExitCode::FAILURE
}

/// `bulkhead run` on a host without that.
fn start(place: &Place, (feature, _): (&str, &str), flags: &[&str]) -> Running {
    let real = place.path("real");
    if !real.exists() {
        std::fs::create_dir(&real).expect("made");
        for (name, program) in [
            ("bulkhead-vcpu", env!("CARGO_BIN_EXE_bulkhead-vcpu")),
            ("bulkhead-bus", env!("CARGO_BIN_EXE_bulkhead-bus")),
        ] {
            symlink(program, real.join(name)).expect("linked");
        }
    }
    let without = place.path(&format!("{WITHOUT}{feature}"));
    if !without.exists() {
        symlink(std::env::current_exe().expect("known"), &without).expect("linked");
    }
    let mut command = Command::new(without);
    command
        .arg(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["run", "--memory", "64M", "--name", "vm", "--console", "none"])
        .arg("--kernel")
        .arg(place.path("kernel"))
        .arg("--programs")
        .arg(real)
        .arg("--run-folder")
        .arg(place.path("run"))
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Running {
        child: command.spawn().expect("started"),
    }
}

fn runs_and_says_so(lacking: (&str, &str)) {
    let place = Place::new();
    let running = start(&place, lacking, &[]);
    place.wait_until_it_runs();
    place.ask(&Request::Stop);
    let ended = running.wait();
    ended.expect(0, "bulkhead: this host lacks what a full sandbox needs: ");
    assert_eq!(ended.stderr.matches(lacking.1).count(), 1, "{}", ended.stderr);
    place.expect_ended();
}

fn a_host_without_landlock_runs_a_vm_and_says_so_once() {
    runs_and_says_so(LANDLOCK);
}

fn a_host_without_seccomp_runs_a_vm_and_says_so_once() {
    runs_and_says_so(SECCOMP);
}

fn a_host_that_lacks_something_is_refused_where_a_full_sandbox_is_asked_for() {
    for lacking in [LANDLOCK, SECCOMP] {
        let place = Place::new();
        let ended = start(&place, lacking, &["--require-full-sandbox"]).wait();
        ended.expect(1, lacking.1);
        let sentence = "bulkhead: a full sandbox was asked for, and this host lacks: ";
        assert!(ended.stderr.starts_with(sentence), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        place.expect_ended();
    }
}
