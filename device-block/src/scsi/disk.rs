//! One direct-access logical unit: what a command means for it.

use super::cdb::{Command, Transfer};
use super::mode::ModeState;
use super::sense::Sense;
use super::{inquiry, mode};

/// Logical block length. Always 512: Linux and Windows take it everywhere; a larger physical block is told by
/// READ CAPACITY (16), so that guests align to it.
pub const BLOCK_BYTES: u32 = 512;
/// Limit: characters of a serial number; udev and `/dev/disk/by-id` stay readable, and page 0x83's length bytes
/// cannot overflow.
pub const MAX_SERIAL_BYTES: usize = 64;

const _: () = assert!(inquiry::VENDOR.len() + MAX_SERIAL_BYTES <= u8::MAX as usize);

/// By what a guest recognises this disk again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Printable ASCII, at most [`MAX_SERIAL_BYTES`].
    pub serial: String,
    /// NAA 3h, locally assigned (SPC-4 7.8.6.6.4): stable for the controller, the unit and the serial number.
    pub naa: u64,
}

impl Identity {
    /// The identity of unit `lun` of the controller with the instance GUID `instance`. Characters that SPC-4 4.4.1
    /// does not allow in ASCII fields are replaced, and what is too long is cut.
    pub fn new(serial: &str, instance: [u8; 16], lun: u8) -> Self {
        let serial: String = serial
            .chars()
            .map(|c| if (' '..='~').contains(&c) { c } else { '_' })
            .take(MAX_SERIAL_BYTES)
            .collect();
        // FNV-1a, 64 bits: only has to spread, nobody gains by a collision on a disk of his own.
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        for byte in instance.iter().chain([&lun]).chain(serial.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
        Self {
            serial,
            naa: (hash & (u64::MAX >> 4)) | (3 << 60),
        }
    }
}

/// What a unit can take at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Power of two, at least [`BLOCK_BYTES`].
    pub physical_block_bytes: u32,
    /// Most blocks of one READ or WRITE.
    pub max_transfer_blocks: u32,
    /// `None`: the medium cannot deallocate.
    pub unmap: Option<UnmapLimits>,
}

/// Limits of UNMAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmapLimits {
    /// Most blocks of one command, all descriptors together.
    pub max_blocks: u32,
    /// Most descriptors of one command.
    pub max_descriptors: u32,
    /// Deallocating less than this frees nothing.
    pub granularity_blocks: u32,
}

/// Bytes of the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// From the medium's beginning.
    pub offset_bytes: u64,
    /// Length.
    pub len_bytes: u64,
}

/// What to do for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Done, no data.
    Good,
    /// Done: these bytes go to the guest, cut to what the guest allocated.
    Data(Vec<u8>),
    /// Read the extent into the guest's pages.
    Read(Extent),
    /// Write the guest's pages to the extent.
    Write {
        /// Where to.
        extent: Extent,
        /// Stable before it is answered.
        durable: bool,
    },
    /// Make all completed writes stable.
    Flush,
    /// Copy so many bytes from the guest and give them to [`Disk::on_unmap_list`].
    FetchUnmapList {
        /// Length of the parameter list.
        bytes: u32,
    },
    /// Refused.
    Check(Sense),
}

/// One logical unit.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Serial number and designators.
    pub identity: Identity,
    /// What it can take at once.
    pub limits: Limits,
    /// Capacity.
    pub block_count: u64,
    /// Write protection and write cache.
    pub mode: ModeState,
}

impl Disk {
    /// What to do for `command`. REPORT LUNS is the target's business and is refused here.
    pub fn on_command(&self, command: &Command) -> Action {
        match *command {
            Command::TestUnitReady | Command::StartStopUnit => Action::Good,
            Command::RequestSense {
                descriptor_format: true,
                ..
            } => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            Command::RequestSense { allocation_bytes, .. } => {
                data(Sense::NONE.fixed_format().to_vec(), allocation_bytes)
            }
            Command::Inquiry {
                vital_page,
                page_code,
                allocation_bytes,
            } => self.inquiry(vital_page, page_code, allocation_bytes),
            Command::ModeSense {
                long_header,
                page_control,
                page_code,
                subpage_code,
                allocation_bytes,
            } => data(
                mode::sense(long_header, page_control, page_code, subpage_code, self.mode),
                allocation_bytes,
            ),
            Command::LogSense {
                page_code,
                subpage_code,
                allocation_bytes,
            } => match mode::log_page(page_code, subpage_code) {
                Some(page) => data(page, allocation_bytes),
                None => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            },
            Command::SendDiagnostic {
                self_test: true,
                self_test_code: 0,
                parameter_bytes: 0,
            } => Action::Good,
            Command::SendDiagnostic { .. } => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            Command::ReadCapacity10 => Action::Data(inquiry::capacity_10(self.block_count)),
            Command::ReadCapacity16 { allocation_bytes } => data(
                inquiry::capacity_16(self.block_count, &self.limits),
                allocation_bytes,
            ),
            Command::Read(transfer) => match self.extent_of(&transfer) {
                Ok(None) => Action::Good,
                Ok(Some(extent)) => Action::Read(extent),
                Err(sense) => Action::Check(sense),
            },
            Command::Write(transfer) => self.write(&transfer),
            Command::SynchronizeCache { lba, block_count } => {
                // The whole file is flushed: there is no range of fdatasync.
                match self.in_range(lba, block_count) {
                    Ok(()) => Action::Flush,
                    Err(sense) => Action::Check(sense),
                }
            }
            Command::Unmap {
                anchor,
                parameter_bytes,
            } => self.unmap(anchor, parameter_bytes),
            Command::ReportLuns { .. } | Command::UnknownServiceAction { .. } | Command::Unknown(_) => {
                Action::Check(Sense::INVALID_OPCODE)
            }
        }
    }

