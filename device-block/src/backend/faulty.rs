//! A backend that answers by a script: what the real ones do on broken hosts, at will.

use super::job::Op;
use super::{Backend, Begun, Geometry};
use std::collections::VecDeque;
use vmbus::mem::{GuestSpans, Uring};

/// What happens to one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All of it is done.
    Whole,
    /// The kernel's answer is this.
    Answer(i32),
    /// No room, this once.
    NoRoom,
    /// It goes through the io_uring (as a no-op) and then has this answer.
    Later(i32),
}

/// Follows the script, then does everything as asked.
pub struct FaultyBackend {
    geometry: Geometry,
    script: VecDeque<Fate>,
    later: Vec<(u64, i32)>,
    /// What was asked for.
    pub log: Vec<Op>,
}

impl FaultyBackend {
    pub fn new(size_bytes: u64, script: impl IntoIterator<Item = Fate>) -> Self {
        Self {
            geometry: Geometry {
                size_bytes,
                physical_block_bytes: 512,
                unmap_granularity_bytes: Some(512),
            },
            script: script.into_iter().collect(),
            later: Vec::new(),
            log: Vec::new(),
        }
    }
}

impl Backend for FaultyBackend {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn begin(&mut self, io: &mut Uring, op: Op, _data: Option<&GuestSpans>, number: u64) -> Begun {
        self.log.push(op);
        match self.script.pop_front().unwrap_or(Fate::Whole) {
            Fate::Whole => Begun::Over(match op {
                Op::Read { len, .. } | Op::Write { len, .. } => len as i32,
                Op::Sync | Op::Punch(_) => 0,
            }),
            Fate::Answer(result) => Begun::Over(result),
            Fate::NoRoom => Begun::NoRoom,
            Fate::Later(result) => {
                io.nop(number).expect("the test's io_uring has room");
                self.later.push((number, result));
                Begun::InFlight
            }
        }
    }

    fn end(&mut self, _op: Op, _data: Option<&GuestSpans>, number: u64, result: i32) -> i32 {
        match self.later.iter().position(|(waiting, _)| *waiting == number) {
            Some(position) => self.later.swap_remove(position).1,
            None => result,
        }
    }
}
