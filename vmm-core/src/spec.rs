#![forbid(unsafe_code)]
//! What a VM is to be: the description that flags and file make together.
//!
//! [`Draft`] is what a person said, in flags or in a TOML file, and is all optional; two drafts merge, and
//! [`Draft::complete`] makes a [`VmSpec`] of it or says what is missing. A value that has come as far as this type has
//! the right form; whether a file exists, or may be opened, is found out by the supervisor when it opens it.

mod device;
mod file;
mod value;

use std::path::PathBuf;

use serde::Deserialize;
use vmbus::ipc::{OnReset, Populate};

pub use device::{CacheMode, DiskSource, DiskSpec, NetBackend, NetSpec};
pub use file::{FileError, read_file};
pub use value::{
    Console, LogFilter, Mac, Name, OnCrash, OnResetWord, PopulateWord, Restart, Seconds, Size, Vcpus,
};

/// Default patience with a server, or the control plane, that does not answer. Generous: on a host that is short of processors a server in
/// order may wait for its turn, and to kill it would help nobody.
const PATIENCE_SECONDS: u32 = 5;

/// Limit: the least in which a Linux kernel and its initrd get as far as a message.
const MIN_MEMORY: Size = Size(32 << 20);

/// Limit: what one 46-bit physical address space holds beside the devices; more is a slip of the finger.
const MAX_MEMORY: Size = Size(16 << 40);

/// Limit: disks and network interfaces of a VM together. A process each.
pub const MAX_DEVICES: usize = 64;

/// Guest RAM is made of these.
const MEMORY_UNIT: u64 = 2 << 20;

/// A VM, described completely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    pub name: Name,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, complete.
    pub cmdline: String,
    /// 32 MiB to 16 TiB, a multiple of 2 MiB.
    pub memory: Size,
    pub vcpus: Vcpus,
    pub disks: Vec<DiskSpec>,
    pub nets: Vec<NetSpec>,
    pub console: Console,
    pub on_reset: OnReset,
    pub on_crash: OnCrash,
    pub restart: Restart,
    /// Seconds that a server or `bulkhead-bus` may owe an answer before it is taken for dead; 0: it is not asked.
    pub patience_seconds: u32,
    pub populate: Populate,
    pub require_full_sandbox: bool,
    /// What the processes of the VM log, for example `info` or `info,device_block=debug`.
    pub log: String,
}

/// What was said of a VM so far.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Draft {
    pub name: Option<Name>,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub memory: Option<Size>,
    pub vcpus: Option<Vcpus>,
    #[serde(default, rename = "disk", deserialize_with = "value::tables")]
    pub disks: Vec<DiskSpec>,
    #[serde(default, rename = "net", deserialize_with = "value::tables")]
    pub nets: Vec<NetSpec>,
    pub console: Option<Console>,
    #[serde(default, deserialize_with = "value::by_text_option")]
    pub on_reset: Option<value::OnResetWord>,
    pub on_crash: Option<OnCrash>,
    pub restart: Option<Restart>,
    pub patience: Option<Seconds>,
    #[serde(default, deserialize_with = "value::by_text_option")]
    pub populate: Option<value::PopulateWord>,
    pub require_full_sandbox: Option<bool>,
    pub log: Option<LogFilter>,
}

/// Why a draft is no VM. One sentence each.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    #[error("no kernel is given: say --kernel FILE, or kernel = \"FILE\" in the file")]
    NoKernel,
    #[error("memory of {0} is too small: a Linux guest needs {MIN_MEMORY} or more")]
    MemoryTooSmall(Size),
    #[error("memory of {0} is too large: at most {MAX_MEMORY} is supported")]
    MemoryTooLarge(Size),
    #[error("memory of {0} is not a multiple of 2M")]
    MemoryUneven(Size),
    #[error("{0} devices are too many: a VM has at most {MAX_DEVICES}")]
    TooManyDevices(usize),
    #[error("network interfaces {0} and {1} have the same MAC address {2}")]
    SameMac(usize, usize, Mac),
    #[error("disks {0} and {1} have the same serial number {2:?}")]
    SameSerial(usize, usize, String),
    #[error("descriptor {0} is named by two network interfaces")]
    SameDescriptor(i32),
    #[error("tap {0:?} is named by two network interfaces")]
    SameTap(String),
}

