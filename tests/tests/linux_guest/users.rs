//! `bulkhead run` by a user with no rights but to open `/dev/kvm`.

use super::{QUIET, WELL, run, scenes};

const SCRIPT: &str = r#"
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
echo kept >/mnt/file && umount /mnt || fail "a file"
await /sys/class/net/eth0
ip link set eth0 up
cat >/tmp/dhcp <<'X'
[ "$1" = bound ] && { ip addr add $ip/$mask dev $interface; ip route add default via $router; echo $router >/tmp/gateway; }
X
chmod +x /tmp/dhcp
udhcpc -q -n -i eth0 -s /tmp/dhcp >/dev/null 2>&1 || fail "no address by DHCP"
for try in $(seq 20); do page=$(timeout 5 wget -q -O - http://$(cat /tmp/gateway):8080/hello) && break; usleep 300000; done
[ "$page" = hello ] || fail "no page through passt"
# The host looks at the processes while they serve.
echo "guest: look now"
for try in $(seq 100); do timeout 5 wget -q -O /dev/null http://$(cat /tmp/gateway):8080/looked && break; usleep 300000; done
quiet_log
echo "guest: served without privileges"
exit 0
"#;

#[test]
fn a_user_who_may_open_kvm_runs_a_guest_in_a_full_sandbox() {
    let Some(scenes) = scenes() else { return };
    let around = format!(
        r#"
        chgrp kvm /dev/kvm; chmod 660 /dev/kvm
        mkdir -p /run/user/1000; chown user:user /run/user/1000
        truncate -s 64M /tmp/disk.raw; chown user:user /tmp/disk.raw
        chmod 755 /root
        guest-initrd /root/user.sh /tmp/initrd.cpio
        cat >/tmp/as-user <<'X'
set -eu
export XDG_RUNTIME_DIR=/run/user/1000 HOME=/tmp
echo "rig: uid $(id -u), groups $(id -G)"
status=0
bulkhead run --name user --kernel /opt/guest/vmlinuz --initrd /tmp/initrd.cpio {QUIET} --memory 256M \
    --disk path=/tmp/disk.raw --net user --require-full-sandbox </dev/null || status=$?
echo "bulkhead: exit $status"
X
        # While it runs: none of its processes may belong to root or have a capability.
        touch /tmp/said
        (until grep -q '^guest: look now' /tmp/said; do sleep 0.2; done
         for name in bulkhead bulkhead-vcpu bulkhead-bus bulkhead-block bulkhead-net; do
            for pid in $(pidof $name); do
                echo "rig: $name uid $(sed -n 's/^Uid:.\([0-9]*\).*/\1/p' /proc/$pid/status) caps $(sed -n 's/^CapEff:.//p' /proc/$pid/status) seccomp $(sed -n 's/^Seccomp:.//p' /proc/$pid/status)"
            done
         done >/tmp/seen
         touch /root/www/looked) & looking=$!
        su -s /bin/sh user -c 'sh /tmp/as-user' | tee /tmp/said
        kill $looking 2>/dev/null && echo FAILED nobody asked to look
        cat /tmp/seen
        grep -q 'uid 0 ' /tmp/seen && echo FAILED a process belongs to root
        [ "$(grep -c 'bulkhead-.* caps 0000000000000000 seccomp 2' /tmp/seen)" = 4 ] || echo FAILED a child is not locked in
        e2fsck -fn /tmp/disk.raw || echo FAILED e2fsck"#
    );
    let mut says = WELL.to_vec();
    says.extend(["rig: uid 1000", "guest: served without privileges"]);
    run(scenes.guest("user", 90, SCRIPT, &around, &says));
}
