# What the demo's guest does. @NAME@ words are filled in by the host.
say() { echo "demo: $*"; }
fail() { echo "demo: FAILED $*"; sync; exit 1; }

say "kernel $(uname -r), $(nproc) CPU(s), $(dmesg | sed -n 's/.*hv_vmbus: //p' | head -1)"

disk=
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -b /dev/sda ] && { disk=/dev/sda; break; }
    usleep 250000
done
[ -n "$disk" ] || fail "no disk appeared"
driver=$(basename "$(readlink -f /sys/block/sda/device/../../../driver)")
say "disk $disk of $(( $(cat /sys/block/sda/size) / 2048 )) MiB, served by $(cat /sys/block/sda/device/vendor /sys/block/sda/device/model | tr -s ' \n' ' '), driver $driver"
mkfs.ext4 -q -F $disk >/dev/null 2>&1 || fail "mkfs.ext4"
mount -t ext4 $disk /mnt || fail "mount"
dd if=/dev/urandom of=/mnt/data bs=65536 count=@BLOCKS@ 2>/dev/null || fail "write"
before=$(sha256sum </mnt/data)
umount /mnt || fail "umount"
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 $disk /mnt || fail "second mount"
after=$(sha256sum </mnt/data)
[ "$before" = "$after" ] || fail "data read back differs: $before, $after"
umount /mnt || fail "second umount"
say "disk ok: formatted, wrote $(( @BLOCKS@ / 16 )) MiB, read it back after remounting, sha256 ${after%% *}"

link=
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -e /sys/class/net/eth0 ] && { link=eth0; break; }
    usleep 250000
done
[ -n "$link" ] || fail "no network card appeared"
ip link set $link up
@ADDRESS@
say "network card $link $(cat /sys/class/net/$link/address), driver $(basename "$(readlink /sys/class/net/$link/device/driver)")"
for try in 1 2 3 4 5 6 7 8 9 10; do
    page=$(timeout 10 wget -q -O - @URL@) && break
    usleep 500000
done
[ -n "$page" ] || fail "no page from the host"
say "network ok: the host's page says $page"
say "errors in the kernel's log: $(dmesg -r | sed -n 's/^<[0-3]>.*\(hv_\|storvsc\|netvsc\|I\/O error\).*/&/p' | wc -l)"
say "ready"
@END@
