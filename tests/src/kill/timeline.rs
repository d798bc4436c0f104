//! When servers were killed, and how long the guest's requests took because of it.
//!
//! For every kill (the moment just before the signal is sent):
//! - *stall*: the longest time from sending a request to its completion, of all requests that were under way at the
//!   kill. What a program in the guest would see at worst.
//! - *silence*: the longest time in which no request at all was completed, from the kill until all those are.
//! - *phases*: when `bulkhead-bus` heard that the dead server is gone (the supervisor has noticed, and its I/O is over),
//!   that its successor is started, and when that one said hello; after that it replays.
//!
//! A kill that comes before all requests that were under way at the one before are completed is *chained*: its stall
//! is that of two deaths or more. Chained kills are counted, checked and shown, but not part of the percentiles; nor are
//! kills while the load's network did not read, as it does now and then.
//!
//! What is under way at a moment takes its time without any death, too, the longer the deeper the queues are. So the same is
//! measured of *moments* at which nothing happens: the longest time of all requests that were under way then.
//!
//! A planned replacement counts from the moment at which the old server is gone: what is under way then, whenever it was
//! sent, has waited for the new one.

#![forbid(unsafe_code)]

use device_net::vsc::load::Watch;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One request's life.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// Before it was made visible to the server.
    pub sent: Instant,
    /// After its completion was read.
    pub done: Instant,
}

#[derive(Debug)]
struct Kill {
    at: Instant,
    under_way: usize,
    stall: Duration,
    silence: Duration,
    phases: [Option<Duration>; PHASES.len()],
    chained: bool,
}

/// See the module.
pub const PHASES: [&str; 3] = ["gone", "successor started", "successor says hello"];

#[derive(Debug, Default)]
struct State {
    kills: Vec<Kill>,
    /// Generations of servers that were killed and are not known to be gone.
    killed: BTreeSet<u32>,
    /// Told to go or to die, and not known to be gone.
    ordered: usize,
    /// One is being replaced, and counts from the moment at which it is gone.
    replacing: bool,
    /// Until then the load's network did not read, so that what was under way took long for that.
    deaf_until: Option<Instant>,
    /// Of each channel: when its oldest request under way was sent, and how many are under way.
    oldest: Vec<(Option<Instant>, usize)>,
    completed: u64,
    last_completion: Option<Instant>,
    /// Requests that saw no kill.
    calm: Vec<Duration>,
    /// When nothing happened, and how long what was under way then took, unless it was for the load's network.
    moments: Vec<(Instant, Option<Duration>)>,
    /// What the thread that kills waits for. The others wake it for nothing less, because each time would cost them, and
    /// the processor it wakes on, some of the time that is measured.
    awaited: Option<Awaited>,
}

/// So many are completed, among them all that was sent until then, or else until the last kill.
#[derive(Clone, Copy, Debug, Default)]
struct Awaited {
    sent_until: Option<Instant>,
    completed: u64,
}

impl State {
    fn note_completion(&mut self, done: Instant) {
        let over = self.is_over();
        let last = self.last_completion.replace(done);
        if let Some(kill) = self.kills.last_mut()
            && (!over || kill.silence == Duration::ZERO)
        {
            let from = last.map_or(kill.at, |last| last.max(kill.at));
            kill.silence = kill.silence.max(done.saturating_duration_since(from));
        }
    }

    fn push_kill(&mut self) {
        let chained = !self.is_over();
        if chained && let Some(last) = self.kills.last_mut() {
            last.chained = true;
        }
        let under_way = self.oldest.iter().map(|(_, under_way)| under_way).sum();
        self.kills.push(Kill {
            at: Instant::now(),
            under_way,
            stall: Duration::ZERO,
            silence: Duration::ZERO,
            phases: [None; PHASES.len()],
            chained,
        });
    }

    fn is_over(&self) -> bool {
        self.kills.last().is_none_or(|last| self.is_completed(last.at))
    }

    /// Whether all that was sent until then is completed.
    fn is_completed(&self, sent_until: Instant) -> bool {
        self.oldest
            .iter()
            .all(|(oldest, _)| oldest.is_none_or(|sent| sent > sent_until))
    }

