//! Sense data: why a command was refused or failed.

/// Sense keys that we use (SPC-4 table 53).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SenseKey {
    /// Nothing to report.
    NoSense = 0x0,
    /// The medium could not be read or written.
    MediumError = 0x3,
    /// We failed, not the medium and not the guest.
    HardwareError = 0x4,
    /// The command makes no sense here.
    IllegalRequest = 0x5,
    /// The medium does not take writes.
    DataProtect = 0x7,
    /// Worth another try; Linux tries five times.
    AbortedCommand = 0xB,
}

/// Bytes of fixed-format sense data that we send: up to and with the field-replaceable unit and the sense-key
/// specific bytes (SPC-4 4.5.3), and no more than storvsp's 20.
pub const SENSE_DATA_BYTES: usize = 18;

/// A sense key with its additional sense code and qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: SenseKey,
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

impl Sense {
    const fn new(key: SenseKey, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// NO ADDITIONAL SENSE INFORMATION.
    pub const NONE: Self = Self::new(SenseKey::NoSense, 0x00, 0x00);
    /// INVALID COMMAND OPERATION CODE (SPC-4 4.3.2).
    pub const INVALID_OPCODE: Self = Self::new(SenseKey::IllegalRequest, 0x20, 0x00);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE (SBC-3 4.5).
    pub const LBA_OUT_OF_RANGE: Self = Self::new(SenseKey::IllegalRequest, 0x21, 0x00);
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD_IN_CDB: Self = Self::new(SenseKey::IllegalRequest, 0x24, 0x00);
    /// PARAMETER LIST LENGTH ERROR (SBC-3 5.28.1 for UNMAP).
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = Self::new(SenseKey::IllegalRequest, 0x1A, 0x00);
    /// INVALID FIELD IN PARAMETER LIST (SBC-3 5.28.2 for UNMAP).
    pub const INVALID_FIELD_IN_PARAMETERS: Self = Self::new(SenseKey::IllegalRequest, 0x26, 0x00);
    /// WRITE PROTECTED (SBC-3 4.12).
    pub const WRITE_PROTECTED: Self = Self::new(SenseKey::DataProtect, 0x27, 0x00);
    /// SPACE ALLOCATION FAILED WRITE PROTECT (SBC-3 4.7.3.6): the host has no room for a thinly provisioned
    /// block. Linux turns it into ENOSPC for the guest's file system.
    pub const SPACE_ALLOCATION_FAILED: Self = Self::new(SenseKey::DataProtect, 0x27, 0x07);
    /// UNRECOVERED READ ERROR (SBC-3 4.18).
    pub const UNRECOVERED_READ_ERROR: Self = Self::new(SenseKey::MediumError, 0x11, 0x00);
    /// WRITE ERROR (SBC-3 4.18).
    pub const WRITE_ERROR: Self = Self::new(SenseKey::MediumError, 0x0C, 0x00);
    /// INTERNAL TARGET FAILURE.
    pub const INTERNAL_FAILURE: Self = Self::new(SenseKey::HardwareError, 0x44, 0x00);
    /// INSUFFICIENT RESOURCES: the host was out of memory for a moment.
    pub const INSUFFICIENT_RESOURCES: Self = Self::new(SenseKey::AbortedCommand, 0x55, 0x03);

    /// Fixed-format sense data, current error (SPC-4 4.5.3). The information field stays invalid: Linux would
    /// take the blocks before the address in it for good.
    pub fn fixed_format(self) -> [u8; SENSE_DATA_BYTES] {
        let mut data = [0u8; SENSE_DATA_BYTES];
        data[0] = 0x70;
        data[2] = self.key as u8;
        // ADDITIONAL SENSE LENGTH: bytes after byte 7.
        data[7] = (SENSE_DATA_BYTES - 8) as u8;
        data[12] = self.asc;
        data[13] = self.ascq;
        data
    }
}

/// What was tried on the medium when the host failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Reading data.
    Read,
    /// Writing data, or making written data durable.
    Write,
    /// Deallocating.
    Unmap,
}

/// Why the backend failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediumFault {
    /// The host's kernel answered this errno.
    #[error("errno {0}")]
    Errno(i32),
    /// The file ends before the data does: somebody has cut it since we opened it.
    #[error("the file has become shorter")]
    ShortFile,
    /// The kernel gave the same request back more often than we try.
    #[error("the request was given back too often")]
    GivenBack,
}

/// The sense data for a fault of the host.
pub fn for_fault(attempt: Attempt, fault: MediumFault) -> Sense {
    let errno = match fault {
        MediumFault::Errno(errno) => errno,
        MediumFault::ShortFile => libc::EIO,
        MediumFault::GivenBack => return Sense::INTERNAL_FAILURE,
    };
    match (attempt, errno) {
        (_, libc::ENOMEM) => Sense::INSUFFICIENT_RESOURCES,
        // A bug of ours or a memory area that was taken away: the medium is not to blame.
        (_, libc::EFAULT | libc::EINVAL) => Sense::INTERNAL_FAILURE,
        (Attempt::Write | Attempt::Unmap, libc::ENOSPC | libc::EDQUOT) => Sense::SPACE_ALLOCATION_FAILED,
        (Attempt::Write | Attempt::Unmap, libc::EROFS | libc::EPERM) => Sense::WRITE_PROTECTED,
        (Attempt::Write | Attempt::Unmap, _) => Sense::WRITE_ERROR,
        (Attempt::Read, _) => Sense::UNRECOVERED_READ_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_has_key_and_codes_where_linux_reads_them() {
        let data = Sense::SPACE_ALLOCATION_FAILED.fixed_format();
        assert_eq!(
            data,
            [0x70, 0, 7, 0, 0, 0, 0, 0x0A, 0, 0, 0, 0, 0x27, 0x07, 0, 0, 0, 0]
        );
    }

    #[test]
    fn errnos_become_the_sense_that_tells_the_guest_what_to_do() {
        let cases = [
            (Attempt::Read, libc::EIO, (3, 0x11, 0)),
            (Attempt::Read, libc::EBADF, (3, 0x11, 0)),
            (Attempt::Write, libc::EIO, (3, 0x0C, 0)),
            (Attempt::Write, libc::EBADF, (3, 0x0C, 0)),
            (Attempt::Write, libc::EFBIG, (3, 0x0C, 0)),
            (Attempt::Write, libc::ENOSPC, (7, 0x27, 7)),
            (Attempt::Write, libc::EDQUOT, (7, 0x27, 7)),
            (Attempt::Write, libc::EROFS, (7, 0x27, 0)),
            (Attempt::Unmap, libc::ENOSPC, (7, 0x27, 7)),
            (Attempt::Read, libc::ENOMEM, (0xB, 0x55, 3)),
            (Attempt::Write, libc::EFAULT, (4, 0x44, 0)),
        ];
        for (attempt, errno, (key, asc, ascq)) in cases {
            let sense = for_fault(attempt, MediumFault::Errno(errno));
            assert_eq!(
                (sense.key as u8, sense.asc, sense.ascq),
                (key, asc, ascq),
                "{attempt:?} {errno}"
            );
        }
        assert_eq!(
            for_fault(Attempt::Read, MediumFault::ShortFile),
            Sense::UNRECOVERED_READ_ERROR
        );
        assert_eq!(
            for_fault(Attempt::Write, MediumFault::GivenBack),
            Sense::INTERNAL_FAILURE
        );
    }
}
