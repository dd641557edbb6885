#!/usr/bin/env bash
# Runs stages in one plain process, without any launcher: one rank, for a small model or a debugger.
#   launch/local.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS, where it is set, has to be 1.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads sources of its own in the locale's encoding

if [ "${MINIMA_RANKS:-1}" != 1 ]; then
  echo "launch/local.sh runs one process, not MINIMA_RANKS=$MINIMA_RANKS: take another launcher, or ranks=1" >&2
  exit 2
fi
command=(python -m minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
