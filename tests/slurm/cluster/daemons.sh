#!/bin/bash
# The daemons of a node, and whoever adopts what they leave: NAME PLACE RUN. On USR1 slurmd, or slurmctld, starts again.
set -eu
name=$1 place=$2 run=$3
bare="setpriv --inh-caps=-all --ambient-caps=-all" # root of a namespace starts them, and its powers are not for them
mkdir -p "$run/munge"
if [ ! -S "$run/munge/socket" ]; then # nodes of the flat form share one
    $bare munged --key-file="$place/munge.key" --socket="$run/munge/socket" --pid-file="$run/munge/munged.pid" \
        --log-file="$place/log/munged.$name.log" --seed-file="$run/munge/seed" --force
fi
if [ "$name" = login ]; then
    # the accounts: a MariaDB on a socket of its own, and slurmdbd before it
    sql=(--no-defaults --user="$(id -un)" --datadir="$place/sql")
    base=$(dirname "$(dirname "$(command -v mariadbd)")")
    mariadb-install-db "${sql[@]}" --basedir="$base" --auth-root-authentication-method=normal --skip-test-db \
        >"$place/log/mariadb-install.log" 2>&1
    echo "CREATE DATABASE slurm_acct_db;" >"$place/accounts.sql"
    export MYSQL_UNIX_PORT=$run/mariadb.socket
    $bare mariadbd "${sql[@]}" --basedir="$base" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --pid-file="$run/mariadb.pid" \
        --init-file="$place/accounts.sql" >"$place/log/mariadb.log" 2>&1 &
    until [ -S "$MYSQL_UNIX_PORT" ]; do sleep 0.05; done
    $bare slurmdbd -D >"$place/log/slurmdbd.out" 2>&1 &
    until sacctmgr -i add cluster test >"$place/log/sacctmgr.log" 2>&1; do sleep 0.05; done
    control() { $bare slurmctld -D "$@" >>"$place/log/slurmctld.out" 2>&1 & }
    trap control USR1
    control -i
    touch "$place/log/login.up"
else
    start() { $bare slurmd -D -N "$name" -d "$(command -v slurmstepd)" >>"$place/log/slurmd.$name.out" 2>&1 & }
    trap start USR1
    start
fi
set +e
while true; do wait -n; [ $? = 127 ] && sleep 1; done # reaps orphans, and outlives its daemons
