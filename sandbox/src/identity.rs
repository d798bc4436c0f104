#![forbid(unsafe_code)]
//! Stage 4: user, groups and capabilities.
//!
//! With a user namespace the process has been its final user since before `execve`: user 0 inside is one
//! unprivileged user outside, and its capabilities end at the namespace. Without one, a process started by root
//! becomes that user here. Either way every capability set is emptied and locked before the stage is over.

use std::fs;

use nix::unistd::geteuid;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::stage::SandboxError;

/// Our user as the host sees it.
///
/// With a one-line map (all that [`crate::spawn`] makes) the second number is the id outside; without a user
/// namespace the map is the identity, so that the id is the answer itself.
pub(crate) fn outside() -> u32 {
    let uid = geteuid().as_raw();
    fs::read_to_string("/proc/self/uid_map")
        .ok()
        .and_then(|map| translate_by(&map, uid))
        .unwrap_or(uid)
}

/// Whether the caller's user namespace knows these ids. In a container's, most are not: nobody can become them.
pub(crate) fn is_mapped(uid: u32, gid: u32) -> bool {
    let knows =
        |map: &str, id: u32| fs::read_to_string(map).is_ok_and(|text| translate_by(&text, id).is_some());
    knows("/proc/self/uid_map", uid) && knows("/proc/self/gid_map", gid)
}

/// `man 7 user_namespaces`: lines of first id inside, first id outside, length.
fn translate_by(map: &str, inside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>());
        let (Some(Ok(first)), Some(Ok(outer)), Some(Ok(length))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return None;
        };
        let offset = inside.checked_sub(first)?;
        if offset < length {
            outer.checked_add(offset)
        } else {
            None
        }
    })
}

/// Gives up every privilege, for good. `become_user`: user and group to become; only where the process is real root.
///
/// # Errors
/// The first step that failed. None of them may: a process that keeps a privilege must not go on.
pub(crate) fn give_up(become_user: Option<(u32, u32)>) -> Result<(), SandboxError> {
    let cannot = |step| {
        move |errno: Errno| SandboxError::Privilege {
            step,
            error: errno.into(),
        }
    };
    let before = capabilities(None).map_err(cannot("read the capabilities"))?;
    if before.effective.contains(CapabilitySet::SETPCAP) {
        // The kernel says EINVAL for the first number that it does not know.
        for number in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
                Err(Errno::INVAL) => break,
                result => result.map_err(cannot("empty the capability bounding set"))?,
            }
        }
        set_capabilities_secure_bits(LOCKED).map_err(cannot("lock the secure bits"))?;
    }
    clear_ambient_capability_set().map_err(cannot("clear the ambient capabilities"))?;
    // These change the one thread that there is.
    if let Some((uid, gid)) = become_user {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        set_thread_groups(&[]).map_err(cannot("leave the supplementary groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(cannot("become the group"))?;
        set_thread_res_uid(uid, uid, uid).map_err(cannot("become the user"))?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(cannot("drop the capabilities"))?;
    if capabilities(None).map_err(cannot("read the capabilities"))? != none {
        return Err(cannot("drop the capabilities")(Errno::PERM));
    }
    set_no_new_privs(true).map_err(cannot("set no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(cannot("become undumpable"))
}

/// User 0 means nothing, and no bit of that can be changed back. NO_SETUID_FIXUP stays off: leaving user 0 then
/// clears the capabilities by itself, before [`give_up`] does so.
const LOCKED: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

#[cfg(test)]
mod tests {
    use super::translate_by;

    #[test]
    fn the_id_outside_is_found_by_the_map() {
        assert_eq!(translate_by("         0       1000          1\n", 0), Some(1000));
        assert_eq!(
            translate_by("         0          0 4294967295\n", 65534),
            Some(65534)
        );
        assert_eq!(translate_by("0 100000 10\n10 5 1\n", 10), Some(5));
    }

    #[test]
    fn an_id_without_a_line_has_no_translation() {
        assert_eq!(translate_by("0 1000 1\n", 1), None);
        assert_eq!(translate_by("", 0), None);
        assert_eq!(translate_by("5 4294967295 4\n", 6), None);
    }
}
