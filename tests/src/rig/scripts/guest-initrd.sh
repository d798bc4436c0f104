#!/bin/sh
# guest-initrd SCRIPT OUTPUT: the guest's initrd with SCRIPT as its /run-me.
set -e
[ $# = 2 ] || { echo "usage: guest-initrd SCRIPT OUTPUT" >&2; exit 2; }
folder=$(mktemp -d)
cp "$1" "$folder/run-me"
cat /opt/guest/initrd.cpio >"$2"
(cd "$folder" && echo run-me | cpio -o -H newc 2>/dev/null) >>"$2"
rm -r "$folder"
