#!/bin/sh
# First program of the inner guest: loads the drivers that find a device, runs what it was given, powers off.
echo "guest: init"
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /run /tmp /mnt
mount -t devpts pts /dev/pts
if [ -e /sys/bus/acpi/devices/VMBUS:00 ] && modprobe -a hv_vmbus hv_utils hv_storvsc sd_mod hv_netvsc; then
    echo "guest: drivers hyperv"
elif modprobe -a virtio_mmio virtio_pci virtio_blk virtio_net; then
    echo "guest: drivers virtio"
fi
modprobe ext4
ip link set lo up
command=
for word in $(cat /proc/cmdline); do
    case $word in bulkhead.cmd=*) command=${word#bulkhead.cmd=} ;; esac
done
cd /root
if [ -n "$command" ]; then
    sh -c "$command" </dev/console
elif [ -e /run-me ]; then
    sh /run-me </dev/console
else
    echo "guest: no command given, here is a shell; its end powers the guest off"
    setsid cttyhack sh
fi
echo "guest: exit $?"
poweroff -f
