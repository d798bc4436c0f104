#![forbid(unsafe_code)]
//! The person's terminal: raw mode, the escape, and its restoration whatever happens.
//!
//! Input goes through the supervisor, which looks for the escape and passes the rest on by a pipe: a guest or a
//! `bulkhead-vcpu` that hangs cannot keep a person from leaving. Output goes from `bulkhead-vcpu` to the terminal
//! directly.
//!
//! The terminal's settings are restored by [`RawTerminal`]'s drop, by a panic hook (release builds abort on panic), and
//! around a stop by job control. Signals end the supervisor in its loop, hence by way of the drop.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

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
