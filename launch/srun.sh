#!/usr/bin/env bash
# Starts the ranks of stages with srun, on all nodes of a Slurm job: in an sbatch script or a shell from salloc.
#   launch/srun.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS: ranks on each node; by default as many as the job requested (--ntasks, or --ntasks-per-node), or else
# one for each of its GPUs. MINIMA_SRUN_OUTPUT: srun's --output; with `%t` in it, a file for each rank.
# MINIMA_SRUN_OPTIONS: further options of srun. `minima submit` writes jobs that are also requeued.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads its own source files in the locale's encoding

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "launch/srun.sh starts ranks inside a Slurm job, but SLURM_JOB_ID is not set: call it in an sbatch script or" \
    "in a shell from salloc, or let \`minima submit\` write the jobs" >&2
  exit 2
fi
if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  echo "launch/srun.sh inside task ${SLURM_PROCID:-?} of $SLURM_STEP_NUM_TASKS of an srun: every task would start all" \
    "ranks again; call it without srun" >&2
  exit 2
fi
nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
ranks=${MINIMA_RANKS:-}
if [ -z "$ranks" ] && [ -n "${SLURM_NTASKS:-}" ]; then
  where=(--ntasks="$SLURM_NTASKS")
  [[ ! ${SLURM_NTASKS_PER_NODE:-} =~ ^[0-9]+$ ]] || where+=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE")
else
  ranks=${ranks:-${SLURM_NTASKS_PER_NODE:-${gpus##*:}}}
  if [[ ! $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "the number of ranks per node is unknown: request it with --ntasks-per-node or --gpus-per-node, or set" \
      "MINIMA_RANKS (it is '${MINIMA_RANKS:-}')" >&2
    exit 2
  fi
  where=(--nodes="$nodes" --ntasks=$((nodes * ranks)) --ntasks-per-node="$ranks")
fi
options=(--kill-on-bad-exit=1 --export=ALL "${where[@]}")
# Only up to Slurm 22.04 does srun take the number of cores per rank from the job; later versions would use one.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
[ -z "${MINIMA_SRUN_OUTPUT:-}" ] || options+=(--output="$MINIMA_SRUN_OUTPUT" --open-mode=append)
read -ra more <<<"${MINIMA_SRUN_OPTIONS:-}"
unset RANK WORLD_SIZE LOCAL_RANK  # from another launcher; the ranks use srun's variables
# These are set by an srun that started this shell; a user's own settings for srun come without a _TYPE variable.
[ -z "${SLURM_CPU_BIND_TYPE+x}" ] || unset "${!SLURM_CPU_BIND@}"
[ -z "${SLURM_MEM_BIND_TYPE+x}" ] || unset "${!SLURM_MEM_BIND@}"
command=(srun "${options[@]}" "${more[@]}" python -m minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
