#![forbid(unsafe_code)]
//! Offers, made and taken back.

use vmbus::wire::{ConnectionId, HostToGuest, Offer, TlConnect};

use crate::bus::Bus;
use crate::bus::action::{ChannelId, DeviceId};
use crate::bus::channels::Standing;
use crate::bus::connection::{Connected, Connection, OffersAsked};
use crate::hyperv::hypercall::signal_connection;

/// No such service: STATUS_CONNECTION_REFUSED of MS-ERREF 2.3.1.
const STATUS_CONNECTION_REFUSED: u32 = 0xC000_0236;

impl Bus {
    pub(super) fn on_request_offers(&mut self, connected: Connected) {
        if connected.offers == OffersAsked::Asked {
            return self.fault("offers asked for twice", format_args!(""));
        }
        self.connection = Connection::Connected(Connected {
            offers: OffersAsked::Asked,
            ..connected
        });
        let devices: Vec<DeviceId> = self.devices.keys().copied().collect();
        for device in devices {
            self.offer_primary(device);
        }
        self.post(HostToGuest::AllOffersDelivered);
    }

    /// Offers the primary channel of a device, if the guest asked for offers.
    pub(in crate::bus) fn offer_primary(&mut self, device: DeviceId) {
        if let Connection::Connected(Connected {
            offers: OffersAsked::Asked,
            ..
        }) = self.connection
        {
            self.offer(device, 0);
        }
    }

    /// Offers the sub-channels that the server wants, as far as their earlier lives are over.
    pub(in crate::bus) fn offer_sub_channels(&mut self, device: DeviceId) {
        let wanted = self
            .devices
            .get(&device)
            .map_or(0, |entry| entry.wanted_sub_channels);
        for sub_index in 1..=wanted {
            if self.channels.find(device, sub_index).is_none() {
                self.offer(device, sub_index);
            }
        }
    }

    fn offer(&mut self, device: DeviceId, sub_index: u16) {
        let Some(offer) = self.devices.get(&device).map(|entry| entry.offer) else {
            return;
        };
        let Some(channel) = self.channels.offer(device, sub_index) else {
            return self.fault(
                "no relid left",
                format_args!("device {device}, index {sub_index}"),
            );
        };
        self.post(HostToGuest::OfferChannel(Offer {
            interface: offer.interface,
            instance: offer.instance,
            flags: 0,
            mmio_megabytes: 0,
            user_defined: [0; 120],
            sub_channel_index: sub_index,
            channel,
            monitor_allocated: false,
            dedicated_interrupt: true,
            connection: ConnectionId(signal_connection(channel.0)),
        }));
    }

    /// Takes back the offers of a device's sub-channels: their primary is closed, or about to be.
    pub(super) fn rescind_sub_channels(&mut self, device: DeviceId) {
        if let Some(entry) = self.devices.get_mut(&device) {
            entry.wanted_sub_channels = 0;
        }
        for channel in self.channels.of_device(device) {
            let Some(entry) = self.channels.get_mut(channel) else {
                continue;
            };
            if entry.sub_index == 0 || entry.standing != Standing::Offered {
                continue;
            }
            entry.standing = Standing::Rescinded;
            self.close(channel);
            self.post(HostToGuest::RescindChannelOffer { channel });
        }
    }

    pub(super) fn on_relid_released(&mut self, channel: ChannelId) {
        match self.channels.get_mut(channel) {
            Some(entry) if entry.standing == Standing::Rescinded => entry.standing = Standing::Released,
            Some(_) | None => {
                return self.fault(
                    "release of a channel that was not rescinded",
                    format_args!("{channel}"),
                );
            }
        }
        self.close(channel);
        for gpadl in self.gpadls.of_channel(channel) {
            self.release_gpadl(channel, gpadl, false);
        }
        self.forget_if_released(channel);
    }

    pub(super) fn on_tl_connect(&mut self, connected: Connected, connect: TlConnect) {
        // Quirk(Linux 6.1 hv_sock): ignores the answer, and gives up after two seconds by itself.
        if connected.version.has_modify_channel() {
            self.post(HostToGuest::TlConnectResult {
                endpoint: connect.endpoint,
                service: connect.service,
                status: STATUS_CONNECTION_REFUSED,
            });
        }
    }
}