    fn has(&self, awaited: Awaited) -> bool {
        let is_past = match awaited.sent_until {
            Some(sent_until) => self.is_completed(sent_until),
            None => self.is_over(),
        };
        is_past && self.completed >= awaited.completed
    }
}

/// Shared by whoever sends requests and whoever kills.
#[derive(Debug, Default)]
pub struct Timeline {
    state: Mutex<State>,
    changed: Condvar,
    /// Hears of the same deaths, for a load on a network interface.
    pub watch: Watch,
}

/// What the kills did, all times ascending.
#[derive(Clone, Debug, Default)]
pub struct Stalls {
    /// Of kills alone.
    pub stalls: Vec<Duration>,
    /// Of kills alone.
    pub silences: Vec<Duration>,
    /// Of kills alone: from the kill to each of [`PHASES`].
    pub phases: [Vec<Duration>; PHASES.len()],
    /// Of chained kills.
    pub chained: Vec<Duration>,
    /// Requests under way at each kill.
    pub under_way: Vec<usize>,
    /// A sample of requests that saw no kill.
    pub calm: Vec<Duration>,
    /// The longest request under way at each moment at which nothing happened.
    pub moments: Vec<Duration>,
    /// Requests completed in all.
    pub completed: u64,
}

/// Limit: a sample is enough for the percentiles of undisturbed requests.
const CALM_SAMPLES: usize = 1 << 16;

impl Timeline {
    /// For so many channels.
    pub fn new(channels: usize) -> Self {
        let state = State {
            oldest: vec![(None, 0); channels],
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            watch: Watch::default(),
        }
    }

    /// Nothing that could panic is done under the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests of a channel were completed, or sent.
    pub fn report(&self, channel: usize, lives: &[Life], oldest: Option<Instant>, under_way: usize) {
        let mut state = self.lock();
        state.completed += lives.len() as u64;
        if let Some(life) = lives.last() {
            state.note_completion(life.done);
        }
        state.oldest[channel] = (oldest, under_way);
        let deaf_until = state.deaf_until;
        for life in lives {
            let was_deaf = deaf_until.is_some_and(|until| until >= life.sent);
            let took = life.done.saturating_duration_since(life.sent);
            if let Some((at, longest)) = state.moments.last_mut()
                && (life.sent..life.done).contains(at)
            {
                *longest = longest.filter(|_| !was_deaf).map(|longest| longest.max(took));
            }
            let mut saw_one = false;
            for kill in state.kills.iter_mut().rev() {
                if kill.at < life.sent {
                    break;
                }
                if kill.at < life.done {
                    saw_one = true;
                    kill.stall = kill.stall.max(took);
                    kill.chained |= was_deaf;
                }
            }
            if !saw_one && !was_deaf && state.calm.len() < CALM_SAMPLES {
                state.calm.push(took);
            }
        }
        let is_awaited = state.awaited.is_some_and(|awaited| state.has(awaited));
        drop(state);
        if is_awaited {
            self.changed.notify_all();
        }
    }

    /// Looks on at a moment at which nothing happens, until what is under way then is completed. `false`: not before the
    /// deadline.
    pub fn look_on(&self, deadline: Instant) -> bool {
        let now = Instant::now();
        self.lock().moments.push((now, Some(Duration::ZERO)));
        let awaited = Awaited {
            sent_until: Some(now),
            completed: 0,
        };
        self.wait(awaited, deadline)
    }

    /// Waits for that. `false`: not before the deadline.
    fn wait(&self, awaited: Awaited, deadline: Instant) -> bool {
        let mut state = self.lock();
        state.awaited = Some(awaited);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(state, left, |state| !state.has(awaited));
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        state.awaited = None;
        !waited.timed_out()
    }

    /// The server of that generation is killed now.
    pub fn kill(&self, generation: u32) {
        self.lock().killed.insert(generation);
        self.watch.dying();
        self.died();
    }

    /// A server is told to die at a moment of its own. [`Self::died`] or [`Self::withdraw`] follows.
    pub fn order(&self) {
        self.lock().ordered += 1;
        self.watch.dying();
    }

    /// A server that was ordered to die does so now.
    pub fn died(&self) {
        self.lock().push_kill();
    }

