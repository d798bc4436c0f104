//! The child: locks itself in, reports, waits for leave, does its deeds.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};

use crate::deeds;

/// `options`: words joined by commas, of which `second-thread` is for us.
pub fn run(options: &str, deeds: &[&str]) -> i32 {
    let has = |option: &str| options.split(',').any(|word| word == option);
    let (control, jail) = match sandbox::inherited() {
        Ok(inherited) => inherited,
        Err(error) => {
            eprintln!("{error}");
            return 3;
        }
    };
    assert!(
        sandbox::inherited().is_err(),
        "the control socket was given twice"
    );
    for line in how_i_was_born() {
        tell(&control, &line);
    }
    if has("second-thread") {
        let (started, ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            started.send(()).expect("the main thread waits for this");
            loop {
                std::thread::park();
            }
        });
        ready.recv().expect("the thread sends before it parks");
    }
    match jail.lock_in() {
        Err(error) => {
            tell(&control, &format!("refused={error}"));
            return 4;
        }
        Ok(report) => {
            tell(&control, &format!("missing={}", report.missing.join("; ")));
        }
    }
    tell(&control, "ready=");
    let mut leave = [0; 16];
    let mut buffers = [IoSliceMut::new(&mut leave)];
    let received = recvmsg::<()>(control.as_raw_fd(), &mut buffers, None, MsgFlags::empty());
    assert_eq!(
        received.map(|message| message.bytes),
        Ok(2),
        "the supervisor says go"
    );
    for deed in deeds {
        let outcome = match deeds::perform(deed) {
            Ok(()) => "ok".to_owned(),
            Err(error) => error.raw_os_error().map_or(error.to_string(), |number| {
                format!("{:?}", nix::errno::Errno::from_raw(number))
            }),
        };
        tell(&control, &format!("deed.{deed}={outcome}"));
    }
    0
}

fn tell(control: &OwnedFd, line: &str) {
    let buffers = [IoSlice::new(line.as_bytes())];
    sendmsg::<()>(control.as_raw_fd(), &buffers, &[], MsgFlags::empty(), None)
        .expect("the supervisor listens");
}

/// What can only be seen from inside and before the lock-in.
fn how_i_was_born() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").expect("a child starts with the host's root");
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or("absent")
            .trim()
            .to_owned()
    };
    let limits = [
        Resource::RLIMIT_NOFILE,
        Resource::RLIMIT_CORE,
        Resource::RLIMIT_MSGQUEUE,
        Resource::RLIMIT_NICE,
        Resource::RLIMIT_RTPRIO,
        Resource::RLIMIT_NPROC,
    ]
    .map(|resource| getrlimit(resource).expect("the kernel knows this limit"));
    let limits = limits.map(|(soft, hard)| format!("{soft}/{hard}")).join(" ");
    let session_is_own = nix::unistd::getsid(None) == Ok(nix::unistd::getpid());
    let variables: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
    vec![
        format!("born.blocked={}", field("SigBlk:")),
        format!("born.ignored={}", field("SigIgn:")),
        format!("born.limits={limits}"),
        format!("born.own_session={session_is_own}"),
        format!(
            "born.directory={}",
            std::env::current_dir().map_or("?".into(), |path| path.display().to_string())
        ),
        format!("born.environment={}", variables.join(" ")),
        format!("born.groups={}", field("Groups:").split_whitespace().count()),
    ]
}
