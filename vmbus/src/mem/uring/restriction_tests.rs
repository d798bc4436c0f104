//! What a restricted ring refuses. Needs operations that the module itself never queues.

use super::*;
use io_uring::squeue::Flags;
use nix::sys::eventfd::EventFd;

/// Queues an entry as the module would, and waits for its result.
fn result_of(uring: &mut Uring, entry: squeue::Entry) -> Result<u32, Errno> {
    let op = uring.take_slot(0, None).expect("a slot");
    uring.push(op, entry).expect("queues");
    result(uring)
}

fn result(uring: &mut Uring) -> Result<u32, Errno> {
    uring
        .submit_and_wait(1, Some(Duration::from_secs(10)))
        .expect("enters");
    uring
        .next_completion()
        .expect("a completion within ten seconds")
        .into_result()
}

/// Opens what does not exist: the errno tells whether the kernel has looked.
fn open() -> squeue::Entry {
    opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/nonexistent/file".as_ptr()).build()
}

#[test]
fn a_restricted_ring_opens_no_file_and_makes_no_socket() {
    let mut uring = Uring::restricted(4, &[]).expect("io_uring");
    assert!(uring.is_restricted(), "Linux 5.10 and later can");
    let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
    let link = opcode::Nop::new().build().flags(Flags::IO_LINK);
    for entry in [open(), socket, opcode::Close::new(types::Fd(0)).build(), link] {
        assert_eq!(result_of(&mut uring, entry), Err(Errno::EACCES));
    }
    assert_eq!(result_of(&mut uring, opcode::Nop::new().build()), Ok(0));
}

#[test]
fn any_other_ring_does_look_for_the_file() {
    let mut uring = Uring::new(4).expect("io_uring");
    assert!(!uring.is_restricted());
    assert_eq!(result_of(&mut uring, open()), Err(Errno::ENOENT));
}

#[test]
fn a_restricted_ring_keeps_the_files_it_was_given() {
    let file = tempfile::tempfile().expect("a file");
    let mut uring = Uring::restricted(4, &[file.as_fd()]).expect("io_uring");
    let other = tempfile::tempfile().expect("a file");
    let refused = uring.register_files(&[other.as_fd()]).expect_err("refused");
    assert_eq!(refused.errno, Errno::EACCES);
    let gone = uring.ring.submitter().unregister_files().expect_err("refused");
    assert_eq!(gone.raw_os_error(), Some(libc::EACCES));
}

#[test]
fn a_restricted_ring_takes_every_operation_of_this_module() {
    let file = tempfile::tempfile().expect("a file");
    let map = Arc::new(SharedMap::anonymous("restricted", 8192).expect("memory"));
    let event = EventFd::from_value(1).expect("an eventfd");
    let mut uring = Uring::restricted(8, &[file.as_fd()]).expect("io_uring");
    let one = GuestSpans::from_map(map.clone(), 0, 512).expect("in range");
    let mut two = one.clone();
    two.push(4096, 512).expect("in range");
    for file in [File::Registered(0), file.as_fd().into()] {
        for spans in [&one, &two] {
            let len = Ok(spans.len() as u32);
            for durability in [Durability::Cached, Durability::Dsync] {
                uring.write(file, spans, 0, durability, 0).expect("queues");
                assert_eq!(result(&mut uring), len);
            }
            uring.read(file, spans, 0, 0).expect("queues");
            assert_eq!(result(&mut uring), len);
        }
        uring.fsync(file, true, 0).expect("queues");
        assert_eq!(result(&mut uring), Ok(0));
        uring.fallocate(file, 0, 0, 4096, 0).expect("queues");
        assert_eq!(result(&mut uring), Ok(0));
    }
    uring
        .poll_add(event.as_fd().into(), libc::POLLIN, true, 0)
        .expect("queues");
    assert_eq!(result(&mut uring), Ok(libc::POLLIN as u32));
    uring.read_eventfd(event.as_fd().into(), 0).expect("queues");
    assert_eq!(result(&mut uring), Ok(8));
    // Dropping the ring cancels the poll, and fails if that is refused.
    uring.cancel_all().expect("cancels");
    assert_eq!(uring.in_flight(), 0);
}
