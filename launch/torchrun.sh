#!/usr/bin/env bash
# Starts the ranks of stages with torchrun, on this machine or, if called once on each, on several.
#   launch/torchrun.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS: ranks on this machine; by default one for each GPU, or two without a GPU.
# Several machines: inside Slurm `srun --ntasks-per-node=1 launch/torchrun.sh ...`; elsewhere, on each machine, with
# MINIMA_NODES (how many machines), MINIMA_NODE_RANK (from 0), MASTER_ADDR (machine 0) and MASTER_PORT (29500).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads its own source files in the locale's encoding

fail() { printf '%s\n' "$*" >&2; exit 2; }

[[ ${MINIMA_RANKS:-1} =~ ^[1-9][0-9]*$ ]] || fail "MINIMA_RANKS=$MINIMA_RANKS is not a number of ranks"
nodes=1 node=0 address=127.0.0.1 port=
if [ -n "${MINIMA_NODES:-}" ]; then
  [[ $MINIMA_NODES =~ ^[1-9][0-9]*$ ]] || fail "MINIMA_NODES=$MINIMA_NODES is not a number of machines"
  nodes=$MINIMA_NODES
  if [ "$nodes" -gt 1 ]; then
    [ -z "${MINIMA_DRIVER:-}" ] || fail "minima run starts the ranks of one machine only, but MINIMA_NODES=$nodes: unset it," \
      "or call launch/torchrun.sh on each machine"
    node=${MINIMA_NODE_RANK:-} address=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
    [ -n "$address" ] || fail "MINIMA_NODES=$nodes without MASTER_ADDR: export the name of machine 0 on every machine"
    [[ $node =~ ^[0-9]+$ && $node -lt $nodes ]] ||
      fail "MINIMA_NODE_RANK=${node:-missing} of MINIMA_NODES=$nodes: machines are counted from 0"
  fi
elif [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  nodes=$SLURM_STEP_NUM_NODES node=${SLURM_NODEID:-}
  [ "${SLURM_STEP_NUM_TASKS:-}" = "$nodes" ] || fail "srun has started ${SLURM_STEP_NUM_TASKS:-?} tasks on $nodes" \
    "nodes, and each of them would start all ranks of its node: give srun --ntasks-per-node=1"
  master=$(python -c 'from minima.launcher import step_master; print(*step_master())')
  address=${MASTER_ADDR:-${master% *}} port=${MASTER_PORT:-${master#* }}
fi
ranks=${MINIMA_RANKS:-$(python -c 'from minima.launcher import default_ranks; print(default_ranks())')}
[ -n "$port" ] || port=$(python -c 'from minima.launcher import free_port; print(free_port())')
where=(--nnodes "$nodes" --nproc-per-node "$ranks" --master-addr "$address" --master-port "$port")
[ "$nodes" = 1 ] || where+=(--node-rank "$node")
command=(torchrun "${where[@]}" --module minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
