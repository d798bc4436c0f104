#![forbid(unsafe_code)]
//! What an operator is told, and devices that are held.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmbus::ipc::{PeerFault, Socket};
use vmm_core::supervisor::chronicle::{Entry, Event, read_after};
use vmm_core::supervisor::control::{MAX_CLIENTS, Reply, Request};
use vmm_core::supervisor::{crash_report, oom};

use super::place::{PATIENCE, Place, Running};
use super::played::SWAPPED;
use super::swaps::{process, stop, until, with_disk};

pub const ALL: &[(&str, fn())] = &[
    (
        "a_death_is_told_by_events_and_a_report",
        a_death_is_told_by_events_and_a_report,
    ),
    (
        "a_server_that_the_kernel_kills_for_want_of_memory_is_told_to_be_its_victim",
        a_server_that_the_kernel_kills_for_want_of_memory_is_told_to_be_its_victim,
    ),
    (
        "a_server_that_does_not_answer_is_killed_and_one_that_answers_is_not",
        a_server_that_does_not_answer_is_killed_and_one_that_answers_is_not,
    ),
    (
        "a_device_whose_servers_only_die_is_held_until_somebody_resumes_it",
        a_device_whose_servers_only_die_is_held_until_somebody_resumes_it,
    ),
    (
        "a_vm_that_is_so_configured_ends_when_a_device_would_be_held",
        a_vm_that_is_so_configured_ends_when_a_device_would_be_held,
    ),
    (
        "what_happened_can_be_asked_for_when_the_vm_has_ended",
        what_happened_can_be_asked_for_when_the_vm_has_ended,
    ),
    (
        "who_follows_the_events_hears_of_each_and_of_the_end",
        who_follows_the_events_hears_of_each_and_of_the_end,
    ),
    (
        "one_person_more_than_a_supervisor_listens_to_waits_for_his_turn",
        one_person_more_than_a_supervisor_listens_to_waits_for_his_turn,
    ),
    (
        "the_command_that_follows_events_goes_on_with_the_next_supervisor_or_says_that_there_is_none",
        the_command_that_follows_events_goes_on_with_the_next_supervisor_or_says_that_there_is_none,
    ),
];

/// All events so far.
pub fn events(place: &Place) -> Vec<Entry> {
    read_after(&place.path("run/vm"), 0)
}

/// The first event for which there is something to say.
pub fn event<T>(place: &Place, look: impl Fn(&Event) -> Option<T>) -> T {
    until(|| events(place).iter().find_map(|entry| look(&entry.event)))
}

fn kill_hard(process: i32) {
    kill(Pid::from_raw(process), Signal::SIGKILL).expect("killed");
}

