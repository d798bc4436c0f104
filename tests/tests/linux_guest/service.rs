//! A VM as a service: the unit that `bulkhead adopt --help` shows, under Debian's systemd.
//!
//! systemd is process 1 of a PID namespace in the rig, with a control group of its own. It starts one unit, in which the
//! script of this test runs as an operator would; the end of that unit ends systemd, whose own status says nothing, because
//! the program that it would shut down with is left out.

use super::{NEW_DISK, run, scenes};

const SCRIPT: &str = r#"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
ask() { wget -q -O - http://192.168.215.1:8081/$1 2>/dev/null; }
round=0
while :; do
    round=$((round + 1))
    dd if=/dev/urandom of=/mnt/data bs=65536 count=16 2>/dev/null; sum=$(sha256sum </mnt/data)
    sync; echo 3 >/proc/sys/vm/drop_caches
    [ "$(sha256sum </mnt/data)" = "$sum" ] && [ "$(ask hello)" = hello ] && (quiet_log) >/dev/null || { ask broken; fail "round $round"; }
    ask round
done
"#;

#[test]
fn a_vm_whose_supervisor_is_killed_gets_another_one_from_systemd_and_ends_when_the_service_is_stopped() {
    let Some(scenes) = scenes() else { return };
    let around = format!(
        r#"{NEW_DISK}
        guest-initrd /root/service.sh /root/initrd.cpio
        mkdir -p /etc/bulkhead /etc/systemd/system
        echo 0123456789abcdef0123456789abcdef >/etc/machine-id
        cat >/etc/bulkhead/web.toml <<'X'
kernel = "/opt/guest/vmlinuz"
initrd = "/root/initrd.cpio"
cmdline = "console=ttyS0 quiet panic=-1"
memory = "256M"
[[disk]]
path = "/root/disk.raw"
[[net]]
tap = "t0"
X
        bulkhead adopt --help | sed -n '/\[Service\]/,/^ *SuccessExitStatus/s/^ *//p' | tee /etc/systemd/system/web.service
        cat >/etc/systemd/system/operator.service <<'X'
[Unit]
Wants=systemd-journald.service
After=systemd-journald.service
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/sh /root/operator
StandardOutput=append:/root/operated
StandardError=inherit
X
        cat >/root/operator <<'X'
set -eu
wrong() {{ echo "FAILED $*"; journalctl --no-pager -o cat; exit 1; }}
seconds() {{ cut -d. -f1 /proc/uptime; }}
soon() {{ end=$(($(seconds) + 50)); until "$@"; do [ $(seconds) -lt $end ] || wrong "$*"; sleep 0.2; done; }}
count() {{ grep -c "url:/$1\$" /root/asked || true; }}
has_worked() {{ [ $(count round) -ge $1 ]; }}
works() {{ soon has_worked $(($(count round) + 2)); [ $(count broken) = 0 ] || wrong "the guest complains"; }}
of() {{ systemctl show -P $1 web; }}
is_adopted() {{ bulkhead events web | grep -q "supervisor $(of MainPID) took the VM over"; }}
systemctl start web; works
first=$(of MainPID); vcpu=$(pidof bulkhead-vcpu)
kill -9 $first
soon is_adopted; works
[ "$(pidof bulkhead-vcpu)" = $vcpu ] || wrong "this is another VM"
systemctl status web --no-pager
echo "service: after the supervisor's death $(of ActiveState), started again $(of NRestarts) times"
# Somebody in the unit is killed for want of memory.
main=$(of MainPID); group=/sys/fs/cgroup$(of ControlGroup)
systemctl set-property --runtime web MemoryMax=$(($(cat $group/memory.current) + (8 << 20)))
sh -c "echo 0 >$group/cgroup.procs; echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero" || echo "service: the hog's status $?"
systemctl set-property --runtime web MemoryMax=infinity
has_seen_oom() {{ journalctl -u web | grep -q 'killed by the OOM killer'; }}
soon has_seen_oom; works
[ $(of MainPID) = $main ] || wrong "the supervisor is another one"
echo "service: after an OOM kill $(of ActiveState)"
# systemd forgets a unit that has ended in order.
echo 'ExecStopPost=/bin/sh -c "echo service: ended as $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS >>/root/operated"' >>/etc/systemd/system/web.service
systemctl daemon-reload
systemctl stop web
echo "service: then $(of ActiveState)"
X
        echo hello >/root/www/hello; : >/root/operated
        busybox httpd -f -vv -h /root/www -p 8081 >/root/asked 2>&1 & asked=$!
        echo +memory >/sys/fs/cgroup/cgroup.subtree_control
        mkdir /sys/fs/cgroup/services
        # Only systemd itself may be in the group: a group with processes hands no controllers down.
        unshare -m -p -f --mount-proc sh -c 'echo 0 >/sys/fs/cgroup/services/cgroup.procs
            container=rig exec /usr/lib/systemd/systemd --unit=operator.service' || true
        kill $asked
        cat /root/operated
        ! grep -q 'triple fault' /root/operated || exit 75
        [ -z "$(pidof bulkhead bulkhead-vcpu bulkhead-bus bulkhead-block bulkhead-net)" ] || echo FAILED processes are left
        e2fsck -fp /root/disk.raw; e2fsck -fn /root/disk.raw || echo FAILED e2fsck"#
    );
    let says = [
        "KillMode=process",
        "service: after the supervisor's death active, started again 1 times",
        "service: the hog's status 137",
        "service: after an OOM kill active",
        "service: ended as success exited 143",
        "service: then inactive",
    ];
    run(scenes.guest("service", 90, SCRIPT, &around, &says));
}
