#![forbid(unsafe_code)]
//! Real processes, locked in by each profile, as root and as a normal user.
//!
//! Each test runs the supervisor role of `sandbox-probe` (see `probe/main.rs`) and reads what it saw. Run by root, a test
//! runs it twice, as root and as user 65534; run by anybody else, once, and the rest is skipped aloud.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;
use tempfile::TempDir;

/// A user without privileges; Debian calls it nobody.
const NOBODY: u32 = 65534;
const PROGRAMS: [&str; 5] = ["vcpu", "bus", "block", "net", "keeper"];
const SIGSYS: &str = "Signaled { signal: 31, core: false }";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Starter {
    Root,
    Nobody,
    /// Whoever runs the tests, not being root.
    Caller,
}

/// What the supervisor printed: `key=value` lines.
#[derive(Debug)]
struct Seen(BTreeMap<String, String>);

impl Seen {
    #[track_caller]
    fn get(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("no {key} in {self:#?}"))
    }

    #[track_caller]
    fn is(&self, key: &str, value: &str) {
        assert_eq!(self.get(key), value, "{key} in {self:#?}");
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self(
            pairs
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        )
    }
}

/// The probe at a place that every user can reach; a checkout may be below a closed home directory.
fn probe() -> PathBuf {
    static COPY: OnceLock<TempDir> = OnceLock::new();
    let directory = COPY.get_or_init(|| {
        let directory = TempDir::new_in("/tmp").expect("a directory in /tmp");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let copy = directory.path().join("probe");
        fs::copy(env!("CARGO_BIN_EXE_sandbox-probe"), &copy).expect("the probe can be copied");
        fs::set_permissions(copy, fs::Permissions::from_mode(0o755)).expect("it is ours");
        directory
    });
    directory.path().join("probe")
}

fn command(starter: Starter, role: &str, words: &[&str]) -> Command {
    let mut command = Command::new(probe());
    command
        .arg(role)
        .args(words)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null());
    if starter == Starter::Nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

fn run(starter: Starter, words: &[&str]) -> Seen {
    let output = command(starter, "parent", words)
        .output()
        .expect("the probe runs");
    Seen::parse(&String::from_utf8_lossy(&output.stdout))
}

/// Past the harness's capture, in the form that `cargo xtask test` counts.
fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("\nSKIP {}: {reason}\n", thread.name().unwrap_or("a test"));
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("standard error is open");
}

/// Root tries both paths. A normal user can try its own only: half of a test is not a skipped test, so this says
/// so in other words.
fn starters() -> Vec<Starter> {
    if geteuid().is_root() {
        return vec![Starter::Root, Starter::Nobody];
    }
    println!("not run by root: only the path of a normal user is tried");
    vec![Starter::Caller]
}

/// What the kernel of this host lacks, by the crate's own probes.
fn host_is_full() -> bool {
    let lacking: Vec<_> = sandbox::host::probe_all()
        .into_iter()
        .filter(|probe| ["namespaces", "user namespace limit", "Landlock", "seccomp"].contains(&probe.name))
        .filter(|probe| probe.state != sandbox::host::State::Ok)
        .collect();
    if !lacking.is_empty() {
        skip(&format!("the host lacks {lacking:?}"));
    }
    lacking.is_empty()
}

#[test]
fn a_child_of_each_profile_has_nothing_but_its_descriptors() {
    if !host_is_full() {
        return;
    }
    for starter in starters() {
        for program in PROGRAMS {
            let seen = run(starter, &[program]);
            seen.is("missing", "");
            seen.is("audit.name", &format!("bulkhead-{program}"));
            seen.is("audit.no_capabilities", "true");
            seen.is("audit.no_new_privs", "true");
            seen.is("audit.seccomp", "Filter");
            seen.is("audit.namespaces", "user mnt pid net ipc uts cgroup");
            seen.is("audit.root_entries", "0");
            seen.is("audit.descriptors", "0 1 2 3 9");
            seen.is("cause", "Exited(0)");
        }
    }
}

