//! Hosts that lack what sandboxes are made of.
#![forbid(unsafe_code)]

use super::place::{Place, without};
use bulkhead_tests::tier;
use vmm_core::supervisor::control::Request;

const LANDLOCK: (&str, &[&str]) = (
    "landlock",
    &["no Landlock: the kernel was built or started without it"],
);
const SECCOMP: (&str, &[&str]) = (
    "seccomp",
    &["no system call filter: the kernel was built without seccomp"],
);
const NAMESPACES: (&str, &[&str]) = (
    "namespaces",
    &[
        "no PID namespace of its own: the host refuses to make one",
        "no mnt namespace of its own: the host refuses to make one",
        "no net namespace of its own: the host refuses to make one",
    ],
);

/// Servers of both kinds do their work in what is left of their sandboxes, die, and are followed.
fn servers_serve(feature: &str) {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    for server in ["block", "net"] {
        let output = without(feature)
            .arg(env!("CARGO_BIN_EXE_xtask"))
            .args(["kill", "--server", server, "--count", "3", "--programs"])
            .arg(&programs)
            .output()
            .expect("cargo builds xtask before its tests");
        let said = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{complained}");
        let line = format!("kill {server} kills=3 lost=0 double=0 wrong=0 ");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with(&line), "{said}");
    }
}

fn runs_and_says_so((feature, sentences): (&str, &[&str])) {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let place = Place::new();
    let mut running = place.start(&programs, Some(feature), &[]);
    place.wait_until_it_runs(&mut running);
    place.ask(&mut running, &Request::Stop);
    let (status, said) = running.end();
    assert_eq!(status, Some(0), "{said}");
    let begins = "bulkhead: this host lacks what a full sandbox needs: ";
    assert_eq!(said.matches(begins).count(), 1, "{said}");
    for sentence in sentences {
        assert_eq!(said.matches(sentence).count(), 1, "{said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
}

fn is_refused((feature, sentences): (&str, &[&str])) {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let place = Place::new();
    let (status, said) = place
        .start(&programs, Some(feature), &["--require-full-sandbox"])
        .end();
    assert_eq!(status, Some(1), "{said}");
    let begins = "bulkhead: a full sandbox was asked for, and this host lacks: ";
    assert!(said.starts_with(begins), "{said}");
    for sentence in sentences {
        assert_eq!(said.matches(sentence).count(), 1, "{said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
    let left = std::fs::read_dir(place.folder.path().join("run/vm"));
    assert_eq!(
        left.into_iter().flatten().count(),
        0,
        "something is left of the VM"
    );
}

#[test]
fn a_host_without_landlock_runs_a_vm_and_says_so_once() {
    runs_and_says_so(LANDLOCK);
}

#[test]
fn a_host_without_seccomp_runs_a_vm_and_says_so_once() {
    runs_and_says_so(SECCOMP);
}

#[test]
fn a_host_without_namespaces_runs_a_vm_and_says_so_once() {
    runs_and_says_so(NAMESPACES);
}

#[test]
fn a_host_that_lacks_something_is_refused_where_a_full_sandbox_is_asked_for() {
    [LANDLOCK, SECCOMP, NAMESPACES].into_iter().for_each(is_refused);
}

#[test]
fn servers_serve_on_a_host_without_landlock() {
    servers_serve("landlock");
}

#[test]
fn servers_serve_on_a_host_without_seccomp() {
    servers_serve("seccomp");
}

#[test]
fn servers_serve_on_a_host_without_namespaces() {
    servers_serve("namespaces");
}
