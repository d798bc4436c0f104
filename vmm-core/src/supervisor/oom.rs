#![forbid(unsafe_code)]
//! Whether a process that was killed from outside was killed by the kernel for want of memory.
//!
//! The kernel tells nobody whom its OOM killer kills, but for its own log, which not everyone may read. It does count:
//! - `oom_kill` of the memory control group in which the victim is (`memory.events`, or `memory.oom_control` of the first
//!   version of control groups). All of a VM's processes are in the supervisor's group, perhaps with others;
//! - `oom_kill` in `/proc/vmstat`, all victims of the host.
//!
//! Both are counted before the signal is sent (Linux 6.1 mm/oom_kill.c `__oom_kill_process`), so that a death that is seen
//! is counted. A victim may take seconds to end. So the counters are looked at now and then, and those at a death are
//! compared with those of some time before: what can be said then is who was at work, and when.

use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sandbox::ExitCause;

/// What a victim may take to end.
const RECENT: Duration = Duration::from_secs(10);

/// Looks at the counters.
#[derive(Debug)]
pub struct OomWatch {
    /// The file of our control group that counts.
    group: Option<PathBuf>,
    /// The oldest is older than [`RECENT`], as soon as one is, and the only one that is.
    looks: VecDeque<Look>,
}

/// The counters; `None`: this host does not tell.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    group: Option<u64>,
    host: Option<u64>,
}

/// What the counters say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    place: Place,
    from: u64,
    to: u64,
    within: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Group,
    Host,
}

impl OomWatch {
    /// Begins with the counters as they are.
    pub fn new() -> Self {
        let mut watch = OomWatch {
            group: own_group().map(|(folder, file)| folder.join(file)),
            looks: VecDeque::new(),
        };
        watch.look();
        watch
    }

    /// Reads the counters, so that a later finding is not about times long ago.
    pub fn look(&mut self) {
        let look = self.read();
        self.add(look);
    }

    fn add(&mut self, look: Look) {
        self.looks.push_back(look);
        let is_old = |other: &Look| look.at.saturating_duration_since(other.at) >= RECENT;
        while self.looks.get(1).is_some_and(is_old) {
            self.looks.pop_front();
        }
    }

    fn read(&self) -> Look {
        Look {
            at: Instant::now(),
            group: self.group.as_deref().and_then(count_in),
            host: count_in(Path::new("/proc/vmstat")),
        }
    }

    /// What there is to say of somebody who was killed from outside just now.
    pub fn finding(&self) -> Option<Finding> {
        self.looks.front()?.compare(&self.read())
    }
}

impl Default for OomWatch {
    fn default() -> Self {
        OomWatch::new()
    }
}

impl Look {
    fn compare(&self, now: &Look) -> Option<Finding> {
        let within = now.at.saturating_duration_since(self.at);
        let find = |place, from: Option<u64>, to: Option<u64>| {
            let (from, to) = (from?, to?);
            Some(Finding {
                place,
                from,
                to,
                within,
            })
        };
        let group = find(Place::Group, self.group, now.group).filter(Finding::was_at_work);
        group.or_else(|| find(Place::Host, self.host, now.host))
    }
}

impl Finding {
    /// The OOM killer has killed somebody.
    pub fn was_at_work(&self) -> bool {
        self.from != self.to
    }

