#!/usr/bin/env bash
# Starts the ranks of stages through srun, on all nodes of a Slurm job: in a script of sbatch or a shell of salloc.
#   launch/srun.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS says how many on each node; when it is not set: as many as the job asked for (--ntasks, or
# --ntasks-per-node), else one for each of its GPUs. MINIMA_SRUN_OUTPUT: srun's --output, a file for each rank with
# `%t` in it; MINIMA_SRUN_OPTIONS: more options of srun. `minima submit` writes jobs that are also requeued.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads sources of its own in the locale's encoding

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "launch/srun.sh starts ranks inside a job of Slurm, and SLURM_JOB_ID is not set here: call it in a script of" \
    "sbatch or in a shell of salloc, or let \`minima submit\` write the jobs" >&2
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
    echo "how many ranks on each node? Ask for them with --ntasks-per-node or --gpus-per-node, or set MINIMA_RANKS" \
      "(it is '${MINIMA_RANKS:-}')" >&2
    exit 2
  fi
  where=(--nodes="$nodes" --ntasks=$((nodes * ranks)) --ntasks-per-node="$ranks")
fi
options=(--kill-on-bad-exit=1 --export=ALL "${where[@]}")
# srun takes a rank's cores from the job only up to Slurm 22.04; later ones would give it one.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
[ -z "${MINIMA_SRUN_OUTPUT:-}" ] || options+=(--output="$MINIMA_SRUN_OUTPUT" --open-mode=append)
read -ra more <<<"${MINIMA_SRUN_OPTIONS:-}"
unset RANK WORLD_SIZE LOCAL_RANK  # of another launcher; the ranks' own come from srun
# What an srun told the shell that it started; what a user exports for srun comes without a type.
[ -z "${SLURM_CPU_BIND_TYPE+x}" ] || unset "${!SLURM_CPU_BIND@}"
[ -z "${SLURM_MEM_BIND_TYPE+x}" ] || unset "${!SLURM_MEM_BIND@}"
command=(srun "${options[@]}" "${more[@]}" python -m minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
