#![forbid(unsafe_code)]
//! For stage 5: a Landlock domain without a single rule. The supervisor makes it, the child enters it.
//!
//! Landlock denies what it handles and what no rule allows, so an empty rule set denies all it knows: files,
//! TCP, abstract Unix sockets and signals to processes outside of the domain. It sees what io_uring does in the
//! process's name, too. Descriptors that are already open keep their rights.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};

/// The newest set of rights that was tried on a real kernel (6.18). An older kernel enforces what it knows.
const KNOWN: ABI = ABI::V7;

/// Makes the rule set; `None`: the kernel was built or started without Landlock.
///
/// # Errors
/// The kernel has Landlock and refused the rule set.
pub(crate) fn deny_all() -> Result<Option<OwnedFd>, RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    Ok(ruleset.into())
}
