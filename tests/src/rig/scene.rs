//! Guests that are run one after the other in one boot of the rig, and what is expected of each.

#![forbid(unsafe_code)]

use super::{EXIT_RIG_AT_FAULT, Rig, RigError, RigSpec};
use std::path::PathBuf;
use std::time::Duration;

/// What every guest script begins with.
const GUEST: &str = r#"
fail() { echo "FAILED $*"; dmesg | tail -30; sync; exit 1; }
# Waits for a path to be there (or, with "gone", not to be there).
await() {
    for try in $(seq 300); do
        if [ "$2" = gone ]; then [ -e "$1" ] || return 0; else [ -e "$1" ] && return 0; fi
        usleep 100000
    done
    fail "$1 ${2:-did not appear}"
}
network_up() {
    await /sys/class/net/eth0
    ip link set eth0 up && ip addr add 192.168.215.2/24 dev eth0 || fail "eth0"
    for try in $(seq 50); do timeout 5 wget -q -O /dev/null http://192.168.215.1:8080/hello && return 0; usleep 200000; done
    fail "the host does not answer"
}
# Nothing of ours may have gone wrong unseen. One warning is the emulated processor's (its XSAVE leaves do not add up):
# QEMU's own guest in the rig prints it, too, so that this one block is left out.
quiet_log() {
    dmesg | awk '/cut here/ { block = ""; inside = 1 }
        inside { block = block "\n" $0 }
        /end trace/ && inside { if (block !~ /fpu__init_system_xstate/) print block; inside = 0; next }
        !inside' >/tmp/log
    grep -iE 'i/o error|incorrect transaction|invalid transaction|call trace|warning:|hv_.*(fail|error|timed out)|hung|blocked for' /tmp/log && fail "the kernel's log complains"
    return 0
}
"#;

/// What the rig has around the guests: a TAP device, a web server, and a way to run one of them.
const AROUND: &str = r#"
mkdir -p /root/www && echo hello >/root/www/hello
ln -s /opt/guest/vmlinuz /root/www/
/usr/bin/ip tuntap add dev t0 mode tap vnet_hdr
/usr/bin/ip addr add 192.168.215.1/24 dev t0
/usr/bin/ip link set t0 up
busybox httpd -h /root/www -p 8080
# scene NAME BULKHEAD-FLAG...   MORE: an archive to append to the initrd; KERNEL: vmlinux, to boot the ELF file
scene() {
    name=$1; shift
    guest-initrd /root/$name.sh /root/initrd.cpio
    [ -z "${MORE:-}" ] || cat "$MORE" >>/root/initrd.cpio
    cp /root/initrd.cpio /root/www/again.cpio
    { status=0
      bulkhead run --name $name --kernel /opt/guest/${KERNEL:-vmlinuz} --initrd /root/initrd.cpio "$@" </dev/null || status=$?
      echo "bulkhead: exit $status"; } 2>&1 | tee /root/said
    # A triple fault without a word of the guest's kernel is the emulator's. KVM's own trace shows where it comes from: the
    # processor exits for an interrupt, KVM injects the guest's, and VMRUN ends with a shutdown while it delivers that one,
    # at the same instruction, without anything of ours in between. It shows nothing about what is tested.
    if grep -q 'triple fault' /root/said && ! grep -q 'kernel crashed' /root/said; then exit @EXIT_RIG_AT_FAULT@; fi
}
"#;

/// The guests of one boot of the rig.
#[derive(Debug)]
pub struct Scenes {
    rig: Rig,
    spec: RigSpec,
    script: String,
    scenes: Vec<Scene>,
}

/// One guest.
#[derive(Debug)]
struct Scene {
    name: &'static str,
    /// Lines that must be among what guest and bulkhead say.
    says: Vec<String>,
}

impl Scenes {
    /// No guests yet. `programs`: the folder of our programs.
    pub fn new(rig: Rig, programs: PathBuf) -> Scenes {
        let mut spec = RigSpec::new(["sh", "-euc", ""]);
        spec.binaries = Some(programs);
        // Guests that work for a minute meet the emulator's faults more often than others, in up to two runs of three on
        // some hosts. Such a run ends early and shows nothing.
        spec.attempts = 8;
        // The rig's own start, see `guest` for the rest.
        spec.timeout = Duration::from_secs(30);
        Scenes {
            rig,
            spec,
            script: AROUND.replace("@EXIT_RIG_AT_FAULT@", &EXIT_RIG_AT_FAULT.to_string()),
            scenes: Vec::new(),
        }
    }

    /// Shows what is said while it is said.
    pub fn echo(mut self) -> Scenes {
        self.spec.echo = true;
        self
    }

    /// Adds a guest that runs `script` within `seconds`. `around` is the rig's script that starts it by `scene NAME FLAGS`.
    /// What is in `says` must be said, and nothing may say FAILED.
    pub fn guest(
        mut self,
        name: &'static str,
        seconds: u64,
        script: &str,
        around: &str,
        says: &[&str],
    ) -> Scenes {
        self.spec = self
            .spec
            .file(&format!("/root/{name}.sh"), format!("{GUEST}\n{script}").as_str());
        self.spec.timeout += Duration::from_secs(seconds);
        // A subshell, so that a scene that goes wrong does not hide those after it.
        self.script += &format!(
            "echo '=== {name}'\n( {around}\n) || {{ status=$?; [ $status != {EXIT_RIG_AT_FAULT} ] || exit $status; echo \"FAILED status $status\"; }}\n"
        );
        self.scenes.push(Scene {
            name,
            says: says.iter().map(ToString::to_string).collect(),
        });
        self
    }

    /// Runs all guests, and returns what each said, in their order.
    ///
    /// # Errors
    /// If one of them did not do what was expected of it, all that do are told with what they said. The same if the rig
    /// failed at every attempt or cannot be used: nothing has been shown then.
    pub fn run(mut self) -> Result<Vec<String>, String> {
        self.spec.command[2] = self.script;
        let outcome = self.rig.run(&self.spec).map_err(|error| match error {
            RigError::Failed(failed) => format!(
                "{failed}\n--- output\n{}\n--- console\n{}",
                failed.output, failed.console
            ),
            RigError::Setup(error) => format!("the rig cannot be used: {error:#}"),
        })?;
        let mut wrong = String::new();
        if outcome.status != 0 {
            wrong += &format!("status {}\n{}\n", outcome.status, outcome.output);
        }
        let mut all = Vec::new();
        for scene in &self.scenes {
            let said = section(&outcome.output, scene.name);
            let lacking: Vec<&String> = scene
                .says
                .iter()
                .filter(|what| !said.contains(what.as_str()))
                .collect();
            if !lacking.is_empty() || said.contains("FAILED") {
                wrong += &format!("=== {}: lacking {lacking:?} in\n{said}\n", scene.name);
            }
            all.push(said);
        }
        if wrong.is_empty() { Ok(all) } else { Err(wrong) }
    }
}

fn section(output: &str, name: &str) -> String {
    let begin = format!("=== {name}");
    output
        .lines()
        .skip_while(|line| line.trim_end() != begin)
        .skip(1)
        .take_while(|line| !line.starts_with("=== "))
        .fold(String::new(), |text, line| text + line + "\n")
}