#[test]
fn a_child_of_root_has_a_user_of_its_own_and_no_groups() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let seen = run(Starter::Root, &["block"]);
    let uid = seen.get("identity").to_owned();
    assert_ne!(uid, "0");
    seen.is("audit.uid", &uid);
    seen.is("audit.groups", "0");
}

#[test]
fn a_child_in_namespaces_that_outlive_it_has_no_fewer_of_its_own() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    for options in [&["--lasting"][..], &["--lasting", "--no-user-namespace"]] {
        let seen = run(Starter::Root, &[options, &["net"]].concat());
        let user = if options.len() == 1 { "user " } else { "" };
        seen.is("audit.namespaces", &format!("{user}mnt pid net ipc uts cgroup"));
        seen.is("audit.no_capabilities", "true");
        seen.is("missing", "");
        seen.is("cause", "Exited(0)");
    }
}

#[test]
fn a_child_of_a_normal_user_is_that_user_outside() {
    if !geteuid().is_root() {
        return skip("needs root to start as another user");
    }
    run(Starter::Nobody, &["block"]).is("audit.uid", &NOBODY.to_string());
}

#[test]
fn a_child_starts_with_clean_signals_a_session_of_its_own_and_the_given_environment() {
    for starter in starters() {
        let seen = run(starter, &["net", "standard-input"]);
        seen.is("born.blocked", "0000000000000000");
        // SIGPIPE, which Rust's runtime ignores before main.
        seen.is("born.ignored", "0000000000001000");
        seen.is("born.own_session", "true");
        seen.is("born.directory", "/");
        seen.is("born.environment", "ONLY");
        seen.is("deed.standard-input", "ok");
    }
}

#[test]
fn a_child_starts_with_the_limits_of_its_profile() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the kernel knows this limit");
    for starter in starters() {
        let files = hard.min(16384);
        let limits = format!("{files}/{files} 0/0 0/0 0/0 0/0 96/96");
        run(starter, &["vcpu"]).is("born.limits", &limits);
        run(starter, &["net"]).is("born.limits", "2048/2048 0/0 0/0 0/0 0/0 1/1");
        // Without a user namespace the kernel would count the processes of others.
        let seen = run(starter, &["--no-namespaces", "net"]);
        assert!(
            seen.get("born.limits").starts_with("2048/2048 0/0 0/0 0/0 0/0 "),
            "{seen:#?}"
        );
        assert_ne!(seen.get("born.limits"), "2048/2048 0/0 0/0 0/0 0/0 1/1");
    }
}

#[test]
fn what_a_program_needs_still_works() {
    for starter in starters() {
        for program in PROGRAMS {
            let seen = run(starter, &[program, "heap", "clock", "poll", "log"]);
            for deed in ["heap", "clock", "poll", "log"] {
                seen.is(&format!("deed.{deed}"), "ok");
            }
            seen.is("cause", "Exited(0)");
        }
    }
}

#[test]
fn each_forbidden_deed_kills_each_program() {
    const DEEDS: [&str; 18] = [
        "open",
        "create",
        "make-directory",
        "tcp",
        "socket",
        "map-executable",
        "make-executable",
        "become-root",
        "unshare-user",
        "setns",
        "clone-process",
        "execve",
        "ptrace",
        "mount",
        "io-uring-setup",
        "kill-parent",
        "tgkill-another",
        "ioctl-unknown",
    ];
    for starter in starters() {
        for program in PROGRAMS {
            for deed in DEEDS {
                let seen = run(starter, &[program, deed]);
                assert!(seen.0.contains_key("looked"), "{deed} by {program}: {seen:#?}");
                assert!(
                    !seen.0.contains_key(&format!("deed.{deed}")),
                    "{program} survived {deed}: {seen:#?}"
                );
                seen.is("cause", SIGSYS);
            }
        }
    }
}

#[test]
fn the_call_that_killed_is_named() {
    for starter in starters() {
        for program in PROGRAMS {
            let output = command(starter, "parent", &[program, "mount"])
                .output()
                .expect("the probe runs");
            let said = String::from_utf8_lossy(&output.stderr);
            let line = format!("bulkhead-{program}{}{}\n", sandbox::REFUSED, libc::SYS_mount);
            assert!(said.contains(&line), "{said:?}");
        }
    }
}

