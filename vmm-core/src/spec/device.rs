#![forbid(unsafe_code)]
//! Disks and network interfaces: as a list of `key=value` in a flag, as a table in a file.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::value::{Mac, Size};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "DiskTable")]
pub struct DiskSpec {
    pub source: DiskSource,
    pub read_only: bool,
    /// What the guest sees as the disk's serial number, if not one that is made for it.
    pub serial: Option<String>,
    pub cache: CacheMode,
    /// Bypass the host's page cache where that is possible.
    pub direct: bool,
    /// Keep a second server waiting, which takes over at once if the first dies.
    pub standby: bool,
}

/// Where a disk's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A raw file or a block device.
    Path(PathBuf),
    /// Memory of so many bytes, zero at first, gone with the VM.
    Memory(Size),
}

/// Whether a write that was answered is stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// After the guest's next flush.
    #[default]
    Writeback,
    /// At once.
    Writethrough,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "NetTable")]
pub struct NetSpec {
    pub backend: NetBackend,
    /// If absent, one that is made of the VM's name.
    pub mac: Option<Mac>,
    /// Bytes, 576 to 9000.
    pub mtu: u16,
    /// Most channels that the guest may use, 1 to 64; if absent, by the number of processors.
    pub queues: Option<u16>,
    /// As of a disk.
    pub standby: bool,
}

/// Where frames go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// The TAP of this name, made if it does not exist.
    Tap(String),
    /// A TAP that `bulkhead` inherited as this descriptor.
    TapFd(i32),
    /// The host's network by way of passt, without any privilege.
    User,
}

/// A `[[disk]]` of a file.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskTable {
    path: Option<PathBuf>,
    memory: Option<Size>,
    #[serde(default)]
    readonly: bool,
    serial: Option<String>,
    #[serde(default)]
    cache: CacheMode,
    #[serde(default)]
    direct: bool,
    #[serde(default)]
    standby: bool,
}

/// A `[[net]]` of a file.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct NetTable {
    tap: Option<String>,
    tap_fd: Option<i32>,
    #[serde(default)]
    user: bool,
    mac: Option<Mac>,
    mtu: Option<u16>,
    queues: Option<u16>,
    #[serde(default)]
    standby: bool,
}

/// The keys of a disk, for messages.
const DISK_KEYS: &str = "path=FILE, memory=SIZE, readonly, serial=TEXT, cache=writeback|writethrough, direct, \
     standby";

/// The keys of a network interface, for messages.
const NET_KEYS: &str = "tap=NAME, tap-fd=N, user, mac=ADDRESS, mtu=BYTES, queues=N, standby";

impl TryFrom<DiskTable> for DiskSpec {
    type Error = String;

    fn try_from(table: DiskTable) -> Result<Self, String> {
        let source = match (table.path, table.memory) {
            (Some(path), None) => DiskSource::Path(path),
            (None, Some(size)) => DiskSource::Memory(size),
            (Some(_), Some(_)) => return Err("a disk has a path or a memory size, not both".to_owned()),
            (None, None) => return Err("a disk needs a path or a memory size".to_owned()),
        };
        if let DiskSource::Memory(size) = source
            && (size.0 < 1 << 20 || size.0 > 1 << 44)
        {
            return Err(format!(
                "a disk in memory of {size} is not possible: 1M to 16T are"
            ));
        }
        if let Some(serial) = &table.serial {
            // Limit: SPC-4 leaves the length open; Linux shows so many, and udev makes a file name of it.
            let right = |c: char| c.is_ascii_graphic();
            if serial.is_empty() || serial.len() > 64 || !serial.chars().all(right) {
                return Err(format!(
                    "{serial:?} is no serial number: 1 to 64 printable ASCII characters without spaces are"
                ));
            }
        }
        Ok(DiskSpec {
            source,
            read_only: table.readonly,
            serial: table.serial,
            cache: table.cache,
            direct: table.direct,
            standby: table.standby,
        })
    }
}

