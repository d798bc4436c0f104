#![forbid(unsafe_code)]
//! What this host can do for a VM: one probe per thing, each answered by trying it rather than by a version.
//!
//! For `bulkhead doctor`. How fast KVM is, and what it can do, is not asked here: that needs a VM.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::geteuid;
use serde::Serialize;

use crate::namespaces::Namespaces;
use crate::sys::probe;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    pub name: &'static str,
    pub state: State,
    /// What was found, one sentence without a full stop.
    pub detail: String,
    /// What to do about it; empty if nothing needs to be done.
    pub advice: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// A VM runs without it: slower, less protected, or without some device.
    Degraded,
    /// No VM runs without it.
    Missing,
}

/// Looks at everything, in the order in which a VM's start needs it.
pub fn probe_all() -> Vec<Probe> {
    vec![
        kvm(),
        tun(),
        passt(),
        namespaces(),
        nested_user_namespaces(),
        landlock(),
        seccomp(),
        io_uring(),
        memfd_seals(),
        shmem_huge_pages(),
        huge_pages(),
    ]
}

impl Probe {
    /// Nothing to complain about.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            detail: detail.into(),
            advice: String::new(),
        }
    }

    /// Something to complain about, hence with advice.
    pub fn not(
        name: &'static str,
        state: State,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name,
            state,
            detail: detail.into(),
            advice: advice.into(),
        }
    }
}

fn kvm() -> Probe {
    device(
        "/dev/kvm",
        "load kvm-intel or kvm-amd, and switch virtualization on in the firmware or in the outer hypervisor; without it, run in the nested rig",
        "add yourself to the group kvm (then log in again)",
    )
}

fn tun() -> Probe {
    let probe = device(
        "/dev/net/tun",
        "load the module tun, or use --net user",
        "use --net user, or have root make the tap and hand it over with --net tap-fd",
    );
    // Only --net tap needs it.
    if probe.state == State::Missing {
        Probe {
            state: State::Degraded,
            ..probe
        }
    } else {
        probe
    }
}

fn device(path: &'static str, if_absent: &str, if_refused: &str) -> Probe {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Probe::ok(path, "can be opened"),
        Err(error) => {
            let advice = if error.kind() == io::ErrorKind::PermissionDenied {
                if_refused
            } else {
                if_absent
            };
            Probe::not(path, State::Missing, format!("cannot be opened: {error}"), advice)
        }
    }
}

/// Debian's passt serves `--net user`.
fn passt() -> Probe {
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|directory| directory.join("passt"))
            .find(|file| is_executable(file))
    });
    match found {
        Some(file) => Probe::ok("passt", format!("found as {}", file.display())),
        None => Probe::not(
            "passt",
            State::Degraded,
            "not in PATH: --net user cannot work",
            "apt install passt",
        ),
    }
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The same set that a child gets; see [`crate::spawn`].
fn namespaces() -> Probe {
    const NAME: &str = "namespaces";
    let all = Namespaces::all();
    match probe::can_make_namespaces(all.clone_flags()) {
        Ok(()) => Probe::ok(NAME, format!("{all} can be made together")),
        Err(error) if geteuid().is_root() => {
            let rest = all.without(Namespaces::USER);
            match probe::can_make_namespaces(rest.clone_flags()) {
                Ok(()) => Probe::not(
                    NAME,
                    State::Degraded,
                    format!(
                        "no user namespace ({error}); {rest} can be made, children change their user instead"
                    ),
                    USER_NAMESPACE_ADVICE,
                ),
                Err(error) => Probe::not(
                    NAME,
                    State::Degraded,
                    format!("cannot be made ({error}): children share the host's"),
                    "give this container CAP_SYS_ADMIN, or allow clone and unshare in its seccomp profile",
                ),
            }
        }
        Err(error) => Probe::not(
            NAME,
            State::Degraded,
            format!("no user namespace ({error}), hence no other: children share the host's"),
            USER_NAMESPACE_ADVICE,
        ),
    }
}

const USER_NAMESPACE_ADVICE: &str = "sysctl user.max_user_namespaces=15000; where they exist also \
    kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0";

/// The second lock of [`crate::namespaces`] is a sysctl of the child's own namespace.
fn nested_user_namespaces() -> Probe {
    const NAME: &str = "user namespace limit";
    let path = "/proc/sys/user/max_user_namespaces";
    match fs::read_to_string(path) {
        Ok(text) => match text.trim().parse::<u64>() {
            Ok(0) => Probe::not(
                NAME,
                State::Degraded,
                format!("{path} is 0"),
                USER_NAMESPACE_ADVICE,
            ),
            Ok(limit) => Probe::ok(NAME, format!("{limit} allowed")),
            Err(_) => Probe::not(
                NAME,
                State::Degraded,
                format!("{path} is {:?}", text.trim()),
                "mount /proc",
            ),
        },
        Err(error) => Probe::not(NAME, State::Degraded, format!("{path}: {error}"), "mount /proc"),
    }
}

