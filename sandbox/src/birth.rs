#![forbid(unsafe_code)]
//! What the parent tells the child about how it was made, in one environment variable.
//!
//! A process cannot see by itself whether its namespaces are its own, and after `execve` nothing else is left
//! of what [`crate::spawn`] knew. The parent is the supervisor, which the child trusts; a mistake in the text is
//! a [`Misspelt`] and never a guess.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::str::FromStr;

use crate::namespaces::Namespaces;

/// The environment variable's name.
pub(crate) const VARIABLE: &str = "BULKHEAD_BIRTH";

/// How this process was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Birth {
    /// Namespaces made by the `clone3` of this process.
    pub made: Namespaces,
    /// Namespaces its parent asked for.
    pub wanted: Namespaces,
    /// User and group that the process must still become: the parent is root and there is no user namespace.
    pub become_user: Option<(u32, u32)>,
}

/// The variable is there, but not as [`Birth`] writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Misspelt(pub String);

impl Birth {
    /// A process that was started by hand: it shares everything, and wants all that it can still get.
    const BY_HAND: Self = Self {
        made: Namespaces::none(),
        wanted: Namespaces::all(),
        become_user: None,
    };

    /// Reads the environment of this process.
    pub fn of_this_process() -> Result<Self, Misspelt> {
        Self::from_variable(std::env::var_os(VARIABLE).as_deref())
    }

    fn from_variable(value: Option<&OsStr>) -> Result<Self, Misspelt> {
        let Some(value) = value else {
            return Ok(Self::BY_HAND);
        };
        value
            .to_str()
            .ok_or_else(|| Misspelt(value.to_string_lossy().into_owned()))?
            .parse()
    }

    pub fn to_variable(self) -> (OsString, OsString) {
        (VARIABLE.into(), self.to_string().into())
    }
}

impl fmt::Display for Birth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "made={} wanted={}", self.made.bits(), self.wanted.bits())?;
        if let Some((uid, gid)) = self.become_user {
            write!(f, " uid={uid} gid={gid}")?;
        }
        Ok(())
    }
}

impl FromStr for Birth {
    type Err = Misspelt;

    fn from_str(text: &str) -> Result<Self, Misspelt> {
        let misspelt = || Misspelt(text.to_owned());
        let (mut made, mut wanted, mut uid, mut gid) = (None, None, None, None);
        for word in text.split(' ') {
            let (key, number) = word.split_once('=').ok_or_else(misspelt)?;
            let number: u32 = number.parse().map_err(|_| misspelt())?;
            let place = match key {
                "made" => &mut made,
                "wanted" => &mut wanted,
                "uid" => &mut uid,
                "gid" => &mut gid,
                _ => return Err(misspelt()),
            };
            if place.replace(number).is_some() {
                return Err(misspelt());
            }
        }
        let set = |bits: Option<u32>| {
            bits.and_then(|bits| u8::try_from(bits).ok())
                .map(Namespaces::from_bits)
                .ok_or_else(misspelt)
        };
        let become_user = match (uid, gid) {
            (Some(uid), Some(gid)) => Some((uid, gid)),
            (None, None) => None,
            _ => return Err(misspelt()),
        };
        Ok(Self {
            made: set(made)?,
            wanted: set(wanted)?,
            become_user,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_writes_the_child_reads() {
        for become_user in [None, Some((65534, 0)), Some((u32::MAX, 7))] {
            let made = Namespaces::all().without(Namespaces::USER);
            let birth = Birth {
                made,
                wanted: Namespaces::all(),
                become_user,
            };
            let (_, text) = birth.to_variable();
            assert_eq!(Birth::from_variable(Some(&text)), Ok(birth));
        }
    }

    #[test]
    fn a_process_started_by_hand_wants_every_namespace_and_has_none() {
        let birth = Birth::from_variable(None).unwrap();
        assert!(birth.made.is_empty() && birth.wanted == Namespaces::all());
    }

    #[test]
    fn a_misspelt_variable_is_an_error_and_not_a_guess() {
        for text in [
            "",
            "made=1",
            "made=1 wanted=x",
            "made=1 wanted=2 uid=3",
            "made=1 made=1 wanted=2",
            "made=300 wanted=1",
            "x=1",
        ] {
            assert!(text.parse::<Birth>().is_err(), "{text:?} was accepted");
        }
    }
}
