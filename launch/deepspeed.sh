#!/usr/bin/env bash
# Starts the ranks of stages on this machine through the deepspeed launcher.
#   launch/deepspeed.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS says how many; one for each GPU, or two without a GPU, when it is not set.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }

ranks=${MINIMA_RANKS:-$(python -c 'from minima.launcher import default_ranks; print(default_ranks())')}
port=$(python -c 'from minima.launcher import free_port; print(free_port())')
where=(--num_gpus "$ranks")
visible=${CUDA_VISIBLE_DEVICES:-}
visible=${visible// /}
visible=${visible%%,-*}  # CUDA ignores everything from the first negative entry on
if [[ -n $visible && $visible != -* && $visible != NoDevFiles && ${DS_ACCELERATOR:-} != cpu ]]; then
  # Told a number of GPUs, deepspeed forgets CUDA_VISIBLE_DEVICES and takes the first ones of the machine.
  if [[ ! $visible =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    echo "the deepspeed launcher knows GPUs by number only, not CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES:" \
      "take launch/torchrun.sh" >&2
    exit 2
  fi
  count=$(tr -cd , <<<"$visible" | wc -c)
  if [ "$ranks" -gt $((count + 1)) ]; then
    echo "$ranks ranks on the $((count + 1)) GPUs of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" >&2
    exit 2
  fi
  where=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$visible")")
fi
command=(deepspeed "${where[@]}" --master_addr 127.0.0.1 --master_port "$port" --no_local_rank
  --log_level error --module minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
