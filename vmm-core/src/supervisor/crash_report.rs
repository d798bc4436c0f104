#![forbid(unsafe_code)]
//! The report of a death: what is known about a process that ended and should not have, for a person who wants to know
//! why. Text files in the folder `crashes/` of the VM's folder, numbered, the newest [`MAX_REPORTS`].

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sandbox::ExitCause;
use vmbus::record::{self, EVENT_COUNT};

use super::clock::utc;
use super::oom::Finding;

/// In the VM's folder.
pub const FOLDER: &str = "crashes";

/// Limit: reports that are kept.
const MAX_REPORTS: usize = 32;

/// Limit: flight-recorder events in a report; the newest. The counts are of all that the recorder still holds.
const MAX_EVENTS: usize = 64;

/// What is known.
#[derive(Debug)]
pub struct CrashReport {
    /// For example `disk0`.
    pub name: String,
    /// Of a server; 0: it is none.
    pub generation: u32,
    pub process: i32,
    pub cause: ExitCause,
    /// Why we killed it, or what it said of itself.
    pub blame: Option<String>,
    pub uptime: Duration,
    /// Deaths of this device's servers in this VM, this one included.
    pub deaths: u32,
    /// The last lines that it logged.
    pub log: Vec<String>,
    /// What the counters of the OOM killer say.
    pub oom: Option<Finding>,
    /// Read when the report is stored: a successor does not wait for that.
    pub recorder: Option<OwnedFd>,
}

impl CrashReport {
    /// The cause in a few words.
    pub fn cause(&self) -> String {
        let refused = self.log.iter().rev().find_map(|line| refused_call(line));
        match (self.cause, refused) {
            (ExitCause::Signaled { signal, .. }, Some(number)) if signal == libc::SIGSYS => {
                format!("{} number {number}", self.cause)
            }
            (cause, _) => Finding::tell(self.oom, cause, self.blame.is_some()),
        }
    }

    fn text(&self) -> String {
        let server = match self.generation {
            0 => String::new(),
            generation => format!(" (server {generation})"),
        };
        let mut text = format!(
            "{} {}{server} {}",
            utc(SystemTime::now()),
            self.name,
            self.cause()
        );
        if let Some(blame) = &self.blame {
            text.push_str(&format!(" ({blame})"));
        }
        let uptime = self.uptime.as_secs_f64();
        text.push_str(&format!(
            "\n\nprocess {}, ran for {uptime:.3} seconds; deaths of {}: {}\n",
            self.process, self.name, self.deaths
        ));
        text.push_str("\nlast lines of its log:\n");
        for line in &self.log {
            text.push_str(&format!("  {line}\n"));
        }
        if self.log.is_empty() {
            text.push_str("  (none)\n");
        }
        let events = events(self.recorder.as_ref());
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for event in &events {
            let kind = event
                .kind
                .map_or("unknown".to_owned(), |kind| format!("{kind:?}"));
            *counts.entry(kind).or_default() += 1;
        }
        let counts: Vec<String> = counts
            .iter()
            .map(|(kind, count)| format!("{kind} {count}"))
            .collect();
        let all = events.last().map_or(0, |event| event.number.saturating_add(1));
        text.push_str(&format!(
            "\nflight recorder: {all} events; of the last {EVENT_COUNT}: {}\n",
            if counts.is_empty() {
                "none".to_owned()
            } else {
                counts.join(", ")
            }
        ));
        let skip = events.len().saturating_sub(MAX_EVENTS);
        for event in events.iter().skip(skip) {
            text.push_str(&format!("  {event}\n"));
        }
        text
    }

    /// Writes the report into the VM's folder under this number, and removes the oldest.
    pub fn store(&self, vm_folder: &Path, number: u64) -> io::Result<()> {
        let folder = vm_folder.join(FOLDER);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path_of(&folder, number))?;
        file.write_all(self.text().as_bytes())?;
        let numbers = numbers(&folder);
        let superfluous = numbers.len().saturating_sub(MAX_REPORTS);
        for oldest in numbers.iter().take(superfluous) {
            fs::remove_file(path_of(&folder, *oldest))?;
        }
        Ok(())
    }
}

