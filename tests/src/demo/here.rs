//! The demo itself, on a machine whose KVM runs Linux guests.

#![forbid(unsafe_code)]

use super::page;
use crate::rig::GuestInitrd;
use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GUEST_SCRIPT: &str = include_str!("guest.sh");
const DISK_MIB: u64 = 256;
/// 64 KiB blocks that the guest writes: 16 MiB.
const DATA_BLOCKS: u32 = 256;
const TAP: &str = "bulkhead-demo";
const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 213, 1);
const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 213, 2);
/// With passt, a guest reaches its host's own loopback address at its gateway.
const DHCP: &str = r#"cat >/tmp/dhcp <<'X'
[ "$1" = bound ] && { ip addr add $ip/$mask dev $interface; ip route add default via $router; echo $router >/tmp/gateway; }
X
chmod +x /tmp/dhcp; udhcpc -q -n -i $link -s /tmp/dhcp >/dev/null 2>&1 || fail "no address by DHCP""#;
/// No guest is silent for longer than this.
const SILENCE: Duration = Duration::from_secs(100);

/// Runs the demo with the programs and guest images of these folders; says what was done.
pub fn run(programs: &Path, images: &Path, keep: bool) -> Result<String> {
    let started = Instant::now();
    let folder = TempDir::with_prefix("bulkhead-demo-").context("cannot make a temporary folder")?;
    let token = uuid::Uuid::new_v4().to_string();
    let network = Network::choose(&token)?;
    let disk = folder.path().join("disk.raw");
    File::create(&disk)?.set_len(DISK_MIB << 20)?;
    let initrd = folder.path().join("initrd.cpio");
    write_initrd(images, &initrd, &network.guest_script(keep))?;

    let mut command = Command::new(programs.join("bulkhead"));
    command
        .args(["run", "--name", "demo", "--memory", "256M", "--vcpus", "1"])
        .args(["--cmdline", "console=ttyS0 quiet panic=-1"])
        .arg("--kernel")
        .arg(images.join("vmlinux"))
        .arg("--initrd")
        .arg(&initrd)
        .arg("--disk")
        .arg(format!("path={}", disk.display()))
        .args(["--net", network.flag]);
    println!("demo: {command:?}");
    let machine = Machine::start(command, keep)?;
    if network.tap {
        give_tap_its_address()?;
    }
    let report = if keep {
        machine.wait_kept(&network)
    } else {
        machine.watch(&token)
    }?;
    check_file_system(&disk)?;
    println!("demo: the guest ran on these processes:");
    for line in &report.processes {
        println!("  {line}");
    }
    Ok(format!(
        "the guest formatted, wrote and verified its disk, fetched the host's page, powered off; {:.1} s",
        started.elapsed().as_secs_f64()
    ))
}

/// How guest and host meet.
struct Network {
    tap: bool,
    flag: &'static str,
    page: page::Page,
}

impl Network {
    /// A TAP device for root, who can make one; passt for everybody else.
    fn choose(token: &str) -> Result<Network> {
        let tap = geteuid().is_root();
        let host = if tap {
            Ipv4Addr::UNSPECIFIED
        } else {
            Ipv4Addr::LOCALHOST
        };
        let flag = if tap { "tap=bulkhead-demo" } else { "user" };
        let page = page::serve(IpAddr::V4(host), token.to_string())?;
        Ok(Network { tap, flag, page })
    }

    fn guest_script(&self, keep: bool) -> String {
        let port = self.page.address.port();
        let (address, url) = if self.tap {
            (
                format!("ip addr add {GUEST_ADDRESS}/24 dev $link"),
                format!("http://{HOST_ADDRESS}:{port}/"),
            )
        } else {
            (DHCP.to_string(), format!("http://$(cat /tmp/gateway):{port}/"))
        };
        let end = if keep {
            "echo 'demo: here is a shell in the guest; its end, or Ctrl-A x, ends the guest'; setsid cttyhack sh; exit 0"
        } else {
            // The host looks at the processes before it answers.
            "read -r go; exit 0"
        };
        GUEST_SCRIPT
            .replace("@BLOCKS@", &DATA_BLOCKS.to_string())
            .replace("@ADDRESS@", &address)
            .replace("@URL@", &url)
            .replace("@END@", end)
    }
}

