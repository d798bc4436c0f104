//! Start-up, control and shutdown, in the order of Linux 6.1 (drivers/net/hyperv/netvsc.c, rndis_filter.c).

use super::traffic::{Outgoing, ReceivedFrame};
use super::wrong;
use crate::netvsp::wire::{
    GuestMessage, HostMessage, NvspStatus, NvspVersion, RECEIVE_BUFFER_ID, RndisKind, SUBCHANNEL_ALLOCATE,
};
use crate::rndis::oid;
use crate::rndis::wire::{OidRequest, emit_message, number};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;
use vmbus::mem::{Gpa, GuestRam, PAGE_BYTES, PagedArea};
use vmbus::ring::PacketBuf;
use vmbus::vsc::{ChannelOptions, GuestChannel, SyntheticGuest, VscError};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

/// How the driver behaves.
#[derive(Clone, Copy, Debug)]
pub struct DriverOptions {
    pub version: NvspVersion,
    /// MTU without Ethernet header.
    pub mtu: u32,
    /// Pages of the receive and the send buffer: Linux 4096 and 256.
    pub receive_pages: usize,
    pub send_pages: usize,
    /// Pages of each ring: Linux 128.
    pub ring_pages: u32,
    /// Channels wanted, the primary included.
    pub queues: u16,
    /// The receive buffer's pages are not in order, as in a guest that runs for a while.
    pub scattered: bool,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            version: NvspVersion::V6_1,
            mtu: 1500,
            receive_pages: 4096,
            send_pages: 256,
            ring_pages: 128,
            queues: 1,
            scattered: true,
        }
    }
}

/// What the server said of the NIC during start-up.
#[derive(Clone, Debug, Default)]
pub struct Nic {
    pub mac: [u8; 6],
    /// The smaller of what was wanted and what is offered.
    pub mtu: u32,
    pub link_up: bool,
    /// The offload capabilities, whole.
    pub offloads: Vec<u8>,
    pub receive_queues: u32,
}

/// The driver of one NIC.
#[derive(Debug)]
pub struct Driver {
    /// The primary first.
    pub channels: Vec<GuestChannel>,
    pub nic: Nic,
    pub suballocation_bytes: u32,
    pub suballocation_count: u32,
    pub section_bytes: u32,
    /// Whether received packets are given back as soon as they are read.
    pub give_back: bool,
    /// Packets of frames that were read and not given back: channel, transaction id.
    pub unreturned: Vec<(usize, u64)>,
    /// Frames that were received and not asked for.
    pub frames: VecDeque<ReceivedFrame>,
    /// Messages on the link's state.
    pub indications: Vec<u32>,
    /// Statuses of packets that were completed.
    pub completed: Vec<u32>,
    pub(super) ram: GuestRam,
    pub(super) receive_area: PagedArea,
    pub(super) send_area: Gpa,
    pub(super) free_sections: Vec<u32>,
    pub(super) free_pages: Vec<Gpa>,
    pub(super) outstanding: Vec<BTreeMap<u64, Outgoing>>,
    /// Sub-allocations with us, each by its offset.
    pub(super) held: BTreeSet<u32>,
    /// Offsets and lengths in the receive buffer.
    pub(super) held_by_packet: BTreeMap<(usize, u64), Vec<(u32, u32)>>,
    /// Answers to control messages that nobody took yet.
    pub responses: VecDeque<Vec<u8>>,
    pub(super) packet_buf: PacketBuf,
    receive_gpadl: u32,
    send_gpadl: u32,
    memory: Memory,
    request_page: Gpa,
    next_request: u32,
}

#[derive(Clone, Copy, Debug)]
struct Memory {
    receive: Gpa,
    receive_pages: usize,
    send: Gpa,
    send_pages: usize,
}

/// Pages for frames that do not lie in the send buffer.
const FRAME_PAGES: usize = 512;

impl Driver {
    /// Opens the NIC up to, not including, the packet filter.
    pub fn open(
        guest: &mut SyntheticGuest,
        options: DriverOptions,
        deadline: Instant,
    ) -> Result<Self, VscError> {
        let channel_options = ChannelOptions {
            ring_pages: options.ring_pages,
            ..ChannelOptions::default()
        };
        let primary = guest.open_channel(channel_options)?;
        Self::open_on(guest, primary, options, deadline)
    }

