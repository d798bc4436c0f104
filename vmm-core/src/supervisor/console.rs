#![forbid(unsafe_code)]
//! The person's terminal: raw mode, the escape, and its restoration whatever happens.
//!
//! Input goes through the supervisor, which looks for the escape and passes the rest on by a pipe: a guest or a
//! `bulkhead-vcpu` that hangs cannot keep a person from leaving. Output goes from `bulkhead-vcpu` to the terminal
//! directly.
//!
//! The terminal's settings are restored by [`RawTerminal`]'s drop, by a panic hook (release builds abort on panic), and
//! around a stop by job control. Signals end the supervisor in its loop, hence by way of the drop. If it is killed, the
//! keeper restores them ([`restore`]).

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use serde::{Deserialize, Serialize};
use vmbus::ipc::codec::{decode, encode};

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What the person typed to the supervisor, not to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Quit,
    Help,
}

/// What [`Command::Help`] says.
pub const HELP: &str = "Ctrl-A x ends the VM; Ctrl-A Ctrl-A sends one Ctrl-A; Ctrl-A h says this";

/// Finds the escape in what is typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Appends to `pass` what is for the guest; returns what is for us. After `Quit` the rest does not matter.
    pub fn feed(&mut self, typed: &[u8], pass: &mut Vec<u8>) -> Option<Command> {
        let mut command = None;
        for &byte in typed {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    pass.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => return Some(Command::Quit),
                b'h' | b'H' | b'?' => command = Some(Command::Help),
                ESCAPE => pass.push(ESCAPE),
                // Not ours: both go to the guest, who may know what they mean.
                other => pass.extend([ESCAPE, other]),
            }
        }
        command
    }
}

/// The settings to go back to; for the panic hook, which cannot reach [`RawTerminal`].
static ORIGINAL: Mutex<Option<libc::termios>> = Mutex::new(None);

/// The terminal on standard input, in raw mode as long as this lives.
#[derive(Debug)]
pub struct RawTerminal {
    original: Termios,
}

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal that is ours to change (a background job's is not).
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || tcgetpgrp(stdin.as_fd()).is_ok_and(|foreground| foreground != getpgrp()) {
            return Ok(None);
        }
        let original = tcgetattr(&stdin)?;
        let terminal = RawTerminal { original };
        if let Ok(mut slot) = ORIGINAL.lock() {
            *slot = Some(terminal.original.clone().into());
        }
        restore_on_panic();
        terminal.resume()?;
        Ok(Some(terminal))
    }

    /// Raw mode, but with newlines in output as usual: our own lines go to the same terminal.
    pub fn resume(&self) -> io::Result<()> {
        let mut raw = self.original.clone();
        cfmakeraw(&mut raw);
        raw.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(())
    }

    /// Back to the settings before.
    pub fn suspend(&self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.original);
    }
}

impl RawTerminal {
    /// What [`restore`] needs; `None` if the terminal cannot be asked.
    pub fn to_restore(&self) -> Option<Vec<u8>> {
        let raw = tcgetattr(io::stdin()).ok()?;
        encode(&(Settings::from(&self.original), Settings::from(&raw))).ok()
    }
}

/// Gives a terminal the settings back that it had before it was made raw, by somebody who is gone and has left these
/// bytes. If it is not as he made it, somebody else has it, and it is left alone.
pub fn restore(terminal: BorrowedFd<'_>, to_restore: &[u8]) {
    let Ok((original, raw)) = decode::<(Settings, Settings)>(to_restore) else {
        return;
    };
    if tcgetattr(terminal).is_ok_and(|now| Settings::from(&now) == raw) {
        // Of another session than ours: the kernel does not take us for a job in the background. If it is gone, it needs
        // no settings.
        let _ = tcsetattr(terminal, SetArg::TCSANOW, &original.into());
    }
}

/// [`Termios`] as it can be written down.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    /// Of input, output, control and local modes.
    flags: [u32; 4],
    line: u8,
    characters: [u8; 32],
    speeds: [u32; 2],
}

