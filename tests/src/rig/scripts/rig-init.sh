#!/bin/sh
# Second program of the outer machine: makes a usual Linux of it, runs the payload, leaves the results on the third disk.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
modprobe -a virtio_console kvm_amd tun dummy || echo "rig: a module is missing"
chmod 666 /dev/net/tun
ln -sf /proc/self/fd /dev/fd

hostname rig
ip link set lo up
# A uplink that leads nowhere: passt wants to see one, with an address and a default route.
ip link add uplink type dummy
ip address add 192.0.2.1/24 dev uplink
ip link set uplink up
ip route add default via 192.0.2.254

mkdir -p /out /.rig
cd / && cpio -idmu </dev/vdb >/dev/null 2>&1 || echo "rig: the archive of this run cannot be unpacked"
. /.rig/settings
[ "$RIG_SHMEM_THP" = 1 ] && echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled

# Hands the results back and ends the machine; the payload's end and the deadline may both get here, only one goes on.
finish() {
    mkdir /.rig/finishing 2>/dev/null || return
    echo "$1" >/.rig/status
    dmesg >/.rig/kernel.log
    (cd / && find .rig/status .rig/kernel.log out | cpio -o -H newc >/dev/vdc 2>/dev/null)
    sync
    poweroff -f
}

# What a person wants to know about a run that did not end.
describe_state() {
    ps -o pid,ppid,stat,vsz,args
    for task in /proc/[0-9]*/task/*; do
        echo "== $task $(tr '\0' ' ' <"${task%/task/*}/cmdline") [$(cat "$task/comm")]"
        cat "$task/wchan" "$task/stack" 2>/dev/null
    done
    cat /sys/kernel/debug/kvm/exits /proc/interrupts 2>/dev/null
}

cd /root
echo "rig: payload starts at $(cut -d' ' -f1 /proc/uptime)"
if [ "$RIG_INTERACTIVE" = 1 ]; then
    setsid -c sh /.rig/command </dev/hvc0 >/dev/hvc0 2>&1
    finish "exit $?"
else
    # Bytes are to arrive on the host as they were written. The tty forgets its modes when its last user closes it.
    exec 9<>/dev/hvc0
    stty -F /dev/hvc0 raw -echo
    setsid sh /.rig/command </dev/null >&9 2>&9 9>&- &
    payload=$!
    (
        sleep "$RIG_TIMEOUT_S"
        describe_state >/out/state.txt
        finish deadline
    ) &
    wait $payload
    finish "exit $?"
fi
# The other one is at it.
while :; do sleep 1000; done
