//! Kills at any instruction under a load that verifies every frame, completion and credit.

use crate::network::running;
use device_net::vsc::DriverOptions;
use device_net::vsc::load::{Load, Tally, Watch};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// How a server's life ends.
#[derive(Clone, Copy)]
enum End {
    Kill,
    Stop,
}

/// Servers come and go under a load; what became of everything. Each server lives until the load has moved on by a
/// hundred packets, and then for up to two milliseconds, so that it dies in the middle of whatever it does.
fn under_load(options: DriverOptions, ends: &[End], seed: u64) -> (Tally, u64) {
    let (mut room, network, driver) = running(options);
    let channels = driver.channels.len();
    assert_eq!(channels, usize::from(options.queues));
    let mut load = Load::new(driver, network.into_stream(), seed).expect("a load");
    let watch = Watch::default();
    let mut random = seed;
    let mut slowest = 0;
    let outcome = std::thread::scope(|scope| {
        let worker = scope.spawn(|| load.run(&watch));
        let work_on = || {
            let before = watch.progress();
            while watch.progress() < before + 100 && !worker.is_finished() {
                std::thread::yield_now();
            }
        };
        for end in ends {
            work_on();
            if worker.is_finished() {
                break;
            }
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let moment = Instant::now() + Duration::from_micros(random >> 33 & 2047);
            while Instant::now() < moment {
                std::hint::spin_loop();
            }
            watch.dying();
            match end {
                End::Kill => room.kill().expect("killed"),
                End::Stop => assert!(room.stop().expect("it ends").is_success()),
            }
            watch.dead();
            room.start_successor().expect("the successor attaches");
            slowest = slowest.max(watch.take_slowest());
        }
        // The last one, too.
        (0..10).for_each(|_| work_on());
        watch.stop();
        worker.join().expect("no panic")
    });
    if let Err(error) = outcome {
        panic!("seed {seed:#x}: {error}: {}", load.describe());
    }
    let deadline = room.deadline();
    let free = || {
        let free = room
            .inspect("receive-buffer/free")
            .map_err(|error| error.to_string())?;
        free.parse::<u32>().map_err(|error| error.to_string())
    };
    let tally = load.finish(&watch, free, deadline).expect("all is answered");
    println!("seed {seed:#x}, slowest {slowest} us: {}", load.describe());
    assert!(tally.is_clean(), "seed {seed:#x}: {}", load.describe());
    assert_eq!((tally.completed, tally.answers), (tally.packets, tally.requests));
    let deaths = ends.len() as u64;
    assert!(
        tally.completed + tally.received > 100 * deaths && tally.received > 0,
        "{tally:?}"
    );
    (tally, deaths)
}

fn seed() -> u64 {
    RandomState::new().hash_one("a load")
}

fn options(queues: u16) -> DriverOptions {
    DriverOptions {
        queues,
        ..DriverOptions::default()
    }
}

#[test]
fn fifty_kills_under_load_lose_double_and_change_nothing() {
    under_load(options(4), &[End::Kill; 50], seed());
}

/// A small buffer, so that credits run out all the time.
#[test]
fn kills_while_credits_run_out_leave_every_credit_where_it_was() {
    let options = DriverOptions {
        receive_pages: 64,
        ..options(2)
    };
    under_load(options, &[End::Kill; 15], seed());
}

#[test]
fn polite_stops_under_load_lose_double_and_change_nothing() {
    under_load(options(4), &[End::Stop; 15], seed());
}

#[test]
fn without_deaths_every_frame_arrives() {
    let (tally, _) = under_load(options(4), &[], seed());
    assert_eq!(tally.dropped_in, 0);
}
