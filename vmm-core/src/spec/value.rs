#![forbid(unsafe_code)]
//! Single values of a description. All are read from text by `FromStr`, for flags and for files alike, so that a mistake
//! has the same sentence in both.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vmbus::ipc::{OnReset, Populate};

/// Name of a VM: 1 to 48 letters, digits, `.`, `_` and `-`, not beginning with a `.` or `-`. It is a folder's name, too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A number of virtual processors, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpus(u16);

/// An Ethernet address: of one station, not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Where the guest's serial port is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output of `bulkhead`.
    #[default]
    Stdio,
    /// Nowhere.
    None,
    /// Output goes to this file, which is made or emptied.
    File(PathBuf),
}

/// What a crash of the guest's kernel does to the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCrash {
    /// It is reported; the guest may dump, reset itself, or stand still.
    #[default]
    Report,
    /// It is reported, and the VM ends.
    Exit,
}

/// Which deaths of a server get it a successor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// After ever longer pauses, and none to a server that does nothing but die: its device is held then.
    #[default]
    Careful,
    /// Every death, at once. For tests that kill servers, and for who would rather have load than a silent device.
    Always,
    /// As [`Restart::Careful`], but the VM ends where a device would be held.
    OrEnd,
}

/// A number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds(pub u32);

/// What the processes log: a level, or levels of modules, as `tracing_subscriber`'s `Targets` reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(pub String);

/// [`OnReset`] as a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnResetWord(pub OnReset);

/// [`Populate`] as a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PopulateWord(pub Populate);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let right = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty() || text.len() > 48 || !text.chars().all(right) || text.starts_with(['.', '-']) {
            return Err(format!(
                "{text:?} is no name for a VM: 1 to 48 letters, digits, '.', '_' and '-', and a letter or digit first"
            ));
        }
        Ok(Name(text.to_owned()))
    }
}

/// Units of [`Size`], the largest first.
const UNITS: [(char, u64); 4] = [('T', 1 << 40), ('G', 1 << 30), ('M', 1 << 20), ('K', 1 << 10)];

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS
            .iter()
            .find(|(_, bytes)| self.0 != 0 && self.0.is_multiple_of(*bytes));
        match unit {
            Some((letter, bytes)) => write!(f, "{}{letter}", self.0 / bytes),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size: say a number and K, M, G or T, for example 512M");
        let letter = text.chars().last().map(|letter| letter.to_ascii_uppercase());
        let (_, unit) = UNITS
            .iter()
            .find(|(name, _)| Some(*name) == letter)
            .ok_or_else(wrong)?;
        let number = text.get(..text.len() - 1).ok_or_else(wrong)?;
        if number.is_empty() || !number.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(*unit).map(Size).ok_or_else(wrong)
    }
}

impl Vcpus {
    pub fn get(self) -> u16 {
        self.0
    }
}

impl Default for Vcpus {
    fn default() -> Self {
        Vcpus(1)
    }
}

impl TryFrom<i64> for Vcpus {
    type Error = String;

    fn try_from(number: i64) -> Result<Self, String> {
        // Limit: bulkhead-vcpu makes a thread each, and Linux has one bit for each in its processor masks' first word.
        match u16::try_from(number) {
            Ok(number @ 1..=64) => Ok(Vcpus(number)),
            _ => Err(format!(
                "{number} virtual processors are not supported: 1 to 64 are"
            )),
        }
    }
}

impl FromStr for Vcpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number: i64 = text
            .parse()
            .map_err(|_| format!("{text:?} is no number of processors"))?;
        number.try_into()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no MAC address: six pairs of hexadecimal digits, as in 52:54:00:12:34:56")
        };
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        // IEEE 802-2014 section 8.2: the lowest bit of the first octet says that it is a group.
        if mac[0] & 1 != 0 {
            return Err(format!(
                "{text} is a MAC address of a group, not of one station: make its first digits even"
            ));
        }
        if mac == [0; 6] {
            return Err(format!("{text} is not a MAC address that a station can have"));
        }
        Ok(Mac(mac))
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse().map(Seconds);
        number.map_err(|_| format!("{text:?} is no number of seconds: say a whole number, 0 or more"))
    }
}

/// Programs and libraries whose modules log.
const LOGGING: [&str; 5] = ["device_block", "device_net", "sandbox", "vmbus", "vmm_core"];

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_level = |word: &str| LEVELS.contains(&word.to_ascii_lowercase().as_str());
        for item in text.split(',') {
            let (module, level) = match item.split_once('=') {
                Some((module, level)) => (Some(module), level),
                None => (None, item),
            };
            let is_module = |module: &str| LOGGING.contains(&module.split("::").next().unwrap_or_default());
            if !is_level(level) || !module.is_none_or(is_module) {
                return Err(format!(
                    "{item:?} is nothing that can be logged: say a level ({}), or MODULE=LEVEL with a module of {}",
                    LEVELS.join(", "),
                    LOGGING.join(", ")
                ));
            }
        }
        Ok(LogFilter(text.to_owned()))
    }
}

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Console::Stdio),
            "none" => Ok(Console::None),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Console::File(path.into())),
                _ => Err(format!("{text:?} is no console: say stdio, none or file=PATH")),
            },
        }
    }
}

