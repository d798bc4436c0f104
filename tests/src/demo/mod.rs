//! `cargo xtask demo`: a Debian guest with a disk and a network card, and the processes that run it.
//!
//! The demo runs on this host if `bulkhead doctor` says that a Linux guest boots here, else in the nested rig. Both ways run
//! [`here`]: in the rig it is this same program, started by the rig with `--here`.

#![forbid(unsafe_code)]

mod here;
mod page;

use crate::release;
use crate::rig::{FileSource, Rig, RigError, RigSpec};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// How long the guest may take in the rig. It takes about 20 s there on two idle cores.
const RIG_TIMEOUT: Duration = Duration::from_secs(150);

/// `cargo xtask demo …`
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Leave the guest running at the end, with a shell on this console (exit the shell to end it).
    #[arg(long)]
    keep: bool,
    /// Run on this machine even if `bulkhead doctor` advises against it; needs --programs and --images.
    #[arg(long, hide = true, requires_all = ["programs", "images"])]
    here: bool,
    /// Folder with our programs.
    #[arg(long, hide = true)]
    programs: Option<PathBuf>,
    /// Folder with the guest's kernel and initrd.
    #[arg(long, hide = true)]
    images: Option<PathBuf>,
}

/// Runs the demo; its last line begins with `demo: ok` if and only if it returns success.
pub fn main(arguments: DemoArguments) -> Result<ExitCode> {
    if let (true, Some(programs), Some(images)) = (arguments.here, &arguments.programs, &arguments.images) {
        // In the rig: whether the demo is done, the host side says.
        println!("demo: {}", here::run(programs, images, arguments.keep)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("demo: building bulkhead");
    let programs = release::build_programs()?;
    let rig = Rig::build()?;
    if linux_boots_here(&programs)? {
        println!("demo: this host runs Linux guests itself");
        let done = here::run(&programs, &rig.guest_folder(), arguments.keep)?;
        println!("demo: ok ({done})");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "demo: `bulkhead doctor` says that this host cannot run Linux guests itself, so they run in the nested rig: an \
         emulated machine, and slow; it starts in about 10 s"
    );
    let attempts = in_the_rig(&rig, &programs, arguments.keep)?;
    println!("demo: ok (in the nested rig, attempt {attempts})");
    Ok(ExitCode::SUCCESS)
}

fn linux_boots_here(programs: &Path) -> Result<bool> {
    let program = programs.join("bulkhead");
    let status = Command::new(&program)
        .arg("doctor")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    Ok(status.success())
}

/// Returns the number of the attempt that succeeded.
fn in_the_rig(rig: &Rig, programs: &Path, keep: bool) -> Result<u32> {
    let mut command = vec![
        "/usr/bin/xtask",
        "demo",
        "--here",
        "--programs",
        "/usr/bin",
        "--images",
        "/opt/guest",
    ];
    if keep {
        command.push("--keep");
    }
    let mut spec = RigSpec::new(command);
    spec.files.push((
        "/usr/bin/xtask".to_string(),
        FileSource::Path(std::env::current_exe().context("cannot find this program's own file")?),
    ));
    spec.binaries = Some(programs.to_path_buf());
    spec.timeout = RIG_TIMEOUT;
    spec.echo = true;
    spec.interactive = keep;
    match rig.run(&spec) {
        Ok(outcome) if outcome.status == 0 => Ok(outcome.attempts),
        Ok(outcome) => bail!("the demo failed with status {}", outcome.status),
        Err(RigError::Failed(failed)) => {
            bail!("{failed}; nothing is known about bulkhead, please run the demo again")
        }
        Err(error) => Err(error.into()),
    }
}