impl TryFrom<NetTable> for NetSpec {
    type Error = String;

    fn try_from(table: NetTable) -> Result<Self, String> {
        let backend = match (table.tap, table.tap_fd, table.user) {
            (Some(name), None, false) => NetBackend::Tap(checked_interface(name)?),
            (None, Some(fd), false) => NetBackend::TapFd(checked_descriptor(fd)?),
            (None, None, true) => NetBackend::User,
            (None, None, false) => return Err("a network interface needs tap, tap-fd or user".to_owned()),
            _ => return Err("a network interface has one of tap, tap-fd and user".to_owned()),
        };
        let mtu = table.mtu.unwrap_or(1500);
        if !(576..=9000).contains(&mtu) {
            return Err(format!("an MTU of {mtu} is not supported: 576 to 9000 are"));
        }
        if let Some(queues) = table.queues
            && !(1..=64).contains(&queues)
        {
            return Err(format!("{queues} queues are not supported: 1 to 64 are"));
        }
        Ok(NetSpec {
            backend,
            mac: table.mac,
            mtu,
            queues: table.queues,
            standby: table.standby,
        })
    }
}

/// Linux 6.1 net/core/dev.c dev_valid_name.
fn checked_interface(name: String) -> Result<String, String> {
    let right = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.chars().all(right) {
        return Err(format!(
            "{name:?} is no name of a network interface: at most 15 characters, no '/', ':' or space"
        ));
    }
    Ok(name)
}

fn checked_descriptor(fd: i32) -> Result<i32, String> {
    if fd < 3 {
        return Err(format!(
            "descriptor {fd} cannot be a TAP: hand it over as 3 or higher"
        ));
    }
    Ok(fd)
}

/// The items of a flag's text, each key at most once.
fn items(text: &str) -> Result<Vec<(&str, Option<&str>)>, String> {
    let mut items: Vec<(&str, Option<&str>)> = Vec::new();
    for item in text.split(',') {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (item, None),
        };
        if items.iter().any(|(earlier, _)| *earlier == key) {
            return Err(format!("{key:?} is said twice"));
        }
        items.push((key, value));
    }
    Ok(items)
}

/// What may be said of something that is or is not; nothing means that it is.
fn is_switch(word: Option<&str>) -> bool {
    matches!(word, None | Some("true" | "false"))
}

fn number<T: FromStr>(key: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{key}={text:?} is no number that is possible here"))
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut table = DiskTable::default();
        for (position, (key, value)) in items(text)?.into_iter().enumerate() {
            match (key, value) {
                ("path", Some(path)) if !path.is_empty() => table.path = Some(path.into()),
                ("memory", Some(size)) => table.memory = Some(size.parse()?),
                ("readonly", None) => table.readonly = true,
                ("serial", Some(serial)) => table.serial = Some(serial.to_owned()),
                ("cache", Some("writeback")) => table.cache = CacheMode::Writeback,
                ("cache", Some("writethrough")) => table.cache = CacheMode::Writethrough,
                ("direct", None) => table.direct = true,
                ("standby", word) if is_switch(word) => table.standby = word != Some("false"),
                // A path alone is a disk.
                (path, None) if position == 0 && path.contains(['.', '/']) => table.path = Some(path.into()),
                _ => {
                    return Err(format!(
                        "{:?} is nothing that is said of a disk: {DISK_KEYS}",
                        whole(key, value)
                    ));
                }
            }
        }
        table.try_into()
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut table = NetTable::default();
        for (key, value) in items(text)? {
            match (key, value) {
                ("tap", Some(name)) => table.tap = Some(name.to_owned()),
                ("tap-fd", Some(fd)) => table.tap_fd = Some(number("tap-fd", fd)?),
                ("user", None) => table.user = true,
                ("mac", Some(mac)) => table.mac = Some(mac.parse()?),
                ("mtu", Some(bytes)) => table.mtu = Some(number("mtu", bytes)?),
                ("queues", Some(count)) => table.queues = Some(number("queues", count)?),
                ("standby", word) if is_switch(word) => table.standby = word != Some("false"),
                _ => {
                    let item = whole(key, value);
                    return Err(format!(
                        "{item:?} is nothing that is said of a network interface: {NET_KEYS}"
                    ));
                }
            }
        }
        table.try_into()
    }
}

