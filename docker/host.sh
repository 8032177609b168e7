#!/bin/bash
# The first process of a container: host controller, or host node. All share the key that the controller makes.
set -euo pipefail
key=/shared/.munge.key
if [ "$1" = controller ] && [ ! -s "$key" ]; then
    (umask 077 && head -c 1024 /dev/urandom > "$key.new" && mv "$key.new" "$key")
fi
until [ -s "$key" ]; do sleep 0.2; done
install -m 400 -o root "$key" /etc/munge/munge.key
chmod 755 /run/munge
munged --force
if [ "$1" = controller ]; then
    exec slurmctld -D
fi
for number in 0 1; do # made-up GPUs
    [ -e "/dev/tminus-gpu$number" ] || mknod "/dev/tminus-gpu$number" c 1 3
done
exec slurmd -D -N "$(hostname)"
