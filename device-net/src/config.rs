//! What the supervisor tells this server about its NIC, as JSON.

use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Limit: channels of one NIC, the primary included (`VRSS_CHANNEL_MAX` in Linux is 64, its default 8 to 16).
pub const QUEUES_MAX: u16 = 64;
/// Smallest and largest MTU (RFC 791; what the receive buffer's geometry is made for, without Ethernet header).
const MTU_MIN: u32 = 68;
pub(crate) const MTU_MAX: u32 = 9202;

/// What carries the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    Tap,
    Stream,
}

/// One NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    #[serde(deserialize_with = "mac_from_text", serialize_with = "mac_to_text")]
    pub mac: [u8; 6],
    pub backend: BackendKind,
    /// Name of the descriptor that was handed over.
    pub fd: String,
    /// Largest MTU, without Ethernet header.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Channels that the guest may use.
    #[serde(default = "default_queues")]
    pub max_queues: u16,
}

fn default_mtu() -> u32 {
    1500
}

fn default_queues() -> u16 {
    1
}

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("the network configuration is malformed: {0}")]
    Json(#[from] serde_json::Error),
    #[error("an MTU of {0} is not between {MTU_MIN} and {MTU_MAX}")]
    Mtu(u32),
    #[error("{0} queues are not between 1 and {QUEUES_MAX}")]
    Queues(u16),
}

impl NicConfig {
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(json)?;
        if !(MTU_MIN..=MTU_MAX).contains(&config.mtu) {
            return Err(ConfigError::Mtu(config.mtu));
        }
        if !(1..=QUEUES_MAX).contains(&config.max_queues) {
            return Err(ConfigError::Queues(config.max_queues));
        }
        Ok(config)
    }
}

fn mac_from_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_mac(&text)
        .ok_or_else(|| D::Error::custom(format!("\"{text}\" is not a MAC address of one interface")))
}

fn mac_to_text<S: serde::Serializer>(mac: &[u8; 6], serializer: S) -> Result<S::Ok, S::Error> {
    let parts: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    serializer.serialize_str(&parts.join(":"))
}

/// Six pairs of hexadecimal digits with colons between. `None` for groups and the zero address, which no NIC can have.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_configuration_is_read() {
        let json = r#"{"mac":"52:54:00:12:34:56","backend":"tap","fd":"net","mtu":9000,"max_queues":4}"#;
        let config = NicConfig::parse(json).expect("well-formed");
        assert_eq!(config.mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(
            (config.backend, config.mtu, config.max_queues),
            (BackendKind::Tap, 9000, 4)
        );
    }

    #[test]
    fn a_configuration_round_trips() {
        let json = r#"{"mac":"52:54:00:12:34:56","backend":"stream","fd":"net","mtu":1500,"max_queues":2}"#;
        let config = NicConfig::parse(json).expect("well-formed");
        assert_eq!(serde_json::to_string(&config).expect("text"), json);
    }

    #[test]
    fn mistakes_are_named() {
        let with = |mac: &str, more: &str| {
            NicConfig::parse(&format!(
                r#"{{"mac":"{mac}","backend":"stream","fd":"net"{more}}}"#
            ))
            .map_err(|error| error.to_string())
        };
        assert!(with("52:54:00:12:34:56", "").is_ok());
        for (mac, more, named) in [
            ("01:00:5e:00:00:01", "", "MAC address"),
            ("52:54:00:12:34", "", "MAC address"),
            ("52:54:00:12:34:5", "", "MAC address"),
            ("+2:54:00:12:34:56:00", "", "MAC address"),
            ("52:54:00:12:34:56", r#","mtu":20"#, "MTU of 20"),
            ("52:54:00:12:34:56", r#","max_queues":0"#, "0 queues"),
            ("52:54:00:12:34:56", r#","speed":1"#, "speed"),
        ] {
            let error = with(mac, more).expect_err("refused");
            assert!(error.contains(named), "{error}");
        }
    }
}
