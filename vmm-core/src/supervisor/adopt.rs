#![forbid(unsafe_code)]
//! Becoming the supervisor of a VM that has lost its own.
//!
//! The keeper gives everything; what was under way when the old supervisor was killed is taken up from what it had told
//! its keeper last, which is never behind by more than one step. Steps are repeated rather than left out: `bulkhead-bus`
//! takes no harm from hearing twice that a server is gone, and a server of which it may not have heard is killed.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;
use vmbus::ipc::{PeerFault, SendError, Socket, SupervisorToBus, SupervisorToServer};

use super::backend::Held;
use super::chronicle::{Chronicle, Event};
use super::control::Listener;
use super::folder::Folder;
use super::hand_on::hand_on;
use super::input::Input;
use super::keeper::mirror::Keeper;
use super::keeper::{FromKeeper, LISTENER, LOOKS, PAUSE, ToKeeper, first_word, receive_kept, supervisor_of};
use super::oom::OomWatch;
use super::policy::History;
use super::process::Process;
use super::program::Program;
use super::report::{Outcome, say};
use super::room::{RoomState, Server, ServerSettings};
use super::saved::{self, SavedProcess, SavedRoom, SavedServer, Texts};
use super::standby::StandbyEnds;
use super::successor::{LEAVE_DEADLINE, Leaving, Successor};
use super::swap::STOP_DEADLINE;
use super::timers::{Timer, Timers};
use super::{Phase, START_DEADLINE, Supervisor, machine, supervise, take_signals};
use crate::spec::Name;

/// Why an adopter kills a server that its predecessor was starting.
pub const DISOWNED: &str = "bulkhead-bus may not know it: its supervisor was killed when it started it";

/// Adopts the VM of that name below `base`, and runs it to its end.
pub fn adopt(name: &Name, base: &Path) -> Outcome {
    match Supervisor::adopt(name, base) {
        Ok(supervisor) => supervise(supervisor),
        Err(error) => Outcome::Setup(format!("{error:#}")),
    }
}

/// What a keeper has given.
struct Given {
    socket: Socket,
    kept: BTreeMap<String, OwnedFd>,
    texts: Texts,
}

impl Given {
    /// Asks the keeper of a VM.
    fn ask(name: &Name, base: &Path) -> Result<Self> {
        let path = base.join(name.as_str());
        // Their keeper would only hang up.
        let owner = fs::symlink_metadata(&path).map(|folder| folder.uid());
        if let Ok(owner) = owner
            && owner != geteuid().as_raw()
        {
            bail!("the VM {name} is one of the user {owner}: nobody else can adopt it");
        }
        let mut hung_up = false;
        for _ in 0..LOOKS {
            let Some((socket, word)) = first_word(&path)? else {
                match hung_up {
                    true => bail!("the VM {name} has just ended"),
                    false => bail!("no VM named {name} runs for this user (bulkhead list shows which do)"),
                }
            };
            if let Some(given) = Self::hear(name, &path, socket, word)? {
                return Ok(given);
            }
            // It is at its end, or more have come than it listens to at once.
            hung_up = true;
            std::thread::sleep(PAUSE);
        }
        bail!("the keeper of {name} hangs up: it does not give the VM to this user")
    }

