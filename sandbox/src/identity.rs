#![forbid(unsafe_code)]
//! Stage 4: user, groups and capabilities.
//!
//! With a user namespace the process has been its final user since before `execve`: user 0 inside is one
//! unprivileged user outside, and its capabilities end at the namespace. Without one, a process started by root
//! becomes that user here. Either way every capability set is emptied and locked before the stage is over.

use std::fs;

use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
};

/// A step of this stage that failed. None of them may: a process that keeps a privilege must not go on.
#[derive(Debug)]
pub(crate) struct Refused {
    pub step: &'static str,
    pub errno: i32,
}

/// User and group as the host sees them. Reads `/proc`, so it comes before the root is emptied.
///
/// With a one-line map (all that [`crate::spawn`] makes) the second number is the id outside; without a user
/// namespace the map is the identity, so that the ids are the answer themselves.
pub(crate) fn outside() -> (u32, u32) {
    let uid = geteuid().as_raw();
    let gid = getegid().as_raw();
    (
        translate("/proc/self/uid_map", uid),
        translate("/proc/self/gid_map", gid),
    )
}

/// Whether the caller's user namespace knows these ids. In a container's, most are not: nobody can become them.
pub(crate) fn is_mapped(uid: u32, gid: u32) -> bool {
    let knows =
        |map: &str, id: u32| fs::read_to_string(map).is_ok_and(|text| translate_by(&text, id).is_some());
    knows("/proc/self/uid_map", uid) && knows("/proc/self/gid_map", gid)
}

fn translate(map: &str, inside: u32) -> u32 {
    fs::read_to_string(map)
        .ok()
        .and_then(|text| translate_by(&text, inside))
        .unwrap_or(inside)
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
pub(crate) fn give_up(become_user: Option<(u32, u32)>) -> Result<(), Refused> {
    let before = capabilities(None).map_err(refused("read the capabilities"))?;
    if before.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
        set_capabilities_secure_bits(locked_secure_bits()).map_err(refused("lock the secure bits"))?;
    }
    clear_ambient_capability_set().map_err(refused("clear the ambient capabilities"))?;
    if let Some((uid, gid)) = become_user {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setgroups(&[]).map_err(refused_by_nix("leave the supplementary groups"))?;
        setresgid(gid, gid, gid).map_err(refused_by_nix("become the group"))?;
        setresuid(uid, uid, uid).map_err(refused_by_nix("become the user"))?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(refused("drop the capabilities"))?;
    if capabilities(None).map_err(refused("read the capabilities"))? != none {
        return Err(Refused {
            step: "drop the capabilities",
            errno: Errno::PERM.raw_os_error(),
        });
    }
    set_no_new_privs(true).map_err(refused("set no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(refused("become undumpable"))?;
    Ok(())
}

/// Drops all capabilities from the bounding set. The kernel says EINVAL for the first number that it does not know.
fn empty_bounding_set() -> Result<(), Refused> {
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(refused("empty the capability bounding set")(errno)),
        }
    }
    Ok(())
}

/// User 0 means nothing, and no bit of that can be changed back. NO_SETUID_FIXUP stays off: leaving user 0 then
/// clears the capabilities by itself, before [`give_up`] does so.
fn locked_secure_bits() -> CapabilitiesSecureBits {
    CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED
}

fn refused(step: &'static str) -> impl FnOnce(Errno) -> Refused {
    move |errno| Refused {
        step,
        errno: errno.raw_os_error(),
    }
}

fn refused_by_nix(step: &'static str) -> impl FnOnce(nix::errno::Errno) -> Refused {
    move |errno| Refused {
        step,
        errno: errno as i32,
    }
}

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
