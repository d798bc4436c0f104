use super::*;
use crate::backend::faulty::{Fate, FaultyBackend};
use crate::storvsp::wire::Operation;
use std::sync::Arc;
use vmbus::mem::{Gpa, RamLayout, SharedMap};
use vmbus::wire::{Packet, PacketDescriptor, gpa_direct_header};
use zerocopy::{FromZeros, IntoBytes};

const DISK_BYTES: u64 = 1 << 20;

struct Rig {
    controller: Controller,
    io: Uring,
    ram: GuestRam,
}

/// A controller that has gone through initialisation, with a disk that follows the script.
fn rig(script: impl IntoIterator<Item = Fate>) -> Rig {
    rig_with(script, CacheMode::Writeback)
}

fn rig_with(script: impl IntoIterator<Item = Fate>, cache: CacheMode) -> Rig {
    let bytes = 4 << 20;
    let map = Arc::new(SharedMap::anonymous("ram", bytes).unwrap());
    let mut rig = Rig {
        controller: Controller::with_backends(vec![Box::new(FaultyBackend::new(DISK_BYTES, script))], cache),
        io: Uring::new(16).unwrap(),
        ram: GuestRam::new(map, RamLayout::for_size(bytes as u64)).unwrap(),
    };
    for (operation, body) in [(7u32, &[][..]), (9, &[0x02, 0x06]), (10, &[]), (8, &[])] {
        let packet = VstorPacket::with_body(Operation::from(operation), body);
        let verdict = rig.send(packet.as_bytes(), None);
        assert!(
            matches!(verdict, Verdict::Control { offer: None, .. }),
            "{verdict:?}"
        );
    }
    rig
}

impl Rig {
    fn send(&mut self, payload: &[u8], range: Option<(Gpa, u32)>) -> Verdict {
        let header = range.map(|range| gpa_direct_header(&[range])).unwrap_or_default();
        let mut descriptor = PacketDescriptor::new_zeroed();
        descriptor.packet_type = if range.is_some() { 9 } else { 6 }.into();
        descriptor.offset8 = (((16 + header.len()) / 8) as u16).into();
        descriptor.length8 = (((16 + header.len() + payload.len()) / 8) as u16).into();
        let bytes = [descriptor.as_bytes(), &header, payload].concat();
        let request = Request::from_packet(&Packet::parse(&bytes).unwrap()).unwrap();
        self.controller
            .on_request(&mut self.io, &self.ram, 0, 1, &request, false)
    }

    /// Executes a CDB on (path 0, target 0, `lun`) and runs the io_uring until there is an answer.
    fn execute(&mut self, lun: u8, cdb: &[u8], data_in: u8, range: Option<(Gpa, u32)>) -> ScsiRequest {
        match self.send(
            srb(lun, cdb, data_in, range.map_or(0, |range| range.1)).as_bytes(),
            range,
        ) {
            Verdict::Answer(answer) => answer.scsi_request(),
            Verdict::Active(_) => self.wait(),
            other => panic!("{other:?}"),
        }
    }

    fn wait(&mut self) -> ScsiRequest {
        loop {
            let mut answer = None;
            self.controller
                .resume(&mut self.io, |_, packet| answer = Some(packet));
            if let Some(answer) = answer {
                return answer.scsi_request();
            }
            self.io.submit_and_wait(1, None).unwrap();
            while let Some(completion) = self.io.next_completion() {
                let id = completion.user_data as RequestId;
                if let Some(answer) = self.controller.on_completion(&mut self.io, id, completion.result) {
                    return answer.scsi_request();
                }
            }
        }
    }
}

fn srb(lun: u8, cdb: &[u8], data_in: u8, bytes: u32) -> VstorPacket {
    let mut srb = ScsiRequest::new_zeroed();
    srb.lun = lun;
    srb.cdb_length = cdb.len() as u8;
    srb.payload[..cdb.len()].copy_from_slice(cdb);
    srb.data_in = data_in;
    srb.data_transfer_length = bytes.into();
    VstorPacket::with_body(Operation::ExecuteSrb, srb.as_bytes())
}

