# What the guest of the rig's benchmarks does; @NAME@ words are filled in by the host. Each phase says when it is done.
disk=
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    for name in sda vda; do [ -b /dev/$name ] && disk=/dev/$name; done
    [ -n "$disk" ] && [ -e /sys/class/net/eth0 ] && break
    usleep 200000
done
ip link set eth0 up
ip addr add @GUEST@/24 dev eth0
echo "bench: idle"
now() { read -r up rest </proc/uptime; echo "$up"; }
# The host names one phase after the other.
while read -r phase; do
    start=$(now)
    case $phase in
    disk-write) dd if=/dev/zero of=$disk bs=65536 count=@DISK_BLOCKS@ oflag=direct 2>/dev/null || echo "bench: FAILED write" ;;
    disk-read) dd if=$disk of=/dev/null bs=65536 count=@DISK_BLOCKS@ iflag=direct 2>/dev/null || echo "bench: FAILED read" ;;
    net-send) dd if=/dev/zero bs=65536 count=@NET_BLOCKS@ 2>/dev/null | nc @HOST@ @SINK@ || echo "bench: FAILED send" ;;
    net-receive) nc @HOST@ @SOURCE@ </dev/null | wc -c | grep -q '^@NET_BYTES@$' || echo "bench: FAILED receive" ;;
    end) break ;;
    esac
    echo "bench: $phase took $start $(now)"
done
exit 0
