//! The two processes, and how they agree on what to do.

#![forbid(unsafe_code)]

use super::Round;
use super::polled::{AREA_BYTES, Shared};
use super::served::{Guest, Server};
use super::{DEPTH, LARGE_BYTES, LARGE_COUNT};
use anyhow::{Context, Result, ensure};
use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use vmbus::mem::sealed_memfd;

const _: () = assert!(LARGE_COUNT > DEPTH && LARGE_BYTES.is_multiple_of(4096));

/// This process, which writes, and the other one, which reads.
pub(super) struct Peer {
    shared: Shared,
    guest: Guest,
    child: Child,
    looks: u32,
    serial: u32,
}

impl Peer {
    pub(super) fn start() -> Result<Peer> {
        let memory = sealed_memfd("bench-ring", AREA_BYTES)?;
        let shared = Shared::map(memory.as_fd())?;
        let (bus, server) = vmbus::ipc::pair().context("cannot make a pair of sockets")?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut child = Command::new(program)
            .arg("bench-peer")
            .stdin(Stdio::from(memory))
            .stdout(Stdio::from(server))
            .spawn()
            .context("cannot start the reading process")?;
        match Guest::new(bus) {
            Ok(guest) => Ok(Peer {
                shared,
                guest,
                child,
                looks: 0,
                serial: 0,
            }),
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                Err(error)
            }
        }
    }

    /// One round; the rate in messages a second, from the first byte to the reader's last.
    pub(super) fn round(&mut self, kind: Round) -> Result<f64> {
        let word = self.next_word(kind);
        let count = kind.count();
        let start = Instant::now();
        self.shared.begin(word)?;
        match kind {
            Round::Plain256 | Round::Plain64k => self.shared.write_plain(count, kind.bytes(), false)?,
            Round::Plain256Paced => self.shared.write_plain(count, kind.bytes(), true)?,
            Round::Polled256 | Round::Polled64k => self.shared.write_ring(count, kind.bytes())?,
            Round::Served256 => self.guest.send_small(count)?,
            Round::Served64k => self.guest.send_large(count, false)?,
            Round::Filled64k => self.guest.send_large(count, true)?,
            Round::Quit => {}
        }
        while self.shared.done()? != word {
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "the reading process is stuck"
            );
            self.must_be_alive()?;
            spin_loop();
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    }

    /// The same bytes as of a round of 64 KiB by memcpy in this process; the rate in copies a second.
    pub(super) fn memcpy(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.guest.memcpy(LARGE_COUNT)?;
        Ok(LARGE_COUNT as f64 / start.elapsed().as_secs_f64())
    }

    fn next_word(&mut self, kind: Round) -> u32 {
        self.serial += 1;
        self.serial << 8 | kind as u32
    }

    /// Asks now and then; a system call a look would be measured, too.
    fn must_be_alive(&mut self) -> Result<()> {
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(1 << 20) {
            ensure!(self.child.try_wait()?.is_none(), "the reading process has died");
        }
        Ok(())
    }

    pub(super) fn end(mut self) -> Result<()> {
        let word = self.next_word(Round::Quit);
        self.shared.begin(word)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the reading process ended with {status}");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // It spins on a word that nobody will write any more.
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// The other process: reads what the first one writes, until it is told to quit. Its standard input is the shared area, its
/// standard output the socket to `bulkhead-bus`, whom the first one plays.
pub fn peer() -> Result<ExitCode> {
    let shared = Shared::map(std::io::stdin().as_fd())?;
    let mut server = Server::new(std::io::stdout().as_fd().try_clone_to_owned()?)?;
    let mut seen = 0;
    loop {
        let word = shared.round()?;
        if word == seen {
            spin_loop();
            continue;
        }
        seen = word;
        let kind = Round::from_word(word).context("an unknown round")?;
        let count = kind.count();
        match kind {
            Round::Plain256 | Round::Plain64k => shared.read_plain(count, kind.bytes(), false)?,
            Round::Plain256Paced => shared.read_plain(count, kind.bytes(), true)?,
            Round::Polled256 | Round::Polled64k => shared.read_ring(count)?,
            Round::Served256 => server.read_small(count)?,
            Round::Served64k | Round::Filled64k => server.read_large(count)?,
            Round::Quit => return Ok(ExitCode::SUCCESS),
        }
        shared.say_done(word)?;
    }
}