impl From<&Termios> for Settings {
    fn from(termios: &Termios) -> Self {
        let libc::termios {
            c_iflag,
            c_oflag,
            c_cflag,
            c_lflag,
            c_line,
            c_cc,
            c_ispeed,
            c_ospeed,
        } = termios.clone().into();
        Settings {
            flags: [c_iflag, c_oflag, c_cflag, c_lflag],
            line: c_line,
            characters: c_cc,
            speeds: [c_ispeed, c_ospeed],
        }
    }
}

impl From<Settings> for Termios {
    fn from(settings: Settings) -> Self {
        let [c_iflag, c_oflag, c_cflag, c_lflag] = settings.flags;
        let [c_ispeed, c_ospeed] = settings.speeds;
        Termios::from(libc::termios {
            c_iflag,
            c_oflag,
            c_cflag,
            c_lflag,
            c_line: settings.line,
            c_cc: settings.characters,
            c_ispeed,
            c_ospeed,
        })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.suspend();
        if let Ok(mut slot) = ORIGINAL.lock() {
            *slot = None;
        }
    }
}

fn restore_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Ok(slot) = ORIGINAL.try_lock()
                && let Some(original) = *slot
            {
                // The panic's own message is what matters now.
                let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &original.into());
            }
            next(info);
        }));
    });
}

/// Standard output, for the guest. A terminal is opened anew: its flags (O_NONBLOCK) are shared with the shell otherwise.
pub fn output() -> io::Result<OwnedFd> {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        if let Ok(terminal) = open("/proc/self/fd/1", flags, Mode::empty()) {
            return Ok(terminal);
        }
    }
    duplicate(stdout.as_fd())
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::termios::LocalFlags;

    fn feed(typed: &[&[u8]]) -> (Vec<u8>, Option<Command>) {
        let mut filter = EscapeFilter::default();
        let mut pass = Vec::new();
        let mut command = None;
        for part in typed {
            command = filter.feed(part, &mut pass).or(command);
        }
        (pass, command)
    }

    #[test]
    fn a_terminal_is_restored_only_if_it_is_as_it_was_left() {
        let pty = nix::pty::openpty(None, None).expect("a terminal");
        let terminal = pty.slave.as_fd();
        let original = tcgetattr(terminal).expect("asked");
        let mut raw = original.clone();
        cfmakeraw(&mut raw);
        let left = encode(&(Settings::from(&original), Settings::from(&raw))).expect("written");
        let echoes = || {
            let now = tcgetattr(terminal).expect("asked");
            now.local_flags.contains(LocalFlags::ECHO)
        };
        let mut others = raw.clone();
        others.local_flags.insert(LocalFlags::ISIG);
        tcsetattr(terminal, SetArg::TCSANOW, &others).expect("set");
        restore(terminal, &left);
        assert!(!echoes(), "it is somebody else's");
        tcsetattr(terminal, SetArg::TCSANOW, &raw).expect("set");
        restore(terminal, b"nonsense");
        assert!(!echoes());
        restore(terminal, &left);
        assert!(echoes());
    }

    #[test]
    fn what_is_no_escape_goes_to_the_guest() {
        assert_eq!(
            feed(&[b"root\r\x03\x1a\xff"]),
            (b"root\r\x03\x1a\xff".to_vec(), None)
        );
    }

    #[test]
    fn ctrl_a_x_quits_even_when_typed_in_two_parts() {
        assert_eq!(feed(&[b"ls\x01", b"x"]), (b"ls".to_vec(), Some(Command::Quit)));
        assert_eq!(feed(&[b"\x01Xmore"]), (Vec::new(), Some(Command::Quit)));
    }

    #[test]
    fn ctrl_a_twice_sends_one() {
        assert_eq!(feed(&[b"a\x01\x01b"]), (b"a\x01b".to_vec(), None));
        assert_eq!(feed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), None));
    }

    #[test]
    fn an_escape_that_is_not_ours_is_the_guests() {
        assert_eq!(feed(&[b"\x01d"]), (b"\x01d".to_vec(), None));
    }

    #[test]
    fn help_is_said_and_typing_goes_on() {
        assert_eq!(feed(&[b"\x01hls"]), (b"ls".to_vec(), Some(Command::Help)));
    }
}
