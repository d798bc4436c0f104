//! The rig itself: what every Linux test relies on.
#![forbid(unsafe_code)]

use bulkhead_tests::rig::{RigError, RigSpec};
use bulkhead_tests::tier;
use std::time::Duration;

#[test]
fn a_payload_hands_back_its_status_its_output_and_its_files() {
    let Some(rig) = tier::rig() else { return };
    let spec = RigSpec::script(
        "cat /opt/in; test -c /dev/kvm; ls /dev/net/tun; mkdir /out/a; cp /opt/in /out/a/b; exit 3",
    )
    .file("/opt/in", "given\n");
    let outcome = tier::run(&rig, &spec);
    assert_eq!(
        (outcome.status, outcome.output.as_str()),
        (3, "given\n/dev/net/tun\n")
    );
    assert_eq!(outcome.files.get("a/b").map(Vec::as_slice), Some(&b"given\n"[..]));
    assert!(
        outcome.kernel_log.contains("Nested Paging enabled"),
        "{}",
        outcome.kernel_log
    );
}

#[test]
fn a_payload_that_does_not_end_is_the_rigs_failure_and_leaves_its_state() {
    let Some(rig) = tier::rig() else { return };
    let mut spec = RigSpec::script("echo begun; sleep 1000");
    spec.timeout = Duration::from_secs(2);
    spec.attempts = 1;
    match rig.run(&spec) {
        Err(RigError::Failed(failed)) => {
            assert_eq!((failed.output.as_str(), failed.attempts), ("begun\n", 1));
            let state = failed
                .files
                .get("state.txt")
                .expect("the machine still answered, so it described its state");
            assert!(String::from_utf8_lossy(state).contains("sleep 1000"));
        }
        other => panic!("expected the rig to fail, got {other:?}"),
    }
}

#[test]
fn a_kernel_panic_of_the_outer_machine_is_the_rigs_failure_and_is_tried_again() {
    let Some(rig) = tier::rig() else { return };
    let mut spec = RigSpec::script("echo c > /proc/sysrq-trigger; sleep 1000");
    spec.attempts = 2;
    match rig.run(&spec) {
        Err(RigError::Failed(failed)) => assert_eq!(failed.attempts, 2, "{failed}"),
        other => panic!("expected the rig to fail, got {other:?}"),
    }
}

#[test]
fn a_payload_can_say_that_the_rig_is_at_fault() {
    let Some(rig) = tier::rig() else { return };
    let mut spec = RigSpec::script("exit 75");
    spec.attempts = 1;
    assert!(matches!(rig.run(&spec), Err(RigError::Failed(_))));
}

/// Shows that the guest's images are good with a VMM that is not ours.
#[test]
fn the_guest_images_boot_under_qemu_microvm_and_run_a_script() {
    let Some(rig) = tier::rig() else { return };
    let spec = RigSpec::script(
        "guest-initrd /opt/script /tmp/initrd
         timeout 60 qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 256 -nodefaults -no-reboot \
            -display none -serial stdio -kernel /opt/guest/$KERNEL -initrd /tmp/initrd \
            -append 'console=ttyS0 quiet panic=-1' > /out/console || exit 75",
    );
    for kernel in ["vmlinux", "vmlinuz"] {
        let mut spec = spec.clone().file(
            "/opt/script",
            "mkfs.ext4 -V 2>&1 | head -1; echo sum $((6 * 7)); exit 5\n",
        );
        spec.command[2] = spec.command[2].replace("$KERNEL", kernel);
        let outcome = tier::run(&rig, &spec);
        let console = String::from_utf8_lossy(outcome.files.get("console").expect("the payload wrote it"));
        for line in ["guest: init", "guest: drivers virtio", "sum 42", "guest: exit 5"] {
            assert!(
                console.lines().any(|seen| seen.trim_end() == line),
                "{kernel}: no line {line:?} in\n{console}"
            );
        }
        assert!(console.contains("mke2fs 1."), "{console}");
    }
}