    /// Takes everything. `None`: the keeper has hung up.
    fn hear(
        name: &Name,
        path: &Path,
        mut socket: Socket,
        word: Result<FromKeeper, PeerFault>,
    ) -> Result<Option<Self>> {
        let mut given = (BTreeMap::new(), Texts::new());
        let mut asked = false;
        let mut next = word.map(|word| (word, Vec::new()));
        loop {
            match next {
                Ok((FromKeeper::Orphaned, _)) => {
                    asked = true;
                    match socket.send(&ToKeeper::Adopt, &[]) {
                        Err(SendError::Disconnected) => return Ok(None),
                        sent => sent?,
                    }
                }
                Ok((FromKeeper::Keep { names }, fds)) => given.0.extend(names.into_iter().zip(fds)),
                Ok((FromKeeper::Write { name, bytes }, _)) => {
                    given.1.insert(name, bytes);
                }
                Ok((FromKeeper::All, _)) => break,
                Ok((FromKeeper::Supervised, _)) if asked => {
                    bail!(
                        "the VM {name} was adopted by another process just before: there is nothing to adopt"
                    )
                }
                Ok((FromKeeper::Supervised, _)) => {
                    let process = supervisor_of(path);
                    let process = process.map_or(String::new(), |process| format!(" (process {process})"));
                    bail!("the VM {name} has a supervisor{process}: there is nothing to adopt")
                }
                Ok((FromKeeper::Ready { .. }, _)) => bail!("the keeper of {name} is out of turn"),
                Err(PeerFault::Eof) => return Ok(None),
                Err(fault) => bail!("the keeper of {name} does not answer: {fault}"),
            }
            next = receive_kept(&mut socket);
        }
        let (kept, texts) = given;
        Ok(Some(Given { socket, kept, texts }))
    }

    fn take(&mut self, name: &str) -> Result<OwnedFd> {
        let found = self.kept.remove(name);
        found.with_context(|| format!("the keeper has no descriptor named {name}"))
    }

    /// A process, whose pidfd must be there. (Its handle kills it when it is dropped: nothing that follows may fail.)
    fn process(&mut self, name: &str, saved: SavedProcess, timers: &Timers) -> Result<Process> {
        let mut part = |part: &str| self.kept.remove(&format!("{name}.{part}"));
        let end = part("end").with_context(|| format!("the keeper has no pidfd of {name}"))?;
        let (control, log, recorder) = (part("control"), part("log"), part("recorder"));
        let started = timers.instant(saved.started_ms);
        let mut process = Process::adopt(saved.pid, end, control, log, started);
        process.recorder = recorder;
        process.introduced = saved.introduced;
        Ok(process)
    }

    /// A program whose file was held as this part of a device.
    fn program(&mut self, device: &str, part: &str, path: Option<PathBuf>) -> Option<Program> {
        Some(Program::adopt(
            path?,
            self.kept.remove(&format!("{device}.{part}")),
        ))
    }

    /// Whether all is there without which nothing can be made.
    fn check(&self, rooms: &[SavedRoom]) -> Result<()> {
        let mut names: Vec<String> = [
            "folder.lock",
            "control",
            LISTENER,
            "vcpu.end",
            "bus.end",
            "keeper.end",
        ]
        .map(str::to_owned)
        .into();
        for room in rooms {
            let name = &room.plan.name;
            names.push(format!("{name}.journal"));
            if let SavedServer::Running { .. } = room.server {
                names.push(format!("{name}.{}.end", room.generation));
            }
            let successor = room.successor.iter().map(|successor| successor.generation);
            let others = successor.chain(room.leaving.iter().map(|(generation, _)| *generation));
            names.extend(others.map(|generation| format!("{name}.{generation}.end")));
            names.extend(
                room.passt
                    .iter()
                    .map(|passt| format!("{name}.passt.{}.end", passt.pid)),
            );
        }
        match names.iter().find(|name| !self.kept.contains_key(*name)) {
            Some(name) => bail!("the keeper has no descriptor named {name}"),
            None => Ok(()),
        }
    }

