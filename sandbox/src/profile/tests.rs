#![forbid(unsafe_code)]
use super::*;

const PROGRAMS: [fn() -> Profile; 5] = [vcpu, bus, block, net, keeper];

/// Calls that turn a held descriptor or a number into something new in the world.
const NEVER: &[(&str, i64)] = &[
    ("open", c::SYS_open),
    ("openat", c::SYS_openat),
    ("openat2", c::SYS_openat2),
    ("creat", c::SYS_creat),
    ("open_by_handle_at", c::SYS_open_by_handle_at),
    ("socket", c::SYS_socket),
    ("socketpair", c::SYS_socketpair),
    ("connect", c::SYS_connect),
    ("bind", c::SYS_bind),
    ("listen", c::SYS_listen),
    ("accept", c::SYS_accept),
    ("accept4", c::SYS_accept4),
    ("execve", c::SYS_execve),
    ("execveat", c::SYS_execveat),
    ("fork", c::SYS_fork),
    ("vfork", c::SYS_vfork),
    ("ptrace", c::SYS_ptrace),
    ("process_vm_readv", c::SYS_process_vm_readv),
    ("process_vm_writev", c::SYS_process_vm_writev),
    ("kill", c::SYS_kill),
    ("tkill", c::SYS_tkill),
    ("pidfd_open", c::SYS_pidfd_open),
    ("pidfd_getfd", c::SYS_pidfd_getfd),
    ("pidfd_send_signal", c::SYS_pidfd_send_signal),
    ("unshare", c::SYS_unshare),
    ("setns", c::SYS_setns),
    ("mount", c::SYS_mount),
    ("umount2", c::SYS_umount2),
    ("pivot_root", c::SYS_pivot_root),
    ("chroot", c::SYS_chroot),
    ("fsopen", c::SYS_fsopen),
    ("io_uring_setup", c::SYS_io_uring_setup),
    ("io_uring_register", c::SYS_io_uring_register),
    ("bpf", c::SYS_bpf),
    ("perf_event_open", c::SYS_perf_event_open),
    ("userfaultfd", c::SYS_userfaultfd),
    ("keyctl", c::SYS_keyctl),
    ("add_key", c::SYS_add_key),
    ("seccomp", c::SYS_seccomp),
    ("setuid", c::SYS_setuid),
    ("capset", c::SYS_capset),
    ("pkey_mprotect", c::SYS_pkey_mprotect),
    ("shmat", c::SYS_shmat),
    ("remap_file_pages", c::SYS_remap_file_pages),
];

#[test]
fn no_program_may_open_connect_execute_trace_or_leave() {
    for profile in PROGRAMS.map(|program| program()) {
        for rule in &profile.syscalls {
            // Whoever comes to the keeper comes to the socket that it was given.
            let is_keepers = profile.name == keeper().name && rule.number == c::SYS_accept4;
            assert!(
                is_keepers || !NEVER.iter().any(|(_, number)| *number == rule.number),
                "{} allows {}",
                profile.name,
                rule.name
            );
        }
    }
}

#[test]
fn only_the_vcpu_process_may_make_threads_and_nobody_a_process() {
    for profile in [block(), net(), keeper()] {
        assert!(
            !profile
                .syscalls
                .iter()
                .any(|rule| [c::SYS_clone, c::SYS_clone3].contains(&rule.number))
        );
    }
    let vcpu = vcpu();
    let clone = vcpu
        .syscalls
        .iter()
        .find(|rule| rule.number == c::SYS_clone)
        .unwrap();
    assert_eq!(clone.when, &[THREAD_ONLY]);
    let clone3 = vcpu
        .syscalls
        .iter()
        .find(|rule| rule.number == c::SYS_clone3)
        .unwrap();
    assert_eq!(clone3.answer, Answer::Errno(c::ENOSYS));
}

#[test]
fn every_call_that_maps_memory_refuses_executable_pages() {
    for profile in PROGRAMS.map(|program| program()) {
        for rule in profile
            .syscalls
            .iter()
            .filter(|rule| ["mmap", "mprotect"].contains(&rule.name))
        {
            assert_eq!(rule.when, &[NOT_EXECUTABLE], "{} {}", profile.name, rule.name);
        }
    }
}

#[test]
fn every_ioctl_names_its_requests() {
    for profile in PROGRAMS.map(|program| program()) {
        for rule in profile.syscalls.iter().filter(|rule| rule.number == c::SYS_ioctl) {
            assert!(
                matches!(rule.when, [When::OneOf { argument: 1, .. }]),
                "{} {}",
                profile.name,
                rule.by
            );
        }
    }
}

#[test]
fn every_rule_names_its_caller() {
    for profile in PROGRAMS.map(|program| program()) {
        for rule in &profile.syscalls {
            assert!(
                rule.by.starts_with("runtime: ") || rule.by.contains("/src/"),
                "{} {}",
                profile.name,
                rule.name
            );
        }
    }
}

#[test]
fn program_names_fit_into_the_kernels_field() {
    // linux/sched.h TASK_COMM_LEN is 16 with the closing zero.
    assert!(PROGRAMS.iter().all(|program| program().name.len() <= 15));
}
