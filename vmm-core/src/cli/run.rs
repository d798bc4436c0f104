#![forbid(unsafe_code)]
//! `bulkhead run`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::programs;
use crate::spec::{
    Console, DiskSpec, Draft, LogFilter, Name, NetSpec, OnCrash, OnResetWord, PopulateWord, Restart, Seconds,
    Size, Vcpus, VmSpec, read_file,
};
use crate::supervisor::report::{Outcome, say};
use crate::supervisor::{self, Options, folder, keeper};

/// Exit status of a wrong description; clap's for a wrong command line.
const WRONG_DESCRIPTION: u8 = 2;

#[derive(Args)]
pub(super) struct RunArgs {
    /// A TOML file that describes the VM; flags win over it, and their devices come after its
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of the VM; its MAC and SCSI addresses are made of it [default: vm-PROCESS]
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// The guest's kernel: a bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// The guest's memory, for example 512M or 4G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Virtual processors, 1 to 64 [default: 1]
    #[arg(long, value_name = "N")]
    vcpus: Option<Vcpus>,
    /// A disk: path=FILE or memory=SIZE; and readonly, serial=TEXT, cache=writeback|writethrough, direct,
    /// standby (a second server waits, and takes over at once if the first dies)
    #[arg(long = "disk", value_name = "KEY=VALUE,...")]
    disks: Vec<DiskSpec>,
    /// A network interface: tap=NAME, tap-fd=N or user (passt); and mac=ADDRESS, mtu=BYTES, queues=N,
    /// standby (as of a disk)
    #[arg(long = "net", value_name = "KEY=VALUE,...")]
    nets: Vec<NetSpec>,
    /// The guest's serial port: stdio, none or file=PATH [default: stdio]; Ctrl-A x leaves
    #[arg(long, value_name = "WHERE")]
    console: Option<Console>,
    /// What a reset by the guest does: reset or exit [default: reset]
    #[arg(long, value_name = "WHAT")]
    on_reset: Option<OnResetWord>,
    /// What a crash of the guest's kernel does: report or exit [default: report]
    #[arg(long, value_name = "WHAT")]
    on_crash: Option<OnCrash>,
    /// Successors of servers that die: careful (pauses, and a device whose servers only die is held), always, or
    /// or-end (careful, but the VM ends where the device would be held) [default: careful]
    #[arg(long, value_name = "WHEN")]
    restart: Option<Restart>,
    /// Seconds after which a server, or bulkhead-bus, that does not answer is taken for dead; 0: never [default: 5]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<Seconds>,
    /// Whether to fault in the guest's memory at the start: auto, never or always [default: auto]
    #[arg(long, value_name = "WHEN")]
    populate: Option<PopulateWord>,
    /// Fail if this host lacks anything that the sandboxes of the processes want
    #[arg(long)]
    require_full_sandbox: bool,
    /// What the processes log, for example info or info,device_block=debug [default: warn]
    #[arg(long, value_name = "FILTER")]
    log: Option<LogFilter>,
    /// If a VM of this name runs without a supervisor, adopt it instead (for service managers)
    #[arg(long)]
    adopt: bool,
    /// Where bulkhead-vcpu and the servers are [default: beside this program]
    #[arg(long, value_name = "FOLDER", hide = true)]
    programs: Option<PathBuf>,
    /// Where the folders of running VMs are
    #[arg(long, value_name = "FOLDER", hide = true)]
    run_folder: Option<PathBuf>,
}

pub(super) fn run(args: RunArgs) -> ExitCode {
    let found = args.programs.clone().map_or_else(programs, Ok);
    let base = args.run_folder.clone().unwrap_or_else(folder::base);
    let adopt = args.adopt;
    let spec = match describe(args) {
        Ok(spec) => spec,
        Err(sentence) => {
            say(&sentence);
            return ExitCode::from(WRONG_DESCRIPTION);
        }
    };
    let folder = base.join(spec.name.as_str());
    if adopt && keeper::is_orphaned(&folder).unwrap_or(false) {
        return finish(&supervisor::adopt::adopt(&spec.name, &base));
    }
    let outcome = match found {
        Ok(programs) => supervisor::run(&spec, &Options { programs, base }),
        Err(error) => Outcome::Setup(format!("cannot find out where this program is: {error}")),
    };
    finish(&outcome)
}

/// `bulkhead adopt`.
pub(super) fn adopt(vm: &Name, base: Option<PathBuf>) -> ExitCode {
    finish(&supervisor::adopt::adopt(vm, &base.unwrap_or_else(folder::base)))
}

/// Tells how a VM ended.
fn finish(outcome: &Outcome) -> ExitCode {
    match outcome {
        Outcome::Setup(why) => say(why),
        Outcome::VcpuDied(why) => say(&format!("the VM ended: {why}")),
        Outcome::DeviceLost(why) => say(&format!("the VM ended: {why}")),
        Outcome::GuestCrashed => say("the VM ended after its kernel had crashed"),
        Outcome::Signal(number) => say(&format!("ended by signal {number}")),
        Outcome::PoweredOff | Outcome::Stopped => {}
    }
    ExitCode::from(outcome.exit_status())
}

fn describe(args: RunArgs) -> Result<VmSpec, String> {
    let file = match &args.config {
        Some(path) => read_file(path).map_err(|error| error.to_string())?,
        None => Draft::default(),
    };
    let flags = Draft {
        name: args.name,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        memory: args.memory,
        vcpus: args.vcpus,
        disks: args.disks,
        nets: args.nets,
        console: args.console,
        on_reset: args.on_reset,
        on_crash: args.on_crash,
        restart: args.restart,
        patience: args.patience,
        populate: args.populate,
        require_full_sandbox: args.require_full_sandbox.then_some(true),
        log: args.log,
    };
    let default_name: Name = format!("vm-{}", std::process::id()).parse()?;
    file.overridden_by(flags)
        .complete(default_name)
        .map_err(|error| error.to_string())
}
