#!/bin/bash
# PID 1 of a node: NAME PLACE ADDRESS [ROOT]. The login node gets ROOT, the folder with Slurm's files.
# It is root, or a plain user with all capabilities of a user namespace. Slurm's daemons, and so the jobs, get none of them.
set -eu
name=$1 place=$2 address=$3
mount --make-rprivate /
hostname "$name"
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t sysfs sysfs /sys # with the network devices of this node
mkdir -p /run/munge
ip=/usr/sbin/ip
daemon="setpriv --inh-caps=-all --ambient-caps=-all"
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
$daemon munged --key-file="$place/munge.key" --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid \
    --log-file="$place/log/munged.$name.log" --seed-file=/run/munge/seed --force
if [ "$name" = login ]; then
    # the accounts: a MariaDB on a socket of its own, and slurmdbd before it
    sql=$place/sql
    mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$sql" --auth-root-authentication-method=normal \
        --skip-test-db >"$place/log/mariadb-install.log" 2>&1
    echo "CREATE DATABASE slurm_acct_db;" >"$place/accounts.sql"
    export MYSQL_UNIX_PORT=/run/mariadb.socket
    $daemon mariadbd --no-defaults --user="$(id -un)" --datadir="$sql" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --pid-file=/run/mariadb.pid \
        --init-file="$place/accounts.sql" >"$place/log/mariadb.log" 2>&1 &
    until [ -S "$MYSQL_UNIX_PORT" ]; do sleep 0.05; done
    $daemon slurmdbd -D >"$place/log/slurmdbd.out" 2>&1 &
    until sacctmgr -i add cluster test >"$place/log/sacctmgr.log" 2>&1; do sleep 0.05; done
    $daemon slurmctld -D -i >"$place/log/slurmctld.out" 2>&1 &
    touch "$place/log/login.up"
else
    $daemon slurmd -D -N "$name" >"$place/log/slurmd.$name.out" 2>&1 &
fi
set +e
while true; do wait -n; [ $? = 127 ] && sleep 1; done # reaps orphans, and outlives its daemons
