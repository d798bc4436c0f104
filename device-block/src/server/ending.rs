//! Channels that end, and the end of all.

use super::{Channel, Server, ServerError};
use crate::controller::Controller;
use vmbus::channel::Endpoint;
use vmbus::ipc::server_start::Control;

/// Whether a channel ends, and why.
pub(super) enum Ending {
    No,
    /// The guest closes it.
    Closing,
    /// The guest has broken it.
    Broken(String),
}

impl Server {
    /// A reset is answered when nothing is at the disks and nothing waits to be replayed.
    pub(super) fn finish_resets(&mut self) {
        if self.resets.is_empty() || self.controller.active_count() > 0 {
            return;
        }
        for (sub_index, token) in std::mem::take(&mut self.resets) {
            self.send(sub_index, token, &Controller::reset_done());
        }
        self.unstarve();
    }

    /// Gives back the endpoints of channels that are over.
    pub(super) fn end_channels(&mut self) -> Result<(), ServerError> {
        // The mark of a channel that ends has done its work; what is left waits for I/O.
        for channel in self
            .channels
            .values_mut()
            .filter(|channel| !matches!(channel.ending, Ending::No))
        {
            channel.marked = false;
        }
        if self.quiesce.is_some() {
            return Ok(());
        }
        let over: Vec<u16> = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.active == 0 && !matches!(channel.ending, Ending::No))
            .map(|(sub_index, _)| *sub_index)
            .collect();
        for sub_index in over {
            let Some(channel) = self.take_channel(sub_index) else {
                continue;
            };
            let ended = match channel.ending {
                Ending::Broken(why) => self.port.channel_broken(channel.endpoint, why),
                Ending::Closing | Ending::No => self.port.channel_closed(channel.endpoint),
            };
            ended.map_err(ServerError::Bus)?;
        }
        Ok(())
    }

    /// Removes a channel without I/O, and everything that was to be done on it.
    fn take_channel(&mut self, sub_index: u16) -> Option<Channel> {
        let channel = self.channels.remove(&sub_index)?;
        if let Some(poll) = channel.poll
            && let Err(error) = self.io.cancel(poll)
        {
            tracing::warn!(%error, "cannot cancel a poll");
        }
        for (index, request) in std::mem::take(&mut self.replays) {
            match index == sub_index {
                true => request.token.abandon(),
                false => self.replays.push_back((index, request)),
            }
        }
        for (index, token) in std::mem::take(&mut self.resets) {
            match index == sub_index {
                true => token.abandon(),
                false => self.resets.push((index, token)),
            }
        }
        Some(channel)
    }

    pub(super) fn take_all(&mut self) -> Vec<Endpoint> {
        let indexes: Vec<u16> = self.channels.keys().copied().collect();
        indexes
            .into_iter()
            .filter_map(|index| self.take_channel(index))
            .map(|channel| channel.endpoint)
            .collect()
    }

    /// Stop at a packet boundary: what is answered is published, the rest is the successor's.
    pub(super) fn leave(&mut self) {
        for channel in self.channels.values_mut() {
            if let Err(fault) = channel.endpoint.publish() {
                tracing::warn!(%fault, "a channel is broken at the end");
            }
        }
        for (_, request) in self.replays.drain(..) {
            request.token.abandon();
        }
        for (_, token) in self.resets.drain(..) {
            token.abandon();
        }
        for (_, token) in self.owed.iter_mut().filter_map(Option::take) {
            token.abandon();
        }
    }

    /// Lets a successor serve before this process has ended. Nothing is in flight.
    pub(super) fn release(&mut self) -> Result<(), ServerError> {
        self.fence.release()?;
        self.control.released()?;
        // Each kick would wake this process, at the cost of the guest's processor, to tell it that it is not concerned.
        for poll in self.channels.values().filter_map(|channel| channel.poll) {
            self.io.cancel(poll)?;
        }
        self.io.submit_and_wait(0, None)?;
        Control::linger();
        Ok(())
    }
}
