#![forbid(unsafe_code)]
//! Programs whose file another one has replaced under its name, as an upgrade of the host does.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};

use nix::sys::signal::Signal;
use vmm_core::supervisor::chronicle::Event;
use vmm_core::supervisor::control::{Reply, Request};

use super::adoption::{disk, ends_with, events, signal, started};
use super::operator::{event, said};
use super::place::Place;
use super::swaps::{process, request, swap};

pub const ALL: &[(&str, fn())] = &[
    (
        "servers_that_follow_a_death_are_of_the_file_that_served_whatever_has_its_name_now",
        servers_that_follow_a_death_are_of_the_file_that_served_whatever_has_its_name_now,
    ),
    (
        "a_swap_takes_the_file_that_has_the_name_now_and_goes_back_to_the_one_before_if_it_only_dies",
        a_swap_takes_the_file_that_has_the_name_now_and_goes_back_to_the_one_before_if_it_only_dies,
    ),
    (
        "a_held_device_is_resumed_with_the_file_that_was_put_in_place",
        a_held_device_is_resumed_with_the_file_that_was_put_in_place,
    ),
];

/// Bytes of a play's name at the end of a file.
const PLAY_BYTES: usize = 16;

/// The disk's serial number that has its servers play what their own file says.
const AS_FILED: &str = "memory=1M,serial=as-filed";

/// What a process (its number, or `self`) plays: that of the last bytes of the file that it runs.
pub fn filed_play(process: &str) -> String {
    let mut play = String::new();
    let mut file = File::open(format!("/proc/{process}/exe")).expect("it runs");
    file.seek(SeekFrom::End(-(PLAY_BYTES as i64)))
        .expect("it is longer");
    file.read_to_string(&mut play).expect("text");
    play.trim().to_owned()
}

/// Puts a file of that play under the name of the disk's program, as a package manager does.
fn put(place: &Place, play: &str) {
    let new = place.path("new");
    std::fs::copy(std::env::current_exe().expect("known"), &new).expect("copied");
    let mut file = OpenOptions::new().append(true).open(&new).expect("opened");
    write!(file, "{play:>PLAY_BYTES$}").expect("written");
    drop(file);
    std::fs::rename(new, place.path("bulkhead-block")).expect("renamed");
}

/// Waits until the server of that generation serves.
fn wait_serving(place: &Place, wanted: u32) {
    event(place, |event| match event {
        Event::Serving { generation, .. } if *generation == wanted => Some(()),
        _ => None,
    });
}

fn servers_that_follow_a_death_are_of_the_file_that_served_whatever_has_its_name_now() {
    for is_adopted in [false, true] {
        let place = Place::new();
        put(&place, "fine");
        let mut supervisor = started(&place, AS_FILED);
        assert!(!said(&place, &["device", "list", "vm"]).contains("replaced"));
        put(&place, "fail");
        if is_adopted {
            supervisor.kill();
            supervisor = place.adopt("vm");
            place.wait_until_it_runs();
        }
        let list = said(&place, &["device", "list", "vm"]);
        assert!(list.ends_with("/bulkhead-block replaced=yes\n"), "{list}");
        let old = process(&place, "disk0");
        signal(old, Signal::SIGKILL);
        wait_serving(&place, 2);
        let new = process(&place, "disk0");
        assert_eq!(filed_play(&new.to_string()), "fine");
        ends_with(&place, supervisor, &[old, new]);
    }
}

fn a_swap_takes_the_file_that_has_the_name_now_and_goes_back_to_the_one_before_if_it_only_dies() {
    for is_adopted in [false, true] {
        let place = Place::new();
        put(&place, "fine");
        let flags = [
            "--cmdline",
            "watch-serve",
            "--disk",
            AS_FILED,
            "--console",
            "none",
        ];
        let mut supervisor = place.start(&flags);
        place.wait_until_it_runs();
        put(&place, "dies-serving");
        if is_adopted {
            supervisor.kill();
            supervisor = place.adopt("vm");
            place.wait_until_it_runs();
        }
        let swapped = swap(&place, &request(None));
        assert!(matches!(swapped, Reply::Swapped { .. }), "{swapped:?}");
        let path = place.path("bulkhead-block").display().to_string();
        let names = event(&place, |event| match event {
            Event::FellBack { from, to, .. } => Some((from.clone(), to.clone())),
            _ => None,
        });
        assert_eq!(names, (path.clone(), path.clone()));
        // Three have died.
        wait_serving(&place, 5);
        assert_eq!(filed_play(&process(&place, "disk0").to_string()), "fine");
        let line = disk(&place).to_string();
        assert!(
            line.ends_with(&format!(" program={path} gave-up={path}")),
            "{line}"
        );
        let said = ends_with(&place, supervisor, &[]);
        let sentence = format!(": disk0 goes back to the file that was {path} before the swap\n");
        assert!(said.contains(&sentence), "{said}");
    }
}

fn a_held_device_is_resumed_with_the_file_that_was_put_in_place() {
    let place = Place::new();
    put(&place, "dies-at-work");
    let flags = ["--cmdline", "watch-loop", "--disk", AS_FILED, "--console", "none"];
    let supervisor = place.start(&flags);
    place.wait_until_it_runs();
    event(&place, |event| matches!(event, Event::Held { .. }).then_some(()));
    put(&place, "fine");
    let device = "disk0".to_owned();
    let resumed = place.ask(&Request::Resume {
        device,
        program: None,
    });
    assert_eq!(resumed, [Reply::Done]);
    event(&place, |event| {
        matches!(event, Event::Resumed { .. }).then_some(())
    });
    let deaths = |events: &[Event]| {
        let death = |event: &&Event| matches!(event, Event::Death { .. });
        events.iter().filter(death).count()
    };
    let before = deaths(&events(&place));
    let generation = super::swaps::until(|| {
        let line = disk(&place);
        (line.state == "serves").then_some(line.generation)
    });
    assert!(generation > 1);
    assert!(!said(&place, &["device", "list", "vm"]).contains("replaced"));
    assert_eq!(deaths(&events(&place)), before);
    ends_with(&place, supervisor, &[]);
}
