//! What a locked-in child tries.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sandbox::sys::attempt;

/// The calls behind the forbidden deeds, for the profile `without-walls`.
pub const FORBIDDEN_CALLS: [(&str, i64); 14] = [
    ("openat", libc::SYS_openat),
    ("open", libc::SYS_open),
    ("mkdir", libc::SYS_mkdir),
    ("socket", libc::SYS_socket),
    ("connect", libc::SYS_connect),
    ("bind", libc::SYS_bind),
    ("unshare", libc::SYS_unshare),
    ("execve", libc::SYS_execve),
    ("ptrace", libc::SYS_ptrace),
    ("mount", libc::SYS_mount),
    ("kill", libc::SYS_kill),
    ("getdents64", libc::SYS_getdents64),
    ("setuid", libc::SYS_setuid),
    ("setsockopt", libc::SYS_setsockopt),
];

pub fn perform(deed: &str) -> io::Result<()> {
    match deed {
        // Allowed to every program.
        "heap" => heap(),
        "clock" => {
            let start = Instant::now();
            std::thread::sleep(Duration::from_millis(1));
            assert!(start.elapsed() >= Duration::from_millis(1));
            Ok(())
        }
        "poll" => {
            let input = io::stdin();
            let mut list = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
            assert_eq!(
                poll(&mut list, PollTimeout::from(1000u16))?,
                1,
                "/dev/null is always readable"
            );
            Ok(())
        }
        "log" => io::stderr().write_all(b"a locked-in child can still log\n"),
        "standard-input" => {
            let mut byte = [0; 1];
            let count = io::stdin().read(&mut byte)?;
            if count == 0 {
                Ok(())
            } else {
                Err(io::Error::other("standard input is not empty"))
            }
        }
        "abort" => std::process::abort(),
        "hang" => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
        // Allowed to some.
        "eventfd" => eventfd(),
        "thread" => {
            let name = "worker".to_owned();
            std::thread::Builder::new()
                .name(name)
                .spawn(heap)?
                .join()
                .expect("the thread does not panic")
        }
        // Allowed to none.
        "open" => File::open("/etc/passwd").map(drop),
        "create" => File::create("/x").map(drop),
        "make-directory" => std::fs::create_dir("/x"),
        "list-root" => match std::fs::read_dir("/")?.count() {
            0 => Ok(()),
            count => Err(io::Error::other(format!("{count} entries"))),
        },
        "tcp" => TcpStream::connect_timeout(&([127, 0, 0, 1], 1).into(), Duration::from_secs(1)).map(drop),
        "socket" => UnixStream::connect("/x").map(drop),
        "map-executable" => attempt::map_executable_page(),
        "make-executable" => attempt::make_page_executable(),
        "become-root" => nix::unistd::setuid(nix::unistd::Uid::from_raw(1)).map_err(io::Error::from),
        other => match attempt::raw(other) {
            Some(answer) => answer.map(drop),
            None => panic!("no deed {other}"),
        },
    }
}

/// Small and large blocks, grown and freed, and a map with a random seed.
fn heap() -> io::Result<()> {
    let mut large = vec![1u8; 1 << 20];
    large.resize(8 << 20, 2);
    let map: HashMap<usize, Vec<u8>> = (0..100).map(|index| (index, vec![0; index * 100])).collect();
    assert_eq!(large.len() + map.len(), (8 << 20) + 100);
    Ok(())
}

fn eventfd() -> io::Result<()> {
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(event.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 7))?;
    event.write(1)?;
    let mut events = [EpollEvent::empty()];
    let count = epoll.wait(&mut events, EpollTimeout::from(1000u16))?;
    assert_eq!(
        (count, events.map(|event| event.data()), event.read()?),
        (1, [7], 1)
    );
    Ok(())
}