#[test]
fn a_call_by_its_x32_number_kills() {
    for starter in starters() {
        run(starter, &["vcpu", "x32-getpid"]).is("cause", SIGSYS);
    }
}

#[test]
fn only_the_vcpu_process_may_make_threads_after_the_lock_in() {
    for starter in starters() {
        let seen = run(starter, &["vcpu", "thread", "clone3", "eventfd", "thread"]);
        seen.is("deed.thread", "ok");
        seen.is("deed.eventfd", "ok");
        seen.is("deed.clone3", "ENOSYS");
        seen.is("cause", "Exited(0)");
        for program in ["bus", "block", "net", "keeper"] {
            run(starter, &[program, "thread"]).is("cause", SIGSYS);
        }
    }
}

#[test]
fn an_abort_shows_as_sigabrt_although_the_child_is_first_in_its_pid_namespace() {
    for starter in starters() {
        for options in [&["vcpu", "abort"][..], &["--no-namespaces", "vcpu", "abort"]] {
            let seen = run(starter, options);
            seen.is("cause", "Signaled { signal: 6, core: false }");
        }
    }
}

#[test]
fn behind_the_filter_stand_the_empty_root_the_namespaces_and_landlock() {
    if !host_is_full() {
        return;
    }
    for starter in starters() {
        let deeds = [
            "open",
            "create",
            "make-directory",
            "list-root",
            "tcp",
            "socket",
            "mount",
            "become-root",
            "unshare-user",
        ];
        let mut words = vec!["without-walls"];
        words.extend(deeds);
        let seen = run(starter, &words);
        // Landlock speaks first about directories and files that could exist.
        seen.is("deed.open", "ENOENT");
        assert!(
            ["EACCES", "EROFS"].contains(&seen.get("deed.create")),
            "{seen:#?}"
        );
        assert!(
            ["EACCES", "EROFS"].contains(&seen.get("deed.make-directory")),
            "{seen:#?}"
        );
        assert!(["EACCES"].contains(&seen.get("deed.list-root")), "{seen:#?}");
        assert!(
            ["EACCES", "ENETUNREACH"].contains(&seen.get("deed.tcp")),
            "{seen:#?}"
        );
        seen.is("deed.socket", "ENOENT");
        assert!(["EPERM", "EFAULT"].contains(&seen.get("deed.mount")), "{seen:#?}");
        assert!(
            ["EPERM", "EINVAL"].contains(&seen.get("deed.become-root")),
            "{seen:#?}"
        );
        // The limit of the user namespace.
        seen.is("deed.unshare-user", "ENOSPC");
        seen.is("cause", "Exited(0)");
    }
}

#[test]
fn without_a_user_namespace_root_still_leaves_root_behind() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let seen = run(Starter::Root, &["--no-user-namespace", "block", "heap"]);
    let uid = seen.get("identity").to_owned();
    seen.is("audit.uid", &uid);
    seen.is("audit.groups", "0");
    seen.is("audit.no_capabilities", "true");
    seen.is("audit.namespaces", "mnt pid net ipc uts cgroup");
    seen.is("audit.root_entries", "0");
    seen.is("missing", "");
    seen.is("cause", "Exited(0)");
}

#[test]
fn on_a_host_without_user_namespaces_a_normal_user_gets_the_walls_that_are_left() {
    let Some(starter) = starters().into_iter().find(|starter| *starter != Starter::Root) else {
        return;
    };
    let seen = run(
        starter,
        &["--host-without-user-namespaces", "block", "heap", "open"],
    );
    let missing = seen.get("missing");
    for sentence in [
        "no user namespace",
        "no PID namespace",
        "no net namespace",
        "root directory is not empty",
    ] {
        assert!(missing.contains(sentence), "{sentence} in {seen:#?}");
    }
    seen.is("audit.no_new_privs", "true");
    seen.is("audit.seccomp", "Filter");
    seen.is("deed.heap", "ok");
    seen.is("cause", SIGSYS);
}

