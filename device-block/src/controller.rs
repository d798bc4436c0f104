//! A SCSI controller: what each request of the guest leads to.
//!
//! ```text
//!   Request ──▶ session ──▶ answer now (initialisation), or finish everything first (reset), or
//!                      ──▶ target, disk ──▶ answer now (INQUIRY, refusals)
//!                                      ──▶ engine ──▶ … ──▶ answer later
//! ```
//! It knows neither rings nor journals: `server` gives it requests and sends its answers.

use crate::backend::engine::{Engine, RequestId, Started};
use crate::backend::file::{FileBackend, OpenError, Wishes};
use crate::backend::job::{Ended, Work};
use crate::backend::memory::MemoryBackend;
use crate::backend::{Backend, Geometry};
use crate::config::{CacheMode, ControllerConfig, DiskConfig, DiskKind};
use crate::scsi::cdb::Command;
use crate::scsi::disk::{Action, BLOCK_BYTES, Disk, Extent, Identity, Limits, UnmapLimits};
use crate::scsi::mode::ModeState;
use crate::scsi::sense;
use crate::scsi::target::{Address, Routed, Target, UnitError};
use crate::storvsp::request::{Request, SrbResult};
use crate::storvsp::session::{MAX_TRANSFER_BYTES, Session, Step};
use crate::storvsp::wire::{DataDirection, ScsiRequest, VstorPacket};
use std::os::fd::{BorrowedFd, OwnedFd};
use vmbus::lease::Holder;
use vmbus::mem::{GuestRam, GuestSpans, Uring};

/// Limit: blocks of one UNMAP, 4 GiB. One command holds one slot of the engine until it is done; a file system
/// takes about a second for so much.
const MAX_UNMAP_BLOCKS: u32 = 8 << 20;
/// Limit: descriptors of one UNMAP. Linux sends one; the list is then 4 KiB at most.
const MAX_UNMAP_DESCRIPTORS: u32 = 255;

/// What a request leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send this.
    Answer(VstorPacket),
    /// The session has gone on: save it, send this, then offer so many sub-channels.
    Control {
        /// The answer.
        reply: VstorPacket,
        /// Sub-channels to offer.
        offer: Option<u16>,
    },
    /// [`Controller::on_completion`] has the answer, some time.
    Active(RequestId),
    /// Finish all requests of the controller, then send [`Controller::reset_done`].
    Reset,
}

/// Why a controller cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A disk cannot be used.
    #[error("disk {lun}: {error}")]
    Disk {
        /// Its logical unit number.
        lun: u8,
        /// Why.
        error: OpenError,
    },
    /// The numbers are not possible.
    #[error(transparent)]
    Units(#[from] UnitError),
}

/// A SCSI controller and its disks.
#[derive(Debug)]
pub struct Controller {
    session: Session,
    target: Target,
    engine: Engine,
    /// Requests whose claims on guest memory did not hold.
    pub bad_requests: u64,
}

/// The disks of a controller, open and looked at, not yet in use.
pub struct OpenDisks {
    disks: Vec<(DiskConfig, OpenDisk)>,
}

enum OpenDisk {
    File(FileBackend),
    Memory(MemoryBackend),
}

impl OpenDisks {
    /// Opens nothing (the descriptors are open), but asks the kernel about them: before the lock-in.
    pub fn look_at(disks: Vec<(DiskConfig, OwnedFd)>) -> Result<Self, BuildError> {
        let disks = disks.into_iter().map(|(config, fd)| {
            let opened = match config.kind {
                DiskKind::File => {
                    let wishes = Wishes {
                        direct: config.direct,
                        bytes: config.bytes,
                    };
                    FileBackend::open(fd, wishes).map(OpenDisk::File)
                }
                DiskKind::Memory => MemoryBackend::open(fd, config.bytes).map(OpenDisk::Memory),
            };
            match opened {
                Ok(disk) => Ok((config, disk)),
                Err(error) => Err(BuildError::Disk {
                    lun: config.lun,
                    error,
                }),
            }
        });
        Ok(Self {
            disks: disks.collect::<Result<_, _>>()?,
        })
    }

