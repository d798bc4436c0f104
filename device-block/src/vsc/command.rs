//! SCSI commands as a driver sends them, and their answers.

use crate::scsi::cdb::{SERVICE_ACTION_READ_CAPACITY_16, opcode};
use crate::scsi::disk::BLOCK_BYTES;
use crate::storvsp::wire::{Operation, ScsiRequest, VstorPacket};
use vmbus::mem::Gpa;
use zerocopy::{FromZeros, IntoBytes};

/// Where a command's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// It has none.
    None,
    /// The device writes so many bytes here.
    ToGuest(Gpa, u32),
    /// The device reads so many bytes here.
    FromGuest(Gpa, u32),
}

impl Data {
    /// The range of guest memory, if there is one.
    pub fn range(self) -> Option<(Gpa, u32)> {
        match self {
            Self::None => None,
            Self::ToGuest(gpa, bytes) | Self::FromGuest(gpa, bytes) => Some((gpa, bytes)),
        }
    }

    /// `data_in` of the SRB.
    fn direction(self) -> u8 {
        match self {
            Self::FromGuest(..) => 0,
            Self::ToGuest(..) => 1,
            Self::None => 2,
        }
    }
}

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Logical unit, on bus 0, target 0.
    pub lun: u8,
    /// Up to 16 bytes.
    pub cdb: Vec<u8>,
    /// Its data.
    pub data: Data,
}

impl Command {
    /// Any command.
    pub fn new(lun: u8, cdb: &[u8], data: Data) -> Self {
        Self {
            lun,
            cdb: cdb.to_vec(),
            data,
        }
    }

    /// READ (16) of `bytes` at `offset_bytes`, both multiples of 512.
    pub fn read(lun: u8, offset_bytes: u64, gpa: Gpa, bytes: u32) -> Self {
        Self::new(
            lun,
            &transfer(opcode::READ_16, 0, offset_bytes, bytes),
            Data::ToGuest(gpa, bytes),
        )
    }

    /// WRITE (16).
    pub fn write(lun: u8, offset_bytes: u64, gpa: Gpa, bytes: u32) -> Self {
        Self::new(
            lun,
            &transfer(opcode::WRITE_16, 0, offset_bytes, bytes),
            Data::FromGuest(gpa, bytes),
        )
    }

    /// WRITE (16) with FUA.
    pub fn write_durable(lun: u8, offset_bytes: u64, gpa: Gpa, bytes: u32) -> Self {
        Self::new(
            lun,
            &transfer(opcode::WRITE_16, 8, offset_bytes, bytes),
            Data::FromGuest(gpa, bytes),
        )
    }

