#![forbid(unsafe_code)]
//! A VM whose state is not of this program's version, because `bulkhead` was upgraded while it ran.
//!
//! Its keeper runs the program that it was started with, whatever has become of the file's name: that program adopts it.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, anyhow, bail};

use super::report::say;
use crate::spec::Name;

/// Set for a program that has been handed a VM: it does not hand it on.
const HANDED_ON: &str = "BULKHEAD_HANDED_ON";

/// Becomes the program of the keeper that this pidfd stands for, which adopts the VM. Returns only if that cannot be done:
/// why.
pub fn hand_on(name: &Name, base: &Path, keeper: impl AsFd, version: u32) -> Error {
    let program = match program_of(keeper) {
        Ok(_) if std::env::var_os(HANDED_ON).is_some() => {
            return anyhow!(
                "its state is of version {version}, which the program of its keeper does not know"
            );
        }
        Ok(program) => program,
        Err(error) => {
            return error.context("another version of bulkhead has started it, which is not to be found");
        }
    };
    say(&format!(
        "another version of bulkhead has started {name}, and adopts it now; this one takes it when it is started again"
    ));
    let error = command(&program, name, base).exec();
    anyhow!(error).context(format!(
        "another version of bulkhead has started it, and {} cannot be executed",
        program.display()
    ))
}

fn command(program: &Path, name: &Name, base: &Path) -> Command {
    let arguments: [OsString; 4] = [
        "adopt".into(),
        name.as_str().into(),
        "--run-folder".into(),
        base.into(),
    ];
    let mut command = Command::new(program);
    command.arg0("bulkhead").args(arguments).env(HANDED_ON, "1");
    command
}

/// Where the program of a process is to be had, by its pidfd.
fn program_of(process: impl AsFd) -> Result<PathBuf> {
    // `man 2 pidfd_open`: the line `Pid:` says -1 when it has ended, and 0 for one that is not seen from here.
    let info = format!("/proc/self/fdinfo/{}", process.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(info).context("cannot look at the keeper's pidfd")?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let number: i32 = number
        .context("the keeper's pidfd is none")?
        .trim()
        .parse()
        .context("the keeper's pidfd is none")?;
    if number <= 0 {
        bail!("the keeper has ended");
    }
    Ok(format!("/proc/{number}/exe").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::Pid;
    use rustix::process::{PidfdFlags, pidfd_open};

    #[test]
    fn the_program_of_a_process_is_found_by_its_pidfd_until_it_has_ended() {
        let mut child = Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("sleep can be started");
        let pid = Pid::from_raw(child.id() as i32);
        let raw = rustix::process::Pid::from_raw(pid.as_raw()).expect("it is not 0");
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).expect("it runs");
        let program = program_of(&pidfd).expect("it runs");
        assert_eq!(program, Path::new(&format!("/proc/{pid}/exe")));
        child.kill().expect("it runs");
        child.wait().expect("it is ours");
        let error = program_of(&pidfd).expect_err("it has ended");
        assert_eq!(error.to_string(), "the keeper has ended");
    }

    #[test]
    fn the_program_that_takes_a_vm_over_is_told_which_and_where() {
        let name: Name = "web".parse().expect("a name");
        let command = command(Path::new("/proc/7/exe"), &name, Path::new("/run/bulkhead"));
        let arguments: Vec<_> = command.get_args().collect();
        assert_eq!(arguments, ["adopt", "web", "--run-folder", "/run/bulkhead"]);
    }
}
