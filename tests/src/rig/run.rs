//! One run of a payload: QEMU's command line, its deadline, and what comes back.

#![forbid(unsafe_code)]

use super::archive::{Tree, read_cpio};
use super::packages::{Sysroot, remove_tree, wrapped};
use super::spec::{EXIT_RIG_AT_FAULT, RigError, RigFailed, RigOutcome, RigSpec};
use super::{Rig, lock::FileLock, progress};
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An emulated SVM machine.
const CPU_MODEL: &str = "max,+svm,+npt";

/// An oops ends the run, as a panic does: `-no-reboot` turns both into the end of QEMU.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nowatchdog random.trust_cpu=on";

/// What booting and collecting may take beyond the payload's own time, on a machine that is busy with other things.
const OVERHEAD: Duration = Duration::from_secs(150);

/// Limit: on a machine still busier than that, a run is better made later.
const MAX_BUSINESS: f64 = 6.0;

/// The disk for what a payload leaves in `/out`. Sparse. Limit: a newc archive's file ends at 4 GiB.
const OUTPUT_DISK_BYTES: u64 = 2 << 30;

/// Limit: no further attempt is begun after that, so that many of them do not take what a whole test run may take.
const NO_MORE_AFTER: Duration = Duration::from_secs(420);

/// How many rigs of one folder may run at the same time; more would only miss their deadlines.
pub const RUNS_AT_ONCE: usize = 1;

/// Our programs, where a spec's `binaries` folder has them.
const OUR_PROGRAMS: &[&str] = &[
    "bulkhead",
    "bulkhead-vcpu",
    "bulkhead-bus",
    "bulkhead-block",
    "bulkhead-net",
    "bulkhead-filter",
];

impl Rig {
    /// Runs a payload and hands back what it left, trying again when the emulator (and not the payload) fails.
    ///
    /// # Errors
    /// [`RigError::Failed`] after the last attempt, [`RigError::Setup`] if this host or the spec is at fault.
    pub fn run(&self, spec: &RigSpec) -> Result<RigOutcome, RigError> {
        let _unchanged = self.build_if_needed()?;
        let _place = self.wait_for_place()?;
        self.sweep()?;
        let allowed = if spec.interactive { 1 } else { spec.attempts.max(1) };
        let began = Instant::now();
        let mut attempt = 1;
        loop {
            match self.run_once(spec, attempt)? {
                Ok(outcome) => return Ok(outcome),
                Err(failed) if attempt < allowed && began.elapsed() < NO_MORE_AFTER => {
                    progress(&format!(
                        "attempt {attempt} of {allowed} failed: {}; trying again",
                        failed.reason
                    ));
                    attempt += 1;
                }
                Err(failed) => return Err(RigError::Failed(Box::new(failed))),
            }
        }
    }

    /// Removes what runs left that were killed, unless one is going on. Says nothing if it cannot: the next run does it.
    pub fn remove_left_runs() {
        let rig = Rig {
            dir: Rig::default_dir(),
        };
        if let Ok(Some(_place)) = FileLock::try_exclusive(&rig.dir.join("run.0.lock")) {
            rig.sweep().ok();
        }
    }

    /// The caller holds the place, so that whatever is in the folder belongs to nobody.
    fn sweep(&self) -> Result<()> {
        let runs = self.dir.join("runs");
        remove_tree(&runs)?;
        fs::create_dir_all(&runs).with_context(|| format!("cannot create {}", runs.display()))
    }

    fn wait_for_place(&self) -> Result<FileLock> {
        let path = |index: usize| self.dir.join(format!("run.{index}.lock"));
        for index in 0..RUNS_AT_ONCE {
            if let Some(place) = FileLock::try_exclusive(&path(index))? {
                return Ok(place);
            }
        }
        FileLock::exclusive(&path(0), "another run of the rig to end")
    }