    /// The same on a channel that was opened already.
    pub fn open_on(
        guest: &mut SyntheticGuest,
        mut primary: GuestChannel,
        options: DriverOptions,
        deadline: Instant,
    ) -> Result<Self, VscError> {
        let init = GuestMessage::Init {
            min: options.version,
            max: options.version,
        };
        match HostMessage::parse(&primary.call(&[&init.emit()], deadline)?) {
            Some(HostMessage::InitComplete {
                version,
                status: NvspStatus::SUCCESS,
                ..
            }) if version == options.version => {}
            _ => return Err(wrong("agreement on an NVSP version")),
        }
        let quiet = |primary: &mut GuestChannel, message: GuestMessage| -> Result<(), VscError> {
            primary.send_in_band(NO_RESPONSE, false, &[&message.emit()])?;
            primary.flush()
        };
        quiet(
            &mut primary,
            GuestMessage::NdisConfig {
                mtu_bytes: options.mtu + 14,
                capabilities: 8,
            },
        )?;
        quiet(&mut primary, GuestMessage::NdisVersion { major: 6, minor: 30 })?;

        let relid = primary.channel_id();
        let memory = Memory {
            receive: guest.allocate(options.receive_pages)?,
            receive_pages: options.receive_pages,
            send: guest.allocate(options.send_pages)?,
            send_pages: options.send_pages,
        };
        let mut pages = SyntheticGuest::pages_of(memory.receive, options.receive_pages);
        if options.scattered {
            pages.reverse();
        }
        let receive_bytes = (options.receive_pages as u64 * PAGE_BYTES) as u32;
        let receive_gpadl = guest.add_gpadl(relid, &pages, 0, receive_bytes)?;
        let receive_area = guest
            .ram()
            .paged_area(&pages, 0, receive_bytes)
            .map_err(|_| wrong("RAM under the receive buffer"))?;
        let ask = GuestMessage::ReceiveBuffer {
            gpadl: receive_gpadl,
            id: RECEIVE_BUFFER_ID,
        };
        let answer = HostMessage::parse(&primary.call(&[&ask.emit()], deadline)?);
        let Some(HostMessage::ReceiveBufferComplete {
            status: NvspStatus::SUCCESS,
            suballocation_bytes,
            suballocation_count,
        }) = answer
        else {
            return Err(wrong("receive buffer"));
        };
        let send_gpadl = guest.add_gpadl_at(relid, memory.send, options.send_pages)?;
        let ask = GuestMessage::SendBuffer {
            gpadl: send_gpadl,
            id: 0,
        };
        let answer = HostMessage::parse(&primary.call(&[&ask.emit()], deadline)?);
        let Some(HostMessage::SendBufferComplete {
            status: NvspStatus::SUCCESS,
            section_bytes,
        }) = answer
        else {
            return Err(wrong("send buffer"));
        };
        let sections = options.send_pages as u32 * PAGE_BYTES as u32 / section_bytes;
        let frames = guest.allocate(FRAME_PAGES)?;
        let request_page = guest.allocate(1)?;
        let mut driver = Self {
            channels: vec![primary],
            nic: Nic::default(),
            suballocation_bytes,
            suballocation_count,
            section_bytes,
            give_back: true,
            unreturned: Vec::new(),
            frames: VecDeque::new(),
            indications: Vec::new(),
            completed: Vec::new(),
            ram: guest.ram().clone(),
            receive_area,
            send_area: memory.send,
            free_sections: (0..sections).rev().collect(),
            free_pages: (0..FRAME_PAGES as u64)
                .map(|page| Gpa(frames.0 + page * PAGE_BYTES))
                .collect(),
            outstanding: vec![BTreeMap::new()],
            held: BTreeSet::new(),
            held_by_packet: BTreeMap::new(),
            responses: VecDeque::new(),
            packet_buf: PacketBuf::new(),
            receive_gpadl,
            send_gpadl,
            memory,
            request_page,
            next_request: 0,
        };
        driver.start_rndis(options.mtu, deadline)?;
        if options.queues > 1 && driver.nic.receive_queues > 1 {
            driver.open_sub_channels(guest, options, deadline)?;
        }
        Ok(driver)
    }