/// The number for the next report of a VM.
pub fn next_number(vm_folder: &Path) -> u64 {
    let numbers = numbers(&vm_folder.join(FOLDER));
    numbers.last().map_or(1, |last| last.saturating_add(1))
}

/// What a dead process recorded; nothing if it has no recorder or that cannot be read.
fn events(recorder: Option<&OwnedFd>) -> Vec<record::Event> {
    recorder
        .and_then(|fd| record::read_last(fd.as_fd(), usize::MAX).ok())
        .unwrap_or_default()
}

/// The reports of a VM: number and first line, the oldest first.
pub fn list(vm_folder: &Path) -> Vec<(u64, String)> {
    let folder = vm_folder.join(FOLDER);
    let first_line = |number| {
        let text = fs::read_to_string(path_of(&folder, number)).ok()?;
        Some((number, text.lines().next()?.to_owned()))
    };
    numbers(&folder).into_iter().filter_map(first_line).collect()
}

/// One report.
pub fn read(vm_folder: &Path, number: u64) -> io::Result<String> {
    fs::read_to_string(path_of(&vm_folder.join(FOLDER), number))
}

fn path_of(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number}.txt"))
}

fn numbers(folder: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut numbers: Vec<u64> = entries
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_suffix(".txt")?
                .parse()
                .ok()
        })
        .collect();
    numbers.sort_unstable();
    numbers
}

/// The number of the system call, if the line is the one that a process logs when its filter refuses one. The process
/// may have made it up.
fn refused_call(line: &str) -> Option<u32> {
    let (_, number) = line.split_once(sandbox::REFUSED)?;
    number.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmbus::record::{EventKind, Recorder};

    fn report(cause: ExitCause) -> CrashReport {
        let fd = Recorder::new_memory().expect("a memfd");
        let recorder = Recorder::new(fd.as_fd()).expect("a recorder");
        for id in 0..1000 {
            recorder.record(EventKind::Take, 2, id);
        }
        CrashReport {
            name: "disk0".to_owned(),
            generation: 4,
            process: 77,
            cause,
            blame: None,
            uptime: Duration::from_millis(1500),
            deaths: 3,
            oom: None,
            log: vec!["bulkhead-block: seccomp refused system call 41".to_owned()],
            recorder: Some(fd),
        }
    }

    fn signaled(signal: i32) -> ExitCause {
        ExitCause::Signaled { signal, core: false }
    }

    #[test]
    fn a_forbidden_call_is_named_and_a_kill_from_outside_is_told_from_ours() {
        assert!(report(signaled(31)).cause().ends_with("(SIGSYS) number 41"));
        let mut killed = report(signaled(9));
        assert!(killed.cause().contains("from outside"));
        killed.blame = Some("does not answer".to_owned());
        assert_eq!(killed.cause(), "killed by SIGKILL");
    }

    #[test]
    fn a_report_says_what_the_process_did_last() {
        let folder = tempfile::tempdir().expect("a folder");
        report(signaled(6)).store(folder.path(), 1).expect("stored");
        let text = read(folder.path(), 1).expect("there");
        for part in [
            "disk0 (server 4) killed by SIGABRT\n",
            "process 77, ran for 1.500 seconds; deaths of disk0: 3\n",
            "  bulkhead-block: seccomp refused system call 41\n",
            "flight recorder: 1000 events; of the last 512: Take 512\n",
            "channel 2 Take 0x3e7\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert_eq!(
            text.lines().filter(|line| line.contains(" Take 0x")).count(),
            MAX_EVENTS
        );
    }

    #[test]
    fn the_newest_reports_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        for _ in 0..MAX_REPORTS + 5 {
            let number = next_number(folder.path());
            report(signaled(9)).store(folder.path(), number).expect("stored");
        }
        let listed = list(folder.path());
        assert_eq!(listed.len(), MAX_REPORTS);
        assert_eq!(listed[0].0, 6);
        assert!(listed[0].1.contains("disk0 (server 4)"));
    }
}
