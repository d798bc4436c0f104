//! The supervisor: starts the child, looks at it, lets it go, and says how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{getegid, geteuid};
use sandbox::{Child, Identity, Lasting, Namespaces, Options, Spawn, audit, spawn};

/// Limit: a child on a loaded machine gets this long for each step; nothing depends on how long it really takes.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(words: &[&str]) -> i32 {
    let (mut namespaces, mut identity, mut options) = (Namespaces::all(), Identity::own(3), Vec::new());
    let mut lasting = None;
    let mut rest = words;
    while let [option, more @ ..] = rest
        && let Some(option) = option.strip_prefix("--")
    {
        match option {
            "no-namespaces" => namespaces = Namespaces::none(),
            "lasting" => lasting = Some(Arc::new(Lasting::new().expect("root may make them"))),
            "no-user-namespace" => namespaces = namespaces.without(Namespaces::USER),
            "keep-identity" => identity = Identity::Keep,
            "host-without-user-namespaces" => {
                forbid_user_namespaces();
                identity = Identity::own(3);
            }
            "wrong-identity" => {
                identity = Identity::Uid {
                    uid: 12345,
                    gid: 12345,
                }
            }
            other => options.push(other),
        }
        rest = more;
    }
    let [profile, deeds @ ..] = rest else {
        panic!("which profile?")
    };

    leave_a_mess();
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
    let extra = File::open("/dev/zero").expect("/dev/zero can be opened");
    let strictness = Options {
        require_full: options.contains(&"require-full"),
    };
    let options = options.join(",");
    let arguments = ["child", &options].into_iter().chain(deeds.iter().copied());
    let spec = Spawn {
        program: std::env::current_exe().expect("this program has a path"),
        file: None,
        args: arguments.map(OsString::from).collect(),
        env: vec![("ONLY".into(), "this".into())],
        fds: vec![(theirs, 3), (extra.into(), 9)],
        namespaces,
        lasting,
        stderr: None,
        identity,
        jail: Some((crate::profile(profile), strictness)),
    };
    let mut child = match spawn(spec) {
        Ok(child) => child,
        Err(error) => {
            println!("spawn={error}");
            return 1;
        }
    };
    println!("pid={}", child.pid);
    if let Identity::Uid { uid, .. } = identity {
        println!("identity={uid}");
    }
    if listen(&ours, &mut child) {
        look_at(&child);
        // A child that is already gone says so below.
        let _ = send(ours.as_raw_fd(), b"go", MsgFlags::empty());
        println!("looked=");
        listen(&ours, &mut child);
    }
    match child.wait_at_most(PATIENCE) {
        Ok(Some(cause)) => println!("cause={cause:?}"),
        other => println!("cause={other:?}"),
    }
    0
}

/// Makes this process believe that it is on a host that has user namespaces switched off: it goes into one (as the
/// user it is) whose limit on further ones is zero.
fn forbid_user_namespaces() {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).expect("the host itself has user namespaces");
    let write = |path: &str, text: String| {
        std::fs::write(path, text).expect("a new user namespace is ours to set up")
    };
    write("/proc/self/setgroups", "deny".to_owned());
    write("/proc/self/uid_map", format!("{uid} {uid} 1"));
    write("/proc/self/gid_map", format!("{gid} {gid} 1"));
    write("/proc/sys/user/max_user_namespaces", "0".to_owned());
}

/// Descriptors that are not to be inherited although nothing marks them, a blocked and an ignored signal.
fn leave_a_mess() {
    for _ in 0..5 {
        let leak: OwnedFd = File::open("/dev/null").expect("/dev/null can be opened").into();
        fcntl(&leak, FcntlArg::F_SETFD(FdFlag::empty())).expect("a flag can be cleared");
        // Stays open until this process ends, as a forgotten descriptor would.
        std::mem::forget(leak);
    }
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    blocked.add(Signal::SIGTERM);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).expect("a signal can be blocked");
}

/// Prints the child's messages. True if it says that it is ready, false once it has nothing more to say.
fn listen(socket: &OwnedFd, child: &mut Child) -> bool {
    let timeout = PollTimeout::try_from(PATIENCE).expect("the constant fits");
    let mut buffer = [0; 4096];
    loop {
        let ready = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout);
        assert_eq!(ready, Ok(1), "the child says nothing: {:?}", child.try_wait());
        let text = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) | Err(_) => return false,
            Ok(length) => String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned(),
        };
        if text == "ready=" {
            return true;
        }
        println!("{text}");
    }
}

fn look_at(child: &Child) {
    let audit = match audit(child.pid) {
        Ok(audit) => audit,
        Err(error) => {
            println!("audit={error}");
            return;
        }
    };
    println!("audit={audit}");
    println!("audit.name={}", audit.name);
    println!("audit.uid={}", audit.uid);
    println!("audit.groups={}", audit.group_count);
    println!("audit.no_capabilities={}", audit.capabilities.is_empty());
    println!("audit.no_new_privs={}", audit.no_new_privs);
    println!("audit.seccomp={:?}", audit.seccomp);
    println!(
        "audit.namespaces={}",
        audit
            .namespaces
            .map_or("?".into(), |namespaces| namespaces.to_string())
    );
    println!(
        "audit.root_entries={}",
        audit
            .root_entry_count
            .map_or("?".into(), |count| count.to_string())
    );
    let numbers = audit.descriptors.map(|list| {
        list.iter()
            .map(|(number, _)| number.to_string())
            .collect::<Vec<_>>()
    });
    println!(
        "audit.descriptors={}",
        numbers.map_or("?".into(), |numbers| numbers.join(" "))
    );
}
