#!/bin/bash
# Mounts the cluster's file system on the node that it runs on: PLACE. Ends when it is mounted.
set -eu
place=$1
client() { exec -a glusterfs glusterfsd "$@"; } # one program is server and client, and goes by its name
(client --volfile="$place/client.vol" --log-file="$place/log/glusterfs.$(hostname).log" "$place/shared")
