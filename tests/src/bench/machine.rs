//! One guest under one monitor, from its start to its power-off, with what is measured on the way.

#![forbid(unsafe_code)]

use super::processes::{Reading, family};
use crate::rig::GuestInitrd;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// 64 KiB blocks of each transfer to and from the disk: 256 MiB, which take the emulated machine more than a second.
const DISK_BLOCKS: u64 = 4096;
const DISK_BYTES: u64 = DISK_BLOCKS << 16;
/// Likewise for the network: 32 MiB.
const NET_BLOCKS: u64 = 512;
const NET_BYTES: u64 = NET_BLOCKS << 16;
const MEMORY_MIB: u64 = 256;
const HOST: &str = "192.168.214.1";
const GUEST: &str = "192.168.214.2";
const TAP: &str = "bench0";
const WORK: &str = "/root/bench";
/// The guest settles, then it is watched.
const SETTLE: Duration = Duration::from_secs(3);
const WATCH: Duration = Duration::from_secs(10);
/// Limit: each of a guest's steps takes a few seconds.
const SILENCE: Duration = Duration::from_secs(60);
/// Limit: for a monitor to clean up when it is told to end.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// A monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Bulkhead,
    /// The baseline.
    QemuMicrovm,
}

impl Kind {
    /// For people, and as a key.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bulkhead => "bulkhead",
            Kind::QemuMicrovm => "qemu-microvm",
        }
    }
}

/// What one run brought.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// From the start of the monitor's program to the first line of `/init`.
    pub boot_s: f64,
    /// Proportional set size of all its processes, without guest RAM.
    pub pss_mib: f64,
    /// Of the process that wakes most: voluntary context switches while the guest is idle, vCPU threads left out, because
    /// those sleep and wake as the guest's own timers will.
    pub wakeups_per_s: f64,
    /// `dd` with 64 KiB blocks and O_DIRECT in the guest.
    pub disk_read_mb_s: f64,
    /// Likewise.
    pub disk_write_mb_s: f64,
    /// TCP, as much in each direction, one after the other.
    pub net_mb_s: f64,
    /// For people: each process with its share of `pss_mib`.
    pub processes: Vec<String>,
}

/// What to measure beside the start, which is always measured. What is left out is 0 in the sample.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Memory and wake-ups of an idle guest.
    pub idle: bool,
    /// The disk's throughput.
    pub disk: bool,
    /// The network's throughput.
    pub net: bool,
}

/// Boots a guest and measures.
pub fn run_machine(kind: Kind, wanted: Wanted) -> Result<Sample> {
    fs::create_dir_all(WORK)?;
    let disk = Path::new(WORK).join("disk.raw");
    if !disk.exists() {
        // Written once, so that neither monitor pays for the file's allocation.
        let mut file = File::create(&disk)?;
        let block = vec![0xA5_u8; 1 << 20];
        for _ in 0..DISK_BYTES >> 20 {
            file.write_all(&block)?;
        }
        file.sync_all()?;
    }
    let sink = sink()?;
    let source = source()?;
    let initrd = Path::new(WORK).join("initrd.cpio");
    let script = include_str!("guest.sh")
        .replace("@GUEST@", GUEST)
        .replace("@HOST@", HOST)
        .replace("@SINK@", &sink.to_string())
        .replace("@SOURCE@", &source.to_string())
        .replace("@DISK_BLOCKS@", &DISK_BLOCKS.to_string())
        .replace("@NET_BLOCKS@", &NET_BLOCKS.to_string())
        .replace("@NET_BYTES@", &NET_BYTES.to_string());
    fs::copy("/opt/guest/initrd.cpio", &initrd)?;
    File::options()
        .append(true)
        .open(&initrd)?
        .write_all(&GuestInitrd::script_only(&script)?)?;
    make_tap()?;

    let mut command = match kind {
        Kind::Bulkhead => bulkhead(&disk, &initrd),
        Kind::QemuMicrovm => qemu(&disk, &initrd),
    };
    let started = Instant::now();
    let mut machine = Machine::start(&mut command)?;
    machine.wait_for("guest: init")?;
    let boot_s = started.elapsed().as_secs_f64();
    machine.wait_for("bench: idle")?;
    let mut sample = Sample {
        boot_s,
        ..Sample::default()
    };
    if wanted.idle {
        thread::sleep(SETTLE);
        let before = Reading::of(&family(machine.child.id())?, MEMORY_MIB)?;
        thread::sleep(WATCH);
        let after = Reading::of(&family(machine.child.id())?, MEMORY_MIB)?;
        sample.pss_mib = after.pss_mib;
        sample.wakeups_per_s = after.most_wakeups_since(&before) / WATCH.as_secs_f64();
        sample.processes = after.processes;
    }
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    if wanted.disk {
        sample.disk_write_mb_s = megabytes(DISK_BYTES) / machine.phase("disk-write")?;
        sample.disk_read_mb_s = megabytes(DISK_BYTES) / machine.phase("disk-read")?;
    }
    if wanted.net {
        let seconds = machine.phase("net-send")? + machine.phase("net-receive")?;
        sample.net_mb_s = 2.0 * megabytes(NET_BYTES) / seconds;
    }
    machine.input.write_all(b"end\n")?;
    machine.end()?;
    Ok(sample)
}