    /// UNMAP's parameter list (SBC-3 5.28.2), copied from the guest once. Gives what to deallocate.
    pub fn on_unmap_list(&self, list: &[u8]) -> Result<Vec<Extent>, Sense> {
        let Some(limits) = &self.limits.unmap else {
            return Err(Sense::INVALID_OPCODE);
        };
        let Some((header, descriptors)) = list.split_first_chunk::<8>() else {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        };
        let told = usize::from(u16::from_be_bytes([header[2], header[3]]));
        // A descriptor that is not there as a whole is ignored.
        let present = told.min(descriptors.len()) / 16;
        if present > limits.max_descriptors as usize {
            return Err(Sense::INVALID_FIELD_IN_PARAMETERS);
        }
        let mut extents = Vec::with_capacity(present);
        let mut total = 0u64;
        for descriptor in descriptors.chunks_exact(16).take(present) {
            let lba = be_u64(descriptor, 0);
            let block_count = be_u64(descriptor, 8) >> 32;
            self.in_range(lba, block_count)?;
            total += block_count;
            if total > u64::from(limits.max_blocks) {
                return Err(Sense::INVALID_FIELD_IN_PARAMETERS);
            }
            if block_count > 0 {
                extents.push(extent(lba, block_count).ok_or(Sense::LBA_OUT_OF_RANGE)?);
            }
        }
        Ok(extents)
    }

    fn inquiry(&self, vital_page: Option<u8>, page_code: u8, allocation_bytes: u32) -> Action {
        match vital_page {
            Some(page) => match inquiry::vital_page(page, &self.identity, &self.limits) {
                Some(bytes) => data(bytes, allocation_bytes),
                None => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            },
            None if page_code != 0 => Action::Check(Sense::INVALID_FIELD_IN_CDB),
            None => data(inquiry::standard(), allocation_bytes),
        }
    }

    fn write(&self, transfer: &Transfer) -> Action {
        if self.mode.read_only {
            return Action::Check(Sense::WRITE_PROTECTED);
        }
        match self.extent_of(transfer) {
            Ok(None) => Action::Good,
            Ok(Some(extent)) => {
                // Without a write cache the guest never flushes: each write is stable when it is answered.
                Action::Write {
                    extent,
                    durable: transfer.fua || !self.mode.write_cache,
                }
            }
            Err(sense) => Action::Check(sense),
        }
    }

    fn unmap(&self, anchor: bool, parameter_bytes: u32) -> Action {
        let Some(limits) = &self.limits.unmap else {
            return Action::Check(Sense::INVALID_OPCODE);
        };
        if self.mode.read_only {
            return Action::Check(Sense::WRITE_PROTECTED);
        }
        // There are no anchored blocks (page 0xB2 has no ANC_SUP).
        if anchor {
            return Action::Check(Sense::INVALID_FIELD_IN_CDB);
        }
        if parameter_bytes == 0 {
            return Action::Good;
        }
        let longest = limits.max_descriptors.saturating_mul(16).saturating_add(8);
        if parameter_bytes > longest {
            return Action::Check(Sense::PARAMETER_LIST_LENGTH_ERROR);
        }
        Action::FetchUnmapList {
            bytes: parameter_bytes,
        }
    }

    /// The bytes that a READ or WRITE names; `None` if it moves nothing.
    fn extent_of(&self, transfer: &Transfer) -> Result<Option<Extent>, Sense> {
        // The medium has no protection information (SBC-3 table 54).
        if transfer.protect != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        self.in_range(transfer.lba, transfer.block_count)?;
        if transfer.block_count > u64::from(self.limits.max_transfer_blocks) {
            return Err(Sense::INVALID_FIELD_IN_CDB);
        }
        if transfer.block_count == 0 {
            return Ok(None);
        }
        extent(transfer.lba, transfer.block_count)
            .ok_or(Sense::LBA_OUT_OF_RANGE)
            .map(Some)
    }

    fn in_range(&self, lba: u64, block_count: u64) -> Result<(), Sense> {
        match lba.checked_add(block_count) {
            Some(end) if end <= self.block_count => Ok(()),
            _ => Err(Sense::LBA_OUT_OF_RANGE),
        }
    }
}

/// Cuts data to what the guest has allocated for it.
pub(super) fn data(mut bytes: Vec<u8>, allocation_bytes: u32) -> Action {
    bytes.truncate(allocation_bytes as usize);
    Action::Data(bytes)
}

fn extent(lba: u64, block_count: u64) -> Option<Extent> {
    let offset_bytes = lba.checked_mul(u64::from(BLOCK_BYTES))?;
    let len_bytes = block_count.checked_mul(u64::from(BLOCK_BYTES))?;
    Some(Extent {
        offset_bytes,
        len_bytes,
    })
}

/// A big-endian number at `at`; bytes beyond the end read as zero.
fn be_u64(bytes: &[u8], at: usize) -> u64 {
    (0..8).fold(0, |value, i| {
        (value << 8) | u64::from(bytes.get(at + i).copied().unwrap_or(0))
    })
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
