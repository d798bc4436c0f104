//! The wake-up protocol under a model checker: every order of loads and stores that the memory orderings allow.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p vmbus --lib --release ring::loom`.
//!
//! Reader and writer are the product's; only the memory and the fence are loom's. A lost wake-up shows as a deadlock,
//! stale data as a wrong packet. The tests named `..._is_found` leave one fence out and expect the checker to object: they
//! show that the model sees what it is for.

use super::memory::{Fence, RingMemory, leave_out};
use super::{RingReader, RingWriter};
use crate::wire::OutPacket;
use loom::sync::Notify;
use loom::thread;
use std::sync::{Arc, Mutex};

/// Models run one at a time: which fence is left out is one global word.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Bytes of a packet without payload, trailer included.
const PACKET_BYTES: u32 = 24;

struct Bell {
    data: Notify,
    space: Notify,
}

/// Sends `count` packets through a ring of `data_bytes`. Both sides sleep whenever they may.
fn exchange(data_bytes: u32, count: u64) {
    let memory = RingMemory::of(data_bytes);
    let bell = Arc::new(Bell {
        data: Notify::new(),
        space: Notify::new(),
    });
    let writer = RingWriter::over(memory.clone(), 0).expect("index 0");
    let reader = RingReader::over(memory, 0).expect("index 0");
    let writing = thread::spawn({
        let bell = bell.clone();
        move || write_all(writer, &bell, count)
    });
    read_all(reader, &bell, count);
    writing.join().expect("the writer ends");
}

fn write_all(mut writer: RingWriter, bell: &Bell, count: u64) {
    for transaction_id in 1..=count {
        let packet = OutPacket::in_band(transaction_id, false, &[]);
        while writer.stage(&packet).is_err() {
            if !writer.request_space(PACKET_BYTES).expect("the reader is honest") {
                bell.space.wait();
            }
        }
        writer.set_pending_send_bytes(0);
        if writer.commit().expect("the reader is honest").is_needed() {
            bell.data.notify();
        }
    }
}

fn read_all(mut reader: RingReader, bell: &Bell, count: u64) {
    let mut buf = super::PacketBuf::new();
    let mut expected = 1;
    while expected <= count {
        reader.mask_interrupts();
        while let Some(packet) = reader.next(&mut buf).expect("the writer is honest") {
            assert_eq!(packet.transaction_id, expected, "stale or torn packet");
            expected += 1;
            if reader.commit().is_needed() {
                bell.space.notify();
            }
        }
        if expected <= count && !reader.unmask_and_check().expect("the writer is honest") {
            bell.data.wait();
        }
    }
}

/// Checks all interleavings with at most three forced switches. `Err`: what the checker objected to.
fn check(without: Option<Fence>, model: impl Fn() + Sync + Send + 'static) -> Result<(), String> {
    let _alone = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    leave_out(without);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.check(model)));
    leave_out(None);
    result.map_err(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default())
}

/// Leaves a fence out and expects both sides to sleep for ever.
fn assert_deadlocks(without: Fence, model: impl Fn() + Sync + Send + 'static) {
    let objection = check(Some(without), model).expect_err("the checker does not miss the fence");
    assert!(
        objection.starts_with("deadlock"),
        "not a lost wake-up: {objection}"
    );
}

/// Room for two packets at once (a ring is never filled): the reader sleeps, the writer hardly ever.
const ROOMY: u32 = 3 * PACKET_BYTES;
/// Room for one packet: the writer sleeps, too.
const TIGHT: u32 = PACKET_BYTES + 8;

#[test]
fn no_wake_up_of_the_reader_is_lost() {
    assert_eq!(check(None, || exchange(ROOMY, 2)), Ok(()));
}

#[test]
fn no_wake_up_of_the_writer_is_lost() {
    assert_eq!(check(None, || exchange(TIGHT, 3)), Ok(()));
}

#[test]
fn a_missing_fence_after_the_write_index_is_found() {
    assert_deadlocks(Fence::AfterPublish, || exchange(ROOMY, 2));
}

#[test]
fn a_missing_fence_before_sleeping_is_found() {
    assert_deadlocks(Fence::BeforeSleep, || exchange(ROOMY, 2));
}

#[test]
fn a_missing_fence_after_the_read_index_is_found() {
    assert_deadlocks(Fence::AfterGivingSpace, || exchange(TIGHT, 3));
}

#[test]
fn a_missing_fence_after_the_wish_for_space_is_found() {
    assert_deadlocks(Fence::AfterSpaceWish, || exchange(TIGHT, 3));
}
