#!/usr/bin/env bash
# Runs stages in one plain process without a launcher: a single rank, for a small model or a debugger.
#   launch/local.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS must be 1 if it is set.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads its own source files in the locale's encoding

if [ "${MINIMA_RANKS:-1}" != 1 ]; then
  echo "launch/local.sh runs one process, not MINIMA_RANKS=$MINIMA_RANKS: use another launcher, or ranks=1" >&2
  exit 2
fi
command=(python -m minima stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