    /// One attempt; the inner error is the rig's failure, the outer one this host's.
    fn run_once(&self, spec: &RigSpec, attempt: u32) -> Result<Result<RigOutcome, RigFailed>> {
        ensure!(!spec.command.is_empty(), "no command was given");
        let runs = self.dir.join("runs");
        let folder = tempfile::tempdir_in(&runs)?;
        let input = folder.path().join("in.cpio");
        let timeout = spec.timeout.mul_f64(business());
        archive_going_in(spec, timeout)?.write_cpio(BufWriter::new(File::create(&input)?))?;
        let output_disk = folder.path().join("out.raw");
        File::create(&output_disk)?.set_len(OUTPUT_DISK_BYTES)?;

        let begun = Instant::now();
        let deadline = (!spec.interactive).then(|| begun + timeout + OVERHEAD);
        let mut child = Guarded(
            self.qemu(spec, folder.path())?
                .spawn()
                .context("cannot start QEMU")?,
        );
        let (output, timed_out) = follow(&mut child.0, spec.echo, deadline)?;
        if timed_out {
            child.0.kill()?;
        }
        let ended = child.0.wait()?;
        let console = text_of(&folder.path().join("console.log"));
        let emulator = text_of(&folder.path().join("qemu.log"));
        ensure!(
            ended.code() != Some(1) || !console.is_empty(),
            "QEMU does not start: {}",
            emulator.trim()
        );
        let output = String::from_utf8_lossy(&output).into_owned();
        let mut files = read_cpio(BufReader::new(File::open(&output_disk)?)).unwrap_or_default();
        let status = files
            .remove(".rig/status")
            .map(|bytes| String::from_utf8_lossy(&bytes).trim().to_string());
        let kernel_log = files.remove(".rig/kernel.log").unwrap_or_default();
        let kernel_log = String::from_utf8_lossy(&kernel_log).into_owned();
        let files: BTreeMap<String, Vec<u8>> = files
            .into_iter()
            .filter_map(|(name, bytes)| name.strip_prefix("out/").map(|name| (name.to_string(), bytes)))
            .collect();

        let exit = status
            .as_deref()
            .and_then(|status| status.strip_prefix("exit ")?.parse().ok());
        let reason = match (exit, status.as_deref()) {
            (Some(EXIT_RIG_AT_FAULT), _) => "the payload says that the rig is at fault".to_string(),
            (Some(status), _) => {
                let took = begun.elapsed();
                return Ok(Ok(RigOutcome {
                    status,
                    output,
                    console,
                    kernel_log,
                    files,
                    attempts: attempt,
                    took,
                }));
            }
            (None, Some("deadline")) => {
                format!("the payload did not end within {} s", timeout.as_secs())
            }
            (None, _) if timed_out => {
                format!("the machine hung: no end after {} s", begun.elapsed().as_secs())
            }
            (None, _) => format!("the machine died ({ended}): {}", last_words(&console, &emulator)),
        };
        Ok(Err(RigFailed {
            reason,
            attempts: attempt,
            output,
            console,
            files,
        }))
    }

    fn qemu(&self, spec: &RigSpec, folder: &Path) -> Result<Command> {
        let sysroot = Sysroot::of(&self.dir);
        let emulator = sysroot.command("usr/bin/qemu-system-x86_64")?;
        // util-linux's setpriv: a test that is killed takes its machine with it.
        let mut qemu = wrapped(&["setpriv", "--pdeathsig", "KILL", "--"], &emulator);
        // QEMU keeps a snapshot's changes in a file here.
        qemu.env("TMPDIR", folder);
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            qemu.arg("-L").arg(sysroot.root.join(data));
        }
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-M",
            "q35",
        ]);
        let slow = fs::read_to_string(self.dir.join("outer/cpu-without")).unwrap_or_default();
        qemu.args(["-accel", "tcg", "-cpu"])
            .arg(format!("{CPU_MODEL}{}", slow.trim()));
        qemu.arg("-smp")
            .arg(spec.cpu_count.to_string())
            .arg("-m")
            .arg(spec.memory_mib.to_string());
        let outer = self.dir.join("outer");
        qemu.arg("-kernel")
            .arg(outer.join("vmlinuz"))
            .arg("-initrd")
            .arg(outer.join("initramfs.cpio"));
        qemu.arg("-append").arg(KERNEL_COMMAND_LINE);
        for (id, file, options) in [
            ("root", outer.join("root.ext4"), "snapshot=on"),
            ("in", folder.join("in.cpio"), "readonly=on"),
            ("out", folder.join("out.raw"), "snapshot=off"),
        ] {
            let file = file.display().to_string().replace(',', ",,");
            qemu.arg("-drive").arg(format!(
                "if=none,id={id},file={file},format=raw,cache=unsafe,{options}"
            ));
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive={id}"));
        }
        let console = folder
            .join("console.log")
            .display()
            .to_string()
            .replace(',', ",,");
        qemu.arg("-serial").arg(format!("file:{console}"));
        qemu.args(["-chardev", "stdio,id=payload,signal=off"]);
        qemu.args([
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=payload",
        ]);
        qemu.stderr(File::create(folder.join("qemu.log"))?);
        if spec.interactive {
            qemu.stdin(Stdio::inherit()).stdout(Stdio::inherit());
        } else {
            qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        }
        Ok(qemu)
    }
}

