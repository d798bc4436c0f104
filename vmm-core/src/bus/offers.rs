#![forbid(unsafe_code)]
//! Devices, and the relids under which the guest knows their channels.
//!
//! The relid of a primary follows from the number of its device, so that it is the same at every boot and after
//! every kexec. Sub-channels take the next relids in turn, beyond those of the primaries: a relid that was given
//! back is used again as late as possible. A sub-channel index is offered anew only after the guest has given
//! the earlier channel of that index back (Linux takes a second offer of a living channel for a resume from
//! hibernation; drivers/hv/channel_mgmt.c vmbus_onoffer).

use std::collections::BTreeMap;

use vmbus::wire::Guid;

use super::action::{ChannelId, DeviceId};
use super::channels::{Channel, ChannelState, Standing};
use super::servers::Server;

/// Limit: event flags of a SINT, of which flag 0 is not for channels (TLFS 6.0b section 11.9; Linux 6.1
/// include/linux/hyperv.h MAX_CHANNEL_RELIDS).
pub const MAX_CHANNELS: u32 = 2047;

/// Limit: channels that are open at once. 64 for each of 16 devices; each takes descriptors in several processes.
pub const MAX_OPEN_CHANNELS: usize = 1024;

/// Limit: devices of a VM. So few that a mistake in their number is seen, and far below [`MAX_CHANNELS`].
pub const MAX_DEVICES: usize = 256;

/// Limit: sub-channels of a device; with the primary as many as a journal has room for.
pub const MAX_SUB_CHANNELS: u16 = 63;

const _: () = assert!(MAX_DEVICES < MAX_CHANNELS as usize);

/// The first relid of sub-channels. Below: one for each device's primary.
pub const FIRST_SUB_RELID: u32 = MAX_DEVICES as u32 + 1;

/// What the supervisor says about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOffer {
    /// The class: what the guest's driver binds to.
    pub interface: Guid,
    /// Which one; stable, unique in the VM.
    pub instance: Guid,
    /// 0 to [`MAX_SUB_CHANNELS`].
    pub max_sub_channels: u16,
}

/// A device of the VM.
#[derive(Debug)]
pub struct Device {
    pub offer: DeviceOffer,
    pub server: Server,
    /// Takes the place of `server` when that one is gone. `None` whenever that is `None`.
    pub waiting: Server,
    /// How many sub-channels the server wants offered while the primary is open.
    pub wanted_sub_channels: u16,
}

impl Device {
    /// The server, and the one that waits.
    pub fn places(&mut self) -> [&mut Server; 2] {
        [&mut self.server, &mut self.waiting]
    }
}

/// A device that the supervisor should not have added. Our own side's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddDeviceError {
    #[error("device {0} exists already")]
    IndexInUse(DeviceId),
    #[error("device {0} has the same instance GUID")]
    InstanceInUse(DeviceId),
    #[error("more than {MAX_SUB_CHANNELS} sub-channels")]
    TooManySubChannels,
    #[error("device numbers are below {MAX_DEVICES}")]
    TooManyDevices,
}

/// The channels of a connection, by relid.
#[derive(Debug)]
pub struct Channels {
    table: BTreeMap<ChannelId, Channel>,
    next_sub_relid: u32,
}

impl Default for Channels {
    fn default() -> Self {
        Self {
            table: BTreeMap::new(),
            next_sub_relid: FIRST_SUB_RELID,
        }
    }
}

impl Channels {
    /// Enters the channel of a device with this index and gives it a relid; `None` if there is none to give.
    pub fn offer(&mut self, device: DeviceId, sub_index: u16) -> Option<ChannelId> {
        let channel = match sub_index {
            0 => primary_relid(device).filter(|id| !self.table.contains_key(id))?,
            _ => self.next_free()?,
        };
        self.table.insert(
            channel,
            Channel {
                device,
                sub_index,
                standing: Standing::Offered,
                state: ChannelState::Closed,
            },
        );
        Some(channel)
    }

    fn next_free(&mut self) -> Option<ChannelId> {
        for _ in FIRST_SUB_RELID..=MAX_CHANNELS {
            let candidate = ChannelId(self.next_sub_relid);
            self.next_sub_relid = match self.next_sub_relid {
                MAX_CHANNELS => FIRST_SUB_RELID,
                relid => relid + 1,
            };
            if !self.table.contains_key(&candidate) {
                return Some(candidate);
            }
        }
        None
    }

    pub fn get(&self, channel: ChannelId) -> Option<&Channel> {
        self.table.get(&channel)
    }

    pub fn get_mut(&mut self, channel: ChannelId) -> Option<&mut Channel> {
        self.table.get_mut(&channel)
    }

    pub fn remove(&mut self, channel: ChannelId) {
        self.table.remove(&channel);
    }

    /// Forgets all; relids begin anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    pub fn iter(&self) -> impl Iterator<Item = (ChannelId, &Channel)> {
        self.table.iter().map(|(&id, channel)| (id, channel))
    }

    /// All channels of a device, whatever became of their offers, the primary first.
    pub fn of_device(&self, device: DeviceId) -> Vec<ChannelId> {
        let mut found: Vec<(u16, ChannelId)> = self
            .iter()
            .filter(|(_, channel)| channel.device == device)
            .map(|(id, channel)| (channel.sub_index, id))
            .collect();
        found.sort();
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// The channel of a device with this index, if it was not given back.
    pub fn find(&self, device: DeviceId, sub_index: u16) -> Option<(ChannelId, &Channel)> {
        self.iter()
            .find(|(_, channel)| channel.device == device && channel.sub_index == sub_index)
    }

    pub fn count(&self) -> usize {
        self.table.len()
    }
}

fn primary_relid(device: DeviceId) -> Option<ChannelId> {
    let relid = device.0.checked_add(1)?;
    (relid < FIRST_SUB_RELID).then_some(ChannelId(relid))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DeviceId = DeviceId(0);

    #[test]
    fn the_relid_of_a_primary_follows_from_its_device() {
        let mut channels = Channels::default();
        for device in [3, 0, 255] {
            assert_eq!(channels.offer(DeviceId(device), 0), Some(ChannelId(device + 1)));
        }
        assert_eq!(channels.offer(DeviceId(3), 0), None);
        assert_eq!(channels.offer(DeviceId(256), 0), None);
        assert_eq!(channels.offer(DeviceId(u32::MAX), 0), None);
    }

    #[test]
    fn a_relid_that_was_given_back_is_used_again_as_late_as_possible() {
        let mut channels = Channels::default();
        let first = channels.offer(DISK, 1);
        assert_eq!(first, Some(ChannelId(FIRST_SUB_RELID)));
        let mut last = first;
        for _ in 0..5000 {
            if let Some(id) = last {
                channels.remove(id);
            }
            let next = channels.offer(DISK, 1);
            assert!(next.is_some() && next != last);
            assert!(next.is_some_and(|id| (FIRST_SUB_RELID..=MAX_CHANNELS).contains(&id.0)));
            last = next;
        }
    }

    #[test]
    fn relids_run_out_without_reuse_of_a_living_one() {
        let mut channels = Channels::default();
        let mut given = std::collections::BTreeSet::new();
        while let Some(id) = channels.offer(DISK, 1) {
            assert!(given.insert(id));
        }
        assert_eq!(given.len(), (MAX_CHANNELS - FIRST_SUB_RELID + 1) as usize);
        channels.remove(ChannelId(1000));
        assert_eq!(channels.offer(DISK, 1), Some(ChannelId(1000)));
    }
}
