#![forbid(unsafe_code)]
//! The system call filter of stage 6, compiled.
//!
//! One filter allows what the profile's rules allow. All else, the x32 numbers included, raises SIGSYS, whose handler
//! names the call and ends the process (`sys/process.rs` name_refusals; no profile lets a program exchange it); a call
//! of a foreign architecture kills at once. Rules that answer with an errno need a second filter, because a filter knows
//! two actions only; the kernel runs both and takes the stricter answer (`man 2 seccomp`), so the first one
//! must allow those calls for the second to refuse them gently.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::jail::Instruction;
use crate::profile::{Answer, Profile, Rule, When};

/// Compiles the profile for a process with this id (inside its PID namespace): the filters in the order in which they are
/// to be installed.
///
/// # Errors
/// The profile has a rule that cannot be expressed, or is too long: our own mistake, which the tests catch.
pub(crate) fn compile(profile: &Profile, own_pid: u32) -> Result<Vec<Vec<Instruction>>, BackendError> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut errno = None;
    for rule in &profile.syscalls {
        let alternatives = alternatives(rule, own_pid)?;
        match rule.answer {
            Answer::Allow => merge(&mut allowed, rule.number, alternatives),
            Answer::Errno(number) => {
                debug_assert!(errno.is_none_or(|other| other == number), "one errno per profile");
                errno = Some(number);
                merge(&mut allowed, rule.number, Vec::new());
                merge(&mut refused, rule.number, alternatives);
            }
        }
    }
    let action = SeccompAction::Trap;
    let allow: BpfProgram =
        SeccompFilter::new(allowed, action, SeccompAction::Allow, TargetArch::x86_64)?.try_into()?;
    let refuse: Option<BpfProgram> = match errno {
        None => None,
        Some(number) => {
            let action = SeccompAction::Errno(number.unsigned_abs());
            Some(SeccompFilter::new(refused, SeccompAction::Allow, action, TargetArch::x86_64)?.try_into()?)
        }
    };
    // This order: the allowing filter has no rule for seccomp(2) itself.
    let filters = refuse.iter().chain([&allow]);
    Ok(filters
        .map(|program| program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect())
        .collect())
}

/// Adds a rule's alternatives to those of the same call. An empty list means "whatever the arguments", and wins.
fn merge(rules: &mut BTreeMap<i64, Vec<SeccompRule>>, number: i64, alternatives: Vec<SeccompRule>) {
    match rules.get_mut(&number) {
        None => {
            rules.insert(number, alternatives);
        }
        Some(known) if known.is_empty() || alternatives.is_empty() => known.clear(),
        Some(known) => known.extend(alternatives),
    }
}

/// The rule as a disjunction: any one of the returned rules suffices; none at all means that arguments do not matter.
fn alternatives(rule: &Rule, own_pid: u32) -> Result<Vec<SeccompRule>, BackendError> {
    let mut sets: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for when in rule.when {
        let choices = conditions(when, own_pid)?;
        sets = sets
            .iter()
            .flat_map(|set| {
                choices
                    .iter()
                    .map(move |choice| [set.as_slice(), std::slice::from_ref(choice)].concat())
            })
            .collect();
    }
    if rule.when.is_empty() {
        Ok(Vec::new())
    } else {
        sets.into_iter().map(SeccompRule::new).collect()
    }
}

fn conditions(when: &When, own_pid: u32) -> Result<Vec<SeccompCondition>, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq};
    match *when {
        When::OneOf { argument, values } => values
            .iter()
            .map(|&value| SeccompCondition::new(argument, Dword, Eq, u64::from(value)))
            .collect(),
        When::Bits {
            argument,
            mask,
            equal,
        } => Ok(vec![SeccompCondition::new(
            argument,
            Qword,
            MaskedEq(mask),
            equal,
        )?]),
        When::Null { argument } => Ok(vec![SeccompCondition::new(argument, Qword, Eq, 0)?]),
        When::OwnPid { argument } => Ok(vec![SeccompCondition::new(
            argument,
            Dword,
            Eq,
            u64::from(own_pid),
        )?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile;

    #[test]
    fn every_profile_compiles_and_fits_into_the_kernels_limit() {
        for profile in profile::all() {
            let filters = compile(&profile, 1).unwrap();
            let allow = filters.last().map_or(0, Vec::len);
            assert!(allow > 20, "{} allows next to nothing", profile.name);
            // linux/bpf_common.h BPF_MAXINSNS
            assert!(allow < 4096, "{} is too long", profile.name);
        }
    }

    #[test]
    fn a_rule_without_conditions_wins_over_one_with_conditions() {
        let one = SeccompRule::new(vec![
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 1).unwrap(),
        ]);
        let mut rules = BTreeMap::new();
        merge(&mut rules, 1, vec![one.unwrap()]);
        merge(&mut rules, 1, Vec::new());
        assert!(rules[&1].is_empty());
    }

    #[test]
    fn conditions_of_one_rule_must_all_hold_and_values_are_alternatives() {
        const RULE: Rule = Rule {
            name: "probe",
            number: 1,
            when: &[
                When::OneOf {
                    argument: 0,
                    values: &[1, 2, 3],
                },
                When::OneOf {
                    argument: 1,
                    values: &[4, 5],
                },
            ],
            answer: Answer::Allow,
            by: "runtime: a test",
        };
        assert_eq!(alternatives(&RULE, 1).unwrap().len(), 6);
    }
}