/// The payload's files, the command, and how to treat it.
fn archive_going_in(spec: &RigSpec, timeout: Duration) -> Result<Tree> {
    let mut tree = Tree::new();
    if let Some(folder) = &spec.binaries {
        let mut found = 0;
        for name in OUR_PROGRAMS {
            let path = folder.join(name);
            if path.exists() {
                tree.file(&format!("usr/bin/{name}"), 0o755, path);
                found += 1;
            }
        }
        ensure!(found > 0, "{} holds none of our programs", folder.display());
    }
    for (path, source) in &spec.files {
        let inside = path
            .strip_prefix('/')
            .with_context(|| format!("{path} is no absolute path in the rig"))?;
        ensure!(
            !inside.is_empty() && !inside.ends_with('/'),
            "{path} names no file"
        );
        tree.file(inside, 0o755, source.clone());
    }
    let command: Vec<String> = spec.command.iter().map(|word| quoted(word)).collect();
    tree.file(
        ".rig/command",
        0o755,
        format!("exec {}\n", command.join(" ")).as_str(),
    );
    let settings = format!(
        "RIG_TIMEOUT_S={}\nRIG_SHMEM_THP={}\nRIG_INTERACTIVE={}\n",
        timeout.as_secs(),
        u8::from(spec.shmem_thp),
        u8::from(spec.interactive)
    );
    tree.file(".rig/settings", 0o644, settings.as_str());
    Ok(tree)
}

/// How many times longer than on an idle machine things may take now: by the processes that wait for each processor. An
/// emulated machine that is starved of processors is slow, not at fault.
fn business() -> f64 {
    let load = fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .unwrap_or(0.0);
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    (load / processors as f64).clamp(1.0, MAX_BUSINESS)
}

/// A word as the shell reads it back unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Reads the payload's output until QEMU closes it; true if the deadline came first.
fn follow(child: &mut Child, echo: bool, deadline: Option<Instant>) -> Result<(Vec<u8>, bool)> {
    let mut output = Vec::new();
    let Some(mut pipe) = child.stdout.take() else {
        return Ok((output, false));
    };
    let mut buffer = [0; 16 << 10];
    loop {
        let left = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left.as_millis().min(60_000))?
            }
        };
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], left) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                return Ok((output, true));
            }
            Ok(0) => continue,
            Ok(_) => {}
        }
        let count = pipe.read(&mut buffer)?;
        if count == 0 {
            return Ok((output, false));
        }
        output.extend_from_slice(&buffer[..count]);
        if echo {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&buffer[..count])?;
            stdout.flush()?;
        }
    }
}

/// A child that is killed if nobody waited for it.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // Both can only fail if the child has just ended by itself.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn last_words(console: &str, emulator: &str) -> String {
    let panic = console
        .lines()
        .find(|line| line.contains("panic") || line.contains("RIP:") || line.contains("BUG:"));
    let last = |text: &str| {
        text.lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .map(str::to_string)
    };
    panic
        .map(str::to_string)
        .or_else(|| last(emulator))
        .or_else(|| last(console))
        .unwrap_or("it said nothing".into())
}

fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_keeps_every_character() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn a_file_must_be_given_an_absolute_path_in_the_rig() {
        assert!(archive_going_in(&RigSpec::new(["true"]).file("relative", "x"), Duration::ZERO).is_err());
        assert!(archive_going_in(&RigSpec::new(["true"]).file("/opt/", "x"), Duration::ZERO).is_err());
        assert!(
            archive_going_in(&RigSpec::new(["true"]).file("/opt/x", "x"), Duration::ZERO)
                .unwrap()
                .contains("opt/x")
        );
    }
}
