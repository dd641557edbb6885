#!/usr/bin/env bash
# Starts the ranks of stages with Open MPI's mpirun, on this machine, on those of a host file or of a Slurm job.
#   launch/mpirun.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS: ranks on each machine; by default one for each GPU of this machine, or two without a GPU.
# MINIMA_HOSTFILE: the machines, a line `HOST slots=N` each; without MINIMA_RANKS a host gets a rank for each slot.
# Several machines need mpi4py, through which the ranks find rank 0, or MASTER_ADDR and MASTER_PORT.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads its own source files in the locale's encoding

[[ ${MINIMA_RANKS:-1} =~ ^[1-9][0-9]*$ ]] || { echo "MINIMA_RANKS=$MINIMA_RANKS is not a number of ranks" >&2; exit 2; }
options=(--bind-to none)  # otherwise all threads of a rank would share one core
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
if [ -n "${MINIMA_HOSTFILE:-}" ]; then
  [ -r "$MINIMA_HOSTFILE" ] || { echo "MINIMA_HOSTFILE=$MINIMA_HOSTFILE cannot be read" >&2; exit 2; }
  options+=(--hostfile "$MINIMA_HOSTFILE")
  [ -z "${MINIMA_RANKS:-}" ] || options+=(--map-by "ppr:$MINIMA_RANKS:node")
else
  ranks=${MINIMA_RANKS:-$(python -c 'from minima.launcher import default_ranks; print(default_ranks())')}
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
    options+=(--map-by "ppr:$ranks:node")
  else
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(python -c 'from minima.launcher import free_port; print(free_port())')
    export MASTER_ADDR MASTER_PORT
    options+=(-np "$ranks" --oversubscribe)  # allow more ranks than cores
  fi
fi
# Ranks on other machines get only these variables; -x NAME keeps their values, such as tokens, off the command line.
names='PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|MASTER_(ADDR|PORT)|MINIMA_(DRIVER|TERMINAL)|PYTHON.*'
names+='|(CUBLAS|CUDA|DS|GLOO|HF|NCCL|OMP|TOKENIZERS|TORCH|TRITON|UCX|WANDB)_.*'
while read -r name; do
  options+=(-x "$name")
done < <(compgen -e | grep -xE "$names")
unset RANK WORLD_SIZE LOCAL_RANK  # from another launcher; this one sets its own for the ranks
command=(mpirun "${options[@]}" python -m minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