fn a_death_is_told_by_events_and_a_report() {
    let place = Place::new();
    let running = with_disk(&place, "noisy");
    kill_hard(process(&place, "disk0"));
    event(&place, |event| match event {
        Event::Serving {
            device,
            generation: 2,
            stall_us,
        } => {
            assert_eq!(device, "disk0");
            assert!((1..30_000_000).contains(stall_us), "{stall_us}");
            Some(())
        }
        _ => None,
    });
    let (cause, number) = event(&place, |event| match event {
        Event::Death {
            device,
            generation: 1,
            cause,
            why: None,
            report,
        } => Some((format!("{device} {cause}"), report.expect("there is one"))),
        _ => None,
    });
    // Whether the kernel is to blame for it is this host's matter.
    assert!(cause.starts_with("disk0 killed by SIGKILL"), "{cause}");
    let names: Vec<String> = events(&place)
        .iter()
        .map(|entry| serde_json::to_value(&entry.event).expect("JSON")["event"].to_string())
        .collect();
    assert_eq!(names, ["\"started\"", "\"death\"", "\"restart\"", "\"serving\""]);
    let folder = place.path("run/vm");
    let text = until(|| {
        crash_report::read(&folder, number)
            .ok()
            .filter(|text| text.contains("recorder"))
    });
    for part in [
        "disk0 (server 1) killed by SIGKILL",
        "deaths of disk0: 1\n",
        " alert\n",
        "flight recorder: 0 events",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert_eq!(crash_report::list(&folder).len(), 1);
    stop(&place, running);
}

/// A memory control group of this test's own; `None`: none can be made here.
struct Group(PathBuf);

impl Group {
    fn new(limit: &str) -> Option<Self> {
        let (parent, counter) = oom::own_group()?;
        let group = Group(parent.join(format!("bulkhead-test-{}", std::process::id())));
        std::fs::create_dir(&group.0).ok()?;
        let file = match counter {
            "memory.events" => "memory.max",
            _ => "memory.limit_in_bytes",
        };
        std::fs::write(group.0.join(file), limit).ok()?;
        Some(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its last process may not be reaped yet, by whoever that is.
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

fn a_server_that_the_kernel_kills_for_want_of_memory_is_told_to_be_its_victim() {
    let Some(group) = Group::new("96M") else {
        println!("SKIP supervisor: this user may make no memory control group");
        return;
    };
    let place = Place::new();
    let flags = ["--cmdline", "watch-loop", "--disk", "memory=1M,serial=eats"];
    let supervisor = place.command(&flags);
    let mut command = Command::new("/bin/sh");
    let script = "echo $$ > \"$0\"/cgroup.procs && exec \"$@\"";
    command.args(["-c", script]).arg(&group.0);
    command.arg(supervisor.get_program()).args(supervisor.get_args());
    let running = Running {
        child: command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started"),
    };
    let cause = event(&place, |event| match event {
        Event::Death { cause, why: None, .. } => Some(cause.clone()),
        _ => None,
    });
    let words = "killed by SIGKILL; the OOM killer of the kernel was at work in this VM's control group at that time \
                 (oom_kill went from 0 to 1 in the last ";
    assert!(cause.starts_with(words), "{cause}");
    let ended = stop(&place, running);
    let line = format!("bulkhead: disk0 was {words}");
    assert!(ended.stderr.contains(&line), "{}", ended.stderr);
}

fn a_server_that_does_not_answer_is_killed_and_one_that_answers_is_not() {
    let place = Place::new();
    let running = place.start(&[
        "--cmdline",
        "watch",
        "--patience",
        "1",
        "--disk",
        "memory=1M,serial=deaf",
        "--disk",
        "memory=2M",
    ]);
    place.wait_until_it_runs();
    let good = process(&place, "disk1");
    // The deaf one is found out twice; the other one is asked as often.
    for deaf in [1, 2] {
        event(&place, |event| match event {
            Event::Death {
                device,
                generation,
                why: Some(why),
                ..
            } if device == "disk0" && *generation == deaf => {
                assert!(why.contains("hangs: no answer for 1 seconds"), "{why}");
                Some(())
            }
            _ => None,
        });
    }
    assert_eq!(process(&place, "disk1"), good);
    stop(&place, running);
}

/// A VM whose disk's servers die as soon as they serve.
fn with_a_loop(place: &Place, restart: &str) -> Running {
    place.start(&[
        "--cmdline",
        "watch-loop",
        "--restart",
        restart,
        "--disk",
        "memory=1M,serial=dies-at-work",
    ])
}

fn a_device_whose_servers_only_die_is_held_until_somebody_resumes_it() {
    let place = Place::new();
    let running = with_a_loop(&place, "careful");
    place.wait_until_it_runs();
    let resume = |program| Request::Resume {
        device: "disk0".to_owned(),
        program,
    };
    match &place.ask(&resume(None))[..] {
        [Reply::Refused(why)] => assert_eq!(why, "disk0 is not held"),
        other => panic!("{other:?}"),
    }
    let why = event(&place, |event| match event {
        Event::Held { device, why } if device == "disk0" => Some(why.clone()),
        _ => None,
    });
    assert!(why.starts_with("disk0 died 10 times in "), "{why}");
    // The last report is stored after the event was told.
    until(|| (crash_report::list(&place.path("run/vm")).len() == 10).then_some(()));
    // As a person does: the command looks where a link leads, so this is a file of its own.
    let good = place.path(&format!("{SWAPPED}good"));
    std::fs::copy(std::env::current_exe().expect("known"), &good).expect("copied");
    let good = good.display().to_string();
    said(&place, &["device", "resume", "vm", "disk0", "--binary", &good]);
    event(&place, |event| {
        matches!(event, Event::Serving { generation: 11, .. }).then_some(())
    });
    assert!(
        events(&place)
            .iter()
            .any(|entry| matches!(entry.event, Event::Resumed { .. }))
    );
    stop(&place, running);
}

fn a_vm_that_is_so_configured_ends_when_a_device_would_be_held() {
    let place = Place::new();
    let ended = with_a_loop(&place, "or-end").wait();
    assert_ne!(ended.status.code(), Some(0));
    assert!(
        ended.stderr.contains("disk0 died 10 times in "),
        "{}",
        ended.stderr
    );
    place.expect_ended();
}

/// What `bulkhead` says of the VM.
pub fn said(place: &Place, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(args)
        .arg("--run-folder")
        .arg(place.path("run"))
        .output()
        .expect("started");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn what_happened_can_be_asked_for_when_the_vm_has_ended() {
    let place = Place::new();
    let running = with_disk(&place, "");
    kill_hard(process(&place, "disk0"));
    event(&place, |event| {
        matches!(event, Event::Serving { .. }).then_some(())
    });
    let ended = stop(&place, running);
    let hint = "bulkhead: a crash report is kept: bulkhead crashes vm\n";
    assert!(ended.stderr.ends_with(hint), "{}", ended.stderr);
    place.expect_ended();
    let first = said(&place, &["crashes", "vm"]);
    assert!(
        first.starts_with("1 ") && first.contains("disk0 (server 1) killed by SIGKILL"),
        "{first}"
    );
    assert!(said(&place, &["crashes", "vm", "1"]).contains("deaths of disk0: 1\n"));
    assert!(said(&place, &["events", "vm"]).ends_with("the VM ends: somebody ended it\n"));

    // A calm VM of that name has nothing to add but that it was there.
    let calm = place.run(&["--cmdline", "poweroff"]);
    assert_eq!(calm.stderr, "");
    assert_eq!(said(&place, &["crashes", "vm"]), first);
    let events = said(&place, &["events", "vm"]);
    assert!(
        events.ends_with("the VM ends: the guest switched itself off\n"),
        "{events}"
    );
    assert_eq!(events.matches("the guest runs").count(), 2, "{events}");

    let running = with_disk(&place, "");
    kill_hard(process(&place, "disk0"));
    until(|| (crash_report::list(&place.path("run/vm")).len() == 2).then_some(()));
    assert!(stop(&place, running).stderr.ends_with(hint));
    let both = said(&place, &["crashes", "vm"]);
    assert!(both.starts_with(&first) && both.contains("\n2 "), "{both}");
}

fn who_follows_the_events_hears_of_each_and_of_the_end() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let mut socket = place.connect();
    let request = Request::Events {
        after: 0,
        follow: true,
    };
    socket.send(&request, &[]).expect("sent");
    kill_hard(process(&place, "disk0"));
    event(&place, |event| {
        matches!(event, Event::Serving { .. }).then_some(())
    });
    stop(&place, running);
    let mut heard = String::new();
    while let Ok(Some((Reply::Events(lines), _))) = socket.recv::<Reply>() {
        heard += &lines.join("\n");
        heard += "\n";
    }
    for name in ["started", "death", "restart", "serving", "ending"] {
        let field = format!("\"event\":\"{name}\"");
        assert_eq!(heard.matches(&field).count(), 1, "{name} in {heard}");
    }
}

/// Whoever turned it away would be asked again by it at once, and again.
fn one_person_more_than_a_supervisor_listens_to_waits_for_his_turn() {
    let place = Place::new();
    let running = with_disk(&place, "");
    let mut crowd: Vec<Socket> = (0..MAX_CLIENTS).map(|_| place.connect()).collect();
    for socket in &mut crowd {
        socket.send(&Request::Status, &[]).expect("sent");
        assert!(matches!(heard(socket), Ok(Reply::Status { .. })));
    }
    let mut last = place.connect();
    last.send(&Request::Status, &[]).expect("sent");
    // The others are served meanwhile, and he is not sent away.
    for socket in &mut crowd {
        socket.send(&Request::Status, &[]).expect("sent");
        assert!(matches!(heard(socket), Ok(Reply::Status { .. })));
    }
    assert!(matches!(last.recv::<Reply>(), Ok(None)));
    drop(crowd.pop());
    assert!(matches!(heard(&mut last), Ok(Reply::Status { .. })));
    drop((crowd, last));
    stop(&place, running);
}

/// The next answer.
fn heard(socket: &mut Socket) -> Result<Reply, PeerFault> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some((reply, _)) = socket.recv::<Reply>()? {
            return Ok(reply);
        }
        assert!(Instant::now() < deadline, "no answer");
        std::thread::yield_now();
    }
}

fn the_command_that_follows_events_goes_on_with_the_next_supervisor_or_says_that_there_is_none() {
    let place = Place::new();
    let supervisor = place.start(&["--cmdline", "watch", "--disk", "memory=1M", "--console", "none"]);
    place.wait_until_it_runs();
    let follow = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .args(["events", "vm", "--follow", "--json", "--run-folder"])
            .arg(place.path("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let said = BufReader::new(child.stdout.take().expect("piped")).lines();
        let said = said.map(|line| serde_json::from_str(&line.expect("text")).expect("JSON"));
        (Running { child }, said)
    };
    let is_next = |said: &mut dyn Iterator<Item = serde_json::Value>, name: &str| {
        let event = said.next().expect("one more event");
        assert_eq!(event["event"], name, "{event}");
        event
    };

    let (alone, mut said) = follow();
    is_next(&mut said, "started");
    let (stopped, mut heard) = follow();
    is_next(&mut heard, "started");
    stopped.signal(Signal::SIGSTOP);
    supervisor.kill();
    assert!(said.next().is_none());
    let sentence =
        "bulkhead: the supervisor of vm was killed, and the VM goes on: `bulkhead adopt vm` takes it over\n";
    alone.wait().expect(1, sentence);

    // By the time that this one looks there is another one.
    let adopter = place.adopt("vm");
    place.wait_until_it_runs();
    stopped.signal(Signal::SIGCONT);
    is_next(&mut heard, "adopted");
    kill_hard(process(&place, "disk0"));
    let death = is_next(&mut heard, "death");
    assert_eq!(
        (&death["device"], &death["generation"]),
        (&"disk0".into(), &1.into())
    );
    is_next(&mut heard, "restart");
    let serving = is_next(&mut heard, "serving");
    assert!(
        serving["stall_us"].as_u64().is_some_and(|stall| stall > 0),
        "{serving}"
    );
    stop(&place, adopter);
    is_next(&mut heard, "ending");
    assert!(heard.next().is_none());
    stopped.wait().expect(0, "");
}
