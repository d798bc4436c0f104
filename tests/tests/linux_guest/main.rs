//! Debian's kernel, unmodified, under bulkhead in the rig.
//!
//! Every test boots the rig once and runs several guests in it, one after the other (`scene.rs`): starting the rig takes
//! as long as a guest does. A guest fails loudly, by a line with FAILED or by not saying what it should, and then the test
//! shows its whole console.

#![forbid(unsafe_code)]

mod adopted;
mod deaths;
mod disks;
mod memory;
mod service;
mod users;

use bulkhead_tests::rig::Scenes;
use bulkhead_tests::tier;

/// Disk and network as the rig's script makes them for most guests.
const DISK_AND_NET: &str = "--disk path=/root/disk.raw --net tap=t0";
const QUIET: &str = "--cmdline 'console=ttyS0 quiet panic=-1'";
const NEW_DISK: &str = "rm -f /root/disk.raw; truncate -s 256M /root/disk.raw";
const WELL: &[&str] = &["guest: exit 0", "bulkhead: exit 0"];

/// No guests yet; None (after saying so) where Linux guests cannot be tested.
fn scenes() -> Option<Scenes> {
    let rig = tier::rig()?;
    Some(Scenes::new(rig, tier::programs()?))
}

/// Runs the guests.
///
/// # Panics
/// If one of them did not do what was expected.
fn run(scenes: Scenes) {
    if let Err(wrong) = scenes.run() {
        panic!("{wrong}");
    }
}

const FILES_AND_TCP: &str = r#"
[ "$(nproc)" = "$CPUS" ] || fail "$(nproc) processors instead of $CPUS"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
# One writer for each processor, so that sub-channels are used where there are any.
for n in $(seq "$CPUS"); do dd if=/dev/urandom of=/mnt/data$n bs=65536 count=64 2>/dev/null & done; wait
sum=$(cat /mnt/data* | sha256sum)
umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/sda /mnt || fail "mounting again"
[ "$(cat /mnt/data* | sha256sum)" = "$sum" ] || fail "the data are not what was written"
echo "guest: channels of the disk $(ls /sys/bus/vmbus/drivers/hv_storvsc/*/channels | wc -l)"
# busybox's nc ends as soon as the other side has no more to say: each side's input stays open until it has what it wants.
nc 192.168.215.1 5001 </mnt/data1 || fail "sending"
mkfifo /tmp/silence
for try in $(seq 50); do nc 192.168.215.1 5002 <>/tmp/silence >/tmp/back && break; usleep 200000; done
cmp /tmp/back /mnt/data1 || fail "what came back is not what was sent"
umount /mnt
quiet_log
exit 0
"#;

#[test]
fn guests_with_one_two_and_four_processors_keep_their_files_and_talk_tcp_both_ways() {
    let Some(mut scenes) = scenes() else { return };
    // Both files that a kernel comes in boot.
    for (name, cpu_count, kernel) in [
        ("one", 1, "vmlinuz"),
        ("two", 2, "vmlinux"),
        ("four", 4, "vmlinuz"),
    ] {
        let script = format!("CPUS={cpu_count}\n{FILES_AND_TCP}");
        // The same bytes go to the rig and come back.
        let around = format!(
            "{NEW_DISK}
             rm -f /root/silence; mkfifo /root/silence
             (nc -l -p 5001 <>/root/silence >/root/sent; nc -l -p 5002 </root/sent >/dev/null) &
             KERNEL={kernel}
             scene {name} {QUIET} --vcpus {cpu_count} --memory 384M {DISK_AND_NET}
             kill $! 2>/dev/null || true
             e2fsck -fn /root/disk.raw || echo FAILED e2fsck"
        );
        scenes = scenes.guest(name, 60, &script, &around, WELL);
    }
    run(scenes);
}

const MANY: &str = r#"
[ "$(nproc)" = "$CPUS" ] || fail "$(nproc) processors instead of $CPUS"
await /dev/sda
# Every processor works: each hashes the same bytes of the disk.
dd if=/dev/urandom of=/dev/sda bs=65536 count=16 2>/dev/null
for n in $(seq 0 $((CPUS - 1))); do taskset $(printf %x $((1 << n))) sha256sum /dev/sda >/tmp/sum$n & done; wait
[ "$(cat /tmp/sum* | wc -l) $(cat /tmp/sum* | sort -u | wc -l)" = "$CPUS 1" ] || fail "the processors disagree"
quiet_log
exit 0
"#;

#[test]
fn guests_with_eight_and_sixteen_processors_use_all_of_them() {
    let Some(mut scenes) = scenes() else { return };
    for (name, cpu_count) in [("eight", 8), ("sixteen", 16)] {
        let script = format!("CPUS={cpu_count}\n{MANY}");
        let around = format!("scene {name} {QUIET} --vcpus {cpu_count} --memory 512M --disk memory=1M");
        scenes = scenes.guest(name, 100, &script, &around, WELL);
    }
    run(scenes);
}

/// A disk with a file and its checksum, written at the first boot and verified by whoever comes later.
const WRITE: &str = r#"
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
dd if=/dev/urandom of=/mnt/data bs=65536 count=64 2>/dev/null
sha256sum </mnt/data >/mnt/sum
umount /mnt
"#;

