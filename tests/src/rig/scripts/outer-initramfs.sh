#!/bin/busybox sh
# First program of the outer machine: finds its root disk and goes there. A real root (not the initramfs) is needed
# because pivot_root(2), which the sandboxes use, refuses to leave an initramfs.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
while read -r module; do
    $bb insmod "/modules/$module" || echo "rig: cannot load $module"
done </modules/order
$bb mount -t ext4 -o noatime /dev/vda /root || { echo "rig: cannot mount the root disk"; $bb poweroff -f; }
$bb mount --move /dev /root/dev
exec $bb switch_root /root /usr/sbin/rig-init