    /// A server is going to be replaced. What is under way when it is gone has waited for its successor.
    pub fn replace(&self) {
        self.order();
        self.lock().replacing = true;
    }

    /// The load's network does not read now.
    pub fn is_deaf(&self) {
        self.lock().deaf_until = Some(Instant::now());
    }

    /// One of [`PHASES`] was heard of.
    pub fn phase(&self, phase: usize) {
        let now = Instant::now();
        if let Some(kill) = self.lock().kills.last_mut() {
            kill.phases[phase].get_or_insert(now.saturating_duration_since(kill.at));
        }
    }

    /// `bulkhead-bus` hears that a server is gone, the first of [`PHASES`]. `false`: nobody had killed it.
    pub fn gone(&self, generation: u32) -> bool {
        let mut state = self.lock();
        if std::mem::take(&mut state.replacing) {
            state.push_kill();
        }
        drop(state);
        self.phase(0);
        let mut state = self.lock();
        let was_ordered = state.ordered > 0;
        let was_killed = state.killed.remove(&generation);
        if !was_killed && was_ordered {
            state.ordered -= 1;
        }
        if was_killed || was_ordered {
            self.watch.dead();
        }
        was_killed || was_ordered
    }

    /// The signal did not reach anybody.
    pub fn take_back(&self, generation: u32) {
        let mut state = self.lock();
        state.kills.pop();
        state.killed.remove(&generation);
        self.watch.dead();
    }

    /// The order to die was taken back in time.
    pub fn withdraw(&self) {
        let mut state = self.lock();
        state.replacing = false;
        state.ordered = state.ordered.saturating_sub(1);
        self.watch.dead();
    }

    /// Kills so far.
    pub fn kills(&self) -> usize {
        self.lock().kills.len()
    }

    /// Waits until everything that was under way at the last kill is completed and `completions` more are.
    /// `false`: not before the deadline.
    pub fn wait_over(&self, completions: u64, deadline: Instant) -> bool {
        let mut awaited = Awaited::default();
        if !self.wait(awaited, deadline) {
            return false;
        }
        awaited.completed = self.lock().completed.saturating_add(completions);
        self.wait(awaited, deadline)
    }

    /// What there is to say in the end.
    pub fn stalls(&self) -> Stalls {
        let state = self.lock();
        let mut stalls = Stalls {
            calm: state.calm.clone(),
            moments: state.moments.iter().filter_map(|(_, longest)| *longest).collect(),
            completed: state.completed,
            ..Stalls::default()
        };
        for kill in &state.kills {
            stalls.under_way.push(kill.under_way);
            if kill.chained {
                stalls.chained.push(kill.stall);
            } else {
                stalls.stalls.push(kill.stall);
                stalls.silences.push(kill.silence);
                for (times, phase) in stalls.phases.iter_mut().zip(kill.phases) {
                    times.extend(phase);
                }
            }
        }
        stalls.calm.sort();
        stalls.moments.sort();
        stalls.stalls.sort();
        stalls.silences.sort();
        stalls.phases.iter_mut().for_each(|times| times.sort());
        stalls.chained.sort();
        stalls.under_way.sort_unstable();
        stalls
    }
}

