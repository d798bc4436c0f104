#![forbid(unsafe_code)]
//! Going back: a device that was swapped to another program whose servers only die gets servers of the one before, once.
//!
//! A swap fails without harm as long as the new server has not taken over. What it cannot show is whether the new one does
//! its work. So the new program is on trial until a server of it has been calm ([`super::policy`]), and given up soon if its
//! servers die; afterwards it is given up where the device would be held. The program before is then all that is left,
//! and if that fails, too, the device is held.

use std::time::Instant;

use super::Supervisor;
use super::chronicle::Event;
use super::program::Program;
use super::report::say;
use super::room::{RoomState, Server};
use super::timers::Timer;

impl RoomState {
    /// A swap is done.
    pub(super) fn begin_trial(&mut self) {
        // The deaths were those of the servers before.
        self.history.forget();
        let Some(next) = self.next.take() else {
            return;
        };
        let present = std::mem::replace(&mut self.program, next);
        if !present.is(&self.program) {
            self.history.begin_trial();
            self.before = Some(present);
            self.gave_up = None;
        }
    }

    /// A person has named the program: there is none to go back to.
    pub(super) fn set_program(&mut self, program: Program) {
        (self.program, self.before, self.gave_up) = (program, None, None);
    }

    /// A person has the device go on, perhaps with a file that was mended: that one is taken, unless it is the one that was
    /// given up, or none.
    pub(super) fn look_again(&mut self) {
        if let Ok(found) = Program::open(&self.program.path)
            && !self.gave_up.as_ref().is_some_and(|bad| bad.is(&found))
        {
            self.program = found;
        }
    }
}

impl Supervisor {
    /// The servers of a device only die: goes back to the program before, or holds the device.
    pub(super) fn give_up(&mut self, index: usize, why: &str) {
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let Some(before) = room.before.take() else {
            return self.hold(index, why);
        };
        let bad = std::mem::replace(&mut room.program, before.clone());
        room.gave_up = Some(bad.clone());
        room.history.forget();
        room.server = Server::Pausing;
        let device = room.plan.name.clone();
        let shown = |program: &Program| program.path.display().to_string();
        let (from, to) = (shown(&bad), shown(&before));
        match from == to {
            true => say(&format!(
                "{why}: {device} goes back to the file that was {to} before the swap"
            )),
            false => say(&format!("{why}: {device} goes back from {from} to {to}")),
        }
        let why = why.to_owned();
        self.note(Event::FellBack {
            device,
            from,
            to,
            why,
        });
        self.timers.set(Instant::now(), Timer::Restart { room: index });
    }
}
