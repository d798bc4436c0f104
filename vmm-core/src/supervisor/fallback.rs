#![forbid(unsafe_code)]
//! Going back: a device that was swapped to another program whose servers only die gets servers of the one before, once.
//!
//! A swap fails without harm as long as the new server has not taken over. What it cannot show is whether the new one does
//! its work. So the new program is on trial until a server of it has been calm ([`super::policy`]), and given up soon if its
//! servers die; afterwards it is given up where the device would be held. The program before is then all that is left,
//! and if that fails, too, the device is held.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::chronicle::Event;
use super::report::say;
use super::room::{RoomState, Server, ServerSettings};
use super::timers::Timer;
use super::{Supervisor, backend};

impl RoomState {
    /// The file that servers are started from.
    pub fn program_path(&self, settings: &ServerSettings) -> PathBuf {
        let own = || settings.programs.join(self.plan.program.file_name());
        self.program.clone().unwrap_or_else(own)
    }

    /// A swap is done. `program`: to another program than that of the servers so far.
    pub(super) fn begin_trial(&mut self, program: Option<PathBuf>, settings: &ServerSettings) {
        // The deaths were those of the servers before.
        self.history.forget();
        let present = self.program_path(settings);
        if let Some(program) = program.filter(|program| *program != present) {
            self.history.begin_trial();
            self.before = Some(present);
            self.gave_up = None;
            self.program = Some(program);
        }
    }

    /// A person has named the program: there is none to go back to.
    pub(super) fn set_program(&mut self, program: PathBuf) {
        (self.program, self.before, self.gave_up) = (Some(program), None, None);
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
        if let Err(error) = backend::check_program(&before) {
            return self.hold(index, &format!("{why}, and there is no going back: {error:#}"));
        }
        let bad = room.program_path(&self.settings);
        room.program = Some(before.clone());
        room.gave_up = Some(bad.clone());
        room.history.forget();
        room.server = Server::Pausing;
        let device = room.plan.name.clone();
        let shown = |path: &Path| path.display().to_string();
        let (from, to) = (shown(&bad), shown(&before));
        say(&format!("{why}: {device} goes back from {from} to {to}"));
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