const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

fn bulkhead(disk: &Path, initrd: &Path) -> Command {
    let mut command = Command::new("/usr/bin/bulkhead");
    command
        .args([
            "run",
            "--name",
            "bench",
            "--vcpus",
            "1",
            "--on-reset",
            "exit",
            "--memory",
        ])
        .arg(format!("{MEMORY_MIB}M"))
        .args(["--kernel", "/opt/guest/vmlinux", "--cmdline", CMDLINE, "--initrd"])
        .arg(initrd)
        .arg("--disk")
        // Past the host's page cache, as the baseline does it.
        .arg(format!("path={},direct", disk.display()))
        .arg("--net")
        .arg(format!("tap={TAP}"));
    command
}

fn qemu(disk: &Path, initrd: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,isa-serial=on",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-smp",
            "1",
            "-m",
        ])
        .arg(format!("{MEMORY_MIB}"))
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-kernel", "/opt/guest/vmlinux", "-append", CMDLINE, "-initrd"])
        .arg(initrd)
        .arg("-drive")
        .arg(format!(
            "id=disk,file={},if=none,format=raw,cache=none,aio=io_uring",
            disk.display()
        ))
        .args(["-device", "virtio-blk-device,drive=disk"])
        .arg("-netdev")
        .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no"))
        .args(["-device", "virtio-net-device,netdev=net"])
        .args(["-name", "bench,debug-threads=on"]);
    command
}

/// A persistent TAP device with the host's address, which both monitors use.
fn make_tap() -> Result<()> {
    if Path::new("/sys/class/net").join(TAP).exists() {
        return Ok(());
    }
    let address = format!("{HOST}/24");
    for arguments in [
        ["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"].as_slice(),
        ["addr", "add", &address, "dev", TAP].as_slice(),
        ["link", "set", TAP, "up"].as_slice(),
    ] {
        let status = Command::new("ip")
            .args(arguments)
            .status()
            .context("cannot run ip")?;
        ensure!(status.success(), "ip {} failed", arguments.join(" "));
    }
    Ok(())
}

/// A port that swallows what it is sent.
fn sink() -> Result<u16> {
    serve(|mut stream| {
        std::io::copy(&mut stream, &mut std::io::sink())?;
        Ok(())
    })
}

/// A port that sends as many bytes as are measured.
fn source() -> Result<u16> {
    serve(|mut stream| {
        std::io::copy(&mut std::io::repeat(0x5A).take(NET_BYTES), &mut stream)?;
        Ok(())
    })
}

fn serve(answer: fn(TcpStream) -> std::io::Result<()>) -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(stream) {
                eprintln!("bench: a connection ended early: {error}");
            }
        }
    });
    Ok(port)
}

struct Machine {
    child: Child,
    input: std::process::ChildStdin,
    console: Receiver<String>,
    log: Vec<String>,
}

impl Machine {
    fn start(command: &mut Command) -> Result<Machine> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let input = child.stdin.take().context("no console input")?;
        let output = child.stdout.take().context("no console output")?;
        let (sender, console) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_string())
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Machine {
            child,
            input,
            console,
            log: Vec::new(),
        })
    }

    /// The rest of the first line that has `text` in it.
    fn wait_for(&mut self, text: &str) -> Result<String> {
        loop {
            match self.console.recv_timeout(SILENCE) {
                Ok(line) => {
                    ensure!(!line.contains("FAILED"), "the guest says: {line}");
                    if let Some(at) = line.find(text) {
                        return Ok(line[at + text.len()..].to_string());
                    }
                    self.log.push(line);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    bail!(
                        "the guest did not say {text:?}; it said:\n{}",
                        self.log.join("\n")
                    )
                }
            }
        }
    }

    /// Seconds that a phase took by the guest's clock.
    fn phase(&mut self, name: &str) -> Result<f64> {
        self.input.write_all(format!("{name}\n").as_bytes())?;
        let rest = self.wait_for(&format!("bench: {name} took "))?;
        let times: Vec<f64> = rest
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let [start, end] = times[..] else {
            bail!("the guest's clock is not readable in {rest:?}")
        };
        Ok((end - start).max(0.01))
    }

    fn end(mut self) -> Result<()> {
        ensure!(self.has_ended_within(SILENCE), "the guest did not power off");
        Ok(())
    }

    fn has_ended_within(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
            // One whose guest has broken down may not come to its clean-up.
            nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).ok();
            if !self.has_ended_within(CLEAN_UP) {
                self.child.kill().ok();
                self.child.wait().ok();
            }
        }
    }
}
