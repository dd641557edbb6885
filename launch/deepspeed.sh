#!/usr/bin/env bash
# Starts the ranks of stages on this machine through the deepspeed launcher.
#   launch/deepspeed.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS says how many; one for each GPU, or two without a GPU, when it is not set.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }

ranks=${MINIMA_RANKS:-$(python -c 'from minima.launcher import default_ranks; print(default_ranks())')}
port=$(python -c 'from minima.launcher import free_port; print(free_port())')
command=(deepspeed --num_gpus "$ranks" --master_addr 127.0.0.1 --master_port "$port" --no_local_rank
  --log_level error --module minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
