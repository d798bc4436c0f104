//! Debian's kernel, unmodified, under bulkhead in the rig.
//!
//! Every test boots the rig, runs `bulkhead run` in it, and reads what the guest said on its console. The guest fails
//! loudly: a line with FAILED, or no `guest: exit 0`, fails the test with the whole console.

#![forbid(unsafe_code)]

use bulkhead_tests::rig::{RigOutcome, RigSpec};
use bulkhead_tests::tier;
use std::time::Duration;

/// What every guest script begins with.
const GUEST: &str = r#"
fail() { echo "FAILED $*"; dmesg | tail -30; sync; exit 1; }
# Waits for a path to be there (or, with "gone", not to be there).
await() {
    for try in $(seq 100); do
        if [ "$2" = gone ]; then [ -e "$1" ] || return 0; else [ -e "$1" ] && return 0; fi
        usleep 100000
    done
    fail "$1 ${2:-did not appear}"
}
network_up() {
    await /sys/class/net/eth0
    ip link set eth0 up && ip addr add 192.168.215.2/24 dev eth0 || fail "eth0"
    for try in $(seq 50); do timeout 5 wget -q -O /dev/null http://192.168.215.1:8080/hello && return 0; usleep 200000; done
    fail "the host does not answer"
}
# Nothing of ours may have gone wrong unseen. One warning is the emulated processor's (its XSAVE leaves do not add up):
# QEMU's own guest in the rig prints it, too, so that this one block is left out.
quiet_log() {
    dmesg | awk '/cut here/ { block = ""; inside = 1 }
        inside { block = block "\n" $0 }
        /end trace/ && inside { if (block !~ /fpu__init_system_xstate/) print block; inside = 0; next }
        !inside' >/tmp/log
    grep -iE 'i/o error|incorrect transaction|invalid transaction|call trace|warning:|hv_.*(fail|error|timed out)|hung|blocked for' /tmp/log && fail "the kernel's log complains"
    return 0
}
"#;

/// What the rig does around the guest: a TAP device, a web server, a disk, and the guest itself.
const AROUND: &str = r#"
mkdir -p /root/www && echo hello >/root/www/hello
ln -s /opt/guest/vmlinuz /opt/guest/initrd.cpio /root/www/
/usr/bin/ip tuntap add dev t0 mode tap vnet_hdr
/usr/bin/ip addr add 192.168.215.1/24 dev t0
/usr/bin/ip link set t0 up
busybox httpd -h /root/www -p 8080
truncate -s 256M /root/disk.raw
guest-initrd /root/guest.sh /root/initrd.cpio
cp /root/initrd.cpio /root/www/again.cpio
"#;

fn guest(script: &str, bulkhead_flags: &str, before: &str, after: &str) -> Option<RigOutcome> {
    let rig = tier::rig()?;
    let programs = tier::programs()?;
    let run = format!(
        "{AROUND}\n{before}\nbulkhead run --name test --kernel /opt/guest/vmlinuz --initrd /root/initrd.cpio \
         --cmdline 'console=ttyS0 quiet panic=-1' --disk path=/root/disk.raw --net tap=t0 {bulkhead_flags} </dev/null\n\
         echo \"bulkhead: exit $?\"\n{after}"
    );
    let mut spec = RigSpec::script(&run).file("/root/guest.sh", format!("{GUEST}\n{script}").as_str());
    spec.binaries = Some(programs);
    spec.timeout = Duration::from_secs(150);
    let outcome = tier::run(&rig, &spec);
    assert!(
        outcome.status == 0
            && outcome.output.contains("guest: exit 0")
            && outcome.output.contains("bulkhead: exit 0")
            && !outcome.output.contains("FAILED"),
        "status {}:\n{}",
        outcome.status,
        outcome.output
    );
    Some(outcome)
}

const FILES_AND_TCP: &str = r#"
[ "$(nproc)" = "$CPUS" ] || fail "$(nproc) processors instead of $CPUS"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
# One writer for each processor, so that sub-channels are used where there are any.
for n in $(seq "$CPUS"); do dd if=/dev/urandom of=/mnt/data$n bs=65536 count=96 2>/dev/null & done; wait
sum=$(cat /mnt/data* | sha256sum)
umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/sda /mnt || fail "mounting again"
[ "$(cat /mnt/data* | sha256sum)" = "$sum" ] || fail "the data are not what was written"
echo "guest: channels of the disk $(ls /sys/bus/vmbus/drivers/hv_storvsc/*/channels | wc -l)"
echo "guest: files ok"
# busybox's nc ends as soon as the other side has no more to say: each side's input stays open until it has what it wants.
nc 192.168.215.1 5001 </mnt/data1 || fail "sending"
mkfifo /tmp/silence
for try in $(seq 50); do nc 192.168.215.1 5002 <>/tmp/silence >/tmp/back && break; usleep 200000; done
cmp /tmp/back /mnt/data1 || fail "what came back is not what was sent"
umount /mnt
quiet_log
exit 0
"#;

