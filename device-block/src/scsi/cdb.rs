//! Command descriptor blocks: bytes to [`Command`].
//!
//! Reads only what the guest put into its CDB; what lies beyond the CDB's length reads as zero (guests send a
//! 6-byte CDB with the length 6, and some send 16 always). Unknown opcodes stay representable.

/// A command and its fields, not yet checked against any disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// TEST UNIT READY (SPC-4 6.47).
    TestUnitReady,
    /// REQUEST SENSE (SPC-4 6.39).
    RequestSense {
        /// DESC bit: descriptor format wanted.
        descriptor_format: bool,
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// INQUIRY (SPC-4 6.6).
    Inquiry {
        /// Vital product data page, or `None` for standard data.
        vital_page: Option<u8>,
        /// PAGE CODE without EVPD is an error.
        page_code: u8,
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// MODE SENSE (6) and (10) (SPC-4 6.13, 6.14).
    ModeSense {
        /// The 10-byte form, with the longer header.
        long_header: bool,
        /// 0 current, 1 changeable, 2 default, 3 saved values.
        page_control: u8,
        /// 0x3F: all pages.
        page_code: u8,
        /// 0 or, for all subpages, 0xFF.
        subpage_code: u8,
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// READ CAPACITY (10) (SBC-3 5.15).
    ReadCapacity10,
    /// READ CAPACITY (16) (SBC-3 5.16).
    ReadCapacity16 {
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// REPORT LUNS (SPC-4 6.33).
    ReportLuns {
        /// SELECT REPORT.
        select_report: u8,
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// READ (6), (10), (12), (16) (SBC-3 5.10 to 5.13).
    Read(Transfer),
    /// WRITE (6), (10), (12), (16) (SBC-3 5.32 to 5.35).
    Write(Transfer),
    /// SYNCHRONIZE CACHE (10) and (16) (SBC-3 5.26, 5.27).
    SynchronizeCache {
        /// First block.
        lba: u64,
        /// Blocks; 0: to the end.
        block_count: u64,
    },
    /// UNMAP (SBC-3 5.28).
    Unmap {
        /// ANCHOR bit.
        anchor: bool,
        /// Bytes of parameter list that the guest sends.
        parameter_bytes: u32,
    },
    /// START STOP UNIT (SBC-3 5.25).
    StartStopUnit,
    /// LOG SENSE (SPC-4 6.8).
    LogSense {
        /// PAGE CODE.
        page_code: u8,
        /// SUBPAGE CODE.
        subpage_code: u8,
        /// Most bytes to return.
        allocation_bytes: u32,
    },
    /// SEND DIAGNOSTIC (SPC-4 6.42).
    SendDiagnostic {
        /// SELFTEST bit: the default self-test.
        self_test: bool,
        /// SELF-TEST CODE.
        self_test_code: u8,
        /// Bytes of parameter list.
        parameter_bytes: u32,
    },
    /// A service action of a known opcode that we do not have.
    UnknownServiceAction {
        /// Operation code.
        opcode: u8,
        /// Service action.
        action: u8,
    },
    /// An operation code that we do not have.
    Unknown(u8),
}

/// Fields of READ and WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub block_count: u64,
    /// Force unit access: stable before the answer.
    pub fua: bool,
    /// RDPROTECT or WRPROTECT: protection information wanted.
    pub protect: u8,
}

/// Operation codes (SPC-4 annex E.3.1, SBC-3 table 24).
pub mod opcode {
    #![allow(missing_docs)]
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0A;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1A;
    pub const START_STOP_UNIT: u8 = 0x1B;
    pub const SEND_DIAGNOSTIC: u8 = 0x1D;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2A;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const LOG_SENSE: u8 = 0x4D;
    pub const MODE_SENSE_10: u8 = 0x5A;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8A;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9E;
    pub const REPORT_LUNS: u8 = 0xA0;
    pub const READ_12: u8 = 0xA8;
    pub const WRITE_12: u8 = 0xAA;
}

/// Service action of SERVICE ACTION IN (16) (SBC-3 table 24).
pub const SERVICE_ACTION_READ_CAPACITY_16: u8 = 0x10;

impl Command {
    /// Reads a CDB of 1 to 16 bytes.
    pub fn parse(cdb: &[u8]) -> Self {
        let cdb = Fields::new(cdb);
        match cdb.u8(0) {
            opcode::TEST_UNIT_READY => Self::TestUnitReady,
            opcode::REQUEST_SENSE => Self::RequestSense {
                descriptor_format: cdb.bit(1, 0),
                allocation_bytes: cdb.u8(4).into(),
            },
            opcode::INQUIRY => Self::Inquiry {
                vital_page: cdb.bit(1, 0).then_some(cdb.u8(2)),
                page_code: cdb.u8(2),
                allocation_bytes: cdb.u16(3).into(),
            },
            opcode::MODE_SENSE_6 => cdb.mode_sense(false, cdb.u8(4).into()),
            opcode::MODE_SENSE_10 => cdb.mode_sense(true, cdb.u16(7).into()),
            opcode::START_STOP_UNIT => Self::StartStopUnit,
            opcode::SEND_DIAGNOSTIC => Self::SendDiagnostic {
                self_test: cdb.bit(1, 2),
                self_test_code: cdb.u8(1) >> 5,
                parameter_bytes: cdb.u16(3).into(),
            },
            opcode::READ_CAPACITY_10 => Self::ReadCapacity10,
            opcode::SERVICE_ACTION_IN_16 => match cdb.u8(1) & 0x1F {
                SERVICE_ACTION_READ_CAPACITY_16 => Self::ReadCapacity16 {
                    allocation_bytes: cdb.u32(10),
                },
                action => Self::UnknownServiceAction {
                    opcode: cdb.u8(0),
                    action,
                },
            },
            opcode::REPORT_LUNS => Self::ReportLuns {
                select_report: cdb.u8(2),
                allocation_bytes: cdb.u32(6),
            },
            opcode::READ_6 => Self::Read(cdb.transfer_6()),
            opcode::WRITE_6 => Self::Write(cdb.transfer_6()),
            opcode::READ_10 => Self::Read(cdb.transfer(cdb.u32(2).into(), cdb.u16(7).into())),
            opcode::WRITE_10 => Self::Write(cdb.transfer(cdb.u32(2).into(), cdb.u16(7).into())),
            opcode::READ_12 => Self::Read(cdb.transfer(cdb.u32(2).into(), cdb.u32(6).into())),
            opcode::WRITE_12 => Self::Write(cdb.transfer(cdb.u32(2).into(), cdb.u32(6).into())),
            opcode::READ_16 => Self::Read(cdb.transfer(cdb.u64(2), cdb.u32(10).into())),
            opcode::WRITE_16 => Self::Write(cdb.transfer(cdb.u64(2), cdb.u32(10).into())),
            opcode::SYNCHRONIZE_CACHE_10 => Self::SynchronizeCache {
                lba: cdb.u32(2).into(),
                block_count: cdb.u16(7).into(),
            },
            opcode::SYNCHRONIZE_CACHE_16 => Self::SynchronizeCache {
                lba: cdb.u64(2),
                block_count: cdb.u32(10).into(),
            },
            opcode::UNMAP => Self::Unmap {
                anchor: cdb.bit(1, 0),
                parameter_bytes: cdb.u16(7).into(),
            },
            opcode::LOG_SENSE => Self::LogSense {
                page_code: cdb.u8(2) & 0x3F,
                subpage_code: cdb.u8(3),
                allocation_bytes: cdb.u16(7).into(),
            },
            other => Self::Unknown(other),
        }
    }
}

/// A CDB extended by zeroes to its greatest length, so that no field can lie outside it.
struct Fields([u8; 16]);

impl Fields {
    fn new(cdb: &[u8]) -> Self {
        let mut bytes = [0u8; 16];
        for (to, from) in bytes.iter_mut().zip(cdb) {
            *to = *from;
        }
        Self(bytes)
    }

    /// The byte at `at`; 0 beyond the end (all callers pass constants inside it).
    fn u8(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn bit(&self, at: usize, bit: u32) -> bool {
        self.u8(at) & (1 << bit) != 0
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.u8(at), self.u8(at + 1)])
    }

    fn u32(&self, at: usize) -> u32 {
        (u32::from(self.u16(at)) << 16) | u32::from(self.u16(at + 2))
    }

    fn u64(&self, at: usize) -> u64 {
        (u64::from(self.u32(at)) << 32) | u64::from(self.u32(at + 4))
    }

    fn mode_sense(&self, long_header: bool, allocation_bytes: u32) -> Command {
        Command::ModeSense {
            long_header,
            page_control: self.u8(2) >> 6,
            page_code: self.u8(2) & 0x3F,
            subpage_code: self.u8(3),
            allocation_bytes,
        }
    }

    /// The 6-byte forms: 21 bits of address, and a length of 0 means 256 blocks (SBC-3 5.10).
    fn transfer_6(&self) -> Transfer {
        let lba = (u64::from(self.u8(1) & 0x1F) << 16) | u64::from(self.u16(2));
        let block_count = match self.u8(4) {
            0 => 256,
            count => count.into(),
        };
        Transfer {
            lba,
            block_count,
            fua: false,
            protect: 0,
        }
    }

    fn transfer(&self, lba: u64, block_count: u64) -> Transfer {
        Transfer {
            lba,
            block_count,
            fua: self.bit(1, 3),
            protect: self.u8(1) >> 5,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_lengths_of_read_give_address_and_count() {
        let cases: [(&[u8], u64, u64); 4] = [
            (&[0x08, 0xE1, 0x02, 0x03, 0x04, 0], 0x1_0203, 4),
            (&[0x28, 0, 1, 2, 3, 4, 0, 0x12, 0x34, 0], 0x0102_0304, 0x1234),
            (
                &[0xA8, 0, 1, 2, 3, 4, 0x11, 0x12, 0x13, 0x14, 0, 0],
                0x0102_0304,
                0x1112_1314,
            ),
            (
                &[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0x21, 0x22, 0x23, 0x24, 0, 0],
                0x0102_0304_0506_0708,
                0x2122_2324,
            ),
        ];
        for (cdb, lba, block_count) in cases {
            assert_eq!(
                Command::parse(cdb),
                Command::Read(Transfer {
                    lba,
                    block_count,
                    fua: false,
                    protect: 0
                })
            );
        }
    }

    #[test]
    fn a_six_byte_transfer_of_length_0_means_256_blocks() {
        let Command::Write(transfer) = Command::parse(&[0x0A, 0, 0, 1, 0, 0]) else {
            panic!("not a write")
        };
        assert_eq!(transfer.block_count, 256);
    }

    #[test]
    fn fua_and_protection_bits_are_seen() {
        let Command::Write(transfer) = Command::parse(&[0x2A, 0x28, 0, 0, 0, 0, 0, 0, 1, 0]) else {
            panic!("not a write")
        };
        assert!(transfer.fua);
        assert_eq!(transfer.protect, 1);
    }

    #[test]
    fn read_capacity_16_is_a_service_action() {
        let cdb = [0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        assert_eq!(
            Command::parse(&cdb),
            Command::ReadCapacity16 { allocation_bytes: 32 }
        );
        assert_eq!(
            Command::parse(&[0x9E, 0x12]),
            Command::UnknownServiceAction {
                opcode: 0x9E,
                action: 0x12
            }
        );
    }

    #[test]
    fn what_we_do_not_have_is_unknown() {
        for opcode in [0x41u8, 0x93, 0x85, 0xA1, 0x5E, 0x5F, 0x89, 0x15, 0x55, 0xA3, 0xFF] {
            assert_eq!(Command::parse(&[opcode]), Command::Unknown(opcode));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic(cdb in proptest::collection::vec(any::<u8>(), 0..20)) {
            let _command = Command::parse(&cdb);
        }
    }
}
