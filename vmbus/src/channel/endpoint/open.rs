//! How an endpoint comes to be: a channel that the guest opened just now, or one that a predecessor served.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Endpoint, EndpointCounters, Stall};
use crate::channel::interrupt::Interrupt;
use crate::channel::token::{Recovered, RecoveredHeld, RecoveredRequest};
use crate::journal::{ChannelJournal, Journal, RecoverFault, RingView, Step};
use crate::mem::{HostError, SharedMap};
use crate::record::{EventKind, Recorder};
use crate::ring::{RingArea, RingFault, RingReader, RingWriter};

/// What names a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::channel) struct ChannelName {
    /// relid.
    pub channel: u32,
    pub sub_index: u16,
    pub open_epoch: u32,
}

/// What a channel is made of.
pub(in crate::channel) struct ChannelParts {
    pub to_host: RingArea,
    pub to_guest: RingArea,
    pub kick: OwnedFd,
    pub interrupt: OwnedFd,
    pub event_flags: Arc<SharedMap>,
    pub target_vp: u16,
    pub recorder: Option<Arc<Recorder>>,
}

/// Why a channel cannot be served.
#[derive(Debug, thiserror::Error)]
pub(in crate::channel) enum OpenFault {
    #[error(transparent)]
    Recover(#[from] RecoverFault),
    #[error(transparent)]
    Ring(#[from] RingFault),
    #[error(transparent)]
    Host(#[from] HostError),
}

impl Endpoint {
    /// Opens a channel or goes on with one.
    pub(in crate::channel) fn open(
        name: ChannelName,
        parts: ChannelParts,
        journal: &Journal,
        fresh: bool,
    ) -> Result<(Self, Recovered), OpenFault> {
        let view = RingView {
            to_host_data_bytes: parts.to_host.data_bytes(),
            to_guest_data_bytes: parts.to_guest.data_bytes(),
            to_guest_write_index: parts.to_guest.shared_write_index(),
        };
        let found = match fresh {
            true => None,
            false => ChannelJournal::recover(journal, name.sub_index, name.open_epoch, view)?,
        };
        let (journal, recovery) = match found {
            Some((journal, recovery)) => (journal, Some(recovery)),
            None => (
                ChannelJournal::open_fresh(journal, name.sub_index, name.open_epoch),
                None,
            ),
        };
        let (read_index, write_index) = recovery
            .as_ref()
            .map_or((0, 0), |recovery| (recovery.read_index, recovery.write_index));
        let mut endpoint = Self {
            name,
            reader: RingReader::new(parts.to_host, read_index)?,
            writer: RingWriter::new(parts.to_guest, write_index)?,
            journal,
            kick: parts.kick,
            kick_is_nonblocking: false,
            interrupt: Interrupt::new(parts.event_flags, parts.interrupt, name.channel, parts.target_vp)?,
            last_received: None,
            masked: false,
            burst: 0,
            stall: Stall::No,
            outstanding: 0,
            answer_bytes: 0,
            free_floor: 0,
            wanted_bytes: 0,
            wish_is_set: false,
            deferred: VecDeque::new(),
            broken: None,
            counters: EndpointCounters::default(),
            recorder: parts.recorder,
        };
        endpoint.record(EventKind::ChannelOpened, u64::from(name.open_epoch));
        // A dead predecessor may have left its mask or its wish for space set, or died between journal and ring.
        endpoint.reader.claim_words();
        endpoint.writer.claim_words();
        endpoint.journal.pass(Step::RingWordsClaimed);
        let Some(recovery) = recovery else {
            return Ok((
                endpoint,
                Recovered {
                    fresh: true,
                    ..Recovered::default()
                },
            ));
        };
        let mut recovered = Recovered::default();
        for live in &recovery.requests {
            let replay = endpoint.journal.replay(live);
            let token = endpoint.token(replay.slot, replay.kind, replay.transaction_id);
            recovered.requests.push(RecoveredRequest {
                token,
                payload: replay.payload,
            });
        }
        for live in &recovery.held {
            let replay = endpoint.journal.replay(live);
            let token = endpoint.held_token(replay.slot, replay.kind, replay.transaction_id, 0);
            recovered.held.push(RecoveredHeld {
                token,
                payload: replay.payload,
            });
        }
        // What the predecessor published last may never have been signalled.
        endpoint.signal_now();
        endpoint.journal.pass(Step::RecoverySignalled);
        Ok((endpoint, recovered))
    }
}