/// (SRB status, SCSI status, sense key, ASC, ASCQ)
fn outcome(srb: &ScsiRequest) -> (u8, u8, u8, u8, u8) {
    (
        srb.srb_status,
        srb.scsi_status,
        srb.payload[2],
        srb.payload[12],
        srb.payload[13],
    )
}

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0];
const WRITE: [u8; 10] = [0x2A, 0, 0, 0, 0, 8, 0, 0, 8, 0];
const FLUSH: [u8; 10] = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const PAGE: Option<(Gpa, u32)> = Some((Gpa(0x1000), 4096));
const GOOD: (u8, u8, u8, u8, u8) = (1, 0, 0, 0, 0);

#[test]
fn transfers_say_how_much_they_moved() {
    let mut rig = rig([Fate::Whole, Fate::Later(4096)]);
    let read = rig.execute(0, &READ, 1, PAGE);
    assert_eq!((outcome(&read), read.data_transfer_length.get()), (GOOD, 4096));
    let write = rig.execute(0, &WRITE, 0, PAGE);
    assert_eq!((outcome(&write), write.data_transfer_length.get()), (GOOD, 4096));
    assert_eq!(rig.controller.active_count(), 0);
}

#[test]
fn faults_of_the_host_are_told_as_sense_data_and_never_as_another_srb_status() {
    type Case<'a> = (&'a [u8], u8, i32, (u8, u8, u8));
    let cases: [Case<'_>; 9] = [
        (&READ, 1, -libc::EIO, (3, 0x11, 0)),
        (&READ, 1, 0, (3, 0x11, 0)),
        (&READ, 1, -libc::EBADF, (3, 0x11, 0)),
        (&WRITE, 0, -libc::EIO, (3, 0x0C, 0)),
        (&WRITE, 0, -libc::ENOSPC, (7, 0x27, 7)),
        (&WRITE, 0, -libc::EDQUOT, (7, 0x27, 7)),
        (&WRITE, 0, -libc::EROFS, (7, 0x27, 0)),
        (&FLUSH, 2, -libc::EIO, (3, 0x0C, 0)),
        (&FLUSH, 2, -libc::ENOSPC, (7, 0x27, 7)),
    ];
    for (cdb, data_in, result, (key, asc, ascq)) in cases {
        for fate in [Fate::Answer(result), Fate::Later(result)] {
            let mut rig = rig([fate]);
            let answer = rig.execute(0, cdb, data_in, (data_in != 2).then_some((Gpa(0x1000), 4096)));
            assert_eq!(outcome(&answer), (0x84, 2, key, asc, ascq), "{cdb:x?} {fate:?}");
            assert_eq!(answer.sense_info_length, 18);
            assert_eq!(answer.data_transfer_length.get(), 0);
            assert_eq!(rig.controller.active_count(), 0);
        }
    }
}

#[test]
fn a_short_write_goes_on_and_a_full_disk_in_the_middle_is_told() {
    let mut whole = rig([Fate::Later(1024), Fate::Answer(512), Fate::Later(2560)]);
    assert_eq!(outcome(&whole.execute(0, &WRITE, 0, PAGE)), GOOD);
    let mut full = rig([Fate::Later(1024), Fate::Later(-libc::ENOSPC)]);
    assert_eq!(outcome(&full.execute(0, &WRITE, 0, PAGE)), (0x84, 2, 7, 0x27, 7));
}

#[test]
fn what_finds_no_room_is_begun_again_when_something_is_over() {
    let mut rig = rig([Fate::Later(4096), Fate::NoRoom, Fate::Whole]);
    assert!(matches!(
        rig.send(srb(0, &READ, 1, 4096).as_bytes(), PAGE),
        Verdict::Active(_)
    ));
    assert!(matches!(
        rig.send(srb(0, &READ, 1, 4096).as_bytes(), PAGE),
        Verdict::Active(_)
    ));
    assert_eq!(outcome(&rig.wait()), GOOD);
    assert_eq!(outcome(&rig.wait()), GOOD);
    assert_eq!(rig.controller.active_count(), 0);
}

