# shellcheck shell=sh
# What the scenarios are made of. Read by `init.sh`, and by the shell of `--shell`.

nd=/sys/bus/nd
suite=/bin/farpage-dax-suite

# --- What the bench is told ------------------------------------------------------------------------------------------

# passed NAME; failed NAME WHY: a case of the scenario that is running.
passed() { echo "ok $1"; }
failed() { echo "FAILED $1: $(echo "${2:-it says nothing}" | tail -n 3 | tr '\n' ' ')"; }

# try NAME COMMAND...: a case that passes if the command succeeds.
try() {
    name=$1
    shift
    if said=$("$@" 2>&1 </dev/null); then
        passed "$name"
    else
        failed "$name" "$said"
        return 1
    fi
}

begin() {
    echo "::begin $1"
    echo "farpage: begin $1" >/dev/kmsg
}

end() {
    echo "farpage: end $1" >/dev/kmsg
    echo "::end $1"
}

# run_suite ARGUMENTS...: the test program, for at most $limit seconds; it leaves no process behind.
run_suite() {
    echo "::suite $1"
    timeout -s KILL "$limit" "$suite" "$@"
    status=$?
    killall -q -KILL farpage-dax-suite
    echo "::status $status"
}

# --- Persistent memory -----------------------------------------------------------------------------------------------
#
# Each piece of it has a name: the lines of /etc/dax-vm/memory, in the order of QEMU's slots. The kernel numbers its
# regions in an order of its own, so the region is looked up by the slot.

# until COMMAND...: waits until it succeeds, for ten seconds at most.
wait_until() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || return 1
        sleep 0.05
    done
}

