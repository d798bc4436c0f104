//! A device server that the kernel kills for want of memory, in a control group of the second version.

use super::{QUIET, WELL, run, scenes};

/// Past the page cache and from a buffer that is there already, so that it is the server that needs memory, not the guest.
const SCRIPT: &str = r#"
network_up
await /dev/sda
dd if=/dev/urandom of=/tmp/data bs=65536 count=256 2>/dev/null
for part in 0 1; do
    echo "guest: part $part"
    until wget -q -O /dev/null http://192.168.215.1:8080/go$part 2>/dev/null; do usleep 200000; done
    dd if=/tmp/data of=/dev/sda bs=65536 seek=$((part * 256)) oflag=direct 2>/tmp/dd || fail "write: $(cat /tmp/dd)"
done
for part in 0 1; do
    dd if=/dev/sda of=/tmp/back bs=65536 skip=$((part * 256)) count=256 iflag=direct 2>/tmp/dd || fail "read: $(cat /tmp/dd)"
    cmp /tmp/data /tmp/back || fail "the data are not what was written"
done
quiet_log
echo "guest: all is there"
exit 0
"#;

#[test]
fn a_guest_does_not_notice_that_its_disks_server_is_killed_for_want_of_memory_and_the_operator_is_told() {
    let Some(scenes) = scenes() else { return };
    // The whole VM is in a group, as under a service manager. The disk is in memory, and whoever writes to it is charged.
    let around = format!(
        r#"
        cgroup=/sys/fs/cgroup
        echo +memory >$cgroup/cgroup.subtree_control
        mkdir $cgroup/vm $cgroup/server
        cat >/root/starve <<'X'
set -eu
cgroup=/sys/fs/cgroup
killed() {{ grep -q '^oom_kill 1$' $cgroup/$1/memory.events; }}
until grep -q '^guest: part 0' /root/said; do sleep 0.2; done
supervisor=$(bulkhead inspect memory | sed -n 's/^supervisor.process[ =:]*//p')
victim=$(pidof bulkhead-block)
# The server alone is in a group.
echo 1M >$cgroup/server/memory.max
echo $victim >$cgroup/server/cgroup.procs
touch /root/www/go0
until killed server; do sleep 0.1; done
until grep -q '^guest: part 1' /root/said; do sleep 0.2; done
# The whole VM is in one: of it the server is the one to be killed, and its successor finds memory again. What the
# supervisor is told by others meanwhile is not the cause.
echo 1000 >/proc/$(pidof bulkhead-block)/oom_score_adj
sync; echo 3 >/proc/sys/vm/drop_caches
echo $(($(cat $cgroup/vm/memory.current) + (4 << 20))) >$cgroup/vm/memory.max
kill -STOP $supervisor
touch /root/www/go1
until killed vm; do sleep 0.1; done
echo max >$cgroup/vm/memory.max
kill -CONT $supervisor
X
        : >/root/said
        sh /root/starve & starving=$!
        (echo 0 >$cgroup/vm/cgroup.procs; scene memory {QUIET} --memory 256M --disk memory=32M --net tap=t0)
        wait $starving || echo FAILED nobody was starved
        bulkhead events memory
        for report in 1 2; do bulkhead crashes memory $report | sed -n '1s/^[^ ]* /report: /p'; done
        rmdir $cgroup/vm $cgroup/server"#
    );
    let mut says = WELL.to_vec();
    says.extend([
        "guest: all is there",
        "bulkhead: disk0 was killed by SIGKILL; the OOM killer of the host was at work at that time (oom_kill went from 0 to 1 in ",
        "report: disk0 (server 1) killed by SIGKILL; the OOM killer of the host was at work at that time (oom_kill went from 0 to 1 in ",
        "bulkhead: disk0 was killed by SIGKILL; the OOM killer of the kernel was at work in this VM's control group at that time \
         (oom_kill went from 0 to 1 in ",
        "report: disk0 (server 2) killed by SIGKILL; the OOM killer of the kernel was at work in this VM's control group at that time \
         (oom_kill went from 0 to 1 in ",
    ]);
    run(scenes.guest("memory", 60, SCRIPT, &around, &says));
}