impl FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "careful" => Ok(Restart::Careful),
            "always" => Ok(Restart::Always),
            "or-end" => Ok(Restart::OrEnd),
            _ => Err(format!("restart is not {text:?}: say careful, always or or-end")),
        }
    }
}

impl FromStr for OnCrash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "report" => Ok(OnCrash::Report),
            "exit" => Ok(OnCrash::Exit),
            _ => Err(format!(
                "{text:?} is nothing to do on a crash: say report or exit"
            )),
        }
    }
}

/// As they are read.
impl Serialize for Restart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Restart::Careful => "careful",
            Restart::Always => "always",
            Restart::OrEnd => "or-end",
        })
    }
}

impl Serialize for OnCrash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            OnCrash::Report => "report",
            OnCrash::Exit => "exit",
        })
    }
}

impl FromStr for OnResetWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reset" => Ok(OnResetWord(OnReset::Reset)),
            "exit" => Ok(OnResetWord(OnReset::Exit)),
            _ => Err(format!("{text:?} is nothing to do on a reset: say reset or exit")),
        }
    }
}

impl FromStr for PopulateWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(PopulateWord(Populate::Auto)),
            "never" => Ok(PopulateWord(Populate::Never)),
            "always" => Ok(PopulateWord(Populate::Always)),
            _ => Err(format!(
                "{text:?} is no way to populate memory: say auto, never or always"
            )),
        }
    }
}

/// Reads a value of the file by its `FromStr`: one in quotes, or a number without, so that a forgotten unit has the same
/// sentence as in a flag.
fn by_text<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    struct Text<T>(PhantomData<T>);
    impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a value in quotes")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
            number.to_string().parse().map_err(E::custom)
        }
    }
    // What we write down ourselves says no types, and is text.
    match deserializer.is_human_readable() {
        true => deserializer.deserialize_any(Text(PhantomData)),
        false => deserializer.deserialize_str(Text(PhantomData)),
    }
}

/// The tables `[[disk]]` or `[[net]]`.
pub(super) fn tables<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Tables<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Tables<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("tables, as there may be several: [[disk]], [[net]], with two brackets")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut tables: A) -> Result<Vec<T>, A::Error> {
            let mut read = Vec::new();
            while let Some(table) = tables.next_element()? {
                read.push(table);
            }
            Ok(read)
        }
    }
    deserializer.deserialize_any(Tables(PhantomData))
}

/// The same for a field that may be absent.
pub(super) fn by_text_option<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    by_text(deserializer).map(Some)
}

macro_rules! read_by_text {
    ($($name:ty),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                by_text(deserializer)
            }
        }
    )*};
}

read_by_text!(Name, Size, Mac, Console, OnCrash, Restart, Seconds, LogFilter);

impl<'de> Deserialize<'de> for Vcpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        i64::deserialize(deserializer)?.try_into().map_err(Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        for (text, bytes) in [
            ("1K", 1 << 10),
            ("512M", 512 << 20),
            ("3g", 3 << 30),
            ("2T", 2 << 40),
            ("0M", 0),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "512",
            "-1M",
            "+1M",
            "1.5G",
            "1 G",
            "16777216T",
            "99999999999999999999M",
            "1Mi",
            "1é",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(Size(3 << 30).to_string(), "3G");
        assert_eq!(Size(1536 << 20).to_string(), "1536M");
        assert_eq!(Size(1000).to_string(), "1000 bytes");
        assert_eq!(Size(0).to_string(), "0 bytes");
    }

    #[test]
    fn a_mac_address_is_of_one_station() {
        assert_eq!(
            "52:54:00:aB:cd:EF".parse(),
            Ok(Mac([0x52, 0x54, 0, 0xAB, 0xCD, 0xEF]))
        );
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5:54:00:12:34:56",
            "52:54:00:12:34:5g",
            "+2:54:00:12:34:56",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_name_is_safe_as_the_name_of_a_folder() {
        for text in ["a", "web-1", "A.b_c", &"x".repeat(48)] {
            assert!(text.parse::<Name>().is_ok(), "{text:?}");
        }
        for text in [
            "",
            ".",
            "..",
            "-x",
            ".x",
            "a/b",
            "a b",
            "é",
            "a\0",
            &"x".repeat(49),
        ] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn processors_are_1_to_64() {
        assert_eq!("64".parse::<Vcpus>().map(Vcpus::get), Ok(64));
        for text in ["0", "65", "-1", "65537", "two", ""] {
            assert!(text.parse::<Vcpus>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_log_filter_names_levels_and_modules_that_there_are() {
        for text in [
            "warn",
            "INFO",
            "info,device_block=debug",
            "vmm_core::run=trace,off",
        ] {
            assert!(text.parse::<LogFilter>().is_ok(), "{text:?}");
        }
        for text in [
            "",
            "ifno",
            "info,",
            "storvsp=debug",
            "device_block=loud",
            "device_blocks=info",
            "=",
        ] {
            let said = text.parse::<LogFilter>().expect_err(text);
            assert!(said.contains("say a level (off, error"), "{said}");
        }
    }

    #[test]
    fn a_console_is_one_of_three() {
        assert_eq!("file=/tmp/x".parse(), Ok(Console::File("/tmp/x".into())));
        assert_eq!("none".parse(), Ok(Console::None));
        for text in ["", "file=", "pty", "stdio,none"] {
            assert!(text.parse::<Console>().is_err(), "{text:?}");
        }
    }
}
