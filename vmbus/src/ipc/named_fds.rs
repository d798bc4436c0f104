//! The descriptors that come with a `Start`.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

/// Descriptors that are not what the receiver needs. One sentence each, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorFault {
    /// A descriptor that is needed was not handed over.
    #[error("no descriptor named \"{0}\" was handed over")]
    Missing(String),
    /// Two descriptors have one name.
    #[error("two descriptors named \"{0}\" were handed over")]
    Duplicate(String),
    /// A descriptor came that the configuration does not mention.
    #[error("a descriptor named \"{0}\" was handed over, but the configuration has no use for it")]
    Unused(String),
}

/// Descriptors by name. Each is taken exactly once; those left are closed on drop.
#[derive(Debug, Default)]
pub struct NamedFds {
    fds: Vec<(String, OwnedFd)>,
}

impl NamedFds {
    /// Pairs the names of a `Start` with the descriptors that came with it.
    pub fn new(names: Vec<String>, fds: Vec<OwnedFd>) -> Result<Self, DescriptorFault> {
        let mut named: Vec<(String, OwnedFd)> = Vec::new();
        for (name, fd) in names.into_iter().zip(fds) {
            if named.iter().any(|(other, _)| *other == name) {
                return Err(DescriptorFault::Duplicate(name));
            }
            named.push((name, fd));
        }
        Ok(Self { fds: named })
    }

    /// Takes the descriptor of that name, which must be there.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, DescriptorFault> {
        self.take_optional(name)
            .ok_or_else(|| DescriptorFault::Missing(name.to_owned()))
    }

    /// Takes the descriptor of that name, if it is there.
    pub fn take_optional(&mut self, name: &str) -> Option<OwnedFd> {
        let position = self.fds.iter().position(|(other, _)| other == name)?;
        Some(self.fds.swap_remove(position).1)
    }

    /// States that all descriptors are taken: one too many is a mistake in the plan, and a leak of authority.
    pub fn finish(self) -> Result<(), DescriptorFault> {
        match self.fds.into_iter().next() {
            Some((name, _)) => Err(DescriptorFault::Unused(name)),
            None => Ok(()),
        }
    }
}