    /// The cause of a death, in more words if the OOM killer may be it; `blame`: we have killed the process.
    pub fn tell(finding: Option<Finding>, cause: ExitCause, blame: bool) -> String {
        let killed = matches!(cause, ExitCause::Signaled { signal, .. } if signal == libc::SIGKILL);
        let unknown = cause == ExitCause::Unknown;
        match finding {
            _ if blame || !(killed || unknown) => cause.to_string(),
            Some(finding) if finding.was_at_work() => format!("{cause}; {finding}"),
            Some(finding) if killed => format!("{cause} from outside; {finding}"),
            None if killed => format!("{cause} from outside, perhaps by the kernel for want of memory"),
            Some(_) | None => cause.to_string(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { from, to, .. } = self;
        let seconds = self.within.as_secs().saturating_add(1);
        if !self.was_at_work() {
            return write!(
                f,
                "not by the kernel for want of memory (oom_kill of the host is {to} as before)"
            );
        }
        let place = match self.place {
            Place::Group => "of the kernel was at work in this VM's control group",
            Place::Host => "of the host was at work",
        };
        write!(
            f,
            "the OOM killer {place} at that time (oom_kill went from {from} to {to} in the last {seconds} seconds)"
        )
    }
}

/// The number of the line `oom_kill N`.
fn count_in(file: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
    line.trim().parse().ok()
}

/// The folder of the memory control group of this process, and the name of its file that counts.
pub fn own_group() -> Option<(PathBuf, &'static str)> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    group_of(&groups, &mounts).filter(|(folder, file)| folder.join(file).exists())
}

/// From the texts of `/proc/self/cgroup` (cgroups(7)) and `/proc/self/mountinfo` (proc(5)).
fn group_of(groups: &str, mounts: &str) -> Option<(PathBuf, &'static str)> {
    // A host with both versions has memory in one of them: in the first one, if that lists it.
    let mut lines = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    let first = lines
        .clone()
        .find(|(controllers, _)| controllers.split(',').any(|name| name == "memory"));
    let (path, kind, controller, file) = match first {
        Some((_, path)) => (path, "cgroup", Some("memory"), "memory.oom_control"),
        None => (
            lines.find(|(controllers, _)| controllers.is_empty())?.1,
            "cgroup2",
            None,
            "memory.events",
        ),
    };
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let found = after.next()?;
        let options = after.nth(1).unwrap_or_default();
        let has_controller = controller.is_none_or(|name| options.split(',').any(|option| option == name));
        if found != kind || !has_controller {
            return None;
        }
        let mut fields = before.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        // A mount may show a part of the tree only.
        let path = Path::new(path);
        let below = path.strip_prefix(root).or_else(|_| path.strip_prefix("/")).ok()?;
        Some((Path::new(at).join(below), file))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILLED: ExitCause = ExitCause::Signaled {
        signal: 9,
        core: false,
    };

    fn watch(looks: &[(u64, u64, u64)]) -> OomWatch {
        let start = Instant::now();
        let mut watch = OomWatch {
            group: None,
            looks: VecDeque::new(),
        };
        for &(seconds, group, host) in looks {
            watch.add(Look {
                at: start + Duration::from_secs(seconds),
                group: Some(group),
                host: Some(host),
            });
        }
        watch
    }

    /// What the last of these looks finds.
    fn found(looks: &[(u64, u64, u64)]) -> Option<Finding> {
        let watch = watch(looks);
        watch.looks.front()?.compare(watch.looks.back()?)
    }

    fn told(looks: &[(u64, u64, u64)]) -> String {
        Finding::tell(found(looks), KILLED, false)
    }

    #[test]
    fn what_is_said_of_a_kill_is_what_is_known() {
        assert_eq!(
            told(&[(0, 3, 7), (2, 4, 8)]),
            "killed by SIGKILL; the OOM killer of the kernel was at work in this VM's control group at that time \
             (oom_kill went from 3 to 4 in the last 3 seconds)"
        );
        assert_eq!(
            told(&[(0, 3, 7), (2, 3, 8)]),
            "killed by SIGKILL; the OOM killer of the host was at work at that time (oom_kill went from 7 to 8 in the last \
             3 seconds)"
        );
        assert_eq!(
            told(&[(0, 3, 7), (2, 3, 7)]),
            "killed by SIGKILL from outside; not by the kernel for want of memory (oom_kill of the host is 7 as before)"
        );
        assert_eq!(
            Finding::tell(None, KILLED, false),
            "killed by SIGKILL from outside, perhaps by the kernel for want of memory"
        );
    }

    #[test]
    fn nothing_is_added_to_a_death_of_which_the_cause_is_known() {
        let finding = found(&[(0, 0, 0), (1, 1, 1)]);
        assert_eq!(Finding::tell(finding, KILLED, true), "killed by SIGKILL");
        let exited = Finding::tell(finding, ExitCause::Exited(1), false);
        assert_eq!(exited, ExitCause::Exited(1).to_string());
        assert!(Finding::tell(finding, ExitCause::Unknown, false).contains("OOM killer"));
    }

    #[test]
    fn only_what_happened_lately_counts_and_a_slow_death_is_lately() {
        let looks: Vec<_> = (0..20).map(|look| (2 * look, 0, u64::from(look >= 5))).collect();
        assert!(
            found(&looks[..9]).is_some_and(|finding| finding.was_at_work()),
            "6 seconds ago"
        );
        assert!(
            found(&looks).is_some_and(|finding| !finding.was_at_work()),
            "28 seconds ago"
        );
        assert!(watch(&looks).looks.len() <= 7);
    }

    #[test]
    fn a_control_group_is_found_in_either_version_and_in_a_part_of_the_tree() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let found = group_of("4:memory:/a/b\n1:cpu:/\n0::/\n", mounts);
        assert_eq!(
            found,
            Some(("/sys/fs/cgroup/memory/a/b".into(), "memory.oom_control"))
        );
        let second = "30 23 0:26 /user /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = group_of("0::/user/me/vm.service\n", second);
        assert_eq!(
            found,
            Some(("/sys/fs/cgroup/me/vm.service".into(), "memory.events"))
        );
        assert_eq!(group_of("0::/x\n", "1 1 0:1 / / rw - ext4 /dev/vda rw\n"), None);
        assert_eq!(group_of("", ""), None);
    }
}
