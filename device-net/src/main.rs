//! The program `bulkhead-net`. Started by the supervisor with its control socket as descriptor 3.
#![forbid(unsafe_code)]

use anyhow::Result;
use device_net::backend::Backend;
use device_net::backend::stream::Stream;
use device_net::backend::tap::Tap;
use device_net::config::{BackendKind, NicConfig};
use device_net::server::saved::Saved;
use device_net::server::{Server, ServerError};
use sandbox::Jail;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use vmbus::channel::Port;
use vmbus::ipc::PeerFault;
use vmbus::ipc::is_end_of_peer;
use vmbus::ipc::server_start::Start;
use vmbus::journal::Journal;
use vmbus::record::Recorder;

pub fn main() -> ExitCode {
    match serve() {
        Ok(status) => status,
        // The VM is over, however far this server has come.
        Err(error) if error.chain().any(is_end_of_peer) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-net: {error:#}");
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
    config: NicConfig,
    backend: Box<dyn Backend>,
    bus: OwnedFd,
    journal: Journal,
    recorder: Option<Arc<Recorder>>,
}

fn prepare(start: &mut Start, jail: Jail) -> Result<Room> {
    start.init_logging()?;
    let config = NicConfig::parse(&start.config)?;
    let bus = start.fds.take("bus")?;
    let journal = Journal::map(start.fds.take("journal")?.as_fd())?;
    journal.check::<Saved>()?;
    let fd = start.fds.take(&config.fd)?;
    let recorder = start.recorder()?;
    std::mem::take(&mut start.fds).finish()?;
    let backend: Box<dyn Backend> = match config.backend {
        BackendKind::Tap => Box::new(Tap::new(fd)?),
        BackendKind::Stream => Box::new(Stream::new(fd)?),
    };
    let report = serde_json::to_string(&jail.lock_in()?)?;
    Ok(Room {
        report,
        config,
        backend,
        bus,
        journal,
        recorder,
    })
}

impl Room {
    fn run(self, start: Start) -> Result<()> {
        let generation = start.generation;
        let control = start.ready(self.report)?;
        let mut port = Port::with_journal(self.bus, self.journal, generation)?;
        if let Some(recorder) = self.recorder {
            port.set_recorder(recorder);
        }
        match Server::new(control, port, &self.config, self.backend)?.run() {
            // The VM is over.
            Err(ServerError::Bus(PeerFault::Eof) | ServerError::Supervisor(PeerFault::Eof)) => Ok(()),
            result => Ok(result?),
        }
    }
}
