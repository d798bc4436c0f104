//! What the io_uring reports besides the end of disk I/O: kicks of the guest, and messages on the two sockets.

use super::ending::Ending;
use super::{Channel, KIND_SHIFT, Server, ServerError};
use crate::storvsp::session::Session;
use std::os::fd::AsFd;
use std::time::Duration;
use vmbus::channel::{Endpoint, PortEvent};
use vmbus::ipc::server_start::ControlRequest;
use vmbus::journal::Step;
use vmbus::mem::{File, OpId, Uring, UringError};

/// Kinds of operations, beside that of disk I/O.
const KIND_KICK: u64 = 1;
const KIND_CONTROL: u64 = 2;
const KIND_PORT: u64 = 3;
/// In the number of a socket's poll: it is for room to write.
const FOR_ROOM: u64 = 1;

/// Between two looks at a predecessor's locks.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);

impl Server {
    /// An operation other than disk I/O reports something; with `more`, it will again.
    pub(super) fn on_event(&mut self, number: u64, more: bool) -> Result<(), ServerError> {
        match number >> KIND_SHIFT {
            KIND_KICK => self.on_kick(number, more),
            KIND_CONTROL => self.on_control(number & FOR_ROOM != 0, more),
            _ => self.on_port(number & FOR_ROOM != 0, more),
        }
    }

    fn on_kick(&mut self, number: u64, more: bool) -> Result<(), ServerError> {
        let sub_index = (number >> 32) as u16;
        let Some(channel) = self.channels.get_mut(&sub_index) else {
            return Ok(());
        };
        // A late event of an earlier opening.
        if channel.endpoint.open_epoch() != number as u32 {
            return Ok(());
        }
        channel.marked = true;
        if !more {
            channel.poll = Some(arm_kick(&mut self.io, &channel.endpoint)?);
        }
        Ok(())
    }

    fn on_control(&mut self, for_room: bool, more: bool) -> Result<(), ServerError> {
        self.hear_supervisor()?;
        if for_room {
            self.control_waits = false;
        } else if !more {
            self.arm_control()?;
        }
        Ok(())
    }

    fn hear_supervisor(&mut self) -> Result<(), ServerError> {
        for request in self.control.on_readable().map_err(ServerError::Supervisor)? {
            match request {
                ControlRequest::Stop => self.stopping = true,
                ControlRequest::Inspect => self.control.inspect(self.inspect())?,
            }
        }
        Ok(())
    }

    /// Waits until the predecessor's I/O is over. The supervisor says that a server may serve once it has seen that itself,
    /// so as a rule there is nothing to wait for. If there is, the supervisor gets its answers meanwhile.
    fn wait_for_predecessor(&mut self) -> Result<(), ServerError> {
        let mut pause = FIRST_PAUSE;
        while !self.fence.try_take()? {
            self.hear_supervisor()?;
            // The kernel has no event for the end of a lock that could be waited for together with a socket.
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    fn on_port(&mut self, for_room: bool, more: bool) -> Result<(), ServerError> {
        while let Some(event) = self.port.next_event().map_err(ServerError::Bus)? {
            self.on_port_event(event)?;
        }
        if for_room {
            self.port_waits = false;
        } else if !more {
            self.arm_port()?;
        }
        Ok(())
    }

    fn on_port_event(&mut self, event: PortEvent) -> Result<(), ServerError> {
        match event {
            PortEvent::Attached => self.control.warm()?,
            PortEvent::Serve => {
                // Before anything of the predecessor's is looked at.
                self.wait_for_predecessor()?;
                self.port.journal().claim::<Session>();
                self.controller.serve();
                self.port.journal().pass(Step::ServiceClaimed);
                tracing::info!("serves");
            }
            PortEvent::ChannelOpened(endpoint, recovered) => {
                let sub_index = endpoint.sub_index();
                self.on_opened(*endpoint, recovered.fresh)?;
                self.replays
                    .extend(recovered.requests.into_iter().map(|request| (sub_index, request)));
            }
            PortEvent::ChannelClosing { sub_index, .. } => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.ending = Ending::Closing;
                    channel.marked = true;
                }
            }
            PortEvent::Retargeted {
                sub_index, target_vp, ..
            } => {
                if let Some(channel) = self.channels.get_mut(&sub_index) {
                    channel.endpoint.retarget(target_vp);
                }
            }
            // Only rings live in GPADLs here; the port waits for the channel that has its rings there.
            PortEvent::GpadlAdded { .. } => {}
            // Its channels have nothing in common that a closed one could withhold.
            PortEvent::HandedOver => {}
            PortEvent::GpadlTeardown { gpadl } => {
                self.port.gpadl_released(gpadl).map_err(ServerError::Bus)?
            }
            PortEvent::Quiesce { token } => {
                self.quiesce = Some(token);
                for channel in self.channels.values_mut() {
                    channel.ending = Ending::Closing;
                }
            }
        }
        Ok(())
    }

