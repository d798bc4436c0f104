#![forbid(unsafe_code)]
//! What a process really has, seen from outside, through `/proc`.
//!
//! A process's own [`crate::Report`] says what it believes it gave up. This asks the kernel instead. What the
//! caller may not see (the process is undumpable and belongs to somebody else) is `None`, never a guess.

use std::fmt;
use std::fs;
use std::io;

use nix::unistd::Pid;

use crate::namespaces::Namespaces;

/// The state of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Its name in `/proc/PID/comm`.
    pub name: String,
    /// Effective user and group, as seen from here.
    pub uid: u32,
    pub gid: u32,
    /// Number of supplementary groups.
    pub group_count: usize,
    pub capabilities: Capabilities,
    pub no_new_privs: bool,
    pub seccomp: SeccompMode,
    /// Filters in force, one on top of the other; `None` before Linux 5.9.
    pub seccomp_filter_count: Option<u32>,
    pub thread_count: u32,
    /// Namespaces that are not the caller's.
    pub namespaces: Option<Namespaces>,
    /// Entries of its root directory.
    pub root_entry_count: Option<usize>,
    /// Number and target of each open descriptor, in order.
    pub descriptors: Option<Vec<(u32, String)>>,
}

/// The five capability sets as bit masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
}

/// `man 5 proc_pid_status`, Seccomp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeccompMode {
    Disabled,
    Strict,
    Filter,
}

impl Capabilities {
    /// True if all five sets are empty.
    pub fn is_empty(self) -> bool {
        (self.inheritable | self.permitted | self.effective | self.bounding | self.ambient) == 0
    }
}

/// Looks at a process.
///
/// # Errors
/// The process is gone, `/proc` is not there, or is not as the kernel writes it (`InvalidData`).
pub fn audit(pid: Pid) -> io::Result<Audit> {
    let directory = format!("/proc/{pid}");
    let status = fs::read_to_string(format!("{directory}/status"))?;
    let status = Status::parse(&status).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{directory}/status is incomplete"),
        )
    })?;
    Ok(Audit {
        name: status.name.to_owned(),
        uid: status.uid,
        gid: status.gid,
        group_count: status.group_count,
        capabilities: status.capabilities,
        no_new_privs: status.no_new_privs,
        seccomp: status.seccomp,
        seccomp_filter_count: status.seccomp_filter_count,
        thread_count: status.thread_count,
        namespaces: differing_namespaces(&directory),
        root_entry_count: fs::read_dir(format!("{directory}/root/"))
            .map(Iterator::count)
            .ok(),
        descriptors: descriptors(&directory),
    })
}

/// The lines of `/proc/PID/status` that matter here.
struct Status<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    group_count: usize,
    capabilities: Capabilities,
    no_new_privs: bool,
    seccomp: SeccompMode,
    seccomp_filter_count: Option<u32>,
    thread_count: u32,
}

impl<'a> Status<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let mask = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
        // Real, effective, saved, file system.
        let effective = |name: &str| field(name)?.split_whitespace().nth(1)?.parse().ok();
        Some(Self {
            name: field("Name")?,
            uid: effective("Uid")?,
            gid: effective("Gid")?,
            group_count: field("Groups")?.split_whitespace().count(),
            capabilities: Capabilities {
                inheritable: mask("CapInh")?,
                permitted: mask("CapPrm")?,
                effective: mask("CapEff")?,
                bounding: mask("CapBnd")?,
                ambient: mask("CapAmb")?,
            },
            no_new_privs: field("NoNewPrivs")? == "1",
            // The line is absent in a kernel without seccomp.
            seccomp: match field("Seccomp") {
                Some("2") => SeccompMode::Filter,
                Some("1") => SeccompMode::Strict,
                _ => SeccompMode::Disabled,
            },
            seccomp_filter_count: field("Seccomp_filters").and_then(|count| count.parse().ok()),
            thread_count: field("Threads")?.parse().ok()?,
        })
    }
}

fn differing_namespaces(directory: &str) -> Option<Namespaces> {
    let mut differing = Namespaces::none();
    for (kind, name) in Namespaces::all().iter() {
        let theirs = fs::read_link(format!("{directory}/ns/{name}")).ok()?;
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).ok()?;
        if theirs != ours {
            differing = differing.with(kind);
        }
    }
    Some(differing)
}

fn descriptors(directory: &str) -> Option<Vec<(u32, String)>> {
    let mut list = Vec::new();
    for entry in fs::read_dir(format!("{directory}/fd")).ok()? {
        let entry = entry.ok()?;
        let number: u32 = entry.file_name().to_str()?.parse().ok()?;
        // One that was closed in between is not open.
        if let Ok(target) = fs::read_link(entry.path()) {
            list.push((number, target.to_string_lossy().into_owned()));
        }
    }
    list.sort_unstable();
    Some(list)
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: uid {}", self.name, self.uid)?;
        match self.capabilities.is_empty() {
            true => f.write_str(", no capabilities")?,
            false => write!(f, ", capabilities {:#x}", self.capabilities.effective)?,
        }
        f.write_str(if self.no_new_privs {
            ", no new privileges"
        } else {
            ", may gain privileges"
        })?;
        match self.seccomp {
            SeccompMode::Disabled => f.write_str(", no seccomp")?,
            SeccompMode::Strict => f.write_str(", seccomp strict")?,
            SeccompMode::Filter => {
                write!(
                    f,
                    ", seccomp {}",
                    plural(self.seccomp_filter_count.unwrap_or(1) as usize, "filter")
                )?;
            }
        }
        match self.namespaces {
            Some(namespaces) => write!(f, ", own namespaces: {namespaces}")?,
            None => f.write_str(", namespaces not visible from here")?,
        }
        match self.root_entry_count {
            Some(0) => f.write_str(", empty root")?,
            Some(count) => write!(f, ", root with {count} entries")?,
            None => f.write_str(", root not visible from here")?,
        }
        write!(f, ", {}", plural(self.thread_count as usize, "thread"))?;
        match &self.descriptors {
            Some(list) => write!(f, ", {}", plural(list.len(), "descriptor")),
            None => f.write_str(", descriptors not visible from here"),
        }
    }
}

fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_itself_in_its_own_namespaces_with_its_own_root() {
        let audit = audit(nix::unistd::getpid()).unwrap();
        assert_eq!(audit.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(audit.namespaces, Some(Namespaces::none()));
        assert!(audit.root_entry_count.is_some_and(|count| count > 0));
        assert!(
            audit
                .descriptors
                .is_some_and(|list| list.iter().any(|(number, _)| *number == 2))
        );
    }

    #[test]
    fn a_status_without_an_expected_line_is_refused() {
        assert!(Status::parse("Name:\tx\nUid:\t0 0 0 0\n").is_none());
        assert!(Status::parse("").is_none());
    }

    #[test]
    fn the_effective_ids_are_read_and_not_the_real_ones() {
        let text = "Name:\tx y\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t1 2 \nThreads:\t3\nCapInh:\t0\nCapPrm:\t0\n\
                    CapEff:\t0\nCapBnd:\t1ff\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";
        let status = Status::parse(text).unwrap();
        assert_eq!(
            (status.name, status.uid, status.gid, status.group_count),
            ("x y", 2, 6, 2)
        );
        assert_eq!(
            (status.seccomp, status.seccomp_filter_count),
            (SeccompMode::Filter, Some(2))
        );
        assert!(!status.capabilities.is_empty() && status.no_new_privs);
    }
}