    fn room(&mut self, saved: SavedRoom, timers: &Timers) -> Result<RoomState> {
        let name = saved.plan.name.clone();
        let server = match saved.server {
            SavedServer::Running { process, ready } => Server::Running {
                process: self.process(&format!("{name}.{}", saved.generation), process, timers)?,
                ready,
                blame: None,
            },
            SavedServer::Fencing {
                started_ms,
                planned,
                decision,
            } => Server::Fencing {
                decision,
                started: timers.instant(started_ms),
                since: Instant::now(),
                planned,
            },
            SavedServer::Pausing => Server::Pausing,
            SavedServer::Held => Server::Held,
        };
        let successor = match saved.successor {
            None => None,
            Some(successor) => Some(Successor {
                process: self.process(
                    &format!("{name}.{}", successor.generation),
                    successor.process,
                    timers,
                )?,
                generation: successor.generation,
                ready: successor.ready,
                warm: successor.warm,
                is_restart: successor.is_restart,
                asked: None,
                blame: None,
            }),
        };
        let mut leaving = Vec::new();
        for (generation, process) in saved.leaving {
            let process = self.process(&format!("{name}.{generation}"), process, timers)?;
            leaving.push(Leaving { process, generation });
        }
        let passt = match saved.passt {
            None => None,
            Some(passt) => Some(self.process(&format!("{name}.passt.{}", passt.pid), passt, timers)?),
        };
        let backend = self.kept.remove(&format!("{name}.backend"));
        Ok(RoomState {
            held: backend.map(|fd| Held::adopt(&saved.plan.backend, fd)),
            journal: self.take(&format!("{name}.journal"))?,
            plan: saved.plan,
            program: Program::adopt(saved.program, self.kept.remove(&format!("{name}.program"))),
            before: self.program(&name, "before", saved.before),
            gave_up: self.program(&name, "gave-up", saved.gave_up),
            next: self.program(&name, "next", saved.next),
            server,
            generation: saved.generation,
            told_to_stop: saved.told_to_stop.then(Instant::now),
            successor,
            leaving,
            swap: saved.swap,
            standby_ends: StandbyEnds::default(),
            newest: saved.newest,
            history: saved.history,
            deaths: saved.deaths,
            probe: None,
            gone_since: saved.gone_since_ms.map(|since| timers.instant(since)),
            passt,
            mtu: saved.mtu,
            fence: None,
            lasting: None,
        })
    }
}