    /// Files whose own locks prove the end of I/O, and whose those locks are to be if the workers of the io_uring are threads of
    /// this process. Memory disks have none: their I/O ends with the thread that does it.
    pub fn fenced_by_lease(
        &self,
        workers_are_threads: bool,
    ) -> impl Iterator<Item = (BorrowedFd<'_>, Holder)> {
        let holder = move |file: &FileBackend| match workers_are_threads && !file.is_direct() {
            true => Holder::Process,
            false => Holder::Description,
        };
        self.files()
            .filter(|file| file.proves_end())
            .map(move |file| (file.file(), holder(file)))
    }

    /// The other files. They have to be registered with the io_uring, in this order.
    pub fn fenced_by_ring(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files()
            .filter(|file| !file.proves_end())
            .map(FileBackend::file)
    }

    fn files(&self) -> impl Iterator<Item = &FileBackend> {
        self.disks.iter().filter_map(|(_, disk)| match disk {
            OpenDisk::File(file) => Some(file),
            OpenDisk::Memory(_) => None,
        })
    }
}

impl Controller {
    /// A controller with these disks. The files of [`OpenDisks::fenced_by_ring`] are registered with the io_uring from
    /// index `first_file` on. Operations have the numbers from `number_base` on.
    pub fn new(
        config: &ControllerConfig,
        disks: OpenDisks,
        first_file: u32,
        number_base: u64,
    ) -> Result<Self, BuildError> {
        let mut next_file = first_file;
        let mut units = Vec::new();
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        for (disk, opened) in disks.disks {
            let backend: Box<dyn Backend> = match opened {
                OpenDisk::File(mut file) => {
                    if !file.proves_end() {
                        file.set_registered(next_file);
                        next_file += 1;
                        // Of a disk that is only read that is as it should be: see `vmbus::lease`.
                        if !disk.read_only {
                            tracing::warn!(
                                lun = disk.lun,
                                "the disk's file system is not one that tells when I/O is over: should this server \
                                 die, its successor waits until the kernel has torn down its io_uring"
                            );
                        }
                    }
                    Box::new(file)
                }
                OpenDisk::Memory(memory) => Box::new(memory),
            };
            units.push((disk.lun, unit(config, &disk, backend.geometry())));
            backends.push(backend);
        }
        Ok(Self {
            session: Session::new(config.max_sub_channels),
            target: Target::new(units)?,
            engine: Engine::new(backends, number_base),
            bad_requests: 0,
        })
    }

    /// The initialisation conversation, to be saved and loaded.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// No predecessor is at work any more: the disks may be read and written.
    pub fn serve(&mut self) {
        self.engine.serve();
    }

    /// The primary channel was opened by the guest (`None`), or goes on with a saved session.
    pub fn on_primary_opened(&mut self, saved: Option<Session>) {
        match saved {
            Some(session) => self.session = session,
            None => self.session.on_primary_opened(),
        }
    }

    /// Whether one more request can be taken.
    pub fn has_room(&self) -> bool {
        self.engine.has_room()
    }

    /// Requests at the disks.
    pub fn active_count(&self) -> usize {
        self.engine.active_count()
    }

    /// A request of the guest on the channel `sub_index`, or, with `replay`, one out of a predecessor's journal.
    /// [`Self::has_room`] must hold.
    pub fn on_request(
        &mut self,
        io: &mut Uring,
        ram: &GuestRam,
        sub_index: u16,
        transaction_id: u64,
        request: &Request<'_>,
        replay: bool,
    ) -> Verdict {
        let step = match replay {
            false => self.session.on_packet(sub_index, transaction_id, &request.packet),
            true => self.session.on_replay(sub_index, transaction_id, &request.packet),
        };
        match step {
            Step::Reply(reply) => Verdict::Control { reply, offer: None },
            Step::ReplyAndOffer { reply, count } => Verdict::Control {
                reply,
                offer: Some(count),
            },
            Step::Reset => Verdict::Reset,
            Step::Execute => match self.execute(io, ram, request) {
                Executed::Over(result) => Verdict::Answer(result.completion()),
                Executed::Active(id) => Verdict::Active(id),
            },
        }
    }

