//! io_uring against real files, pipes and eventfds.

use super::*;
use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn map(pages: usize) -> Arc<SharedMap> {
    Arc::new(SharedMap::anonymous("uring-test", pages * 4096).expect("memory"))
}

/// Waits for one completion, at most ten seconds.
fn wait(uring: &mut Uring) -> Completion {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(completion) = uring.next_completion() {
            return completion;
        }
        assert!(Instant::now() < deadline, "no completion within ten seconds");
        uring
            .submit_and_wait(1, Some(Duration::from_secs(1)))
            .expect("enters");
    }
}

#[test]
fn data_written_from_scattered_pieces_is_read_back_into_one() {
    let map = map(4);
    map.write(0, &(0..16384).map(|i| (i * 7 % 251) as u8).collect::<Vec<_>>())
        .expect("in range");
    let file = tempfile::tempfile().expect("a file");
    let mut uring = Uring::new(8).expect("io_uring");
    uring.register_files(&[file.as_fd()]).expect("registers");

    let mut scattered = GuestSpans::new(map.clone());
    for (offset, len) in [(4096, 1000), (0, 3096), (8192, 512)] {
        scattered.push(offset, len).expect("in range");
    }
    let expected = {
        let mut bytes = vec![0; scattered.len()];
        scattered.copy_to(&mut bytes).expect("as long");
        bytes
    };
    for (target, durability) in [
        (File::Registered(0), Durability::Cached),
        (file.as_fd().into(), Durability::Dsync),
    ] {
        uring
            .write(target, &scattered, 5, durability, 11)
            .expect("queues");
        assert_eq!(
            wait(&mut uring),
            Completion {
                user_data: 11,
                result: 4608,
                more: false
            }
        );
        let one = GuestSpans::from_map(map.clone(), 12288, 4096).expect("in range");
        uring.read(target, &one, 5, 12).expect("queues");
        assert_eq!(wait(&mut uring).into_result(), Ok(4096));
        let mut back = vec![0; 4096];
        one.copy_to(&mut back).expect("as long");
        assert_eq!(back, expected[..4096]);
        uring.read(target, &scattered, 5, 13).expect("queues");
        assert_eq!(wait(&mut uring).into_result(), Ok(4608));
        uring.write(target, &one, 0, durability, 14).expect("queues");
        assert_eq!(wait(&mut uring).into_result(), Ok(4096));
        scattered.copy_from(&expected).expect("as long");
    }
    uring.fsync(File::Registered(0), true, 1).expect("queues");
    uring.fsync(file.as_fd().into(), false, 2).expect("queues");
    let keep_and_punch = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    assert_eq!(wait(&mut uring).result, 0);
    assert_eq!(wait(&mut uring).result, 0);
    uring
        .fallocate(File::Registered(0), keep_and_punch, 0, 4096, 3)
        .expect("queues");
    assert_eq!(
        wait(&mut uring),
        Completion {
            user_data: 3,
            result: 0,
            more: false
        }
    );
    let one = GuestSpans::from_map(map, 12288, 4096).expect("in range");
    uring.read(File::Registered(0), &one, 0, 4).expect("queues");
    assert_eq!(wait(&mut uring).into_result(), Ok(4096));
    let mut hole = vec![1; 4096];
    one.copy_to(&mut hole).expect("as long");
    assert!(hole.iter().all(|byte| *byte == 0));
    assert_eq!(uring.in_flight(), 0);
}

#[test]
fn errors_and_short_reads_come_as_results() {
    let map = map(1);
    let file = tempfile::tempfile().expect("a file");
    file.set_len(100).expect("grows");
    let read_only = std::fs::File::open("/dev/null").expect("there is a /dev/null");
    let spans = GuestSpans::from_map(map, 0, 4096).expect("in range");
    let mut uring = Uring::new(2).expect("io_uring");
    uring.read(file.as_fd().into(), &spans, 40, 1).expect("queues");
    assert_eq!(wait(&mut uring).into_result(), Ok(60));
    uring
        .write(read_only.as_fd().into(), &spans, 0, Durability::Cached, 2)
        .expect("queues");
    assert_eq!(wait(&mut uring).into_result(), Err(nix::errno::Errno::EBADF));
}

#[test]
fn a_full_ring_says_so_and_recovers() {
    let mut uring = Uring::new(4).expect("io_uring");
    for round in 0..3 {
        for n in 0..4 {
            uring.nop(round * 10 + n).expect("a free slot");
        }
        assert_eq!(uring.nop(99), Err(UringError::Full));
        for _ in 0..4 {
            assert_eq!(wait(&mut uring).user_data / 10, round);
        }
        assert_eq!((uring.free_slots(), uring.in_flight()), (4, 0));
    }
}

