//! A supervisor that is killed while a Linux guest works, and another one that takes its place.

use super::{DISK_AND_NET, NEW_DISK, QUIET, run, scenes};

const SCRIPT: &str = r#"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
echo "guest: at work"
# Until the host says that it has done its worst.
round=0
until wget -q -O /dev/null http://192.168.215.1:8080/over; do
    round=$((round + 1))
    dd if=/dev/urandom of=/mnt/data bs=65536 count=16 2>/dev/null; sum=$(sha256sum </mnt/data)
    sync; echo 3 >/proc/sys/vm/drop_caches
    [ "$(sha256sum </mnt/data)" = "$sum" ] || fail "the data are not what was written"
    [ "$(wget -q -O - http://192.168.215.1:8080/hello)" = hello ] || fail "the host does not answer"
done
umount /mnt
quiet_log
echo "guest: worked on for $round rounds"
exit 0
"#;

#[test]
fn a_guest_does_not_notice_that_its_supervisor_is_killed_and_another_one_replaces_its_servers() {
    let Some(scenes) = scenes() else { return };
    // The guest's console goes on where it was; the end is the adopter's to tell.
    let around = format!(
        r#"{NEW_DISK}
        cat >/root/adopt <<'X'
        until grep -q '^guest: at work' /root/said; do sleep 0.2; done
        supervisor=$(bulkhead inspect adopted | sed -n 's/^supervisor.process[ =:]*//p')
        kill -9 $supervisor
        bulkhead adopt adopted 2>&1 & adopter=$!
        until bulkhead events adopted | grep -q "took the VM over"; do sleep 0.2; done
        for round in 1 2 3; do
            for name in bulkhead-block bulkhead-net; do
                killed=$(pidof $name); kill -9 $killed
                until new=$(pidof $name) && [ "$new" != "$killed" ]; do sleep 0.1; done
            done
        done
        bulkhead device swap adopted disk0 && bulkhead device swap adopted net0 && echo "rig: replaced"
        touch /root/www/over
        status=0; wait $adopter || status=$?
        echo "rig: adopter's exit $status"
X
        : >/root/said
        sh /root/adopt >/root/adopted 2>&1 & adopting=$!
        scene adopted {QUIET} --memory 384M {DISK_AND_NET}
        wait $adopting; cat /root/adopted
        [ -z "$(pidof bulkhead bulkhead-vcpu bulkhead-bus bulkhead-block bulkhead-net)" ] || echo FAILED processes are left
        e2fsck -fn /root/disk.raw || echo FAILED e2fsck"#
    );
    let says = [
        "guest: worked on for",
        "guest: exit 0",
        "is the supervisor of adopted now",
        "rig: replaced",
        "rig: adopter's exit 0",
    ];
    run(scenes.guest("adopted", 90, SCRIPT, &around, &says));
}