fn files_and_tcp(cpu_count: u32) {
    let script = format!("CPUS={cpu_count}\n{FILES_AND_TCP}");
    // The same bytes go to the rig and come back.
    let echo = "mkfifo /root/silence; (nc -l -p 5001 <>/root/silence >/root/sent; nc -l -p 5002 </root/sent >/dev/null) &";
    let flags = format!("--vcpus {cpu_count} --memory 384M");
    guest(&script, &flags, echo, "e2fsck -fn /root/disk.raw");
}

#[test]
fn a_guest_with_one_processor_keeps_its_files_and_talks_tcp_both_ways() {
    files_and_tcp(1);
}

#[test]
fn a_guest_with_two_processors_keeps_its_files_and_talks_tcp_both_ways() {
    files_and_tcp(2);
}

#[test]
fn a_guest_with_four_processors_keeps_its_files_and_talks_tcp_both_ways() {
    files_and_tcp(4);
}

#[test]
fn a_reboot_is_served_by_the_same_device_servers() {
    let script = r#"
network_up
await /dev/sda
if mount -t ext4 /dev/sda /mnt 2>/dev/null; then
    [ "$(sha256sum </mnt/data)" = "$(cat /mnt/sum)" ] || fail "the data did not survive the reboot"
    umount /mnt
    quiet_log
    echo "guest: second boot"
    exit 0
fi
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
dd if=/dev/urandom of=/mnt/data bs=65536 count=64 2>/dev/null
sha256sum </mnt/data >/mnt/sum
umount /mnt
echo "guest: rebooting"
reboot -f
"#;
    let servers =
        "(sleep 4; while sleep 1; do pidof bulkhead-block bulkhead-net >>/root/pids || exit; done) &";
    let after =
        "[ \"$(sort -u /root/pids | wc -l)\" = 1 ] || { echo \"FAILED servers changed\"; cat /root/pids; }";
    if let Some(outcome) = guest(script, "--memory 384M", servers, after) {
        assert!(outcome.output.contains("guest: rebooting"), "{}", outcome.output);
        assert!(
            outcome.output.contains("guest: second boot"),
            "{}",
            outcome.output
        );
    }
}

#[test]
fn a_kernel_started_by_kexec_finds_its_disk_and_network() {
    let script = r#"
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
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
dd if=/dev/urandom of=/mnt/data bs=65536 count=64 2>/dev/null
sha256sum </mnt/data >/mnt/sum
umount /mnt
wget -q -O /tmp/vmlinuz http://192.168.215.1:8080/vmlinuz || fail "kernel"
wget -q -O /tmp/initrd http://192.168.215.1:8080/again.cpio || fail "initrd"
kexec -l /tmp/vmlinuz --initrd=/tmp/initrd --command-line="$(cat /proc/cmdline) stage=2" || fail "kexec -l"
echo "guest: kexec"
kexec -e
"#;
    if let Some(outcome) = guest(script, "--memory 512M", "", "") {
        assert!(
            outcome.output.contains("guest: second kernel"),
            "{}",
            outcome.output
        );
    }
}

#[test]
fn drivers_can_be_removed_and_loaded_again() {
    let script = r#"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
dd if=/dev/urandom of=/mnt/data bs=65536 count=64 2>/dev/null
sum=$(sha256sum </mnt/data)
umount /mnt
for round in 1 2; do
    rmmod hv_storvsc || fail "rmmod hv_storvsc"
    await /dev/sda gone
    modprobe hv_storvsc || fail "modprobe hv_storvsc"
    for try in $(seq 100); do ls /dev/sd? >/dev/null 2>&1 && break; usleep 100000; done
    mount -t ext4 /dev/sd? /mnt || fail "mount after modprobe"
    [ "$(sha256sum </mnt/data)" = "$sum" ] || fail "the data changed"
    umount /mnt
    rmmod hv_netvsc || fail "rmmod hv_netvsc"
    await /sys/class/net/eth0 gone
    modprobe hv_netvsc || fail "modprobe hv_netvsc"
    network_up
    echo "guest: round $round"
done
quiet_log
exit 0
"#;
    if let Some(outcome) = guest(script, "--vcpus 2 --memory 384M", "", "") {
        assert!(outcome.output.contains("guest: round 2"), "{}", outcome.output);
    }
}
