//! Boots a kernel in `bulkhead-vcpu` alone, without device servers: for work on the vCPU process itself.
//!
//! ```text
//! boot VCPU_PROGRAM KERNEL [INITRD] [--memory MIB] [--vcpus N] [--cmdline TEXT] [--populate never|always]
//!      [--device] [--timeout SECONDS]
//! ```
//! Prints the guest's console, then what the process reported, with the time of each report since the start.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmbus::ipc::hello::PROTOCOL;
use vmbus::ipc::{OnReset, Populate, Socket, SupervisorToVcpu, VcpuConfig, VcpuToSupervisor, pair};
use vmbus::wire::Guid;
use vmm_core::supervisor::boot_plan::draw_up;

#[derive(Parser)]
struct Arguments {
    program: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    #[arg(long, default_value_t = 256)]
    memory: u64,
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    #[arg(long, default_value = "console=ttyS0 quiet panic=-1")]
    cmdline: String,
    #[arg(long)]
    populate: Option<String>,
    /// Offer a device that nobody serves.
    #[arg(long)]
    device: bool,
    /// Let the guest's reset end the VM.
    #[arg(long)]
    exit_on_reset: bool,
    #[arg(long, default_value = "info")]
    log: String,
    #[arg(long, default_value_t = 120)]
    timeout: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (ours, theirs) = pair()?;
    let began = Instant::now();
    let mut child = sandbox::spawn(sandbox::Spawn {
        program: arguments.program.clone(),
        args: Vec::new(),
        env: Vec::new(),
        fds: vec![(theirs, 3)],
        namespaces: sandbox::Namespaces::all(),
        stderr: None,
        identity: sandbox::Identity::own(0),
        jail: Some((sandbox::profile::vcpu(), sandbox::Options::default())),
    })?;
    let mut socket = Socket::new(ours);
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")?;
    let (boot, mut fds) = draw_up(
        File::open(&arguments.kernel)?,
        arguments.initrd.as_ref().map(File::open).transpose()?,
        &arguments.cmdline,
        arguments.vcpus,
        arguments.memory << 20,
    )?;
    fds.push(("kvm", kvm.into()));
    fds.push(("console-in", std::io::stdin().as_fd().try_clone_to_owned()?));
    fds.push(("console-out", std::io::stdout().as_fd().try_clone_to_owned()?));
    let config = VcpuConfig {
        vcpus: arguments.vcpus,
        memory_bytes: arguments.memory << 20,
        boot,
        log: arguments.log.clone(),
        populate: match arguments.populate.as_deref() {
            None => Populate::Auto,
            Some("never") => Populate::Never,
            Some("always") => Populate::Always,
            Some(other) => bail!("populate {other}?"),
        },
        on_reset: if arguments.exit_on_reset {
            OnReset::Exit
        } else {
            OnReset::Reset
        },
    };
    let names = fds.iter().map(|(name, _)| (*name).to_owned()).collect();
    let borrowed: Vec<_> = fds.iter().map(|(_, fd)| fd.as_fd()).collect();
    socket.send(
        &SupervisorToVcpu::Start {
            protocol: PROTOCOL,
            config,
            fds: names,
        },
        &borrowed,
    )?;
    serve(&arguments, &mut socket, began)?;
    drop(socket);
    println!("boot: {:?}", child.wait_at_most(Duration::from_secs(5))?);
    Ok(())
}

/// Answers the process until it has exited; asks it for its counters first.
fn serve(arguments: &Arguments, socket: &mut Socket, began: Instant) -> anyhow::Result<()> {
    let deadline = began + Duration::from_secs(arguments.timeout);
    let mut never_served = Vec::new();
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            println!("boot: timeout");
            socket.send(&SupervisorToVcpu::Inspect, &[])?;
            socket.send(&SupervisorToVcpu::Quit, &[])?;
        }
        let timeout = PollTimeout::try_from(rest.max(Duration::from_secs(1)))?;
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)?;
        while let Some((message, _)) = socket.recv::<VcpuToSupervisor>()? {
            let ms = began.elapsed().as_millis();
            match message {
                VcpuToSupervisor::Inspect { entries } => {
                    entries
                        .iter()
                        .for_each(|(path, value)| println!("boot: {path} = {value}"));
                }
                other => {
                    println!("boot: {ms} ms: {other:?}");
                    match other {
                        VcpuToSupervisor::Ready { .. } => {
                            if arguments.device {
                                never_served.push(offer(socket)?);
                            }
                            socket.send(&SupervisorToVcpu::Run, &[])?;
                        }
                        VcpuToSupervisor::GuestPowerOff | VcpuToSupervisor::GuestReset { .. } => {
                            socket.send(&SupervisorToVcpu::Inspect, &[]).ok();
                        }
                        VcpuToSupervisor::Exited { .. } | VcpuToSupervisor::Failed { .. } => return Ok(()),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Offers a SCSI controller, and returns the server's end of its socket.
fn offer(socket: &mut Socket) -> anyhow::Result<OwnedFd> {
    let (server, vcpu) = pair()?;
    let add = SupervisorToVcpu::AddDevice {
        device: 0,
        name: "nobody".to_owned(),
        interface: "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f".parse::<Guid>()?,
        instance: "11111111-2222-3333-4444-555555555555".parse::<Guid>()?,
        max_sub_channels: 0,
    };
    socket.send(&add, &[vcpu.as_fd()])?;
    Ok(server)
}
