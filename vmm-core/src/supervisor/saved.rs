#![forbid(unsafe_code)]
//! The supervisor's state as bytes, for the keeper and the next supervisor: one text for the VM, and one for each device.
//!
//! Saved is what a new supervisor needs to go on. What was under way and can be begun again is not: inspections, clients,
//! questions to servers. Times are in milliseconds since the supervisor's start ([`super::timers`]), which is saved as
//! a time of CLOCK_MONOTONIC.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vmbus::ipc::OnReset;
use vmbus::ipc::codec::{EncodeError, decode, encode};

use super::Supervisor;
use super::keeper::STATE;
use super::plan::Room;
use super::policy::{Decision, History};
use super::process::Process;
use super::program::Program;
use super::room::{RoomState, Server};
use super::swap::Swap;
use super::timers::Timers;
use crate::spec::OnCrash;

/// Changed with every change of what is saved, and of what the processes of a running VM are told.
pub const VERSION: u32 = 6;

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVm {
    pub origin_ms: u64,
    pub rooms: usize,
    pub on_crash: OnCrash,
    pub on_reset: OnReset,
    pub programs: PathBuf,
    pub log: String,
    pub require_full_sandbox: bool,
    pub crashed: bool,
    pub patience_ms: Option<u64>,
    pub next_report: u64,
    pub first_report: u64,
    /// The terminal that the guest's console is on, by its device number.
    pub terminal: Option<u64>,
    pub vcpu: SavedProcess,
    pub bus: SavedProcess,
    pub keeper: SavedProcess,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedRoom {
    pub plan: Room,
    pub program: PathBuf,
    pub before: Option<PathBuf>,
    pub gave_up: Option<PathBuf>,
    pub next: Option<PathBuf>,
    pub server: SavedServer,
    pub generation: u32,
    pub told_to_stop: bool,
    pub successor: Option<SavedSuccessor>,
    pub leaving: Vec<(u32, SavedProcess)>,
    pub swap: Option<Swap>,
    pub newest: u32,
    pub history: History,
    pub deaths: u32,
    pub gone_since_ms: Option<u64>,
    pub passt: Option<SavedProcess>,
    pub mtu: u16,
}

/// [`Server`]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum SavedServer {
    Running {
        process: SavedProcess,
        ready: bool,
    },
    Fencing {
        started_ms: u64,
        planned: bool,
        decision: Option<Decision>,
    },
    Pausing,
    Held,
}

/// [`super::successor::Successor`]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedSuccessor {
    pub process: SavedProcess,
    pub generation: u32,
    pub ready: bool,
    pub warm: bool,
    pub is_restart: bool,
}

/// [`Process`], without its descriptors
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedProcess {
    pub pid: i32,
    pub started_ms: u64,
    /// `bulkhead-bus` has the other end of its socket, if it needs that.
    pub introduced: bool,
}

/// The name of a device's text.
fn room_key(index: usize) -> String {
    format!("room.{index}")
}

/// Texts by name.
pub type Texts = BTreeMap<String, Vec<u8>>;

impl Supervisor {
    /// Everything as texts; none if something cannot be written down (a path that is no UTF-8): the VM is not kept then.
    pub(super) fn save(&self, keeper: &Process) -> Texts {
        self.try_save(keeper).unwrap_or_default()
    }

    fn try_save(&self, keeper: &Process) -> Result<Texts, EncodeError> {
        let timers = &self.timers;
        let vm = SavedVm {
            origin_ms: timers.origin_ms(),
            rooms: self.rooms.len(),
            on_crash: self.on_crash,
            on_reset: self.on_reset,
            programs: self.settings.programs.clone(),
            log: self.settings.log.clone(),
            require_full_sandbox: self.settings.strictness.require_full,
            crashed: self.crashed,
            patience_ms: self
                .patience
                .map(|patience| u64::try_from(patience.as_millis()).unwrap_or(u64::MAX)),
            next_report: self.next_report,
            first_report: self.first_report,
            terminal: self.terminal,
            vcpu: saved(&self.vcpu, timers),
            bus: saved(&self.bus, timers),
            keeper: saved(keeper, timers),
        };
        // The version is in front of all, and can be read whatever follows.
        let mut texts = Texts::from([(STATE.to_owned(), [encode(&VERSION)?, encode(&vm)?].concat())]);
        for (index, room) in self.rooms.iter().enumerate() {
            texts.insert(room_key(index), encode(&save_room(room, timers))?);
        }
        Ok(texts)
    }
}

fn saved(process: &Process, timers: &Timers) -> SavedProcess {
    SavedProcess {
        pid: process.child.pid.as_raw(),
        started_ms: timers.milliseconds(process.started),
        introduced: process.introduced,
    }
}

/// Its file goes to the keeper.
fn path_of(program: &Option<Program>) -> Option<PathBuf> {
    program.as_ref().map(|program| program.path.clone())
}

fn save_room(room: &RoomState, timers: &Timers) -> SavedRoom {
    let server = match &room.server {
        Server::Running { process, ready, .. } => SavedServer::Running {
            process: saved(process, timers),
            ready: *ready,
        },
        Server::Fencing {
            started,
            planned,
            decision,
            ..
        } => SavedServer::Fencing {
            decision: *decision,
            started_ms: timers.milliseconds(*started),
            planned: *planned,
        },
        Server::Pausing => SavedServer::Pausing,
        Server::Held => SavedServer::Held,
    };
    SavedRoom {
        plan: room.plan.clone(),
        program: room.program.path.clone(),
        before: path_of(&room.before),
        gave_up: path_of(&room.gave_up),
        next: path_of(&room.next),
        server,
        generation: room.generation,
        told_to_stop: room.told_to_stop.is_some(),
        successor: room.successor.as_ref().map(|successor| SavedSuccessor {
            process: saved(&successor.process, timers),
            generation: successor.generation,
            ready: successor.ready,
            warm: successor.warm,
            is_restart: successor.is_restart,
        }),
        leaving: room
            .leaving
            .iter()
            .map(|leaving| (leaving.generation, saved(&leaving.process, timers)))
            .collect(),
        swap: room.swap.clone(),
        newest: room.newest,
        history: room.history.clone(),
        deaths: room.deaths,
        gone_since_ms: room.gone_since.map(|since| timers.milliseconds(since)),
        passt: room.passt.as_ref().map(|passt| saved(passt, timers)),
        mtu: room.mtu,
    }
}

/// In front of all, whatever the version is.
fn split(texts: &Texts) -> Result<(&[u8], &[u8])> {
    let text = texts.get(STATE).context("the VM's state is not there")?;
    text.split_at_checked(4).context("the VM's state is cut short")
}

/// Which version of supervisor has written this.
pub fn version(texts: &Texts) -> Result<u32> {
    Ok(decode(split(texts)?.0)?)
}

/// Reads what a supervisor of this version has written.
pub fn load(texts: &Texts) -> Result<(SavedVm, Vec<SavedRoom>)> {
    let (_, vm) = split(texts)?;
    let vm: SavedVm = decode(vm)?;
    let mut rooms = Vec::new();
    for index in 0..vm.rooms {
        let text = texts.get(&room_key(index));
        rooms.push(decode(text.context("a device's state is not there")?)?);
    }
    Ok((vm, rooms))
}
