# What the guest does while its servers are killed: fio with verification on a file system, and a TCP stream each way, until
# the host says that it is over. No line may come into the kernel's log meanwhile, not even a harmless one of a driver.
network_up
await /dev/sda
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt || fail "file system"
verify() {
    fio --name=verify --directory=/mnt --size=4M --numjobs=2 --ioengine=libaio --iodepth=16 --direct=1 --rw=randrw \
        --bsrange=4k-32k --fsync=32 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio.log ||
        { cat /tmp/fio.log; fail "wrong: fio"; }
}
verify
dd if=/dev/urandom of=/tmp/chunk bs=65536 count=1 2>/dev/null
mkfifo /tmp/copy /tmp/silence
stream() { n=0; until [ -e /tmp/done ]; do n=$((n + 1)); echo "block $n"; cat /tmp/chunk; done; }
dmesg -c >/dev/null
# The host begins when it is called.
nc 192.168.215.1 5003 </dev/null >/dev/null || fail "calling the host"
sha256sum </tmp/copy >/tmp/sent.sum & hashing=$!
(stream | tee /tmp/copy | nc 192.168.215.1 5001 || echo "FAILED lost: the stream to the host broke") & sending=$!
(nc 192.168.215.1 5002 <>/tmp/silence | sha256sum >/tmp/received.sum) & receiving=$!
rounds=0
until wget -q -O /dev/null http://192.168.215.1:8080/done 2>/dev/null; do
    verify
    rounds=$((rounds + 1))
done
touch /tmp/done
wait $sending; wait $hashing; wait $receiving
echo "guest: $rounds rounds of fio, eth0 $(cat /sys/class/net/eth0/statistics/rx_bytes) bytes in, $(cat /sys/class/net/eth0/statistics/tx_bytes) out"
[ $rounds -gt 0 ] || fail "lost: fio did not come to its end"
for way in received sent; do
    for try in $(seq 50); do wget -q -O /tmp/host http://192.168.215.1:8080/$way.sum && [ -s /tmp/host ] && break; usleep 100000; done
    ours=sent; [ $way = sent ] && ours=received
    cmp /tmp/host /tmp/$ours.sum || fail "wrong: the host has $way something else: $(cat /tmp/host /tmp/$ours.sum)"
done
# One line is the emulator's when its host is busy: the guest's processor was not run for a while.
dmesg | grep -v 'hrtimer: interrupt took' >/tmp/log
grep -iE 'incorrect transaction|invalid transaction|completion' /tmp/log && fail "double: a completion that the driver does not know"
[ -s /tmp/log ] && { cat /tmp/log; fail "wrong: the kernel's log has new lines"; }
umount /mnt || fail "wrong: umount"
echo "guest: noticed nothing"
exit 0
