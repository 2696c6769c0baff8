#!/bin/bash
# PID 1 of a node: NAME PLACE ADDRESS [ROOT]. The login node gets ROOT, the folder with Slurm's files.
# It is root, or a plain user with all capabilities of a user namespace.
set -eu
name=$1 place=$2 address=$3
mount --make-rprivate /
hostname "$name"
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t sysfs sysfs /sys # with the network devices of this node
ip=/usr/sbin/ip
if [ "$name" = login ]; then
    # a root with all that the machine's own has, and /ibex, for which that one would have to be changed
    root=$place/root
    mkdir "$root"
    mount -t tmpfs -o mode=755 tmpfs "$root"
    mount --make-unbindable "$root" # it lies below an entry of / itself
    for entry in /*; do
        if [ -L "$entry" ]; then
            cp -P "$entry" "$root"
        elif [ -d "$entry" ]; then
            mkdir "$root$entry"
            mount --rbind "$entry" "$root$entry"
        fi
    done
    mkdir -p "$root/ibex"
    mount --bind "$place/ibex" "$root/ibex"
    cd "$root"
    pivot_root . .
    umount -l .
    # what the packages have appears as if they were installed, here and on the nodes alone
    cd "$4"
    mount -t overlay -o lowerdir=usr:/usr overlay /usr
    cd "$place"
    mount -t overlay -o lowerdir=etc:/etc overlay /etc
    $ip link set lo up
    $ip link add bridge type bridge
    $ip addr add "$address/24" dev bridge
    $ip link set bridge up
else
    until $ip link show ib0 >/dev/null 2>&1; do sleep 0.01; done
    $ip link set lo up
    $ip addr add "$address/24" dev ib0
    $ip link set ib0 up
    $ip route add default via "${address%.*}.1"
fi
if [ "$name" = storage ]; then
    glusterfsd --no-daemon --volfile="$place/server.vol" --log-file="$place/log/glusterfsd.log"
    exit
fi
if [ -e "$place/client.vol" ]; then bash "${0%/*}/mount.sh" "$place"; fi
# shellcheck source=/dev/null
. "$(dirname "$0")/daemons.sh" "$name" "$place" /run