const REBOOT: &str = r#"
network_up
await /dev/sda
if mount -t ext4 /dev/sda /mnt 2>/dev/null; then
    [ "$(sha256sum </mnt/data)" = "$(cat /mnt/sum)" ] || fail "the data did not survive the reboot"
    umount /mnt
    quiet_log
    echo "guest: second boot"
    exit 0
fi
@WRITE@
echo "guest: rebooting"
reboot -f
"#;

const KEXEC: &str = r#"
network_up
await /dev/sda
if grep -q stage=2 /proc/cmdline; then
    mount -t ext4 /dev/sda /mnt || fail "mount after kexec"
    [ "$(sha256sum </mnt/data)" = "$(cat /mnt/sum)" ] || fail "the data did not survive kexec"
    umount /mnt
    quiet_log
    echo "guest: second kernel"
    exit 0
fi
@WRITE@
wget -q -O /tmp/vmlinuz http://192.168.215.1:8080/vmlinuz || fail "kernel"
wget -q -O /tmp/initrd http://192.168.215.1:8080/again.cpio || fail "initrd"
kexec -l /tmp/vmlinuz --initrd=/tmp/initrd --command-line="$(cat /proc/cmdline) stage=2" || fail "kexec -l"
echo "guest: kexec"
kexec -e
"#;

/// Each driver goes and comes back while the other one's device is busy.
const DRIVERS: &str = r#"
network_up
await /dev/sda
@WRITE@
# What is read past the page cache, while nobody writes.
whole() { dd if=/dev/sda bs=65536 count=512 iflag=direct 2>/dev/null | sha256sum; }
for round in 1 2; do
    (while ! [ -e /tmp/disk-is-back ]; do
        [ "$(wget -q -O - http://192.168.215.1:8080/hello)" = hello ] || { echo "FAILED the network, without a disk driver"; exit; }
    done; echo "guest: the network went on") &
    rmmod hv_storvsc || fail "rmmod hv_storvsc"
    await /dev/sda gone
    modprobe hv_storvsc || fail "modprobe hv_storvsc"
    await /dev/sda
    touch /tmp/disk-is-back; wait; rm /tmp/disk-is-back
    mount -t ext4 /dev/sda /mnt || fail "mount after modprobe"
    [ "$(sha256sum </mnt/data)" = "$(cat /mnt/sum)" ] || fail "the data changed"
    umount /mnt
    sum=$(whole)
    (while ! [ -e /tmp/net-is-back ]; do
        [ "$(whole)" = "$sum" ] || { echo "FAILED the disk, without a network driver"; exit; }
    done; echo "guest: the disk went on") &
    rmmod hv_netvsc || fail "rmmod hv_netvsc"
    await /sys/class/net/eth0 gone
    modprobe hv_netvsc || fail "modprobe hv_netvsc"
    network_up
    touch /tmp/net-is-back; wait; rm /tmp/net-is-back
    echo "guest: round $round"
done
quiet_log
exit 0
"#;

#[test]
fn a_reboot_a_kexec_and_reloaded_drivers_find_the_same_disk_and_network() {
    let Some(scenes) = scenes() else { return };
    let with_write = |script: &str| script.replace("@WRITE@", WRITE);
    let scenes = scenes
        .guest(
            "reboot",
            80,
            &with_write(REBOOT),
            // The same device servers serve both boots.
            &format!(
                "{NEW_DISK}; : >/root/pids
                 (while ! pidof bulkhead-block >/dev/null; do sleep 1; done; sleep 2
                  while sleep 1; do pidof bulkhead-block bulkhead-net >>/root/pids || exit; done) &
                 scene reboot {QUIET} --memory 384M {DISK_AND_NET}
                 wait
                 [ \"$(tr ' ' '\\n' </root/pids | sort -u | wc -l)\" = 2 ] || {{ echo FAILED servers changed; cat /root/pids; }}"
            ),
            &["guest: rebooting", "guest: second boot", "bulkhead: exit 0"],
        )
        .guest(
            "kexec",
            80,
            &with_write(KEXEC),
            &format!("{NEW_DISK}; scene kexec {QUIET} --memory 512M {DISK_AND_NET}"),
            &["guest: kexec", "guest: second kernel", "bulkhead: exit 0"],
        )
        .guest(
            "drivers",
            80,
            &with_write(DRIVERS),
            &format!("{NEW_DISK}; scene drivers {QUIET} --vcpus 2 --memory 384M {DISK_AND_NET}"),
            &[
                "guest: the network went on",
                "guest: the disk went on",
                "guest: round 2",
                "guest: exit 0",
                "bulkhead: exit 0",
            ],
        );
    run(scenes);
}

#[test]
fn a_panic_of_the_guest_is_told_with_its_parameters_and_its_log() {
    let Some(scenes) = scenes() else { return };
    // Through the log buffer of the panic, and the exit status that scripts see. The reset that follows ends the VM.
    let scenes = scenes.guest(
        "panic",
        40,
        "echo c >/proc/sysrq-trigger",
        &format!("scene panic {QUIET} --on-reset exit --memory 256M"),
        &[
            "bulkhead: the guest's kernel crashed: 0x",
            "| ",
            "sysrq: Trigger a crash",
            "the VM ended after its kernel had crashed",
            "bulkhead: exit 3",
        ],
    );
    run(scenes);
}