    /// SYNCHRONIZE CACHE (10) of everything.
    pub fn flush(lun: u8) -> Self {
        Self::new(
            lun,
            &[opcode::SYNCHRONIZE_CACHE_10, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            Data::None,
        )
    }

    /// INQUIRY, of a vital page if there is one.
    pub fn inquiry(lun: u8, page: Option<u8>, gpa: Gpa, bytes: u16) -> Self {
        let [high, low] = bytes.to_be_bytes();
        let cdb = [
            opcode::INQUIRY,
            page.is_some().into(),
            page.unwrap_or(0),
            high,
            low,
            0,
        ];
        Self::new(lun, &cdb, Data::ToGuest(gpa, bytes.into()))
    }

    /// READ CAPACITY (16), 32 bytes.
    pub fn read_capacity(lun: u8, gpa: Gpa) -> Self {
        let mut cdb = [0u8; 16];
        cdb[0] = opcode::SERVICE_ACTION_IN_16;
        cdb[1] = SERVICE_ACTION_READ_CAPACITY_16;
        cdb[13] = 32;
        Self::new(lun, &cdb, Data::ToGuest(gpa, 32))
    }

    /// UNMAP; the caller has put [`Command::unmap_list`] at `gpa`.
    pub fn unmap(lun: u8, gpa: Gpa, list_bytes: u16) -> Self {
        let [high, low] = list_bytes.to_be_bytes();
        let cdb = [opcode::UNMAP, 0, 0, 0, 0, 0, 0, high, low, 0];
        Self::new(lun, &cdb, Data::FromGuest(gpa, list_bytes.into()))
    }

    /// A parameter list of UNMAP: offsets and lengths in bytes.
    pub fn unmap_list(extents: &[(u64, u32)]) -> Vec<u8> {
        let bytes = (extents.len() * 16) as u16;
        let mut list = [(bytes + 6).to_be_bytes(), bytes.to_be_bytes(), [0; 2], [0; 2]].concat();
        for (offset_bytes, len_bytes) in extents {
            list.extend_from_slice(&(offset_bytes / u64::from(BLOCK_BYTES)).to_be_bytes());
            list.extend_from_slice(&(len_bytes / BLOCK_BYTES).to_be_bytes());
            list.extend_from_slice(&[0; 4]);
        }
        list
    }

    /// The storvsp packet.
    pub fn packet(&self) -> VstorPacket {
        let mut srb = ScsiRequest::new_zeroed();
        srb.length = (size_of::<ScsiRequest>() as u16).into();
        srb.lun = self.lun;
        srb.cdb_length = self.cdb.len() as u8;
        srb.sense_info_length = srb.payload.len() as u8;
        srb.data_in = self.data.direction();
        srb.data_transfer_length = self.data.range().map_or(0, |(_, bytes)| bytes).into();
        for (to, from) in srb.payload.iter_mut().zip(&self.cdb) {
            *to = *from;
        }
        // Quirk(Linux 6.1 storvsc): simple queue action, no tag, 60 s.
        srb.queue_tag = 0xFF;
        srb.queue_action = 0x20;
        srb.timeout_seconds = 60.into();
        let mut packet = VstorPacket::with_body(Operation::ExecuteSrb, srb.as_bytes());
        packet.header.flags = 1.into();
        packet
    }
}

fn transfer(opcode: u8, flags: u8, offset_bytes: u64, bytes: u32) -> [u8; 16] {
    let mut cdb = [0u8; 16];
    cdb[0] = opcode;
    cdb[1] = flags;
    cdb[2..10].copy_from_slice(&(offset_bytes / u64::from(BLOCK_BYTES)).to_be_bytes());
    cdb[10..14].copy_from_slice(&(bytes / BLOCK_BYTES).to_be_bytes());
    cdb
}

/// What Linux reads of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// NTSTATUS of the packet.
    pub packet_status: u32,
    /// SRB status, flags included.
    pub srb_status: u8,
    /// SAM status.
    pub scsi_status: u8,
    /// Bytes moved.
    pub bytes: u32,
    /// Key, additional code and qualifier, if the completion carries sense data that Linux would take.
    pub sense: Option<(u8, u8, u8)>,
}

impl Reply {
    pub(super) fn new(packet: &VstorPacket) -> Self {
        let srb = packet.scsi_request();
        // Quirk(Linux 6.1 storvsc): sense counts only with CHECK CONDITION and the autosense bit.
        let autosense = srb.srb_status & 0x80 != 0 && srb.scsi_status == 2 && srb.sense_info_length >= 14;
        Self {
            packet_status: packet.header.status.get(),
            srb_status: srb.srb_status,
            scsi_status: srb.scsi_status,
            bytes: srb.data_transfer_length.get(),
            sense: autosense.then_some((srb.payload[2] & 0xF, srb.payload[12], srb.payload[13])),
        }
    }

    /// Success, and so many bytes moved.
    pub fn is_good(&self, bytes: u32) -> bool {
        (self.packet_status, self.srb_status, self.scsi_status, self.bytes) == (0, 1, 0, bytes)
    }

    /// CHECK CONDITION with this sense, in the form that Linux reads.
    pub fn is_check(&self, key: u8, asc: u8, ascq: u8) -> bool {
        (self.packet_status, self.srb_status, self.sense) == (0, 0x84, Some((key, asc, ascq)))
    }
}
