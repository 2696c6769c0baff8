#!/bin/bash
# PID 1 of a node: NAME PLACE ADDRESS [ROOT]. The login node gets ROOT, the folder with Slurm's files.
set -eu
name=$1 place=$2 address=$3
mount --make-rprivate /
hostname "$name"
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t sysfs sysfs /sys # with the network devices of this node
mkdir -p /run/munge
ip=/usr/sbin/ip
if [ "$name" = login ]; then
    # what the packages have appears as if they were installed, here and on the nodes alone
    cd "$4"
    mount -t overlay -o lowerdir=usr:/usr overlay /usr
    cd "$place"
    mount -t overlay -o lowerdir=etc:/etc overlay /etc
    mount --bind "$place/ibex" /ibex
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
munged --key-file="$place/munge.key" --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid \
    --log-file="$place/log/munged.$name.log" --seed-file=/run/munge/seed --force
if [ "$name" = login ]; then
    # the accounts: a MariaDB on a socket of its own, and slurmdbd before it
    sql=$place/sql
    mariadb-install-db --no-defaults --user=root --datadir="$sql" --auth-root-authentication-method=normal \
        --skip-test-db >"$place/log/mariadb-install.log" 2>&1
    echo "CREATE DATABASE slurm_acct_db;" >"$place/accounts.sql"
    export MYSQL_UNIX_PORT=/run/mariadb.socket
    mariadbd --no-defaults --user=root --datadir="$sql" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --pid-file=/run/mariadb.pid \
        --init-file="$place/accounts.sql" >"$place/log/mariadb.log" 2>&1 &
    until [ -S "$MYSQL_UNIX_PORT" ]; do sleep 0.05; done
    slurmdbd -D >"$place/log/slurmdbd.out" 2>&1 &
    until sacctmgr -i add cluster test >"$place/log/sacctmgr.log" 2>&1; do sleep 0.05; done
    slurmctld -D -i >"$place/log/slurmctld.out" 2>&1 &
    touch "$place/log/login.up"
else
    slurmd -D -N "$name" >"$place/log/slurmd.$name.out" 2>&1 &
fi
set +e
while true; do wait -n; [ $? = 127 ] && sleep 1; done # reaps orphans, and outlives its daemons