    fn start_rndis(&mut self, mtu: u32, deadline: Instant) -> Result<(), VscError> {
        let mut body = vec![0; 16];
        body[4] = 1;
        body[12..16].copy_from_slice(&0x4000u32.to_le_bytes());
        let answer = self.rndis(number::INITIALIZE, body, deadline)?;
        if word(&answer, 12) != Some(0) {
            return Err(wrong("RNDIS INITIALIZE with success"));
        }
        let offered = self.query_word(oid::GEN_MAXIMUM_FRAME_SIZE, deadline)?;
        let mac = self.query(oid::PERMANENT_ADDRESS, &[], deadline)?;
        let mac = *mac.first_chunk().ok_or(wrong("permanent address"))?;
        self.query(oid::GEN_FRIENDLY_NAME, &[], deadline)?;
        let mut asked = [0u8; 156];
        asked[..4].copy_from_slice(&[0xA7, 3, 0x9C, 0]);
        let offloads = self.query(oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES, &asked, deadline)?;
        if offloads.len() != 156 {
            return Err(wrong("offload capabilities of 156 bytes"));
        }
        let mut parameters = [0u8; 28];
        parameters[..4].copy_from_slice(&[0x80, 3, 28, 0]);
        parameters[5..9].fill(4);
        self.set(oid::TCP_OFFLOAD_PARAMETERS, &parameters, deadline)?;
        let link_up = self.query_word(oid::GEN_MEDIA_CONNECT_STATUS, deadline)? == 0;
        self.query_word(oid::GEN_LINK_SPEED, deadline)?;
        let scale = self.query(oid::GEN_RECEIVE_SCALE_CAPABILITIES, &[0; 18], deadline)?;
        let receive_queues = word(&scale, 12).ok_or(wrong("receive-scale capabilities"))?;
        self.nic = Nic {
            mac,
            mtu: mtu.min(offered),
            link_up,
            offloads,
            receive_queues,
        };
        Ok(())
    }

    fn open_sub_channels(
        &mut self,
        guest: &mut SyntheticGuest,
        options: DriverOptions,
        deadline: Instant,
    ) -> Result<(), VscError> {
        let wanted = u32::from(options.queues).min(self.nic.receive_queues) - 1;
        let ask = GuestMessage::Subchannel {
            operation: SUBCHANNEL_ALLOCATE,
            count: wanted,
        };
        let answer = HostMessage::parse(&self.channels[0].call(&[&ask.emit()], deadline)?);
        let Some(HostMessage::SubchannelComplete {
            status: NvspStatus::SUCCESS,
            count,
        }) = answer
        else {
            return Err(wrong("sub-channels"));
        };
        if u32::from(guest.wait_sub_channels(deadline)?) != count || count > wanted {
            return Err(wrong("offer of as many sub-channels as were granted"));
        }
        for sub_index in 1..=count as u16 {
            let channel_options = ChannelOptions {
                sub_index,
                ring_pages: options.ring_pages,
                ..ChannelOptions::default()
            };
            self.channels.push(guest.open_channel(channel_options)?);
            self.outstanding.push(BTreeMap::new());
        }
        self.set_steering(true, deadline)?;
        self.set_steering(false, deadline)
    }

    /// RSS parameters with a table that names all channels in turn.
    fn set_steering(&mut self, disable: bool, deadline: Instant) -> Result<(), VscError> {
        const ENTRIES: u32 = 128;
        let mut info = vec![0u8; 40];
        info[..2].copy_from_slice(&[0x89, 2]);
        info[2] = 40;
        info[4..6].copy_from_slice(&(if disable { 16u16 } else { 0 }).to_le_bytes());
        info[8..12].copy_from_slice(&0x1701u32.to_le_bytes());
        info[12..14].copy_from_slice(&(ENTRIES as u16 * 4).to_le_bytes());
        info[16..20].copy_from_slice(&40u32.to_le_bytes());
        info[20..22].copy_from_slice(&40u16.to_le_bytes());
        info[24..28].copy_from_slice(&(40 + ENTRIES * 4).to_le_bytes());
        for entry in 0..ENTRIES {
            info.extend_from_slice(&(entry % self.channels.len() as u32).to_le_bytes());
        }
        info.extend((0..40u8).map(|byte| byte.wrapping_mul(73).wrapping_add(11)));
        self.set(oid::GEN_RECEIVE_SCALE_PARAMETERS, &info, deadline)
    }

    /// Sends a control message by GPA direct, as Linux does, and waits for its response.
    pub fn rndis(
        &mut self,
        message_type: u32,
        mut body: Vec<u8>,
        deadline: Instant,
    ) -> Result<Vec<u8>, VscError> {
        self.next_request += 1;
        body[..4].copy_from_slice(&self.next_request.to_le_bytes());
        self.send_control(&emit_message(message_type, &body, &[]))?;
        loop {
            while let Some(response) = self.responses.pop_front() {
                if word(&response, 8) == Some(self.next_request) {
                    let expected = message_type | number::COMPLETION;
                    let is_right = word(&response, 0) == Some(expected)
                        && word(&response, 4) == Some(response.len() as u32);
                    return if is_right {
                        Ok(response)
                    } else {
                        Err(wrong("well-formed RNDIS response"))
                    };
                }
            }
            self.poll(0, deadline)?;
        }
    }