    /// An operation is over. The answer, if the request is over with it.
    pub fn on_completion(&mut self, io: &mut Uring, id: RequestId, result: i32) -> Option<VstorPacket> {
        self.engine
            .on_completion(io, id, result)
            .map(|ended| srb_result(ended).completion())
    }

    /// Begins operations that had found no room; calls `over` with the answers of those that ended at once. To be
    /// called after completions.
    pub fn resume(&mut self, io: &mut Uring, mut over: impl FnMut(RequestId, VstorPacket)) {
        if self.engine.has_waiting() {
            self.engine
                .resume(io, |id, ended| over(id, srb_result(ended).completion()));
        }
    }

    /// The answer to a reset, once everything is over.
    pub fn reset_done() -> VstorPacket {
        VstorPacket::completion(crate::storvsp::wire::PacketStatus::Success)
    }

    /// `path = value` pairs for inspection.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let mut entries = vec![
            ("session".to_owned(), self.session.describe()),
            ("active".to_owned(), self.active_count().to_string()),
            ("bad_requests".to_owned(), self.bad_requests.to_string()),
        ];
        for (lun, disk) in self.target.disks() {
            entries.push((format!("disk/{lun}/blocks"), disk.block_count.to_string()));
            entries.push((format!("disk/{lun}/read_only"), disk.mode.read_only.to_string()));
            entries.push((format!("disk/{lun}/serial"), disk.identity.serial.clone()));
        }
        entries
    }

    fn execute(&mut self, io: &mut Uring, ram: &GuestRam, request: &Request<'_>) -> Executed {
        let srb = request.packet.scsi_request();
        let (Some(cdb), Ok(data)) = (srb.cdb(), request.data(ram)) else {
            self.bad_requests += 1;
            return Executed::Over(SrbResult::Invalid);
        };
        let address = Address {
            path: srb.path_id,
            target: srb.target_id,
            lun: srb.lun,
        };
        match self.target.on_command(address, &Command::parse(cdb)) {
            Routed::NoUnit => Executed::Over(SrbResult::NoUnit),
            Routed::Controller(action) => self.act(io, None, action, &srb, data),
            Routed::Unit(unit, action) => self.act(io, Some(unit), action, &srb, data),
        }
    }

    /// Does what the disk, or without `unit` the controller, has decided on.
    fn act(
        &mut self,
        io: &mut Uring,
        unit: Option<usize>,
        action: Action,
        srb: &ScsiRequest,
        data: GuestSpans,
    ) -> Executed {
        let direction = srb.direction();
        let work = match action {
            Action::Good => return Executed::Over(SrbResult::Good(0)),
            Action::Check(sense) => return Executed::Over(SrbResult::Check(sense)),
            Action::Data(bytes) => return Executed::Over(self.give(direction, &bytes, &data)),
            Action::Flush => (Work::Flush, None),
            Action::Read(extent) => match take_exactly(extent, data, direction, DataDirection::ToGuest) {
                Some(data) => (Work::Read(extent), Some(data)),
                None => return self.invalid(),
            },
            Action::Write { extent, durable } => {
                match take_exactly(extent, data, direction, DataDirection::FromGuest) {
                    Some(data) => (Work::Write { extent, durable }, Some(data)),
                    None => return self.invalid(),
                }
            }
            Action::FetchUnmapList { bytes } => {
                let Some(disk) = unit.and_then(|unit| self.target.disk(unit)) else {
                    return self.invalid();
                };
                // Copied once; the guest may change it while we look.
                let mut list = vec![0u8; bytes as usize];
                if direction != DataDirection::FromGuest || data.copy_to(&mut list).is_err() {
                    return self.invalid();
                }
                match disk.on_unmap_list(&list) {
                    Ok(extents) => (Work::Unmap(extents), None),
                    Err(sense) => return Executed::Over(SrbResult::Check(sense)),
                }
            }
        };
        let Some(unit) = unit else { return self.invalid() };
        let (work, data) = work;
        match self.engine.start(io, unit, work, data) {
            Started::Active(id) => Executed::Active(id),
            Started::Over(ended) => Executed::Over(srb_result(ended)),
        }
    }

    /// Hands bytes to the guest, as many as it has room for.
    fn give(&mut self, direction: DataDirection, bytes: &[u8], data: &GuestSpans) -> SrbResult {
        let part = bytes.get(..bytes.len().min(data.len())).unwrap_or_default();
        if part.is_empty() {
            return SrbResult::Good(0);
        }
        if direction != DataDirection::ToGuest || data.copy_from(part).is_err() {
            self.bad_requests += 1;
            return SrbResult::Invalid;
        }
        // At most a few KiB.
        SrbResult::Good(part.len() as u32)
    }

    fn invalid(&mut self) -> Executed {
        self.bad_requests += 1;
        Executed::Over(SrbResult::Invalid)
    }
}