# find_region MEMORY: sets $region to the number of its region.
find_region() {
    slot=$(grep -nx "$1" /etc/dax-vm/memory | cut -d : -f 1)
    for mapping in "$nd"/devices/region*/mapping0; do
        dimm=$(cut -d , -f 1 <"$mapping")
        if [ "$(cat "$nd/devices/$dimm/nfit/handle")" = "$(printf '0x%x' "$slot")" ]; then
            region=${mapping%/mapping0}
            region=${region##*region}
            return
        fi
    done
    return 1
}

claimed() { [ -n "$(cat "$nd/devices/namespace$region.0/holder" 2>/dev/null)" ]; }
bound() { [ -e "$nd/devices/namespace$region.0/driver" ] || claimed; }

# claim MEMORY KIND ALIGN DRIVER: changes the mode of the memory's namespace, which starts as raw memory. The image keeps
# the mode: after the next boot it is there already. Sets $region.
claim() {
    wait_until find_region "$1" || { echo "there is no region for $1"; return 1; }
    wait_until bound || { echo "namespace$region.0 does not appear"; return 1; }
    claimed && return
    seed=$(cat "$nd/devices/region$region/$2_seed") || return
    echo "namespace$region.0" >"$nd/drivers/nd_pmem/unbind" || return
    echo "$3" >"$nd/devices/$seed/align" || return
    echo pmem >"$nd/devices/$seed/mode" || return
    cat /proc/sys/kernel/random/uuid >"$nd/devices/$seed/uuid" || return
    echo "namespace$region.0" >"$nd/devices/$seed/namespace" || return
    echo "$seed" >"$nd/drivers/$4/bind"
}

# fsdax MEMORY: the block device /dev/main, say, can hold a file system with DAX.
fsdax() {
    claim "$1" pfn 2097152 nd_pmem && wait_until [ -b "/dev/pmem$region" ] && ln -sf "pmem$region" "/dev/$1"
}

# devdax MEMORY ALIGN: the device /dev/dev, say, can be mapped.
devdax() {
    claim "$1" dax "$2" dax_pmem && wait_until [ -c "/dev/dax$region.0" ] && ln -sf "dax$region.0" "/dev/$1"
}

# --- File systems ----------------------------------------------------------------------------------------------------

# make_fs FS MEMORY OPTIONS
make_fs() {
    force=-f
    [ "$1" = ext4 ] && force=-F
    # shellcheck disable=SC2086
    "mkfs.$1" -q $force $3 "/dev/$2"
}

# mount_fs FS MEMORY OPTIONS FOLDER
mount_fs() {
    mount -t "$1" -o "$3" "$(readlink -f "/dev/$2")" "$4"
}

# told_mounted FOLDER: tells the bench what is mounted there, with which options.
told_mounted() { echo "::mounted $(grep " $1 " /proc/mounts)"; }

# check_fs FS MEMORY: is the unmounted file system consistent?
check_fs() {
    if [ "$1" = ext4 ]; then
        e2fsck -fn "/dev/$2"
    else
        xfs_repair -n "/dev/$2"
    fi
}

mounted() { grep -q " /mnt/$1 " /proc/mounts; }

# unmounted NAME: nothing is mounted in /mnt/NAME any more. The test program may have left it unmounted.
unmounted() {
    ! mounted "$1" || umount "/mnt/$1"
}

# prepare FS MEMORY MKFS-OPTIONS MOUNT-OPTIONS FOLDER
prepare() {
    try "fsdax mode of $2" fsdax "$2" &&
        try "mkfs.$1 $3 on $2" make_fs "$1" "$2" "$3" &&
        try "mount $2 -t $1 -o $4" mount_fs "$1" "$2" "$4" "$5" &&
        told_mounted "$5"
}

# file_system FS MKFS-OPTIONS MOUNT-OPTIONS EXPECT: runs the suite on a file system in /mnt/main. EXPECT says what farpage
# is to make of its files: dax, page-cache or refused. Afterwards it can be unmounted and is consistent.
file_system() {
    if prepare "$1" main "$2" "$3" /mnt/main; then
        run_suite run --dir /mnt/main --expect "$4" --seconds "$seconds" ${only:+--only "$only"}
        [ "$4" = refused ] || over_remount "$1" "$3" "$4"
    fi
    try "unmount main" unmounted main && try "check main" check_fs "$1" main
}

# measure FS MKFS-OPTIONS: farpage's DAX files beside the bare calls, on a file system in /mnt/main.
measure() {
    prepare "$1" main "$2" dax=always /mnt/main || return
    if farpage bench dax --dir /mnt/main; then
        passed "farpage bench dax"
    else
        failed "farpage bench dax" "status $?"
    fi
    try "unmount main" unmounted main
}

# briefly COMMAND...: for what is tried on every machine as well.
briefly() { (seconds=1 && "$@"); }

# over_remount FS MOUNT-OPTIONS EXPECT: what is written before the main file system is unmounted is there afterwards.
over_remount() {
    mounted main || try "mount main -t $1 -o $2" mount_fs "$1" main "$2" /mnt/main || return
    run_suite run --dir /mnt/main --expect "$3" --phase write
    try "unmount main" umount /mnt/main && try "mount main -t $1 -o $2 again" mount_fs "$1" main "$2" /mnt/main &&
        run_suite run --dir /mnt/main --expect "$3" --phase check
}

# refuses_dax FS MKFS-OPTIONS: the kernel does not mount this file system with DAX.
refuses_dax() {
    try "fsdax mode of main" fsdax main || return
    try "mkfs.$1 $2 on main" make_fs "$1" main "$2" || return
    if mount_fs "$1" main dax=always /mnt/main 2>/dev/null; then
        failed "mount $1 $2 -o dax=always is refused" "it was mounted"
        umount /mnt/main
    else
        passed "mount $1 $2 -o dax=always is refused"
    fi
}

# device_dax MEMORY ALIGN
device_dax() {
    try "devdax mode of $1, align $2" devdax "$1" "$2" || return
    device=$(readlink "/dev/$1")
    found=$(cat "/sys/bus/dax/devices/$device/align")
    echo "::mounted /dev/$device size $(cat "/sys/bus/dax/devices/$device/size") align $found"
    try "align of $device" [ "$found" = "$2" ]
    run_suite devdax --device "/dev/$device" --seconds "$seconds"
}

# --- Power loss ------------------------------------------------------------------------------------------------------

# power_write FS ROUND: in the first round makes the file system in the memory power-FS. Writes in the background until
# the power goes; each `flushed …` line of the test program is told to the bench.
power_write() {
    folder=/mnt/$1
    mkdir -p "$folder"
    if [ "$2" = 0 ]; then
        prepare "$1" "power-$1" "$(power_options "$1")" dax=always "$folder" || return
    else
        try "mount power-$1 -t $1 -o dax=always" mount_fs "$1" "power-$1" dax=always "$folder" || return
    fi
    mkdir -p "$folder/$2" && sync
    "$suite" powerloss write --dir "$folder/$2" 2>&1 </dev/null | while read -r line; do echo "::power $1 $line"; done &
}

power_options() {
    if [ "$1" = xfs ]; then echo "-m reflink=0"; else echo "-b 4096"; fi
}

# power_check FS ROUND: everything is there that was told as flushed before the power went.
power_check() {
    folder=/mnt/$1
    mkdir -p "$folder"
    if try "fsdax mode of power-$1 is kept" fsdax "power-$1" &&
        try "mount power-$1 -t $1 -o dax=always after the power loss" mount_fs "$1" "power-$1" dax=always "$folder"
    then
        told_mounted "$folder"
        # shellcheck disable=SC2046
        run_suite powerloss check --dir "$folder/$2" --acked $(cat "/etc/dax-vm/flushed-$1")
    fi
    try "unmount power-$1" unmounted "$1" && try "check power-$1" check_fs "$1" "power-$1"
}