    fn on_opened(&mut self, endpoint: Endpoint, fresh: bool) -> Result<(), ServerError> {
        let sub_index = endpoint.sub_index();
        tracing::info!(
            channel = endpoint.channel_id(),
            sub_index,
            fresh,
            "channel opened"
        );
        if sub_index == 0 {
            let saved: Option<Session> = match fresh {
                true => None,
                false => self.port.load_state(endpoint.open_epoch())?,
            };
            self.controller.on_primary_opened(saved);
            // The predecessor may have died between its answer and the offer.
            if let Some(count) = self.controller.session().sub_channels() {
                self.port.offer_sub_channels(count).map_err(ServerError::Bus)?;
            }
            // Sub-channels wait for the session.
            for channel in self.channels.values_mut() {
                channel.marked = true;
            }
        }
        let poll = arm_kick(&mut self.io, &endpoint)?;
        self.channels.insert(
            sub_index,
            Channel {
                endpoint,
                poll: Some(poll),
                active: 0,
                marked: true,
                starved: false,
                ending: Ending::No,
            },
        );
        Ok(())
    }

    pub(super) fn arm_control(&mut self) -> Result<(), ServerError> {
        self.io.poll_add(
            File::Fd(self.control.as_fd()),
            libc::POLLIN,
            true,
            KIND_CONTROL << KIND_SHIFT,
        )?;
        Ok(())
    }

    pub(super) fn arm_port(&mut self) -> Result<(), ServerError> {
        self.io.poll_add(
            File::Fd(self.port.as_fd()),
            libc::POLLIN,
            true,
            KIND_PORT << KIND_SHIFT,
        )?;
        Ok(())
    }

    /// Messages that the other side had no room for go out when it has: one poll each, once.
    pub(super) fn poll_for_room(&mut self) -> Result<(), ServerError> {
        if self.control.wants_write() && !std::mem::replace(&mut self.control_waits, true) {
            let number = (KIND_CONTROL << KIND_SHIFT) | FOR_ROOM;
            self.io
                .poll_add(File::Fd(self.control.as_fd()), libc::POLLOUT, false, number)?;
        }
        if self.port.wants_write() && !std::mem::replace(&mut self.port_waits, true) {
            let number = (KIND_PORT << KIND_SHIFT) | FOR_ROOM;
            self.io
                .poll_add(File::Fd(self.port.as_fd()), libc::POLLOUT, false, number)?;
        }
        Ok(())
    }
}

/// Polls a channel's kick. The number names the channel and its opening.
fn arm_kick(io: &mut Uring, endpoint: &Endpoint) -> Result<OpId, UringError> {
    let number = (KIND_KICK << KIND_SHIFT)
        | (u64::from(endpoint.sub_index()) << 32)
        | u64::from(endpoint.open_epoch());
    io.poll_add(File::Fd(endpoint.kick()), libc::POLLIN, true, number)
}
