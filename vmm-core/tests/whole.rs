//! All of bulkhead's own programs on the real /dev/kvm, with guests of a few dozen instructions.
//!
//! What a Linux guest does in the rig is seen on the rig's kernel only; this runs on the kernel of whatever host it is.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vmm_core::pc::boot::tiny_kernel;

/// Says `!`, waits for a byte from the serial port, and resets itself if that is an `r`. Else it switches itself off.
const RESETS: &[u8] = &[
    0xBA, 0xF8, 0x03, 0x00, 0x00, // mov edx, data of COM1
    0xB0, b'!', 0xEE, // mov al, '!'; out dx, al
    0xBA, 0xFD, 0x03, 0x00, 0x00, // mov edx, line status of COM1
    0xEC, 0xA8, 0x01, 0x74, 0xFB, // in al, dx; test al, 1; jz to the in
    0xBA, 0xF8, 0x03, 0x00, 0x00, 0xEC, // mov edx, data of COM1; in al, dx
    0x3C, b'r', 0x75, 0x0A, // cmp al, 'r'; jne to the second mov edx from here
    0xBA, 0x02, 0x06, 0x00, 0x00, 0xB0, 0x01, 0xEE, 0xF4, 0xF4, // reset register; halt
    0xBA, 0x00, 0x06, 0x00, 0x00, 0xB0, 0x34, 0xEE, // sleep control: soft off
    0xF4, 0xEB, 0xFD, // halt
];

struct Vm {
    supervisor: Child,
    _folder: TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Of a test that failed. A supervisor that is told to end takes its VM with it; one that is killed does not.
        if matches!(self.supervisor.try_wait(), Ok(None)) {
            self.tell_to_end();
            self.supervisor.wait().ok();
        }
    }
}

impl Vm {
    /// `None`, said loudly, where there is no KVM.
    fn start(code: &[u8]) -> Option<Self> {
        Self::start_as(
            Command::new(env!("CARGO_BIN_EXE_bulkhead")),
            code,
            &[],
            Stdio::piped(),
        )
    }

    /// `command`: what comes before `run`.
    fn start_as(mut command: Command, code: &[u8], args: &[&str], stdin: Stdio) -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            println!("SKIP /dev/kvm cannot be opened: {error}");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, tiny_kernel(code)).expect("written");
        command.args(["run", "--memory", "64M", "--kernel"]).arg(kernel);
        command.arg("--run-folder").arg(folder.path().join("run"));
        command.args(args);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        Some(Vm {
            supervisor: command.spawn().expect("started"),
            _folder: folder,
        })
    }

    fn tell_to_end(&self) {
        let pid = i32::try_from(self.supervisor.id()).expect("a process id");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("told");
    }

    fn hear(&mut self) -> u8 {
        let mut byte = [0];
        let output = self.supervisor.stdout.as_mut().expect("piped");
        output.read_exact(&mut byte).expect("the guest says something");
        byte[0]
    }

    fn say(&mut self, byte: u8) {
        let input = self.supervisor.stdin.as_mut().expect("piped");
        input.write_all(&[byte]).expect("the guest listens");
    }

    /// Exit status, and what was said to the person.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let mut errors = self.supervisor.stderr.take().expect("piped");
        errors.read_to_string(&mut said).expect("text");
        (self.supervisor.wait().expect("waited").code(), said)
    }
}

#[test]
fn a_guest_resets_itself_as_often_as_it_likes_and_its_console_goes_on() {
    let Some(mut vm) = Vm::start(RESETS) else {
        return;
    };
    for answer in *b"rrrp" {
        assert_eq!(vm.hear(), b'!');
        vm.say(answer);
    }
    let (status, said) = vm.end();
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("the guest reset itself (3 so far)"), "{said}");
}

#[test]
fn a_tap_that_was_handed_over_is_served_and_goes_with_the_vm() {
    let program = Path::new(env!("CARGO_BIN_EXE_bulkhead"));
    if !program.with_file_name("bulkhead-net").exists() {
        println!("SKIP bulkhead-net is not built: `cargo test --workspace` builds it");
        return;
    }
    let name = format!("bh{}", std::process::id());
    let tap = match sandbox::tap::create(&name, false) {
        Ok(tap) => tap,
        Err(error) => {
            println!("SKIP a TAP cannot be made: {error}");
            return;
        }
    };
    let interface = Path::new("/sys/class/net").join(&name);
    // Whoever starts bulkhead hands it over: here a shell that got it as its own input.
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$@\" 7<&0 </dev/null", "sh"]);
    shell.arg(program);
    let Some(mut vm) = Vm::start_as(shell, RESETS, &["--net", "tap-fd=7"], tap.into()) else {
        return;
    };
    // All servers were ready before the guest ran.
    assert_eq!(vm.hear(), b'!');
    assert!(interface.exists(), "nobody holds the TAP");
    vm.tell_to_end();
    let (status, said) = vm.end();
    assert_eq!(
        (status, said.as_str()),
        (Some(143), "bulkhead: ended by signal 15\n")
    );
    assert!(!interface.exists(), "somebody holds the TAP still");
}
