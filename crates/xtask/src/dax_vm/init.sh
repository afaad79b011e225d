#!/bin/busybox sh
# The first program of the virtual machine. It loads the modules, runs the scenarios in /etc/dax-vm/scenarios (which
# call those of `functions.sh`) and powers the machine off. It talks on the second serial port: the lines of the test
# program (`ok NAME`, `FAILED NAME: why`, `SKIPPED NAME: why`), its own in the same form, and lines that start with
# `::` for the bench.

export PATH=/sbin:/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /mnt/main
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t devpts devpts /dev/pts
ip link set lo up

. /etc/dax-vm/functions

[ -e /etc/dax-vm/scenarios ] || poweroff -f
for module in /lib/modules/*.ko; do
    insmod "$module" || echo "::trouble cannot load $module"
done

if [ -e /etc/dax-vm/shell ]; then
    fsdax main && devdax dev 2097152
    echo "/dev/main can hold a file system, /dev/dev can be mapped; exit ends the machine."
    # With the functions at hand.
    ENV=/etc/dax-vm/functions setsid cttyhack sh
    poweroff -f
fi

exec </dev/null >/dev/ttyS1 2>&1
stty -onlcr </dev/ttyS1
. /etc/dax-vm/scenarios
echo "::done"
# The port has to have sent all before the machine goes.
sleep 0.2
poweroff -f