fn write_initrd(images: &Path, target: &PathBuf, script: &str) -> Result<()> {
    let base = images.join("initrd.cpio");
    fs::copy(&base, target).with_context(|| format!("cannot copy {}", base.display()))?;
    let mut file = File::options().append(true).open(target)?;
    file.write_all(&GuestInitrd::script_only(script)?)?;
    Ok(())
}

fn give_tap_its_address() -> Result<()> {
    let device = Path::new("/sys/class/net").join(TAP);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !device.exists() {
        ensure!(
            Instant::now() < deadline,
            "bulkhead did not make the TAP device {TAP} within 20 s"
        );
        thread::sleep(Duration::from_millis(20));
    }
    for arguments in [
        vec![
            "addr".to_string(),
            "add".into(),
            format!("{HOST_ADDRESS}/24"),
            "dev".into(),
            TAP.into(),
        ],
        vec!["link".to_string(), "set".into(), TAP.into(), "up".into()],
    ] {
        let status = Command::new("ip")
            .args(&arguments)
            .status()
            .context("cannot run ip")?;
        ensure!(status.success(), "ip {} failed", arguments.join(" "));
    }
    Ok(())
}

/// What was seen of the machine.
struct Report {
    processes: Vec<String>,
}

/// The running `bulkhead run`.
struct Machine {
    child: Child,
    console: Option<Receiver<String>>,
}

impl Machine {
    fn start(mut command: Command, keep: bool) -> Result<Machine> {
        if !keep {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        }
        let mut child = command.spawn().context("cannot start bulkhead")?;
        let console = child.stdout.take().map(|output| {
            let (sender, receiver) = channel();
            thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_string();
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
            receiver
        });
        Ok(Machine { child, console })
    }

    /// Shows the console, and lets the guest end when its processes have been looked at.
    fn watch(mut self, token: &str) -> Result<Report> {
        let console = self.console.take().context("the console is not ours to read")?;
        let mut report = None;
        let mut fetched = false;
        loop {
            let line = match console.recv_timeout(SILENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest has been silent for {} s", SILENCE.as_secs())
                }
            };
            println!("guest| {line}");
            fetched |= line.contains("demo: network ok") && line.contains(token);
            if line.starts_with("demo: ready") {
                report = Some(Report {
                    processes: processes_of(self.child.id())?,
                });
                let mut input = self
                    .child
                    .stdin
                    .take()
                    .context("the guest's console takes no input")?;
                input.write_all(b"go\n")?;
            }
        }
        let status = self.child.wait()?;
        ensure!(status.success(), "bulkhead ended with {status}");
        ensure!(fetched, "the guest did not fetch the page");
        report.context("the guest did not come to its end")
    }

    /// Leaves the console to the person; the processes are looked at when the guest fetches its page.
    fn wait_kept(mut self, network: &Network) -> Result<Report> {
        let fetched = network.page.fetched.recv_timeout(SILENCE).is_ok();
        let processes = processes_of(self.child.id());
        let status = self.child.wait()?;
        ensure!(fetched, "the guest did not fetch the page");
        ensure!(status.success(), "bulkhead ended with {status}");
        Ok(Report {
            processes: processes?,
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // The supervisor ends its children when it is told to end.
            if nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.child.id() as i32),
                nix::sys::signal::SIGTERM,
            )
            .is_ok()
            {
                self.child.wait().ok();
            }
        }
    }
}

/// One line about each process of the machine: the supervisor and its children.
fn processes_of(supervisor: u32) -> Result<Vec<String>> {
    let mut processes = vec![supervisor];
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
    processes.extend(
        children
            .split_whitespace()
            .filter_map(|pid| pid.parse::<u32>().ok()),
    );
    processes
        .into_iter()
        .map(|pid| {
            Ok(format!(
                "pid {pid} is {}",
                sandbox::audit(nix::unistd::Pid::from_raw(pid as i32))?
            ))
        })
        .collect()
}

/// Looks at what the guest left on its disk with a program that knows nothing of bulkhead.
fn check_file_system(disk: &Path) -> Result<()> {
    match Command::new("e2fsck").arg("-fn").arg(disk).output() {
        Ok(output) => {
            ensure!(
                output.status.success(),
                "e2fsck finds the guest's file system damaged: {}",
                String::from_utf8_lossy(&output.stdout)
            );
            println!("demo: e2fsck on the host finds the guest's file system clean");
        }
        Err(_) => println!("demo: no e2fsck on this host, so the file system was verified by the guest only"),
    }
    Ok(())
}