#[test]
fn a_multishot_poll_reports_each_kick_until_it_is_cancelled() {
    let kick = EventFd::new().expect("eventfd");
    let mut uring = Uring::new(4).expect("io_uring");
    let op = uring
        .poll_add(kick.as_fd().into(), libc::POLLIN, true, 7)
        .expect("queues");
    for _ in 0..3 {
        kick.write(1).expect("writes");
        let completion = wait(&mut uring);
        assert_eq!((completion.user_data, completion.more), (7, true));
        assert_eq!(
            completion.result & i32::from(libc::POLLIN),
            i32::from(libc::POLLIN)
        );
        assert_eq!(kick.read(), Ok(1));
    }
    uring.cancel(op).expect("queues");
    assert_eq!(
        wait(&mut uring),
        Completion {
            user_data: 7,
            result: -libc::ECANCELED,
            more: false
        }
    );
    uring.cancel(op).expect("a stale id is left alone");
    assert_eq!(uring.in_flight(), 0);
}

#[test]
fn reading_an_eventfd_waits_for_it_and_resets_it() {
    let kick = EventFd::from_value_and_flags(0, nix::sys::eventfd::EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let blocking = EventFd::new().expect("eventfd");
    let mut uring = Uring::new(4).expect("io_uring");
    uring.read_eventfd(blocking.as_fd().into(), 5).expect("queues");
    uring
        .submit_and_wait(1, Some(Duration::from_millis(20)))
        .expect("enters");
    assert_eq!(uring.next_completion(), None, "nobody has kicked");
    blocking.write(3).expect("writes");
    assert_eq!(
        wait(&mut uring),
        Completion {
            user_data: 5,
            result: 8,
            more: false
        }
    );
    kick.write(2).expect("writes");
    uring.read_eventfd(kick.as_fd().into(), 6).expect("queues");
    assert_eq!(
        wait(&mut uring),
        Completion {
            user_data: 6,
            result: 8,
            more: false
        }
    );
    assert!(kick.read().is_err(), "the count was reset");
}

#[test]
fn waiting_ends_with_the_timeout() {
    let mut uring = Uring::new(1).expect("io_uring");
    let before = Instant::now();
    uring
        .submit_and_wait(1, Some(Duration::from_millis(30)))
        .expect("enters");
    assert!(before.elapsed() >= Duration::from_millis(29));
    assert_eq!(uring.next_completion(), None);
}

#[test]
fn memory_outlives_an_operation_whose_spans_and_map_were_dropped() {
    let (from, to) = nix::unistd::pipe().expect("a pipe");
    let map = map(1);
    let weak = Arc::downgrade(&map);
    let mut uring = Uring::new(2).expect("io_uring");
    let spans = GuestSpans::from_map(map, 0, 4096).expect("in range");
    uring
        .read(from.as_fd().into(), &spans, u64::MAX, 1)
        .expect("queues");
    drop(spans);
    uring.submit().expect("enters");
    assert!(weak.upgrade().is_some(), "the slot keeps the map");
    assert_eq!(nix::unistd::write(&to, b"late"), Ok(4));
    assert_eq!(wait(&mut uring).into_result(), Ok(4));
    let mut after = [0; 4];
    assert!(weak.upgrade().is_none_or(|map| map.read(0, &mut after).is_ok()));
    assert!(weak.upgrade().is_none(), "nobody needs the map any more");
}

#[test]
fn dropping_the_ring_cancels_what_waits_and_frees_the_memory() {
    let (from, _to) = nix::unistd::pipe().expect("a pipe");
    let kick = EventFd::new().expect("eventfd");
    let map = map(1);
    let weak = Arc::downgrade(&map);
    let mut uring = Uring::new(4).expect("io_uring");
    let spans = GuestSpans::from_map(map, 0, 4096).expect("in range");
    uring
        .read(from.as_fd().into(), &spans, u64::MAX, 1)
        .expect("queues");
    uring.read_eventfd(kick.as_fd().into(), 2).expect("queues");
    uring
        .poll_add(kick.as_fd().into(), libc::POLLIN, true, 3)
        .expect("queues");
    uring.submit().expect("enters");
    drop(spans);
    drop(uring);
    assert!(weak.upgrade().is_none());
}

#[test]
fn many_operations_in_flight_all_come_back_once() {
    let map = map(64);
    let file = tempfile::tempfile().expect("a file");
    file.set_len(64 * 4096).expect("grows");
    let mut uring = Uring::new(64).expect("io_uring");
    let mut seen = vec![0u32; 2000];
    let (mut next, mut done) = (0u64, 0);
    while done < seen.len() {
        while (next as usize) < seen.len() && uring.free_slots() > 0 {
            let page = next % 64;
            let spans = GuestSpans::from_map(map.clone(), page * 4096, 4096).expect("in range");
            match next % 3 {
                0 => uring.read(file.as_fd().into(), &spans, page * 4096, next),
                1 => uring.write(file.as_fd().into(), &spans, page * 4096, Durability::Cached, next),
                _ => uring.nop(next),
            }
            .expect("a free slot");
            next += 1;
        }
        let completion = wait(&mut uring);
        assert!(completion.into_result().is_ok());
        seen[completion.user_data as usize] += 1;
        done += 1;
    }
    assert!(seen.iter().all(|count| *count == 1));
}