    /// Sends any bytes as an RNDIS control message.
    pub fn send_control(&mut self, message: &[u8]) -> Result<u64, VscError> {
        self.ram.write(self.request_page, message)?;
        let channel = &mut self.channels[0];
        let transaction_id = channel.new_transaction_id();
        let packet = GuestMessage::RndisPacket {
            kind: RndisKind::Control,
            section: None,
        };
        channel.send_gpa_direct(
            transaction_id,
            &[(self.request_page, message.len() as u32)],
            &[&packet.emit()],
        )?;
        channel.flush()?;
        self.outstanding[0].insert(transaction_id, Outgoing::default());
        Ok(transaction_id)
    }

    /// The information of a QUERY's answer.
    pub fn query(&mut self, oid: u32, info: &[u8], deadline: Instant) -> Result<Vec<u8>, VscError> {
        let answer = self.rndis(number::QUERY, oid_body(oid, info), deadline)?;
        let (length, offset) = (word(&answer, 16), word(&answer, 20));
        let (Some(length), Some(offset)) = (length, offset) else {
            return Err(wrong("whole QUERY answer"));
        };
        let start = 8 + offset as usize;
        if offset < 16 {
            return Err(wrong("information where Linux accepts it"));
        }
        let info = answer.get(start..start + length as usize);
        Ok(info.ok_or(wrong("information inside its message"))?.to_vec())
    }

    fn query_word(&mut self, oid: u32, deadline: Instant) -> Result<u32, VscError> {
        word(&self.query(oid, &[], deadline)?, 0).ok_or(wrong("information of four bytes"))
    }

    /// Carries out a SET, which must succeed.
    pub fn set(&mut self, oid: u32, info: &[u8], deadline: Instant) -> Result<(), VscError> {
        let answer = self.rndis(number::SET, oid_body(oid, info), deadline)?;
        if word(&answer, 12) == Some(0) {
            Ok(())
        } else {
            Err(wrong("success of a SET"))
        }
    }

    /// Sets the packet filter; 0x0F is what Linux sets at ifup with multicast.
    pub fn set_filter(&mut self, bits: u32, deadline: Instant) -> Result<(), VscError> {
        self.set(oid::GEN_CURRENT_PACKET_FILTER, &bits.to_le_bytes(), deadline)
    }

    /// Filter, drain, HALT, REVOKE, CLOSE, TEARDOWN: what Linux does before it opens the NIC anew. Returns the closed
    /// primary, whose rings stay.
    pub fn shut_down(
        mut self,
        guest: &mut SyntheticGuest,
        deadline: Instant,
    ) -> Result<GuestChannel, VscError> {
        self.set_filter(0, deadline)?;
        self.send_control(&emit_message(number::HALT, &[9, 0, 0, 0], &[]))?;
        self.wait_sent(deadline)?;
        self.return_all()?;
        let primary = &mut self.channels[0];
        for message in [
            GuestMessage::RevokeReceiveBuffer {
                id: RECEIVE_BUFFER_ID,
            },
            GuestMessage::RevokeSendBuffer { id: 0 },
        ] {
            primary.send_in_band(NO_RESPONSE, false, &[&message.emit()])?;
            primary.flush()?;
        }
        for channel in self.channels.iter().skip(1) {
            guest.close_channel(channel, deadline)?;
            guest.teardown_gpadl(channel.ring_gpadl(), deadline)?;
        }
        guest.close_channel(&self.channels[0], deadline)?;
        guest.teardown_gpadl(self.receive_gpadl, deadline)?;
        guest.teardown_gpadl(self.send_gpadl, deadline)?;
        guest.free(self.memory.receive, self.memory.receive_pages);
        guest.free(self.memory.send, self.memory.send_pages);
        Ok(self.channels.swap_remove(0))
    }

    /// The GPADLs of the receive and the send buffer.
    pub fn buffer_gpadls(&self) -> (u32, u32) {
        (self.receive_gpadl, self.send_gpadl)
    }
}

/// Transaction id of messages without completion (`VMBUS_RQST_ID_NO_RESPONSE`, Linux 6.1 include/linux/hyperv.h).
pub const NO_RESPONSE: u64 = u64::MAX - 2;

/// The body of a QUERY or SET, but for its request id.
pub(super) fn oid_body(oid: u32, info: &[u8]) -> Vec<u8> {
    let request = OidRequest {
        request_id: U32::ZERO,
        oid: U32::new(oid),
        info_length: U32::new(info.len() as u32),
        info_offset: U32::new(size_of::<OidRequest>() as u32),
        vc_handle: U32::ZERO,
    };
    [request.as_bytes(), info].concat()
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|word| u32::from_le_bytes(*word))
}