enum Executed {
    Over(SrbResult),
    Active(RequestId),
}

/// The data of a transfer: exactly as much as the command names, in the right direction.
fn take_exactly(
    extent: Extent,
    data: GuestSpans,
    direction: DataDirection,
    wanted: DataDirection,
) -> Option<GuestSpans> {
    let len = usize::try_from(extent.len_bytes).ok()?;
    if direction != wanted || data.len() < len {
        return None;
    }
    if data.len() == len {
        Some(data)
    } else {
        data.slice(0, len).ok()
    }
}

fn srb_result(ended: Ended) -> SrbResult {
    match ended {
        // A transfer is at most MAX_TRANSFER_BYTES.
        Ok(bytes) => SrbResult::Good(u32::try_from(bytes).unwrap_or(u32::MAX)),
        Err((attempt, fault)) => {
            tracing::debug!(?attempt, %fault, "the host failed a request");
            SrbResult::Check(sense::for_fault(attempt, fault))
        }
    }
}

fn unit(controller: &ControllerConfig, config: &DiskConfig, geometry: &Geometry) -> Disk {
    let serial = config.serial(&controller.instance);
    let unmap = geometry
        .unmap_granularity_bytes
        .filter(|_| !config.read_only)
        .map(|bytes| UnmapLimits {
            max_blocks: MAX_UNMAP_BLOCKS,
            max_descriptors: MAX_UNMAP_DESCRIPTORS,
            granularity_blocks: bytes / BLOCK_BYTES,
        });
    Disk {
        identity: Identity::new(&serial, *controller.instance.as_bytes(), config.lun),
        limits: Limits {
            physical_block_bytes: geometry.physical_block_bytes,
            max_transfer_blocks: MAX_TRANSFER_BYTES / BLOCK_BYTES,
            unmap,
        },
        block_count: geometry.size_bytes / u64::from(BLOCK_BYTES),
        mode: ModeState {
            read_only: config.read_only,
            write_cache: config.cache == CacheMode::Writeback && config.kind == DiskKind::File,
        },
    }
}

#[cfg(test)]
impl Controller {
    /// A controller over any backends, for tests: unit numbers are indexes.
    pub(crate) fn with_backends(backends: Vec<Box<dyn Backend>>, cache: CacheMode) -> Self {
        let config = ControllerConfig {
            instance: uuid::Uuid::nil(),
            disks: Vec::new(),
            max_sub_channels: 3,
        };
        let units = backends.iter().enumerate().map(|(lun, backend)| {
            let disk = DiskConfig {
                lun: lun as u8,
                fd: "disk".into(),
                read_only: false,
                kind: DiskKind::File,
                bytes: None,
                serial: None,
                cache,
                direct: false,
            };
            (disk.lun, unit(&config, &disk, backend.geometry()))
        });
        let target = Target::new(units.collect()).expect("indexes are distinct");
        Self {
            session: Session::new(config.max_sub_channels),
            target,
            engine: Engine::new(backends, 0),
            bad_requests: 0,
        }
    }
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
