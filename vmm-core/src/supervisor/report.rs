#![forbid(unsafe_code)]
//! What the supervisor tells a person, and what it tells a script: sentences and exit status.

use sandbox::ExitCause;

/// How the VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off, or reset itself where that ends the VM.
    PoweredOff,
    /// A person ended it: by the console's escape or by `bulkhead stop`.
    Stopped,
    /// A signal to the supervisor ended it.
    Signal(i32),
    /// The VM could not be started.
    Setup(String),
    /// The guest's kernel crashed.
    GuestCrashed,
    /// `bulkhead-vcpu` ended without saying why, or could not go on.
    VcpuDied(String),
    /// A device's servers died again and again, and the VM was to end then.
    DeviceLost(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::PoweredOff => f.write_str("the guest switched itself off"),
            Outcome::Stopped => f.write_str("somebody ended it"),
            Outcome::Signal(number) => write!(f, "signal {number} to the supervisor"),
            Outcome::Setup(why) | Outcome::VcpuDied(why) => f.write_str(why),
            Outcome::GuestCrashed => f.write_str("the guest's kernel crashed"),
            Outcome::DeviceLost(why) => f.write_str(why),
        }
    }
}

/// The exit statuses, for `--help`.
pub const EXIT_STATUS_HELP: &str = "\
Exit status:
  0      the guest switched itself off, or you ended the VM
  1      the VM could not be started
  2      the command line or the description of the VM is wrong
  3      the guest's kernel crashed
  4      the process that runs the guest's processors died
  5      the servers of a device died again and again, and --restart was or-end
  128+N  signal N ended the VM";

impl Outcome {
    /// See [`EXIT_STATUS_HELP`].
    pub fn exit_status(&self) -> u8 {
        match self {
            Outcome::PoweredOff | Outcome::Stopped => 0,
            Outcome::Setup(_) => 1,
            Outcome::GuestCrashed => 3,
            Outcome::VcpuDied(_) => 4,
            Outcome::DeviceLost(_) => 5,
            Outcome::Signal(number) => u8::try_from(*number).map_or(255, |number| number.saturating_add(128)),
        }
    }
}

/// Says something to the person at the terminal.
pub fn say(text: &str) {
    use std::io::Write;
    // Who has closed our standard error does not want to know.
    let _ = writeln!(std::io::stderr(), "bulkhead: {text}");
}

/// Passes on a line that a process logged.
pub fn relay(process: &str, line: &str) {
    use std::io::Write;
    // As above.
    let _ = writeln!(std::io::stderr(), "[{process}] {line}");
}

/// The report of a death: what, how, and what it said last.
pub fn death(
    name: &str,
    generation: u32,
    cause: ExitCause,
    why: Option<&str>,
    last_words: Option<&str>,
) -> String {
    let mut text = format!("{name} (server {generation}) {cause}");
    if let Some(why) = why {
        text.push_str(&format!(" ({why})"));
    }
    // The lines were shown as they came; the last one often says it all.
    if let Some(last) = last_words {
        text.push_str(&format!("; its last words: {last:?}"));
    }
    text
}

/// A crash of the guest: the five parameters of the crash MSRs, and the guest's own text.
pub fn guest_crash(parameters: &[u64; 5], text: Option<&str>) -> String {
    let [p0, p1, p2, p3, p4] = parameters;
    let mut said = format!("the guest's kernel crashed: {p0:#x} {p1:#x} {p2:#x} {p3:#x} {p4:#x}");
    if let Some(text) = text {
        for line in text.lines().take(40) {
            said.push_str("\n  | ");
            said.push_str(&super::process::printable(line));
        }
    }
    said
}

/// What the host lacks for a full sandbox, each once, of all the reports that came.
pub fn lacking<'a>(reports: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut lacking: Vec<String> = Vec::new();
    for report in reports {
        // A child's own word, and only a word: one that does not parse says nothing.
        let Ok(report) = serde_json::from_str::<sandbox::Report>(report) else {
            continue;
        };
        for sentence in report.missing {
            let sentence = super::process::printable(&sentence);
            if !lacking.contains(&sentence) && lacking.len() < 32 {
                lacking.push(sentence);
            }
        }
    }
    lacking
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_can_tell_the_outcomes_apart() {
        let statuses: Vec<u8> = [
            Outcome::PoweredOff,
            Outcome::Setup(String::new()),
            Outcome::GuestCrashed,
            Outcome::VcpuDied(String::new()),
            Outcome::Signal(15),
        ]
        .iter()
        .map(Outcome::exit_status)
        .collect();
        assert_eq!(statuses, [0, 1, 3, 4, 143]);
    }

    #[test]
    fn a_death_is_told_in_one_line() {
        let cause = ExitCause::Signaled {
            signal: 9,
            core: false,
        };
        assert_eq!(
            death("disk0", 3, cause, None, None),
            "disk0 (server 3) killed by SIGKILL"
        );
        let said = death("disk0", 1, ExitCause::Exited(1), Some("lied"), Some("oh\ndear"));
        assert_eq!(
            said,
            "disk0 (server 1) exited with status 1 (lied); its last words: \"oh\\ndear\""
        );
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_by_crashing() {
        let said = guest_crash(&[1, 2, 3, 4, 0xFF], Some("Kernel panic\n\x1b[2Jgone"));
        assert_eq!(
            said,
            "the guest's kernel crashed: 0x1 0x2 0x3 0x4 0xff\n  | Kernel panic\n  | \u{fffd}[2Jgone"
        );
    }
}
