//! The requests that are at the backends now.

use super::job::{Ended, Job, Op, Work};
use super::{Backend, Begun};
use crate::scsi::sense::{Attempt, MediumFault};
use std::collections::VecDeque;
use vmbus::mem::{GuestSpans, Uring};

/// Limit: requests at the backends at once, of all channels together. Deeper queues wait in the guest's rings; no
/// disk gets faster beyond it, and the io_uring's slots are bounded by it.
pub const MAX_ACTIVE: usize = 256;

/// Names a request at the backends until it is over; then the number is used again.
pub type RequestId = u32;

/// What became of a new request.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    /// [`Engine::on_completion`] tells the end under this number.
    Active(RequestId),
    /// It is over.
    Over(Ended),
}

#[derive(Debug)]
struct Active {
    unit: usize,
    job: Job,
    op: Op,
    data: Option<GuestSpans>,
}

/// All requests at all backends of a controller.
pub struct Engine {
    backends: Vec<Box<dyn Backend>>,
    active: Vec<Option<Active>>,
    free: Vec<RequestId>,
    /// Those whose operation found no room.
    waiting: VecDeque<RequestId>,
    /// Added to a request's number: tells its completions from others on the same io_uring.
    number_base: u64,
}

impl Engine {
    /// An engine over these backends. Its operations have the numbers `number_base` to `number_base` + [`MAX_ACTIVE`].
    pub fn new(backends: Vec<Box<dyn Backend>>, number_base: u64) -> Self {
        Self {
            backends,
            active: (0..MAX_ACTIVE).map(|_| None).collect(),
            free: (0..MAX_ACTIVE as RequestId).rev().collect(),
            waiting: VecDeque::new(),
            number_base,
        }
    }

    /// No predecessor is at work any more.
    pub fn serve(&mut self) {
        self.backends.iter_mut().for_each(|backend| backend.serve());
    }

    /// Whether one more request can be started.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests at the backends.
    pub fn active_count(&self) -> usize {
        self.active.len() - self.free.len()
    }

    /// Starts a request on the backend `unit`. `data` is the guest's data of READ and WRITE, as long as the extent.
    ///
    /// # Panics
    /// Without room, or without such a unit: the caller has checked both.
    pub fn start(&mut self, io: &mut Uring, unit: usize, work: Work, data: Option<GuestSpans>) -> Started {
        let job = Job::new(work);
        let Some(op) = job.next_op() else {
            return Started::Over(Ok(0));
        };
        let id = self.free.pop().expect("the caller has asked for room");
        match self.run(io, Active { unit, job, op, data }, id) {
            Some(ended) => Started::Over(ended),
            None => Started::Active(id),
        }
    }

    /// An operation is over. `Some`: so is its request.
    pub fn on_completion(&mut self, io: &mut Uring, id: RequestId, result: i32) -> Option<Ended> {
        let mut active = self.active.get_mut(id as usize)?.take()?;
        let number = self.number_base + u64::from(id);
        let result = match self.backends.get_mut(active.unit) {
            Some(backend) => backend.end(active.op, active.data.as_ref(), number, result),
            None => result,
        };
        match active.job.on_result(result) {
            Some(ended) => {
                self.free.push(id);
                Some(ended)
            }
            None => self.next(io, active, id),
        }
    }

    /// Begins operations that had found no room. To be called after completions. Calls `over` for requests that
    /// ended at once.
    pub fn resume(&mut self, io: &mut Uring, mut over: impl FnMut(RequestId, Ended)) {
        for _ in 0..self.waiting.len() {
            let Some(id) = self.waiting.pop_front() else { break };
            let Some(active) = self.active.get_mut(id as usize).and_then(Option::take) else {
                continue;
            };
            if let Some(ended) = self.run(io, active, id) {
                over(id, ended);
            }
        }
    }

    /// Whether operations wait for room.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn next(&mut self, io: &mut Uring, mut active: Active, id: RequestId) -> Option<Ended> {
        match active.job.next_op() {
            Some(op) => {
                active.op = op;
                self.run(io, active, id)
            }
            None => {
                self.free.push(id);
                Some(Ok(0))
            }
        }
    }

    /// Runs operations until one is in flight or the job is over. Bounded, because a job's number of steps is.
    fn run(&mut self, io: &mut Uring, mut active: Active, id: RequestId) -> Option<Ended> {
        let number = self.number_base + u64::from(id);
        let backend = self
            .backends
            .get_mut(active.unit)
            .expect("units are made with their backends");
        let ended = loop {
            match backend.begin(io, active.op, active.data.as_ref(), number) {
                Begun::InFlight => break None,
                Begun::NoRoom if self.free.len() + 1 + self.waiting.len() >= self.active.len() => {
                    // Nobody else is at work, so nobody will make room.
                    break Some(Err((Attempt::Write, MediumFault::GivenBack)));
                }
                Begun::NoRoom => {
                    self.waiting.push_back(id);
                    break None;
                }
                Begun::Over(result) => match active.job.on_result(result) {
                    Some(ended) => break Some(ended),
                    None => match active.job.next_op() {
                        Some(op) => active.op = op,
                        None => break Some(Ok(0)),
                    },
                },
            }
        };
        match ended {
            Some(ended) => {
                self.free.push(id);
                Some(ended)
            }
            None => {
                if let Some(slot) = self.active.get_mut(id as usize) {
                    *slot = Some(active);
                }
                None
            }
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("backends", &self.backends.len())
            .field("active", &self.active_count())
            .field("waiting", &self.waiting.len())
            .finish()
    }
}
