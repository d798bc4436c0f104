#![forbid(unsafe_code)]
//! `bulkhead device`: what an operator does to one device of a running VM.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use vmbus::ipc::PeerFault;

use super::talk::{ask, connect_below, receive_within};
use crate::spec::Name;
use crate::supervisor::control::{DeviceLine, Reply, Request};
use crate::supervisor::keeper::is_orphaned;

#[derive(Subcommand)]
pub(super) enum DeviceCommand {
    /// List the devices of a running VM, their servers, and servers that wait to take over
    List {
        /// The VM's name
        vm: Name,
    },
    /// Start a server for a device that is held because its servers died again and again
    Resume {
        /// The VM's name
        vm: Name,
        /// The device, for example disk0
        device: String,
        /// The servers' program from now on [default: the one before]
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Replace the server of a device by a new one; the guest does not notice
    #[command(after_help = SWAP_HELP)]
    Swap {
        /// The VM's name
        vm: Name,
        /// The device, for example disk0
        device: String,
        /// The servers' program from now on [default: the one before, as it is on disk now]
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
        /// Seconds that the new server may take until it is prepared
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
        patience: u32,
    },
}

const SWAP_HELP: &str = "\
The new server is started, locks itself in and has the guest's memory before the old one is told to
stop.

If servers of another FILE die three times before one has run for ten seconds, the device goes back
to the file before, once, also if both have the same name. bulkhead events tells of it, and gave-up=
in bulkhead device list. Put a new file in place by a rename, as package managers do.

Exit status:
  0      the new server serves; the sentence says since when the guest's requests had waited
  1      it does not, and the sentence says why and who serves";

/// Limit: from the time that the new server may take to the end of the old one, its I/O included.
const HANDOVER: Duration = Duration::from_secs(60);

pub(super) fn main(command: DeviceCommand, base: &Path) -> Result<()> {
    match command {
        DeviceCommand::List { vm } => list(&vm, base),
        DeviceCommand::Resume { vm, device, binary } => resume(&vm, base, device, binary),
        DeviceCommand::Swap {
            vm,
            device,
            binary,
            patience,
        } => swap(&vm, base, device, binary, patience),
    }
}

fn list(vm: &Name, base: &Path) -> Result<()> {
    match ask(&mut connect_below(vm, base)?, &Request::Devices)? {
        Reply::Devices(lines) => {
            for line in lines {
                let note = if is_replaced(&line) { " replaced=yes" } else { "" };
                println!("{line}{note}");
            }
            Ok(())
        }
        other => bail!("{vm} answers {other:?}"),
    }
}

/// Whether another file, or none, has the name of the program by now that the device's server runs.
fn is_replaced(line: &DeviceLine) -> bool {
    let identity = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let Some(process) = line.process else {
        return false;
    };
    let runs = identity(Path::new(&format!("/proc/{process}/exe")));
    runs.is_some() && runs != identity(Path::new(&line.program))
}

fn resume(vm: &Name, base: &Path, device: String, binary: Option<PathBuf>) -> Result<()> {
    let program = binary.map(full_path).transpose()?;
    let request = Request::Resume { device, program };
    match ask(&mut connect_below(vm, base)?, &request)? {
        Reply::Done => Ok(()),
        Reply::Refused(why) => bail!("{why}"),
        other => bail!("{vm} answers {other:?}"),
    }
}

fn swap(vm: &Name, base: &Path, device: String, binary: Option<PathBuf>, patience_s: u32) -> Result<()> {
    let program = binary.map(full_path).transpose()?;
    let request = Request::Swap {
        device: device.clone(),
        program,
        patience_s,
    };
    let mut socket = connect_below(vm, base)?;
    socket.send(&request, &[])?;
    let limit = Duration::from_secs(patience_s.into()) + HANDOVER;
    match receive_within(&mut socket, limit) {
        Ok(Reply::Swapped {
            from,
            to,
            process,
            stall_us,
            mishap,
        }) => {
            let how = mishap.map_or(String::new(), |mishap| {
                format!(", although the old one did not stop as it should: {mishap}")
            });
            println!(
                "{device}: server {to} (process {process}) took over from server {from} within {stall_us} us{how}"
            );
            Ok(())
        }
        Ok(Reply::Refused(why)) => bail!("{why}"),
        Ok(other) => bail!("{vm} answers {other:?}"),
        Err(error) if matches!(error.downcast_ref(), Some(PeerFault::Eof)) => {
            bail!("{}", interrupted(vm, base, &device))
        }
        Err(error) => Err(error.context(format!(
            "whether {device} was swapped is not known (bulkhead events {vm} will show it)"
        ))),
    }
}

/// The supervisor has closed the connection without an answer. The VM may have another one already.
fn interrupted(vm: &Name, base: &Path, device: &str) -> String {
    if is_orphaned(&base.join(vm.as_str())).unwrap_or(false) {
        format!(
            "the supervisor of {vm} was killed, and the VM goes on: `bulkhead adopt {vm}` completes the swap of {device} or undoes it"
        )
    } else if connect_below(vm, base).is_ok() {
        format!("{vm} has another supervisor now: `bulkhead events {vm}` shows whether {device} was swapped")
    } else {
        format!("the VM ended before {device} was swapped")
    }
}

/// The supervisor has another working directory.
fn full_path(path: PathBuf) -> Result<PathBuf> {
    let shown = path.display();
    std::fs::canonicalize(&path).with_context(|| format!("cannot find the program {shown}"))
}
