//! What the supervisor tells a controller to be: JSON in the `Start` message.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Limit: disks of one controller. Linux would look at 255; each costs a descriptor and two table entries.
pub const MAX_DISKS: usize = 64;

/// Most sub-channels of a controller: a journal has room for 64 channels.
pub const MAX_SUB_CHANNELS: u16 = vmbus::channel::MAX_CHANNELS - 1;

/// A SCSI controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerConfig {
    /// Instance GUID: disks without a serial number of their own are recognised by it.
    pub instance: Uuid,
    /// The disks.
    pub disks: Vec<DiskConfig>,
    /// How many sub-channels the guest may have, at most [`MAX_SUB_CHANNELS`].
    #[serde(default)]
    pub max_sub_channels: u16,
}

/// A disk of a controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Logical unit number, 0 to 254.
    pub lun: u8,
    /// Name of the descriptor in the `Start` message.
    pub fd: String,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// What the descriptor is.
    #[serde(default)]
    pub kind: DiskKind,
    /// Use only so many bytes of it.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Serial number that the guest sees; if absent, made of the instance GUID and the unit's number.
    #[serde(default)]
    pub serial: Option<String>,
    /// Whether the guest has to flush.
    #[serde(default)]
    pub cache: CacheMode,
    /// Bypass the host's page cache where that is possible.
    #[serde(default)]
    pub direct: bool,
}

/// Where a disk is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskKind {
    /// In a regular file or on a block device.
    #[default]
    File,
    /// In a memfd.
    Memory,
}

/// Whether a write that was answered is stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// After the guest's next flush. What the guest sees as a disk with a write cache.
    #[default]
    Writeback,
    /// At once.
    Writethrough,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON that we want.
    #[error("the configuration does not parse: {0}")]
    Json(#[from] serde_json::Error),
    /// Too many disks.
    #[error("{0} disks are configured, and a controller takes at most {MAX_DISKS}")]
    TooManyDisks(usize),
    /// Too many sub-channels.
    #[error("{0} sub-channels are configured, and a controller has at most {MAX_SUB_CHANNELS}")]
    TooManySubChannels(u16),
}

impl ControllerConfig {
    /// Reads and checks a configuration.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(json)?;
        if config.disks.len() > MAX_DISKS {
            return Err(ConfigError::TooManyDisks(config.disks.len()));
        }
        if config.max_sub_channels > MAX_SUB_CHANNELS {
            return Err(ConfigError::TooManySubChannels(config.max_sub_channels));
        }
        Ok(config)
    }
}

impl DiskConfig {
    /// The serial number that the guest sees.
    pub fn serial(&self, instance: &Uuid) -> String {
        match &self.serial {
            Some(serial) => serial.clone(),
            None => format!("{}-{}", instance.simple(), self.lun),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTANCE: &str = "\"instance\":\"1b4e28ba-2fa1-11d2-883f-0016d3cca427\"";

    #[test]
    fn a_short_configuration_has_sensible_defaults() {
        let config = ControllerConfig::parse(&format!(
            "{{{INSTANCE},\"disks\":[{{\"lun\":0,\"fd\":\"disk\"}}]}}"
        ))
        .unwrap();
        let disk = &config.disks[0];
        assert_eq!((disk.kind, disk.cache), (DiskKind::File, CacheMode::Writeback));
        assert!(!disk.read_only && !disk.direct);
        assert_eq!(
            disk.serial(&config.instance),
            "1b4e28ba2fa111d2883f0016d3cca427-0"
        );
    }

    #[test]
    fn a_full_configuration_reads_back_as_it_was_written() {
        let config = ControllerConfig {
            instance: Uuid::from_bytes([5; 16]),
            disks: vec![DiskConfig {
                lun: 3,
                fd: "disk3".into(),
                read_only: true,
                kind: DiskKind::Memory,
                bytes: Some(1 << 20),
                serial: Some("abc".into()),
                cache: CacheMode::Writethrough,
                direct: true,
            }],
            max_sub_channels: 3,
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(ControllerConfig::parse(&json).unwrap(), config);
    }

    #[test]
    fn misspelt_and_excessive_configurations_are_refused() {
        let refused = |json: String| ControllerConfig::parse(&json).unwrap_err().to_string();
        assert!(refused(format!("{{{INSTANCE},\"disks\":[],\"disk\":1}}")).contains("unknown field `disk`"));
        assert!(
            refused(format!("{{{INSTANCE},\"disks\":[],\"max_sub_channels\":64}}"))
                .contains("64 sub-channels")
        );
        let many: Vec<String> = (0..65)
            .map(|lun| format!("{{\"lun\":{lun},\"fd\":\"d{lun}\"}}"))
            .collect();
        assert!(refused(format!("{{{INSTANCE},\"disks\":[{}]}}", many.join(","))).contains("65 disks"));
    }
}
