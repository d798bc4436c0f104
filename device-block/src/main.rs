//! The program `bulkhead-block`. Started by the supervisor with its control socket as descriptor 3.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use device_block::backend::fence::Fence;
use device_block::config::ControllerConfig;
use device_block::controller::{Controller, OpenDisks};
use device_block::server::{IO_NUMBER_BASE, Parts, Server, URING_SLOTS};
use device_block::storvsp::session::Session;
use sandbox::Jail;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use vmbus::channel::Port;
use vmbus::ipc::is_end_of_peer;
use vmbus::ipc::server_start::Start;
use vmbus::journal::Journal;
use vmbus::mem::Uring;
use vmbus::record::Recorder;

pub fn main() -> ExitCode {
    match serve() {
        Ok(status) => status,
        // The VM is over, however far this server has come.
        Err(error) if error.chain().any(is_end_of_peer) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-block: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<ExitCode> {
    let (control, jail) = sandbox::inherited()?;
    let mut start = Start::receive(control)?;
    match prepare(&mut start, jail) {
        Ok(room) => room.run(start).map(|()| ExitCode::SUCCESS),
        Err(error) => {
            // The supervisor tells it: one sentence, once. If that is gone, nobody asks any more.
            start.fail(format!("{error:#}")).ok();
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Everything that needs more rights than the server will have.
struct Room {
    report: String,
    io: Uring,
    controller: Controller,
    fence: Fence,
    bus: OwnedFd,
    journal: Journal,
    recorder: Option<Arc<Recorder>>,
}

fn prepare(start: &mut Start, jail: Jail) -> Result<Room> {
    start.init_logging()?;
    let config = ControllerConfig::parse(&start.config)?;
    let bus = start.fds.take("bus")?;
    let journal = start.fds.take("journal")?;
    let disks = config
        .disks
        .iter()
        .map(|disk| Ok((disk.clone(), start.fds.take(&disk.fd)?)));
    let disks = OpenDisks::look_at(disks.collect::<Result<_>>()?)?;
    let recorder = start.recorder()?;
    std::mem::take(&mut start.fds).finish()?;

    let mut fence = Fence::new(journal.as_fd())?;
    let journal = Journal::map(journal.as_fd())?;
    journal.check::<Session>()?;
    // The journal first: index 0. The disks' files follow in order. None, if no disk needs it: see `backend::fence`.
    let mut files: Vec<_> = disks.fenced_by_ring().collect();
    if !files.is_empty() {
        files.insert(0, fence.journal());
    }
    let io = Uring::restricted(URING_SLOTS, &files)?;
    drop(files);
    for (disk, holder) in disks.fenced_by_lease(io.workers_are_threads()) {
        fence.add(disk, holder)?;
    }
    let controller = Controller::new(&config, disks, 1, IO_NUMBER_BASE)?;

    let require_full = jail.require_full;
    let mut report = jail.lock_in()?;
    if !io.is_restricted() {
        let missing = "io_uring accepts any operation: the kernel has no restrictions for it (Linux 5.10)";
        ensure!(!require_full, "{missing}");
        report.missing.push(missing.to_owned());
    }
    let report = serde_json::to_string(&report)?;
    Ok(Room {
        report,
        io,
        controller,
        fence,
        bus,
        journal,
        recorder,
    })
}

impl Room {
    fn run(self, start: Start) -> Result<()> {
        let generation = start.generation;
        let Self {
            report,
            io,
            controller,
            fence,
            bus,
            journal,
            recorder,
        } = self;
        let control = start.ready(report)?;
        let mut port = Port::with_journal(bus, journal, generation)?;
        if let Some(recorder) = recorder {
            port.set_recorder(recorder);
        }
        let parts = Parts {
            io,
            control,
            port,
            controller,
            fence,
        };
        Ok(Server::new(parts).run()?)
    }
}