fn whole(key: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("{key}={value}"),
        None => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_or_memory() {
        let disk: DiskSpec = "path=/dev/sdb,readonly,serial=A1,cache=writethrough,direct,standby=true"
            .parse()
            .expect("a disk");
        assert_eq!(
            disk,
            DiskSpec {
                source: DiskSource::Path("/dev/sdb".into()),
                read_only: true,
                serial: Some("A1".to_owned()),
                cache: CacheMode::Writethrough,
                direct: true,
                standby: true,
            }
        );
        let short: DiskSpec = "root.img,readonly".parse().expect("a disk");
        assert_eq!(short.source, DiskSource::Path("root.img".into()));
        let memory: DiskSpec = "memory=64M".parse().expect("a disk");
        assert_eq!(memory.source, DiskSource::Memory(Size(64 << 20)));
    }

    #[test]
    fn mistakes_in_disks_are_named() {
        for (text, part) in [
            ("", "nothing that is said of a disk"),
            ("path=", "\"path=\" is nothing"),
            ("path=a,raedonly", "\"raedonly\" is nothing"),
            ("path=a,readonly=yes", "\"readonly=yes\" is nothing"),
            ("path=a,path=b", "\"path\" is said twice"),
            ("path=a,memory=1M", "not both"),
            ("readonly", "needs a path"),
            ("memory=1", "no size"),
            ("memory=1K", "not possible"),
            ("path=a,cache=none", "\"cache=none\" is nothing"),
            ("path=a,standby=2", "\"standby=2\" is nothing"),
            ("path=a,serial=", "no serial number"),
            ("path=a,serial=a b", "no serial number"),
        ] {
            let error = text.parse::<DiskSpec>().expect_err(text);
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_network_interface_has_one_backend() {
        let net: NetSpec = "tap=tap0,mac=52:54:00:00:00:01,mtu=9000,queues=4"
            .parse()
            .expect("an interface");
        assert_eq!(net.backend, NetBackend::Tap("tap0".to_owned()));
        assert_eq!((net.mtu, net.queues), (9000, Some(4)));
        let net: NetSpec = "user".parse().expect("an interface");
        assert_eq!((net.backend, net.mtu, net.mac), (NetBackend::User, 1500, None));
        for (text, standby) in [
            ("user,standby", true),
            ("user,standby=true", true),
            ("user,standby=false", false),
            ("user", false),
        ] {
            let net: NetSpec = text.parse().expect("an interface");
            assert_eq!(net.standby, standby, "{text}");
        }
        let net: NetSpec = "tap-fd=5".parse().expect("an interface");
        assert_eq!(net.backend, NetBackend::TapFd(5));
    }

    #[test]
    fn mistakes_in_network_interfaces_are_named() {
        for (text, part) in [
            ("", "nothing that is said"),
            ("mac=52:54:00:00:00:01", "needs tap"),
            ("user,tap=a", "one of"),
            ("user=1", "\"user=1\" is nothing"),
            ("tap=", "no name of a network interface"),
            ("tap=0123456789abcdef", "no name of a network interface"),
            ("tap=a/b", "no name of a network interface"),
            ("tap-fd=x", "no number"),
            ("tap-fd=1", "3 or higher"),
            ("tap-fd=-1", "3 or higher"),
            ("user,mac=1", "no MAC address"),
            ("user,mtu=100", "an MTU of 100"),
            ("user,mtu=70000", "no number"),
            ("user,queues=0", "0 queues"),
        ] {
            let error = text.parse::<NetSpec>().expect_err(text);
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