#[test]
fn on_a_host_without_user_namespaces_root_makes_all_the_others() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let seen = run(
        Starter::Root,
        &["--host-without-user-namespaces", "block", "heap", "open"],
    );
    assert!(seen.get("missing").starts_with("no user namespace"), "{seen:#?}");
    seen.is("audit.namespaces", "mnt pid net ipc uts cgroup");
    seen.is("audit.root_entries", "0");
    seen.is("audit.no_capabilities", "true");
    seen.is("deed.heap", "ok");
    seen.is("cause", SIGSYS);
}

#[test]
fn a_lacking_wall_is_reported_and_refused_only_if_all_are_required() {
    for starter in starters() {
        let seen = run(starter, &["--no-namespaces", "net", "heap"]);
        assert!(
            seen.get("missing").contains("root directory is not empty"),
            "{seen:#?}"
        );
        seen.is("deed.heap", "ok");

        let seen = run(starter, &["--no-namespaces", "--require-full", "net", "heap"]);
        assert!(
            seen.get("refused").contains("root directory is not empty"),
            "{seen:#?}"
        );
        assert!(!seen.0.contains_key("deed.heap"));
        seen.is("cause", "Exited(4)");
    }
}

#[test]
fn running_on_as_root_is_reported() {
    if !geteuid().is_root() {
        return skip("needs root");
    }
    let seen = run(Starter::Root, &["--keep-identity", "net"]);
    assert!(seen.get("missing").contains("runs as root"), "{seen:#?}");
    seen.is("audit.no_capabilities", "true");
}

#[test]
fn only_root_can_give_a_child_another_user() {
    if !geteuid().is_root() {
        return run(Starter::Caller, &["--wrong-identity", "net"]).is("spawn", NOT_ROOT);
    }
    run(Starter::Nobody, &["--wrong-identity", "net"]).is("spawn", NOT_ROOT);
}

const NOT_ROOT: &str = "only root can start a program as another user";

#[test]
fn a_process_with_a_second_thread_is_not_locked_in() {
    for starter in starters() {
        let seen = run(starter, &["--second-thread", "vcpu"]);
        assert!(seen.get("refused").contains("2 threads"), "{seen:#?}");
        seen.is("cause", "Exited(4)");
    }
}

#[test]
fn a_process_started_by_hand_does_not_begin() {
    for starter in starters() {
        let output = command(starter, "child", &[""]).output().expect("the probe runs");
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("descriptor 3 is not the control socket"), "{said}");
    }
}

#[test]
fn a_child_outlives_its_supervisor() {
    for starter in starters() {
        for options in [&["net", "hang"][..], &["--no-namespaces", "net", "hang"]] {
            let mut supervisor = command(starter, "parent", options)
                .stdout(Stdio::piped())
                .spawn()
                .expect("the probe runs");
            let mut lines = BufReader::new(supervisor.stdout.take().expect("it is piped"));
            let mut pid = None;
            let mut line = String::new();
            while !line.starts_with("looked=") {
                line.clear();
                assert_ne!(
                    lines.read_line(&mut line).expect("text"),
                    0,
                    "the supervisor said too little"
                );
                if let Some(text) = line.strip_prefix("pid=") {
                    pid = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
                }
            }
            let pid = pid.expect("the supervisor prints the child's id first");
            let flags = rustix::process::PidfdFlags::empty();
            let child = rustix::process::pidfd_open(pid, flags).expect("the child hangs");
            supervisor.kill().expect("it runs");
            supervisor.wait().expect("it was killed");
            let ends_within = |milliseconds: u16| {
                let mut list = [PollFd::new(std::os::fd::AsFd::as_fd(&child), PollFlags::POLLIN)];
                poll(&mut list, PollTimeout::from(milliseconds))
            };
            // A signal that came with the supervisor's end would be pending by now.
            assert_eq!(ends_within(100), Ok(0), "the child dies with its supervisor");
            rustix::process::pidfd_send_signal(&child, rustix::process::Signal::KILL).expect("it runs");
            assert_eq!(ends_within(30_000), Ok(1), "the child has ended");
            // Nothing else holds the pipe.
            lines.read_to_string(&mut line).expect("text");
        }
    }
}
