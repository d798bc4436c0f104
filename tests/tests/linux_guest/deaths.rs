//! Device servers that are killed and replaced by the dozen while a Linux guest works: it must not notice.

use super::scene::Scenes;
use super::{DISK_AND_NET, NEW_DISK, QUIET, WELL};

/// Kills of each server.
const KILLS: u32 = 50;

/// fio with verification on a file system, and a TCP stream each way, until the host says that it is over. No line may
/// come into the kernel's log meanwhile, not even a harmless one.
const LOAD: &str = r#"
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
verify() {
    fio --name=verify --directory=/mnt --size=4M --numjobs=2 --ioengine=libaio --iodepth=16 --direct=1 --rw=randrw \
        --bsrange=4k-32k --fsync=32 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio.log || { cat /tmp/fio.log; fail fio; }
}
verify
dd if=/dev/urandom of=/tmp/chunk bs=65536 count=1 2>/dev/null
mkfifo /tmp/copy /tmp/silence
stream() { n=0; until [ -e /tmp/done ]; do n=$((n + 1)); echo "block $n"; cat /tmp/chunk; done; }
dmesg -c >/dev/null
# The host begins to kill when it is called.
nc 192.168.215.1 5003 </dev/null >/dev/null || fail "calling the host"
sha256sum </tmp/copy >/tmp/sent.sum & hashing=$!
(stream | tee /tmp/copy | nc 192.168.215.1 5001 || fail "the stream to the host broke") & sending=$!
(nc 192.168.215.1 5002 <>/tmp/silence | sha256sum >/tmp/received.sum || fail "the stream from the host broke") & receiving=$!
rounds=0
until wget -q -O /dev/null http://192.168.215.1:8080/done 2>/dev/null; do
    verify
    rounds=$((rounds + 1))
done
touch /tmp/done
wait $sending; wait $hashing; wait $receiving
echo "guest: $rounds rounds of fio"
[ $rounds -gt 1 ] || fail "fio did not run while servers were killed"
for way in received sent; do
    for try in $(seq 50); do wget -q -O /tmp/host http://192.168.215.1:8080/$way.sum && [ -s /tmp/host ] && break; usleep 100000; done
    ours=sent; [ $way = sent ] && ours=received
    cmp /tmp/host /tmp/$ours.sum || fail "the host has $way something else: $(cat /tmp/host /tmp/$ours.sum)"
done
[ -z "$(dmesg)" ] || fail "the kernel's log has new lines"
umount /mnt
echo "guest: noticed nothing"
exit 0
"#;

/// What happens around the guest: the other ends of its streams, and the kills. A kill waits until the successor is
/// there, and then some random time more.
const KILLING: &str = r#"
dd if=/dev/urandom of=/root/chunk bs=65536 count=1 2>/dev/null
mkfifo /root/copy /root/silence
stream() { n=0; until [ -e /root/www/done ]; do n=$((n + 1)); echo "block $n"; cat /root/chunk; done; }
(nc -l -p 5001 <>/root/silence | sha256sum >/root/sum && mv /root/sum /root/www/received.sum) & helpers=$!
(sha256sum </root/copy >/root/sum2 && mv /root/sum2 /root/www/sent.sum) & helpers="$helpers $!"
(stream | tee /root/copy | nc -l -p 5002 >/dev/null) & helpers="$helpers $!"
kill_one() {
    old=$(pidof $1) && kill -9 $old || { echo "FAILED there is no $1"; return; }
    for try in $(seq 500); do
        new=$(pidof $1) && [ "$new" != "$old" ] && { killed=$((killed + 1)); break; }
        usleep 20000
    done
    usleep $(($(od -An -N2 -tu2 /dev/urandom) * 4))
}
(
    nc -l -p 5003 </dev/null >/dev/null
    killed=0
    for n in $(seq @KILLS@); do kill_one bulkhead-block; kill_one bulkhead-net; done
    echo "rig: $killed servers replaced"
    : >/root/www/done
) & helpers="$helpers $!"
"#;

#[test]
fn a_guest_at_work_does_not_notice_fifty_deaths_of_each_server() {
    let Some(scenes) = Scenes::new() else { return };
    let killing = KILLING.replace("@KILLS@", &KILLS.to_string());
    let around = format!(
        "{NEW_DISK}
         {killing}
         MORE=/opt/guest/more.cpio
         scene deaths {QUIET} --vcpus 2 --memory 640M --restart always {DISK_AND_NET}
         # Those are still there if the guest failed.
         kill $helpers 2>/dev/null || true
         e2fsck -fn /root/disk.raw || echo FAILED e2fsck"
    );
    let replaced = format!("rig: {} servers replaced", 2 * KILLS);
    let mut says = vec![replaced.as_str(), "guest: noticed nothing"];
    says.extend(WELL);
    scenes.guest("deaths", 240, LOAD, &around, &says).run();
}
