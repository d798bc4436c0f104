//! The child: locks itself in, reports, waits for leave, does its deeds.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use sandbox::Options;

use crate::{deeds, profile};

/// `options`: words joined by commas: `require-full`, `second-thread`.
pub fn run(options: &str, profile_name: &str, deeds: &[&str]) -> i32 {
    let has = |option: &str| options.split(',').any(|word| word == option);
    let control = match sandbox::inherited_control_fd() {
        Ok(control) => control,
        Err(error) => {
            eprintln!("{error}");
            return 3;
        }
    };
    assert!(
        sandbox::inherited_control_fd().is_err(),
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
    match sandbox::enter(
        &profile(profile_name),
        &Options {
            require_full: has("require-full"),
        },
    ) {
        Err(error) => {
            tell(&control, &format!("refused={error}"));
            return 4;
        }
        Ok(report) => {
            tell(&control, &format!("report={report}"));
            tell(&control, &format!("report.full={}", report.is_full()));
            tell(
                &control,
                &format!("report.nested_users_forbidden={}", report.nested_users_forbidden),
            );
            tell(&control, &format!("report.landlock={}", report.landlock));
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

pub fn run_alone(profile_name: &str) -> i32 {
    match sandbox::enter(&profile(profile_name), &Options::default()) {
        Ok(report) => {
            println!("report={report}");
            println!(
                "entries={}",
                deeds::perform("list-root").map_or_else(|error| error.to_string(), |()| "0".into())
            );
            0
        }
        Err(error) => {
            eprintln!("{error}");
            4
        }
    }
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
    let session_is_own = nix::unistd::getsid(None) == Ok(nix::unistd::getpid());
    let variables: Vec<String> = std::env::vars()
        .map(|(name, _)| name)
        .filter(|name| name != "BULKHEAD_BIRTH")
        .collect();
    vec![
        format!("born.blocked={}", field("SigBlk:")),
        format!("born.ignored={}", field("SigIgn:")),
        format!("born.own_session={session_is_own}"),
        format!(
            "born.directory={}",
            std::env::current_dir().map_or("?".into(), |path| path.display().to_string())
        ),
        format!("born.environment={}", variables.join(" ")),
        format!("born.groups={}", field("Groups:").split_whitespace().count()),
    ]
}
