#![forbid(unsafe_code)]
//! What happened to a VM, as an operator wants to know it: one line of JSON for each event, in the VM's folder.
//!
//! | file | what |
//! | --- | --- |
//! | `events.jsonl` | the newest events, up to [`MAX_BYTES`] |
//! | `events.old.jsonl` | those before, once as many |
//!
//! Each entry has a number that counts on over rotations, supervisors and VMs of the same name, so that a reader knows
//! what it has missed.
//! One process writes: the supervisor that holds the folder's lock. Anyone who may enter the folder may read, also when
//! there is no supervisor. A line that is not an entry (the last one of a supervisor that was killed) is left out. What
//! a supervisor wrote just before it was killed may be written once more by the next one.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::clock::utc;

/// Limit: bytes of one file; some two thousand events.
const MAX_BYTES: u64 = 256 * 1024;

/// Limit: characters of a text from a child, which may say what it likes.
const MAX_TEXT: usize = 500;

pub const NEW: &str = "events.jsonl";
pub const OLD: &str = "events.old.jsonl";

/// An event, its number and its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub number: u64,
    /// UTC, RFC 3339.
    pub time: String,
    #[serde(flatten)]
    pub event: Event,
}

/// What happened. The names and fields are for scripts: they stay as they are, and more may come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The guest was let run.
    Started { supervisor: u32 },
    /// A new supervisor took the running VM over.
    Adopted { supervisor: u32 },
    /// A process ended that should not have.
    Death {
        device: String,
        generation: u32,
        cause: String,
        why: Option<String>,
        /// Number of the crash report, if there is one.
        report: Option<u64>,
    },
    /// A server is started for a device whose server is gone.
    Restart { device: String, generation: u32 },
    /// The successor serves; the stall is from the predecessor's end, as the supervisor saw it.
    Serving {
        device: String,
        generation: u32,
        stall_us: u64,
    },
    /// A planned replacement is done.
    Swap {
        device: String,
        from: u32,
        to: u32,
        stall_us: u64,
    },
    /// A planned replacement did not come to be; the old server goes on.
    SwapFailed { device: String, why: String },
    /// The servers of a program that the device was swapped to only died: it gets those of the one before.
    FellBack {
        device: String,
        from: String,
        to: String,
        why: String,
    },
    /// A standby is attached and waits.
    Standby { device: String, generation: u32 },
    /// A standby ended without having been needed.
    StandbyLost { device: String, why: String },
    /// A standby took over.
    Promoted { device: String, generation: u32 },
    /// The device gets no server until somebody resumes it.
    Held { device: String, why: String },
    /// Somebody did.
    Resumed { device: String },
    /// The program that carries a network interface's traffic ended and was started again.
    NetworkLost { device: String, cause: String },
    /// The guest reset itself.
    GuestReset { count: u32 },
    /// The guest's kernel reported a crash.
    GuestCrash { parameters: [u64; 5], text: String },
    /// The VM ends.
    Ending { why: String },
    /// One that this program does not know.
    #[serde(other)]
    Unknown,
}

/// The writing end.
#[derive(Debug)]
pub struct Chronicle {
    folder: PathBuf,
    file: Option<File>,
    bytes: u64,
    next: u64,
}

impl Chronicle {
    /// Goes on behind what is there.
    pub fn open(folder: &Path) -> Self {
        let next = read_after(folder, 0)
            .last()
            .map_or(1, |entry| entry.number.saturating_add(1));
        let mut chronicle = Chronicle {
            folder: folder.to_owned(),
            file: None,
            bytes: 0,
            next,
        };
        // Without a file (a full disk) there are still followers.
        chronicle.file = chronicle.append_to_new().ok();
        chronicle
    }

    /// Number of the next entry.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Writes an event down; returns its line, for the followers.
    pub fn add(&mut self, event: Event) -> String {
        let entry = Entry {
            number: self.next,
            time: utc(SystemTime::now()),
            event: event.cut(),
        };
        self.next = self.next.saturating_add(1);
        let line = serde_json::to_string(&entry).expect("an entry is numbers and text");
        if let Err(error) = self.write(&line) {
            tracing::warn!(%error, "an event is not kept");
        }
        line
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX).saturating_add(1);
        if self.bytes.saturating_add(length) > MAX_BYTES {
            std::fs::rename(self.folder.join(NEW), self.folder.join(OLD))?;
            self.file = None;
        }
        if self.file.is_none() {
            self.file = Some(self.append_to_new()?);
        }
        if let Some(file) = &mut self.file {
            // In one write: a supervisor that is killed leaves whole lines.
            file.write_all(format!("{line}\n").as_bytes())?;
            self.bytes = self.bytes.saturating_add(length);
        }
        Ok(())
    }

    fn append_to_new(&mut self) -> io::Result<File> {
        let path = self.folder.join(NEW);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        self.bytes = file.metadata()?.len();
        Ok(file)
    }
}

/// The entries of a VM's folder with higher numbers than `after`, the oldest first.
pub fn read_after(folder: &Path, after: u64) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for name in [OLD, NEW] {
        // Limit: what a chronicle writes; a longer file is not of its making.
        let Ok(text) = std::fs::read_to_string(folder.join(name)) else {
            continue;
        };
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Entry>(line).ok());
        entries.extend(lines.filter(|entry| entry.number > after));
    }
    entries
}

