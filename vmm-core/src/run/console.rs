#![forbid(unsafe_code)]
//! The console's two ends in this process: a thread that writes what the guest printed, and the reading of input.
//!
//! Writing has a thread of its own because it may block: on a terminal that was stopped with Ctrl-S, on a pipe that
//! nobody empties. Neither vCPU threads nor the control thread wait for it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::control::Source;
use super::processor::Shared;
use crate::pc::serial::Output;

/// How long the end of a VM waits for whoever reads the console.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(1);

/// The writing thread.
pub struct Writer {
    output: Arc<Output>,
    done: Receiver<()>,
}

impl Writer {
    /// Starts the thread. Without a descriptor all output is dropped.
    pub fn start(fd: Option<OwnedFd>, output: Arc<Output>) -> io::Result<Self> {
        let (sender, done) = channel();
        let Some(fd) = fd else {
            output.drop_all();
            return Ok(Self { output, done });
        };
        let source = output.clone();
        thread::Builder::new().name("console".to_owned()).spawn(move || {
            let mut file = File::from(fd);
            while let Some(bytes) = source.take() {
                if write_all(&mut file, &bytes).is_err() {
                    source.drop_all();
                }
            }
            // Nobody waits for it if the process ends otherwise.
            sender.send(()).ok();
        })?;
        Ok(Self { output, done })
    }

    /// Lets the thread write what is there, for a while.
    pub fn finish(self) {
        self.output.close();
        // An error is a thread that has ended, or a reader that does not read: both are the end.
        self.done.recv_timeout(LAST_WORDS_PATIENCE).ok();
    }
}

/// `write_all` that can cope with a descriptor that somebody else made non-blocking.
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or(&[]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(
                    &mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                )?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The reading side, on the control thread.
pub struct Input {
    file: Option<File>,
    watched: bool,
}

impl Input {
    /// Watches the descriptor. One that cannot be waited for (a regular file, /dev/null) has no input.
    pub fn new(fd: Option<OwnedFd>, epoll: &Epoll) -> Self {
        let file = fd.map(File::from).filter(|file| {
            epoll
                .add(
                    file,
                    EpollEvent::new(EpollFlags::EPOLLIN, Source::ConsoleInput.token()),
                )
                .is_ok()
        });
        Self {
            watched: file.is_some(),
            file,
        }
    }

    /// Moves what can be read to the guest; stops watching while the guest takes no more.
    pub fn on_readable(&mut self, shared: &Shared, epoll: &Epoll) {
        let Some(file) = &mut self.file else { return };
        let mut bytes = [0; 1024];
        let room = shared.console().input_room().min(bytes.len());
        if room == 0 {
            self.watch(epoll, false);
            return;
        }
        match file.read(&mut bytes[..room]) {
            Ok(0) => self.stop(epoll),
            Ok(read) => shared.console().offer_input(&bytes[..read]),
            Err(error) if is_transient(&error) => {}
            Err(_) => self.stop(epoll),
        }
    }

    /// The guest has taken input.
    pub fn on_room(&mut self, epoll: &Epoll) {
        self.watch(epoll, true);
    }

    fn watch(&mut self, epoll: &Epoll, wanted: bool) {
        if let Some(file) = &self.file
            && wanted != self.watched
        {
            let interest = if wanted {
                EpollFlags::EPOLLIN
            } else {
                EpollFlags::empty()
            };
            let mut event = EpollEvent::new(interest, Source::ConsoleInput.token());
            // The descriptor is on the epoll; a failure would cost input only.
            epoll.modify(file, &mut event).ok();
            self.watched = wanted;
        }
    }

    /// End of input: the console goes on without.
    fn stop(&mut self, epoll: &Epoll) {
        if let Some(file) = self.file.take() {
            // Closing it does the same, unless a duplicate is open elsewhere.
            epoll.delete(&file).ok();
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}
