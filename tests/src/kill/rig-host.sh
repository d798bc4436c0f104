# What happens around the guest: the other ends of its streams, and the plan, a line for each act. An act waits until the
# successor is there, and then the time that the plan says.
rm -f /root/disk.raw; truncate -s 256M /root/disk.raw
dd if=/dev/urandom of=/root/chunk bs=65536 count=1 2>/dev/null
mkfifo /root/copy /root/silence
stream() { n=0; until [ -e /root/www/done ]; do n=$((n + 1)); echo "block $n"; cat /root/chunk; done; }
(nc -l -p 5001 <>/root/silence | sha256sum >/root/sum && mv /root/sum /root/www/received.sum) & helpers=$!
(sha256sum </root/copy >/root/sum2 && mv /root/sum2 /root/www/sent.sum) & helpers="$helpers $!"
(stream | tee /root/copy | nc -l -p 5002 >/dev/null) & helpers="$helpers $!"
replace() {
    old=$(pidof $2) || { echo "FAILED lost: there is no $2"; return; }
    case $1 in
    kill) kill -9 $old ;;
    # Refused as long as a server that was killed has no successor.
    swap) for try in $(seq 100); do
            bulkhead device swap deaths $3 && break
            [ $try = 100 ] && { echo "FAILED lost: no swap of $3"; return; }
            old=$(pidof $2)
            usleep 50000
        done ;;
    esac
    for try in $(seq 1000); do
        new=$(pidof $2) && [ -n "$new" ] && [ "$new" != "$old" ] && { echo "rig: replaced $2 $old by $new"; return; }
        usleep 20000
    done
    echo "FAILED lost: no successor of $2 $old"
}
cat >/root/plan <<'PLAN'
@PLAN@
PLAN
(
    nc -l -p 5003 </dev/null >/dev/null
    echo "rig: the guest is at work"
    while read -r act program device pause; do
        replace $act $program $device </dev/null
        usleep $pause
    done </root/plan
    bulkhead events deaths --json | sed -n 's/.*"event":"\(serving\|swap\)".*"stall_us":\([0-9]*\).*/rig: stall \2 \1/p'
    : >/root/www/done
) & helpers="$helpers $!"
MORE=/opt/guest/more.cpio
scene deaths --cmdline 'console=ttyS0 quiet panic=-1' --vcpus 2 --memory 640M --restart always --on-reset exit \
    --disk path=/root/disk.raw --net tap=t0
# Those are still there if the guest failed.
kill $helpers 2>/dev/null || true
e2fsck -fn /root/disk.raw || echo "FAILED wrong: e2fsck"