impl Draft {
    /// What `flags` say on top of this: a value of theirs wins, their devices come after these.
    pub fn overridden_by(self, flags: Draft) -> Draft {
        Draft {
            name: flags.name.or(self.name),
            kernel: flags.kernel.or(self.kernel),
            initrd: flags.initrd.or(self.initrd),
            cmdline: flags.cmdline.or(self.cmdline),
            memory: flags.memory.or(self.memory),
            vcpus: flags.vcpus.or(self.vcpus),
            disks: self.disks.into_iter().chain(flags.disks).collect(),
            nets: self.nets.into_iter().chain(flags.nets).collect(),
            console: flags.console.or(self.console),
            on_reset: flags.on_reset.or(self.on_reset),
            on_crash: flags.on_crash.or(self.on_crash),
            restart: flags.restart.or(self.restart),
            patience: flags.patience.or(self.patience),
            populate: flags.populate.or(self.populate),
            require_full_sandbox: flags.require_full_sandbox.or(self.require_full_sandbox),
            log: flags.log.or(self.log),
        }
    }

    /// Fills in what was not said. `default_name` is for a VM without a name.
    pub fn complete(self, default_name: Name) -> Result<VmSpec, SpecError> {
        let memory = self.memory.unwrap_or(Size(512 << 20));
        check_memory(memory)?;
        let devices = self.disks.len() + self.nets.len();
        if devices > MAX_DEVICES {
            return Err(SpecError::TooManyDevices(devices));
        }
        check_twins(&self.disks, &self.nets)?;
        let console = self.console.unwrap_or_default();
        let default_cmdline = match console {
            Console::None => "",
            Console::Stdio | Console::File(_) => "console=ttyS0",
        };
        Ok(VmSpec {
            name: self.name.unwrap_or(default_name),
            kernel: self.kernel.ok_or(SpecError::NoKernel)?,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_else(|| default_cmdline.to_owned()),
            memory,
            vcpus: self.vcpus.unwrap_or_default(),
            disks: self.disks,
            nets: self.nets,
            console,
            on_reset: self.on_reset.unwrap_or_default().0,
            on_crash: self.on_crash.unwrap_or_default(),
            restart: self.restart.unwrap_or_default(),
            patience_seconds: self.patience.map_or(PATIENCE_SECONDS, |patience| patience.0),
            populate: self.populate.unwrap_or_default().0,
            require_full_sandbox: self.require_full_sandbox.unwrap_or(false),
            log: self.log.map_or_else(|| "warn".to_owned(), |log| log.0),
        })
    }
}

fn check_memory(memory: Size) -> Result<(), SpecError> {
    if memory < MIN_MEMORY {
        return Err(SpecError::MemoryTooSmall(memory));
    }
    if memory > MAX_MEMORY {
        return Err(SpecError::MemoryTooLarge(memory));
    }
    if !memory.0.is_multiple_of(MEMORY_UNIT) {
        return Err(SpecError::MemoryUneven(memory));
    }
    Ok(())
}