/// The value below which so many of a thousand lie: `sorted` ascending, nearest rank. Zero for none.
pub fn quantile(sorted: &[Duration], of_thousand: usize) -> Duration {
    let rank = (sorted.len() * of_thousand).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Upper edges of the histogram's bars, microseconds.
const EDGES_US: [u64; 17] = [
    100, 200, 500, 1000, 2000, 3000, 5000, 7000, 10_000, 15_000, 20_000, 30_000, 50_000, 100_000, 200_000,
    500_000, 1_000_000,
];

/// Lines of a histogram, from the first bar that is not empty to the last one.
pub fn histogram(sorted: &[Duration]) -> Vec<String> {
    let mut counts = [0usize; EDGES_US.len() + 1];
    for time in sorted {
        let us = time.as_micros() as u64;
        let bar = EDGES_US.iter().position(|&edge| us <= edge);
        counts[bar.unwrap_or(EDGES_US.len())] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let first = counts.iter().position(|&count| count > 0).unwrap_or(0);
    let last = counts.iter().rposition(|&count| count > 0).unwrap_or(0);
    let line = |bar: usize| {
        let count = counts[bar];
        let edge = match EDGES_US.get(bar) {
            Some(edge) => format!("<= {:>7.1} ms", *edge as f64 / 1000.0),
            None => format!(" > {:>7.1} ms", EDGES_US[EDGES_US.len() - 1] as f64 / 1000.0),
        };
        format!("  {edge} {count:>7} {}", "#".repeat((count * 50).div_ceil(most)))
    };
    if sorted.is_empty() {
        return Vec::new();
    }
    (first..=last).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_moment_at_which_nothing_happens_lasts_as_long_as_the_longest_request_under_way() {
        let timeline = Timeline::new(1);
        let start = Instant::now();
        timeline.report(0, &[], Some(start), 2);
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| timeline.look_on(start + Duration::from_secs(60)));
            while timeline.lock().moments.is_empty() {
                std::thread::yield_now();
            }
            let done = timeline.lock().moments[0].0 + 5 * MS;
            let lives = [start, start + MS / 1000].map(|sent| Life { sent, done });
            timeline.report(0, &lives, None, 0);
            assert!(looking.join().expect("it looks on"));
            let later = Life {
                sent: done,
                done: done + 50 * MS,
            };
            timeline.report(0, &[later], None, 0);
            assert_eq!(timeline.stalls().moments, [done - start]);
        });
    }

    #[test]
    fn a_stall_is_the_longest_request_under_way_at_the_kill() {
        let timeline = Timeline::new(1);
        let before = Instant::now();
        timeline.report(0, &[], Some(before), 2);
        timeline.kill(1);
        let kill = Instant::now();
        let lives = [
            Life {
                sent: before,
                done: kill + 20 * MS,
            },
            Life {
                sent: before,
                done: kill + 10 * MS,
            },
            // Sent later: not part of it.
            Life {
                sent: kill + MS,
                done: kill + 90 * MS,
            },
        ];
        timeline.report(0, &lives, None, 0);
        let stalls = timeline.stalls();
        assert_eq!(stalls.stalls, [kill + 20 * MS - before]);
        // The last one of a report stands for all of it.
        assert!((89 * MS..92 * MS).contains(&stalls.silences[0]));
        assert_eq!((stalls.under_way[0], stalls.calm.len()), (2, 1));
    }

    #[test]
    fn kills_before_the_last_one_is_over_do_not_count_for_the_percentiles() {
        let timeline = Timeline::new(1);
        let before = Instant::now();
        timeline.report(0, &[], Some(before), 1);
        timeline.kill(1);
        timeline.kill(2);
        assert!(!timeline.wait_over(0, Instant::now()));
        let done = Instant::now();
        timeline.report(0, &[Life { sent: before, done }], None, 0);
        assert!(timeline.wait_over(0, Instant::now()));
        let stalls = timeline.stalls();
        assert_eq!((stalls.stalls.len(), stalls.chained.len()), (0, 2));
    }

    #[test]
    fn a_death_that_nobody_ordered_is_not_taken_for_that_of_another() {
        let timeline = Timeline::new(1);
        timeline.kill(5);
        assert_eq!(
            [6, 5, 5].map(|server| timeline.gone(server)),
            [false, true, false]
        );
        timeline.order();
        assert_eq!([7, 8].map(|server| timeline.gone(server)), [true, false]);
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let times: Vec<Duration> = (1..=200).map(|ms| ms * MS).collect();
        assert_eq!(quantile(&times, 500), 100 * MS);
        assert_eq!(quantile(&times, 990), 198 * MS);
        assert_eq!(quantile(&times, 1000), 200 * MS);
        assert_eq!(quantile(&[], 990), Duration::ZERO);
    }

    #[test]
    fn a_histogram_has_every_value_once() {
        let times = [MS, 4 * MS, 4 * MS, 2000 * MS];
        let lines = histogram(&times);
        assert!(lines[0].contains("<=     1.0 ms       1"), "{}", lines[0]);
        assert!(lines[lines.len() - 1].contains(" >  1000.0 ms       1"));
        let counts: usize = lines
            .iter()
            .filter_map(|line| line.split_whitespace().nth(3)?.parse::<usize>().ok())
            .sum();
        assert_eq!(counts, 4);
    }
}
