//! Hosts that lack what sandboxes are made of, and the programs that are shipped.
#![forbid(unsafe_code)]

use bulkhead_tests::kill::played::{NETWORK_SOCKET, PASST};
use bulkhead_tests::tier;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmbus::ipc::Socket;
use vmm_core::pc::boot::halting_kernel;
use vmm_core::supervisor::control::{Listener, Reply, Request, connect_to};

/// Limit: for everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

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

fn without(feature: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["without", feature]);
    command
}

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

/// `bulkhead run` of a VM with a disk and a network interface, in a folder of its own.
fn start(folder: &Path, programs: &Path, feature: &str, flags: &[&str]) -> (Child, Listener) {
    std::fs::write(folder.join("kernel"), halting_kernel()).expect("written");
    // A network at which nobody is.
    let network = Listener::bind(&folder.join(NETWORK_SOCKET)).expect("bound");
    symlink(env!("CARGO_BIN_EXE_xtask"), folder.join(PASST)).expect("linked");
    let path = std::env::var("PATH").unwrap_or_default();
    let child = without(feature)
        .arg(programs.join("bulkhead"))
        .args(["run", "--name", "vm", "--memory", "64M", "--console", "none"])
        .args(["--disk", "memory=1M", "--net", "user", "--kernel"])
        .arg(folder.join("kernel"))
        .arg("--run-folder")
        .arg(folder.join("run"))
        .args(flags)
        .env("PATH", format!("{}:{path}", folder.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cargo builds xtask before its tests");
    (child, network)
}

/// Says something to the VM once it is there. A supervisor that does not answer is killed, and with it a VM that starts.
fn ask(folder: &Path, supervisor: &mut Child, request: &Request) -> Reply {
    let deadline = Instant::now() + PATIENCE;
    let control = folder.join("run/vm/control");
    loop {
        if Instant::now() > deadline || supervisor.try_wait().expect("ours").is_some() {
            supervisor.kill().expect("ours");
            let mut said = String::new();
            let stderr = supervisor.stderr.as_mut().expect("piped");
            stderr.read_to_string(&mut said).expect("text");
            panic!("no answer: {said}");
        }
        let Ok(Some(mut socket)) = connect_to(&control) else {
            std::thread::yield_now();
            continue;
        };
        socket.send(request, &[]).expect("sent");
        if let Some(reply) = answer(&mut socket, deadline) {
            return reply;
        }
    }
}

fn answer(socket: &mut Socket, deadline: Instant) -> Option<Reply> {
    while Instant::now() < deadline {
        match socket.recv::<Reply>() {
            Ok(None) => std::thread::yield_now(),
            Ok(Some((reply, _))) => return Some(reply),
            Err(_) => return None,
        }
    }
    None
}

fn runs_and_says_so((feature, sentences): (&str, &[&str])) {
    let (Some(programs), Some(_)) = (tier::programs(), tier::kvm()) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (mut child, _network) = start(folder.path(), &programs, feature, &[]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(folder.path(), &mut child, &Request::Status) {
            Reply::Status { state, .. } if state == "running" => break,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
    }
    ask(folder.path(), &mut child, &Request::Stop);
    let output = child.wait_with_output().expect("waited for");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
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
    let folder = tempfile::tempdir().expect("a folder");
    let (child, _network) = start(folder.path(), &programs, feature, &["--require-full-sandbox"]);
    let output = child.wait_with_output().expect("waited for");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let begins = "bulkhead: a full sandbox was asked for, and this host lacks: ";
    assert!(said.starts_with(begins), "{said}");
    for sentence in sentences {
        assert_eq!(said.matches(sentence).count(), 1, "{said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
    let left = std::fs::read_dir(folder.path().join("run/vm"));
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