impl Event {
    /// With texts of bounded length.
    fn cut(mut self) -> Self {
        let texts = match &mut self {
            Event::Death { cause, why, .. } => vec![Some(cause), why.as_mut()],
            Event::SwapFailed { why, .. }
            | Event::StandbyLost { why, .. }
            | Event::Held { why, .. }
            | Event::FellBack { why, .. }
            | Event::Ending { why } => vec![Some(why)],
            Event::GuestCrash { text, .. } => vec![Some(text)],
            _ => Vec::new(),
        };
        for text in texts.into_iter().flatten() {
            if let Some((end, _)) = text.char_indices().nth(MAX_TEXT) {
                text.truncate(end);
            }
        }
        self
    }
}

/// One line for a person.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.time)?;
        match &self.event {
            Event::Started { supervisor } => write!(f, "the guest runs (supervisor {supervisor})"),
            Event::Adopted { supervisor } => write!(f, "supervisor {supervisor} took the VM over"),
            Event::Death {
                device,
                generation,
                cause,
                why,
                report,
            } => {
                write!(f, "{device} (server {generation}) {cause}")?;
                if let Some(why) = why {
                    write!(f, " ({why})")?;
                }
                match report {
                    Some(report) => write!(f, "; crash report {report}"),
                    None => Ok(()),
                }
            }
            Event::Restart { device, generation } => write!(f, "{device}: server {generation} is started"),
            Event::Serving {
                device,
                generation,
                stall_us,
            } => write!(
                f,
                "{device}: server {generation} serves after a stall of {}",
                milliseconds(*stall_us)
            ),
            Event::Swap {
                device,
                from,
                to,
                stall_us,
            } => write!(
                f,
                "{device}: server {from} was replaced by {to} with a stall of {}",
                milliseconds(*stall_us)
            ),
            Event::SwapFailed { device, why } => {
                write!(
                    f,
                    "{device}: the replacement failed, the old server goes on: {why}"
                )
            }
            Event::FellBack {
                device,
                from,
                to,
                why,
            } => write!(f, "{device} goes back from {from} to {to}: {why}"),
            Event::Standby { device, generation } => write!(f, "{device}: server {generation} stands by"),
            Event::StandbyLost { device, why } => write!(f, "{device}: the standby is lost: {why}"),
            Event::Promoted { device, generation } => {
                write!(f, "{device}: server {generation}, which stood by, takes over")
            }
            Event::Held { device, why } => write!(f, "{device} is held: {why}"),
            Event::Resumed { device } => write!(f, "{device} is resumed"),
            Event::NetworkLost { device, cause } => {
                write!(f, "{device}: passt {cause}; connections through it are lost")
            }
            Event::GuestReset { count } => write!(f, "the guest reset itself ({count} so far)"),
            Event::GuestCrash { parameters, text } => {
                let [p0, p1, p2, p3, p4] = parameters;
                write!(
                    f,
                    "the guest's kernel crashed: {p0:#x} {p1:#x} {p2:#x} {p3:#x} {p4:#x}"
                )?;
                match text.lines().next() {
                    Some(line) => write!(f, " {}", super::process::printable(line)),
                    None => Ok(()),
                }
            }
            Event::Ending { why } => write!(f, "the VM ends: {why}"),
            Event::Unknown => write!(f, "something that this version does not know (see --json)"),
        }
    }
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:03} ms", us / 1000, us % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reset(count: u32) -> Event {
        Event::GuestReset { count }
    }

    fn numbers(entries: &[Entry]) -> Vec<u64> {
        entries.iter().map(|entry| entry.number).collect()
    }

    #[test]
    fn a_later_supervisor_counts_on() {
        let folder = tempfile::tempdir().expect("a folder");
        for count in 0..3 {
            Chronicle::open(folder.path()).add(reset(count));
        }
        let entries = read_after(folder.path(), 1);
        assert_eq!(numbers(&entries), [2, 3]);
        assert_eq!(entries[1].event, reset(2));
    }

    #[test]
    fn the_newest_events_are_kept_and_the_files_stay_small() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut chronicle = Chronicle::open(folder.path());
        let mut last = 0;
        for round in 0..20_000 {
            let text = "x".repeat(2000);
            let parameters = [0; 5];
            chronicle.add(if round % 10 == 0 {
                Event::GuestCrash { parameters, text }
            } else {
                reset(round)
            });
            last += 1;
        }
        let entries = read_after(folder.path(), 0);
        let expected: Vec<u64> = (last - entries.len() as u64 + 1..=last).collect();
        assert_eq!(numbers(&entries), expected);
        assert!(entries.len() > 1000, "{}", entries.len());
        for name in [NEW, OLD] {
            let length = std::fs::metadata(folder.path().join(name)).expect("there").len();
            assert!(length <= MAX_BYTES, "{name} is {length} bytes long");
        }
    }

    #[test]
    fn a_line_that_is_none_is_left_out_and_a_newer_ones_kind_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = "{\"number\":7,\"time\":\"t\",\"event\":\"newer\",\"more\":1}\n{\"number\":8,\"ti";
        std::fs::write(folder.path().join(NEW), lines).expect("written");
        let entries = read_after(folder.path(), 0);
        assert_eq!(numbers(&entries), [7]);
        assert_eq!(entries[0].event, Event::Unknown);
    }

    #[test]
    fn scripts_and_people_are_told_the_same() {
        let entry = Entry {
            number: 3,
            time: "2026-11-27T08:30:01.250Z".to_owned(),
            event: Event::Serving {
                device: "disk0".to_owned(),
                generation: 2,
                stall_us: 12_345,
            },
        };
        let line = r#"{"number":3,"time":"2026-11-27T08:30:01.250Z","event":"serving","device":"disk0","generation":2,"stall_us":12345}"#;
        assert_eq!(serde_json::to_string(&entry).expect("JSON"), line);
        let said = "2026-11-27T08:30:01.250Z disk0: server 2 serves after a stall of 12.345 ms";
        assert_eq!(entry.to_string(), said);
    }
}