/// Things that must not be said of two devices. Numbers in the messages count from 1.
fn check_twins(disks: &[DiskSpec], nets: &[NetSpec]) -> Result<(), SpecError> {
    for (first, earlier) in nets.iter().enumerate() {
        for (second, later) in nets.iter().enumerate().skip(first + 1) {
            if let (Some(mac), Some(other)) = (earlier.mac, later.mac)
                && mac == other
            {
                return Err(SpecError::SameMac(first + 1, second + 1, mac));
            }
            match (&earlier.backend, &later.backend) {
                (NetBackend::TapFd(fd), NetBackend::TapFd(other)) if fd == other => {
                    return Err(SpecError::SameDescriptor(*fd));
                }
                (NetBackend::Tap(name), NetBackend::Tap(other)) if name == other => {
                    return Err(SpecError::SameTap(name.clone()));
                }
                _ => {}
            }
        }
    }
    for (first, earlier) in disks.iter().enumerate() {
        for (second, later) in disks.iter().enumerate().skip(first + 1) {
            if let (Some(serial), Some(other)) = (&earlier.serial, &later.serial)
                && serial == other
            {
                return Err(SpecError::SameSerial(first + 1, second + 1, serial.clone()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        "vm".parse().expect("a name")
    }

    fn draft() -> Draft {
        Draft {
            kernel: Some("vmlinuz".into()),
            ..Draft::default()
        }
    }

    #[test]
    fn a_kernel_is_all_that_must_be_said() {
        let spec = draft().complete(name()).expect("complete");
        assert_eq!(spec.memory, Size(512 << 20));
        assert_eq!(spec.vcpus, Vcpus::default());
        assert_eq!(spec.cmdline, "console=ttyS0");
        assert_eq!(Draft::default().complete(name()), Err(SpecError::NoKernel));
    }

    #[test]
    fn flags_win_and_their_devices_come_last() {
        let file = Draft {
            memory: Some(Size(1 << 30)),
            log: Some("debug".parse().expect("a filter")),
            disks: vec!["a.img".parse().expect("a disk")],
            ..draft()
        };
        let flags = Draft {
            memory: Some(Size(64 << 20)),
            disks: vec!["b.img".parse().expect("a disk")],
            ..Draft::default()
        };
        let both = file.overridden_by(flags);
        assert_eq!(both.memory, Some(Size(64 << 20)));
        assert_eq!(both.log, Some("debug".parse().expect("a filter")));
        let sources: Vec<_> = both.disks.iter().map(|disk| disk.source.clone()).collect();
        assert_eq!(
            sources,
            [DiskSource::Path("a.img".into()), DiskSource::Path("b.img".into())]
        );
    }

    #[test]
    fn memory_has_bounds() {
        for (bytes, expected) in [
            (0, SpecError::MemoryTooSmall(Size(0))),
            ((32 << 20) - 1, SpecError::MemoryTooSmall(Size((32 << 20) - 1))),
            (
                (64 << 20) + 4096,
                SpecError::MemoryUneven(Size((64 << 20) + 4096)),
            ),
            (u64::MAX, SpecError::MemoryTooLarge(Size(u64::MAX))),
        ] {
            let memory = Some(Size(bytes));
            assert_eq!(Draft { memory, ..draft() }.complete(name()), Err(expected));
        }
    }

    #[test]
    fn two_devices_cannot_be_the_same() {
        let net = |text: &str| text.parse::<NetSpec>().expect("a network interface");
        let disk = |text: &str| text.parse::<DiskSpec>().expect("a disk");
        let refused = |draft: Draft| draft.complete(name()).expect_err("twins").to_string();
        let nets = vec![
            net("tap=a,mac=52:54:00:00:00:01"),
            net("user"),
            net("user,mac=52:54:00:00:00:01"),
        ];
        assert_eq!(
            refused(Draft { nets, ..draft() }),
            "network interfaces 1 and 3 have the same MAC address 52:54:00:00:00:01"
        );
        let nets = vec![net("tap-fd=7"), net("tap-fd=7")];
        assert_eq!(
            refused(Draft { nets, ..draft() }),
            "descriptor 7 is named by two network interfaces"
        );
        let nets = vec![net("tap=t"), net("tap=t")];
        assert_eq!(
            refused(Draft { nets, ..draft() }),
            "tap \"t\" is named by two network interfaces"
        );
        let disks = vec![disk("path=a,serial=1"), disk("path=b,serial=1")];
        assert_eq!(
            refused(Draft { disks, ..draft() }),
            "disks 1 and 2 have the same serial number \"1\""
        );
    }

    #[test]
    fn devices_are_bounded() {
        let disks = vec!["memory=1M".parse::<DiskSpec>().expect("a disk"); MAX_DEVICES + 1];
        assert_eq!(
            Draft { disks, ..draft() }.complete(name()),
            Err(SpecError::TooManyDevices(65))
        );
    }
}