#[test]
fn an_answer_goes_into_the_guests_pages() {
    let mut rig = rig([]);
    let inquiry = rig.execute(0, &[0x12, 0, 0, 0, 36, 0], 1, Some((Gpa(0x1FF0), 36)));
    assert_eq!(
        (outcome(&inquiry), inquiry.data_transfer_length.get()),
        (GOOD, 36)
    );
    let mut bytes = [0u8; 36];
    rig.ram.read(Gpa(0x1FF0), &mut bytes).unwrap();
    assert_eq!(&bytes[8..16], b"BULKHEAD");
    let absent = rig.execute(5, &[0x12, 0, 0, 0, 36, 0], 1, Some((Gpa(0x1FF0), 36)));
    assert_eq!((outcome(&absent), absent.data_transfer_length.get()), (GOOD, 36));
    rig.ram.read(Gpa(0x1FF0), &mut bytes).unwrap();
    assert_eq!(bytes[0], 0x7F);
    assert_eq!(rig.execute(5, &READ, 1, PAGE).srb_status, 0x20);
}

#[test]
fn an_answer_longer_than_the_guests_pages_is_cut() {
    let mut rig = rig([]);
    let inquiry = rig.execute(0, &[0x12, 0, 0, 0, 36, 0], 1, Some((Gpa(0x1000), 5)));
    assert_eq!((outcome(&inquiry), inquiry.data_transfer_length.get()), (GOOD, 5));
}

#[test]
fn srbs_that_contradict_themselves_are_invalid_requests() {
    let mut rig = rig([]);
    let invalid = |answer: ScsiRequest| assert_eq!(outcome(&answer), (6, 0, 0, 0, 0));
    invalid(rig.execute(0, &READ, 0, PAGE));
    invalid(rig.execute(0, &WRITE, 1, PAGE));
    invalid(rig.execute(0, &READ, 1, None));
    invalid(rig.execute(0, &READ, 1, Some((Gpa(0x1000), 4095))));
    invalid(rig.execute(0, &READ, 1, Some((Gpa(0xFFFF_F000), 4096))));
    invalid(rig.execute(0, &[0x12, 0, 0, 0, 36, 0], 0, PAGE));
    invalid(rig.execute(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], 0, Some((Gpa(0x1000), 23))));
    let mut no_cdb = srb(0, &READ, 1, 4096);
    no_cdb.body[8] = 17;
    match rig.send(no_cdb.as_bytes(), PAGE) {
        Verdict::Answer(answer) => invalid(answer.scsi_request()),
        other => panic!("{other:?}"),
    }
    assert_eq!(rig.controller.bad_requests, 8);
    assert_eq!(rig.controller.active_count(), 0);
}

#[test]
fn unmap_takes_its_list_from_the_guests_pages() {
    let mut rig = rig([Fate::Later(0), Fate::Answer(-libc::EOPNOTSUPP)]);
    let mut list = vec![0u8, 38, 0, 32, 0, 0, 0, 0];
    for lba in [8u64, 64] {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&[0, 0, 0, 8, 0, 0, 0, 0]);
    }
    rig.ram.write(Gpa(0x2000), &list).unwrap();
    let answer = rig.execute(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], 0, Some((Gpa(0x2000), 40)));
    assert_eq!(outcome(&answer), GOOD);
    rig.ram.write(Gpa(0x2008), &u64::MAX.to_be_bytes()).unwrap();
    let answer = rig.execute(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], 0, Some((Gpa(0x2000), 40)));
    assert_eq!(outcome(&answer), (0x84, 2, 5, 0x21, 0));
}

#[test]
fn a_disk_without_write_cache_says_so() {
    for (cache, byte) in [(CacheMode::Writeback, 4u8), (CacheMode::Writethrough, 0)] {
        let mut rig = rig_with([], cache);
        rig.execute(0, &[0x1A, 0, 8, 0, 192, 0], 1, PAGE);
        let mut data = [0u8; 7];
        rig.ram.read(Gpa(0x1000), &mut data).unwrap();
        assert_eq!((data[4], data[6]), (8, byte));
    }
}

#[test]
fn resets_wait_for_the_server_to_finish() {
    let mut rig = rig([]);
    let reset = VstorPacket::with_body(Operation::ResetBus, &[]);
    assert_eq!(rig.send(reset.as_bytes(), None), Verdict::Reset);
    assert_eq!(Controller::reset_done().header.status.get(), 0);
}
