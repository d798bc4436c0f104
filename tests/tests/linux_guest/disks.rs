//! Disks of other kinds: read-only, discarding, a block device, in memory.

use super::{QUIET, WELL, run, scenes};

/// The guest tells its disks apart by their serial numbers, whatever order they appear in.
const SCRIPT: &str = r#"
disk() {
    for try in $(seq 100); do
        for name in /sys/block/sd?; do
            tr -d '\0' <$name/device/vpd_pg80 2>/dev/null | grep -q "$1" && { echo /dev/${name##*/}; return; }
        done
        usleep 100000
    done
    echo /dev/none
}
fixed=$(disk fixed); trimmed=$(disk trimmed); device=$(disk device); memory=$(disk memory)
for name in $fixed $trimmed $device $memory; do [ -b $name ] || fail "disks: $fixed $trimmed $device $memory"; done

[ "$(blockdev --getro $fixed)" = 1 ] || fail "the read-only disk can be written"
[ "$(dd if=$fixed bs=4096 count=256 2>/dev/null | sha256sum | cut -c1-64)" = "$(cat /fixed.sum)" ] || fail "the read-only disk reads wrong"
dd if=/dev/zero of=$fixed bs=4096 count=1 oflag=direct 2>/dev/null && fail "a write to the read-only disk succeeded"
echo "guest: read-only ok"

mkfs.ext4 -q -F -E nodiscard $trimmed && mount -t ext4 $trimmed /mnt || fail "file system to be trimmed"
dd if=/dev/urandom of=/mnt/much bs=65536 count=512 2>/dev/null; dd if=/dev/urandom of=/mnt/few bs=65536 count=16 2>/dev/null
sync; sum=$(sha256sum </mnt/few)
rm /mnt/much; sync; fstrim -v /mnt || fail "fstrim"
echo 3 >/proc/sys/vm/drop_caches
[ "$(sha256sum </mnt/few)" = "$sum" ] || fail "trimming took a file that was in use"
umount /mnt
echo "guest: trimmed"

for name in $device $memory; do
    mkfs.ext4 -q -F $name && mount -t ext4 $name /mnt || fail "file system on $name"
    dd if=/dev/urandom of=/mnt/data bs=65536 count=64 2>/dev/null; sum=$(sha256sum </mnt/data)
    umount /mnt; echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 $name /mnt
    [ "$(sha256sum </mnt/data)" = "$sum" ] || fail "the data on $name are not what was written"
    umount /mnt
done
echo "guest: block device and memory ok"
quiet_log
exit 0
"#;

#[test]
fn read_only_trimmed_block_device_and_memory_disks_behave_as_such() {
    let Some(scenes) = scenes() else { return };
    let around = format!(
        r#"
        dd if=/dev/urandom of=/root/fixed.raw bs=65536 count=256 2>/dev/null
        truncate -s 128M /root/trimmed.raw
        truncate -s 64M /root/device.raw
        modprobe loop; losetup /dev/loop0 /root/device.raw
        sum=$(dd if=/root/fixed.raw bs=4096 count=256 2>/dev/null | sha256sum | cut -c1-64)
        # The guest knows what it is to find.
        {{ echo "echo $sum >/fixed.sum"; cat /root/disks.sh; }} >/root/disks2.sh; mv /root/disks2.sh /root/disks.sh
        scene disks {QUIET} --memory 320M \
            --disk path=/root/fixed.raw,readonly,serial=fixed --disk path=/root/trimmed.raw,serial=trimmed \
            --disk path=/dev/loop0,serial=device --disk memory=64M,serial=memory
        used=$(du -k /root/trimmed.raw | cut -f1)
        echo "rig: $used KiB of the trimmed disk are left"
        # 32 MiB were written and removed; the rest is the file system's own and 1 MiB.
        [ "$used" -lt 24000 ] || echo "FAILED the discarded blocks are still there"
        e2fsck -fn /root/trimmed.raw || echo FAILED e2fsck
        e2fsck -fn /dev/loop0 || echo FAILED e2fsck"#
    );
    let mut says = WELL.to_vec();
    says.extend([
        "guest: read-only ok",
        "guest: trimmed",
        "guest: block device and memory ok",
    ]);
    run(scenes.guest("disks", 120, SCRIPT, &around, &says));
}
