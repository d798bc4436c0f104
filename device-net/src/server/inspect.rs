//! What the server counts, and what it says of itself when asked.

use super::nic::Nic;
use std::fmt::Display;
use std::time::{Duration, Instant};

/// What has happened to frames and packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub sent_frames: u64,
    pub sent_bytes: u64,
    /// Refused by the other side, or while the link was down or nothing was initialized.
    pub sent_dropped: u64,
    /// The other side did not take them in time.
    pub sent_overflow: u64,
    pub received_frames: u64,
    pub received_bytes: u64,
    /// The guest's filter does not admit them, or was closed.
    pub received_filtered: u64,
    /// Malformed, too long, or no room in the receive buffer.
    pub received_dropped: u64,
}

/// Faults of the guest and of the other side: counted, and told at most once a second.
#[derive(Debug, Default)]
pub struct Faults {
    pub count: u64,
    untold: u64,
    last: Option<Instant>,
}

/// Least time between two lines about faults: the log must not be a weapon of whoever causes them.
const FAULT_LINE_PAUSE: Duration = Duration::from_secs(1);

impl Faults {
    pub fn note(&mut self, channel: u16, fault: &dyn Display) {
        self.count += 1;
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < FAULT_LINE_PAUSE)
        {
            self.untold += 1;
            return;
        }
        self.last = Some(now);
        let untold = std::mem::take(&mut self.untold);
        tracing::warn!(channel, untold, "{fault}");
    }
}

impl Nic {
    /// `path = value` pairs.
    pub fn inspect(&self) -> Vec<(String, String)> {
        let mut entries = Vec::new();
        let mut add = |path: &str, value: &dyn Display| entries.push((path.to_owned(), value.to_string()));
        let Counters {
            sent_frames,
            sent_bytes,
            sent_dropped,
            sent_overflow,
            received_frames,
            received_bytes,
            received_filtered,
            received_dropped,
        } = self.counters;
        add("sent/frames", &sent_frames);
        add("sent/bytes", &sent_bytes);
        add("sent/dropped", &sent_dropped);
        add("sent/overflow", &sent_overflow);
        add("sent/queued", &self.queued.len());
        add("received/frames", &received_frames);
        add("received/bytes", &received_bytes);
        add("received/filtered", &received_filtered);
        add("received/dropped", &received_dropped);
        add("guest/faults", &self.faults.count);
        add("link/up", &self.traits.link_up);
        add("filter", &format!("{:#x}", self.state.adapter.filter.0));
        add("rss/enabled", &self.state.adapter.steering.is_enabled());
        if let Some(agreement) = self.state.session.agreement() {
            add("nvsp/version", &format!("{:#x}", agreement.version.0));
            add("nvsp/mtu", &agreement.mtu_bytes());
            add("nvsp/sub-channels", &agreement.sub_channels);
        }
        add("receive-buffer/count", &self.credits.count());
        add("receive-buffer/free", &self.credits.free_count());
        for (index, channel) in &self.channels {
            add(
                &format!("channel/{index}/packets-held"),
                &channel.outstanding.count(),
            );
            add(
                &format!("channel/{index}/frames-held"),
                &channel.outstanding.suballocation_count(),
            );
        }
        entries.extend(
            self.channels
                .values()
                .flat_map(|channel| channel.endpoint.inspect()),
        );
        entries
    }
}
