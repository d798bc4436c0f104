#![forbid(unsafe_code)]
//! Stage 5: a Landlock domain without a single rule.
//!
//! Landlock denies what it handles and what no rule allows, so an empty rule set denies all it knows: files,
//! TCP, abstract Unix sockets and signals to processes outside of the domain. It sees what io_uring does in the
//! process's name, too. Descriptors that are already open keep their rights.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetError, RulesetStatus, Scope,
};

use crate::report::Landlock;

/// The newest set of rights that was tried on a real kernel (6.18). An older kernel enforces what it knows.
const KNOWN: ABI = ABI::V7;

/// Enters the domain. Sets no_new_privs as well, which [`crate::identity`] has done before.
///
/// # Errors
/// The kernel has Landlock and refused the rule set.
pub(crate) fn deny_all() -> Result<Landlock, RulesetError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .restrict_self()?;
    let enforced = !matches!(status.ruleset, RulesetStatus::NotEnforced);
    Ok(match status.landlock {
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } if enforced => {
            let abi = kernel_abi
                .and_then(|abi| u32::try_from(abi).ok())
                .unwrap_or(effective_abi as u32);
            Landlock::DeniesAll { abi }
        }
        _ => Landlock::Absent,
    })
}