fn landlock() -> Probe {
    const NAME: &str = "Landlock";
    const ADVICE: &str = "start the kernel with landlock in its lsm= list (Linux 5.13 and later)";
    match probe::landlock_abi() {
        Ok(abi) => Probe::ok(NAME, format!("ABI {abi}")),
        Err(error) => Probe::not(NAME, State::Degraded, format!("not available: {error}"), ADVICE),
    }
}

fn seccomp() -> Probe {
    const NAME: &str = "seccomp";
    // linux/seccomp.h SECCOMP_RET_*
    const NEEDED: [(&str, u32); 4] = [
        ("kill_process", 0x8000_0000),
        ("trap", 0x0003_0000),
        ("errno", 0x0005_0000),
        ("allow", 0x7fff_0000),
    ];
    let lacking: Vec<&str> = NEEDED
        .into_iter()
        .filter(|(_, action)| !probe::seccomp_can(*action))
        .map(|(name, _)| name)
        .collect();
    if lacking.is_empty() {
        return Probe::ok(NAME, "filters can allow, refuse and kill");
    }
    let detail = format!("the kernel does not know the actions {}", lacking.join(", "));
    Probe::not(
        NAME,
        State::Degraded,
        detail,
        "use a kernel with CONFIG_SECCOMP_FILTER (Linux 4.14 and later)",
    )
}

fn io_uring() -> Probe {
    const NAME: &str = "io_uring";
    match probe::can_make_io_uring() {
        Ok(()) => Probe::ok(NAME, "can be set up"),
        Err(error) => Probe::not(
            NAME,
            State::Degraded,
            format!("cannot be set up: {error}; no disk can be served"),
            "sysctl kernel.io_uring_disabled=0; in a container, allow io_uring_setup in its seccomp profile",
        ),
    }
}

fn memfd_seals() -> Probe {
    const NAME: &str = "sealed memfds";
    let sealed =
        memfd_create("probe", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).and_then(|memfd| {
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))
        });
    match sealed {
        Ok(_) => Probe::ok(NAME, "can be made"),
        Err(errno) => Probe::not(
            NAME,
            State::Missing,
            format!("cannot be made: {}; guest memory needs them", errno.desc()),
            "use a kernel with CONFIG_MEMFD_CREATE",
        ),
    }
}

/// Guest RAM is a memfd, hence shmem (Documentation/admin-guide/mm/transhuge.rst).
fn shmem_huge_pages() -> Probe {
    const NAME: &str = "huge pages for shared memory";
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    const ADVICE: &str = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match fs::read_to_string(PATH) {
        Ok(text) => match chosen_word(&text) {
            Some(word @ ("always" | "within_size" | "advise" | "force")) => {
                Probe::ok(NAME, format!("shmem_enabled is {word}"))
            }
            other => Probe::not(
                NAME,
                State::Degraded,
                format!(
                    "shmem_enabled is {}: guest memory is faulted in by 4 KiB pages",
                    other.unwrap_or("unknown")
                ),
                ADVICE,
            ),
        },
        Err(error) => {
            let advice = "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE";
            Probe::not(NAME, State::Degraded, format!("{PATH}: {error}"), advice)
        }
    }
}

/// The bracketed word of a sysfs choice: `always [advise] never`.
fn chosen_word(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

fn huge_pages() -> Probe {
    const NAME: &str = "reserved 2 MiB pages";
    const DIRECTORY: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let read = |file: &str| {
        fs::read_to_string(format!("{DIRECTORY}/{file}"))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    match (read("nr_hugepages"), read("free_hugepages")) {
        (Some(0), Some(_)) => Probe::ok(NAME, "none reserved; not needed, transparent ones serve as well"),
        (Some(all), Some(free)) => Probe::ok(NAME, format!("{free} of {all} free")),
        _ => Probe::ok(NAME, "this kernel has none; not needed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(
            chosen_word("always within_size advise [never] deny force\n"),
            Some("never")
        );
        assert_eq!(chosen_word("always madvise\n"), None);
        assert_eq!(chosen_word("]["), None);
    }

    #[test]
    fn every_probe_says_what_it_found_and_advises_only_when_something_is_wrong() {
        let probes = probe_all();
        assert_eq!(probes.len(), 11);
        for probe in probes {
            assert!(!probe.detail.is_empty(), "{}", probe.name);
            assert_eq!(
                probe.advice.is_empty(),
                probe.state == State::Ok,
                "{}: {}",
                probe.name,
                probe.advice
            );
        }
    }
}