impl Supervisor {
    fn adopt(name: &Name, base: &Path) -> Result<Self> {
        let signals = take_signals().context("cannot take signals")?;
        let mut given = Given::ask(name, base)?;
        let cannot = || format!("the VM {name} cannot be adopted");
        let version = saved::version(&given.texts).with_context(cannot)?;
        if version != saved::VERSION {
            let keeper = given.take("keeper.end").with_context(cannot)?;
            // Its keeper is to be free for the one that follows.
            drop(given);
            return Err(hand_on(name, base, keeper, version)).with_context(cannot);
        }
        let (vm, saved_rooms) = saved::load(&given.texts).with_context(cannot)?;
        given.check(&saved_rooms)?;
        let (kept, written) = (
            given.kept.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())),
            given.texts.clone(),
        );
        let kept = kept.collect();
        let timers = Timers::since(vm.origin_ms);
        let folder = Folder::adopt(base.join(name.as_str()), given.take("folder.lock")?)?;
        let listener = Listener::adopt(given.take("control")?);
        let adopt_listener = Listener::adopt(given.take(LISTENER)?);
        let input = Input::adopt(given.kept.remove("console"), vm.terminal);
        // From here on nothing fails: all that is needed is there, and a handle that is dropped kills its process.
        let mut keeper = given.process("keeper", vm.keeper, &timers)?;
        let vcpu = given.process("vcpu", vm.vcpu, &timers)?;
        let bus = given.process("bus", vm.bus, &timers)?;
        let mut rooms = Vec::new();
        for room in saved_rooms {
            rooms.push(given.room(room, &timers)?);
        }
        keeper.control = Some(given.socket);
        let mut supervisor = Supervisor {
            phase: Phase::Running,
            name: name.to_string(),
            on_crash: vm.on_crash,
            on_reset: vm.on_reset,
            settings: ServerSettings {
                programs: vm.programs,
                log: vm.log,
                strictness: sandbox::Options {
                    require_full: vm.require_full_sandbox,
                },
            },
            crashed: vm.crashed,
            guest_budget: machine::guest_budget(),
            vcpu_said: None,
            vcpu_failed: None,
            vcpu,
            bus,
            bus_ended: false,
            bus_failed: None,
            bus_asked: None,
            rooms,
            input,
            signals,
            listener,
            clients: Vec::new(),
            inspection: None,
            timers,
            chronicle: Chronicle::open(folder.path()),
            reports: Vec::new(),
            followed: Vec::new(),
            next_report: vm.next_report,
            first_report: vm.first_report,
            oom: OomWatch::new(),
            patience: vm.patience_ms.map(Duration::from_millis),
            looks: 0,
            next_token: 0,
            terminal: vm.terminal,
            adopt_listener,
            keeper: Some(Keeper::adopt(keeper, kept, written)),
            keeper_history: History::default(),
            folder,
        };
        supervisor.take_up();
        Ok(supervisor)
    }

    /// Goes on with what was under way.
    fn take_up(&mut self) {
        say(&format!(
            "process {} is the supervisor of {} now",
            std::process::id(),
            self.name
        ));
        if let Err(error) = self.input.make_raw() {
            say(&format!("cannot set up the terminal: {error}"));
        }
        self.note(Event::Adopted {
            supervisor: std::process::id(),
        });
        for index in 0..self.rooms.len() {
            self.take_up_server(index);
            self.take_up_others(index);
            self.want_standby(index);
        }
        // What it has said of servers, the earlier supervisor may have read without doing anything: it says it again.
        self.send_to_bus(&SupervisorToBus::Ping, &[]);
        self.begin_probing();
    }

    fn take_up_server(&mut self, index: usize) {
        let now = Instant::now();
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        let (device, generation) = (room.plan.device, room.generation);
        let gone = SupervisorToBus::ServerGone { device, generation };
        match &mut room.server {
            Server::Running { process, ready, .. } => {
                let ready = *ready;
                if !process.introduced {
                    return self.kill_server(index, generation, DISOWNED);
                }
                if !ready {
                    ask_whether_ready(process);
                    let room = index;
                    let overdue = Timer::ReadyOverdue { room, generation };
                    self.timers.set(now + START_DEADLINE, overdue);
                }
                if room.told_to_stop.is_some() {
                    // Again: it may not have been sent. A second one says nothing new.
                    room.ask(&SupervisorToServer::Stop);
                    let room = index;
                    let overdue = Timer::StopOverdue { room, generation };
                    self.timers.set(now + STOP_DEADLINE, overdue);
                }
            }
            Server::Fencing { .. } => self.timers.set(now, Timer::Fence { room: index }),
            Server::Pausing => {
                // It may have waited long enough already; one that waits again gets no shorter pause by that.
                self.timers.set(now, Timer::Restart { room: index });
                self.send_to_bus(&gone, &[]);
            }
            Server::Held => self.send_to_bus(&gone, &[]),
        }
    }

    /// Servers that wait, and those that serve no more.
    fn take_up_others(&mut self, index: usize) {
        let now = Instant::now();
        let Some(room) = self.rooms.get_mut(index) else {
            return;
        };
        for leaving in &room.leaving {
            let overdue = Timer::LeaveOverdue {
                room: index,
                generation: leaving.generation,
            };
            self.timers.set(now + LEAVE_DEADLINE, overdue);
        }
        let is_last_hope = room.told_to_stop.is_some() || !matches!(room.server, Server::Running { .. });
        let Some(successor) = &mut room.successor else {
            return;
        };
        let is_prepared = successor.is_prepared();
        if !successor.process.introduced {
            successor.blame(DISOWNED);
            successor.process.kill();
        } else if is_last_hope {
            if !is_prepared {
                ask_whether_ready(&mut successor.process);
                let overdue = Timer::ReadyOverdue {
                    room: index,
                    generation: successor.generation,
                };
                self.timers.set(now + START_DEADLINE, overdue);
            }
        } else if room.swap.is_none() {
            // That it waits may have been said to the earlier supervisor; nobody needs it now, and another one follows.
            if !is_prepared {
                self.dismiss_successor(index);
            }
        } else {
            // Of a swap that had not come far: nobody waits for it any more.
            let why = format!(
                "its supervisor was killed before the old server was told to stop; server {} goes on",
                room.generation
            );
            self.lose_successor(index, &why);
        }
    }
}

/// Its Ready may have been said to the earlier supervisor. A server answers this when it has said that.
fn ask_whether_ready(process: &mut Process) {
    if let Some(control) = &mut process.control {
        // One that does not listen has ended, or does: that is seen elsewhere.
        control.send(&SupervisorToServer::Ping { token: 0 }, &[]).ok();
    }
}
